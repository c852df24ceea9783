"""What goes together: strategies that neither DeepSpeed, the device nor the model's own code can follow are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from clusters.errors import Problem, RequestError, request_error
from clusters.gpu import GIB
from orchestrator.plans import Target
from qlora_core.architecture import ModelArchitecture
from qlora_core.recipe import DTYPE_BYTES, Recipe
from qlora_core.strategy import Offload, Strategy, ZeroStage


def can_be_divided(recipe: Recipe) -> bool:
    """Whether ZeRO-3 can divide the base.

    bitsandbytes' Linear8bitLt computes with state.CB, which is all of the weight, and puts it into the parameter at
    each evaluation (0.50.2, nn/modules.py). peft's DoRA reads the base layer's weight outside of its forward pass,
    around which alone DeepSpeed has it whole (0.21.2, tuners/lora/dora.py).
    """
    return recipe.quantization != "int8" and not recipe.use_dora


def stage_for(offload: Offload) -> ZeroStage:
    """The lowest ZeRO stage that a search takes for an offload."""
    lowest: dict[Offload, ZeroStage] = {"none": 0, "optimizer": 2, "all": 3}
    return lowest[offload]


def check_strategy(recipe: Recipe, strategy: Strategy, where: str, targets: Sequence[Target]) -> None:
    """Raise a RequestError for what neither DeepSpeed nor any of `targets` can do.

    `where` is how a field of the strategy is written where the person wrote it, with {} for its name.
    """
    problems = []
    if strategy.zero_stage == 3 and recipe.use_dora:
        rule = "DoRA reads weights of the base outside of their layers, where ZeRO 3 does not have them whole"
        problems.append(Problem(where.format("zero_stage"), "3", rule, "Take a lower stage, or leave DoRA out"))
    elif strategy.zero_stage == 3 and not can_be_divided(recipe):
        rule = "bitsandbytes' int8 layers keep their whole weight beside the parameter that ZeRO 3 divides"
        problems.append(Problem(where.format("zero_stage"), "3", rule, "Quantize to nf4 or fp4, or take a lower stage"))
    if strategy.offload != "none" and strategy.zero_stage == 0:
        rule, remedy = (
            "only DeepSpeed offloads, and ZeRO stage 0 is without it",
            f"Choose ZeRO stage {'3' if strategy.offload == 'all' else '1 to 3'}, or no offload",
        )
        problems.append(Problem(where.format("offload"), strategy.offload, rule, remedy))
    if strategy.offload == "all" and strategy.zero_stage in (1, 2):
        rule, remedy = "only ZeRO stage 3 offloads the base model", "Choose ZeRO stage 3, or offload the optimizer"
        problems.append(Problem(where.format("offload"), "all", rule, remedy))
    without = [target for target in targets if not target.device.flash_attention]
    if strategy.attention == "flash_attention_2" and without and len(without) == len(targets):
        rule = "it needs a CUDA GPU, Ampere or newer"
        problems.append(Problem(where.format("attention"), "flash_attention_2", rule, "Use sdpa"))
    if problems:
        raise RequestError(problems)


def unbuilt(recipe: Recipe) -> Iterator[Problem]:
    """What a plan can describe and training cannot do yet."""
    for field, only, remedy in (
        ("block_size", 64, "Leave it at 64"),
        ("upcast", "none", "Leave it at none, which is leaner"),
    ):
        if (value := getattr(recipe, field)) != only:
            yield Problem(f"recipe.{field}", str(value), "it can be planned, but not trained with yet", remedy)


def check_float16(recipe: Recipe) -> None:
    """Raise a RequestError for what cannot be trained in float16, whose gradients vanish unless losses are scaled.

    torch's GradScaler takes gradients of float32 alone.
    """
    if recipe.method == "full":
        rule, remedy = "its weights would be float16 too, and small updates be lost", "or train adapters"
        raise request_error("recipe.method", "full", rule, f"Set recipe.compute_dtype to float32, {remedy}")
    if recipe.lora_dtype != "float32":
        rule = "in float16 losses are scaled, which wants the gradients of adapters in float32"
        raise request_error("recipe.lora_dtype", recipe.lora_dtype, rule, "Leave it at float32")


def check_attention(architecture: ModelArchitecture, attention: str, where: str) -> None:
    """Raise a RequestError for an attention that the model's own code has not."""
    if attention == "sdpa" and not architecture.has_sdpa:
        rule = f"transformers has no such attention for {architecture.model_type}"
        raise request_error(where.format("attention"), "sdpa", rule, "Use eager")


def why_not_liger(architecture: ModelArchitecture, recipe: Recipe, stage: ZeroStage) -> str | None:
    """Why Liger's loss cannot be taken for a model, on whatever GPU; None where it can."""
    if stage == 3:
        return "it reads the output head's weight outside of the head, where ZeRO 3 does not have it whole"
    if recipe.method == "full":
        return "it adds up the gradient of an output head that is trained in the head's own 16 bits"
    if recipe.upcast == "peft":
        return "what it makes of a head that peft has made float32 is not modelled"
    if not architecture.plain_logits:
        return f"what {architecture.model_type} makes of its logits is tried with torch's operators only"
    return None


