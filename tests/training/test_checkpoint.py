"""Checkpoints: a run goes on bit for bit; a folder is whole or not there; no base weight is in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from clusters.errors import RunFailed
from qlora_core.memory.measure import StorageMeter
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training import checkpoint, loop
from qlora_core.training.dataset import encode_file
from qlora_core.training.engines import build_engine
from qlora_core.training.examples import Encoded, Examples, Rows, save_examples
from qlora_core.training.loop import TrainingRun, train
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import load_base, load_tokenizer, make_trainable

CPU = torch.device("cpu")


class Watcher:
    """An observer that keeps what it is told, and stops the run after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self._stop_after = stop_after

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append({"event": kind, **facts})

    def stop_requested(self) -> bool:
        done = sum(event["event"] == "step" for event in self.events)
        return self._stop_after is not None and done + 1 >= self._stop_after

    def checkpoint_saved(self, path: Path, metrics: Mapping[str, Any]) -> None:
        self.event("checkpoint", path=path, **metrics)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    examples, _ = encode_file(conversations, "auto", load_tokenizer(str(tiny_base)), 64)
    save_examples(examples[:32], folder / "train.safetensors")
    save_examples(examples[32:], folder / "eval.safetensors")
    return folder


def build(base: Path, data: Path, checkpoints: Path, recipe: Recipe, resume: Path | None = None) -> TrainingRun:
    strategy = Strategy(micro_batch=2, gradient_accumulation=2, paged_optimizer=False)
    folder = base if resume is None or recipe.method != "full" else resume / "model"
    model = make_trainable(load_base(str(folder), recipe, strategy, "float32", CPU), recipe, seed=0)
    if resume is not None and isinstance(model, PeftModel):
        checkpoint.load_adapter(model, resume / "adapter")
    model.train()
    return TrainingRun(
        recipe=recipe,
        strategy=strategy,
        seed=0,
        total_steps=6,
        save_every=4,
        model=model,
        engine=build_engine(SummedLoss(model, "chunked"), recipe, strategy),
        tokenizer=load_tokenizer(str(base)),
        train_data=Rows(Examples(data / "train.safetensors"), recipe, seed=0),
        eval_data=Examples(data / "eval.safetensors"),
        meter=StorageMeter(),
        device=CPU,
        rank=0,
        checkpoints=checkpoints,
        facts={"zero_stage": 0, "identity": {}},
    )


