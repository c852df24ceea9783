"""How the examples of a data set lie in rows, the sequences that steps are made of: one each, or several packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_core.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows of examples. It depends on their lengths and the recipe alone, so that every process finds the same.

    Attributes:
        rows: the examples of each row, by their indexes.
        lengths: tokens of each row.
    """

    rows: list[list[int]]
    lengths: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, which memory is planned for."""
        return max(self.lengths)

    @property
    def waste(self) -> float:
        """The part of all positions that would be padding, were all rows as long as the longest."""
        return 1 - sum(self.lengths) / (len(self.lengths) * self.longest)


def lay_out(lengths: Sequence[int], recipe: Recipe) -> Layout:
    """The rows of a run over examples of such lengths, none longer than the recipe's `seq_len`."""
    rows = pack(lengths, recipe.seq_len) if recipe.packing else [[index] for index in range(len(lengths))]
    return Layout(rows, [sum(lengths[index] for index in row) for row in rows])


HISTOGRAM_BINS = 20


def histogram(lengths: Sequence[int], bins: int = HISTOGRAM_BINS) -> tuple[int, list[int]]:
    """How many of at least one length lie in bins of one width, from 1: that width, and at most `bins` counts."""
    width = max(1, -(-max(lengths) // bins))
    counts = [0] * -(-max(lengths) // width)
    for length in lengths:
        counts[(length - 1) // width] += 1
    return width, counts


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each example, the longest first, into the row with the least space that takes it.

    Needs at most 11/9 of the fewest rows possible, plus one (Johnson et al. 1974, "Worst-case performance bounds for
    simple one-dimensional packing algorithms"). The rows' spaces are the bits of one integer, so that a row is found in
    capacity / 64 words: a million examples into rows of 2,048 take about six seconds.

    Args:
        lengths: tokens of each example, at most `capacity`.

    Returns:
        The rows, as indexes into `lengths`.
    """
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set where a row has space for s tokens
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if enough := spaces >> length:
            space = length + (enough & -enough).bit_length() - 1
            row = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if left := space - length:
            with_space[left].append(row)
            spaces |= 1 << left
    return rows
