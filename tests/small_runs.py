"""Small training runs in this process, without Ray, for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qlora_core.memory.measure import StorageMeter
from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy
from qlora_core.training import manifest
from qlora_core.training.dataset import encode_file
from qlora_core.training.dataset.tokens import save_examples
from qlora_core.training.engines import build_engine
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.loop import TrainingRun
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import autocast_dtype, load_base, make_trainable
from qlora_core.training.restore import load_adapter
from qlora_core.training.tokenizer import load_tokenizer

CPU = torch.device("cpu")
FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "optimizer-00000.safetensors",
         "rank-00000.json")  # fmt: skip


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

    def alive(self) -> None:
        pass

    def checkpoint_saved(self, path: Path, step: int) -> None:
        self.event("checkpoint", path=path, step=step)


def stand_in_checkpoint(checkpoints: Path, step: int, **facts: Any) -> Path:
    """A checkpoint with files as a run leaves them, where what is in them does not matter."""
    folder = checkpoints / manifest.folder_name(step)
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 100)
    empty: dict[str, Any] = {"identity": {}, "scheduler": {}, "context": {}, "layout": {}}
    described = manifest.described(folder, list(FILES))
    manifest.write_manifest(folder, {"step": step, "world_size": 1, **empty, **facts}, described)
    return folder


def encode(conversations: Path, base: Path, folder: Path) -> Path:
    """The examples of a run, 32 to learn from and 8 held out, in `folder`."""
    examples, _ = encode_file(conversations, "auto", load_tokenizer(str(base)), 64)
    save_examples(examples[:32], folder / "train.safetensors")
    save_examples(examples[32:], folder / "eval.safetensors")
    return folder


def build(
    base: Path,
    data: Path,
    checkpoints: Path,
    recipe: Recipe,
    resume: Path | None = None,
    compute_dtype: Dtype = "float32",
) -> TrainingRun:
    strategy = Strategy(micro_batch=2, gradient_accumulation=2, paged_optimizer=False)
    folder = base if resume is None or recipe.method != "full" else resume / "model"
    model = make_trainable(load_base(str(folder), recipe, strategy, compute_dtype, CPU), recipe, seed=0)
    if resume is not None and isinstance(model, PeftModel):
        load_adapter(model, resume / "adapter")
    model.train()
    loss = SummedLoss(model, "chunked", autocast_dtype(recipe, compute_dtype))
    return TrainingRun(
        recipe=recipe,
        strategy=strategy,
        seed=0,
        total_steps=6,
        save_every=4,
        model=model,
        engine=build_engine(loss, recipe, strategy, scaled=compute_dtype == "float16"),
        tokenizer=load_tokenizer(str(base)),
        train_data=Rows(Examples(data / "train.safetensors"), recipe, seed=0),
        eval_data=Examples(data / "eval.safetensors"),
        meter=StorageMeter(),
        device=CPU,
        rank=0,
        checkpoints=checkpoints,
        facts={"identity": {}},
    )


def recipe_of(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {"rank": 4, "seq_len": 64, "tokens_per_step": 256, "learning_rate": 1e-2}
    return Recipe(**{**fields, "schedule": "cosine", **changes})


def tensors(folder: Path) -> dict[str, bytes]:
    """All safetensors of a checkpoint, by path: weights and optimizer state."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
