"""What stays on a rank through all steps, and what each phase of a step adds to it whatever the micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.allocator import ROUNDING
from qlora_core.memory.device import Device
from qlora_core.memory.divided import gathered, gathered_again, shard_of, unused
from qlora_core.memory.estimate import HostEstimate, Phase
from qlora_core.memory.reserve import packed
from qlora_core.memory.settled import settled
from qlora_core.memory.sharding import Shard, stays_whole
from qlora_core.recipe import DTYPE_BYTES, Quantization, Recipe
from qlora_core.strategy import Strategy

LOADING_THREADS = 4
"""Weights that transformers loads at a time (5.23, core_model_loading.py: GLOBAL_WORKERS); where it quantizes them, it
uses no threads (convert_and_load_state_dict_in_model)."""
QUANTIZED_ON_HOST: dict[Quantization, int] = {"nf4": 14, "fp4": 28}
"""Bytes an element that bitsandbytes makes beside the weight when it quantizes one on a CPU (0.50.2, quantize_4bit in
backends/default/ops.py): for nf4 the weight and its scaled copy in float32, int32 and uint8 indices, and what is packed
twice; for fp4 int64 indices, also twice. In resident memory, a weight of 48 million took 14.2 and 28.2."""


class Residents(NamedTuple):
    """Bytes of one rank by component.

    Attributes:
        loaded: after loading, adapters attached (with ZeRO-3: this rank's parts).
        load_peak: the most that is on the device before the first step. With ZeRO-3 on a GPU, this rank's parts and the
            largest weight, whole while it is divided, or constants and what DeepSpeed makes next; on a CPU the model
            before that.
        between: what exists from the first step on: optimizer state, library workspaces, buckets.
        added: what a phase adds beside activations.
        paged: optimizer state in managed memory.
        segments: reserved memory in which all this lies.
        holes: what loading leaves free in them.
        host_load, host_steady: on the host while loading and while training, of which `host` tells what all its ranks
            take. A CPU's memory is the host's: what is offloaded counts as the device's there.
    """

    loaded: dict[str, int]
    load_peak: int
    between: dict[str, int]
    added: dict[Phase, dict[str, int]]
    paged: int
    segments: int
    holes: tuple[int, ...]
    host_load: int
    host_steady: int

    def host(self, ranks: int) -> HostEstimate:
        """A host with so many ranks."""
        return HostEstimate(ranks * self.host_load, ranks * self.host_steady)


def residents(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Residents:
    """Everything whose size the micro-batch and the sequence length do not change."""
    weights = exact.weights(architecture, recipe, device.compute_dtype)
    tensors = exact.trainable_tensors(architecture, recipe)
    itemsize = DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    shard = shard_of(architecture, recipe, strategy, device)
    state_tensors = tensors if not shard.stage else ((shard.part_numel, 1),)
    paged = strategy.paged_optimizer and device.kind == "cuda"
    state = exact.optimizer_state(state_tensors, recipe, 4 if shard.stage else itemsize, paged)
    # with method full the trained weights are the base's own
    lora = [] if recipe.method == "full" else [(numel * itemsize, count) for numel, count in tensors]
    loaded, whole, on_host = _loaded(weights, lora, itemsize, recipe, strategy, device)
    buffers = exact.buffer_bytes(architecture)
    loaded["unquantized_weights"] += buffers
    between = {"framework": sum(device.blas_workspaces), "communication_buffers": shard.passing_bytes}
    if not shard.offload_optimizer:
        between["optimizer_state"] = state.resident + shard.master_bytes
    added: dict[Phase, dict[str, int]] = {"forward": {}, "backward": {}, "optimizer": {}}
    if shard.stage == 0 and (strategy.gradient_accumulation > 1 or shard.world > 1):
        # of earlier micro-batches, or as views of DDP's buckets
        between["gradients"] = shard.trainable
    _add_accumulated(added, shard, strategy)
    if shard.stage in (1, 2):
        added["optimizer"]["gradients"] = shard.kept_gradient_bytes
        if shard.offload_optimizer and shard.widens and shard.stage == 1:
            # only without offload are they let go before the optimizer runs (stage_1_and_2.py, step)
            added["optimizer"]["gradients"] += shard.left_bytes
    foreach = device.kind == "cuda" and not shard.offload_optimizer
    groups = [((shard.stepped_numel, 1),)] if shard.stage else exact.optimizer_groups(tensors, recipe)
    step = shard.step_bytes(_step_buffers(groups, recipe, paged, 4 if shard.stage else itemsize, foreach))
    step_on_host = step if shard.offload_optimizer and device.kind == "cuda" else 0
    step -= step_on_host
    added["optimizer"]["optimizer_state"] = step
    if shard.stage == 3:
        between["communication_buffers"] = shard.bucket_bytes
        between["gradients"] = shard.kept_gradient_bytes
        # what is fetched ahead in the forward pass is used up before the loss: the timeline has it
        whole_forward = gathered(architecture, recipe, device, unused(architecture, recipe, strategy))
        added["forward"] = {**whole, "communication_buffers": whole_forward.whole}
        again = gathered_again(architecture, recipe, strategy, device)
        added["backward"] = {**whole, "communication_buffers": again}
        if sum(whole.values()) > step:
            # all weights are divided for the optimizer's step, and the small ones fetched again right after it
            added["optimizer"] = dict(whole)
    on_host |= shard.host_bytes(state.resident + state.paged, strategy.gradient_accumulation > 1)
    if device.kind == "cpu":  # its memory is the host's
        for component, size in on_host.items():
            between[component] = between.get(component, 0) + size
        on_host = {}
    holes: tuple[int, ...] = ()
    if shard.stage == 3 or device.kind == "cpu":
        segments = sum(loaded.values()) + sum(whole.values())
    else:
        loaded["framework"], segments, holes = settled(architecture, recipe, device)
    load_peak, host_load = sum(loaded.values()), _host_load(architecture, recipe)
    if shard.stage == 3:
        base = sum(size * count for sizes in weights for size, count in sizes)
        adapters = sum(size * count for size, count in lora)
        if device.kind == "cpu":
            load_peak = base + adapters
        else:
            passing = max(size for size, _ in (*weights.base, *weights.unquantized, *lora))
            # constants come when all parameters are divided (engine_deepspeed.divide), and then what DeepSpeed makes
            load_peak += max(passing - loaded["quantization_constants"], shard.engine_bytes)
            # each rank loads the whole base there, and gives it adapters, before it divides it
            host_load = base + max(adapters, _on_its_way(architecture, recipe))
    return Residents(
        loaded,
        load_peak,
        between,
        added,
        0 if shard.offload_optimizer else state.paged,
        segments + packed([(buffers, 1), (sum(between.values()) + sum(added["backward"].values()), 1)]),
        holes,
        host_load,
        sum(on_host.values()) + step_on_host,
    )


def _add_accumulated(added: dict[Phase, dict[str, int]], shard: Shard, strategy: Strategy) -> None:
    """What earlier micro-batches of a step leave for the forward and the backward pass of later ones."""
    if strategy.gradient_accumulation == 1:
        return
    for phase in ("forward", "backward"):
        if shard.stage == 2:
            added[phase]["gradients"] = shard.kept_gradient_bytes
        elif shard.stage == 1:
            added[phase]["gradients"] = shard.numel * shard.gradient_itemsize
            added[phase]["communication_buffers"] = shard.bucket_bytes
        elif shard.stage == 0 and shard.world > 1:
            # DDP adds them up outside its buckets until the last micro-batch (no_sync after zero_grad(set_to_none))
            added[phase]["gradients"] = shard.trainable


def _loaded(
    weights: exact.Weights,
    lora: list[tuple[int, int]],
    lora_item: int,
    recipe: Recipe,
    strategy: Strategy,
    device: Device,
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """By component what is on the device after loading, and what ZeRO-3 keeps whole beside a rank's parts.

    Third, what offloading keeps on the host instead.
    """
    rounding = 0
    item = DTYPE_BYTES[exact.stored_dtype(recipe, device.compute_dtype)]
    # packed weights are bytes; without constants nothing is quantized
    itemsizes = {
        "base_weights": 1 if weights.constants else item,
        "quantization_constants": 1,
        "unquantized_weights": item,
        "lora_weights": lora_item,
    }
    held: dict[str, int] = {}
    whole: dict[str, int] = {}
    on_host: dict[str, int] = {}
    for component, sizes in (
        ("base_weights", weights.base),
        ("quantization_constants", weights.constants),
        ("unquantized_weights", weights.unquantized),
        ("lora_weights", lora),
    ):
        divided = strategy.zero_stage == 3 and component != "quantization_constants"
        ranks = strategy.world_size if divided else 1
        total = 0
        for size, count in sizes:
            total += -(-size // ranks) * count
            rounding += -size % ROUNDING * count
            if divided and stays_whole(size, itemsizes[component]):
                whole[component] = whole.get(component, 0) + size * count
        if divided and strategy.offload == "all" and component in ("base_weights", "unquantized_weights"):
            on_host[component] = total
            total = 0
        held[component] = total
    held["framework"] = rounding if device.kind == "cuda" else 0
    return held, whole, on_host


def _step_buffers(
    groups: Sequence[Sequence[tuple[int, int]]], recipe: Recipe, paged: bool, itemsize: int, foreach: bool
) -> int:
    """What torch's AdamW makes on the way (torch/optim/adamw.py); bitsandbytes' kernels make nothing.

    On CUDA the square roots of all tensors of a group at once (`foreach`); on a CPU one tensor's square root and its
    corrected copy.
    """
    if recipe.optimizer == "adamw_8bit" or paged:
        return 0
    if foreach:
        return itemsize * max(sum(numel * count for numel, count in group) for group in groups)
    return 2 * itemsize * max(numel for group in groups for numel, _ in group)


def _host_load(architecture: ModelArchitecture, recipe: Recipe) -> int:
    """What a rank holds on the host while loading: the 16-bit weights that are on their way to its device.

    Checkpoints are mapped, not read: their pages are the operating system's to drop. On a CPU the model itself is what
    `GpuEstimate` counts.
    """
    largest = max(architecture.embedding_parameters, *(linear.weight_numel for linear in architecture.linears))
    return 2 * largest * (LOADING_THREADS if recipe.quantization == "none" else 1)


def _on_its_way(architecture: ModelArchitecture, recipe: Recipe) -> int:
    """Bytes of the largest 16-bit weight that is quantized on the host, and of what is made of it meanwhile.

    What is not quantized stays as it came.
    """
    temporaries = QUANTIZED_ON_HOST.get(recipe.quantization)
    if temporaries is None:
        return 0
    numels = (linear.weight_numel for linear in architecture.linears if exact.is_quantized(linear, recipe))
    return (2 + temporaries) * max(numels, default=0)
