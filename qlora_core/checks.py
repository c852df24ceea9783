"""What a field's annotation says about its values, checked without pydantic, whose import takes longer than a plan."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

Check = Callable[[object], str]
"""Gives the rule that a value breaks, as a sentence about "it"; nothing where it breaks none."""


class Bounds(NamedTuple):
    """What a number may be: metadata of an annotation, which pydantic reads too."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def broken_by(self, value: float) -> str:
        """The rule that `value` breaks, or nothing."""
        if self.ge is not None and value < self.ge:
            return f"it should be greater than or equal to {self.ge}"
        if self.gt is not None and value <= self.gt:
            return f"it should be greater than {self.gt}"
        if self.le is not None and value > self.le:
            return f"it should be less than or equal to {self.le}"
        if self.lt is not None and value >= self.lt:
            return f"it should be less than {self.lt}"
        return ""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return handler(source) | {name: bound for name, bound in self._asdict().items() if bound is not None}


def check_of(annotation: Any) -> Check:
    """The check of an annotation: a scalar, Literal, ``tuple[str, ...]``, a union of them, or a number with `Bounds`.

    An int is a float, as pydantic has it. A bool is no number; to pydantic it is, but for `clusters.mistakes.marked`.

    Raises:
        TypeError: the annotation is another.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        of_type, (bounds,) = check_of(arguments[0]), arguments[1:]
        return lambda value: of_type(value) or bounds.broken_by(value)
    if origin is Literal:
        rule = f"it should be {', or '.join(map(repr, arguments))}"
        types = {type(argument) for argument in arguments}  # 64.0 is no 64, though they are equal
        return lambda value: "" if type(value) in types and value in arguments else rule
    if origin in (Union, UnionType):
        members = [check_of(member) for member in arguments]
        return lambda value: _all_broken([member(value) for member in members])
    if origin is tuple:
        return lambda value: (
            ""
            if isinstance(value, tuple) and all(isinstance(part, str) for part in value)
            else "it should be a tuple of texts"
        )
    if annotation not in _SCALARS:
        raise TypeError(f"there is no check of {annotation!r}")
    return _SCALARS[annotation]


def _all_broken(rules: list[str]) -> str:
    """The rules of a union's members as one, unless one of them is kept."""
    first, *others = rules
    return ", or ".join([first, *(rule.removeprefix("it should be ") for rule in others)]) if all(rules) else ""


def _is_number(value: object) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "it should be a number"
    return "" if abs(value) <= sys.float_info.max else "it should be a finite number"


_SCALARS: dict[Any, Check] = {
    int: lambda value: "" if type(value) is int else "it should be an integer",
    float: _is_number,
    bool: lambda value: "" if isinstance(value, bool) else "it should be true or false",
    NoneType: lambda value: "" if value is None else "it should be None",
}
