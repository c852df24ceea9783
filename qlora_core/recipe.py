"""The recipe: how ONE training step is computed, whatever it runs on."""

# The annotations are not postponed: `_checks` reads them, and evaluating texts would take longer than all checks.

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from clusters.errors import Conflicting
from qlora_core.checks import Bounds, Check, check_of
from qlora_core.targets import Targets, fault

Method = Literal["qlora", "lora", "full"]
Quantization = Literal["nf4", "fp4", "int8", "none"]
Dtype = Literal["float32", "bfloat16", "float16"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw_8bit"]
Schedule = Literal["constant", "linear", "cosine"]
Upcast = Literal["none", "peft"]
LARGEST = 2**40
"""No count of a recipe is larger."""
Count = Annotated[int, Bounds(ge=1, le=LARGEST)]

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class Mistake(NamedTuple):
    """One thing that is wrong with a recipe.

    Attributes:
        fields: the field that is wrong, or those that do not go together; it is told of the first.
        given: the value of the first.
        rule: the rule it broke, as a sentence about "it".
        remedy: what to do about it; nothing where the rule says that.
    """

    fields: tuple[str, ...]
    given: object
    rule: str
    remedy: str = ""


class RecipeError(Conflicting):
    """A recipe that cannot be, with all its mistakes."""

    mistakes: tuple[Mistake, ...]

    def __init__(self, mistakes: tuple[Mistake, ...]) -> None:
        self.mistakes = mistakes
        super().__init__("; ".join(f"{each.fields[0]}: {each.rule} (got {each.given!r})" for each in mistakes))

    def __reduce__(self) -> tuple[type["RecipeError"], tuple[tuple[Mistake, ...]]]:
        return type(self), (self.mistakes,)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the mathematics of a fine-tune fixes. Two runs with the same recipe, data and seed learn the same thing.

    The defaults are those of ``qlora-plan`` (DESIGN.md), but for `autocast`, and, where the planner has no say, of
    Dettmers et al. 2023, "QLoRA", appendix B.2 (learning rate 2e-4, constant schedule, Adam beta2 0.999, gradient norm
    clipped to 0.3).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}  # in a specification

    method: Method = "qlora"
    """qlora: adapters on a quantized base; lora: adapters on a 16-bit base; full: every weight is trained."""
    quantization: Quantization = "nf4"
    """How the linear layers of the base are stored. Only "none" goes with lora and full."""
    double_quantization: bool = True
    """Quantize the absmax constants of nf4 and fp4 again, in blocks of 256 (QLoRA, section 3)."""
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share one absmax constant."""
    rank: Count = 64
    """LoRA rank r."""
    alpha: Annotated[float, Bounds(gt=0)] = 16.0
    """LoRA alpha: the adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """LoRA dropout probability."""
    use_rslora: bool = False
    """Scale the adapter's output by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023), so that a high rank learns too."""
    use_dora: bool = False
    """Train a magnitude for each output beside the adapter's direction (DoRA, Liu et al. 2024); it costs memory and
    time in every step."""
    loraplus_lr_ratio: Annotated[float, Bounds(ge=1)] = 1.0
    """The adapters' second matrices, B, learn at so many times the learning rate (LoRA+, Hayou et al. 2024); 1 is plain
    LoRA, the paper has 16."""
    neftune_alpha: Annotated[float, Bounds(ge=0)] = 0.0
    """Uniform noise on the embeddings while training, up to alpha / sqrt(length x hidden size) (NEFTune, Jain et al.
    2023, which has 5 to 15); 0 is none."""
    targets: Targets = "all-linear"
    """Which linear layers get an adapter: all but the output head, or those whose module names end in a name of the
    list or match a regular expression of it."""
    lora_dtype: Dtype = "float32"
    """Dtype of the adapters, of their gradients and (unless 8-bit) of their optimizer state."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations and of dequantized weights; auto chooses by the device and says why."""
    upcast: Upcast = "none"
    """peft: what peft.prepare_model_for_kbit_training does, every unquantized 16-bit weight becomes float32."""
    autocast: Literal["auto"] | bool = "auto"
    """Run the forward pass under torch.autocast: float32 adapters are computed in the compute dtype, which is faster
    and keeps less; in float32 it does nothing. auto: true where there are adapters, but for DoRA."""
    optimizer: Optimizer = "adamw"
    """adamw keeps two float32 moments, adamw_8bit two block-wise 8-bit ones (bitsandbytes). Paging is a strategy."""
    seq_len: Count = 512
    """The longest sequence in tokens; longer samples are truncated, and counted."""
    tokens_per_step: Count = 8192
    """Tokens of one optimizer step over all GPUs: sequences per step x seq_len, padding counted."""
    packing: bool = False
    """Lay several samples into one sequence of up to seq_len tokens, none of which sees another."""
    group_by_length: bool = False
    """Put samples of alike length into one step, so that less of it is padding; packing leaves nothing to gain."""
    learning_rate: Annotated[float, Bounds(gt=0, lt=1)] = 2e-4
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up."""
    warmup_fraction: Annotated[float, Bounds(ge=0, le=1)] = 0.03
    """Part of all steps over which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, Bounds(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    beta1: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Bounds(ge=0, lt=1)] = 0.999
    """AdamW's decay of the second moment."""
    max_grad_norm: Annotated[float, Bounds(gt=0)] = 0.3
    """Gradients are clipped to this global norm."""
    epochs: Annotated[float, Bounds(gt=0)] = 1.0
    """How often the data is seen, unless `steps` is given."""
    steps: Count | None = None
    """Optimizer steps of the whole run; overrides `epochs`."""

    def __post_init__(self) -> None:
        """Check all fields.

        Raises:
            RecipeError: values that are none of their field's, and values that do not go together.
        """
        mistakes = []
        for name, check, default in _checks():
            value = getattr(self, name)
            if value is default:
                continue
            if rule := check(value):
                mistakes.append(Mistake((name,), value, rule))
            elif type(value) is int and name in _float_fields():
                object.__setattr__(self, name, float(value))
        mistakes += self._conflicts_beside(mistakes) if mistakes else self._conflicts()
        if mistakes:
            raise RecipeError(tuple(mistakes))

    def _conflicts(self) -> Iterator[Mistake]:
        """What does not go together, all of it."""
        if self.method == "qlora" and self.quantization == "none":
            rule, remedy = "method qlora needs a quantized base", "Choose nf4, fp4 or int8, or method lora"
            yield Mistake(("quantization", "method"), self.quantization, rule, remedy)
        if self.method != "qlora" and self.quantization != "none":
            rule, remedy = f"method {self.method} keeps the base unquantized", "Set it to none, or choose method qlora"
            yield Mistake(("quantization", "method"), self.quantization, rule, remedy)
        yield from self._conflicts_of_adapters()
        if self.tokens_per_step % self.seq_len:
            nearest = max(1, (2 * self.tokens_per_step + self.seq_len) // (2 * self.seq_len)) * self.seq_len
            rule = f"a step holds whole sequences, so it must be a multiple of seq_len {self.seq_len}"
            yield Mistake(("tokens_per_step", "seq_len"), self.tokens_per_step, rule, f"The nearest is {nearest}")
        if self.packing and self.group_by_length:
            rule, remedy = "packed sequences are all about seq_len long", "Leave one of the two out"
            yield Mistake(("group_by_length", "packing"), self.group_by_length, rule, remedy)
        if not self.targets:
            rule, remedy = "it must name at least one linear layer", "Name some, or say all-linear"
            yield Mistake(("targets",), self.targets, rule, remedy)
        elif self.targets != "all-linear" and (found := fault(self.targets)):
            target, reason = found
            rule, remedy = f"it is neither a name nor a regular expression: {reason}", "Correct it"
            yield Mistake(("targets",), target, rule, remedy)

    def _conflicts_of_adapters(self) -> Iterator[Mistake]:
        """What of the adapters does not go together with the rest."""
        if self.method == "full":
            for name in ("use_rslora", "use_dora", "loraplus_lr_ratio"):
                value = getattr(self, name)
                if value not in (False, 1):
                    rule, remedy = "it is about adapters, and method full has none", "Leave it out, or choose lora"
                    yield Mistake((name, "method"), value, rule, remedy)
        if self.use_dora and self.quantization == "int8":
            rule = "what DoRA makes of int8 layers, whose weights bitsandbytes unpacks in another way, is not modelled"
            yield Mistake(("use_dora", "quantization"), True, rule, "Quantize to nf4 or fp4, or leave it out")
        if self.use_dora and self.autocast is True:
            rule = "what autocast makes of DoRA's products is not modelled"
            yield Mistake(("use_dora", "autocast"), True, rule, "Leave autocast out: the compute dtype does without")

    def _conflicts_beside(self, mistakes: list[Mistake]) -> list[Mistake]:
        """What does not go together among the fields that are right."""
        wrong = {mistake.fields[0] for mistake in mistakes}
        try:
            Recipe(**{name: getattr(self, name) for name, *_ in _checks() if name not in wrong})
        except RecipeError as error:
            return [conflict for conflict in error.mistakes if wrong.isdisjoint(conflict.fields)]
        return []

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON has them: a list where there is a tuple, and `autocast` as it is chosen."""
        fields = {name: getattr(self, name) for name, *_ in _checks()} | {"autocast": self.under_autocast}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @property
    def under_autocast(self) -> bool:
        """Whether `autocast` is on."""
        return self.may_autocast if self.autocast == "auto" else self.autocast

    @property
    def may_autocast(self) -> bool:
        """Whether there are adapters for autocast to narrow, and it is known what becomes of them."""
        return self.method != "full" and not self.use_dora

    def narrows(self, compute_dtype: Dtype) -> bool:
        """Whether autocast does anything there: it knows 16-bit dtypes only (torch/amp/autocast_mode.py)."""
        return self.under_autocast and compute_dtype != "float32"

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step over all GPUs and micro-batches."""
        return self.tokens_per_step // self.seq_len

    def total_steps(self, sequences: int) -> int:
        """Optimizer steps of a run over `sequences` examples or packed rows (the last, incomplete step is dropped).

        At least 1, so that a data set smaller than one step still trains: its step then wraps around the data.
        """
        if self.steps is not None:
            return self.steps
        return max(1, math.floor(self.epochs * sequences / self.sequences_per_step))


@functools.cache
def _checks() -> tuple[tuple[str, Check, object], ...]:
    """The check of each field, and its default, which passes it."""
    return tuple((field.name, check_of(field.type), field.default) for field in dataclasses.fields(Recipe))


@functools.cache
def _float_fields() -> frozenset[str]:
    """The fields that hold a float, given as an int or not."""
    return frozenset(field.name for field in dataclasses.fields(Recipe) if float in get_args(field.type))
