"""qlora-train on real parts: real Ray workers, real NF4, real DeepSpeed, real signals. A run takes some 20 seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from click.testing import CliRunner
from filelock import FileLock
from ray_heads import ray_head
from real_runs import STEPS, TIMEOUT, Run, Shown, make_run
from safetensors.numpy import load_file, save_file

from launch.train import train
from qlora_core.training.examples import Examples
from qlora_core.training.manifest import check, complete
from qlora_core.training.sampling import Order
from qlora_core.training.tokenizer import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]
INJECT = Path(__file__).parent / "chaos" / "inject"


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Callable[[str], Run]:
    return lambda name: make_run(tmp_path_factory.mktemp(name), tiny_base, conversations)


@pytest.fixture(scope="module")
def finished(new_run: Callable[[str], Run]) -> tuple[Run, str]:
    run = new_run("finished")
    process = run.start()
    run.wait_for_step(1, process)
    run.listened_on |= run.listening()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return run, output


def test_it_listens_on_loopback_alone(finished: tuple[Run, str]) -> None:
    assert finished[0].listened_on
    assert finished[0].listened_on <= {"127.0.0.1", "::1"}


def test_a_run_leaves_adapter_checkpoints_record_report_and_a_row(finished: tuple[Run, str]) -> None:
    run, output = finished
    record = run.record
    assert (record["schema_version"], record["status"], len(record["attempts"])) == (1, "complete", 1)
    assert list(complete(run.folder / "checkpoints")) == [4, 6]
    manifest = json.loads((run.folder / "checkpoints" / "best" / "checkpoint.json").read_text())
    assert manifest["strategy"] == record["plan"]["strategy"]
    assert manifest["strategy"].items() >= {"world_size": 2, "zero_stage": 2, "micro_batch": 2}.items()  # as asked for
    assert record["results"]["eval_after"] < record["results"]["eval_before"]
    for shown in ("FITS", "Evaluation loss", "predicted", "measured", str(run.folder / "adapter"), "report.md"):
        assert shown in output
    report = (run.folder / "report.md").read_text()
    assert f"{record['results']['eval_after']:.4f}" in report
    assert f"| data.path | {json.dumps(record['specification']['data']['path'])} |" in report
    held = record["measured"]["weights"]
    adapter = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert held["trained"] == sum(tensor.nbytes for tensor in adapter.values())
    whole = record["predicted"]["phases"]["after_load"]
    assert held["frozen"] + held["trained"] == pytest.approx(whole, rel=0.01)
    assert "## Its parts, measured" in report
    assert record["measured"]["optimizer_state"] == record["plan"]["estimate"]["gpu"]["components"]["optimizer_state"]
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    evaluated = {event["step"]: event for event in events if event["event"] == "eval"}
    assert list(evaluated) == [0, 2, 3, 4, 6]  # before, at each checkpoint, and every third step
    assert evaluated[3]["perplexity"] == pytest.approx(math.exp(evaluated[3]["eval_loss"]))
    assert f"| 3 | {evaluated[3]['eval_loss']:.4f} | {evaluated[3]['perplexity']:.2f} |" in report
    card = (run.folder / "adapter" / "README.md").read_text()
    assert f"| loss | {record['results']['eval_before']:.4f} | {record['results']['eval_after']:.4f} |" in card
    assert str(run.folder.parent) not in card
    assert record["identity"]["data"] in card
    assert "Traceback" not in output
    with sqlite3.connect(run.environment["QLORA_LEDGER"]) as ledger:
        rows = ledger.execute("SELECT name, status, predicted_allocated_bytes, measured_allocated_bytes FROM runs")
        assert rows.fetchall() == [
            ("tiny", "complete", record["predicted"]["allocated_bytes"], record["measured"]["allocated_bytes"])
        ]


def test_no_process_outlives_it(finished: tuple[Run, str]) -> None:
    finished[0].assert_nothing_is_left()


def test_its_checkpoints_hold_at_most_20_bytes_per_trained_parameter_besides_random_states(
    finished: tuple[Run, str],
) -> None:
    folder = finished[0].folder / "checkpoints" / "step-00000006"
    spans = [span for rank in range(2) for span in json.loads((folder / f"rank-{rank:05d}.json").read_text())["spans"]]
    trained = sum(numel for _, _, numel, _, _ in spans)
    tensors = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert tensors <= 20 * trained
    assert sorted(path.name for path in folder.rglob("*.safetensors")) == [
        "adapter_model.safetensors",
        "optimizer-00000.safetensors",
        "optimizer-00001.safetensors",
    ]


def test_a_complete_run_says_so_and_does_nothing(finished: tuple[Run, str]) -> None:
    run, _ = finished
    before = (run.folder / "run.json").read_bytes()
    code, output = run.finish()
    assert (code, "complete already" in " ".join(output.split())) == (0, True)
    assert (run.folder / "run.json").read_bytes() == before


def test_the_command_of_the_report_is_of_the_same_run(finished: tuple[Run, str]) -> None:
    run, _ = finished
    report = (run.folder / "report.md").read_text().replace("\\", "")  # before what Markdown would take for its own
    [found] = re.findall(r"qlora-train (\S+specification\.yaml) --fresh", report)
    code, output = dataclasses.replace(run, specification=Path(found)).finish()
    assert (code, "complete already" in " ".join(output.split())) == (0, True)


@pytest.mark.parametrize(
    ("override", "shown"),
    [("recipe.rank=8", "recipe.rank"), ("data.eval_fraction=0.2", "data.eval_fraction"), ("seed=7", "seed")],
)
def test_the_same_name_with_another_recipe_data_or_seed_shows_the_difference(
    finished: tuple[Run, str], override: str, shown: str
) -> None:
    code, output = finished[0].finish(override)
    assert code == 2
    assert f"error: {shown}: the run in" in output
    assert "--fresh" in output
    assert "Traceback" not in output


ALONE = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
base, run = sys.argv[1:]
quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantization)
model = PeftModel.from_pretrained(model, run + "/adapter").eval()
data = load_file(run + "/data/eval.safetensors")
ids, learned, starts = data["ids"].long(), data["learned"].bool(), data["starts"].tolist()
total = tokens = 0
for first, last in zip(starts, starts[1:]):
    labels = torch.where(learned[first:last], ids[first:last], -100)
    count = int((labels[1:] != -100).sum())
    with torch.no_grad():
        total += float(model(input_ids=ids[None, first:last], labels=labels[None]).loss) * count
    tokens += count
assert not any(name.split(".")[0] in ("qlora_core", "orchestrator", "launch") for name in sys.modules)
prompt = ids[None, : int(learned[: starts[1]].nonzero()[0])]
answer = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False)
text = AutoTokenizer.from_pretrained(base).decode(answer[0, prompt.shape[1] :], skip_special_tokens=True).strip()
print(json.dumps({"loss": total / tokens, "answer": text}))
"""


