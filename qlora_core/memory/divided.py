"""What ZeRO divides, gathers and reduces of one model: the bytes that its rules (`sharding`) come to."""

from __future__ import annotations

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.device import Device
from qlora_core.memory.sharding import Gathered, Shard, bucket_elements, gathered_elements, stays_whole
from qlora_core.recipe import DTYPE_BYTES, Recipe
from qlora_core.strategy import Strategy


def shard_of(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Shard:
    """How the trainable state is divided."""
    tensors = exact.trainable_tensors(architecture, recipe)
    numel, largest = sum(size * count for size, count in tensors), max((size for size, _ in tensors), default=0)
    trainable = numel * DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    groups = exact.optimizer_groups(tensors, recipe)
    return Shard.of(strategy, trainable, numel, largest, max(sum(n * count for n, count in group) for group in groups))


def fetched_ahead(architecture: ModelArchitecture, recipe: Recipe, device: Device) -> int:
    """Bytes of the buffer of what ZeRO-3 fetches ahead in the forward pass."""
    return gathered(architecture, recipe, device).ahead_forward


def reduced_after(
    shard: Shard, architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> int:
    """Bytes by which reducing gradients after the backward pass exceeds what is there at its end."""
    if shard.stage == 1 and shard.widens:
        # as much as a bucket copies has moved into it, so that this rank's part comes on top; the timeline has those of
        # layers as they are summed up, and the others as they are made
        narrow = trained_outside(architecture, recipe) if strategy.gradient_accumulation == 1 else 0
        # offloading, the norm of each is taken on its way, in float64 (stage_1_and_2.py, copy_grads_in_partition)
        norm = 8 * shard.largest if shard.offload_optimizer else 0
        return shard.kept_gradient_bytes + narrow * (shard.gradient_itemsize - shard.itemsize) + norm
    if shard.stage == 1:
        return max(shard.kept_gradient_bytes - shard.bucket_bytes, 0)
    if shard.fills_buckets:
        return 0
    if shard.widens and strategy.gradient_accumulation == 1:
        return shard.reduction_bytes(device.kind) + shard.kept_gradient_bytes
    released = 0
    if shard.stage == 3:
        # all that was gathered has been released by then, but the embedding: its gradient comes last, and to a frozen
        # one whose output is made to need a gradient, for checkpointing, none comes
        released = gathered_again(architecture, recipe, strategy, device)
        size = architecture.embedding_parameters * DTYPE_BYTES[exact.stored_dtype(recipe, device.compute_dtype)]
        is_left = recipe.method == "full" or strategy.gradient_checkpointing
        if is_left and not stays_whole(size, size // architecture.embedding_parameters):
            released -= size
    return max(shard.reduction_bytes(device.kind) - released, 0)


def trained_outside(architecture: ModelArchitecture, recipe: Recipe) -> int:
    """Trained weights outside of the layers."""
    if recipe.method != "full":
        return 0
    return architecture.embedding_parameters + architecture.head_parameters + architecture.other_parameters


def reduced_within(
    shard: Shard, architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> int:
    """Bytes that there are more in the backward pass once the bucket has been full for the first time.

    ZeRO-2 copies its part of the gradients, and adds it to that of earlier micro-batches at the end, but for widened
    ones. ZeRO-3 has room for it from the start, and when it reduces, it has released as much of the weights as of their
    gradients has been made.
    """
    if shard.stage < 2 or not shard.fills_buckets:
        return 0
    if shard.stage == 2:
        added_in_place = shard.widens and strategy.gradient_accumulation > 1
        return shard.reduction_bytes(device.kind) + (0 if added_in_place else shard.kept_gradient_bytes)
    again = gathered_again(architecture, recipe, strategy, device)
    return max(shard.reduction_bytes(device.kind) - again * bucket_elements(shard.numel) // shard.numel, 0)


def gathered_again(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> int:
    """Bytes of what ZeRO-3 has whole in the backward pass, with the buffers of what it fetches ahead."""
    gone = unused(architecture, recipe, strategy)
    if strategy.loss == "chunked" and recipe.method != "full":
        # a frozen head has had its backward pass within the forward pass, and is released after it
        tied = 0 if strategy.gradient_checkpointing else architecture.embedding_parameters
        gone += architecture.head_parameters or tied
    whole, _, ahead = gathered(architecture, recipe, device, gone)
    return whole + ahead


def unused(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy) -> int:
    """Elements of an embedding to which nothing in the backward pass leads: it is released once it has been used."""
    used = strategy.gradient_checkpointing or architecture.tied_embeddings or recipe.method == "full"
    return 0 if used else architecture.embedding_parameters


def gathered(architecture: ModelArchitecture, recipe: Recipe, device: Device, gone: int = 0) -> Gathered:
    """Bytes of weights, adapters among them, that ZeRO-3 fetches: those that it does not keep whole anyway.

    Args:
        gone: elements of unquantized weights that nothing fetches any more.
    """
    item = DTYPE_BYTES[exact.stored_dtype(recipe, device.compute_dtype)]
    lora_item = DTYPE_BYTES[recipe.lora_dtype]
    weights = exact.weights(architecture, recipe, device.compute_dtype)
    base_item = 1 if weights.constants else item
    fetched = [(size, base_item, count) for size, count in weights.base]
    fetched += [(size, item, count) for size, count in weights.unquantized]
    if recipe.method != "full":
        tensors = exact.trainable_tensors(architecture, recipe)
        fetched += [(numel * lora_item, lora_item, count) for numel, count in tensors]
    fetched = [(size, each, count) for size, each, count in fetched if not stays_whole(size, each)]
    gone = 0 if stays_whole(gone * item, item) else gone
    elements = sum(size // each * count for size, each, count in fetched) - gone
    total = sum(size * count for size, _, count in fetched) - gone * item
    at_once = gathered_elements(elements)
    return Gathered(*(total * share // max(elements, 1) for share in at_once))
