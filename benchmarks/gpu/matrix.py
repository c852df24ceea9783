"""The matrix: which models are measured with which recipes, the most valuable first. Data only, no torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import qlora_core
from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

_MODELS = Path(qlora_core.__file__).parent / "models"
_STRATEGY_FIELDS = frozenset(field.name for field in dataclasses.fields(Strategy))


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the matrix.

    Attributes:
        name: unique.
        model: a name of the catalogue, whose config the model is made from.
        recipe, strategy: what is run, one optimizer step at a time.
        output_held: the model's output lives until the step ends, as in a plain loop over transformers.
        small: the model is shrunk until a CPU runs it in a second; its kind and the path through the code stay.
        limited: torch's allocator may hold no more than the formula's interval ends with, so that a plan that says too
            little is a row that fails.
        steps: how many are made; what is measured is the last one, and of more than two the median time.
        loop: whose steps they are: ours, or those of TRL's SFTTrainer or of Unsloth as their documents show them.
    """

    name: str
    model: str
    recipe: Recipe
    strategy: Strategy
    output_held: bool = False
    limited: bool = False
    small: bool = False
    steps: int = 2
    loop: Literal["ours", "trl", "unsloth"] = "ours"

    @property
    def is_modelled(self) -> bool:
        """Whether the estimators know its loop: none knows the kernels and the checkpoints of Unsloth."""
        return self.loop != "unsloth"

    @property
    def is_timed(self) -> bool:
        """Whether it is there for its rate on one GPU, of whatever size."""
        return self.steps > 2 and self.strategy.world_size == 1

    def config_fields(self) -> dict[str, Any]:
        """What its model's ``config.json`` holds."""
        fields: dict[str, Any] = json.loads((_MODELS / f"{self.model}.json").read_bytes())
        return _shrunk(fields) if self.small else fields

    def architecture(self) -> ModelArchitecture:
        """The shapes of its model."""
        return architecture_from_config(self.config_fields(), name=self.model, source=f"the catalogue's {self.model}")

    def as_json(self) -> dict[str, Any]:
        """What the row says about what was asked for, as its file gives it back."""
        said: dict[str, Any] = {
            "name": self.name,
            "model": self.model,
            "loop": self.loop,
            "steps": self.steps,
            "output_held": self.output_held,
            "recipe": dataclasses.asdict(self.recipe),
            "strategy": dataclasses.asdict(self.strategy),
        }
        if self.limited:
            said["limited"] = True
        # a tuple, such as the targets', is a list in the file, which no tuple is equal to
        return cast(dict[str, Any], json.loads(json.dumps(said)))


def case(name: str, model: str, **changes: Any) -> Case:
    """The defaults of `qlora-plan` for `model` with these fields of recipe, strategy or row changed."""
    row = {field: changes.pop(field) for field in ("output_held", "limited", "steps", "loop") if field in changes}
    strategy = Strategy(**{field: value for field, value in changes.items() if field in _STRATEGY_FIELDS})
    recipe = {field: value for field, value in changes.items() if field not in _STRATEGY_FIELDS}
    recipe = {"seq_len": 512, "autocast": False, **recipe}
    tokens = recipe["seq_len"] * strategy.sequences_per_step
    return Case(name, model, Recipe(**recipe, tokens_per_step=tokens), strategy, **row)


UNPAGED: dict[str, Any] = {"paged_optimizer": False}
STOCK: dict[str, Any] = {**UNPAGED, "upcast": "peft", "loss": "full", "output_held": True, "rank": 16}
"""What people run today: peft.prepare_model_for_kbit_training, the loss of transformers, torch's AdamW."""
SIXTEEN_BIT: dict[str, Any] = {"method": "lora", "quantization": "none"}
TIMED: dict[str, Any] = {**UNPAGED, "rank": 16, "micro_batch": 4, "seq_len": 2048, "steps": 8}
"""Long enough for a rate that can be compared."""
UNCHECKED: dict[str, Any] = {**TIMED, "micro_batch": 2, "gradient_checkpointing": False}
TRL: dict[str, Any] = {**TIMED, "loop": "trl", "lora_dtype": "bfloat16", "autocast": True}
"""TRL makes the adapters bfloat16, runs under autocast, checkpoints, and has a chunked loss of its own."""
UNSLOTH: dict[str, Any] = {**TIMED, "loop": "unsloth", "autocast": True}
"""Unsloth's own kernels, loss and checkpoints, which go to the host."""
LARGE: dict[str, Any] = {"micro_batch": 1, "steps": 4}
"""What is timed of models whose step takes seconds."""
TOGETHER: dict[str, Any] = {**TIMED, "world_size": 2, "micro_batch": 2}

