"""From pydantic's errors about a nested model to one `Problem` for each field, in the words of the person's file."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clusters.errors import Conflicting, Problem, RequestError, nearest

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What could be part of a path and of a label."""
CLOSE = 0.5
"""How alike a word must be to be offered instead (0 to 1)."""

CONFLICT = "conflict"
"""The type of errors about fields that do not go together; their context has `fields` and `remedy`."""
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""The types of pydantic's errors about a field that is not known: of a model, and of a dataclass."""

Path = tuple[str, ...]
Section = type[Any]
"""A class whose fields are a section of the file: a model of pydantic's, or a dataclass."""


def mistakes(model: type[BaseModel], fields: Mapping[str, Any]) -> list[Problem]:
    """Everything that keeps `fields` from being a `model`, in the order of the model's fields."""
    details = errors(model, fields)
    if not details:
        return []
    by_path: dict[Path, list[ErrorDetails]] = {}
    for detail in details:
        by_path.setdefault(field_path(model, detail), []).append(detail)
    # An error inside a section stands for itself: the section's "or auto" beside it says nothing more.
    inside = {path[:end] for path in by_path for end in range(1, len(path))}
    found = [problem(model, path, of_field) for path, of_field in by_path.items() if path not in inside]
    # Rules across fields are looked at only where every field is right: once more without those that are wrong.
    if any(detail["type"] != CONFLICT for detail in details):
        found += [
            problem(model, path, [detail])
            for detail in errors(model, without(fields, set(by_path)))
            if detail["type"] == CONFLICT
            and (path := field_path(model, detail)) not in by_path
            and not any((*path[:-1], field) in by_path for field in detail["ctx"]["fields"])
        ]
    return found


def mistakes_of_each(
    kind: str, form: type[BaseModel], sections: Sequence[Any], field: str, find: Callable[[str], object]
) -> Iterator[Problem]:
    """Everything that keeps the sections of a list from being `form`s, each with a name of its own.

    Args:
        kind: what one is called, as in "pool".
        field: what `find` has to know, or raises a RequestError about.
    """
    names: set[str] = set()
    for number, section in enumerate(sections, start=1):
        if not isinstance(section, dict):
            yield Problem(f"{kind} {number}", shown(section), "it should be a section of fields", "Correct it")
            continue
        name, value = section.get("name"), section.get(field)
        # a name that is right and its own says more than a number
        is_right = isinstance(name, str) and NAME.fullmatch(name) is not None and name not in names
        place = f"{kind} {name if is_right else number}"
        for problem in mistakes(form, section):
            yield dataclasses.replace(problem, where=f"{place}.{problem.where}")
        if isinstance(name, str):
            if name in names:
                yield Problem(f"{place}.name", shown(name), f"another {kind} has that name", "Give it its own")
            names.add(name)
        if isinstance(value, str):
            try:
                find(value)
            except RequestError as error:
                yield from error.at(f"{place}.{field}").problems


def errors(model: type[BaseModel], fields: Mapping[str, Any]) -> list[ErrorDetails]:
    """Pydantic's errors; none where `fields` are right."""
    try:
        model.model_validate(marked(model, fields))
    except ValidationError as error:
        return [each for detail in error.errors(include_url=False) for each in conflicts(unmarked(detail))]
    return []


@dataclasses.dataclass(frozen=True)
class Truth:
    """A true or false (YAML's yes, no, on, off) in place of a number: pydantic takes the bare one for 1 or 0."""

    value: bool


