"""The trials of a sweep: one run specification for each combination of the fields that have several values."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from clusters.errors import Problem, RequestError, request_error
from orchestrator.spec import RunSpec, load_spec

NAME_LENGTH = 80
"""Of a trial's folder; a longer name is cut, and a digest of it put behind."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination.

    Attributes:
        name: its folder's, below the sweep's.
        swept: the value of each field that has several, as it was written.
        spec: its run.
    """

    name: str
    swept: Mapping[str, str]
    spec: RunSpec


def trials_of(path: Path, overrides: Sequence[str], at_most: int | None = None) -> list[Trial]:
    """All combinations, or as many as are wanted of them, drawn with the specification's seed.

    Args:
        path: the specification's file.
        overrides: ``field.path=value`` pairs; ``field.path=value,value`` sweeps a field.

    Raises:
        RequestError: with the mistakes of all trials; nothing is swept; nothing is held out to compare trials by.
    """
    fixed = [override for override in overrides if len(values_of(override)) < 2]
    swept = [override for override in overrides if override not in fixed]
    if not swept:
        rule, remedy = "no field has several values", "Write recipe.learning_rate=1e-4,2e-4, say"
        raise request_error("FIELD=VALUE,VALUE", " ".join(fixed), rule, remedy)
    fields = [override.partition("=")[0] for override in swept]
    combinations = itertools.product(*(dict.fromkeys(values_of(override)) for override in swept))
    loaded: list[tuple[dict[str, str], RunSpec]] = []
    problems: dict[Problem, None] = {}  # in their order, and what is wrong with all trials is told once
    for combination in combinations:
        chosen = dict(zip(fields, combination, strict=True))
        try:
            spec = load_spec(path, [*fixed, *(f"{field}={value}" for field, value in chosen.items())])
        except RequestError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        if not spec.data.evaluates:
            rule = "trials are compared by their evaluation loss, and nothing is held out"
            problems[Problem("data.eval_fraction", "0", rule, "Set it to 0.02, say")] = None
        loaded.append((chosen, spec))
    if problems:
        raise RequestError(list(problems))
    if at_most is not None and at_most < len(loaded):
        drawn = random.Random(loaded[0][1].seed).sample(range(len(loaded)), at_most)  # noqa: S311  # not cryptography
        loaded = [loaded[index] for index in sorted(drawn)]
    return [named(chosen, spec) for chosen, spec in loaded]


def values_of(override: str) -> list[str]:
    """The values of ``field=value,value``, as they are written: commas inside brackets and quotes part nothing."""
    text = override.partition("=")[2]
    opened = f"[{text}]"
    try:
        node = yaml.compose(opened, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return [text]  # what is wrong with it is told when it is read as a value
    if not isinstance(node, yaml.SequenceNode) or len(node.value) < 2:
        return [text]
    return [opened[value.start_mark.index : value.end_mark.index] for value in node.value]


def named(chosen: Mapping[str, str], spec: RunSpec) -> Trial:
    """A trial with a folder and a run of its own, named by what is swept."""
    last = [field.rpartition(".")[2] for field in chosen]
    words = [
        f"{field if last.count(short) > 1 else short}={value}"
        for (field, value), short in zip(chosen.items(), last, strict=True)
    ]
    written = ",".join(words)
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", written)
    if len(name) > NAME_LENGTH or name != written:
        name = f"{name[:NAME_LENGTH]}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"
    own = {"name": f"{spec.name}-{name}", "output": str(Path(spec.output) / name)}
    return Trial(name, chosen, spec.model_copy(update=own))
