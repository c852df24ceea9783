"""One case, really run: optimizer steps with the pieces that training is made of, and the peaks of the last."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn

from benchmarks.gpu.base import random_base
from benchmarks.gpu.device import process_bytes, used_bytes
from benchmarks.gpu.job import Job, Start
from benchmarks.gpu.matrix import Case
from qlora_core.memory.estimate import Phase
from qlora_core.memory.measure import CudaMeter, Meter, meter_for
from qlora_core.recipe import Dtype
from qlora_core.training.engine import Engine
from qlora_core.training.engines import build_engine
from qlora_core.training.examples import IGNORED
from qlora_core.training.group import join_group
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import attach_adapters, autocast_dtype


class HeldOutput(SummedLoss):
    """The stock loss of a plain loop over transformers, whose output lives until the loop comes round again."""

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        position_ids_BS: torch.Tensor | None = None,
    ) -> Any:
        """The summed loss, as `SummedLoss` gives it."""
        self.output: Any = self.model(
            input_ids=input_ids_BS,
            attention_mask=torch.ones_like(input_ids_BS),
            position_ids=position_ids_BS,
            labels=labels_BS,
            use_cache=False,
        )
        return self.output.loss * (labels_BS[:, 1:] != IGNORED).sum()

    def release(self) -> None:
        """The step has ended."""
        self.output = None


def module_of(model: nn.Module, case: Case, compute_dtype: Dtype) -> SummedLoss:
    """A case's model with its loss, under autocast where its recipe has it."""
    if case.output_held:
        return HeldOutput(model, "full")
    return SummedLoss(model, case.strategy.loss, autocast_dtype(case.recipe, compute_dtype))


class Gauge:
    """Peaks of the phases of a step: what tensors take, by the meter of a run, and what the allocator holds."""

    def __init__(self, device: torch.device, meter: Meter) -> None:
        self._device = device
        self._meter = meter
        self.reserved: dict[str, int] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """The highest allocation inside counts for `name`."""
        with self._meter.phase(name):
            yield
        if self._device.type == "cuda":  # the meter has reset the peaks when the phase began
            highest = torch.cuda.max_memory_reserved(self._device)
            self.reserved[name] = max(self.reserved.get(name, 0), highest)

    def peaks(self) -> dict[str, int]:
        """The highest allocation of each phase."""
        return self._meter.peaks()._asdict()


def measure(job: Job, start: Start) -> dict[str, Any]:
    """The peaks of the last step; the first is a warm-up that makes the optimizer's state."""
    case, device = job.case, torch.device(job.place)
    if job.rendezvous is not None:
        join_group(job.kind, job.rendezvous, job.rank, job.rank, case.strategy.world_size)
    if job.limit is not None and job.kind == "cuda":
        torch.cuda.set_per_process_memory_fraction(job.limit / torch.cuda.mem_get_info(device)[1], device)
    torch.manual_seed(0)
    started = time.perf_counter()
    base = random_base(case.config_fields(), case.recipe, case.strategy, job.compute_dtype, device)
    if case.recipe.upcast == "peft":
        base = prepare_model_for_kbit_training(
            base,
            use_gradient_checkpointing=case.strategy.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    model = attach_adapters(base, case.recipe, seed=0)
    model.train()
    meter = meter_for(device)
    meter.loaded(model)
    after_load = meter.peaks().after_load
    reserved_after_load = torch.cuda.memory_reserved(device) if job.kind == "cuda" else 0
    module = module_of(model, case, job.compute_dtype)
    with meter.setup():
        engine = build_engine(module, case.recipe, case.strategy)
    loaded = time.perf_counter()
    losses, seconds = [], []
    for _ in range(case.steps):
        # a CUDA meter of its own for each step; a tracker must see all from the start, and its second step is higher
        gauge = Gauge(device, CudaMeter(device) if job.kind == "cuda" else meter)
        stepped = time.perf_counter()
        losses.append(step(engine, case, gauge, lambda: batch(case, base, device)))
        if isinstance(module, HeldOutput):
            module.release()
        if job.kind == "cuda":
            torch.cuda.synchronize(device)  # the optimizer's kernels were only launched
        seconds.append(time.perf_counter() - stepped)
    phases = {**gauge.peaks(), "after_load": after_load}
    return {
        "phases": phases,
        "reserved_phases": {"after_load": reserved_after_load, **gauge.reserved},
        "allocated_bytes": max(size for phase, size in phases.items() if phase != "after_load"),
        "allocated_is": meter.allocated_is,
        **({} if job.limit is None else {"limit_bytes": job.limit}),
        "reserved_bytes": max(gauge.reserved.values(), default=0),
        **process(job, start),
        "losses": losses,
        "load_seconds": round(loaded - started, 2),
        **rate(case, seconds),
    }


def rate(case: Case, seconds: Sequence[float]) -> dict[str, float]:
    """The time of a step, which is the median without the first; and tokens per second."""
    median = statistics.median(seconds[1:])
    return {"step_seconds": round(median, 4), "tokens_per_second": round(case.recipe.tokens_per_step / median, 1)}


def step(engine: Engine, case: Case, gauge: Gauge, make_batch: Callable[[], dict[str, torch.Tensor]]) -> float:
    """One optimizer step as `qlora_core.training.loop` makes it; returns its mean loss."""
    micro_batches = case.strategy.gradient_accumulation
    learned = case.recipe.tokens_per_step - case.strategy.sequences_per_step  # a sequence's first token is not learned
    total = 0.0
    for position in range(micro_batches):
        with engine.micro_step(last=position == micro_batches - 1):
            with gauge.phase("forward"):
                loss = engine.loss(make_batch())
            with gauge.phase("backward"):
                engine.backward(loss / learned)
            total += float(loss.detach())
            del loss
    with gauge.phase("optimizer"):
        engine.step()
    return total * case.strategy.world_size / learned  # this rank's, which is alike on all


def batch(case: Case, base: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens, all of the full length and all learned."""
    vocabulary: int = base.config.vocab_size  # type: ignore[union-attr,assignment]  # transformers' config
    shape = (case.strategy.micro_batch, case.recipe.seq_len)
    tokens_BS = torch.randint(vocabulary, shape, device=device)
    return {"input_ids_BS": tokens_BS, "labels_BS": tokens_BS}


def process(job: Job, start: Start) -> dict[str, Any]:
    """The process in nvidia-smi, now that the allocator holds all that it ever held."""
    if job.kind != "cuda" or job.uuid is None:
        return {"context_bytes": 0, "process_bytes": 0, "process_is": None}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    known = {"context_bytes": start.context_bytes, "reserved_at_end_bytes": torch.cuda.memory_reserved()}
    own, used = process_bytes(job.uuid), used_bytes(job.uuid)
    if own is not None:
        return {**known, "process_bytes": own, "process_is": "nvidia-smi, this process"}
    if used is not None and start.used_before is not None:
        rise = used - start.used_before
        return {**known, "process_bytes": rise, "process_is": "nvidia-smi, the GPU's rise since the start"}
    return {**known, "process_bytes": total - free, "process_is": "cudaMemGetInfo, the whole GPU"}
