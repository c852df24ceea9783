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
    itemsize = DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    groups = exact.optimizer_groups(tensors, recipe)
    return Shard.of(strategy, tensors, itemsize, max(sum(n * count for n, count in group) for group in groups))


def fetched_ahead(architecture: ModelArchitecture, recipe: Recipe, device: Device) -> int:
    """Bytes of the buffer of what ZeRO-3 fetches ahead in the forward pass."""
    return gathered(architecture, recipe, device).ahead_forward


def reduced_after(
    shard: Shard, architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> int:
    """Bytes by which reducing gradients after the backward pass exceeds what is there at its end."""
    if shard.stage == 0 or (shard.stage > 1 and shard.fills_buckets and recipe.method != "full"):
        return 0
    if shard.stage == 1 and shard.widens:
        # as much as a bucket copies has moved into it, so that this rank's part comes on top; the timeline has those of
        # layers as they are summed up, and the others as they are made
        narrow = trained_outside(architecture, recipe) if strategy.gradient_accumulation == 1 else 0
        widened = narrow * (shard.gradient_itemsize - shard.itemsize)
        return shard.kept_gradient_bytes + widened + shard.norm_bytes
    if shard.stage == 1:
        return max(shard.kept_gradient_bytes - shard.bucket_bytes, shard.norm_bytes)
    released = released_by_the_end(architecture, recipe, strategy, device) if shard.stage == 3 else 0
    if shard.fills_buckets:
        # the embedding's comes last; what the others take is counted until the end
        taken = taken_within(shard, architecture, recipe, strategy, device)
        return max(reduced_alone(shard, architecture.embedding_parameters, device) - released - taken, 0)
    kept = shard.kept_gradient_bytes if shard.widens and strategy.gradient_accumulation == 1 else 0
    return kept + max(shard.reduction_bytes(shard.largest, device.kind) - released, 0)


def released_by_the_end(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> int:
    """Bytes of what ZeRO-3 had whole in the backward pass and has not at its end: all but the embedding.

    That one's gradient comes last, and to a frozen one whose output is made to need a gradient, for checkpointing, none
    comes.
    """
    size = architecture.embedding_parameters * DTYPE_BYTES[exact.stored_dtype(recipe, device.compute_dtype)]
    is_left = recipe.method == "full" or strategy.gradient_checkpointing
    left = size if is_left and not stays_whole(size, size // architecture.embedding_parameters) else 0
    return gathered_again(architecture, recipe, strategy, device) - left


def reduced_alone(shard: Shard, elements: int, device: Device) -> int:
    """Bytes of the gradient of a trained weight outside of the layers, and of what reducing it takes."""
    return shard.itemsize * elements + shard.reduction_bytes(elements, device.kind)


def head_reduced(shard: Shard, architecture: ModelArchitecture, recipe: Recipe, device: Device) -> int:
    """The same of the output head, which comes first; ZeRO-3 has released the head itself by then."""
    elements = architecture.head_parameters
    if recipe.method != "full" or shard.stage < 2 or not shard.fills_buckets or not elements:
        return 0
    released = elements * DTYPE_BYTES[exact.stored_dtype(recipe, device.compute_dtype)] if shard.stage == 3 else 0
    return reduced_alone(shard, elements, device) - released


def largest_within(architecture: ModelArchitecture, recipe: Recipe, shard: Shard) -> int:
    """Elements of the largest trained weight of a layer."""
    if recipe.method != "full":
        return shard.largest
    outside = (architecture.embedding_parameters, architecture.head_parameters)
    return max((size for size, _ in exact.trainable_tensors(architecture, recipe) if size not in outside), default=0)


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
    ones. ZeRO-3 has room for it from the start.
    """
    if shard.stage < 2 or not shard.fills_buckets:
        return 0
    taken = taken_within(shard, architecture, recipe, strategy, device)
    if shard.stage == 3:
        return taken
    several = strategy.gradient_accumulation > 1
    staying = 0 if shard.offload_optimizer else shard.staying_bytes(several)
    return taken + staying + (0 if shard.widens and several else shard.kept_gradient_bytes)


def taken_within(
    shard: Shard, architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> int:
    """Bytes of these that are there only while gradients of layers are reduced.

    When ZeRO-3 reduces, it has released as much of the weights as of their gradients has been made. In ZeRO-2 offloaded
    ones stay in earlier micro-batches, and norms are taken in the last.
    """
    taken = shard.reduction_bytes(largest_within(architecture, recipe, shard), device.kind)
    if shard.stage == 3:
        again = gathered_again(architecture, recipe, strategy, device)
        return max(taken - again * bucket_elements(shard.numel) // shard.numel, 0)
    if shard.offload_optimizer:
        return max(taken, shard.bucket_bytes + shard.staying_bytes(strategy.gradient_accumulation > 1))
    return taken


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
    weights = exact.weights(architecture.language_model, recipe, device.compute_dtype)
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
