"""Formats: which columns a record has, and the samples that it becomes. Published datasets are in `presets`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from clusters.errors import nearest, request_error
from qlora_core.training.dataset import presets
from qlora_core.training.dataset.report import BadRecord, EmptyAnswer
from qlora_core.training.dataset.samples import Sample, Text, conversation, pair

Record = Mapping[str, Any]

# Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Format:
    """A way to read records.

    Attributes:
        columns: what a record needs.
        optional: what is read too, where a record has it.
        samples: from a record to its samples; raises BadRecord and EmptyAnswer, or has one in a sample's place.
        begins: how the text of the last of `columns` begins, where the columns alone do not tell.
        whole: reads all records at once instead, because samples are spread over them.
        plain: whether it is text without question and answer.
    """

    columns: tuple[str, ...]
    samples: Callable[[Record], Iterable[Sample | ValueError]]
    begins: str = ""
    optional: tuple[str, ...] = ()
    whole: Callable[[Iterable[tuple[str, Record]]], Iterator[tuple[str, Sample | ValueError]]] | None = None
    plain: bool = False

    def fits(self, record: Record) -> bool:
        """Whether a record looks like it."""
        if any(column not in record for column in self.columns):
            return False
        return not self.begins or str(record[self.columns[-1]]).lstrip().startswith(self.begins)


def messages(record: Record) -> list[Sample]:
    """A conversation as most libraries write it, or as JSON in a table of texts."""
    turns = record["messages"]
    if isinstance(turns, str):
        with suppress(ValueError):
            turns = json.loads(turns)
    return [conversation(turns, "messages", tools=record.get("tools"))]


def question_answer(record: Record) -> list[Sample]:
    """A conversation of two turns, perhaps after a system prompt."""
    system = record.get("system")
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
    return [conversation(turns, "question and answer")]


def alpaca(record: Record) -> list[Sample]:
    """An Alpaca record in the prompt that the model of that name was trained with."""
    fields = {column: record.get(column) for column in ("instruction", "input", "output")}
    fields["input"] = fields["input"] or ""
    if not all(isinstance(text, str) for text in fields.values()):
        raise BadRecord("instruction, input and output must be texts")
    template = ALPACA_WITH_INPUT if fields["input"] else ALPACA_WITHOUT_INPUT
    # not str.format: the texts may hold braces, and are put in one after the other only by name
    return [pair(template.format_map(fields), fields["output"])]


def prompt_completion(record: Record) -> list[Sample]:
    """Two texts that follow each other as they are, or two lists of turns, as TRL has them."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [conversation([*prompt, *completion], "prompt and completion", tools=record.get("tools"))]
    return [pair(prompt, completion)]


def text(record: Record) -> list[Sample]:
    """Plain text, all of it learned."""
    if not isinstance(record["text"], str):
        raise BadRecord("text must be a text")
    if not record["text"].strip():
        raise EmptyAnswer("the text is empty")
    return [Text(record["text"])]


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), messages, optional=("tools",)),
    "sharegpt": Format(("conversations",), presets.sharegpt, optional=("tools",)),
    "oasst1": Format(
        ("message_id", "parent_id", "role", "text"),
        lambda record: [],
        optional=("rank", "deleted"),
        whole=presets.oasst1,
    ),
    "unnatural-instructions": Format(
        ("instruction", "instances"), presets.unnatural_instructions, optional=("reformulations",)
    ),
    "alpaca": Format(("instruction", "output"), alpaca, optional=("input",)),
    "prompt-completion": Format(("prompt", "completion"), prompt_completion, optional=("tools",)),
    "question-answer": Format(("question", "answer"), question_answer, optional=("system",)),
    "flan-v2": Format(("inputs", "targets"), presets.flan_v2),
    "hh-rlhf": Format(("rejected", "chosen"), presets.hh_rlhf, begins="Human:"),
    "longform": Format(("input", "output"), presets.longform),
    "guanaco": Format(("text",), presets.guanaco, begins="### Human:"),
    "chip2": Format(("text",), presets.chip2, begins="<human>:"),
    "text": Format(("text",), text, plain=True),
    # named only: their columns are those of another above
    "self-instruct": Format(("prompt", "completion"), presets.self_instruct),
    "vicuna": Format(("conversations",), presets.sharegpt, optional=("tools",)),
}
"""In the order in which they are tried."""


