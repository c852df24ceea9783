"""What a record becomes before it is tokens: a conversation, a question with its answer, or plain text."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qlora_core.training.dataset.report import BadRecord, EmptyAnswer

ROLES = ("system", "user", "assistant", "tool")
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Written:
    """A text and where its answers stand in it, as character spans, each with what ends the answer.

    Attributes:
        shortened: whether a part of an answer, a call, or a tool, is not in the text.
    """

    text: str
    answers: tuple[Span, ...]
    shortened: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each with a role and a content, what else a chat template may look at, and perhaps a weight.

    An answer of weight 0 is not learned (OpenAI's and Mistral's formats for fine-tuning).

    Attributes:
        tools: that the assistant may call, as JSON schemas; None without.
        published: the same in the layout of the dataset it is from, for a tokenizer without chat template.
    """

    turns: list[dict[str, Any]]
    published: Written | None = None
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """What is asked and what is to be answered, as they are to follow each other."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text without question and answer."""

    text: str


Sample = Conversation | Pair | Text


def conversation(turns: object, column: str, published: Written | None = None, tools: object = None) -> Conversation:
    """The conversation of a list of turns.

    Args:
        tools: a list of JSON schemas, or that as JSON text; nothing without.

    Raises:
        BadRecord: it is no list of turns, their roles are out of order, or none is the assistant's.
        EmptyAnswer: an answer is empty.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRecord(f"{column} is no list of turns")
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRecord(f"{column} is no list of turns")
    turns = [called(turn) for turn in turns]
    for turn in turns:
        if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise BadRecord(f'each turn of {column} needs a "role" and a "content" text')
    before = ""
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in ROLES:
            raise BadRecord(f"turn {number} of {column} has the role {role[:40]!r}; known are {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRecord(f"turn {number} of {column} is the system's, which may only be the first")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRecord(f"turn {number} of {column} is a tool's, which may only follow an answer that calls it")
        if role == before != "tool":
            raise BadRecord(f"turns {number - 1} and {number} of {column} are both the {role}'s; they should alternate")
        if turn.get("weight", 1) not in (0, 1, None):
            raise BadRecord(f"the weight of turn {number} of {column} is {str(turn['weight'])[:40]}; it may be 0 or 1")
        before = role
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise BadRecord(f"{column} has no turn of the assistant, so nothing to learn")
    if not all(answer["content"].strip() or "tool_calls" in answer for answer in answers):
        raise EmptyAnswer(f"an answer in {column} is empty")
    return Conversation(turns, published, functions(tools or [], "tools") or None)


def called(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn without what is nothing in it; its calls of tools with arguments as objects, as chat templates want them.

    OpenAI's format has arguments as JSON text.
    """
    kept = {key: value for key, value in turn.items() if value is not None}
    if not (calls := kept.pop("tool_calls", None)):
        return kept
    kept.setdefault("content", "")
    kept["tool_calls"] = functions(calls, "tool_calls")
    for function in map(function_of, kept["tool_calls"]):
        if isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                function["arguments"] = json.loads(function["arguments"])
    return kept


def functions(given: object, column: str) -> list[Any]:
    """A list of tools or of calls of them, each with a name, or that as JSON text; a copy."""
    if isinstance(given, str):
        with suppress(ValueError):
            given = json.loads(given) if given.strip() else []
    if not isinstance(given, list):
        raise BadRecord(f"{column} is no list")
    for each in given:
        function = function_of(each) if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f'each of {column} needs a "function" with a "name"')
    return copy.deepcopy(given)


def function_of(each: dict[str, Any]) -> Any:
    """What a tool, or a call of one, says of its function; some lists have that alone."""
    return each.get("function", each)


def with_texts(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose calls have their arguments as JSON text."""
    if "tool_calls" not in turn:
        return turn
    turn = copy.deepcopy(turn)
    for function in map(function_of, turn["tool_calls"]):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return turn


def names(each: Sequence[dict[str, Any]] | None) -> list[str]:
    """The names of tools, or of those that are called."""
    return [function_of(one)["name"] for one in each or ()]


def pair(prompt: Any, completion: Any, columns: str = "prompt and completion") -> Pair:
    """A question and its answer.

    Raises:
        BadRecord: one of them is no text, or the question is empty.
        EmptyAnswer: the answer is empty.
    """
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise BadRecord(f"{columns} must be texts")
    if not prompt.strip():
        raise BadRecord("the question is empty")
    if not completion.strip():
        raise EmptyAnswer("the answer is empty")
    return Pair(prompt, completion)
