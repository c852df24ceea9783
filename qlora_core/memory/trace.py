"""The traced estimate: the real training step of transformers, peft and bitsandbytes, run without memory.

The model is built and loaded on the meta device in the order in which transformers loads it (`loading.py`), two
training steps run, and every allocation and release is recorded (`recorder.py`) and played to a simulation of PyTorch's
caching allocator (`replay.py`, `allocator.py`). Nothing is assumed about the peak, and nothing is fitted.
"""

from __future__ import annotations

import gc
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast
from unittest import mock

import bitsandbytes.functional as bnb_functional
import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from transformers import masking_utils
from transformers.integrations import moe

from clusters.errors import not_installed, request_error
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.allocator import AllocatorSettings
from qlora_core.memory.arrivals import DRAWS, lowest_middle_highest
from qlora_core.memory.attention import AttentionKernel, kernel_of
from qlora_core.memory.autocast import followed
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Components, Estimate, GpuEstimate, Phase, Phases
from qlora_core.memory.loading import built, load
from qlora_core.memory.recorder import Recorder, chosen_operators, know_bitsandbytes
from qlora_core.memory.replay import LOADED, Event, loaded_by_threads, replay
from qlora_core.memory.residents import residents
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training import attention as own_attention
from qlora_core.training.lora import adapt_under_autocast
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import TORCH_DTYPES, trainable
from qlora_core.training.optimizer import build_optimizer

CAPABILITIES = ((7, 5), (8, 0), (9, 0))
"""Where kernels and workspaces change: tensor cores, flash attention, Hopper's workspaces."""
LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)(?:\.(.*))?$")