MATRIX: tuple[Case, ...] = (
    # a first look at every part, then the model that the whole thing is about
    case("defaults-1b", "llama-3.2-1b"),
    case("defaults-7b", "llama-7b"),
    case("defaults-65b", "llama-65b"),
    # families that allocate differently
    case("gemma-eager", "gemma-2-2b", seq_len=1024, attention="eager", loss="full"),
    case("qwen-micro-batch-4", "qwen2.5-1.5b", micro_batch=4, seq_len=1024, **UNPAGED),
    case("mistral-2048", "mistral-7b-v0.1", seq_len=2048),
    case("phi-fused-projections", "phi-3-mini", seq_len=1024),
    case("pythia-parallel", "pythia-1.4b", micro_batch=2, seq_len=1024, **UNPAGED),
    case("qwen3-head-norms", "qwen3-1.7b", micro_batch=2, seq_len=1024),
    # other people's stacks
    case("stock-1b", "llama-3.2-1b", seq_len=1024, **STOCK),
    case("stock-7b", "llama-7b", **STOCK),
    case("stock-unchecked", "tinyllama-1.1b", micro_batch=2, gradient_checkpointing=False, **STOCK),
    # tokens per second, ours and TRL's
    case("timed-8b", "llama-3.1-8b", **TIMED),
    case("timed-8b-trl", "llama-3.1-8b", **TRL),
    case("timed-8b-unsloth", "llama-3.1-8b", **UNSLOTH),
    case("timed-8b-bfloat16-adapters", "llama-3.1-8b", **TIMED, lora_dtype="bfloat16"),
    case("timed-8b-unchecked", "llama-3.1-8b", **UNCHECKED),
    case("timed-8b-unchecked-bfloat16-adapters", "llama-3.1-8b", **UNCHECKED, lora_dtype="bfloat16"),
    case("timed-8b-autocast", "llama-3.1-8b", **TIMED, autocast=True),
    case("timed-8b-unchecked-autocast", "llama-3.1-8b", **UNCHECKED, autocast=True),
    case("timed-8b-unchecked-autocast-liger", "llama-3.1-8b", **UNCHECKED, autocast=True, loss="liger"),
    case("timed-33b", "llama-33b", **{**TIMED, **LARGE}),
    case("timed-33b-trl", "llama-33b", **{**TRL, **LARGE}),
    case("timed-33b-unsloth", "llama-33b", **{**UNSLOTH, **LARGE}),
    case("timed-65b", "llama-65b", **{**TIMED, **LARGE}),
    case("timed-65b-trl", "llama-65b", **{**TRL, **LARGE}),
    case("timed-65b-unsloth", "llama-65b", **{**UNSLOTH, **LARGE}),
    # paged state where torch may not take more than what was planned
    case("limited-paged", "llama-3.2-3b", seq_len=1024, limited=True),
    case("limited-adamw-8bit-paged", "llama-3.2-3b", optimizer="adamw_8bit", limited=True),
    # several GPUs, over NCCL
    case("two-gpus", "llama-3.1-8b", **TOGETHER),
    case("two-gpus-zero-2", "llama-3.1-8b", **TOGETHER, zero_stage=2),
    case("two-gpus-zero-3", "llama-3.1-8b", **TOGETHER, zero_stage=3),
    case("two-gpus-zero-3-70b", "llama-3.1-70b", **{**TOGETHER, **LARGE}, zero_stage=3),
    # one thing changed at a time
    case("adamw-unpaged", "llama-3.2-1b", seq_len=1024, **UNPAGED),
    case("adamw-8bit", "qwen2.5-7b", micro_batch=2, seq_len=1024, optimizer="adamw_8bit", **UNPAGED),
    case("adamw-8bit-paged", "llama-3.2-3b", optimizer="adamw_8bit"),
    case("unchecked", "llama-3.2-1b", micro_batch=2, gradient_checkpointing=False, **UNPAGED),
    case("full-loss", "llama-3.2-1b", micro_batch=4, seq_len=1024, loss="full", **UNPAGED),
    case("liger-loss", "llama-3.2-1b", micro_batch=4, seq_len=1024, loss="liger", **UNPAGED),
    case("eager", "llama-3.2-1b", micro_batch=2, seq_len=1024, attention="eager", **UNPAGED),
    case("flash-attention-2", "llama-3.2-1b", micro_batch=2, seq_len=1024, attention="flash_attention_2", **UNPAGED),
    case("sixteen-bit", "llama-3.2-1b", seq_len=1024, **SIXTEEN_BIT, **UNPAGED),
    case("no-double-quantization", "llama-3.2-1b", double_quantization=False),
    case("fp4", "llama-3.2-1b", quantization="fp4"),
    case("int8", "llama-3.2-1b", quantization="int8", micro_batch=2, **UNPAGED),
    case("rank-8-on-two", "llama-3.2-3b", rank=8, targets=("q_proj", "v_proj"), micro_batch=2, **UNPAGED),
    case("rank-256", "llama-3.2-1b", rank=256),
    case("dropout", "llama-3.2-1b", dropout=0.05, seq_len=1024),
    case("bfloat16-adapters", "llama-3.2-3b", lora_dtype="bfloat16", seq_len=1024, **UNPAGED),
    case("accumulation", "qwen2.5-0.5b", micro_batch=2, gradient_accumulation=2, **UNPAGED),
    # sizes between and beyond
    case("defaults-33b", "llama-33b"),
    case("70b-2048", "llama-3.1-70b", seq_len=2048),
    case("defaults-13b", "llama-13b"),
    case("tiny", "smollm2-135m"),
    case("tiny-micro-batch-16", "smollm2-135m", micro_batch=16, **UNPAGED),
    case("wide-vocabulary", "qwen2.5-0.5b", micro_batch=8, seq_len=1024, loss="full", **UNPAGED),
    case("long-8192", "llama-3.2-3b", seq_len=8192),
    case("mistral-micro-batch-8", "mistral-7b-v0.1", micro_batch=8, seq_len=1024),
    case("unchecked-eager", "qwen2.5-1.5b", gradient_checkpointing=False, attention="eager", **UNPAGED),
    case("sixteen-bit-eager", "smollm2-360m", micro_batch=4, attention="eager", **SIXTEEN_BIT, **UNPAGED),
    case("stock-qwen", "qwen2.5-7b", seq_len=1024, **STOCK),
    case("65b-bfloat16-adapters", "llama-65b", lora_dtype="bfloat16", **UNPAGED),
)

