"""What a request needs on a target: an estimate held against the memory of a GPU and of its host."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.confidence import Spread, bounds
from orchestrator.plans import Target
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

Estimator = Callable[[ModelArchitecture, Recipe, Strategy, Device], Estimate]
"""What the formula and the trace both are."""


def needs(
    architecture: ModelArchitecture,
    recipe: Recipe,
    strategy: Strategy,
    target: Target,
    estimator: Estimator = estimate,
) -> Estimate:
    """The estimate on `target`, whose host holds the paged state that finds no room on its GPUs."""
    needed = estimator(architecture, recipe, strategy, target.device)
    moved = target.device.ranks_per_host * paged_out(needed, target.usable_bytes)
    if not moved:
        return needed
    return needed._replace(host=needed.host._replace(steady_bytes=needed.host.steady_bytes + moved))


def paged_out(needed: Estimate, usable_bytes: int) -> int:
    """Bytes of a rank's paged state that find no room beside the process: the driver moves them to the host.

    It is managed memory, which the GPU touches first (bitsandbytes 0.50.2, functional.py, get_paged and fill), and of
    which pages go to the host when memory runs out (docs/source/explanations/optimizers.mdx).
    """
    gpu = needed.gpu
    return max(0, min(gpu.paged_bytes, gpu.process_bytes + gpu.paged_bytes - usable_bytes))


def bytes_for(needed: Estimate, target: Target, sure: bool, spread: Spread | None) -> int:
    """What a process needs as expected, or in nineteen of twenty cases; `spread` is that of comparable runs."""
    _, expected, most = bounds(needed, target.device.context_bytes, spread)
    return most if sure else expected


def host_has_room(needed: Estimate, target: Target) -> bool:
    """Whether a node's memory suffices, where it is stated."""
    ram = target.pool.host_ram_bytes if target.pool is not None else None
    return ram is None or needed.host.most_bytes <= ram
