"""Real runs of `qlora-train` in processes of their own, whose every process can be found and harmed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

STEPS = 6
TIMEOUT = 600
MARK = "QLORA_TEST_MARK"
Shown = dict[tuple[str, str, str], float]
"""Ray's gauges by name, run and rank."""


def command_of(script: Path) -> list[str]:
    """What starts `qlora-train`: its script, or its module where pip has put it elsewhere, as with `--target`."""
    return [str(script)] if script.exists() else [sys.executable, "-c", "from launch.train import main; main()"]


COMMAND = command_of(Path(sys.executable).with_name("qlora-train"))


@dataclass
class Run:
    """A run's folder and the process that carries it out."""

    folder: Path
    specification: Path
    environment: dict[str, str]
    listened_on: set[str] = field(default_factory=set)
    begun_with: dict[int, float] = field(default_factory=dict)
    """When each step was first done that the events told of before a start; one that was lost is taken out of them."""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        for step, done in self.steps().items():
            self.begun_with.setdefault(step, done)
        return subprocess.Popen(
            [*COMMAND, self.specification, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output

    def has_done(self, step: int) -> bool:
        return any(event["event"] == "step" and event["step"] >= step for event in self.events())

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        self.wait_for(lambda: self.has_done(step), process, f"step {step}")

    def wait_for(self, reached: Callable[[], bool], process: subprocess.Popen[str], what: str = "it") -> None:
        """Wait until something has come about while the run goes on."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            if reached():
                return
            time.sleep(0.05)
        output = process.communicate()[0] if process.poll() is not None else "it is still running"
        pytest.fail(f"{what} was not reached: {output}")

    def workers_of_attempts(self) -> list[int]:
        """The number of workers that each attempt so far was planned for."""
        return [attempt["strategy"]["world_size"] for attempt in self.record["attempts"]]

    def events(self) -> list[dict[str, Any]]:
        """What the workers have told so far."""
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def steps(self) -> dict[int, float]:
        """When each step was done last."""
        return {event["step"]: event["time"] for event in self.events() if event["event"] == "step"}

    def done_twice(self) -> int:
        """Steps that were lost and done again.

        metrics.jsonl has when each was first done, but for those that a driver had not read before it was killed.
        """
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        told = [json.loads(line) for line in lines]
        first = {line["step"]: line["time"] for line in told if "train/loss" in line}
        last = self.steps()
        return sum(
            min(first[step], self.begun_with.get(step, math.inf)) != last[step] for step in first.keys() & last.keys()
        )

    @property
    def record(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return fields

    @property
    def adapter_digest(self) -> str:
        return hashlib.sha256((self.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    def processes(self) -> list[psutil.Process]:
        """All processes that carry this run's mark in their environment: Ray's inherit it."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.environment[MARK]:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def listening(self) -> set[str]:
        """The addresses on which any process of the run accepts connections."""
        return {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in self.processes()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "RayTrainWorker" in " ".join(process.cmdline())]

    def ray_metrics(self) -> Shown:
        """What our gauges say at the node's metrics endpoint."""
        for process in self.processes():
            found = re.search(r"--session[-_]dir=(\S+)", " ".join(process.cmdline()))
            ports = sorted(Path(found[1]).glob("metrics_export_port_*")) if found else []
            if not ports:
                continue
            with urllib.request.urlopen(f"http://127.0.0.1:{ports[0].read_text()}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            pattern = r'^(ray_qlora_\w+){.*rank="(\d)".*run="(\w+)".*} (\S+)$'
            return {(name, run, rank): float(value) for name, rank, run, value in re.findall(pattern, text, re.M)}
        return {}

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + 60
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, [process.cmdline() for process in left]


def make_run(folder: Path, base: Path, data: Path, **changes: dict[str, Any]) -> Run:
    """A run of a few seconds on two workers; `changes` are put into the specification's sections."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": str(base),
        "data": {"path": str(data), "eval_fraction": 0.1},
        "recipe": {
            "rank": 4,
            "seq_len": 64,
            "tokens_per_step": 512,
            "learning_rate": 0.01,
            "optimizer": "adamw_8bit",
            "dropout": 0.05,
            "steps": STEPS,
        },
        "strategy": {"world_size": 2, "zero_stage": 2, "micro_batch": 2},
        "checkpoints": {"every_steps": 2, "keep": 2},
        "evaluation": {"every_steps": 3},
        "output": "out",
    }
    for section, values in changes.items():
        fields[section] = {**fields.get(section, {}), **values}
    specification = folder / "run.yaml"
    specification.write_text(yaml.safe_dump(fields))
    environment = {**os.environ, "QLORA_LEDGER": str(folder / "ledger.sqlite"), MARK: uuid.uuid4().hex}
    return Run(folder / "out", specification, environment)