def test_peft_and_transformers_alone_reproduce_the_evaluation_loss_and_the_answer(
    finished: tuple[Run, str], tiny_base: Path
) -> None:
    run, _ = finished
    answer = subprocess.run(
        [sys.executable, "-c", ALONE, str(tiny_base), str(run.folder)], capture_output=True, text=True, check=True
    )
    given = json.loads(answer.stdout)
    assert given["loss"] == pytest.approx(run.record["results"]["eval_after"], abs=1e-3)
    assert given["answer"] == run.record["results"]["answers_after"][0]["given"]


def invoke(*arguments: str) -> dict[str, Any]:
    """What a subcommand of qlora-train prints as JSON."""
    result = CliRunner().invoke(train, [*arguments, "--json"], standalone_mode=False)
    assert result.exception is None, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_evaluate_measures_what_the_run_measured(finished: tuple[Run, str]) -> None:
    run, _ = finished
    base, adapter = invoke("evaluate", str(run.folder))["evaluated"]
    results = run.record["results"]
    assert base["loss"]["value"] == pytest.approx(results["eval_before"], abs=1e-3)
    assert adapter["loss"]["value"] == pytest.approx(results["eval_after"], abs=1e-3)
    assert adapter["perplexity"]["value"] == pytest.approx(math.exp(results["eval_after"]), rel=1e-3)
    assert adapter["change"]["value"] == pytest.approx(results["eval_after"] - results["eval_before"], abs=1e-3)
    assert adapter["loss"]["low"] < adapter["loss"]["value"] < adapter["loss"]["high"]
    assert [answer["given"] for answer in adapter["answers"]] == [
        answer["given"] for answer in results["answers_after"]
    ]


