"""A plan in words: where each gigabyte comes from, with its arithmetic, and what each choice saves."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launch.report.divided import (
    Row,
    division_lines,
    gradient_lines,
    host_rows,
    lines_of,
    offloads,
    optimizer_lines,
    trainable,
)
from launch.report.words import number, size_text
from orchestrator.plans import Plan
from qlora_core.architecture import Linear, ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.formula import estimate
from qlora_core.recipe import DTYPE_BYTES
from qlora_core.strategy import LOSS_CHUNK_TOKENS


@dataclass(frozen=True, slots=True)
class Section:
    """A title with its lines."""

    title: str
    lines: tuple[str, ...]


def explain(plan: Plan) -> tuple[Section, ...]:
    """The whole explanation, in the order of reading."""
    components = plan.estimate.gpu.components._asdict()
    texts = component_texts(plan)
    return (
        *(
            Section(f"{name.replace('_', ' ')}: {size_text(size)}", (*texts[name], *division_lines(plan, name)))
            for name, size in components.items()
            if size or texts[name]
        ),
        Section("The peak", tuple(peak_lines(plan))),
        Section("From tensors to the device", tuple(device_lines(plan))),
        Section("The host", tuple(host_lines(plan))),
        Section("What each choice saves, all else equal", tuple(saving_lines(plan))),
    )


def component_texts(plan: Plan) -> dict[str, list[str]]:
    """What each component is, as lines; none where there is no such thing in this plan."""
    return {
        "base_weights": base_lines(plan),
        "quantization_constants": constant_lines(plan),
        "unquantized_weights": unquantized_lines(plan),
        "lora_weights": adapter_lines(plan),
        "gradients": gradient_lines(plan),
        "optimizer_state": optimizer_lines(plan),
        "activations": activation_lines(plan),
        "logits_and_loss": loss_lines(plan),
        "dequantization_workspace": workspace_lines(plan),
        "communication_buffers": communication_lines(plan),
        "framework": framework_lines(plan),
    }


def base_lines(plan: Plan) -> list[str]:
    """The linear layers' weights."""
    architecture, recipe = plan.architecture, plan.planned
    shapes = Counter[tuple[int, int]]()
    for linear in architecture.linears:
        shapes[linear.out_features, linear.in_features] += linear.count
    products = " + ".join(
        f"{out} x {into}" if count == 1 else f"{count} x {out} x {into}" for (out, into), count in shapes.items()
    )
    in_layers, total = architecture.linear_parameters, linear_weights(base_linears(plan))
    item = DTYPE_BYTES[exact.stored_dtype(recipe, plan.target.compute_dtype)]
    stored = {
        "nf4": f"nf4 packs two weights into a byte: {number(total)} / 2.",
        "fp4": f"fp4 packs two weights into a byte: {number(total)} / 2.",
        "int8": f"int8 takes a byte for each: {number(total)} x 1.",
        "none": f"Each takes {item} bytes: {number(total)} x {item}.",
    }[recipe.quantization]
    of_tower = linear_weights(architecture.all_linears()) - in_layers
    idle = f"The vision tower has {number(of_tower)} more: it is loaded, and idles on text."
    return [
        f"The linear layers: {repeats(architecture)} x",
        f"  ({products})",
        f"  = {number(in_layers)} weights.",
        *([idle] if of_tower else ()),
        *([stored] if total else ["bitsandbytes leaves them all as they are: they count as unquantized."]),
    ]


def repeats(architecture: ModelArchitecture) -> str:
    """How often what one period of layers has is there."""
    if architecture.period == 1:
        return f"{architecture.num_layers} layers"
    return f"{architecture.periods} times {architecture.period} layers"


def base_linears(plan: Plan) -> list[tuple[Linear, int]]:
    """Linear layers that are the base, and how many: if it is quantized, those that bitsandbytes replaces."""
    every = plan.architecture.all_linears()
    return [(one, count) for one, count in every if one.quantized or plan.planned.quantization == "none"]


def linear_weights(linears: Iterable[tuple[Linear, int]]) -> int:
    """Weights of so many of each."""
    return sum(linear.weight_numel * count for linear, count in linears)


