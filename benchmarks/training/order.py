"""What a peer's loop is told of a recipe, wherever it is run."""

from __future__ import annotations

from typing import Any

from qlora_core.recipe import Recipe


def order_of(recipe: Recipe) -> dict[str, Any]:
    """The part of an order that comes from the recipe; see `benchmarks.training.trl_loop.main` for the whole."""
    return {
        "rank": recipe.rank,
        "alpha": recipe.alpha,
        "learning_rate": recipe.learning_rate,
        "beta2": recipe.beta2,
        "max_grad_norm": recipe.max_grad_norm,
        "exact": False,
    }
