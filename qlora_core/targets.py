"""LoRA's targets: which modules of a model they choose, by the rules of peft.

A target is a name or a regular expression. A name, such as ``q_proj`` or ``mlp.down_proj``, is the end of a module's
name, from a dot on. Everything else is a regular expression, and has to match the whole of a module's name
(peft 0.21.2, tuners/tuners_utils.py, check_target_module_exists).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

Targets = Literal["all-linear"] | tuple[str, ...]

NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")


class ExpertTargets(NamedTuple):
    """The names, of transformers 4, by which peft adapts a router and 3-D expert parameters."""

    router: str
    fused: tuple[str, str]
    down: str

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.router, *self.fused, self.down


EXPERT_TARGETS = {
    "mixtral": ExpertTargets("gate", ("w1", "w3"), "w2"),
    "olmoe": ExpertTargets("gate", ("gate_proj", "up_proj"), "down_proj"),
    "qwen3_moe": ExpertTargets("gate", ("gate_proj", "up_proj"), "down_proj"),
}
"""By model type; the experts of others get no adapters (peft 0.21.2, utils/transformers_weight_conversion.py,
_convert_peft_config_moe: its table has no entry for qwen2_moe itself, for granitemoe and for gpt_oss)."""


def split(text: str) -> tuple[str, ...]:
    """The targets of a comma-separated list; commas in a regular expression's brackets are its own."""
    parts, depth = [""], 0
    for piece in re.findall(r"\\.|\[(?:\\.|[^]\\])+\]|.", text, re.DOTALL):
        if piece == "," and not depth:
            parts.append("")
            continue
        depth = max(0, depth + {"(": 1, "{": 1, ")": -1, "}": -1}.get(piece, 0))
        parts[-1] += piece
    return tuple(part.strip() for part in parts if part.strip())


def is_name(target: str) -> bool:
    """Whether `target` is a name, and no regular expression."""
    return NAME.fullmatch(target) is not None


def fault(targets: Iterable[str]) -> tuple[str, str] | None:
    """The first of `targets` that is no regular expression though it is meant to be one, and why."""
    expressions = [target for target in targets if not is_name(target)]
    for number, target in enumerate(expressions):
        try:
            _pattern(tuple(expressions[: number + 1]))  # a group's name may be taken by one before
        except (re.error, OverflowError, RecursionError) as error:
            return target, str(error)
    return None


def for_peft(targets: Targets) -> str | list[str]:
    """`targets` as peft's ``LoraConfig(target_modules=...)`` takes them: names as a list, else one expression."""
    if isinstance(targets, str):
        return targets
    return list(targets) if all(map(is_name, targets)) else _expression(targets)


def chosen(targets: Targets, path: str) -> bool:
    """Whether `targets` choose the module of that name."""
    if isinstance(targets, str):
        return True
    if all(map(is_name, targets)):
        return any(path == name or path.endswith(f".{name}") for name in targets)
    return _pattern(targets).fullmatch(path) is not None


def expert_paths(model_type: str) -> Iterator[tuple[str, str]]:
    """Of a router and experts, what peft adapts: the names of transformers 4, and its module in the first layer.

    peft looks for a regular expression's matches at the place where transformers 5 has the experts
    (_resolve_string_target_modules).
    """
    if names := EXPERT_TARGETS.get(model_type):
        yield names.router, f"model.layers.0.mlp.{names.router}"
        yield from ((name, f"model.layers.0.mlp.experts.{name}") for name in (*names.fused, names.down))


def chosen_experts(targets: Targets, model_type: str) -> frozenset[str]:
    """Those of a router's and experts' names that `targets` choose."""
    return frozenset(name for name, path in expert_paths(model_type) if chosen(targets, path))


@lru_cache(maxsize=256)
def _pattern(targets: tuple[str, ...]) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what will mean something else in a later Python still means this one here
        return re.compile(_expression(targets))


def _expression(targets: tuple[str, ...]) -> str:
    """One expression for all `targets`, of which peft takes no more."""
    return "|".join(rf"(?:.*\.)?{re.escape(target)}" if is_name(target) else f"(?:{target})" for target in targets)