def constant_lines(plan: Plan) -> list[str]:
    """Constants of the quantized blocks."""
    recipe = plan.planned
    if recipe.quantization == "none":
        return []
    if recipe.quantization == "int8" and base_linears(plan):
        return ["One float32 for each row of a weight."]
    blocks = sum(
        exact.absmax_count(linear.weight_numel, recipe.block_size) * count for linear, count in base_linears(plan)
    )
    if not blocks:
        return []
    first = f"Each block of {recipe.block_size} weights shares one absmax constant: {number(blocks)} constants."
    if not recipe.double_quantization:
        return [
            first,
            f"Each is a float32: {number(blocks)} x 4, which is {32 / recipe.block_size:g} bits for a weight.",
        ]
    bits = 8 / recipe.block_size + 32 / (recipe.block_size * exact.NESTED_BLOCK)
    return [
        first,
        f"Double quantization keeps each in a byte, and a float32 for {exact.NESTED_BLOCK} of them:",
        f"  {bits:.3f} bits for a weight instead of {32 / recipe.block_size:g}; code books come on top.",
    ]


def unquantized_lines(plan: Plan) -> list[str]:
    """Embeddings, head, what bitsandbytes leaves as it is, norms."""
    dtype = exact.stored_dtype(plan.planned, plan.target.compute_dtype)
    why = " (peft's upcast casts them to it)" if plan.planned.upcast == "peft" else ""
    return [f"Each takes the {DTYPE_BYTES[dtype]} bytes of {dtype}{why}.", *lines_of(unquantized_rows(plan))]


def unquantized_rows(plan: Plan) -> list[Row]:
    """The bytes of all weights that are not the base, whole, by what they are."""
    architecture, recipe = plan.architecture, plan.planned
    item = DTYPE_BYTES[exact.stored_dtype(recipe, plan.target.compute_dtype)]
    left = [(one, count) for one, count in architecture.all_linears() if (one, count) not in base_linears(plan)]
    names = ", ".join(dict.fromkeys(linear.name for linear, _ in left))
    experts = architecture.num_layers * architecture.expert_parameters
    tower = architecture.tower.other_parameters if architecture.tower else 0
    embedding, head = architecture.embedding_parameters, architecture.head_parameters
    quantized = "" if recipe.quantization == "none" else ": bitsandbytes leaves them as they are"
    shares = f"token embedding: {number(architecture.vocab_size)} x {architecture.hidden_size}"
    counted = (
        (embedding, f"{shares} = {number(embedding)} weights{'' if head else ', the output head too'}"),
        (head, f"output head: {number(head)} weights"),
        (experts, f"experts, {number(experts)} weights in parameters of three dimensions{quantized}"),
        (linear_weights(left), f"linear layers, {number(linear_weights(left))} weights{quantized} ({names})"),
        (tower, f"vision tower, all but its linear layers: {number(tower)} weights"),
    )
    rest = architecture.parameters - linear_weights(base_linears(plan)) - sum(numel for numel, _ in counted)
    return [
        *(Row(numel * item, text) for numel, text in counted),
        Row(rest * item, f"norms, biases and the like: {number(rest)} weights"),
        Row(exact.buffer_bytes(architecture), "tables that the model keeps beside its weights"),
    ]


def adapter_lines(plan: Plan) -> list[str]:
    """LoRA's two matrices."""
    numel, dtype = trainable(plan)
    if plan.planned.method == "full":
        return [f"No adapters: all {number(numel)} weights are trained, in {dtype}."]
    rank = plan.planned.rank
    edges = sum(
        (linear.in_features + linear.out_features) * linear.count
        for linear in plan.architecture.linears
        if exact.is_target(linear, plan.planned)
    )
    in_linears = plan.architecture.periods * rank * edges
    lines = [
        f"Each adapted layer gets A [{rank}, in] and B [out, {rank}], so {rank} x (in + out) weights:",
        f"  {repeats(plan.architecture)} x {rank} x {number(edges)} = {number(in_linears)} weights.",
    ]
    if numel > in_linears:
        lines.append(
            f"Routers and experts have adapters too, each expert its own: {number(numel - in_linears)} weights."
        )
    return [
        *lines,
        f"Each takes the {DTYPE_BYTES[dtype]} bytes of {dtype}: {size_text(numel * DTYPE_BYTES[dtype])}.",
    ]


