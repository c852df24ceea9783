"""`make gpu` where there is no GPU: its matrix, its bases, what becomes of a row, and a whole dry run."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import bitsandbytes as bnb
import psutil
import pytest
import torch
from click.testing import CliRunner
from real_runs import command_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.accuracy import step_time_page
from benchmarks.gpu import __main__ as entry
from benchmarks.gpu import device, measure, predict, rates, recovery, runner, tracer, unsloth
from benchmarks.gpu.achieved import NOMINAL, achieved, measured_rates
from benchmarks.gpu.base import random_base
from benchmarks.gpu.job import Job, Start
from benchmarks.gpu.matrix import DRY, MATRIX, Case, chosen, small
from benchmarks.training.__main__ import installed_peers
from clusters.errors import RequestError
from clusters.gpu import find_gpu, list_gpus
from orchestrator import devices
from qlora_core.catalogue import find_model
from qlora_core.memory.formula import kernel_in_use
from qlora_core.memory.measure import model_tensors
from qlora_core.recipe import Dtype, Recipe
from qlora_core.step_time import Achieved
from qlora_core.strategy import Attention, Loss, Strategy
from qlora_core.training.model import load_base

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
GIB = 1024**3
A100 = {
    "kind": "cuda",
    "name": "NVIDIA A100-SXM4-80GB",
    "compute_capability": [8, 0],
    "free_bytes": 79 * GIB,
    "uuids": [None],
}
BY_NAME = {case.name: case for case in MATRIX}

# --- the matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_every_row_is_of_the_catalogue_and_runs_as_the_planner_would_run_it(case: Case) -> None:
    assert find_model(case.model).name == case.model
    architecture = case.architecture()
    assert case.strategy.attention == "eager" or architecture.has_sdpa
    assert case.recipe.sequences_per_step == case.strategy.sequences_per_step
    assert small(case).architecture().model_type == architecture.model_type
    assert small(case).architecture().parameters < 10e6


def test_a_row_of_ours_is_run_under_autocast_where_its_recipe_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_core.training.loss.liger_cross_entropy", lambda: None)  # it need not be installed
    ours = [case for case in MATRIX if case.loop == "ours"]
    narrow = {case.name: measure.module_of(nn.Identity(), case, "bfloat16").narrow for case in ours}
    assert {name for name, dtype in narrow.items() if dtype is not None} == {
        "timed-8b-autocast",
        "timed-8b-unchecked-autocast",
        "timed-8b-unchecked-autocast-liger",
    }
    assert narrow["timed-8b-autocast"] == torch.bfloat16


def test_the_matrix_spans_sizes_families_and_strategies() -> None:
    assert len(BY_NAME) == len(MATRIX)
    assert len({case.architecture().model_type for case in MATRIX}) >= 5
    sizes = [case.architecture().parameters for case in MATRIX]
    assert min(sizes) < 0.2e9
    assert max(sizes) > 60e9
    flagship = BY_NAME["defaults-65b"]
    assert (flagship.model, flagship.strategy.micro_batch, flagship.recipe.seq_len) == ("llama-65b", 1, 512)
    assert {case.recipe.quantization for case in MATRIX} == {"nf4", "fp4", "int8", "none"}
    assert {case.strategy.attention for case in MATRIX} == set(get_args(Attention))
    on_a100 = predict.device_of(A100)
    kernels = {kernel_in_use(case.architecture(), case.recipe, case.strategy, on_a100) for case in MATRIX}
    assert kernels >= {"flash", "efficient", "eager"}  # efficient: peft's upcast makes attention's inputs float32
    assert {case.strategy.loss for case in MATRIX} == set(get_args(Loss))
    for fact in ("gradient_checkpointing", "paged_optimizer"):
        assert len({getattr(case.strategy, fact) for case in MATRIX}) == 2


def test_timed_rows_are_as_large_as_the_gpu_s_free_memory_lets_them_be() -> None:
    timed = [case for case in MATRIX if case.is_timed]
    t4 = {**A100, "name": "Tesla T4", "compute_capability": [7, 5]}
    for machine, free in ((t4, int(14.4 * GIB)), (A100, 23 * GIB), (A100, 39 * GIB)):
        device = predict.device_of(machine)
        rows = {case.name: case for case in predict.fitted(MATRIX, device, free)}
        assert list(rows) == list(BY_NAME)
        ours, trl, unsloth_s = (rows[name] for name in ("timed-8b", "timed-8b-trl", "timed-8b-unsloth"))
        sizes = {(case.strategy.micro_batch, case.recipe.seq_len) for case in (ours, trl, unsloth_s)}
        assert len(sizes) == 1
        for case in (ours, trl):
            assert predict.does_not_fit(predict.by_formula(case, device), free) is None
            assert case.recipe.tokens_per_step == case.strategy.micro_batch * case.recipe.seq_len
        assert rows["defaults-65b"] == BY_NAME["defaults-65b"]  # memory is what it is there for
    on_h200 = predict.fitted(timed, predict.device_of({**A100, "name": "NVIDIA H200"}), 139 * GIB)
    assert on_h200 == timed  # so that rows of large GPUs can be compared


def test_a_row_of_flash_attention_2_is_skipped_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["flash-attention-2"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert predict.lacks_a_package(case) == "it wants flash-attn, which is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert predict.lacks_a_package(case) is None


def test_four_minutes_reach_65b() -> None:
    first = [case.name for case in MATRIX[:3]]
    assert "defaults-65b" in first
    assert sum(predict.seconds(BY_NAME[name], A100) for name in first) < 4 * 60


def test_rows_are_chosen_by_the_beginning_of_name_or_model() -> None:
    assert [case.name for case in chosen(dry=True)] == [case.name for case in MATRIX if case.name in DRY]
    assert {case.model for case in chosen(dry=False, only=("llama-65b", "tiny"))} == {
        "llama-65b",
        "smollm2-135m",
        "tinyllama-1.1b",
    }


# --- the base ---------------------------------------------------------------------------------------------------------


def facts(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Names, classes and settings of all modules; dtypes, shapes and devices of all parameters and buffers."""
    for name, part in module.named_modules():
        settings = {"checkpointing": getattr(part, "gradient_checkpointing", None), "training": part.training}
        if isinstance(part, bnb.nn.Linear4bit):
            settings["compute_dtype"] = part.compute_dtype
            settings["avx512bf16"] = part.support_avx512bf16_for_cpu
        yield name, type(part), settings
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, type(parameter), parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad
    for name, buffer in module.named_buffers():
        yield name, buffer.shape, buffer.dtype, buffer.double().sum().item()
    yield from ((tensor.shape, tensor.dtype) for tensor in model_tensors(module))