def test_the_merged_model_has_the_adapters_loss_through_plain_transformers(
    finished: tuple[Run, str], tmp_path: Path
) -> None:
    run, _ = finished
    answer = invoke("export", str(run.folder), "--merge", "--out", str(tmp_path / "merged"), "--dtype", "float32")
    losses = answer["held_out_loss"]
    assert losses["merged"] == pytest.approx(losses["unmerged"], abs=1e-5)
    assert losses["trained"] == run.record["results"]["eval_after"]
    assert losses["merged"] != losses["trained"]  # the trained one has a base in NF4
    assert "differs a little from the trained one" in answer["warnings"][0]
    assert (answer["layers"], answer["shards"]) == (14, 1)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "trained on a base in NF4, and merged into" in card
    assert ("library_name: transformers" in card, "PeftModel" in card) == (True, False)
    assert "## Evaluation" in card


def test_all_weights_are_trained_on_packed_rows_and_the_result_is_a_model_for_transformers_alone(
    new_run: Callable[[str], Run],
) -> None:
    from transformers import AutoModelForCausalLM

    run = new_run("full")
    recipe = {
        "method": "full",
        "quantization": "none",
        "packing": "true",
        "optimizer": "adamw",
        "learning_rate": "1e-3",
    }
    fields = [f"recipe.{name}={value}" for name, value in recipe.items()]
    code, output = run.finish(*fields, "strategy.world_size=2", "strategy.zero_stage=3")
    assert code == 0, output
    record = run.record
    assert record["weights"] == str(run.folder / "model")
    assert not (run.folder / "adapter").exists()
    assert record["data"]["rows"] < record["data"]["examples"] / 2
    (tried,) = (
        event
        for event in map(json.loads, (run.folder / "events.jsonl").read_text().splitlines())
        if event["event"] == "rehearsal"
    )
    assert 55 < tried["longest"] <= 64  # of rows of at most 64 tokens, packed from examples of at most 25
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    held_out, loss, tokens = Examples(run.folder / "data" / "eval.safetensors"), 0.0, 0
    for ids, learned in (held_out[index] for index in range(len(held_out))):
        labels = ids.masked_fill(~learned, -100).unsqueeze(0)
        count = int((labels[:, 1:] != -100).sum())
        loss += count * float(model(input_ids=ids.unsqueeze(0), labels=labels).loss.detach())
        tokens += count
    # one by one here and in batches there, where `auto` is bfloat16 with its 8 bits, in each processor's own order
    assert loss / tokens == pytest.approx(record["results"]["eval_after"], rel=1e-3)
    assert record["results"]["eval_after"] < record["results"]["eval_before"]


def test_ctrl_c_saves_and_the_same_command_goes_on_bit_for_bit(
    new_run: Callable[[str], Run], finished: tuple[Run, str]
) -> None:
    run = new_run("interrupted")
    process = run.start()
    run.wait_for_step(1, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, output
    assert "The same command resumes there" in output
    assert run.record["status"] == "interrupted"
    stopped_at = max(complete(run.folder / "checkpoints"))
    assert stopped_at == run.record["attempts"][0]["to_step"] < STEPS
    run.assert_nothing_is_left()

    code, output = run.finish()
    assert code == 0, output
    assert f"Resuming after step {stopped_at} of {STEPS}" in output
    assert [attempt["status"] for attempt in run.record["attempts"]] == ["interrupted", "complete"]
    assert run.adapter_digest == finished[0].adapter_digest
    steps = [
        event["step"]
        for event in map(json.loads, (run.folder / "events.jsonl").read_text().splitlines())
        if event["event"] == "step"
    ]
    assert steps == list(range(1, STEPS + 1))
    told = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told if "train/loss" in line] == steps
    assert len(list((run.folder / "tensorboard").iterdir())) == 2  # one of each attempt, which TensorBoard shows as one


def test_a_killed_worker_is_replaced_and_the_run_ends_bit_for_bit_as_without(
    new_run: Callable[[str], Run], finished: tuple[Run, str]
) -> None:
    run = new_run("killed")
    process = run.start("checkpoints.every_steps=1")
    run.wait_for_step(2, process)
    run.workers()[0].kill()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert "Failed (worker lost" in output
    assert "Traceback" not in output
    first, second = run.record["attempts"]
    assert (first["status"], first["failure"]["kind"], first["decision"]["action"]) == (
        "failed",
        "worker lost",
        "retry",
    )
    assert (second["status"], second["from_step"]) == ("complete", first["to_step"])
    assert run.adapter_digest == finished[0].adapter_digest
    run.assert_nothing_is_left()


