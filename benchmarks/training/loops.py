"""The loops that are held against each other, each in a process of its own: ours, and transformers and peft alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator.plans import Plan
from orchestrator.prepare import prepare
from orchestrator.run import open_record, order_of
from orchestrator.spec import load_spec
from orchestrator.worker import prepare as build
from qlora_core.memory.measure import StorageMeter, meter_for
from qlora_core.quiet import quiet_libraries
from qlora_core.training.loop import TrainingRun, train

CPU = torch.device("cpu")
BATCHES, ADAPTER = "batches.safetensors", "adapter.safetensors"


class Watch:
    """Keeps the steps of a run of ours, and the micro-batches of which they are."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.seen: list[Mapping[str, torch.Tensor]] = []

    def event(self, kind: str, **facts: Any) -> None:
        """See `qlora_core.training.loop.Observer`."""
        if kind == "step":
            self.steps.append(facts)
        elif kind == "rehearsal":
            del self.seen[-1:]  # it is no part of what is learned from

    def stop_requested(self) -> bool:
        """See `Observer`."""
        return False

    def alive(self) -> None:
        """See `Observer`."""

    def checkpoint_saved(self, path: Path, step: int) -> None:
        """See `Observer`."""


def begun(specification: Path) -> tuple[TrainingRun, Plan]:
    """A run as a worker makes it, without Ray, before its first step; and its plan."""
    spec = load_spec(specification)
    prepared = prepare(spec)
    output = Path(spec.output)
    output.mkdir(exist_ok=True)
    open_record(prepared, None, output)
    return build(order_of(prepared, output, None), 0, CPU, meter_for(CPU)), prepared.plan


def ours(specification: Path) -> dict[str, Any]:
    """A run as a worker makes it, without Ray. Leaves its micro-batches and its first adapter for the others."""
    run, plan = begun(specification)
    first = {name: value.detach().clone() for name, value in run.model.named_parameters() if value.requires_grad}
    save_file(first, specification.with_name(ADAPTER))
    watch = Watch()
    loss = run.engine.loss

    def recorded(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        watch.seen.append(batch)
        return loss(batch)

    run.engine.loss = recorded  # type: ignore[method-assign]
    train(run, watch, None)
    names = {"input_ids": "input_ids_BS", "labels": "labels_BS"}
    stacked = {name: torch.stack([batch[key] for batch in watch.seen]) for name, key in names.items()}
    save_file(stacked, specification.with_name(BATCHES))
    return {
        "seconds": [step["seconds"] for step in watch.steps],
        "losses": [step["loss"] for step in watch.steps],
        "peaks": watch.steps[-1]["peaks"],
        "compute_dtype": plan.target.compute_dtype,
    }


class Told(Watch):
    """Writes each step to a file when it is over, as a worker does."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def event(self, kind: str, **facts: Any) -> None:
        """See `qlora_core.training.loop.Observer`."""
        if kind == "step":
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": kind, "time": time.time(), **facts}) + "\n")


def timed(specification: Path) -> dict[str, Any]:
    """A run as a worker makes it, without Ray, which tells of its steps where a run's events are."""
    run, _ = begun(specification)
    train(run, Told(run.checkpoints.with_name("events.jsonl")), None)
    return {}


def bare(specification: Path, *, dtype: torch.dtype, kbit: bool, meter: StorageMeter | None) -> dict[str, Any]:
    """The loop that transformers' and peft's documents show, over the same micro-batches from the same adapter.

    Args:
        kbit: call peft.prepare_model_for_kbit_training.
        meter: measures the memory; None where it is the time that counts.
    """
    spec = load_spec(specification)
    recipe = spec.recipe
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(spec.model, dtype=dtype, quantization_config=quantization)
    base.config.use_cache = False
    checkpointing = {"use_reentrant": False}
    if kbit:
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=checkpointing)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        base.enable_input_require_grads()
    config = LoraConfig(
        r=recipe.rank, lora_alpha=int(recipe.alpha), lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    put_adapter(model, specification.with_name(ADAPTER))
    model.train()
    meter = meter or Unmetered()
    meter.loaded(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), weight_decay=0.0
    )
    batches = load_file(specification.with_name(BATCHES))
    seconds, losses = [], []
    for input_ids, labels in zip(batches["input_ids"], batches["labels"], strict=True):
        begin = time.perf_counter()
        mask = torch.ones_like(input_ids)
        with meter.phase("forward"):
            result = model(input_ids=input_ids, attention_mask=mask, labels=labels, use_cache=False)
        with meter.phase("backward"):
            result.loss.backward()
        losses.append(float(result.loss.detach()))
        del result
        with meter.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses, "peaks": meter.peaks()._asdict()}


class Unmetered(StorageMeter):
    """Measures nothing, and takes no time."""

    def loaded(self, model: Any) -> None:
        """See `Meter`."""

    def phase(self, name: Any) -> Any:
        """See `Meter`."""
        return nullcontext()


def put_adapter(model: Any, path: Path) -> None:
    """Give `model` the adapter that our run started from."""
    prefix, suffix = "base_model.", ".default.weight"
    found = {
        name[name.index(prefix) :].removesuffix(suffix) + ".weight": value for name, value in load_file(path).items()
    }
    set_peft_model_state_dict(model, found)


ROLES = {
    "ours": lambda path: ours(path),
    "timed": lambda path: timed(path),
    "bare": lambda path: bare(path, dtype=torch.float32, kbit=False, meter=None),
    "plain peft": lambda path: bare(path, dtype=torch.bfloat16, kbit=True, meter=StorageMeter()),
}


if __name__ == "__main__":
    quiet_libraries()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    role, path, answer = sys.argv[1:]
    Path(answer).write_text(json.dumps(ROLES[role](Path(path))), encoding="utf-8")