def activation_lines(plan: Plan) -> list[str]:
    """What the forward pass leaves for the backward pass."""
    architecture, strategy = plan.architecture, plan.strategy
    tokens = strategy.micro_batch * plan.planned.seq_len
    item = DTYPE_BYTES[exact.stored_dtype(plan.planned, plan.target.compute_dtype)]
    one = tokens * architecture.hidden_size * item
    if not strategy.gradient_checkpointing:
        return ["Without gradient checkpointing every layer keeps all that its backward pass will read."]
    return [
        "Gradient checkpointing keeps each layer's input until its backward pass is done:",
        f"  {strategy.micro_batch} x {plan.planned.seq_len} tokens x {architecture.hidden_size} x {item} bytes"
        f" = {size_text(one)}, for {architecture.num_layers} layers {size_text(one * architecture.num_layers)}.",
        "One layer at a time is computed again; what its backward pass reads lives",
        "that long.",
    ]


def loss_lines(plan: Plan) -> list[str]:
    """Logits."""
    vocab, tokens = plan.architecture.vocab_size, plan.strategy.micro_batch * plan.planned.seq_len
    if plan.strategy.loss == "full":
        held = f"all {tokens} tokens at once"
    elif tokens <= LOSS_CHUNK_TOKENS:
        held = f"all {tokens} tokens (at most {LOSS_CHUNK_TOKENS} at a time)"
    else:
        held, tokens = f"{LOSS_CHUNK_TOKENS} of the {tokens} tokens at a time", LOSS_CHUNK_TOKENS
    liger = plan.strategy.loss == "liger"
    item = DTYPE_BYTES[plan.target.compute_dtype] if liger else 4
    copies = "once, then their gradient in their place." if liger else "for each copy in float32."
    lines = [
        f"A number for each of {number(vocab)} words, for {held}:",
        f"  {tokens} x {number(vocab)} x {item} bytes = {size_text(item * tokens * vocab)} {copies}",
    ]
    if plan.estimate.gpu.components.logits_and_loss < vocab:
        lines.append("At the peak they are gone already.")
    return lines


def workspace_lines(plan: Plan) -> list[str]:
    """Dequantized weights."""
    quantized = [one for one in plan.architecture.linears if exact.is_quantized(one, plan.planned)]
    if not quantized:
        return []
    linear = max(quantized, key=lambda one: one.weight_numel)
    item = DTYPE_BYTES[plan.target.compute_dtype]
    return [
        "A quantized weight is turned into the compute dtype for its product, then",
        f"dropped. The largest is {linear.name}:",
        f"  {linear.out_features} x {linear.in_features} x {item} bytes = {size_text(linear.weight_numel * item)}.",
    ]


def communication_lines(plan: Plan) -> list[str]:
    """Buckets and gathered weights."""
    if not plan.estimate.gpu.components.communication_buffers:
        return []
    gathered = (
        "; stage 3 also holds the weights gathered for the layers at work" if plan.strategy.zero_stage == 3 else ""
    )
    return [f"The buckets in which gradients travel between {plan.strategy.world_size} workers{gathered}."]


def framework_lines(plan: Plan) -> list[str]:
    """Rounding and workspaces."""
    if plan.target.device.kind == "cpu":
        return []
    return [
        "Every tensor's size is rounded up to 512 bytes; a cached block that is at most "
        "1 MiB too big is handed out, and counted, whole; and cuBLAS keeps a workspace."
    ]


def peak_lines(plan: Plan) -> Iterator[str]:
    """The phases and the moment of the peak."""
    gpu = plan.estimate.gpu
    for name, size in gpu.phases._asdict().items():
        mark = "   <- the peak" if name == gpu.peak_phase else ""
        yield f"{name.replace('_', ' '):<12}{size_text(size):>14}{mark}"
    yield f"Its moment: {gpu.peak_moment}."
    yield "The components above are those of that moment."