def recipe_of(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {"rank": 4, "seq_len": 64, "tokens_per_step": 256, "learning_rate": 1e-2}
    return Recipe(**{**fields, "schedule": "cosine", **changes})


def tensors(folder: Path) -> dict[str, bytes]:
    """All safetensors of a checkpoint, by path: weights and optimizer state."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


NOISY = {"neftune_alpha": 5.0, "dropout": 0.1}
METHODS = [
    {"optimizer": "adamw_8bit", "loraplus_lr_ratio": 4.0, **NOISY},
    {"optimizer": "adamw", "use_dora": True, "use_rslora": True, "loraplus_lr_ratio": 4.0, "dropout": 0.1},
    {"method": "full", "quantization": "none", "learning_rate": 1e-3, "neftune_alpha": 5.0},
]


@pytest.mark.parametrize("method", METHODS, ids=["lora+ with noise", "dora", "full"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, tiny_base: Path, data: Path, method: dict[str, Any]) -> None:
    recipe = recipe_of(**method)
    whole = train(build(tiny_base, data, tmp_path / "whole", recipe), Watcher(), None)
    assert whole.finished

    stopped = train(build(tiny_base, data, tmp_path / "parts", recipe), Watcher(stop_after=3), None)
    assert (stopped.step, stopped.finished) == (3, False)
    torch.manual_seed(99)  # a new process starts from another random state
    last = checkpoint.complete(tmp_path / "parts")[3]
    watcher = Watcher()
    resumed = train(build(tiny_base, data, tmp_path / "parts", recipe, resume=last), watcher, last)
    assert resumed.finished
    assert [event["step"] for event in watcher.events if event["event"] == "step"] == [4, 5, 6]

    final = checkpoint.folder_name(6)
    assert tensors(tmp_path / "parts" / final) == tensors(tmp_path / "whole" / final)
    assert whole.context["eval_after"] < whole.context["eval_before"]
    assert resumed.context["eval_before"] == whole.context["eval_before"]
    assert resumed.context["eval_after"] == whole.context["eval_after"]


def test_the_rehearsal_of_the_largest_micro_batch_leaves_no_trace_but_its_peak(
    tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, watcher = recipe_of(**METHODS[0], packing=True), Watcher()
    run = build(tiny_base, data, tmp_path / "with", recipe)
    train(run, watcher, None)
    (told,) = (event for event in watcher.events if event["event"] == "rehearsal")
    assert (told["sequences"], told["longest"]) == (2, max(run.train_data.lengths))
    monkeypatch.setattr(loop, "rehearse", lambda *_: None)
    train(build(tiny_base, data, tmp_path / "without", recipe), Watcher(), None)
    final = checkpoint.folder_name(6)
    assert tensors(tmp_path / "with" / final) == tensors(tmp_path / "without" / final)


def test_it_holds_the_trainable_state_and_no_base_weight(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of(rank=32, optimizer="adamw"))
    train(run, Watcher(), None)
    folder = checkpoint.complete(tmp_path)[6]
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert names
    assert all("lora_" in name for name in names)
    trained = sum(parameter.numel() for parameter in run.engine.trained_weights().values())
    assert sum(map(len, tensors(folder).values())) <= 20 * trained  # 4 weight + 8 Adam + headers
    spans = json.loads((folder / "rank-00000.json").read_text())["spans"]
    assert sum(numel for _, _, numel, _, _ in spans) == trained


def test_a_schedule_goes_on_where_it_stopped(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    whole, first, second = Watcher(), Watcher(stop_after=2), Watcher()
    train(build(tiny_base, data, tmp_path / "a", recipe_of()), whole, None)
    train(build(tiny_base, data, tmp_path / "b", recipe_of()), first, None)
    last = checkpoint.complete(tmp_path / "b")[2]
    train(build(tiny_base, data, tmp_path / "b", recipe_of(), resume=last), second, last)
    rates = [[e["learning_rate"] for e in watcher.events if e["event"] == "step"] for watcher in (whole, first, second)]
    assert rates[0] == rates[1] + rates[2]
    assert len(set(rates[0])) > 3  # a cosine, not a constant


def test_a_half_written_folder_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.tmp").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "step-00000005").mkdir()
    assert list(checkpoint.complete(tmp_path)) == [5]
    assert checkpoint.complete(tmp_path / "none") == {}


@pytest.mark.parametrize(("keep", "gone"), [(1, [5, 10, 15]), (2, [5, 10]), (9, [])])
def test_the_last_few_stay(keep: int, gone: list[int]) -> None:
    assert checkpoint.expired([20, 5, 15, 10], keep) == gone


def test_a_damaged_or_foreign_checkpoint_is_told_from_a_good_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_text('{"format_version": 1, "step"')
    with pytest.raises(RunFailed, match="is damaged"):
        checkpoint.load_facts(tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"format_version": 1}')
    with pytest.raises(RunFailed, match="lacks what it must hold"):
        checkpoint.load_facts(tmp_path)
    fields = dict.fromkeys(checkpoint.REQUIRED, 0)
    (tmp_path / "checkpoint.json").write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(RunFailed, match="format version 99"):
        checkpoint.load_facts(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write into `path` until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(os.urandom(4096))


def test_a_full_disk_fails_the_run_and_leaves_the_last_checkpoint_whole(
    small_disk: Path, tiny_base: Path, data: Path
) -> None:
    recipe = recipe_of(rank=2, optimizer="adamw_8bit")
    first = build(tiny_base, data, small_disk, recipe)
    train(first, Watcher(stop_after=1), None)
    before = {path.name: path.stat().st_size for path in (small_disk / "step-00000001").iterdir()}
    fill(small_disk / "ballast")
    last = small_disk / "step-00000001"
    with pytest.raises(RunFailed, match=r"could not be written.*No space"):
        train(build(tiny_base, data, small_disk, recipe, resume=last), Watcher(), last)
    assert list(checkpoint.complete(small_disk)) == [1]
    assert {path.name: path.stat().st_size for path in last.iterdir()} == before
    assert not list(small_disk.glob(".*tmp"))


def test_a_loss_that_is_not_finite_ends_the_run_and_harms_no_checkpoint(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of())
    parameter = next(p for p in run.model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(RunFailed, match="is nan"):
        train(dataclasses.replace(run, eval_data=Examples(data / "eval.safetensors")), Watcher(), None)
    assert checkpoint.complete(tmp_path) == {}


def test_a_step_after_which_the_held_out_loss_is_not_finite_is_not_saved(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    """What is learned from stays finite, what is held out does not: nobody would notice before the next evaluation."""
    poisoned, watcher = 77, Watcher()
    save_examples([Encoded([5, poisoned, 6, 7], [True] * 4)], tmp_path / "held-out.safetensors")
    run = build(tiny_base, data, tmp_path, recipe_of())
    run = dataclasses.replace(run, eval_data=Examples(tmp_path / "held-out.safetensors"))
    learned = {token for index in range(32) for token in run.train_data.example(index)}
    assert poisoned not in learned

    def poison(kind: str, **facts: Any) -> None:
        if kind == "step" and facts["step"] == 5:
            with torch.no_grad():
                cast(Any, run.model).get_input_embeddings().weight[poisoned] = float("nan")

    watcher.event = poison  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match=r"held-out examples is nan after step 6, .*not saved"):
        train(run, watcher, None)
    assert checkpoint.complete(tmp_path).keys() == {4}


def test_a_loss_that_is_not_finite_names_the_examples_that_it_came_with(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    poisoned = 77
    examples = [Encoded([10 + place % 5 for place in range(4 + index)], [True] * (4 + index)) for index in range(24)]
    examples[5].ids[2] = poisoned
    save_examples(examples, tmp_path / "poisoned.safetensors")
    run = build(tiny_base, data, tmp_path, recipe_of())
    rows = Rows(Examples(tmp_path / "poisoned.safetensors"), run.recipe, seed=0)
    step = next(step for step in range(6) if 5 in rows.order.step(step))
    with torch.no_grad():
        cast(Any, run.model).get_input_embeddings().weight[poisoned] = float("nan")
    with pytest.raises(RunFailed, match=rf"loss of step {step + 1} is nan.*rank 0.*training examples (\d+, )?6\b"):
        train(dataclasses.replace(run, train_data=rows), Watcher(), None)
    assert checkpoint.complete(tmp_path).keys() == ({4} if step >= 4 else set())