def check_loss(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, where: str, targets: Sequence[Target]
) -> None:
    """Raise a RequestError for Liger's loss where the model, the recipe or all of `targets` rule it out."""
    if strategy.loss != "liger":
        return
    rule = why_not_liger(architecture, recipe, strategy.zero_stage)
    if targets and all(target.device.kind == "cpu" for target in targets):
        rule = "its kernels need a CUDA GPU"
    if rule is not None:
        raise request_error(where.format("loss"), "liger", rule, "Take the chunked loss")


def check_packing(architecture: ModelArchitecture, recipe: Recipe, where: str = "recipe.packing") -> None:
    """Raise a RequestError for packing with a model that would let packed examples see each other."""
    if recipe.packing and not architecture.keeps_packed_apart:
        rule = f"transformers' code of {architecture.model_type} lets packed examples see each other"
        raise request_error(where, recipe.packing, rule, "Leave it out; group_by_length saves padding too")


def check_quantized(architecture: ModelArchitecture, recipe: Recipe, where: str = "recipe.quantization") -> None:
    """Raise a RequestError for a checkpoint that bitsandbytes has quantized, but not as the recipe says.

    transformers takes a checkpoint's own quantization_config, whatever it is given (5.23, quantizers/auto.py,
    merge_quantization_configs). What that leaves out is as in its BitsAndBytesConfig.
    """
    own = architecture.whole_config.get("quantization_config")
    if not isinstance(own, Mapping):
        return
    kind = "int8" if own.get("load_in_8bit") else str(own.get("bnb_4bit_quant_type", "fp4"))
    there = _stored(kind, bool(own.get("bnb_4bit_use_double_quant", False)))
    wanted = _stored(recipe.quantization, recipe.double_quantization)
    listed = own.get("llm_int8_skip_modules") or []
    skipped = [str(name) for name in listed if name != "lm_head"] if isinstance(listed, list) else [str(listed)]
    rule = f"the model is already quantized by bitsandbytes, as {there}"
    if skipped:
        raise request_error(where, wanted, f"{rule}, but for {', '.join(skipped)[:80]}", "Choose the 16-bit model")
    if there != wanted:
        raise request_error(where, wanted, rule, "Choose the 16-bit model, or ask for what it has")


def _stored(quantization: str, double: bool) -> str:
    """How a base is quantized, in words."""
    if quantization in ("none", "int8"):
        return quantization
    return f"{quantization} {'with' if double else 'without'} double quantization"


def check_even(recipe: Recipe, strategy: Strategy, open_fields: Collection[str], where: str) -> None:
    """Raise a RequestError for a step that is none of whole micro-batches on the GPUs, as far as these are fixed."""
    sequences = recipe.sequences_per_step
    fixed = 1 if "micro_batch" in open_fields else strategy.micro_batch
    fixed *= 1 if "world_size" in open_fields else strategy.world_size
    if sequences % fixed:
        rule = f"a step of {sequences} sequences does not come out even in {fixed} at a time"
        remedy = f"The nearest is {max(1, round(sequences / fixed)) * fixed * recipe.seq_len}"
        raise request_error(where, recipe.tokens_per_step, rule, remedy)


def warnings(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, targets: Sequence[Target]
) -> Iterator[str]:
    """What can be computed, but hardly run."""
    if recipe.seq_len > architecture.max_position_embeddings:
        yield (
            f"seq-len {recipe.seq_len} is longer than the {architecture.max_position_embeddings} positions that "
            f"{architecture.name} was trained for; its position embedding would have to be stretched"
        )
    if architecture.delta_net is not None and any(target.device.kind == "cuda" for target in targets):
        yield (
            f"the linear attention of {architecture.name} is counted as transformers' own code computes it: "
            "where flash-linear-attention and causal-conv1d are installed, steps need less memory and are faster"
        )
    for pool in (target.pool for target in targets if target.pool is not None):
        if pool.network_bytes_per_s is None and strategy.world_size > pool.gpus_per_node:
            yield f"the network between nodes of {pool.name} is not stated: its speed is that of 10 Gbit/s"
        if pool.spot:
            yield f"the nodes of {pool.name} may be taken away at any time: a run goes on from its last checkpoint"
        stored = DTYPE_BYTES["bfloat16"] * architecture.parameters
        if pool.disk_bytes is not None and stored > pool.disk_bytes:
            yield (
                f"the files of {architecture.name} take {stored / GIB:,.1f} GiB in 16 bits, and the disk of a node of "
                f"{pool.name} has {pool.disk_bytes / GIB:,.1f}: their cache has to lie on storage that all nodes see"
            )
    without = [target.name for target in targets if not target.device.flash_attention]
    if strategy.attention == "flash_attention_2" and without:
        yield f"flash_attention_2 needs an Ampere GPU or newer, so it does not run on {', '.join(without)}"
