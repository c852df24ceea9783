"""YAML as people write it for us: read as data alone, and what is wrong with it told in one sentence."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator

from clusters.errors import request_error
from clusters.mistakes import NAME, shown

LARGEST_BYTES = 64 * 1024
"""Hundreds of pools; the parser in Python takes about a second for so much."""
DEEPEST = 50
"""Levels of a text that libyaml parses: its recursion ends in a crash of the process, not in an error."""


def _plain_name(value: str) -> str:
    """A validator: `value` could be part of a path and of a label."""
    if not NAME.fullmatch(value):
        raise ValueError(
            "it may hold letters, digits, dots, hyphens and underscores, at most 100, and starts with a letter or digit"
        )
    return value


PlainName = Annotated[str, AfterValidator(_plain_name)]


class Checked(yaml.constructor.SafeConstructor):
    """YAML's values, except that a field must not be given twice: the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """See PyYAML."""
        given: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in given:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                given.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what ``<<`` refers to, one value a key: copies of copies would grow without bound."""
        super().flatten_mapping(node)
        last: dict[Hashable, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            last[(key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)] = key, value
        node.value = list(last.values())


class Loader(Checked, yaml.SafeLoader):
    """For what people write by hand: its messages are the better ones."""


class FastLoader(Checked, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """For long texts: libyaml parses them, where PyYAML was built with it."""


def why_not_plain(text: str) -> str | None:
    """Why a long text may not be loaded: it is nested deeply, or repeats something, which could grow; None if it may.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    level = 0
    for event in yaml.parse(text, Loader=FastLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        elif isinstance(event, yaml.AliasEvent):
            return f"it repeats *{event.anchor}: aliases are for files of up to {LARGEST_BYTES // 1024} KiB"
        if level > DEEPEST:
            return "it is nested too deeply"
    return None


def parse_yaml(text: str) -> Any:
    """The value in a YAML text.

    Raises:
        ValueError: it is not YAML; says where and why.
    """
    try:
        if len(text) <= LARGEST_BYTES:
            return yaml.load(text, Loader=Loader)  # noqa: S506  (a safe one)
        rule = why_not_plain(text)
        if rule is None:
            return yaml.load(text, Loader=FastLoader)  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise ValueError(f"it is not YAML{place}: {reason}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, LookupError, AttributeError, ArithmeticError, TypeError) as error:
        # what int(), date() and the like say about a scalar that looked like one
        raise ValueError(f"it holds a value that cannot be read ({error}); quotes make it text") from None
    raise ValueError(rule)


def read_yaml(path: Path, where: str, start: str, most: int = LARGEST_BYTES) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: the file.
        where: what it should hold, for the error.
        start: what to begin with, for who gave a file without fields.
        most: bytes that it may have.

    Raises:
        RequestError: it is no text, no YAML or no mapping, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        text = data[:most].decode("utf-8", errors="strict" if len(data) <= most else "ignore")
    except FileNotFoundError:
        raise request_error(where, path, "there is no such file", "Give the path of a YAML file") from None
    except IsADirectoryError:
        raise request_error(where, path, "it is a folder", "Give the path of a YAML file in it") from None
    except UnicodeDecodeError:
        raise request_error(where, path, "it is not text in UTF-8", "Give the path of a YAML file") from None
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        rule = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
        raise request_error(where, path, rule, "Give a readable YAML file") from None
    if len(data) > most:
        rule = f"it is larger than {most // 1024:,} KiB"
        raise request_error(where, path, rule, "Give the path of a YAML file that holds no more than it has to")
    try:
        fields = parse_yaml(text)
    except ValueError as error:
        raise request_error(where, path, str(error), "Correct the file") from None
    if fields is None:
        raise request_error(where, path, "it is empty", start)
    if not isinstance(fields, dict):
        raise request_error(where, path, f"it holds no mapping of fields, but {shown(fields)}", start)
    return fields