def storages(module: nn.Module) -> int:
    """How many pieces of memory a model lies in."""
    return len({tensor.untyped_storage().data_ptr() for tensor in model_tensors(module)})


@pytest.mark.parametrize(
    ("name", "recipe", "strategy", "dtype"),
    [
        ("defaults-1b", Recipe(), Strategy(), "bfloat16"),
        ("adamw-8bit", Recipe(quantization="fp4", double_quantization=False), Strategy(), "float32"),
        ("gemma-eager", Recipe(), Strategy(attention="eager", gradient_checkpointing=False), "float32"),
        ("phi-fused-projections", Recipe(quantization="int8"), Strategy(), "bfloat16"),
        ("pythia-parallel", Recipe(method="lora", quantization="none"), Strategy(), "float16"),
    ],
)
def test_a_base_from_a_config_is_the_base_from_files(
    tmp_path: Path, name: str, recipe: Recipe, strategy: Strategy, dtype: Dtype
) -> None:
    fields = small(BY_NAME[name]).config_fields()
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.bfloat16).save_pretrained(tmp_path)
    from_files = load_base(str(tmp_path), recipe, strategy, dtype, CPU)
    from_config = random_base(fields, recipe, strategy, dtype, CPU)
    assert list(facts(from_config)) == list(facts(from_files))
    storages = [
        {tensor.untyped_storage().data_ptr() for tensor in model_tensors(base)} for base in (from_config, from_files)
    ]
    assert len(storages[0]) == len(storages[1])  # what is tied is tied, and nothing else is shared
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        assert getattr(from_config, flag, None) == getattr(from_files, flag, None)
    assert from_config.config.use_cache is from_files.config.use_cache is False  # type: ignore[union-attr]
    assert all(torch.isfinite(tensor).all() for tensor in model_tensors(from_config) if tensor.is_floating_point())


# --- what becomes of a row --------------------------------------------------------------------------------------------


