"""The closed-form estimate: bytes by component and phase, in microseconds, for any recipe, strategy and device.

What stays is counted exactly (`bytes.py`, `residents.py`, `sharding.py`); what comes and goes is a polynomial whose
coefficients one run of the tape found (`step.py`). The peak is the highest of its moments for this micro-batch and
sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

from qlora_core.architecture import Linear, ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.attention import AttentionKernel, Heads, is_masked, kernel_of
from qlora_core.memory.decoder import Layer, Projection
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Components, Estimate, GpuEstimate, HostEstimate, Phase, Phases
from qlora_core.memory.reserve import grown
from qlora_core.memory.residents import Residents, fetched_ahead, residents, shard_of
from qlora_core.memory.sharding import bucket_elements
from qlora_core.memory.step import FIRST, LAST, Candidate, Handling, Logits, Step, Timeline, highest, timeline
from qlora_core.memory.tape import Where, value
from qlora_core.recipe import Recipe
from qlora_core.strategy import LOSS_CHUNK_TOKENS, Strategy

ENDLESS = 2**40
"""A length beyond every sliding window."""
HEAD_NORM_FAMILIES = frozenset({"olmo3", "qwen3", "qwen3_moe", "gemma3_text", "olmo2"})
"""Model types that normalise queries and keys too."""


def estimate(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Estimate:
    """What one rank and one host need for `recipe`, run as `strategy` says on `device`.

    Paged optimizer state is in `paged_bytes` only: the driver moves it to the host when the GPU is full, so neither the
    allocated nor the process bytes count it. "full" loss is the stock one: its logits stay until the step ends.
    """
    # of the micro-batch only whether it is 1 matters here, so that a search over it prepares twice
    alike = strategy if strategy.micro_batch <= 2 else replace(strategy, micro_batch=2)
    stays, times = _prepared(architecture, _of_any_length(recipe, is_masked(architecture, recipe)), alike, device)
    variables = _variables(recipe, strategy)
    totals: dict[Phase, int] = {}
    moments: dict[Phase, Candidate] = {}
    for phase, candidates in _by_phase(times):
        moments[phase] = highest(candidates, variables)
        totals[phase] = value(moments[phase].total, variables) + sum(
            map(_sum, (stays.loaded, stays.between, stays.added[phase]))
        )
    peak_phase = max(totals, key=lambda phase: totals[phase])
    peak = moments[peak_phase]
    parts = dict(stays.loaded)
    varying_parts = {room: value(size, variables) for room, size in peak.rooms.items()}
    for more in (stays.between, stays.added[peak_phase], varying_parts):
        for component, size in more.items():
            parts[component] = parts.get(component, 0) + size
    allocated = totals[peak_phase]
    segments = stays.segments + value(times.middle, variables) + grown(times.stretches, variables, stays.free_segments)
    loaded = stays.before_sharding or _sum(stays.loaded)
    reserved = allocated if device.kind == "cpu" else max(allocated, segments, loaded)
    return Estimate(
        "formula",
        GpuEstimate(
            components=Components(**parts),
            phases=Phases(loaded, totals["forward"], totals["backward"], totals["optimizer"]),
            peak_phase=peak_phase,
            peak_moment=in_words(peak_phase, peak.where, architecture.num_layers),
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            process_bytes=reserved + device.context_bytes,
            paged_bytes=stays.paged,
        ),
        HostEstimate(stays.host_load, stays.host_steady),
    )


@lru_cache(maxsize=256)
def _of_any_length(recipe: Recipe, masked: bool) -> Recipe:
    """What all recipes that differ only in the sequence length have in common, so that they are prepared once.

    Lengths from a sliding window on are prepared apart from shorter ones.
    """
    length = ENDLESS if masked else 1
    return replace(recipe, seq_len=length, tokens_per_step=length)


@lru_cache(maxsize=256)
def _prepared(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> tuple[Residents, Timeline]:
    """What depends neither on the micro-batch nor on the sequence length."""
    return (
        residents(architecture, recipe, strategy, device),
        timeline(step_of(architecture, recipe, strategy, device)),
    )


def step_of(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Step:
    """What the timeline of a step depends on, out of all that is given."""
    layer = _layer_of(architecture, recipe, strategy, device)
    quantized = recipe.quantization != "none"
    shard = shard_of(architecture, recipe, strategy, device)
    stage, several = strategy.zero_stage, strategy.gradient_accumulation > 1
    in_layers = shard.trainable
    if recipe.method == "full":
        outside = architecture.embedding_parameters + architecture.head_parameters + architecture.other_parameters
        in_layers -= outside * shard.trainable // shard.numel
    layer_gradients = in_layers // architecture.num_layers
    flushes = stage == 2 and bucket_elements(shard.numel) < shard.numel
    return Step(
        layer=layer,
        layers=architecture.num_layers,
        vocab=architecture.vocab_size,
        tied=architecture.tied_embeddings,
        checkpointing=strategy.gradient_checkpointing,
        # peft/peft_model.py and utils/other.py: for unquantized models, and quantized ones that peft prepares
        input_needs_gradient=strategy.gradient_checkpointing
        and (not quantized or recipe.upcast == "peft" or strategy.zero_stage == 3),
        reentrant=strategy.gradient_checkpointing and stage == 3,
        logits=_logits(architecture),
        loss=strategy.loss,
        output_held=device.output_held,
        gradients=_handling(strategy),
        layer_gradients=layer_gradients,
        bucket=shard.bucket_bytes if stage == 2 or (stage == 1 and not several) else 0,
        layers_to_flush=-(-shard.bucket_bytes // max(layer_gradients, 1)) if flushes else 0,
        part=shard.kept_gradient_bytes,
        reduced_after=max(shard.kept_gradient_bytes - shard.bucket_bytes, 0) if stage == 1 else 0,
        sharded=stage > 0,
        fetched=fetched_ahead(architecture, recipe, device) if stage == 3 else 0,
    )


def _handling(strategy: Strategy) -> Handling:
    """What becomes of a gradient in the backward pass of the last micro-batch."""
    several = strategy.gradient_accumulation > 1
    if strategy.zero_stage >= 2:
        return "taken"
    if strategy.zero_stage == 0 and strategy.world_size > 1:
        return "moved" if several else "accumulated"
    return "accumulated" if several else "kept"


def _layer_of(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Layer:
    attention = [linear for linear in architecture.linears if linear.part == "attention"]
    feed_forward = _feed_forward(architecture)
    project = partial(_projection, recipe)
    return Layer(
        hidden=architecture.hidden_size,
        shape=Heads(
            architecture.num_heads,
            architecture.num_kv_heads,
            architecture.head_dim,
            strategy.micro_batch == 1 and strategy.attention == "eager",
            device.kind == "cuda",
            architecture.config.get("attn_logit_softcapping") is not None,
        ),
        qkv=tuple(map(project, attention[:-1])),
        output=project(attention[-1]),
        feed_forward=tuple(map(project, feed_forward)),
        gated=architecture.gated_mlp,
        parallel=architecture.parallel_attention,
        rows_per_token=max(architecture.experts_per_token, 1),
        scaled_norm=architecture.norm == "rms",
        head_norms=architecture.model_type in HEAD_NORM_FAMILIES,
        compute=device.compute_dtype,
        stream=exact.stored_dtype(recipe, device.compute_dtype),
        lora=recipe.lora_dtype,
        rank=recipe.rank,
        dropout=recipe.dropout > 0,
        autocast=recipe.autocast,
        trained=recipe.method == "full",
        kernel=_kernel(architecture, recipe, strategy, device),
    )


def _kernel(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> AttentionKernel:
    """The kernel of the layers that need the most: those with a mask, where there are any."""
    kernel = kernel_of(architecture, recipe, strategy, device)
    masked = kernel in ("flash", "efficient", "math") and is_masked(architecture, recipe)
    return "masked" if masked else kernel


def _logits(architecture: ModelArchitecture) -> Logits:
    """What the model makes of the output head's product."""
    if architecture.plain_logits:
        return "plain"
    return "capped" if architecture.config.get("final_logit_softcapping") is not None else "scaled"