class Killed(NamedTuple):
    """A long run whose command was killed once both its ranks were seen at the node's metrics endpoint.

    Attributes:
        shown: what was seen there.
        busy_with: what Ray had the main thread of each worker do while it trained, as it names processes.
    """

    run: Run
    shown: Shown
    busy_with: list[str]


def test_an_example_whose_loss_is_not_finite_ends_a_run_in_one_error_and_leaves_the_checkpoint_before(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    bad = Order([1] * 40, 8, seed=0).step(3)[0]  # one of step 4
    lines = conversations.read_text().splitlines()
    lines[bad] = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "~"}]})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    token = load_tokenizer(str(base)).convert_tokens_to_ids("~")  # which no other example has
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})

    run = make_run(tmp_path, base, data)
    code, output = run.finish("data.eval_fraction=0", f"data.eval_path={conversations}")
    assert code == 1, output
    [error] = re.findall("^error: (.*)$", output, re.M)
    assert error.startswith("The loss of step 4 is nan")
    assert f"{data}, line {bad + 1}" in error
    assert "It was not tried again: the same step would fail again." in error
    assert "Traceback" not in output
    assert "stop: the same step would fail again" in (run.folder / "report.md").read_text()
    [attempt] = run.record["attempts"]
    assert (run.record["status"], attempt["failure"]["kind"], attempt["to_step"]) == ("failed", "not finite", 2)
    kept = complete(run.folder / "checkpoints")
    assert list(kept) == [2]
    check(kept[2])
    run.assert_nothing_is_left()


def test_a_secret_in_what_a_worker_raises_is_kept_out_of_all_that_a_run_and_its_ray_write(
    new_run: Callable[[str], Run],
) -> None:
    run, secret = new_run("secret"), uuid.uuid4().hex
    fault = {"fault": "secret", "rank": 0, "step": 2, "attempts": [1]}
    path = f"{INJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run.environment |= {"HF_TOKEN": secret, "QLORA_FAULTS": json.dumps([fault]), "PYTHONPATH": path}
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:  # short, as a socket's name must be
        run.environment["RAY_TMPDIR"] = ray_folder
        code, output = run.finish("--debug")
        assert (code, "upload refused for ***" in output) == (1, True), output
        written = [path for folder in (Path(ray_folder), run.folder) for path in folder.rglob("*") if path.is_file()]
        told = {str(path): path.read_bytes() for path in written}
    assert any(b"upload refused for ***" in text for name, text in told.items() if "/logs/worker-" in name)
    assert secret not in output
    assert not [name for name, text in told.items() if secret.encode() in text]


@pytest.fixture(scope="module")
def killed(new_run: Callable[[str], Run]) -> Killed:
    run = new_run("sudden")
    run.environment |= {"RAY_metrics_report_interval_ms": "500", "PYTHONUNBUFFERED": "1"}
    process = run.start("recipe.steps=5000")
    run.wait_for_step(1, process)
    deadline = time.monotonic() + TIMEOUT
    shown: Shown = {}
    last = {("ray_qlora_train_loss", "0"), ("ray_qlora_memory_optimizer_measured_bytes", "0")}
    last |= {("ray_qlora_memory_optimizer_measured_bytes", "1"), ("ray_qlora_eval_loss", "0")}
    while not last <= {(name, rank) for name, _, rank in shown} and time.monotonic() < deadline:
        time.sleep(0.5)
        shown = run.ray_metrics()
    shown = run.ray_metrics()  # what was told together may be shown one after the other
    time.sleep(1)  # until it stands in metrics.jsonl, too
    busy_with = [worker.cmdline()[0].strip() for worker in run.workers()]
    process.kill()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGKILL
    assert "Metrics for Prometheus: http://127.0.0.1:" in output
    return Killed(run, shown, busy_with)


def test_a_sudden_end_leaves_no_process_and_no_half_checkpoint(killed: Killed) -> None:
    assert_nothing_is_half(killed.run)


def test_the_main_thread_of_a_worker_is_held_while_it_trains(killed: Killed) -> None:
    # idle, where Ray names the actor alone, it would look for signals a hundred times a second
    assert killed.busy_with == ["ray::RayTrainWorker.execute"] * 2


