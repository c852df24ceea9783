"""The options of `qlora-plan`, their kinds of value, and what a shell completes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qlora_core.tokens import parse_tokens

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

AUTO = "auto"
OBJECTIVES = ("fastest", "cheapest", "fewest-gpus", "longest")


class NumberOrAuto(click.ParamType[int | str]):
    """A whole number between two bounds, or auto."""

    name = "N|auto"

    def __init__(self, least: int = 1, most: int | None = None) -> None:
        self.range = click.IntRange(min=least, max=most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """See click."""
        if value == AUTO:
            return AUTO
        try:
            return self.range.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor is it auto.", param, ctx)


class Tokens(click.ParamType[int]):
    """A number of tokens: 12500000, 12.5M, 3e8."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click."""
        try:
            return parse_tokens(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


def models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The catalogue's models, for a shell that completes."""
    from click.shell_completion import CompletionItem

    from qlora_core.catalogue import list_models

    return [
        CompletionItem(name)
        for model in list_models()
        for name in (model.entry.name, *model.entry.aliases)
        if name.startswith(incomplete)
    ]


def gpus(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The catalogue's GPUs, for a shell that completes; after a comma, for the last of several."""
    from click.shell_completion import CompletionItem

    from clusters.gpu import list_gpus

    before, comma, last = incomplete.rpartition(",")
    names = [gpu.name for gpu in list_gpus()] + ([] if comma else ["cpu"])
    return [CompletionItem(before + comma + name) for name in names if name.startswith(last)]


def chosen(*values: str) -> click.Choice[str]:
    """One of some words."""
    return click.Choice(list(values))


OPTIONS = (
    click.option("--model", metavar="NAME|DIR|HUB_ID", shell_complete=models, help="Or org/name[@revision]."),
    click.option("--gpus", type=NumberOrAuto(), help="Data-parallel GPUs.  [default: 1, or all of this machine]"),
    click.option(
        "--gpu",
        metavar="NAME",
        shell_complete=gpus,
        help="The kind of GPU, or cpu. Omitted: this machine's, else the common kinds.",
    ),
    click.option(
        "--compare", metavar="NAME,...", shell_complete=gpus, help="Kinds of GPU beside each other, that of --gpu too."
    ),
    click.option(
        "--cluster", metavar="FILE|HOST:PORT|auto", help="A description, or a running Ray (docs/clusters.md)."
    ),
    click.option("--tokens", type=Tokens(), help="Tokens to train on, for time and price: 12.5M, 3B."),
    click.option("--data", metavar="FILE", help="The data itself: JSONL, counted by the model's tokenizer."),
    click.option("--method", type=chosen("qlora", "lora", "full"), default="qlora", show_default=True),
    click.option(
        "--quant", type=chosen("nf4", "fp4", "int8", "none"), help="The base's weights.  [default: nf4; none for lora]"
    ),
    click.option("--no-double-quant", is_flag=True, help="Keep the quantization constants in float32."),
    click.option(
        "--block-size",
        type=chosen("64", "128", "256", "512", "1024", "2048", "4096"),
        help="Weights that share a quantization constant.  [default: 64]",
    ),
    click.option("--rank", type=click.IntRange(min=1), default=64, show_default=True, help="LoRA rank."),
    click.option(
        "--targets",
        metavar="NAME,...",
        default="all-linear",
        show_default=True,
        help="LoRA's layers: all-linear, or names and regular expressions of modules.",
    ),
    click.option("--lora-dtype", type=chosen("float32", "bfloat16", "float16"), default="float32", show_default=True),
    click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True),
    click.option("--rslora", is_flag=True, help="Scale adapters by alpha / sqrt(rank); it costs nothing."),
    click.option("--dora", is_flag=True, help="Train magnitudes too (DoRA), which costs memory and time."),
    click.option(
        "--optimizer",
        type=chosen("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", AUTO),
        default="paged_adamw_32bit",
        show_default=True,
    ),
    click.option("--micro-batch", type=NumberOrAuto(), default=1, show_default=True, help="Sequences at a time."),
    click.option("--seq-len", type=NumberOrAuto(), default=512, show_default=True, help="Tokens of a sequence."),
    click.option(
        "--tokens-per-step",
        type=click.IntRange(min=1),
        metavar="N",
        help="Of one optimizer step, over all GPUs; micro-batches make it up.  [default: one micro-batch on each GPU]",
    ),
    click.option("--packing", is_flag=True, help="Several samples in one sequence, none of which sees another."),
    click.option(
        "--attention", type=chosen("sdpa", "eager", "flash_attention_2", AUTO), default="sdpa", show_default=True
    ),
    click.option("--no-gradient-checkpointing", is_flag=True, help="Keep all activations."),
    click.option("--loss", type=chosen("full", "chunked", "liger", AUTO), default="chunked", show_default=True),
    click.option(
        "--compute-dtype",
        type=chosen(AUTO, "float32", "bfloat16", "float16"),
        default=AUTO,
        show_default=True,
        help="auto goes by the GPU.",
    ),
    click.option(
        "--upcast",
        type=chosen("none", "peft"),
        default="none",
        show_default=True,
        help="peft: prepare_model_for_kbit_training's cast to float32.",
    ),
    click.option("--autocast", is_flag=True, help="The forward pass runs under torch.autocast."),
    click.option(
        "--zero-stage", type=NumberOrAuto(0, 3), default=0, show_default=True, help="DeepSpeed ZeRO; 0: none."
    ),
    click.option("--offload", type=chosen("none", "optimizer", "all", AUTO), default="none", show_default=True),
    click.option(
        "--host-ram", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="A host's memory to fit into."
    ),
    click.option(
        "--stack",
        type=chosen("ours", "trainer", "loop"),
        default="ours",
        show_default=True,
        help="Whose loop trains: qlora-train's, transformers' Trainer or TRL, a plain one over transformers and peft.",
    ),
    click.option("--estimator", type=chosen("formula", "played", "trace"), default="formula", show_default=True),
    click.option(
        "--objective",
        type=chosen(*OBJECTIVES),
        help="Choose all of the strategy that is not given: its GPUs, micro-batch, ZeRO, offload and so on.",
    ),
    click.option("--explain", is_flag=True, help="Say where each gigabyte comes from, and what each choice saves."),
    click.option(
        "--sweep",
        "sweeps",
        metavar="OPTION=VALUE,...",
        multiple=True,
        help="The same question for several values; twice makes a table of both, for one GPU.",
    ),
    click.option("--write", metavar="FILE.yaml", help="Write what qlora-train runs."),
    click.option(
        "--report",
        "reports",
        metavar="FILE.html|FILE.md",
        multiple=True,
        help="Write the answer as a page; may be repeated.",
    ),
    click.option("--figures", metavar="FOLDER", help="Write the report's pictures, as SVG and PNG."),
    click.option("--list-models", "list_kind", flag_value="models", help="List the catalogue of models."),
    click.option("--list-gpus", "list_kind", flag_value="gpus", help="List the catalogue of GPUs."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/planning.md)."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)
"""In the order of --help."""


def with_options(function: Callable[..., int]) -> Callable[..., int]:
    """Give a command all of them."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


NOT_ASKED = frozenset({"reports", "figures", "write", "as_json", "debug", "explain", "list_kind", "version"})
"""Options that say what becomes of an answer, and nothing of the question."""


def command_line(context: click.Context) -> str:
    """What asks the same once more, as a shell reads it: the options that were passed, in the order of --help."""
    words = [context.command.name or "qlora-plan"]
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        if name in NOT_ASKED or not was_passed(context, name):
            continue
        flag = parameter.opts[0]
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words += [flag] if value else []
        else:
            each = value if isinstance(value, tuple) else (value,)
            words += [word for one in each for word in (flag, str(one))]
    return shlex.join(words)


def passed(context: click.Context) -> frozenset[str]:
    """The names of the options that were really passed, and are no `auto`."""
    return frozenset(name for name, value in context.params.items() if was_passed(context, name) and value != AUTO)


def was_passed(context: click.Context, name: str) -> bool:
    """Whether an option was passed, and has not its default."""
    source = click.core.ParameterSource
    return context.get_parameter_source(name) not in (source.DEFAULT, source.DEFAULT_MAP)
