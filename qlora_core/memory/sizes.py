"""What one structure of a step needs: the arithmetic that is left for a micro-batch and a sequence length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Components, Estimate, GpuEstimate, Phase, Phases
from qlora_core.memory.reserve import CHECKPOINTED, KEPT, Growth, slack
from qlora_core.memory.residents import Residents
from qlora_core.memory.step import FIRST, LAST
from qlora_core.memory.tape import Size, Total, Where, value
from qlora_core.memory.timeline import Candidate, Timeline, above_others, highest
from qlora_core.strategy import LOSS_CHUNK_TOKENS, Strategy


class Repeated(NamedTuple):
    """How layers repeat: so many periods of so many, whose sequences are filled up to whole chunks of tokens."""

    periods: int
    period: int = 1
    chunk: int = 1


class Sizes:
    """What a structure needs, for any micro-batch and sequence length.

    Args:
        device: of any context and any number of ranks on a host.
        stays: what neither of them changes.
        times: the step as polynomials in both.
        strategy: of any micro-batch.
        layers: how they repeat.
        head_trained: the output head is, so that a chunked loss is computed again in the backward pass.
    """

    def __init__(
        self,
        stays: Residents,
        times: Timeline,
        device: Device,
        strategy: Strategy,
        layers: Repeated,
        head_trained: bool,
    ) -> None:
        self._stays, self._layers = stays, layers
        self._checkpointing = strategy.gradient_checkpointing
        self._chunks_again = strategy.loss == "chunked" and head_trained
        self._growth: Growth | None = None
        """None on a CPU, where the reserved is the allocated."""
        if device.kind == "cuda":
            self._growth = Growth(times.stretches, times.kept, self._checkpointing, stays.holes)
        self._loaded = sum(stays.loaded.values())
        self._candidates: dict[Phase, tuple[Candidate, ...]] = {
            "forward": times.forward,
            "backward": times.backward,
            "optimizer": (times.after_backward,),
        }
        self._parts = {phase: _sum(stays.loaded, stays.between, stays.added[phase]) for phase in self._candidates}
        """By phase, what neither of them changes."""
        self._resident = {phase: sum(parts.values()) for phase, parts in self._parts.items()}
        self._optimizer = times.after_backward.total.plus(Size(fixed=self._resident["optimizer"]))
        self._too_large = self._growth is not None and not self._checkpointing
        """Checkpoints come into room that was used before; what all layers keep, into segments of its own."""
        self._in_passes = _in_passes(times, self._resident, apart=self._too_large)

    def reserved_bytes(self, micro_batch: int, seq_len: int) -> int:
        """The one figure of `estimate` that a search for the largest compares."""
        return self._reserved(self.allocated_bytes(micro_batch, seq_len), micro_batch, seq_len)[1]

    def allocated_bytes(self, micro_batch: int, seq_len: int) -> int:
        """What a rank needs at least, however well its tensors are placed."""
        variables = variables_of(micro_batch, seq_len, self._layers.chunk)
        slack = self._slack(variables)
        most = [_most(totals, variables) + self._part(slack, keeping) for keeping, totals in self._in_passes.items()]
        return max(*most, value(self._optimizer, variables))

    def segments(self, micro_batch: int, seq_len: int) -> int:
        """Bytes of all segments, before fragmentation; 0 on a CPU.

        Gradients, and what the optimizer makes on the way, find room where activations were.
        """
        if self._growth is None:
            return 0
        several = self._chunks_again and has_several_chunks(micro_batch, seq_len)
        last_chunk = labels_of(micro_batch, seq_len) % LOSS_CHUNK_TOKENS if several else 0
        return self._stays.segments + self._growth.at(
            variables_of(micro_batch, seq_len, self._layers.chunk), last_chunk
        )

    def estimate(self, micro_batch: int, seq_len: int, context_bytes: int, ranks: int) -> Estimate:
        """All that `formula.estimate` says, of so many ranks on a host."""
        stays, variables = self._stays, variables_of(micro_batch, seq_len, self._layers.chunk)
        slack = self._slack(variables)
        totals: dict[Phase, int] = {}
        moments: dict[Phase, Candidate] = {}
        for phase, candidates in self._candidates.items():
            moments[phase], most = self._highest(candidates, variables, slack)
            totals[phase] = self._resident[phase] + most
        peak_phase = max(totals, key=totals.__getitem__)
        peak, allocated = moments[peak_phase], totals[peak_phase]
        low, reserved, high = self._reserved(allocated, micro_batch, seq_len)
        return Estimate(
            "formula",
            GpuEstimate(
                components=self._components(peak_phase, peak, variables, slack),
                phases=Phases(stays.load_peak, totals["forward"], totals["backward"], totals["optimizer"]),
                peak_phase=peak_phase,
                peak_moment=in_words(peak_phase, peak.where, self._layers),
                allocated_bytes=allocated,
                reserved_bytes=reserved,
                process_bytes=reserved + context_bytes,
                paged_bytes=stays.paged,
                reserved_interval=(low, high),
            ),
            stays.host(ranks),
        )

    def between_steps(self) -> Components:
        """What is there before a step begins."""
        return Components(**_sum(self._stays.loaded, self._stays.between))

    def optimizer_step(self, micro_batch: int, seq_len: int) -> Components:
        """What is there while the optimizer works."""
        (candidate,) = self._candidates["optimizer"]
        return self._components("optimizer", candidate, variables_of(micro_batch, seq_len, self._layers.chunk), 0)

    def highest(self, phase: Phase, candidates: Sequence[Candidate], micro_batch: int, seq_len: int) -> Components:
        """What is there at the highest of some moments of a pass."""
        variables = variables_of(micro_batch, seq_len, self._layers.chunk)
        slack = self._slack(variables)
        return self._components(phase, self._highest(candidates, variables, slack)[0], variables, slack)

    def _highest(self, candidates: Sequence[Candidate], variables: Sequence[int], slack: int) -> tuple[Candidate, int]:
        """The highest of some moments, and what is there beside what stays."""
        if not slack:
            found = highest(candidates, variables)
            return found, value(found.total, variables)
        sizes = [value(each.total, variables) + self._part(slack, each.keeping) for each in candidates]
        most = max(sizes)
        return candidates[sizes.index(most)], most

    def _components(self, phase: Phase, moment: Candidate, variables: Sequence[int], slack: int) -> Components:
        """What is there at a moment."""
        parts = self._parts[phase].copy()
        for room, size in moment.rooms.items():
            parts[room] = parts.get(room, 0) + value(size, variables)
        parts["framework"] += self._part(slack, moment.keeping)
        return Components(**parts)

    def _slack(self, variables: Sequence[int]) -> int:
        """What blocks are too large of what all layers in between keep."""
        return slack(self._growth.kept(variables)) if self._growth is not None and self._too_large else 0

    def _part(self, slack: int, keeping: int) -> int:
        """So many layers' of it."""
        return slack * keeping // max(self._layers.periods - 2, 1)

    def _reserved(self, allocated: int, micro_batch: int, seq_len: int) -> tuple[int, int, int]:
        """Reserved bytes: the least in nine cases of ten, what is typical, the most."""
        if self._growth is None:
            return allocated, allocated, allocated
        least = max(allocated, self._stays.load_peak)
        segments = max(least, self.segments(micro_batch, seq_len))
        scale = math.isqrt(allocated * max(allocated - self._loaded, 0))
        low, typical, high = CHECKPOINTED if self._checkpointing else KEPT
        return (
            max(least, segments + scale * low // 1000),
            segments + scale * typical // 1000,
            segments + scale * high // 1000,
        )


def labels_of(micro_batch: int, seq_len: int) -> int:
    """Tokens that are learned, at the most: no sample's first is."""
    return micro_batch * (seq_len - 1)


def has_several_chunks(micro_batch: int, seq_len: int) -> bool:
    """Whether a chunked loss has more than one."""
    return labels_of(micro_batch, seq_len) > LOSS_CHUNK_TOKENS


class Least:
    """What is allocated at least where `times` is a step that needs no more than the one in question.

    Optimizer state is left out: of parts that are too small to be paged there would be more.
    """

    def __init__(self, stays: Residents, times: Timeline, layers: Repeated) -> None:
        self._layers = layers
        between = {component: size for component, size in stays.between.items() if component != "optimizer_state"}
        resident = {phase: sum(_sum(stays.loaded, between, added).values()) for phase, added in stays.added.items()}
        (self._in_passes,) = _in_passes(times, resident, apart=False).values()

    def bytes(self, micro_batch: int, seq_len: int) -> int:
        """In either pass."""
        return _most(self._in_passes, variables_of(micro_batch, seq_len, self._layers.chunk))


def _in_passes(times: Timeline, resident: Mapping[Phase, int], *, apart: bool) -> dict[int, list[Total]]:
    """The candidates of both passes, with what stays meanwhile, that are the highest for some size.

    All of them, or `apart` those at which as many of the layers in between keep what the backward pass needs.
    """
    totals: dict[int, list[tuple[Total]]] = {}
    passing: tuple[tuple[Phase, tuple[Candidate, ...]], ...] = (
        ("forward", times.forward),
        ("backward", times.backward),
    )
    for phase, candidates in passing:
        for each in candidates:
            total = resident[phase] + each.total.fixed, *each.total[1:]
            totals.setdefault(each.keeping if apart else 0, []).append((total,))
    return {keeping: [total for (total,) in above_others(found)] for keeping, found in totals.items()}


def _most(totals: Iterable[Total], variables: Sequence[int]) -> int:
    """The highest of them where the polynomials' variables have these values."""
    _, positions, tokens, scores, chunk = variables
    return max([a + b * positions + c * tokens + d * scores + e * chunk for a, b, c, d, e in totals])


def _sum(*of: dict[str, int]) -> dict[str, int]:
    """All together, part by part."""
    total: dict[str, int] = {}
    for parts in of:
        for part, size in parts.items():
            total[part] = total.get(part, 0) + size
    return total


@lru_cache(maxsize=1024)
def in_words(phase: Phase, where: Where, layers: Repeated) -> str:
    """A moment in words, such as "backward of layer 80, while its down_proj is recomputed"."""
    if phase == "optimizer":
        return "optimizer step"
    part, *details = where[1:]
    again = "recomputed" in details
    inner = [detail for detail in details if detail != "recomputed"]
    within = int(inner.pop(0)) if inner and inner[0].isdigit() else 0
    before = {FIRST: 0, LAST: (layers.periods - 1) * layers.period}.get(part)
    name = f"the {part}" if before is None else f"layer {before + within + 1}"
    if not inner:
        return f"{phase} of {name}" + (", while it is recomputed" if again else "")
    verb = "recomputed" if again else {"forward": "computed", "backward": "differentiated"}[phase]
    return f"{phase} of {name}, while its {inner[-1]} is {verb}"


def variables_of(micro_batch: int, seq_len: int, chunk: int) -> tuple[int, int, int, int, int]:
    """The values of a polynomial's variables: 1, S, B*S, B*S*S, C.

    Where layers take whole chunks, all that there is of a sequence is counted as if it had so many tokens.
    """
    seq_len += -seq_len % chunk
    tokens = micro_batch * seq_len
    return 1, seq_len, tokens, tokens * seq_len, min(tokens, LOSS_CHUNK_TOKENS)
