"""What may be asked over HTTP, from the options of `qlora-plan`: types of parameters, mistakes, fields of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import click
from pydantic import BaseModel, ConfigDict, Field, create_model

from clusters.errors import Problem
from clusters.gpu import list_gpus
from launch.options import AUTO, NumberOrAuto, Tokens, with_options

ASKED = (
    "model",
    "gpu",
    "gpus",
    "method",
    "seq_len",
    "micro_batch",
    "rank",
    "tokens",
    "objective",
    "optimizer",
    "quant",
    "no_double_quant",
    "block_size",
    "targets",
    "lora_dtype",
    "lora_dropout",
    "rslora",
    "dora",
    "tokens_per_step",
    "packing",
    "attention",
    "no_gradient_checkpointing",
    "loss",
    "compute_dtype",
    "upcast",
    "autocast",
    "zero_stage",
    "offload",
    "host_ram",
    "stack",
)
"""Options that a question may have, in the page's order; none of them reads or writes a file."""
SHOWN_FIRST = ASKED[: ASKED.index("optimizer")]
MODULES = r"^[A-Za-z0-9_-]+(,[A-Za-z0-9_-]+)*$"
"""Targets by name; a pattern from outside could take for ever."""
TOKENS = r"^[0-9]{1,12}(\.[0-9]{1,6})?[kKmMbB]?$"


@click.command("qlora-plan")
@with_options
def reader(**_options: Any) -> int:
    """The command's options alone: what reads the words of a question."""
    return 0


@cache
def options() -> dict[str, click.Option]:
    """The options of `qlora-plan` that a question may have, by name."""
    by_name = {str(one.name): one for one in reader.params if isinstance(one, click.Option)}
    return {name: by_name[name] for name in ASKED}


def flag(option: click.Option) -> str:
    """The name of a parameter: the option's, without hyphens before it."""
    return option.opts[0].lstrip("-")


def help_of(option: click.Option) -> str:
    """Its word of help, without what it says of the default."""
    return (option.help or "").split("  [")[0]


def offered_by(option: click.Option, models: Sequence[str]) -> Sequence[str] | None:
    """All that an option may be, where that can be listed."""
    if option.name == "model":
        return models
    if option.name == "gpu":
        return [gpu.name for gpu in list_gpus()]
    form: Any = option.type
    return list(form.choices) if isinstance(form, click.Choice) else None


def kind(option: click.Option, models: Sequence[str]) -> Any:
    """The type of a parameter."""
    offered = offered_by(option, models)
    if offered is not None:
        return Literal[tuple(offered)]
    if option.is_flag:
        return bool
    if option.name == "targets":
        return Annotated[str, Field(pattern=MODULES, max_length=500)]
    form: Any = option.type
    if isinstance(form, Tokens):
        return Annotated[str, Field(pattern=TOKENS)]
    if isinstance(form, NumberOrAuto):
        return Annotated[int, Field(ge=form.range.min, le=form.range.max)] | Literal["auto"]
    if isinstance(form, click.IntRange):
        return Annotated[int, Field(ge=form.min, le=form.max)]
    if isinstance(form, click.FloatRange):
        low: dict[str, Any] = {"gt" if form.min_open else "ge": form.min}
        high: dict[str, Any] = {"lt" if form.max_open else "le": form.max}
        return Annotated[float, Field(allow_inf_nan=False, **low, **high)]
    raise TypeError(f"no parameter for {option.name}")


def question_form(models: Sequence[str]) -> type[BaseModel]:
    """What may be asked, from the options; what is left out has the command's default."""
    fields: dict[str, Any] = {}
    for name, option in options().items():
        about: dict[str, Any] = {"alias": flag(option), "description": help_of(option) or None}
        required = name == "model"
        of_kind = kind(option, models)
        fields[name] = (of_kind, Field(**about)) if required else (of_kind | None, Field(None, **about))
    return create_model("Asked", __config__=ConfigDict(extra="forbid"), **fields)


def is_searched(asked: BaseModel) -> bool:
    """Whether a question leaves something to a search, which takes longer than an estimate."""
    fields = dict(asked)
    return fields["objective"] is not None or AUTO in fields.values()


def words_of(asked: BaseModel) -> tuple[str, ...]:
    """The command line of a question: what is None was not asked."""
    fields = dict(asked)
    words: list[str] = []
    for name, option in options().items():
        value = fields[name]
        if value is None or value is False:
            continue
        words += [f"--{flag(option)}"] if value is True else [f"--{flag(option)}={value}"]
    if all(fields[name] is None for name in ("gpu", "gpus", "objective")):
        words.append("--gpus=1")  # the GPUs of the machine that answers are nothing to who asks
    return tuple(words)


def problem_of(error: Mapping[str, Any]) -> Problem:
    """What pydantic says of a parameter."""
    name = str(error["loc"][1]) if len(error["loc"]) > 1 else ""
    if error["type"] == "extra_forbidden":
        return Problem(f"--{name}", "", "there is no such parameter", "Leave it out; /openapi.json lists them")
    given = str(error.get("input", ""))[:100] if error["type"] != "missing" else ""
    message = str(error["msg"])
    if error["type"] == "literal_error" and len(message) > 200:
        message = "it is none of those that can be asked for"
    return Problem(f"--{name}", given, message[:1].lower() + message[1:], "/openapi.json says what it may be")


# --- the page ---------------------------------------------------------------------------------------------------------


def inputs(models: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The page's fields, in two groups, from the options."""
    fields = {name: field(option, models) for name, option in options().items()}
    first = [fields[name] for name in SHOWN_FIRST]
    return [("", first), ("More", [fields[name] for name in ASKED if name not in SHOWN_FIRST])]


def field(option: click.Option, models: Sequence[str]) -> dict[str, Any]:
    """A field: its name, what it offers, what it is without a choice, and a word of help."""
    default = option.default if isinstance(option.default, str | int | float) and not option.is_flag else ""
    return {
        "name": flag(option),
        "label": flag(option).replace("-", " "),
        "offered": offered_by(option, models),
        "many": option.name == "model",
        "flag": option.is_flag,
        "default": default,
        "help": help_of(option),
    }
