"""What became of the data: counted, told, and refused where too much of it is bad."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from clusters.errors import Problem, RequestError
from qlora_core.data import left_out

SHOWN_PROBLEMS = 5
"""Bad records that are named one by one; the rest are counted."""


class BadRecord(ValueError):
    """A record that is no training example; the message says why."""


class EmptyAnswer(ValueError):
    """A record that would teach to answer nothing."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the data, for the plan and the run's report.

    Attributes:
        format: the format or preset by which it was read.
        examples: examples that can be trained on.
        truncated: of these, cut off at the longest allowed sequence.
        unlearnable: left out, because no token to learn was within that length.
        masked: left out, because no token is to be learned: all answers have weight 0.
        longest: tokens of the longest example.
        tokens: tokens of all examples.
        digest: names the data in a run's identity: SHA-256 over its files, or a Hub id with commit, config and split.
        token_digest: SHA-256 over the examples as they are learned, which names the tokenizer's part in it.
        source: what was read, as a person would recognise it.
        found: how the format was found; nothing where it was named.
        learn: which tokens are learned: assistant, completion or all.
        layout: what conversations were written with.
        learned: tokens with a loss.
        unread: columns of the first record that the format has no use for.
        in_pieces: plain texts longer than the longest allowed sequence, which became several examples.
        divided: conversations that became an example for each answer, since the chat template writes an answer
            otherwise once another turn follows.
        shortened: examples in whose text a part of an answer, or a tool, is missing: the chat template leaves it out.
        empty_answers: left out, because the answer is empty.
        bad: left out as bad.
        bad_records: the first of them, with place and reason.
        times: how often an epoch has these examples.
    """

    format: str
    examples: int
    truncated: int
    unlearnable: int
    longest: int
    tokens: int
    digest: str
    token_digest: str
    source: str = ""
    found: str = ""
    learn: str = "assistant"
    layout: str = ""
    learned: int = 0
    unread: tuple[str, ...] = ()
    in_pieces: int = 0
    divided: int = 0
    shortened: int = 0
    empty_answers: int = 0
    masked: int = 0
    bad: int = 0
    bad_records: tuple[str, ...] = ()
    times: float = 1

    def left_out(self) -> list[str]:
        """What is not trained on, and why, in words; nothing where all is."""
        return left_out(asdict(self))


@dataclass(slots=True)
class BadRecords:
    """Bad records as they are found: all counted, the first few kept."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """One more, at `place`."""
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append((place, reason))

    def check(self, records: int, max_bad: float, source: str) -> None:
        """Raise a RequestError for more than `max_bad` of `records`: the first few with place and reason."""
        if self.count <= (max_bad * records if max_bad < 1 else max_bad):
            return
        remedy = "Correct or remove it"
        problems = [Problem(place, "", reason, remedy) for place, reason in self.first]
        if (more := self.count - len(self.first)) > 0:
            problems.append(Problem(source, "", f"{more} more records are bad", "Check how the data was written"))
        rule = f"{self.count} of {records} records are bad, and {allowed(max_bad)} may be"
        problems.append(Problem("data.max_bad", str(max_bad), rule, "Correct them, or raise it to leave them out"))
        raise RequestError(problems)

    def shown(self) -> tuple[str, ...]:
        """The first few, each in a line."""
        return tuple(f"{place}: {reason}" for place, reason in self.first)


def allowed(max_bad: float) -> str:
    """A limit of bad records in words."""
    return f"{max_bad:.3%}" if 0 < max_bad < 1 else "none" if not max_bad else f"{max_bad:g}"