def _feed_forward(architecture: ModelArchitecture) -> list[Linear]:
    """The linear layers a token's feed-forward passes; 3-D expert parameters as the unquantized linears they act as."""
    linears = [linear for linear in architecture.linears if linear.part in ("mlp", "expert")]
    if linears:
        return linears
    hidden, inner = architecture.hidden_size, architecture.expert_intermediate_size or architecture.intermediate_size
    return [
        Linear("gate_up_proj", hidden, inner * (2 if architecture.gated_mlp else 1), part="expert", quantized=False),
        Linear("down_proj", inner, hidden, part="expert", quantized=False),
    ]


def _projection(recipe: Recipe, linear: Linear) -> Projection:
    quantized = exact.is_quantized(linear, recipe)
    storage: Literal["4bit", "8bit", "plain"] = "plain"
    if quantized:
        storage = "8bit" if recipe.quantization == "int8" else "4bit"
    return Projection(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        storage=storage,
        blocks=exact.absmax_count(linear.weight_numel, recipe.block_size),
        nested=recipe.double_quantization,
        # peft does not adapt 3-D expert parameters unless target_parameters names them
        adapter=exact.is_target(linear, recipe) and (linear.part != "expert" or linear.quantized),
    )


def in_words(phase: Phase, where: Where, layers: int) -> str:
    """A moment in words, such as "backward of layer 80, while its down_proj is recomputed"."""
    if phase == "optimizer":
        return "optimizer step"
    part, *details = where[1:]
    name = {FIRST: "layer 1", LAST: f"layer {layers}"}.get(part, f"the {part}")
    again = "recomputed" in details
    inner = [detail for detail in details if detail != "recomputed"]
    if not inner:
        return f"{phase} of {name}" + (", while it is recomputed" if again else "")
    verb = "recomputed" if again else {"forward": "computed", "backward": "differentiated"}[phase]
    return f"{phase} of {name}, while its {inner[-1]} is {verb}"


def _variables(recipe: Recipe, strategy: Strategy) -> tuple[int, int, int, int, int]:
    """The values of a polynomial's variables: 1, S, B*S, B*S*S, C."""
    batch, length = strategy.micro_batch, recipe.seq_len
    tokens = batch * length
    return 1, length, tokens, tokens * length, min(tokens, LOSS_CHUNK_TOKENS)


def _by_phase(times: Timeline) -> Iterator[tuple[Phase, tuple[Candidate, ...]]]:
    yield "forward", times.forward
    yield "backward", times.backward
    yield "optimizer", (times.after_backward,)


def _sum(parts: dict[str, int]) -> int:
    return sum(parts.values())