def find_format(asked: str, record: Record, source: str) -> tuple[str, str]:
    """The name of the format to read by, and how it was found; nothing where it was asked for.

    Raises:
        RequestError: there is none of that name, or none has the record's columns.
    """
    if asked != "auto":
        if asked not in FORMATS:
            remedy = f"Did you mean {nearest(asked, FORMATS)[0]}? Known are {', '.join(FORMATS)}"
            raise request_error("data.format", asked, "there is no such format", remedy)
        return asked, ""
    for name, form in FORMATS.items():
        if form.fits(record):
            begins = f', and the text begins with "{form.begins}"' if form.begins else ""
            return name, f"the first record has the columns {', '.join(sorted(form.columns))}{begins}"
    known = "; ".join(f"{name}: {', '.join(form.columns)}" for name, form in FORMATS.items())
    found = ", ".join(map(str, record)) or "(none)"
    raise request_error("data.format", f"the columns {found} in {source}", "no known format has them", f"Use {known}")


def unread(name: str, record: Record) -> tuple[str, ...]:
    """The columns of a record that a format does not read."""
    form = FORMATS[name]
    return tuple(str(column) for column in record if column not in form.columns + form.optional)


def renamed(
    records: Iterable[tuple[str, Record | BadRecord]], columns: Mapping[str, str]
) -> Iterator[tuple[str, Record | BadRecord]]:
    """Records under the names that formats have for their columns.

    Args:
        columns: the data's names, by a format's.

    Raises:
        RequestError: no format has such a column.
    """
    known = sorted({column for form in FORMATS.values() for column in form.columns + form.optional})
    if unknown := [name for name in columns if name not in known]:
        near = nearest(unknown[0], known)[0]
        remedy = f"Did you mean {near}? The format's name stands first, the data's second; known are {', '.join(known)}"
        raise request_error("data.columns", ", ".join(unknown), "no format has a column of that name", remedy)
    taken = set(columns.values())
    for place, record in records:
        if isinstance(record, BadRecord):
            yield place, record
        elif absent := [name for name in columns.values() if name not in record]:
            yield place, BadRecord(f"it has no column {', '.join(absent)}; it has {', '.join(map(str, record))}")
        else:
            rest = {name: value for name, value in record.items() if name not in taken}
            yield place, {**rest, **{name: record[given] for name, given in columns.items()}}


def samples_of(
    name: str, records: Iterable[tuple[str, Record | ValueError]]
) -> Iterator[tuple[str, Sample | ValueError]]:
    """(place, sample) of every record, or what is wrong with it: a BadRecord or an EmptyAnswer."""
    form = FORMATS[name]
    if form.whole is not None:
        good: list[tuple[str, Record]] = []
        for place, record in records:
            if isinstance(record, ValueError):
                yield place, record
            elif (problem := missing(name, record)) is not None:
                yield place, problem
            else:
                good.append((place, {column: record.get(column) for column in presets.OASST1_COLUMNS}))
        yield from form.whole(good)
        return
    for place, record in records:
        if isinstance(record, ValueError):
            yield place, record
            continue
        if (problem := missing(name, record)) is not None:
            yield place, problem
            continue
        try:
            yield from ((place, sample) for sample in form.samples(record))
        except (BadRecord, EmptyAnswer) as error:
            yield place, error
        except (TypeError, KeyError, AttributeError, ValueError):
            yield place, BadRecord(f"its columns hold something else than format {name} has there")


def missing(name: str, record: Record) -> BadRecord | None:
    """What a record lacks of a format's columns, if anything."""
    absent = [column for column in FORMATS[name].columns if column not in record]
    return BadRecord(f"format {name} needs {' and '.join(absent)}") if absent else None
