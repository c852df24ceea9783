"""What training keeps for each trained weight, and what ZeRO divides and offloading takes to the host, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from launch.report.words import number, size_text
from orchestrator.plans import Plan
from qlora_core.memory import bytes as exact
from qlora_core.memory.divided import shard_of
from qlora_core.memory.residents import Residents, residents
from qlora_core.memory.sharding import PERSISTENCE_ELEMENTS, Shard
from qlora_core.recipe import DTYPE_BYTES


class Row(NamedTuple):
    """Bytes that are part of a section's, and what they are."""

    size: int
    text: str


def lines_of(rows: Iterable[Row]) -> list[str]:
    """Those of rows that take something, their sizes one below the other."""
    return [f"{size_text(row.size):>12}  {row.text}" for row in rows if row.size]


def trainable(plan: Plan) -> tuple[int, str]:
    """How many weights are trained, and their dtype."""
    numel = sum(size * count for size, count in exact.trainable_tensors(plan.architecture, plan.planned))
    return numel, exact.trainable_dtype(plan.planned, plan.target.compute_dtype)


def gradient_lines(plan: Plan) -> list[str]:
    """Gradients of what is trained."""
    numel, dtype = trainable(plan)
    whole = numel * DTYPE_BYTES[dtype]
    lines = [f"One for each trained weight, in {dtype}: {number(numel)} x {DTYPE_BYTES[dtype]} = {size_text(whole)}."]
    if _shard(plan).stage and plan.strategy.world_size > 1:
        lines.append(f"{_divides(plan)}: each keeps those of its part.")
    if offloads(plan):
        lines.append("Offloading keeps those of a rank's part in the host's memory, in float32.")
    return [*lines, *lines_of(gradient_rows(plan))]


def gradient_rows(plan: Plan) -> list[Row]:
    """The gradients that there are at the peak: those that wait for the optimizer, and what the backward pass holds."""
    gpu, stage = plan.estimate.gpu, plan.strategy.zero_stage
    rows = [row for row in _kept_gradients(plan, _shard(plan)) if row.size]
    rest = gpu.components.gradients - sum(row.size for row in rows)
    if rest < 0 and not stage:  # with DDP earlier micro-batches' sums have moved into the buckets
        *rows, earlier = rows
        return [*rows, Row(earlier.size + rest, f"{earlier.text} that have not moved there")]
    if stage:
        made = "made by the backward pass so far, with what reducing them takes"
    elif rows:
        made = "of the layer whose backward pass is at work"
    elif gpu.peak_phase == "optimizer":
        made = "all of them: the backward pass is done"
    else:
        made = "made by the backward pass so far; layers that it has yet to come to have none"
    return [*rows, Row(rest, made)]


def _kept_gradients(plan: Plan, shard: Shard) -> Iterator[Row]:
    """Those that outlast the backward pass of a micro-batch."""
    phase, several = plan.estimate.gpu.peak_phase, plan.strategy.gradient_accumulation > 1
    passes, dtype = phase != "optimizer", trainable(plan)[1]
    if shard.offload_optimizer and plan.target.device.kind == "cpu":
        yield Row(4 * shard.part_numel, f"offloaded: {number(shard.part_numel)} of its part x 4 bytes")
    reduced = Row(shard.kept_gradient_bytes, f"reduced, in float32: {number(shard.part_numel)} of its part x 4 bytes")
    if shard.stage == 3 or (shard.stage == 2 and several) or (shard.stage and not passes):
        yield reduced
    if not passes and shard.stage == 1 and shard.offload_optimizer and shard.widens:
        yield Row(shard.left_bytes, "ZeRO 1's bucket and what passed it by, which it lets go of last")
    if shard.stage == 0 and shard.world > 1:
        yield Row(shard.trainable, "in DDP's buckets")
    elif shard.stage == 0 and several:
        yield Row(shard.trainable, "summed up over the micro-batches of a step")
    if passes and several and (shard.stage == 1 or (shard.stage == 0 and shard.world > 1)):
        size = shard.numel * shard.gradient_itemsize
        yield Row(size, f"sums of earlier micro-batches, in {'float32' if shard.widens else dtype}")


def optimizer_lines(plan: Plan) -> list[str]:
    """Adam's moments, and what ZeRO adds to them."""
    shard, state = _shard(plan), _state(plan)
    paged = plan.estimate.gpu.paged_bytes
    numel, of_part = shard.numel, ""
    lines: list[str] = []
    if shard.stage and shard.world > 1:
        numel, of_part = shard.part_numel, " of its part"
        lines.append(f"{_divides(plan)}.")
    lines.append(
        f"AdamW keeps two moments for each trained weight{of_part}: {number(numel)} x 2 x {moment_bytes(plan)} bytes."
    )
    if plan.planned.optimizer == "adamw_8bit":
        lines.append(f"Each block of {exact.STATE_BLOCK} of a moment shares one float32 constant.")
    if paged:
        lines.append(f"{size_text(paged)} of that is paged: managed memory, which torch's counters leave out.")
    if plan.strategy.offload != "none":
        same = ", which on a CPU is the same" if plan.target.device.kind == "cpu" else ""
        kept = size_text(state.resident + state.paged + shard.master_bytes)
        lines.append(f"Offloading keeps it, with float32 master weights {kept}, in the host's memory{same}.")
    return [*lines, *lines_of(optimizer_rows(plan))]


