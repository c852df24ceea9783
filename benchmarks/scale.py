"""`make scale`: many clients submit many short runs to a cluster of three nodes; some clients are killed meanwhile.

Nothing stands in for anything: the head, the nodes, the clients (processes of qlora-submit), the runs and the ledger
are those that users have, on one machine.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import psutil
import yaml

from benchmarks.place import Place
from benchmarks.speed import ROOT, machine
from benchmarks.training.case import Case, make_model
from launch.command import main as run_command
from orchestrator.ledger import latest
from qlora_core.files import write_json

sys.path += [str(ROOT / "tests"), str(ROOT / "examples")]
from job_clusters import COMMAND, Cluster, job_cluster

RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
DOCUMENT = ROOT / "docs" / "scale.md"
PLACE = Place(DOCUMENT, "make scale")
KILLED = 0.1
"""The part of the clients that are killed while they follow their run; the run is then submitted once more."""
STEPS = 3
KEPT_FROM = 50
"""Fewer runs try the benchmark itself, and nothing of them is kept."""
SAMPLE_SECONDS = 5.0
DRIVERS_BYTES = 4 * 1024**3
"""The head's memory for what drives the runs: so many GiB, so many runs that are driven at once."""


@click.command(name="benchmarks.scale")
@click.option("--runs", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--clients", type=click.IntRange(min=1), default=20, show_default=True, help="At the same time.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(runs: int, clients: int, debug: bool) -> int:
    """Submit the runs, and write what became of them; exit code 1 if any was lost or carried out twice."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder, three_nodes() as cluster:
        results = Scale(Path(folder), cluster, runs).carried_out(clients)
    click.echo(json.dumps(results, indent=2))
    whole = results["complete"] == results["ledger_rows"] == runs and not results["steps_done_twice"]
    if whole and runs >= KEPT_FROM:
        write_json(RESULTS, results)
        PLACE.write(table(results))
    return 0 if whole else 1


@contextmanager
def three_nodes() -> Iterator[Cluster]:
    """A head, and two nodes with a CPU each."""
    with ExitStack() as stack:
        cluster = stack.enter_context(job_cluster(f"--memory={DRIVERS_BYTES}"))
        for ip in ("127.0.0.2", "127.0.0.3"):
            stack.enter_context(cluster.node(ip))
        yield cluster


class Scale:
    """The runs, their clients, and what is measured of both."""

    def __init__(self, folder: Path, cluster: Cluster, runs: int) -> None:
        self.folder, self.cluster, self.runs = folder, cluster, runs
        make_model(Case(layers=2, hidden=64, vocabulary=1024), folder / "base")
        rows = [{"prompt": f"Say {number}.", "completion": f" {number}!"} for number in range(64)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.lock = threading.Lock()
        self.seconds: list[float] = []
        self.client_bytes: list[int] = []
        self.killed = 0
        self.ray_bytes: list[tuple[float, int, int]] = []

    def carried_out(self, clients: int) -> dict[str, Any]:
        """All runs through so many clients at once."""
        began = time.monotonic()
        ended = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(ended, began), daemon=True)
        sampler.start()
        with ThreadPoolExecutor(clients) as pool:
            codes = list(pool.map(self._submitted, range(self.runs)))
        ended.set()
        sampler.join()
        return self._results(time.monotonic() - began, clients, codes)

    def _submitted(self, number: int) -> int:
        """Submit a run and follow it to its end; now and then the client is killed and another takes its place."""
        specification = self._specification(number)
        dies = random.Random(number).random() < KILLED  # noqa: S311  # not cryptography
        begin = time.monotonic()
        client = self._client(specification)
        if dies:
            time.sleep(random.Random(-number).uniform(5, 40))  # noqa: S311
            if client.poll() is None:
                client.send_signal(signal.SIGKILL)
                with self.lock:
                    self.killed += 1
            client.wait()
            return self._again(specification)
        code, told, most = self._watched(client, begin)
        with self.lock:
            self.seconds += [told] if told else []
            self.client_bytes.append(most)
        return code

    def _again(self, specification: Path) -> int:
        """Submit until the run is complete: while it is under way that is refused."""
        while True:
            client = self._client(specification)
            output, _ = client.communicate()
            if client.returncode != 2 or "under way" not in output:
                return client.returncode
            time.sleep(5)

    def _client(self, specification: Path) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            **self.cluster.users,
            "RAY_API_SERVER_ADDRESS": self.cluster.address,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        return subprocess.Popen(
            [COMMAND, str(specification), "--follow"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _watched(self, client: subprocess.Popen[str], begin: float) -> tuple[int, float | None, int]:
        """Its exit code, the seconds until it had submitted, and the most memory that it took."""
        told, most = None, 0
        process = psutil.Process(client.pid)
        for line in client.stdout or ():
            if line.startswith("Submitted as"):
                told = time.monotonic() - begin
            with suppress(psutil.Error):
                most = max(most, process.memory_info().rss)
        return client.wait(), told, most

    def _specification(self, number: int) -> Path:
        fields = {
            "name": f"run-{number:03}",
            "model": str(self.folder / "base"),
            "data": {"path": "train.jsonl", "eval_fraction": 0},
            "recipe": {"rank": 4, "seq_len": 64, "tokens_per_step": 128, "steps": STEPS, "optimizer": "adamw"},
            "strategy": {"world_size": 1},
            "checkpoints": {"every_steps": STEPS},
            "tracking": {"to": []},
            "output": f"out/run-{number:03}",
        }
        path = self.folder / f"run-{number:03}.yaml"
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return path

    def _sample(self, ended: threading.Event, began: float) -> None:
        """The memory of Ray's own processes while the runs go on."""
        while not ended.wait(SAMPLE_SECONDS):
            by_name: Counter[str] = Counter()
            for process in psutil.process_iter(["name", "cmdline", "memory_info"]):
                line = " ".join(process.info["cmdline"] or [])
                for name in ("gcs_server", "dashboard/dashboard.py"):
                    if name in line:
                        by_name[name] += process.info["memory_info"].rss
            moment = (time.monotonic() - began, by_name["gcs_server"], by_name["dashboard/dashboard.py"])
            self.ray_bytes.append(moment)

    def _results(self, seconds: float, clients: int, codes: list[int]) -> dict[str, Any]:
        records = [json.loads(path.read_text()) for path in self.folder.glob("out/*/run.json")]
        twice = 0
        for path in self.folder.glob("out/*/events.jsonl"):
            events = [json.loads(line) for line in path.read_text().splitlines()]
            steps = [event["step"] for event in events if event["event"] == "step"]
            twice += len(steps) - len(set(steps))
        ledger = Path(os.environ["QLORA_LEDGER"])
        rows = latest(ledger, 10 * self.runs) if ledger.exists() else []
        first, last = self.ray_bytes[0], self.ray_bytes[-1]
        half = len(self.client_bytes) // 2
        return {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "ray": metadata.version("ray"),
            "runs": self.runs,
            "clients": clients,
            "clients_killed": self.killed,
            "complete": sum(record["status"] == "complete" for record in records),
            "attempts": sum(len(record["attempts"]) for record in records),
            "steps_done_twice": twice,
            "exit_codes": dict(Counter(map(str, codes))),
            "ledger_rows": len({run for run, *_ in rows}),
            "seconds": round(seconds),
            "submit_seconds": quartiles(self.seconds),
            "client_mib": quartiles([size / 2**20 for size in self.client_bytes]),
            "client_mib_halves": [
                round(statistics.median(part) / 2**20)
                for part in (self.client_bytes[:half], self.client_bytes[half:])
                if part
            ],
            "gcs_mib": [round(first[1] / 2**20), round(last[1] / 2**20)],
            "dashboard_mib": [round(first[2] / 2**20), round(last[2] / 2**20)],
        }


def table(results: Mapping[str, Any]) -> str:
    """The results as they stand in docs/scale.md."""
    on = results["machine"]
    submit, client = results["submit_seconds"], results["client_mib"]
    early, late = results["client_mib_halves"]
    grown = (results["gcs_mib"][1] - results["gcs_mib"][0]) / results["runs"]
    rows = {
        "runs, clients at once, clients killed while they followed theirs": f"{results['runs']:,}, "
        f"{results['clients']}, {results['clients_killed']}",
        "runs complete, rows in the ledger": f"{results['complete']:,}, {results['ledger_rows']:,}",
        "steps done twice": str(results["steps_done_twice"]),
        "attempts, of which each run needs one": f"{results['attempts']:,}",
        "all of it, minutes": f"{results['seconds'] / 60:.0f}",
        "from the command to the submitted job, seconds (quartiles)": " / ".join(f"{each:.1f}" for each in submit),
        "memory of a client, MiB (quartiles)": " / ".join(f"{each:.0f}" for each in client),
        "the same, median of the first and of the second half": f"{early}, {late}",
        "Ray's GCS, MiB at first and at last": " and ".join(map(str, results["gcs_mib"])) + f": {grown:.1f} a run",
        "Ray's dashboard, MiB at first and at last": " and ".join(map(str, results["dashboard_mib"])),
    }
    lines = [
        f"Measured on {results['date']}: {on['processor']}, {on['cores']} cores, {on['system']}, Ray {results['ray']};",
        "a head without workers and two nodes with a CPU each, token authentication.",
        "",
        "| | |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
    ]
    return "\n".join(lines)


def quartiles(values: list[float]) -> list[float]:
    """The quartiles, rounded to a tenth."""
    if len(values) < 2:
        return [round(value, 1) for value in values]
    return [round(value, 1) for value in statistics.quantiles(values, n=4)]


if __name__ == "__main__":
    os.environ["QLORA_LEDGER"] = tempfile.mkstemp(suffix=".sqlite", prefix="scale-")[1]
    Path(os.environ["QLORA_LEDGER"]).unlink()
    run_command(command)
