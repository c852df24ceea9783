"""Whether LoRA's targets suit a model: that each chooses linear layers, in all decoder layers, as peft takes them."""

from __future__ import annotations

from collections.abc import Iterator

from clusters.errors import Problem, RequestError, nearest
from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.modules import in_layer, layers_of, not_linear
from qlora_core.recipe import Recipe
from qlora_core.targets import EXPERT_TARGETS, chosen, chosen_experts, expert_paths, is_name


def check_targets(architecture: ModelArchitecture, recipe: Recipe, where: str = "recipe.targets") -> None:
    """Raise a RequestError for LoRA targets that `architecture` does not have, or peft refuses there."""
    targets = () if isinstance(recipe.targets, str) else recipe.targets
    problems = [problem for target in targets for problem in _problems(architecture, target, where)]
    if not problems and recipe.method != "full":
        problems = list(_problems_of_experts(architecture, recipe, where))
    if problems:
        raise RequestError(problems)


def _problems(architecture: ModelArchitecture, target: str, where: str) -> Iterator[Problem]:
    """What is wrong with one target; the first thing that is."""
    paths = {linear.path: linear.name for linear in architecture.linears}
    layers = {linear.path: layers_of(architecture, linear) for linear in architecture.linears}
    for name, path in expert_paths(architecture.model_type):
        paths[path], layers[path] = name, list(range(architecture.num_layers))
    names = list(dict.fromkeys(paths.values()))
    if is_name(target) and not any(part.isdigit() for part in target.split(".")):
        layers = {path: numbers[:1] for path, numbers in layers.items()}  # it is the same in all of them
    where_chosen = {
        path: [number for number in numbers if chosen((target,), in_layer(path, number))]
        for path, numbers in layers.items()
    }
    if not any(where_chosen.values()):
        if is_name(target):
            near = nearest(target, names, limit=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}? " if near else ""
            rule = f"{architecture.name} has no linear layer of that name"
            yield Problem(where, target, rule, f"{hint}It has {', '.join(names)}")
        else:
            rule = f"it is a regular expression, and matches the whole name of no linear layer of {architecture.name}"
            yield Problem(where, target, rule, f"Those of the first layers are {', '.join(paths)}")
        return
    if part := next((path for path, found in where_chosen.items() if 0 < len(found) < len(layers[path])), None):
        rule = (
            f"it chooses {paths[part]} in {len(where_chosen[part])} of {len(layers[part])} layers, "
            "and what layers need that are not alike is not modelled"
        )
        yield Problem(where, target, rule, rf"Let it match all layers, as .*\.{paths[part]} does")
        return
    right = {in_layer(path, number) for path in paths for number in range(architecture.num_layers)}
    matched = (name for name in not_linear(architecture) if chosen((target,), name) and name not in right)
    if other := next(matched, None):
        rule = f"it matches {other} too, and only linear layers of the decoder layers get adapters here"
        yield Problem(where, target, rule, f"Narrow it down to some of {', '.join(names)}")


def _problems_of_experts(architecture: ModelArchitecture, recipe: Recipe, where: str) -> Iterator[Problem]:
    """What peft refuses about a router and experts that lie in 3-D parameters."""
    adapted = chosen_experts(recipe.targets, architecture.model_type)
    if not adapted:
        return
    given = recipe.targets if isinstance(recipe.targets, str) else ", ".join(recipe.targets)
    fused = EXPERT_TARGETS[architecture.model_type].fused
    if len(adapted.intersection(fused)) == 1:
        (one,) = adapted.intersection(fused)
        (other,) = set(fused) - {one}
        rule = f"peft adapts no {one} without {other}: transformers has both of an expert in one parameter"
        yield Problem(where, given, rule, f"Add {other}, or leave {one} out")
    attention = ", ".join(linear.name for linear in architecture.linears if linear.part == "attention")
    if recipe.use_dora:
        rule = "peft has no DoRA for routers and experts"
        yield Problem(where, given, rule, f"Leave DoRA out, or name attention's layers only: {attention}")
    if recipe.dropout:
        rule = f"peft has no dropout for routers and experts, and LoRA's dropout is {recipe.dropout}"
        yield Problem(where, given, rule, f"Set the dropout to 0, or name attention's layers only: {attention}")
