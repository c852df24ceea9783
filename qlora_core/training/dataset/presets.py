"""The published columns of the datasets of the QLoRA paper (appendix B), each as samples.

Where text is published with its own marks of who speaks, they are kept for tokenizers without a chat template.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qlora_core.training.dataset.report import BadRecord, EmptyAnswer
from qlora_core.training.dataset.samples import Conversation, Sample, Span, Written, conversation, pair

Record = Mapping[str, Any]

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names of who speaks (FastChat, data/clean_sharegpt.py, and what other exports use)."""
OASST1_COLUMNS = ("message_id", "parent_id", "role", "text", "rank", "deleted")
_PUBLISHED = {"prompter": "### Human:", "assistant": "### Assistant:"}
_CHIP2 = "<human>:", "<bot>:"
_HH_RLHF = "\n\nHuman:", "\n\nAssistant:"


def sharegpt(record: Record) -> list[Sample]:
    """ShareGPT, and so Vicuna's: {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}."""
    turns = record["conversations"]
    if isinstance(turns, Sequence) and all(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        turns = [
            {
                **{key: value for key, value in turn.items() if key not in ("from", "value")},
                "role": SPEAKERS.get(str(turn["from"]).lower(), turn["from"]),
                "content": turn.get("value"),
            }
            for turn in turns
        ]
    return [conversation(turns, "conversations", tools=record.get("tools"))]


def flan_v2(record: Record) -> list[Sample]:
    """FLAN v2 as exported to the Hub: inputs and targets, which follow each other as they are."""
    return [pair(record["inputs"], record["targets"], "inputs and targets")]


def longform(record: Record) -> list[Sample]:
    """akoksal/LongForm: input and output."""
    return [pair(record["input"], record["output"], "input and output")]


def self_instruct(record: Record) -> list[Sample]:
    """yizhongw/self_instruct: prompt and completion; older revisions end completions with GPT-3's end token."""
    completion = record["completion"]
    if isinstance(completion, str):
        completion = completion.removesuffix("<|endoftext|>")
    return [pair(record["prompt"], completion)]


def unnatural_instructions(record: Record) -> list[Sample | ValueError]:
    """Unnatural Instructions, core and full: a sample for each of `instances`, and of `reformulations` where it is.

    What is wrong with one of them stands in its place, beside the others.
    """
    samples: list[Sample | ValueError] = []
    for column in ("instances", "reformulations"):
        for instance in rows(record.get(column) or [], column):
            try:
                samples.append(pair(instance.get("instruction_with_input"), instance.get("output"), f"{column}' texts"))
            except (BadRecord, EmptyAnswer) as error:
                samples.append(error)
    if not samples:
        raise BadRecord("instances is empty")
    return samples


def rows(column: Any, name: str) -> list[Mapping[str, Any]]:
    """A list of objects; `datasets` has stored some as an object of lists."""
    if isinstance(column, Mapping):
        return [dict(zip(column, values, strict=False)) for values in zip(*column.values(), strict=False)]
    if not isinstance(column, Sequence) or not all(isinstance(row, Mapping) for row in column):
        raise BadRecord(f"{name} is no list of objects")
    return list(column)


def hh_rlhf(record: Record) -> list[Sample]:
    r"""Anthropic/hh-rlhf: the chosen of the two transcripts, "\n\nHuman: ...\n\nAssistant: ..."."""
    return [transcript(record["chosen"], "chosen", *_HH_RLHF)]


def guanaco(record: Record) -> list[Sample]:
    """timdettmers/openassistant-guanaco: "### Human: ...### Assistant: ..."."""
    return [transcript(record["text"], "text", *_PUBLISHED.values())]


def chip2(record: Record) -> list[Sample]:
    r"""unified_chip2.jsonl of laion/OIG: "<human>: ...\n<bot>: ..."."""
    return [transcript(record["text"], "text", *_CHIP2)]


def transcript(text: object, column: str, user: str, assistant: str) -> Conversation:
    """A conversation that is published as one text with marks of who speaks.

    Raises:
        BadRecord: it does not begin with such a mark; else as `conversation`.
        EmptyAnswer: an answer is empty.
    """
    if not isinstance(text, str):
        raise BadRecord(f"{column} must be a text")
    marks = list(re.finditer(f"{re.escape(user)}|{re.escape(assistant)}", text))
    if not marks or text[: marks[0].start()].strip():
        raise BadRecord(f"{column} does not begin with {user.strip()!r} or {assistant.strip()!r}")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns: list[dict[str, str]] = []
    answers: list[Span] = []
    for index, (mark, end) in enumerate(zip(marks, ends, strict=True)):
        role = "user" if mark.group() == user else "assistant"
        turns.append({"role": role, "content": text[mark.end() : end].strip()})
        if role == "assistant":
            # what ends an answer is the mark that follows it; after the last one the end token does
            answers.append((mark.end(), marks[index + 1].end() if index + 1 < len(marks) else len(text)))
    return conversation(turns, column, Written(text, tuple(answers)))


def oasst1(records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Sample | ValueError]]:
    """OpenAssistant/oasst1: one row a message; of each tree the branch of the top-ranked replies.

    Among siblings rank 0 is the best (OpenAssistant Conversations, section 3; QLoRA, appendix B.1: "the top reply at
    each level"). Replies of prompters carry no rank in many trees: those come last, in the order of the file.
    """
    children: dict[str | None, list[tuple[str, Record]]] = {}
    known: set[str | None] = {None}
    for place, record in records:
        parent = record["parent_id"] or None  # a table of text has an empty one where there is none
        if not all(isinstance(each, str) for each in (record["message_id"], parent or "", record["role"])):
            yield place, BadRecord("message_id, parent_id and role must be texts")
            continue
        known.add(record["message_id"])
        if str(record.get("deleted")).lower() not in ("true", "1"):  # a table of text has the word
            children.setdefault(parent, []).append((place, record))
    for place, _ in (each for parent, replies in children.items() if parent not in known for each in replies):
        yield place, BadRecord("it answers a message that the data does not hold")
    for place, root in children.get(None, []):
        try:
            yield place, branch(root, children)
        except (BadRecord, EmptyAnswer) as error:
            yield place, error