def assert_nothing_is_half(run: Run) -> None:
    run.assert_nothing_is_left()
    kept = complete(run.folder / "checkpoints")
    assert kept
    for folder in kept.values():
        check(folder)


@pytest.mark.chaos
def test_nor_does_a_second_interrupt(new_run: Callable[[str], Run]) -> None:
    run = new_run("impatient")
    process = run.start("recipe.steps=5000")
    run.wait_for_step(3, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)  # two signals that arrive together are one
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGINT
    assert "Ended at once: the same command goes on from the last checkpoint" in output
    assert_nothing_is_half(run)


@pytest.mark.parametrize("name", ["adapter/mine.txt", "specification.yaml", "data/samples.json"])
def test_files_of_no_run_are_not_replaced(new_run: Callable[[str], Run], name: str) -> None:
    run = new_run("others")
    mine = run.folder / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    code, output = run.finish()
    assert code == 2
    assert f"output: no run is recorded there, and a run would replace {name.removesuffix('/mine.txt')}" in output
    assert mine.read_text() == "mine"
    assert not (run.folder / "run.json").exists()


def test_what_a_run_has_left_that_ended_before_it_was_recorded_is_its_own(new_run: Callable[[str], Run]) -> None:
    run = new_run("unrecorded")
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "specification.yaml").write_text("name: tiny")
    FileLock(run.folder / ".lock").acquire().lock.release()
    code, output = run.finish("recipe.steps=1")
    assert code == 0, output


def test_a_run_is_not_put_into_the_folder_of_its_model(new_run: Callable[[str], Run], tiny_base: Path) -> None:
    before = sorted(path.name for path in tiny_base.iterdir())
    code, output = new_run("inside").finish(f"output={tiny_base}")
    assert (code, "output: it is the folder of the model" in output) == (2, True)
    assert sorted(path.name for path in tiny_base.iterdir()) == before


def test_the_metrics_of_the_node_carry_the_figures_of_the_run(killed: Killed) -> None:
    run, shown, _ = killed
    written = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in written if line.endswith("\n")]
    names = {name for line in lines for name in line} - {"step", "time"}
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second", "train/step_seconds"} <= names
    of_first = {name for name, _, rank in shown if rank == "0"}
    assert of_first == {f"ray_qlora_{name.replace('/', '_')}" for name in names}
    of_second = {name for name, _, rank in shown if rank == "1"}
    assert of_second == {name for name in of_first if name.startswith("ray_qlora_memory_")}
    assert {tag for _, tag, _ in shown} == {"tiny"}
    predicted = run.record["predicted"]["phases"]
    for phase, size in predicted.items():
        assert shown[f"ray_qlora_memory_{phase}_predicted_bytes", "tiny", "0"] == size
    assert shown["ray_qlora_train_loss", "tiny", "0"] in [line.get("train/loss") for line in lines]


@pytest.fixture
def running_ray() -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray that somebody else started, with token authentication: its address, and what its users set."""
    with ray_head("--num-cpus=3") as head:
        yield head


def test_on_a_ray_that_is_running_and_left_so_a_run_goes_on_with_an_adapter_that_another_made(
    new_run: Callable[[str], Run], finished: tuple[Run, str], running_ray: tuple[str, dict[str, str]]
) -> None:
    address, token = running_ray
    before, run = finished[0], new_run("continued")
    # what the adapter says of itself need not be said again, and must not be said otherwise
    fields = yaml.safe_load(run.specification.read_text())
    del fields["recipe"]["rank"], fields["recipe"]["dropout"]
    fields |= {"adapter": str(before.folder / "adapter"), "cluster": {"address": address}}
    run.specification.write_text(yaml.safe_dump(fields))
    code, output = run.finish()
    assert code == 2, output  # no token
    assert "cluster.address: no Ray could be joined there" in output
    assert "InvalidAuthToken" in output
    run.environment.update(token)
    code, output = run.finish()
    assert code == 0, output
    assert run.record["plan"]["recipe"]["rank"] == 4
    results = run.record["results"]
    assert results["eval_before"] == pytest.approx(before.record["results"]["eval_after"], rel=1e-3)
    assert results["eval_after"] < results["eval_before"]
    assert Path(token["RAY_AUTH_TOKEN_PATH"]).read_text() not in output
    host, port = address.split(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    code, output = run.finish("recipe.rank=8")
    assert code == 2
    assert "recipe.rank" in output