@pytest.fixture
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracing process ends at once."""
    monkeypatch.setattr(tracer, "COMMAND", (sys.executable, "-c", ""))


def run_with(child: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, minutes: float = 9, **machine: Any) -> Any:
    """The rows of a run of one case, whose child is this Python program."""
    monkeypatch.setattr(runner, "CHILD", (sys.executable, "-c", child))
    record = runner.Record(tmp_path / "out.json", {"dry": False})
    told: list[Any] = []
    runner.run([BY_NAME["defaults-1b"]], {**A100, **machine}, record, runner.Clock(minutes), told.append)
    assert told == record.rows
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == {"schema_version": 1, "dry": False, "rates": None, "recovery": None, "rows": record.rows}
    [row] = record.rows
    return row


@pytest.mark.usefixtures("no_traces")
def test_a_killed_child_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, signal, sys; sys.stdin.buffer.read(); print('about to die', flush=True); os.kill(os.getpid(), 9)"
    )
    row = run_with(program, tmp_path, monkeypatch)
    assert (row["status"], row["reason"]) == ("failed", "its process was killed by signal 9")
    assert row["log"] == ["about to die"]


@pytest.mark.usefixtures("no_traces")
def test_a_child_that_ends_without_an_answer_is_a_failed_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = run_with("raise SystemExit('no such module')", tmp_path, monkeypatch)
    assert (row["status"], row["reason"]) == ("failed", "its process ended with exit code 1 and no answer")
    assert row["log"] == ["no such module"]


@pytest.mark.usefixtures("no_traces")
def test_the_prediction_is_on_disk_before_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = str(tmp_path / "out.json"), str(tmp_path / "seen.json")
    run_with(f"import shutil, sys; sys.stdin.buffer.read(); shutil.copy({out!r}, {seen!r})", tmp_path, monkeypatch)
    [row] = json.loads(Path(seen).read_text())["rows"]
    assert row["status"] == "predicted"
    assert row["predicted"]["formula"]["allocated_bytes"] > GIB
    assert row["predicted"]["trace"] == {"failed": "the tracing process has ended"}
    assert "measured" not in row


@pytest.mark.usefixtures("no_traces")
def test_a_case_that_would_not_fit_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = run_with("", tmp_path, monkeypatch, free_bytes=GIB)
    assert row["status"] == "skipped"
    assert row["reason"].endswith("GiB by the formula, and 1.0 GiB are free")
    assert row["predicted"]["formula"]["process_bytes"] > GIB


@pytest.mark.usefixtures("no_traces")
def test_a_case_that_would_not_end_in_time_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = run_with("", tmp_path, monkeypatch, minutes=0.05)
    assert row["status"] == "skipped"
    assert row["reason"].startswith("it takes about ")


def test_a_child_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    children = runner.waiting((sys.executable, "-c", "import time; time.sleep(600)"), tmp_path, most=2)
    job = Job(BY_NAME["tiny"], "float32", "cpu", None, tmp_path / "answer.json")
    child = next(children)
    assert runner.answer([child], [job], limit=1) == {"failed": "stopped: it had not ended after 1 s"}
    assert child.process.returncode == -9
    children.close()  # and the one that waits is stopped, too


def test_where_one_rank_fails_the_one_that_waits_for_it_is_stopped(tmp_path: Path) -> None:
    programs = "import time; time.sleep(600)", "raise SystemExit('no network')"
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    waiting = [
        runner.waiting((sys.executable, "-c", program), folder, most=1)
        for program, folder in zip(programs, folders, strict=True)
    ]
    children = [next(each) for each in waiting]
    jobs = list(runner.jobs_of(BY_NAME["two-gpus"], "float32", {**A100, "uuids": [None, None]}, tmp_path, None))
    said = runner.answer(children, jobs, limit=60)
    assert said == {"failed": "rank 1: its process ended with exit code 1 and no answer", "log": ["no network"]}
    assert [child.process.returncode for child in children] == [-9, 1]


@pytest.mark.usefixtures("no_traces")
def test_a_case_for_more_gpus_than_there_are_is_skipped(tmp_path: Path) -> None:
    record = runner.Record(tmp_path / "out.json", {"dry": False})
    runner.run([BY_NAME["two-gpus-zero-3"]], A100, record, runner.Clock(9), lambda row: None)
    [row] = record.rows
    assert (row["status"], row["reason"]) == ("skipped", "it needs 2 GPUs, and there is 1")
    assert row["predicted"]["formula"]["allocated_bytes"] > GIB


@pytest.mark.usefixtures("no_traces")
@pytest.mark.parametrize("python", ["", "/no/such/python"])
def test_a_row_of_unsloth_is_never_predicted_and_wants_a_python_that_has_it(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(predict.UNSLOTH_PYTHON, python)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples"))
    machine = {**A100, "kind": "cpu", "uuids": [None]}
    record = runner.Record(tmp_path / "out.json", {"dry": True})
    said: list[Any] = []
    runner.run([small(BY_NAME["timed-8b-unsloth"])], machine, record, runner.Clock(9), said.append)
    [row] = said
    assert row["predicted"] == {}
    if python:
        assert row["status"] == "failed"
        assert "/no/such/python" in row["reason"]
    else:
        assert (row["status"], row["reason"][:35]) == ("skipped", "it wants a Python that has Unsloth:")


@pytest.mark.grid
def test_unsloth_itself_trains_the_same_base_on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(predict.UNSLOTH_PYTHON, str(installed_peers().unsloth))
    case = small(BY_NAME["timed-8b-unsloth"])
    measured = unsloth.measure(Job(case, "float32", "cpu", None, tmp_path / "unused"), Start(None, None))
    assert measured["losses"] == pytest.approx([math.log(2048)] * 2, abs=0.3)
    assert measured["tokens_per_second"] > 0


@pytest.mark.usefixtures("no_traces")
def test_a_limited_row_s_process_is_told_where_the_plan_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []

    def answer(children: Any, jobs: list[Job], limit: float) -> dict[str, Any]:
        asked.extend(jobs)
        return {"failed": "it is not run here"}

    monkeypatch.setattr(runner, "answer", answer)
    record = runner.Record(tmp_path / "out.json", {"dry": False})
    cases = [BY_NAME["limited-paged"], BY_NAME["defaults-1b"]]
    runner.run(cases, A100, record, runner.Clock(9), lambda row: None)
    interval = record.rows[0]["predicted"]["formula"]["reserved_interval"]
    assert [job.limit for job in asked] == [interval[1], None]
    assert record.rows[0]["limited"] is True


def test_paged_state_counts_where_managed_memory_could_exceed_the_gpu() -> None:
    predicted = {"process_bytes": 40 * GIB, "paged_bytes": 6 * GIB}
    assert predict.does_not_fit(predicted, 46 * GIB) is None
    assert predict.does_not_fit(predicted, 45 * GIB) == "it needs 46.0 GiB by the formula, and 45.0 GiB are free"


def test_errors_are_positive_where_the_prediction_is_too_high() -> None:
    predicted = {
        "phases": {"after_load": 90, "forward": 100, "backward": 110, "optimizer": 100},
        "allocated_bytes": 110,
        "reserved_bytes": 120,
        "process_bytes": 200,
        "paged_bytes": 50,  # which no tool shows
    }
    measured = {
        "phases": {"after_load": 100, "forward": 100, "backward": 100, "optimizer": 100},
        "allocated_bytes": 100,
        "reserved_bytes": 0,  # a CPU has no caching allocator
        "process_bytes": 250,
    }
    assert predict.errors_percent(predicted, measured) == {
        "after_load": -10,
        "forward": 0,
        "backward": 10,
        "optimizer": 0,
        "allocated": 10,
        "process": -20,
    }


def test_a_known_gpu_is_predicted_with_its_own_context_and_an_unknown_one_with_the_default() -> None:
    assert predict.device_of({**A100, "name": "Tesla T4", "compute_capability": [7, 5]}).context_bytes < 150 * 1024**2
    assert predict.device_of({**A100, "name": "NVIDIA Unheard-of"}).context_bytes == 512 * 1024**2
    assert predict.device_of({**A100, "name": "Tesla T4", "compute_capability": [7, 5]}).compute_dtype == "float16"


@pytest.mark.usefixtures("no_traces")
def test_a_run_goes_on_with_the_file_of_the_same_device_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    first, second, known = BY_NAME["defaults-1b"], BY_NAME["fp4"], {"measured": {"pcie": {"to the host": 5e10}}}
    facts = {"dry": False, "device": {"name": "A100", "driver": "580"}, "versions": {"torch": "2.13.0"}}
    before = runner.Record(out, facts)
    before.put_rates(known)
    before.put({**first.as_json(), "status": "measured", "measured": {"allocated_bytes": 7}})
    before.put({**second.as_json(), "status": "skipped", "reason": "no time was left"})
    monkeypatch.setattr(runner, "CHILD", (sys.executable, "-c", "raise SystemExit('again')"))
    told: list[Any] = []
    after = runner.Record(out, {**facts, "date": "later"})
    runner.run([first, second], A100, after, runner.Clock(9), told.append)
    assert [row["name"] for row in told] == ["fp4"]
    assert after.rates == json.loads(out.read_text())["rates"] == known
    assert [(row["name"], row["status"]) for row in after.rows] == [("defaults-1b", "measured"), ("fp4", "failed")]


def test_every_row_that_was_measured_is_known_again_from_its_file(tmp_path: Path) -> None:
    before = runner.Record(tmp_path / "gpu.json", {"dry": False})
    for case in MATRIX:
        before.put({**case.as_json(), "status": "measured"})
    after = runner.Record(tmp_path / "gpu.json", {"dry": False})
    assert [case.name for case in MATRIX if not (before.has(case) and after.has(case))] == []


def test_a_file_of_another_device_or_other_versions_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    facts = {"dry": False, "device": {"name": "A100", "driver": "580"}, "versions": {"torch": "2.13.0"}}
    runner.Record(out, facts).put({**BY_NAME["tiny"].as_json(), "status": "measured"})
    kept = out.read_text()
    changes: list[dict[str, Any]] = [
        {"versions": {"torch": "2.14.0"}},
        {"device": {"name": "H100", "driver": "580"}},
        {"dry": True},
    ]
    for number, change in enumerate(changes, 2):
        other = runner.Record(out, {**facts, **change})
        assert (other.out.name, other.rows) == (f"gpu-{number}.json", [])
    assert runner.Record(out, {**facts, "versions": {"torch": "2.14.0"}}).out.name == "gpu-2.json"  # and goes on there
    assert out.read_text() == kept


@pytest.mark.parametrize("there", ['{"rows": [', "[]", "{}"])
def test_what_is_no_record_is_neither_gone_on_with_nor_replaced(there: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    out.write_text(there)
    with pytest.raises(RequestError, match=r"--out: it is no record of `make gpu`.*gpu\.json.* Move it away"):
        runner.Record(out, {"dry": True})
    assert out.read_text() == there


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "probe", lambda: {**A100, "kind": "cpu", "versions": {}})
    monkeypatch.setattr(runner, "ask_rates", None)
    result = CliRunner().invoke(entry.command, ["--dry", "--out", "/proc/x/y.json"])
    assert isinstance(result.exception, RequestError)
    assert str(result.exception).startswith("--out: it cannot be read and written: No such file")


# --- what a device achieves ------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """All that is measured, as if each call took a second."""

    def once(call: Callable[[], Any], at_least: float) -> float:
        call()
        return 1.0

    monkeypatch.setattr(rates, "seconds", once)
    return rates.measured(CPU, torch.float32, rates.SMALL)


def test_what_is_done_is_counted_as_the_step_time_model_counts_it(counted: dict[str, dict[str, float]]) -> None:
    assert set(counted) == set(Achieved._fields) == set(NOMINAL)
    assert counted["products"]["64 x 256 x 704"] == 2 * 64 * 256 * 704
    assert counted["wide_products"]["128 x 256 x 8"] == 2 * 128 * 256 * 8
    # of 16-bit weights, or as here 32-bit ones: half a byte and 0.06 of constants for two that are written
    assert counted["dequantization"]["704 x 256"] == pytest.approx(704 * 256 * 4 * (2 + 0.5 + 0.06) / 2)
    assert counted["pcie"] == {"to the GPU": 2**20, "to the host": 2**20}
    assert counted["starting"] == {"500 products and their gradients": 1000}
    query = torch.ones(1, 8, 64, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()  # type: ignore[no-untyped-call]
    # torch's plain attention has six products; the fused one makes the scores again, and nothing above the diagonal
    assert counted["attention"]["64 tokens, 8 heads of 32"] == counter.get_total_flops() * 7 / 6 / 2


def test_what_is_achieved_is_a_part_of_the_catalogues_rates() -> None:
    nominal = devices.rates(devices.gpu_target(find_gpu("a100-80gb"), "bfloat16"))
    found = {"measured": {what: {"a": 1e9, "b": 2e9, "c": 4e9} for what in Achieved._fields}}
    said = achieved({"rates": found}, nominal)
    assert said["products"] == (round(1 / 312e3, 8), round(2 / 312e3, 8), round(4 / 312e3, 7))
    assert said["memory"] == (0.00049, 0.000981, 0.00196)  # of 2,039 GB/s
    assert said["starting"] == (1e9, 2e9, 4e9)


def test_what_is_achieved_is_shown_beside_what_was_taken() -> None:
    rates = {"compute_dtype": "bfloat16", "measured": {what: {"a": 1e14, "b": 3e14} for what in Achieved._fields}}
    shown = step_time_page.achieved_rows({"rates": rates}, find_gpu("a100-80gb"))
    [products] = [row for row in shown if row[0] == "products"]
    assert products == ["products", "0.32", "0.64", "0.96", "0.55", "0.80", "0.87"]  # of 312e12, the median of two


def test_the_catalogue_has_what_was_measured_and_nothing_else() -> None:
    measured = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if measured_rates(record) is not None:
            gpu = find_gpu(record["device"]["name"])
            nominal = devices.rates(devices.gpu_target(gpu, record["rates"]["compute_dtype"]))
            measured[gpu.name] = {what: tuple(each) for what, each in achieved(record, nominal).items()}
    assert {gpu.name: dict(gpu.achieved) for gpu in list_gpus() if gpu.achieved} == measured


def test_what_was_measured_stands_in_the_place_of_what_was_taken() -> None:
    gpu = replace(find_gpu("h200"), achieved=(("memory", (0.7, 0.71, 0.72)), ("products", (0.3, 0.4, 0.5))))
    before, after = (devices.rates(devices.gpu_target(each, "bfloat16")) for each in (find_gpu("h200"), gpu))
    assert after.achieved.memory == (0.7, 0.71, 0.72)
    assert after.achieved.products == (0.3, 0.4, 0.5)
    assert after.achieved.dequantization == before.achieved.dequantization
    assert after._replace(achieved=before.achieved) == before


# --- the process, as nvidia-smi shows it ------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, first on PATH, that answers with the files of its folder."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in *memory.used) cat {tmp_path}/used;; *pid,used_memory) cat {tmp_path}/apps;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "used").write_text("700\n")
    (tmp_path / "apps").write_text("")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 400)
    return tmp_path


def process(start: Start) -> tuple[int, str]:
    job = Job(BY_NAME["tiny"], "bfloat16", "cuda", "GPU-1", Path("unused"))
    said = measure.process(job, start)
    return said["process_bytes"], said["process_is"]


def test_the_process_is_what_nvidia_smi_says_of_it(nvidia_smi: Path) -> None:
    (nvidia_smi / "apps").write_text(f"1, 9999\n{os.getpid()}, 650\n")
    assert process(Start(30 * 2**20, 300 * 2**20)) == (650 * 2**20, "nvidia-smi, this process")


def test_where_processes_are_hidden_it_is_the_rise_of_the_gpus_used_memory(nvidia_smi: Path) -> None:
    assert device.used_bytes("GPU-1") == 700 * 2**20
    assert process(Start(30 * 2**20, 300 * 2**20)) == (670 * 2**20, "nvidia-smi, the GPU's rise since the start")


def test_where_nvidia_smi_does_not_answer_it_is_what_the_driver_says(nvidia_smi: Path) -> None:
    (nvidia_smi / "nvidia-smi").write_text("#!/bin/sh\nexit 6\n")
    assert process(Start(None, None)) == (4000, "cudaMemGetInfo, the whole GPU")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"kind": "cpu"}, "torch sees no CUDA GPU"),
        ({"versions": {"torch": "2.13.0", "bitsandbytes": None}}, "they are not installed (got bitsandbytes)"),
    ],
)
def test_a_machine_that_cannot_measure_is_told_so(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], message: str
) -> None:
    found = json.dumps({**A100, "versions": {}, **machine})
    monkeypatch.setattr(entry, "PROBE", (sys.executable, "-c", f"print({found!r})"))
    result = CliRunner().invoke(entry.command, [])
    assert isinstance(result.exception, RequestError)
    assert message in str(result.exception)


ROW = '{"fault": "out of GPU memory, really", "survived": true, "steps_lost": 0, "seconds": 71.5}'
"""What tests/chaos/test_cuda.py leaves."""


@pytest.mark.parametrize(
    ("program", "left", "said"),
    [
        (f"import os; open(os.environ['CHAOS_ROWS'], 'w').write({ROW!r})", 200, json.loads(ROW)),
        ("print('no GPU')", 200, {"failed": "pytest ended with exit code 0", "log": ["no GPU"]}),
        ("raise SystemExit('it was lost')", 200, {"failed": "pytest ended with exit code 1", "log": ["it was lost"]}),
        ("", 100, {"skipped": "it takes about 120 s, and 100 s are left"}),
    ],
    ids=["survived", "skipped itself", "failed", "too late"],
)
def test_what_becomes_of_a_run_that_memory_runs_out_of_is_in_the_record(
    program: str, left: float, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "PACKAGES", ())
    monkeypatch.setattr(recovery, "COMMAND", (sys.executable, "-c", program))
    assert recovery.measure(runner.Clock(left / 60)) == said


def test_recovery_is_stopped_at_the_end_of_the_time_with_all_that_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    monkeypatch.setattr(recovery, "PACKAGES", ())
    monkeypatch.setattr(recovery, "COMMAND", (sys.executable, "-c", program))
    monkeypatch.setattr(recovery, "SECONDS", 1.0)
    assert recovery.measure(runner.Clock(3 / 60)) == {"failed": "stopped: it had not ended after 3 s"}
    deadline = time.monotonic() + 60
    # it was sent SIGKILL, which ends it a moment later
    while alive(int((tmp_path / "child").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # one that nobody waits for is still listed
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("only", "asked"), [([], 1), (["--only", "tiny"], 0)])
def test_recovery_is_asked_once_and_not_where_some_rows_were_asked_for(
    only: list[str], asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def measured(clock: runner.Clock) -> dict[str, Any]:
        calls.append(clock)
        return dict(json.loads(ROW))

    monkeypatch.setattr(entry, "probe", lambda: {**A100, "versions": {}, "driver": "580"})
    monkeypatch.setattr(runner, "ask_rates", lambda *_: {"failed": "it is not asked here"})
    monkeypatch.setattr(runner, "run", lambda *_: None)
    monkeypatch.setattr(recovery, "measure", measured)
    out = tmp_path / "gpu.json"
    for _ in range(2):
        printed = CliRunner().invoke(entry.command, ["--out", str(out), *only]).output
    assert len(calls) == asked
    assert json.loads(out.read_text())["recovery"] == (json.loads(ROW) if asked else None)
    assert ("survived, 0 steps done twice, 72 s." if asked else "not measured: not asked") in printed


H200 = {**A100, "name": "NVIDIA H200", "compute_capability": [9, 0], "free_bytes": 139 * GIB}
T4 = {**A100, "name": "Tesla T4", "compute_capability": [7, 5], "free_bytes": int(14.5 * GIB)}
ONE_PACKAGE = "a package that nobody has"


class Played:
    """`make gpu` on a machine that is not there: every row takes the seconds that are predicted for it, and no more.

    Attributes:
        seconds: what all rows so far took.
        left: seconds when recovery was begun, for each time.
    """

    def __init__(self, machine: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.left = 0.0, list[float]()
        self._machine, self._out, self._before = machine, out, 0.0
        child = runner.Child(subprocess.Popen([sys.executable, "-c", ""]), out)
        child.process.wait()
        monkeypatch.delenv(predict.UNSLOTH_PYTHON, raising=False)
        monkeypatch.setattr(entry, "probe", lambda: {**machine, "driver": "580", "versions": {}})
        monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=self._now))
        monkeypatch.setattr(runner, "ask_rates", lambda *_: {"measured": {}})
        monkeypatch.setattr(runner, "waiting", lambda *_: (child for _ in range(1000)))
        monkeypatch.setattr(runner, "answer", self._answer)
        monkeypatch.setattr(recovery, "measure", self._recovery)
        monkeypatch.setattr(recovery, "PACKAGES", ())

    def start(self, *options: str) -> list[str]:
        """One start of nine minutes: the names of the rows that have been measured so far."""
        self._before = self.seconds
        result = CliRunner().invoke(entry.command, ["--out", str(self._out), *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        rows = json.loads(self._out.read_text())["rows"]
        return [row["name"] for row in rows if row["status"] == "measured"]

    def _now(self) -> float:
        return time.monotonic() + self.seconds - self._before

    def _answer(self, children: Any, jobs: list[Job], limit: float) -> dict[str, Any]:
        self.seconds += predict.seconds(jobs[0].case, self._machine)
        return {"measured": {"phases": {}, "allocated_bytes": GIB, "reserved_bytes": GIB, "process_bytes": GIB}}

    def _recovery(self, clock: runner.Clock) -> dict[str, Any]:
        self.left.append(clock.left)
        return dict(json.loads(ROW))


@pytest.mark.usefixtures("no_traces")
@pytest.mark.parametrize("machine", [H200, T4], ids=lambda machine: machine["name"])
def test_the_rows_leave_recovery_its_two_minutes(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played(machine, tmp_path / "gpu.json", monkeypatch)
    assert len(played.start()) > 5
    [left] = played.left
    assert left >= 120
    assert left < 120 + 60  # and no more is kept than it wants, but for what no row fits into
    played.start()
    assert len(played.left) == 1  # it has survived, so the next start is the rows' alone
    assert played.seconds > 2 * 540 - 120 - 60


@pytest.mark.usefixtures("no_traces")
@pytest.mark.parametrize(
    ("options", "packages"),
    [(["--minutes", "4"], ()), (["--only", "defaults"], ()), ([], (ONE_PACKAGE,))],
    ids=["too short", "some rows only", "a package is missing"],
)
def test_the_rows_have_all_the_time_where_recovery_is_not_for_this_start(
    options: list[str], packages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks: list[float] = []
    Played(A100, tmp_path / "gpu.json", monkeypatch)
    monkeypatch.setattr(recovery, "PACKAGES", packages)
    monkeypatch.setattr(runner, "run", lambda cases, machine, record, clock, tell: clocks.append(clock.minutes))
    CliRunner().invoke(entry.command, ["--out", str(tmp_path / "gpu.json"), *options], catch_exceptions=False)
    assert clocks == [4.0 if "--minutes" in options else 9.0]


@pytest.mark.slow
@pytest.mark.usefixtures("no_traces")
def test_the_page_says_how_long_all_rows_take_and_in_how_many_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for machine in (H200, A100, T4):
        played = Played(machine, tmp_path / f"{machine['name']}.json", monkeypatch)
        starts, measured = 1, played.start()
        while len(now := played.start()) > len(measured):
            starts, measured = starts + 1, now
        found.append((round(played.seconds, -2), starts))
    (h200, a100, t4), words = found, ("none", "one", "two", "three", "four", "five", "six")
    said = (
        f"take {h200[0]:,.0f} s on an H200, {a100[0]:,.0f} on an A100 with 80 GB and {t4[0]:,.0f} on a T4: "
        f"with nine minutes each, {words[h200[1]]} starts, {words[a100[1]]}, and {words[t4[1]]}"
    )
    assert said in (ROOT / "docs" / "gpu.md").read_text().replace("\n", " ")


def test_a_real_run_is_started_where_pip_has_put_no_script_beside_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "qlora-train"  # of pip --target
    done = subprocess.run([*command_of(script), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Carry out the run of a SPECIFICATION" in done.stdout
    script.touch()
    assert command_of(script) == [str(script)]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [(["--only", "nothing"], "--only"), (["--dry", "--out", "benchmarks/results/gpu.json"], "--out")],
)
def test_wrong_requests_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], where: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(entry, "PROBE", None)
    result = CliRunner().invoke(entry.command, arguments)
    assert isinstance(result.exception, RequestError)
    assert [problem.where for problem in result.exception.problems] == [where]


def test_make_gpu_takes_the_machines_python_and_puts_wheels_beside_it() -> None:
    def commands(*given: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "WHEELS", "DRY")}
        command = ["make", "--dry-run", "--no-print-directory", "gpu", *given]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    plain = commands("WHEELS=")
    assert "python3 -m benchmarks.gpu --minutes 9" in plain
    assert "pip" not in plain
    assert "chaos" not in plain  # what has no clock
    with_wheels = commands("WHEELS=folder", "PYTHON=/opt/python3", "MINUTES=4")
    assert "/opt/python3 -m pip install -q --no-index --no-deps --target .cache/gpu-site folder/*.whl" in with_wheels
    assert "/opt/python3 -m benchmarks.gpu --minutes 4" in with_wheels
    assert 'UNSLOTH_PYTHON="/opt/unsloth/python" PYTHONPATH=' in commands("UNSLOTH=/opt/unsloth/python")
    assert ".venv/bin/python -m benchmarks.gpu --dry" in commands("DRY=1")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.grid if index % 4 else pytest.mark.slow)
        for index, case in enumerate(MATRIX)
        if case.loop == "ours" and case.strategy.world_size == 1 and case.strategy.loss != "liger"  # which wants a GPU
    ],
)
def test_every_row_trains_when_it_is_small_and_needs_what_is_predicted(case: Case) -> None:
    torch.set_num_threads(1)
    shrunk = small(case)
    measured = measure.measure(Job(shrunk, "float32", "cpu", None, Path("unused")), Start(None, None))
    on_cpu = predict.device_of({**A100, "kind": "cpu"})
    errors = predict.errors_percent(predict.by_formula(shrunk, on_cpu), measured)
    assert measured["losses"] == pytest.approx([math.log(2048)] * 2, abs=0.3)
    assert abs(errors["allocated"]) < 5


@pytest.mark.slow
def test_a_dry_run_predicts_and_measures_every_branch_on_this_cpu(tmp_path: Path) -> None:
    out = tmp_path / "dry.json"
    before = set((ROOT / "benchmarks").rglob("gpu-*.json"))
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--minutes", "5", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != predict.UNSLOTH_PYTHON}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=330)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set((ROOT / "benchmarks").rglob("gpu-*.json")) == before
    written = json.loads(out.read_text())
    assert written["dry"] is True
    assert written["versions"]["torch"] == torch.__version__
    assert [row["name"] for row in written["rows"]] == [case.name for case in chosen(dry=True)]
    skipped, rows = (
        [row for row in written["rows"] if (row["status"] == "skipped") is which] for which in (True, False)
    )
    assert [row["loop"] for row in skipped] == ["unsloth"]  # which is not installed here
    for row in rows:
        assert row["status"] == "measured", row
        assert row["measured"]["losses"] == pytest.approx([math.log(2048)] * 2, abs=0.3)  # a guess among 2048 tokens
        assert abs(row["errors_percent"]["formula"]["after_load"]) < 0.1
        assert abs(row["errors_percent"]["formula"]["allocated"]) < 5
        assert row["name"] in done.stdout
    together = {row["name"]: row["measured"].get("allocated_bytes_by_rank", []) for row in rows}
    assert {name: len(each) for name, each in together.items() if each} == {"two-gpus-zero-3": 2}
    assert set(written["rates"]["measured"]) == set(Achieved._fields)
    assert f"{len(DRY) - 1} of {len(DRY)} rows measured." in done.stdout
    assert "Operations, bytes or kernels a second, medians: products " in done.stdout