def branch(root: Record, children: Mapping[str | None, list[tuple[str, Record]]]) -> Conversation:
    """The top-ranked branch from `root`, down to the last answer on it."""
    path, seen = [root], {root["message_id"]}
    while replies := children.get(path[-1]["message_id"]):
        _, best = min(replies, key=lambda reply: rank_of(reply[1]))
        if best["message_id"] in seen:
            raise BadRecord(f"message {best['message_id']} answers itself")
        seen.add(best["message_id"])
        path.append(best)
    if len(path) > 1 and path[-1]["role"] == "prompter":
        path.pop()
    if not all(isinstance(message["text"], str) and message["role"] in _PUBLISHED for message in path):
        raise BadRecord('each message needs a text and the role "prompter" or "assistant"')
    text = "".join(f"{_PUBLISHED[message['role']]} {message['text']}" for message in path)
    turns = [
        {"role": "user" if message["role"] == "prompter" else "assistant", "content": message["text"]}
        for message in path
    ]
    return conversation(turns, "the tree", Written(text, spans(path)))


def spans(path: Sequence[Record]) -> tuple[Span, ...]:
    """Where the answers stand in the text of a branch, each with the mark that follows it."""
    found: list[Span] = []
    at = 0
    for message in path:
        start = at + len(_PUBLISHED[message["role"]])
        at = start + 1 + len(message["text"])
        if message["role"] == "assistant":
            following = len(_PUBLISHED["prompter"]) if message is not path[-1] else 0
            found.append((start, at + following))
    return tuple(found)


def rank_of(record: Record) -> float:
    """0 is the best; without a rank, last.

    Raises:
        BadRecord: it is no number.
    """
    rank = record.get("rank")
    if rank is None or rank == "":
        return math.inf
    try:
        number = float(rank)
    except (TypeError, ValueError):
        raise BadRecord(f"the rank {str(rank)[:40]!r} is no number") from None
    return math.inf if math.isnan(number) else number