def estimate(
    architecture: ModelArchitecture,
    recipe: Recipe,
    strategy: Strategy,
    device: Device,
    settings: AllocatorSettings | None = None,
) -> Estimate:
    """What one rank and one host need, as `formula.estimate` says it, from a trace of the real code.

    Raises:
        RequestError: ZeRO shards what the trace would have to follow, transformers refuses the model's config, or its
            code does not run on meta.
    """
    recorded = record(architecture, recipe, strategy, _alike(device))
    draws = range(DRAWS if device.loading_threads else 1)
    runs = [
        replay(loaded_by_threads(recorded.events, device.loading_threads, draw), device.kind == "cuda", settings)
        for draw in draws
    ]
    low, reserved, high = lowest_middle_highest([max(run.reserved, run.allocated) for run in runs])
    played = sorted(runs, key=lambda run: run.allocated)[len(runs) // 2]
    phases = {phase: lowest_middle_highest([run.peaks[phase] for run in runs])[1] for phase in played.peaks}
    stays = residents(architecture, recipe, strategy, device)
    parts = Counter(played.rooms)
    parts["framework"] = played.allocated - sum(size for room, size in parts.items() if room != "framework")
    peak_phase = max(played.peaks, key=lambda phase: played.peaks[phase])
    return Estimate(
        "trace",
        GpuEstimate(
            components=Components(**parts),
            phases=Phases(lowest_middle_highest([run.after_load for run in runs])[1], **phases),
            peak_phase=peak_phase,
            peak_moment=in_words(peak_phase, played.where),
            allocated_bytes=played.allocated,
            reserved_bytes=reserved,
            process_bytes=reserved + device.context_bytes,
            paged_bytes=recorded.paged,
            reserved_interval=(low, high),
        ),
        stays.host(device.ranks_per_host),
    )


# --- recording --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run allocated and released, and what it paged.

    Attributes:
        events: in their order; the second step is the one between the last marks of the three phases.
        paged: bytes of optimizer state in managed memory.
    """

    events: list[Event]
    paged: int


def _alike(device: Device) -> Device:
    """What all devices have in common on which a step allocates the same, so that it is recorded once for them."""
    capability = max((each for each in CAPABILITIES if each <= device.compute_capability), default=(0, 0))
    return replace(device, compute_capability=capability, context_bytes=0, ranks_per_host=1, loading_threads=0)


@lru_cache(maxsize=4)
def record(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Recorded:
    """Load the model and run two steps on the meta device."""
    if strategy.zero_stage:
        raise request_error(
            "--estimator",
            "trace",
            f"it follows a rank that holds all it trains, and ZeRO stage {strategy.zero_stage} divides it",
            "Use --estimator formula, which knows ZeRO's shards and buffers",
        )
    if recipe.quantization == "int8":
        rule = "bitsandbytes' int8 operators have no meta kernels, so their code cannot run without memory"
        raise request_error("--estimator", "trace", rule, "Use --estimator formula")
    if recipe.block_size != 64:
        rule = f"transformers lets bitsandbytes quantize in blocks of 64, and these are of {recipe.block_size}"
        raise request_error("--estimator", "trace", rule, "Use --estimator formula")
    know_bitsandbytes()
    recorder = Recorder(architecture.vocab_size, device.kind == "cuda")
    kernel = kernel_of(architecture, recipe, strategy, device)
    with quiet(), on_meta(recipe, strategy, device) as paged:
        try:
            base = built(architecture, strategy, device)
        except Exception as error:  # of many kinds, whatever transformers' configuration and modelling code meets
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rule = f"transformers makes no model of it: {reason[:200]}"
            raise request_error(architecture.source, "", rule, "Correct the config.json") from error
        try:
            model = load(base, recipe, strategy, device, recorder)
            Run(model, recipe, strategy, device, kernel, recorder).steps()
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            rule = f"the code of model type {architecture.model_type} asks for tensors' values: {reason}"
            raise request_error("--estimator", "trace", rule, "Use --estimator formula") from error
        return Recorded(recorder.events, sum(paged))


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings that are about running for real."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    collects = gc.isenabled()
    gc.disable()  # a collection in the middle would be an accident of this process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collects:
            gc.enable()
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)


@contextmanager
def on_meta(recipe: Recipe, strategy: Strategy, device: Device) -> Iterator[list[int]]:
    """Let the code that asks for tensors' values, or for a GPU, run on meta; gives the sizes of paged buffers."""
    paged: list[int] = []

    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        with _disable_current_modes():  # managed memory is not the caching allocator's
            buffer = torch.empty(shape, dtype=dtype, device="meta")
        paged.append(buffer.nbytes)
        return buffer

    # functions, not mocks that return a value: those would keep the tensors that they were called with
    replaced: list[tuple[Any, str, Any]] = [
        # reads the positions' values; the mask of any two packed examples is as large as that of others
        (masking_utils, "find_packed_sequence_indices", lambda ids: torch.zeros_like(ids) if recipe.packing else None),
        (bnb_functional, "get_paged", get_paged),
        (bnb_functional, "fill", lambda *_: None),
        (bnb_functional, "is_on_gpu", lambda *_: True),
        (moe, "_can_use_grouped_mm", lambda *_: device.has_grouped_products),
    ]
    if device.kind == "cpu":
        own_attention.attend_on_a_cpu()
        replaced.append((own_attention, "DEVICES", ("meta",)))
    if "dynamic" not in bnb_functional.name2qmap:
        # made on meta, bitsandbytes' 8-bit map would have no values to check itself with
        bnb_functional.name2qmap["dynamic"] = bnb_functional.create_dynamic_map()
    with ExitStack() as stack:
        stack.enter_context(followed(device.kind, recipe.under_autocast))
        if strategy.loss == "liger":
            try:
                from qlora_core.memory.liger import without_kernels
            except ImportError as error:
                raise not_installed("--estimator", "trace", ["liger-kernel"], extra="liger") from error
            stack.enter_context(without_kernels())
        for module, name, function in replaced:
            stack.enter_context(mock.patch.object(module, name, new=function))
        yield paged


class Run:
    """Training steps of a loaded model as our loop, or with `output_held` a plain loop over transformers, runs them."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        strategy: Strategy,
        device: Device,
        kernel: AttentionKernel,
        recorder: Recorder,
    ) -> None:
        self.kernel, self.dtype = kernel, TORCH_DTYPES[device.compute_dtype]
        self.model, self.recipe, self.strategy, self.device, self.recorder = model, recipe, strategy, device, recorder
        self.loss_of = SummedLoss(model, strategy.loss)
        self.casts = recipe.narrows(device.compute_dtype)
        if self.casts and not device.plain_autocast:
            adapt_under_autocast(model)
        self.parameters = trainable(model)
        self.optimizer = build_optimizer(self.parameters, recipe, strategy)
        for group in self.optimizer.param_groups:
            if isinstance(self.optimizer, torch.optim.AdamW):
                group["foreach"] = device.kind == "cuda"
        self.tokens = torch.zeros((strategy.micro_batch, recipe.seq_len), dtype=torch.int64, device="meta")
        self.buckets: dict[nn.Parameter, torch.Tensor] = {}
        self.reducing = False

    def steps(self) -> None:
        """Two optimizer steps; the state exists in the second one."""
        names = {module: name for name, module in self.model.named_modules()}
        recorder = self.recorder

        def entered(module: nn.Module, inputs: Any) -> None:
            recorder.where = names.get(module, "")

        self.model.train()
        recorder.mark(LOADED)
        # a thread's first product asks for one
        recorder.workspaces = dict(zip(("forward", "backward"), self.device.blas_workspaces, strict=False))
        recorder.composes_attention = self.kernel in ("math", "masked_math")
        hooks = [register_module_forward_pre_hook(entered)]
        for parameter in self.parameters.values():
            hooks.append(cast(Any, parameter).register_post_accumulate_grad_hook(self._arrived))
        operators = chosen_operators(self.kernel, self.device.kind == "cuda")
        try:
            with recorder, operators:
                self._make_buckets()
                recorder.follow(self.tokens)
                for _ in range(2):
                    self._step()
        finally:
            for hook in hooks:
                hook.remove()

    def _step(self) -> None:
        held: list[Any] = []
        micro_batches = min(self.strategy.gradient_accumulation, 2)
        for index in range(micro_batches):
            held.clear()
            self.reducing = index == micro_batches - 1
            self.recorder.mark("forward")
            with torch.autocast("meta", self.dtype, enabled=self.casts, cache_enabled=self.device.plain_autocast):
                loss = self._loss(held)
            self.recorder.mark("backward")
            cast(Any, loss).backward()
            del loss
        self.recorder.mark("optimizer")
        self.recorder.room = "optimizer_state"
        if not self.device.output_held:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.recorder.room = "activations"
        self.optimizer.zero_grad(set_to_none=True)
        held.clear()

    def _loss(self, held: list[Any]) -> torch.Tensor:
        tokens = self.tokens
        if self.device.output_held and self.strategy.loss == "full":
            output = self.model(input_ids=tokens, labels=tokens, use_cache=False)
            held.append(output)
            return cast(torch.Tensor, output.loss)
        return cast(torch.Tensor, self.loss_of(tokens, tokens, tokens if self.recipe.packing else None))

    def _make_buckets(self) -> None:
        """DistributedDataParallel's buckets, of which all gradients are views from then on."""
        if self.strategy.world_size == 1:
            return
        self.recorder.room = "gradients"
        for parameter in self.parameters.values():
            self.buckets[parameter] = torch.empty_like(parameter)
        self.recorder.room = "activations"

    def _arrived(self, parameter: torch.Tensor) -> None:
        """A gradient has been accumulated: it stays, or is moved into DDP's bucket."""
        if self.buckets and self.reducing:
            parameter.grad = self.buckets[cast(nn.Parameter, parameter)]
        elif parameter.grad is not None:
            self.recorder.move(parameter.grad, "gradients")


def in_words(phase: Phase, where: str) -> str:
    """A moment in words, such as "backward of layer 80, around its down_proj"."""
    if phase == "optimizer":
        return "optimizer step"
    found = LAYER.search(where)
    if found is None:
        part = where.rpartition(".")[2]
        return f"{phase}, around {part or 'the loss'}"
    name = f"{phase} of layer {int(found[1]) + 1}"
    parts = [part for part in (found[2] or "").split(".") if part]
    inner = [part for part in parts if not part.startswith(("lora_", "base_layer", "default"))]
    return f"{name}, around its {inner[-1]}" if inner else name
