"""A sweep: the same question for several values of an option, or of two."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import click

from clusters.errors import RequestError, nearest, request_error
from clusters.gpu import find_gpu
from launch.options import NOT_ASKED
from launch.request import plan_of
from orchestrator.devices import is_cpu
from orchestrator.history import History
from orchestrator.plans import Plan, verdict_json

FLAG = "--sweep"
NOT_SWEPT = NOT_ASKED | {"sweeps", "model", "estimator", "compare"}
"""Options whose values are no question of one fine-tune."""
MOST_PLANS = 1000


@dataclass(frozen=True, slots=True)
class Axis:
    """An option and its values.

    Attributes:
        flag: as it is written, without the hyphens before it.
        option: its name as click has it.
        values: as they were written, and as click reads them.
    """

    flag: str
    option: str
    values: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the plans of a sweep say.

    Attributes:
        axes: one or two.
        plans: by what the axes' values were written as; None where a combination is refused.
        refused: why, by the same.
    """

    axes: tuple[Axis, ...]
    plans: Mapping[tuple[str, ...], Plan | None]
    refused: Mapping[tuple[str, ...], str]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "options": [axis.flag for axis in self.axes],
            "plans": [
                {
                    "values": dict(zip((axis.flag for axis in self.axes), values, strict=True)),
                    "fits": plan is not None and plan.fits,
                    "verdicts": [] if plan is None else [verdict_json(verdict) for verdict in plan.verdicts],
                    "refused": self.refused.get(values),
                }
                for values, plan in self.plans.items()
            ],
        }


def sweep(options: Mapping[str, Any], given: Collection[str], history: History) -> Sweep:
    """The plans of all values, those of the second option for each of the first.

    Raises:
        RequestError: an option that cannot be swept, or none of the combinations makes sense.
    """
    axes = tuple(axis_of(text) for text in options["sweeps"])
    if len(axes) > 2 or len({axis.option for axis in axes}) < len(axes):
        raise request_error(
            FLAG, " ".join(options["sweeps"]), "it takes one option, or two unlike ones", "Leave some out"
        )
    combinations = [
        (tuple(name for name, _ in values), {axis.option: value for axis, (_, value) in zip(axes, values, strict=True)})
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    if len(combinations) > MOST_PLANS:
        rule = f"that is {len(combinations)} plans, and {MOST_PLANS} are the most"
        raise request_error(FLAG, " ".join(options["sweeps"]), rule, "Name fewer values")
    plans: dict[tuple[str, ...], Plan | None] = {}
    refused: dict[tuple[str, ...], str] = {}
    named = {axis.option for axis in axes}
    for names, values in combinations:
        try:
            plans[names] = plan_of({**options, **values}, frozenset(given) | named, history)
        except RequestError as error:
            plans[names], refused[names] = None, str(error)
    if len(refused) == len(plans):
        raise request_error(FLAG, " ".join(options["sweeps"]), "no value makes a plan", next(iter(refused.values())))
    return Sweep(axes, plans, refused)


def axis_of(text: str) -> Axis:
    """The option and the values of "seq-len=512,1024"."""
    command = click.get_current_context().command
    known = {
        parameter.opts[0].lstrip("-"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in NOT_SWEPT and not parameter.is_flag
    }
    flag, equals, values = text.partition("=")
    flag = flag.strip().lstrip("-").replace("_", "-")
    parameter = known.get(flag)
    if parameter is None or parameter.name is None:
        near = ", ".join(nearest(flag, known))
        raise request_error(FLAG, text, f"{flag or 'nothing'} is no option that can be swept", f"Did you mean {near}?")
    written = list(dict.fromkeys(value.strip() for value in values.split(",") if value.strip()))
    if not equals or not written:
        raise request_error(FLAG, text, "it names no values", f"Write {flag}=VALUE,VALUE")
    try:
        read = tuple((value, parameter.type.convert(value, parameter, None)) for value in written)
    except click.BadParameter as error:
        raise request_error(
            FLAG, text, error.message.rstrip("."), f"qlora-plan --help shows what --{flag} takes"
        ) from None
    for value in written if parameter.name == "gpu" else ():
        if not is_cpu(value):
            try:
                find_gpu(value)
            except RequestError as error:
                raise error.at(FLAG) from None
    return Axis(flag, parameter.name, read)