def marked(section: Section, fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with each true or false in place of a number as a `Truth`, which pydantic refuses as any other type."""
    kept = dict(fields)
    for name, annotation in fields_of(section).items():
        value, inner = fields.get(name), section_class(annotation)
        if isinstance(value, bool) and bool not in (kinds := scalars(annotation)) and kinds & {int, float}:
            kept[name] = Truth(value)
        elif inner is not None and isinstance(value, dict):
            if are_named(annotation):
                kept[name] = {key: marked(inner, one) if isinstance(one, dict) else one for key, one in value.items()}
            else:
                kept[name] = marked(inner, value)
    return kept


def unmarked(detail: ErrorDetails) -> ErrorDetails:
    """The error of a `Truth` as one of what was given."""
    given = detail["input"]
    return {**detail, "input": given.value} if isinstance(given, Truth) else detail


def scalars(annotation: Any) -> set[Any]:
    """The types of the single values that an annotation allows."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return set(map(type, parts))
    if get_origin(annotation) is Annotated:
        return scalars(parts[0])
    return {kind for part in parts for kind in scalars(part)} if parts else {annotation}


def conflicts(detail: ErrorDetails) -> Iterator[ErrorDetails]:
    """Each thing that does not go together in a section, at its field; any other error as it is."""
    error = detail.get("ctx", {}).get("error")
    if not isinstance(error, Conflicting):
        yield detail
        return
    for fields, given, rule, remedy in error.mistakes:
        yield ErrorDetails(
            type=CONFLICT,
            loc=(*detail["loc"], fields[0]),
            msg=rule,
            input=given,
            ctx={"fields": fields, "remedy": remedy},
        )


def without(fields: Mapping[str, Any], paths: set[Path]) -> dict[str, Any]:
    """`fields` without those at `paths`."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if (str(name),) not in paths:
            inner = {path[1:] for path in paths if path[0] == str(name)}
            kept[name] = without(value, inner) if isinstance(value, dict) and inner else value
    return kept


def problem(model: type[BaseModel], path: Path, details: Sequence[ErrorDetails]) -> Problem:
    """One field's error; a union has one for each of its members."""
    where, last = ".".join(path) or "the file", details[-1]
    kind, value = last["type"], last["input"]
    if kind in UNKNOWN:
        known = list(fields_of(section(model, path[:-1])))
        near = nearest(path[-1], known, limit=1, cutoff=CLOSE)
        remedy = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}"
        return Problem(where, "", "there is no such field", remedy)
    if kind == "missing":
        return Problem(where, "", "it is required", "Add it")
    if kind == CONFLICT:
        return Problem(where, shown(value), last["msg"], last["ctx"]["remedy"])
    rules = dict.fromkeys(expectation(detail) for detail in details)
    wanted = ", or ".join(
        rule if index == 0 else rule.removeprefix("it should be ") for index, rule in enumerate(rules)
    )
    words = [
        word for detail in details for word in re.findall(r"'([^']+)'", str(detail.get("ctx", {}).get("expected", "")))
    ]
    near = nearest(value, words, limit=1, cutoff=CLOSE) if isinstance(value, str) else []
    remedy = f"Did you mean {near[0]}?" if near else "Put it in quotes" if kind == "string_type" else "Correct it"
    return Problem(where, shown(value), wanted, remedy)


def expectation(detail: ErrorDetails) -> str:
    """What pydantic says, as a rule about "it" in the words of YAML."""
    if detail["type"] in ("model_type", "model_attributes_type", "dataclass_type", "dict_type"):
        return "it should be a section of fields"
    if detail["type"] == "tuple_type":
        return "it should be a list"
    text = detail["msg"].removeprefix("Value error, ")
    text = re.sub(r"^Input should be", "it should be", text)
    return text[:1].lower() + text[1:]


def shown(value: object) -> str:
    """A value as it may be repeated to the person: short, whatever it is."""
    try:
        text = (
            reprlib.repr(value)
            if isinstance(value, dict | list)
            else json.dumps(value, default=str, ensure_ascii=False)
        )
    except ValueError:  # an integer of more than 4300 digits
        return "a number too large to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def field_path(model: type[BaseModel], detail: ErrorDetails) -> Path:
    """The field's path as the person wrote it, without pydantic's names for members of unions and without indices."""
    path: list[str] = []
    inner: Section | None = model
    named = False
    for part in detail["loc"]:
        if inner is None:
            break
        known = fields_of(inner)
        if named:
            path.append(str(part))
            named = False
        elif part in known:
            path.append(str(part))
            inner = section_class(known[str(part)])
            named = are_named(known[str(part)])
        elif part is detail["loc"][-1] and detail["type"] in (*UNKNOWN, "invalid_key"):
            path.append(str(part))
    return tuple(path)


def section(model: Section, path: Path) -> Section:
    """The class of the section at `path`."""
    for part in path:
        if part in (known := fields_of(model)):  # else it is the name of one of several
            model = section_class(known[part]) or model
    return model


def section_class(annotation: Any) -> Section | None:
    """The section's class behind an annotation such as ``Literal["auto"] | StrategySpec``, if there is one.

    Of sections under names of their own, ``dict[str, DatasetSpec]``, the class of each.
    """
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return annotation
    return next((found for found in map(section_class, get_args(annotation)) if found is not None), None)


def are_named(annotation: Any) -> bool:
    """Whether sections stand there under names of their own."""
    return get_origin(annotation) is dict or any(map(are_named, get_args(annotation)))


def fields_of(section: Section) -> dict[str, Any]:
    """The annotations of a section's fields by their names."""
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return {field.name: field.type for field in dataclasses.fields(section)}
