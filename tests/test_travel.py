"""What goes along with a submitted run, and where it comes to lie."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from real_runs import Run, make_run

from clusters.errors import RequestError
from launch.job import job, shared
from launch.travel import JobOrder, pack, read_order, travelling
from orchestrator.machine import Machine, target_of
from orchestrator.prepare import prepare
from orchestrator.spec import RunSpec, load_spec

CPUS = Machine(kind="cpu", name="CPUs of 2 nodes", devices=2, memory_bytes=2**33, compute_capability=(0, 0))
ORDER = JobOrder(CPUS, "demo-base", force=True)


def run_of(folder: Path, base: Path, data: Path) -> Run:
    return make_run(folder, base, data, evaluation={})


def test_what_travels_is_the_specification_the_machine_and_what_is_local(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    run = run_of(tmp_path, tiny_base, conversations)
    spec = load_spec(run.specification)
    folder = tmp_path / "travels"
    folder.mkdir()
    pack(spec, ORDER, travelling(spec), folder)
    there = load_spec(folder / "run.yaml")
    assert Path(there.data.learned[""].path).read_bytes() == conversations.read_bytes()
    assert (Path(there.model) / "config.json").read_bytes() == (tiny_base / "config.json").read_bytes()
    assert there.output == spec.output
    assert there.recipe == spec.recipe
    assert read_order(folder) == ORDER


def test_an_order_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text(
        '{"machine": {"kind": "cuda", "name": "a100-80gb", "devices": 16, "memory_bytes": 85000000000,'
        ' "compute_capability": [8, 0], "has_bfloat16": false, "accelerator_type": null, "has_liger": false},'
        ' "model": "demo-base", "force": false}\n'
    )
    machine = read_order(tmp_path).machine
    assert (machine.name, machine.devices, machine.compute_capability) == ("a100-80gb", 16, (8, 0))
    assert (machine.gpus_per_node, machine.host_ram_bytes, machine.nvlink) == (None, None, None)
    assert (pool := target_of(machine, "auto", 16).pool) is not None
    assert (pool.gpus_per_node, pool.nodes) == (8, 2)


def test_each_of_several_datasets_travels(tmp_path: Path, tiny_base: Path, conversations: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(f"{name}\n")
    run = run_of(tmp_path, tiny_base, conversations)
    fields = yaml.safe_load(run.specification.read_text())
    datasets = {"a": {"path": "a/train.jsonl", "times": 2}, "b": {"path": "b/train.jsonl"}, "c": {"path": "org/name"}}
    run.specification.write_text(yaml.safe_dump(fields | {"data": {"datasets": datasets}}))
    folder = tmp_path / "travels"
    folder.mkdir()
    spec = load_spec(run.specification)
    pack(spec, ORDER, travelling(spec), folder)
    there = load_spec(folder / "run.yaml").data.learned
    assert [Path(there[name].path).read_text() for name in ("a", "b")] == ["a\n", "b\n"]
    assert there["a"].times == 2
    assert there["c"].path == "org/name"


def test_an_adapter_travels_too(tmp_path: Path, tiny_base: Path, conversations: Path) -> None:
    adapter, folder = tmp_path / "trained", tmp_path / "travels"
    for each in (adapter, folder):
        each.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    spec = load_spec(run_of(tmp_path, tiny_base, conversations).specification)
    spec = spec.model_copy(update={"adapter": str(adapter)})
    pack(spec, ORDER, travelling(spec), folder)
    named = yaml.safe_load((folder / "run.yaml").read_text())["adapter"]
    assert (folder / named / "adapter_model.safetensors").read_bytes() == b"weights"


def test_what_is_too_large_to_travel_is_refused_unless_all_nodes_see_it(tmp_path: Path, tiny_base: Path) -> None:
    large = tmp_path / "train.jsonl"
    with large.open("wb") as file:
        file.truncate(101 * 1000**2)
    spec = load_spec(run_of(tmp_path, tiny_base, large).specification)
    with pytest.raises(RequestError, match=r"10\d MB would have to travel, and at most 100 MB do.* --shared FOLDER"):
        travelling(spec)
    assert travelling(spec, [tmp_path]) == {("model",): tiny_base}
    assert travelling(spec, [tmp_path, tiny_base]) == {}


def test_a_base_that_was_changed_is_not_taken_for_the_one_that_an_earlier_submission_brought(tmp_path: Path) -> None:
    folder, output = tmp_path / "base", tmp_path / "out"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"first")
    first = shared(folder, output, "base")
    assert shared(folder, output, "base") == first
    (folder / "model.safetensors").write_bytes(b"other")
    second = shared(folder, output, "base")
    assert [(path / "model.safetensors").read_bytes() for path in (first, second)] == [b"first", b"other"]
    assert sorted(path.name for path in output.iterdir()) == sorted([first.name, second.name])


def test_a_job_carries_out_what_was_decided_with_the_base_where_all_nodes_see_it(
    tmp_path: Path, tiny_base: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[RunSpec, dict[str, Any]]] = []

    def carried_out(spec: RunSpec, **decided: Any) -> int:
        asked.append((spec, decided))
        return 0

    spec = load_spec(run_of(tmp_path, tiny_base, conversations).specification)
    folder = tmp_path / "travels"
    folder.mkdir()
    pack(spec, ORDER, travelling(spec), folder)
    monkeypatch.setattr("launch.train.carry_out", carried_out)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.chdir(tmp_path)  # and back: a job goes into its output folder
    found = CliRunner().invoke(job, ["--folder", str(folder)], standalone_mode=False, catch_exceptions=False)
    assert found.return_value == 0
    [(carried, decided)] = asked
    assert decided == {"force": True, "machine": CPUS, "model_name": "demo-base"}
    assert Path(carried.model).parent == Path(spec.output)
    assert (Path(carried.model) / "config.json").read_bytes() == (tiny_base / "config.json").read_bytes()


def test_a_base_is_planned_and_recorded_under_the_name_that_it_is_given(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    spec = load_spec(run_of(tmp_path, tiny_base, conversations).specification)
    here = prepare(spec, machine=CPUS)
    copied = spec.model_copy(update={"model": str(shutil.copytree(tiny_base, tmp_path / "copy"))})
    there = prepare(copied, machine=CPUS, model_name=here.base.architecture.name)
    assert there.plan.to_json()["model"]["name"] == str(tiny_base)
    assert there.plan.digest == here.plan.digest
    assert there.identity == here.identity
    assert there.base.folder == tmp_path / "copy"
