"""When nodes may be used: opening hours as OpenStreetMap writes them, on a clock of hours from a beginning."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from datetime import datetime, timedelta

from clusters.errors import Problem, RequestError

ANY_MONDAY = datetime(2001, 1, 1)
"""Where nothing says when the beginning is."""
YEARS = 30
"""So far is looked ahead: longer than any list of jobs."""
OF_A_PLACE = re.compile(r"\b(PH|SH|sunrise|sunset|dawn|dusk)\b")
"""Holidays and the sun: whose, would have to be known."""
NOISE = 1e-9
"""Hours: what sums of floating-point numbers may be off."""


def check_hours(text: str) -> str:
    """A validator of opening hours; without the library that reads them it lets all pass.

    Raises:
        ValueError: they cannot be read, depend on a place, or never come.
    """
    try:
        from opening_hours import OpeningHours, ParserError  # type: ignore[attr-defined]  # its stubs forget it
    except ImportError:
        return text
    if OF_A_PLACE.search(text):
        raise ValueError("it should name days and times alone: holidays and the sun are another matter at each place")
    try:
        OpeningHours(text)
    except ParserError as error:
        at = re.search(r"--> 1:(\d+)", str(error))
        where = f" (it is not, from character {at[1]} on)" if at else ""
        raise ValueError(
            f"it should be opening hours in OpenStreetMap's form, such as Mo-Fr 18:00-08:00; Sa,Su{where}"
        ) from None
    if next(_spans(text, ANY_MONDAY), None) is None:
        raise ValueError("it should name hours that come")
    return text


class OpenHours:
    """When a pool is open. All moments are hours from the beginning.

    Work that begins while it is open pauses when it closes, and goes on when it opens.
    """

    def __init__(self, text: str | None = None, begins: datetime = ANY_MONDAY) -> None:
        """Args:
            text: its opening hours; None where it never closes.
            begins: hour 0, by the clock on the nodes' wall.

        Raises:
            RequestError: the library that reads opening hours is not installed.
        """
        try:
            self._coming = iter([(0.0, math.inf)]) if text is None else _spans(text, begins)
        except ImportError:
            remedy = 'Install it, in a checkout: pip install ".[capacity]"'
            raise RequestError([Problem("hours", str(text), "opening-hours-py is needed to read it", remedy)]) from None
        self.never_closes = text is None
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._opened: list[float] = []  # until the end of each span, all together

    def begin(self, moment: float) -> float:
        """The first moment from `moment` on at which it is open; infinity where it never is again."""
        if self.never_closes:
            return moment
        index = self._not_over(moment)
        return max(moment, self._starts[index]) if index < len(self._starts) else math.inf

    def end(self, start: float, hours: float) -> float:
        """When work of so many hours ends that begins at `start`; infinity where it never does."""
        if self.never_closes:
            return start + hours
        wanted = self.opened(start) + hours
        while not (self._opened and self._opened[-1] >= wanted - NOISE) and self._read():
            pass
        index = bisect_left(self._opened, wanted - NOISE)
        return self._starts[index] + wanted - self._before(index) if index < len(self._starts) else math.inf

    def opened(self, moment: float) -> float:
        """For how many hours it has been open by then."""
        if self.never_closes:
            return moment
        index = self._not_over(moment)
        inside = max(0.0, moment - self._starts[index]) if index < len(self._starts) else 0.0
        return self._before(index) + inside

    def spans(self, start: float, end: float) -> Iterator[tuple[float, float]]:
        """When it is open between two moments."""
        index = self._not_over(start)
        while index < len(self._starts) and self._starts[index] < end:
            yield max(start, self._starts[index]), min(end, self._ends[index])
            index = self._not_over(self._ends[index])

    def _not_over(self, moment: float) -> int:
        """The index of the first span that ends after a moment; how many there are where none does."""
        while not (self._ends and self._ends[-1] > moment) and self._read():
            pass
        return bisect_right(self._ends, moment)

    def _before(self, index: int) -> float:
        """Open hours before a span."""
        return self._opened[index - 1] if index else 0.0

    def _read(self) -> bool:
        """Read one span more; false where there is none."""
        span = next(self._coming, None)
        if span is None:
            return False
        self._opened.append(self._before(len(self._opened)) + span[1] - span[0])
        self._starts.append(span[0])
        self._ends.append(span[1])
        return True


NEVER_CLOSES = OpenHours()


def _spans(text: str, begins: datetime) -> Iterator[tuple[float, float]]:
    """The hours from and to which it is open, those that touch as one."""
    from opening_hours import OpeningHours, State

    def read() -> Iterator[tuple[float, float]]:
        last: tuple[float, float] | None = None
        for start, end, state, _ in OpeningHours(text).intervals(begins, begins + timedelta(days=365 * YEARS)):
            if state != State.OPEN:
                continue
            span = _hours(start, begins), math.inf if end is None else _hours(end, begins)
            if last is not None and span[0] <= last[1]:
                last = last[0], span[1]
                continue
            if last is not None:
                yield last
            last = span
        if last is not None:
            yield last

    return read()


def _hours(moment: datetime, begins: datetime) -> float:
    return (moment - begins) / timedelta(hours=1)