def device_lines(plan: Plan) -> Iterator[str]:
    """From allocated to usable."""
    gpu, target = plan.estimate.gpu, plan.target
    if target.device.kind == "cpu":
        free = size_text(target.usable_bytes)
        yield f"Tensors take {size_text(gpu.allocated_bytes)} of the {free} that are free for each process."
        return
    verdict = plan.verdict
    sure = verdict.confidence
    rows = (
        (gpu.allocated_bytes, "allocated: the sum of the components"),
        (gpu.reserved_bytes - gpu.allocated_bytes, "more in the caching allocator's segments: together, reserved"),
        (gpu.process_bytes - gpu.reserved_bytes, "CUDA context: together, the process in nvidia-smi"),
        (gpu.process_bytes, f"needed, of {size_text(target.usable_bytes)} that the {target.name} gives"),
        *([(sure.expected_bytes, f"of that by {sure.basis}")] if sure.expected_bytes != gpu.process_bytes else []),
        (abs(verdict.headroom_bytes), "to spare" if verdict.headroom_bytes >= 0 else "too much"),
    )
    for size, text in rows:
        yield f"{size_text(size):>12}  {text}"
    low, high = gpu.reserved_interval
    if low != high:
        yield f"By how memory fragments, {size_text(low)} to {size_text(high)} may be reserved."


def divided_on_host(plan: Plan) -> bool:
    """Whether the base is whole on the host before a GPU has its part."""
    return plan.strategy.zero_stage == 3 and plan.target.device.kind == "cuda"


def host_lines(plan: Plan) -> Iterator[str]:
    """The host's memory."""
    host, ranks = plan.estimate.host, plan.target.device.ranks_per_host
    whose = "its rank" if ranks == 1 else f"its {ranks} ranks"
    how = ": under ZeRO 3 each has the whole base there first" if divided_on_host(plan) else ""
    yield f"While loading, {size_text(host.load_peak_bytes)} for {whose}{how}."
    why = ""
    if not host.steady_bytes:
        why = ": nothing is offloaded"
        if plan.strategy.offload != "none":
            why = ": what is offloaded counts as the CPU's"
    each = ", for each rank" if offloads(plan) else ""
    yield f"While training, {size_text(host.steady_bytes)}{why}{each}{':' if each else '.'}"
    yield from lines_of(host_rows(plan))
    if plan.estimate.gpu.paged_bytes:
        yield "What is paged moves there only as far as a GPU has no room for it; that much is counted."
    if plan.host_usable_bytes is None:
        yield "Nobody said how much there is, so it decides nothing (--host-ram GIB)."
    else:
        answer = "suffices" if plan.host_fits else "does not suffice"
        yield f"It has {size_text(plan.host_usable_bytes)}: that {answer}."


def saving_lines(plan: Plan) -> Iterator[str]:
    """What the process would need with one choice made differently."""
    now = estimate(plan.architecture, plan.planned, plan.strategy, plan.target.device).gpu.process_bytes
    for title, recipe, strategy in other_choices(plan):
        other = estimate(
            plan.architecture,
            dataclasses.replace(plan.planned, **recipe),
            dataclasses.replace(plan.strategy, **strategy),
            plan.target.device,
        ).gpu.process_bytes
        yield f"{title:<46}{size_text(other):>12}  ({'+' if other >= now else '-'}{size_text(abs(other - now))})"
    yield f"{'as planned':<46}{size_text(now):>12}"
    if plan.estimate.estimator != "formula":
        yield "All by the formula, as are the largest micro-batch and the longest sequence."


def other_choices(plan: Plan) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """The plan's memory-saving choices undone one by one: a title, and what changes in recipe and strategy."""
    recipe, strategy = plan.planned, plan.strategy
    if recipe.quantization != "none":
        yield "an unquantized base (--method lora)", {"method": "lora", "quantization": "none"}, {}
    if recipe.quantization in ("nf4", "fp4") and recipe.double_quantization:
        yield "float32 constants (--no-double-quant)", {"double_quantization": False}, {}
    if strategy.gradient_checkpointing:
        yield "no checkpointing (--no-gradient-checkpointing)", {}, {"gradient_checkpointing": False}
    if strategy.loss != "full":
        yield "transformers' loss (--loss full)", {}, {"loss": "full"}
    if recipe.upcast == "none":
        yield "peft's casts to float32 (--upcast peft)", {"upcast": "peft"}, {}
    if strategy.paged_optimizer:
        yield "optimizer state not paged (--optimizer adamw)", {}, {"paged_optimizer": False}
