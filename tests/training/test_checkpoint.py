"""Checkpoints: a run goes on bit for bit; a folder is whole or not there; no base weight is in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from meta_models import small_gemma3, small_mistral3, small_qwen3_5
from peft import PeftModel
from safetensors import safe_open
from small_runs import Watcher, build, encode, recipe_of, tensors

from clusters.errors import NotFinite, RunFailed
from qlora_core import files
from qlora_core.strategy import Strategy
from qlora_core.training import checkpoint, loop, manifest
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.engines import build_engine
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.loop import train
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import class_in
from qlora_core.training.sampling import Order
from qlora_core.training.tokenizer import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Path:
    return encode(conversations, tiny_base, tmp_path_factory.mktemp("encoded"))


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
    last = manifest.complete(tmp_path / "parts")[3]
    watcher = Watcher()
    resumed = train(build(tiny_base, data, tmp_path / "parts", recipe, resume=last), watcher, last)
    assert resumed.finished
    assert [event["step"] for event in watcher.events if event["event"] == "step"] == [4, 5, 6]

    final = manifest.folder_name(6)
    assert tensors(tmp_path / "parts" / final) == tensors(tmp_path / "whole" / final)
    assert whole.context["eval_after"] < whole.context["eval_before"]
    assert resumed.context["eval_before"] == whole.context["eval_before"]
    assert resumed.context["eval_after"] == whole.context["eval_after"]


def test_a_stop_that_is_asked_for_during_a_step_ends_the_run_after_it_and_evaluates_nothing(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    class Interrupted(Watcher):
        """Asked to stop once the first micro-batch of the second step is done."""

        asked = False

        def alive(self) -> None:
            self.asked |= [event["event"] for event in self.events].count("step") == 1

        def stop_requested(self) -> bool:
            return self.asked

    watcher = Interrupted()
    end = train(build(tiny_base, data, tmp_path, recipe_of()), watcher, None)
    assert (end.step, end.finished) == (2, False)
    assert list(manifest.complete(tmp_path)) == [2]
    assert [event["step"] for event in watcher.events if event["event"] == "eval"] == [0]


@pytest.mark.parametrize(
    ("make", "layers", "linears"),
    [
        (small_gemma3, "model.language_model.layers.", 2 * 7),
        (small_mistral3, "model.language_model.layers.", 2 * 7),
        (small_qwen3_5, "model.layers.", 2 * (5 + 4) + 4 * 3),
    ],
    ids=["gemma3", "mistral3", "qwen3_5"],
)
def test_a_model_that_sees_is_trained_on_text(
    tmp_path: Path, tiny_base: Path, data: Path, make: Callable[[int], Any], layers: str, linears: int
) -> None:
    """Whether all of its language model is trained, or adapters on that; what comes out loads as the base does."""
    tokenizer = load_tokenizer(str(tiny_base))
    base = tmp_path / "base"
    make(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    before = class_in(base).from_pretrained(base, dtype=torch.float32).state_dict()

    full = recipe_of(method="full", quantization="none", learning_rate=1e-3)
    end = train(build(base, data, tmp_path / "full", full), Watcher(), None)
    assert end.context["eval_after"] < end.context["eval_before"]
    saved = tmp_path / "full" / manifest.folder_name(6) / "model"
    after = class_in(saved).from_pretrained(saved, dtype=torch.float32).state_dict()
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("model.vision_tower", "model.multi_modal_projector"))}

    train(build(base, data, tmp_path / "lora", recipe_of(targets="all-linear")), Watcher(), None)
    adapter = tmp_path / "lora" / manifest.folder_name(6) / "adapter"
    fresh = class_in(base).from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(fresh, adapter)
    trained = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert len(trained) == linears
    assert all(name.startswith(f"base_model.model.{layers}") for name in trained)
    assert all(weight.any() for name, weight in adapted.named_parameters() if "lora_B" in name)


def grad_scaler(init_scale: float) -> torch.amp.GradScaler:
    """One whose scale falls from too large to a right one at the first overflow, and soon grows again."""
    return torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=2.0**-48, growth_interval=2)


def test_a_step_tells_its_tokens_and_its_positions_which_padding_is_among(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    path = tmp_path / "train.safetensors"
    save_examples([Encoded([10] * length, [True] * length) for length in (7, 2, 9, 5)], path)
    run = learning(build(tiny_base, data, tmp_path / "run", recipe_of()), path)
    watcher = Watcher()
    train(dataclasses.replace(run, total_steps=2), watcher, None)
    # 9 tokens beside 7, and 5 beside 2
    told = [(event["tokens"], event["positions"]) for event in watcher.events if event["event"] == "step"]
    assert told == [(23, 28)] * 2
    for rank in (0, 1):  # each of two has one of the micro-batches
        strategy = dataclasses.replace(run.strategy, world_size=2, gradient_accumulation=1)
        step = loop.one_step(dataclasses.replace(run, strategy=strategy, rank=rank), 0, watcher)
        assert (len(step.losses), step.tokens, step.positions) == (1, 23, 28)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_in_float16_a_gradient_that_overflows_changes_nothing_and_the_scale_goes_on_with_the_run(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    recipe = recipe_of(optimizer="adamw")

    def run(name: str, resume: Path | None = None) -> loop.TrainingRun:
        built = build(tiny_base, data, tmp_path / name, recipe, resume, "float16")
        built.engine.scaler = grad_scaler(2.0**60)
        return built

    watcher = Watcher()
    whole = train(run("whole"), watcher, None)
    steps = [event for event in watcher.events if event["event"] == "step"]
    assert [math.isfinite(step["grad_norm"]) for step in steps] == [False] + [True] * 5
    stopped = train(run("parts"), Watcher(stop_after=3), None)
    assert cast(Any, stopped.context["loss_scale"])["scale"] == 2.0**13  # 2^12 after the first, doubled after two more
    last = manifest.complete(tmp_path / "parts")[3]
    train(run("parts", resume=last), Watcher(), last)
    final = manifest.folder_name(6)
    assert tensors(tmp_path / "parts" / final) == tensors(tmp_path / "whole" / final)

    # beside the same run in float32, without the step that was passed over
    again = Watcher()
    in_float32 = build(tiny_base, data, tmp_path / "float32", recipe)
    step_of_all = in_float32.engine.step

    def step() -> float:
        if not [event for event in again.events if event["event"] == "step"]:
            in_float32.engine.optimizer.zero_grad(set_to_none=True)
            return 0.0
        return step_of_all()

    in_float32.engine.step = step  # type: ignore[method-assign]
    expected = train(in_float32, again, None)
    losses = [event["loss"] for event in again.events if event["event"] == "step"]
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=5e-3)
    assert whole.context["eval_after"] == pytest.approx(expected.context["eval_after"], rel=5e-3)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_in_float16_a_gradient_that_overflows_without_a_scale_ends_the_run(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of(optimizer="adamw"), compute_dtype="float16")
    run.engine.scaler = grad_scaler(1.0)
    backward = run.engine.backward
    run.engine.backward = lambda loss: backward(loss * math.inf)  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match=r"norm (inf|nan).*it is the gradient that is not"):
        train(run, Watcher(), None)


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
    final = manifest.folder_name(6)
    assert tensors(tmp_path / "with" / final) == tensors(tmp_path / "without" / final)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("shorter", [57, 60])
def test_no_step_needs_more_than_the_rehearsal_did(
    tmp_path: Path, tiny_base: Path, packing: bool, shorter: int
) -> None:
    # of the longest a single token is learned, of the others all; a step's second micro-batch has gradients beside it
    longest, others = Encoded([7] * 60, [False] * 59 + [True]), Encoded([7] * shorter, [True] * shorter)
    save_examples([longest] * 4 + [others] * 8, tmp_path / "train.safetensors")
    save_examples([others], tmp_path / "eval.safetensors")
    watcher = Watcher()
    train(build(tiny_base, tmp_path, tmp_path / "run", recipe_of(packing=packing)), watcher, None)
    (rehearsal,) = (event["peaks"] for event in watcher.events if event["event"] == "rehearsal")
    last = next(event["peaks"] for event in reversed(watcher.events) if event["event"] == "step")
    assert {phase: last[phase] for phase in ("forward", "backward")} == {
        phase: rehearsal[phase] for phase in ("forward", "backward")
    }


def test_it_holds_the_trainable_state_and_no_base_weight(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of(rank=32, optimizer="adamw"))
    train(run, Watcher(), None)
    folder = manifest.complete(tmp_path)[6]
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert names
    assert all("lora_" in name for name in names)
    trained = sum(parameter.numel() for parameter in run.engine.saved_weights().values())
    assert sum(map(len, tensors(folder).values())) <= 20 * trained  # 4 weight + 8 Adam + headers
    spans = json.loads((folder / "rank-00000.json").read_text())["spans"]
    assert sum(numel for _, _, numel, _, _ in spans) == trained


def test_a_schedule_goes_on_where_it_stopped(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    whole, first, second = Watcher(), Watcher(stop_after=2), Watcher()
    train(build(tiny_base, data, tmp_path / "a", recipe_of()), whole, None)
    train(build(tiny_base, data, tmp_path / "b", recipe_of()), first, None)
    last = manifest.complete(tmp_path / "b")[2]
    train(build(tiny_base, data, tmp_path / "b", recipe_of(), resume=last), second, last)
    rates = [[e["learning_rate"] for e in watcher.events if e["event"] == "step"] for watcher in (whole, first, second)]
    assert rates[0] == rates[1] + rates[2]
    assert len(set(rates[0])) > 3  # a cosine, not a constant


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
    assert list(manifest.complete(small_disk)) == [1]
    assert {path.name: path.stat().st_size for path in last.iterdir()} == before
    assert not list(small_disk.glob(".*tmp"))


def test_a_run_whose_first_loss_is_not_finite_ends_without_a_checkpoint(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of())
    parameter = next(p for p in run.model.parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(RunFailed, match=r"step 1 is nan"):
        train(run, Watcher(), None)
    assert manifest.complete(tmp_path) == {}


def test_a_step_after_which_the_held_out_loss_is_not_finite_is_not_saved(
    tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned from stays finite, what is held out does not: nobody would notice before the next evaluation.

    The checkpoint before is still being written by then, and is whole when the run has ended.
    """
    monkeypatch.setattr(checkpoint, "publish_folder", slowed(files.publish_folder))
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
    assert manifest.complete(tmp_path).keys() == {4}


