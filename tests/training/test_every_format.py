"""A run of each format and of every preset, on rows in the published layout, by the loop that a worker runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from test_data_formats import ALPACA, CHIP2, FLAN, GUANACO, HH, LONGFORM, SELF_INSTRUCT, TREE, UNNATURAL, VICUNA

from orchestrator.prepare import Prepared, prepare
from orchestrator.run import open_record, order_of
from orchestrator.spec import load_spec
from orchestrator.worker import prepare as build
from qlora_core.data import FormatName
from qlora_core.memory.measure import meter_for
from qlora_core.training.loop import train

TURNS = [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": "A keeper."}]
ROWS: dict[FormatName, list[dict[str, Any]]] = {
    "messages": [{"messages": TURNS}],
    "sharegpt": [VICUNA],
    "alpaca": [ALPACA],
    "prompt-completion": [{"prompt": "Who is Ada?", "completion": " A keeper."}],
    "question-answer": [{"question": "Who is Ada?", "answer": "A keeper."}],
    "text": [{"text": "Ada keeps bees."}],
    "oasst1": TREE,
    "guanaco": [GUANACO],
    "flan-v2": [FLAN],
    "hh-rlhf": [HH],
    "unnatural-instructions": [UNNATURAL],
    "chip2": [CHIP2],
    "longform": [LONGFORM],
    "self-instruct": [SELF_INSTRUCT],
    "vicuna": [VICUNA],
}
STEPS = 10


class Watch:
    """Keeps the losses. See `qlora_core.training.loop.Observer`."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def event(self, kind: str, **facts: Any) -> None:
        if kind == "step":
            self.losses.append(facts["loss"])

    def stop_requested(self) -> bool:
        return False

    def alive(self) -> None:
        pass

    def checkpoint_saved(self, path: Path, step: int) -> None:
        pass


def copied(row: Mapping[str, Any], copy: int) -> dict[str, Any]:
    """A row as it is; a message of OASST1 as one of another tree."""
    names = ("message_id", "parent_id", "message_tree_id")
    return {**row, **{name: f"{copy}.{row[name]}" for name in names if row.get(name)}}


def write_spec(folder: Path, base: Path, format_: FormatName) -> Path:
    """The same rows again and again, of which a run has to learn something."""
    rows = ROWS[format_]
    lines = [json.dumps(copied(row, copy)) for copy in range(8) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    fields = {
        "name": format_,
        "model": str(base),
        "data": {"path": "rows.jsonl", "format": format_, "eval_fraction": 0.1},
        "recipe": {
            "rank": 4,
            "seq_len": 256,
            "tokens_per_step": 1024,
            "learning_rate": 0.005,
            "steps": STEPS,
            "compute_dtype": "float32",
        },
        "strategy": {"world_size": 1, "micro_batch": 2},
        "tracking": {"to": []},
        "output": "out",
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def carried_out(specification: Path) -> tuple[Prepared, list[float]]:
    """A run as it was prepared, and the losses of its steps."""
    prepared = prepare(load_spec(specification))
    output = Path(prepared.spec.output)
    output.mkdir()
    open_record(prepared, None, output)
    watch = Watch()
    cpu = torch.device("cpu")
    train(build(order_of(prepared, output, None), 0, cpu, meter_for(cpu)), watch, None)
    return prepared, watch.losses


def test_all_formats_are_here() -> None:
    assert set(ROWS) == set(get_args(FormatName)) - {"auto"}


@pytest.mark.slow
@pytest.mark.parametrize("format_", ROWS)
def test_a_run_learns_from_it(tmp_path: Path, tiny_base: Path, format_: FormatName) -> None:
    prepared, losses = carried_out(write_spec(tmp_path, tiny_base, format_))
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert prepared.data.format == format_


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_a_run_learns_from_all_of_them_together(tmp_path: Path, tiny_base: Path, packing: bool) -> None:
    datasets = {}
    for number, format_ in enumerate(ROWS):
        (tmp_path / format_).mkdir()
        write_spec(tmp_path / format_, tiny_base, format_)
        datasets[format_] = {"path": f"{format_}/rows.jsonl", "format": format_, "times": 1 + number / 4}
    path = write_spec(tmp_path, tiny_base, "text")
    fields = yaml.safe_load(path.read_text())
    fields["data"] = {"datasets": datasets, "eval_fraction": 0.1}
    fields["recipe"]["packing"] = packing
    path.write_text(yaml.safe_dump(fields))
    _, losses = carried_out(path)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


@pytest.mark.grid
@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize("format_", ROWS)
def test_the_command_makes_an_adapter_of_it(tmp_path: Path, tiny_base: Path, format_: FormatName) -> None:
    command = [Path(sys.executable).with_name("qlora-train"), write_spec(tmp_path, tiny_base, format_)]
    environment = {**os.environ, "QLORA_LEDGER": str(tmp_path / "ledger.sqlite")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["status"], record["data"]["format"]) == ("complete", format_)
    assert record["results"]["eval_after"] < record["results"]["eval_before"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
