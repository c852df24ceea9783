"""Checkpoints: the trainable state of a run, and nothing that the base model's folder already holds.

Layout of ``step-00000040/`` (format version 1); a folder of that name is complete, since it gets its name last::

    adapter/adapter_model.safetensors, adapter_config.json    what peft loads
    model/model*.safetensors, config.json, ...                with method full in its place: what transformers loads
    optimizer-00000.safetensors                               one per rank: raw optimizer state
    rank-00000.json                                           one per rank: random states, plain numbers, and
                                                              which parameter lies where in the optimizer state
    checkpoint.json                                           step, schedule, the plan's digest, versions; written last
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from clusters.errors import RunFailed
from qlora_core.files import publish_folder, write_json
from qlora_core.training.engine import Engine, OptimizerState, Span

FORMAT_VERSION = 1
SHARD_SIZE = "5GB"
"""Of a file of a whole model's weights, as on the Hub."""
REQUIRED = {"format_version", "step", "world_size", "zero_stage", "identity", "scheduler", "context"}
"""What checkpoint.json must hold."""
FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has to know to go on, beyond weights and optimizer state.

    Attributes:
        step: optimizer steps done; with seed and data it is the position in the data.
        scheduler: the learning rate schedule's own state.
        context: what the run's caller wants back at a resume (first evaluation, sample answers, best loss).
    """

    step: int
    scheduler: dict[str, Any]
    context: dict[str, Any]


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def complete(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder by their step, ascending."""
    if not folder.is_dir():
        return {}
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := FOLDER.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def expired(steps: list[int], keep: int) -> list[int]:
    """Of the steps with a checkpoint, those that go when the last `keep` stay."""
    return sorted(steps)[:-keep]


def save(
    folder: Path,
    *,
    model: nn.Module,
    engine: Engine,
    progress: Progress,
    facts: Mapping[str, Any],
    rank: int,
    world_size: int,
) -> Path:
    """Write one checkpoint into `folder`; every rank must call it. Returns its final path.

    Args:
        facts: what identifies the run, for `checkpoint.json`.

    Raises:
        RunFailed: the disk is full or the folder cannot be written; then no checkpoint of that step exists.
    """
    final = folder / folder_name(progress.step)
    temporary = folder / f".{final.name}.tmp"
    weights = engine.trained_weights()
    state = engine.optimizer_state()
    failure = ""
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            save_weights(model, weights, temporary)
        save_file(state.tensors, temporary / f"optimizer-{rank:05d}.safetensors")
        rank_facts = {
            "numbers": state.numbers,
            "spans": [dataclasses.astuple(span) for span in state.spans],
            "random": random_state(),
        }
        (temporary / f"rank-{rank:05d}.json").write_text(json.dumps(rank_facts), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        failure = str(error)
    failures = [text for text in gather(failure, world_size) if text]
    if failures:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise storage_failed(final, failures[0])
    if rank == 0:
        try:
            write_json(
                temporary / "checkpoint.json",
                {
                    "format_version": FORMAT_VERSION,
                    "step": progress.step,
                    "world_size": world_size,
                    "scheduler": progress.scheduler,
                    "context": progress.context,
                    **facts,
                },
            )
            publish_folder(temporary, final)
        except OSError as error:
            failure = str(error)
            shutil.rmtree(temporary, ignore_errors=True)
    failures = [text for text in gather(failure, world_size) if text]
    if failures:
        raise storage_failed(final, failures[0])
    return final


def storage_failed(path: Path, reason: str) -> RunFailed:
    """The error of a checkpoint that could not be written."""
    return RunFailed(
        f"The checkpoint {path} could not be written: {reason}.",
        "Free space or make the folder writable, then start the same run again: it resumes from the last checkpoint.",
    )


def gather(value: str, world_size: int) -> list[str]:
    """`value` of every rank, on every rank; also a barrier."""
    if world_size == 1:
        return [value]
    values: list[str] = [""] * world_size
    dist.all_gather_object(values, value)
    return values


def save_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the trained weights into `folder`: as ``adapter/``, or as ``model/`` where all are trained.

    Args:
        weights: the trained parameters by their names in `engine.module`, whole.
    """
    named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if isinstance(model, PeftModel):
        (folder / "adapter").mkdir()
        save_adapter(model, named, folder / "adapter")
    else:
        save_model(model, named, folder / "model")


def save_model(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a whole model as transformers does: config.json and safetensors, in several files where it is large.

    A weight that is tied to another has one name in `weights`, and is tied again when it is loaded.
    """
    held = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    cast(Any, model).save_pretrained(folder, state_dict={**weights, **held}, max_shard_size=SHARD_SIZE)


def save_adapter(model: PeftModel, named: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter as peft does: adapter_model.safetensors and adapter_config.json."""
    adapter = get_peft_model_state_dict(model, state_dict=dict(named))
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors")
    config = dataclasses.replace(model.peft_config["default"], inference_mode=True)
    config.save_pretrained(str(folder))


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter in `folder`, a checkpoint's or another, into `model`, before an engine is built around it."""
    try:
        adapter = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise damaged(folder.parent, f"its adapter cannot be read: {error}") from error
    outcome = set_peft_model_state_dict(model, adapter)
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if outcome.unexpected_keys or missing:
        wrong = ", ".join([*outcome.unexpected_keys, *missing][:3])
        raise RunFailed(f"The adapter in {folder} does not fit the model: {wrong}.", "Start the run with --fresh.")


def load_facts(folder: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` says.

    Raises:
        RunFailed: the checkpoint is damaged or of another format.
    """
    try:
        stored: object = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder, str(error)) from error
    if not isinstance(stored, dict) or not stored.keys() >= REQUIRED:
        raise damaged(folder, "checkpoint.json lacks what it must hold")
    if stored["format_version"] != FORMAT_VERSION:
        raise RunFailed(
            f"The checkpoint {folder} has format version {stored['format_version']}, this program reads "
            f"{FORMAT_VERSION}.",
            "Resume with the version that wrote it, or start with --fresh.",
        )
    return stored


def damaged(folder: Path, reason: str) -> RunFailed:
    """The error of a checkpoint that cannot be read."""
    return RunFailed(
        f"The checkpoint {folder} is damaged: {reason}.",
        "Remove that folder: the same command then goes on from the one before, if there is one.",
    )


def load_progress(folder: Path) -> Progress:
    """What `save` was given as progress."""
    stored = load_facts(folder)
    return Progress(step=stored["step"], scheduler=stored["scheduler"], context=stored["context"])


def restore(folder: Path, engine: Engine, *, rank: int) -> None:
    """Put optimizer and random states of a checkpoint back; the adapter was loaded before, the base never changes.

    The checkpoint must come from as many ranks and the same ZeRO stage, which is checked before workers are started.
    """
    try:
        rank_facts = json.loads((folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))
        # A replica of another rank's state holds none of its own: all ranks read the one that was written.
        source = rank if rank_facts["spans"] else 0
        state_facts = rank_facts
        if source != rank:
            state_facts = json.loads((folder / f"rank-{source:05d}.json").read_text(encoding="utf-8"))
        engine.restore_optimizer(
            OptimizerState(
                tensors=load_file(folder / f"optimizer-{source:05d}.safetensors"),
                numbers=state_facts["numbers"],
                spans=tuple(Span(*values) for values in state_facts["spans"]),
            )
        )
        set_random_state(rank_facts["random"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(folder, f"the state of rank {rank} cannot be read: {error}") from error


def random_state() -> dict[str, Any]:
    """The states of Python's and PyTorch's generators, as JSON values."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
