"""What one structure of a step needs: the arithmetic that is left for a micro-batch and a sequence length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Components, Estimate, GpuEstimate, HostEstimate, Phase, Phases
from qlora_core.memory.reserve import Fragmentation, grown
from qlora_core.memory.residents import Residents
from qlora_core.memory.step import FIRST, LAST, Candidate, Timeline, above_others, highest
from qlora_core.memory.tape import Total, Where, value
from qlora_core.strategy import LOSS_CHUNK_TOKENS


class Sizes:
    """What a structure needs on one rank and one host, for any micro-batch and sequence length.

    Args:
        stays: what neither of them changes.
        times: the step as polynomials in both.
        fragmentation: of reserved memory; None where it is the allocated, on a CPU.
        layers: of the model, for the words of a moment.
    """

    def __init__(
        self, stays: Residents, times: Timeline, device: Device, fragmentation: Fragmentation | None, layers: int
    ) -> None:
        self._stays, self._times, self._layers = stays, times, layers
        self._context, self._fragmentation = device.context_bytes, fragmentation
        self._loaded = sum(stays.loaded.values())
        steady = self._loaded + sum(stays.between.values())
        candidates: dict[Phase, tuple[Candidate, ...]] = {
            "forward": times.forward,
            "backward": times.backward,
            "optimizer": (times.after_backward,),
        }
        self._phases = {phase: (steady + sum(stays.added[phase].values()), of) for phase, of in candidates.items()}
        totals: Iterator[tuple[Total]] = (
            ((resident + a, b, c, d, e),)
            for resident, of in self._phases.values()
            for a, b, c, d, e in (candidate.total for candidate in of)
        )
        self._highest = [total for (total,) in above_others(totals)]

    def process_bytes(self, micro_batch: int, seq_len: int) -> int:
        """What the whole process needs on the GPU: the one figure of `estimate` that a search compares."""
        variables = _variables(micro_batch, seq_len)
        _, positions, tokens, scores, chunk = variables
        allocated = max([a + b * positions + c * tokens + d * scores + e * chunk for a, b, c, d, e in self._highest])
        if self._fragmentation is None:
            return allocated + self._context
        return self._reserved(allocated, variables, (self._fragmentation.typical,))[0] + self._context

    def segments(self, micro_batch: int, seq_len: int) -> int:
        """Bytes of all segments, before fragmentation."""
        return self._segments(_variables(micro_batch, seq_len))

    def estimate(self, micro_batch: int, seq_len: int) -> Estimate:
        """All that `formula.estimate` says."""
        stays, variables = self._stays, _variables(micro_batch, seq_len)
        totals: dict[Phase, int] = {}
        moments: dict[Phase, Candidate] = {}
        for phase, (resident, candidates) in self._phases.items():
            moments[phase] = highest(candidates, variables)
            totals[phase] = resident + value(moments[phase].total, variables)
        peak_phase = max(totals, key=totals.__getitem__)
        peak, allocated = moments[peak_phase], totals[peak_phase]
        parts = dict(stays.loaded)
        varying = {room: value(size, variables) for room, size in peak.rooms.items()}
        for more in (stays.between, stays.added[peak_phase], varying):
            for component, size in more.items():
                parts[component] = parts.get(component, 0) + size
        if self._fragmentation is None:
            low = reserved = high = allocated
        else:
            low, reserved, high = self._reserved(allocated, variables, self._fragmentation)
        return Estimate(
            "formula",
            GpuEstimate(
                components=Components(**parts),
                phases=Phases(stays.load_peak, totals["forward"], totals["backward"], totals["optimizer"]),
                peak_phase=peak_phase,
                peak_moment=in_words(peak_phase, peak.where, self._layers),
                allocated_bytes=allocated,
                reserved_bytes=reserved,
                process_bytes=reserved + self._context,
                paged_bytes=stays.paged,
                reserved_interval=(low, high),
            ),
            HostEstimate(stays.host_load, stays.host_steady),
        )

    def _reserved(self, allocated: int, variables: Sequence[int], shares: Sequence[int]) -> list[int]:
        """Reserved bytes, with these thousandths of what the step allocates lost to fragmentation."""
        least = max(allocated, self._stays.load_peak)
        whole, step = max(least, self._segments(variables)), allocated - self._loaded
        return [max(least, whole + step * share // 1000) for share in shares]

    def _segments(self, variables: Sequence[int]) -> int:
        """Of what stays, and of what comes and goes if no segment is in pieces.

        Gradients, and what the optimizer makes on the way, find room where activations were.
        """
        stays, times = self._stays, self._times
        return stays.segments + value(times.middle, variables) + grown(times.stretches, variables, stays.free_segments)


def in_words(phase: Phase, where: Where, layers: int) -> str:
    """A moment in words, such as "backward of layer 80, while its down_proj is recomputed"."""
    if phase == "optimizer":
        return "optimizer step"
    part, *details = where[1:]
    name = {FIRST: "layer 1", LAST: f"layer {layers}"}.get(part, f"the {part}")
    again = "recomputed" in details
    inner = [detail for detail in details if detail != "recomputed"]
    if not inner:
        return f"{phase} of {name}" + (", while it is recomputed" if again else "")
    verb = "recomputed" if again else {"forward": "computed", "backward": "differentiated"}[phase]
    return f"{phase} of {name}, while its {inner[-1]} is {verb}"


def _variables(micro_batch: int, seq_len: int) -> tuple[int, int, int, int, int]:
    """The values of a polynomial's variables: 1, S, B*S, B*S*S, C."""
    tokens = micro_batch * seq_len
    return 1, seq_len, tokens, tokens * seq_len, min(tokens, LOSS_CHUNK_TOKENS)