def moment_bytes(plan: Plan) -> int:
    """Bytes of one moment of a weight: torch's AdamW keeps it in the weight's dtype, which in ZeRO is float32."""
    if plan.planned.optimizer == "adamw_8bit":
        return 1
    wide = plan.strategy.zero_stage or (plan.strategy.paged_optimizer and plan.target.device.kind == "cuda")
    return 4 if wide else _shard(plan).itemsize


def optimizer_rows(plan: Plan) -> list[Row]:
    """What the optimizer has on the device at the peak: while it steps, what it makes for that, too."""
    shard, stays = _shard(plan), _stays(plan)
    if offloads(plan):
        return []
    masters = Row(shard.master_bytes, f"float32 master weights: {number(shard.part_numel)} x 4 bytes")
    rows = [Row(stays.between["optimizer_state"] - masters.size, "moments"), masters]
    if plan.estimate.gpu.peak_phase == "optimizer":
        taken = shard.stepped_numel if shard.stage and not (shard.widens or shard.offload_optimizer) else 0
        made = stays.added["optimizer"]["optimizer_state"] - 4 * taken
        rows.append(Row(4 * taken, f"a float32 copy of the gradients that it takes at a time: {number(taken)} x 4"))
        rows.append(Row(made, "what the step makes on the way, beyond what it lets go of"))
    return rows


def division_lines(plan: Plan, component: str) -> list[str]:
    """What ZeRO-3 leaves of a component of the weights on a GPU, of which the whole has been said."""
    strategy, stays = plan.strategy, _stays(plan)
    if strategy.zero_stage < 3 or component not in ("base_weights", "unquantized_weights", "lora_weights"):
        return []
    there, away = stays.loaded[component], _offloaded(plan, component)
    whole = stays.added[plan.estimate.gpu.peak_phase].get(component, 0)
    lines: list[str] = []
    if strategy.world_size > 1 and there + away:
        part = size_text(away or there)
        lines.append(f"{_divides(plan)}; what is said above is the whole, a part {part}.")
    if away:
        same = ", which on a CPU is the same" if plan.target.device.kind == "cpu" else ""
        lines.append(f"Offloading keeps it in the host's memory{same}.")
    if whole:
        lines.append(
            f"Tensors of at most {number(PERSISTENCE_ELEMENTS)} elements stay whole beside it: {size_text(whole)}."
        )
    return lines


def host_rows(plan: Plan) -> list[Row]:
    """What one rank keeps on its host while it trains."""
    if not offloads(plan):
        return []
    shard, state, strategy = _shard(plan), _state(plan), plan.strategy
    kept = shard.host_bytes(state.resident + state.paged, strategy.gradient_accumulation > 1)
    copies = "a copy of the reduced gradients"
    if shard.stage < 3:
        copies = "a copy of the new weights, and buffers of gradients on their way"
    rows = [
        Row(_offloaded(plan, "base_weights"), "base weights"),
        Row(_offloaded(plan, "unquantized_weights"), "unquantized weights"),
        Row(state.resident + state.paged, "moments"),
        Row(shard.master_bytes, "float32 master weights"),
        Row(kept["gradients"], "gradients in float32"),
        Row(kept["communication_buffers"], copies),
    ]
    of_rank = plan.estimate.host.steady_bytes // plan.target.device.ranks_per_host
    return [*rows, Row(of_rank - sum(row.size for row in rows), "what the optimizer makes while it steps")]


def offloads(plan: Plan) -> bool:
    """Whether the optimizer's state is in another memory than the estimate's."""
    return plan.strategy.offload != "none" and plan.target.device.kind == "cuda"


def _offloaded(plan: Plan, component: str) -> int:
    """Bytes of a rank's part of a component of the weights that are in the host's memory."""
    weights = exact.weights(plan.architecture, plan.planned, plan.target.compute_dtype)
    sizes = {"base_weights": weights.base, "unquantized_weights": weights.unquantized}.get(component, ())
    if plan.strategy.offload != "all":
        return 0
    return sum(-(-size // plan.strategy.world_size) * count for size, count in sizes)


def _divides(plan: Plan) -> str:
    return f"ZeRO stage {plan.strategy.zero_stage} divides this among {plan.strategy.world_size} workers"


def _shard(plan: Plan) -> Shard:
    return shard_of(plan.architecture, plan.planned, plan.strategy, plan.target.device)


def _stays(plan: Plan) -> Residents:
    return residents(plan.architecture, plan.planned, plan.strategy, plan.target.device)


def _state(plan: Plan) -> exact.OptimizerState:
    """The state of a rank's part, as ZeRO keeps it."""
    paged = plan.strategy.paged_optimizer and plan.target.device.kind == "cuda"
    return exact.optimizer_state([(_shard(plan).part_numel, 1)], plan.planned, 4, paged)