DRY = ("defaults-1b", "gemma-eager", "stock-1b", "timed-8b-unsloth", "sixteen-bit", "two-gpus-zero-3")
"""The rows that a CPU runs, small: sdpa and eager, both losses, 4 and 16 bits, other stacks, and two processes."""


def chosen(*, dry: bool, only: tuple[str, ...] = ()) -> Iterator[Case]:
    """The rows to run, in the matrix's order; `only` keeps those whose name or model begins with one of its words."""
    for one in MATRIX:
        if dry and one.name not in DRY:
            continue
        if only and not one.name.startswith(only) and not one.model.startswith(only):
            continue
        yield small(one) if dry else one


def small(one: Case) -> Case:
    """`one` with its model shrunk and at most 2 sequences of 64 tokens.

    A CPU has no managed memory to page to, and no flash_attention_2.
    """
    attention = "sdpa" if one.strategy.attention == "flash_attention_2" else one.strategy.attention
    strategy = dataclasses.replace(one.strategy, paged_optimizer=False, attention=attention)
    recipe = dataclasses.replace(one.recipe, rank=min(one.recipe.rank, 8))
    shrunk = dataclasses.replace(one, recipe=recipe, strategy=strategy, small=True, steps=2)
    return sized(shrunk, min(strategy.micro_batch, 2), 64)


def sized(one: Case, micro_batch: int, seq_len: int) -> Case:
    """`one` with so many sequences of so many tokens."""
    strategy = dataclasses.replace(one.strategy, micro_batch=micro_batch)
    tokens = seq_len * strategy.sequences_per_step
    recipe = dataclasses.replace(one.recipe, seq_len=seq_len, tokens_per_step=tokens)
    return dataclasses.replace(one, recipe=recipe, strategy=strategy)


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The config of a model of the same kind with 2 layers, 256 wide."""
    grouped = fields.get("num_key_value_heads", fields["num_attention_heads"]) < fields["num_attention_heads"]
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": 2048,
        "pad_token_id": None,
    }
    optional = {"num_key_value_heads": 4 if grouped else 8, "head_dim": 32, "query_pre_attn_scalar": 32}
    sizes.update({field: value for field, value in optional.items() if field in fields})
    return {**fields, **sizes}
