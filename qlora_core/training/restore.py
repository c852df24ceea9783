"""Puts a checkpoint back: the adapter into a model, the raw state into an engine, or laid out anew for another."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from clusters.errors import RunFailed, StorageFailed
from qlora_core.training.checkpoint import Progress, reason_of
from qlora_core.training.engine import Engine
from qlora_core.training.manifest import damaged, load_facts, rank_files
from qlora_core.training.optimizer_state import OptimizerState, Span
from qlora_core.training.reshard import laid_out, whole


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter in `folder`, a checkpoint's or another, into `model`, before an engine is built around it."""
    try:
        adapter = load_file(folder / "adapter_model.safetensors")
    except OSError as error:
        raise unreadable(folder.parent, error) from error
    except SafetensorError as error:
        raise damaged(folder.parent, f"its adapter cannot be read: {error}") from error
    outcome = set_peft_model_state_dict(model, adapter)
    missing = [name for name in outcome.missing_keys if "lora_" in name]
    if outcome.unexpected_keys or missing:
        wrong = ", ".join([*outcome.unexpected_keys, *missing][:3])
        raise RunFailed(f"The adapter in {folder} does not fit the model: {wrong}.", "Start the run with --fresh.")


def restore(folder: Path, engine: Engine, *, rank: int, layout: Mapping[str, Any]) -> None:
    """Put optimizer and random states of a checkpoint back; the adapter was loaded before, the base never changes.

    On the layout that it was saved with, the raw state is put back, bit for bit. On another, a number of ranks, a ZeRO
    stage or an optimizer, it is mapped to parameters and laid out anew (see `reshard`); the random states then start
    from the ranks' that there were.

    Args:
        layout: this run's: see `reshard.layout_of`.
    """
    try:
        facts = load_facts(folder)
        before = int(facts["world_size"])
        source = rank % before
        state, drawn = load_rank(folder, source)
        if facts["layout"] == layout:
            # A replica of another rank's state holds none of its own: all ranks read the one that was written.
            engine.restore_optimizer(state if state.spans else load_rank(folder, 0)[0])
        else:
            every = whole([load_rank(folder, number)[0] for number in range(before)])
            engine.restore_optimizer(laid_out(every, *engine.layout()))
        set_random_state(drawn)
        if rank != source:  # two ranks must not draw the same
            torch.manual_seed(torch.initial_seed() + 1_000_003 * rank + int(facts["step"]))
    except OSError as error:
        raise unreadable(folder, error) from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(folder, f"the state of rank {rank} cannot be read: {error}") from error


def load_rank(folder: Path, rank: int) -> tuple[OptimizerState, dict[str, Any]]:
    """A rank's optimizer state and its random states."""
    optimizer, numbers = rank_files(rank)
    facts = json.loads((folder / numbers).read_text(encoding="utf-8"))
    state = OptimizerState(
        tensors=load_file(folder / optimizer),
        numbers=facts["numbers"],
        spans=tuple(Span(*values) for values in facts["spans"]),
    )
    return state, facts["random"]


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


def load_progress(folder: Path) -> Progress:
    """What `Snapshot` held as progress."""
    stored = load_facts(folder)
    return Progress(step=stored["step"], scheduler=stored["scheduler"], context=stored["context"])


def unreadable(folder: Path, error: OSError) -> StorageFailed:
    """The error of a checkpoint that may be whole, and whose storage fails."""
    remedy = "Look at that storage; the same command goes on from there."
    return StorageFailed(f"The checkpoint {folder} could not be read: {reason_of(error)}.", remedy, error.errno)
