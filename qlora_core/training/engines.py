"""Which engine a strategy gets."""

from __future__ import annotations

from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.engine import Engine
from qlora_core.training.engine_torch import TorchEngine
from qlora_core.training.loss import SummedLoss


def build_engine(module: SummedLoss, recipe: Recipe, strategy: Strategy, *, scaled: bool = False) -> Engine:
    """The engine that the strategy's ZeRO stage names: plain torch for 0, DeepSpeed for 1 to 3.

    Args:
        scaled: losses are scaled, as float16 wants it.
    """
    if strategy.zero_stage == 0:
        return TorchEngine(module, recipe, strategy, scaled=scaled)
    # Imported only where it is used: it takes seconds.
    from qlora_core.training.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, recipe, strategy, scaled=scaled)