def slowed(write: Callable[..., None]) -> Callable[..., None]:
    """As on storage that takes longer than two steps of the run."""

    def slowly(*arguments: Any) -> None:
        time.sleep(1.0)
        write(*arguments)

    return slowly


def test_a_run_that_fails_does_not_wait_for_ranks_that_are_gone(
    tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(checkpoint, "OTHERS_SECONDS", 5.0)
    run = build(tiny_base, data, tmp_path, recipe_of())
    writer = checkpoint.Writer(tmp_path, run.model, rank=0, world_size=2, facts={}, keep=2)
    progress = checkpoint.Progress(step=4, scheduler={}, context={})
    part = checkpoint.snapshot(run.engine, run.engine.saved_weights(), progress, rank=0, best=False)

    def fails() -> None:
        with writer.finishing(lambda: None):
            writer.write(part)
            raise ValueError("why it failed")

    with pytest.raises(ValueError, match="why it failed"):
        fails()
    assert manifest.complete(tmp_path) == {}


def test_a_rank_that_fails_waits_until_rank_0_has_named_the_checkpoint(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of())
    writer = checkpoint.Writer(tmp_path, run.model, rank=1, world_size=2, facts={}, keep=2)
    progress = checkpoint.Progress(step=4, scheduler={}, context={})
    named = tmp_path / manifest.folder_name(4)

    def of_rank_0() -> None:
        while not (parts := list(tmp_path.glob(f".*/{checkpoint.DONE.format(1)}"))):
            time.sleep(0.01)
        time.sleep(0.5)
        parts[0].parent.rename(named)

    def fails() -> None:
        with writer.finishing(lambda: None):
            writer.write(checkpoint.snapshot(run.engine, {}, progress, rank=1, best=False))
            raise ValueError("why it failed")

    rank_0 = threading.Thread(target=of_rank_0)
    rank_0.start()
    with pytest.raises(ValueError, match="why it failed"):
        fails()
    assert named.exists()
    rank_0.join()


BAD_TOKEN = 77
BAD, BESIDE, *_ = sorted(Order([1] * 24, 4, seed=0).step(3))
"""The two shortest of step 4, which are a micro-batch, where each example is a token longer than the one before."""


@pytest.fixture(scope="module")
def with_a_bad_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 examples, of which one has BAD_TOKEN."""
    examples = [Encoded([10] * (4 + index), [True] * (4 + index), f"a.jsonl, line {index + 1}") for index in range(24)]
    examples[BAD].ids[2] = BAD_TOKEN
    path = tmp_path_factory.mktemp("bad") / "train.safetensors"
    save_examples(examples, path)
    return path


def learning(run: loop.TrainingRun, path: Path) -> loop.TrainingRun:
    """`run` on other examples, with a checkpoint after every second step."""
    return dataclasses.replace(run, train_data=Rows(Examples(path), run.recipe, seed=0), save_every=2)


def lose_the_bad_token(run: loop.TrainingRun) -> None:
    """What the base has for it is no number any more."""
    with torch.no_grad():
        cast(Any, run.model).get_input_embeddings().weight[BAD_TOKEN] = math.nan


def test_a_loss_that_is_not_finite_ends_the_run_at_its_last_good_checkpoint_and_names_the_examples(
    tmp_path: Path, tiny_base: Path, data: Path, with_a_bad_one: Path
) -> None:
    def run(name: str, resume: Path | None = None) -> loop.TrainingRun:
        return learning(build(tiny_base, data, tmp_path / name, recipe_of(), resume), with_a_bad_one)

    bad = run("bad")
    lose_the_bad_token(bad)
    held = rf"It holds the examples of a\.jsonl, line {BESIDE + 1}, a\.jsonl, line {BAD + 1}, of which"
    with pytest.raises(NotFinite, match=rf"loss of step 4 is nan.*rank 0\. {held}"):
        train(bad, Watcher(), None)
    [last] = (tmp_path / "bad").glob("*step-*")
    assert last.name == manifest.folder_name(2)
    assert manifest.newest_valid(tmp_path / "bad") == (last, [])

    # a base without the fault goes on from there to what it learns from the start
    train(run("bad", resume=last), Watcher(), last)
    train(run("good"), Watcher(), None)
    final = manifest.folder_name(6)
    assert tensors(tmp_path / "bad" / final) == tensors(tmp_path / "good" / final)


def error_of(rank: int, folder: Path, base: Path, data: Path, learned: Path) -> str:
    """How the same run ends on one of two ranks, of which the second has the bad micro-batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", timedelta(minutes=2), world_size=2, rank=rank)
    strategy = Strategy(world_size=2, micro_batch=2, paged_optimizer=False)
    alone = build(base, data, folder / "checkpoints", recipe_of())
    engine = build_engine(SummedLoss(alone.model, "chunked"), alone.recipe, strategy)
    run = learning(dataclasses.replace(alone, strategy=strategy, engine=engine, rank=rank), learned)
    lose_the_bad_token(run)
    with pytest.raises(NotFinite) as raised:
        train(run, Watcher(), None)
    dist.destroy_process_group()
    return str(raised.value)


@pytest.mark.slow
def test_where_one_rank_s_loss_is_not_finite_all_ranks_end_and_name_its_examples(
    tmp_path: Path, tiny_base: Path, data: Path, with_a_bad_one: Path
) -> None:
    run = partial(error_of, folder=tmp_path, base=tiny_base, data=data, learned=with_a_bad_one)
    with ProcessPoolExecutor(2, get_context("spawn")) as ranks:
        first, second = ranks.map(run, range(2))
    held = f"It holds the examples of a.jsonl, line {BESIDE + 1}, a.jsonl, line {BAD + 1}, of which"
    assert f"first on rank 1. {held}" in first
    assert second == first
    assert manifest.complete(tmp_path / "checkpoints").keys() == {2}
