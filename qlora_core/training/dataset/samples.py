"""What a record becomes before it is tokens: a conversation, a question with its answer, or plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.training.dataset.report import BadRecord, EmptyAnswer

ROLES = ("system", "user", "assistant")
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Written:
    """A text and where its answers stand in it, as character spans, each with what ends the answer.

    Attributes:
        shortened: whether a part of an answer's content is not in the text.
    """

    text: str
    answers: tuple[Span, ...]
    shortened: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, each with a role and a content, what else a chat template may look at, and perhaps a weight.

    An answer of weight 0 is not learned (OpenAI's and Mistral's formats for fine-tuning).

    Attributes:
        published: the same in the layout of the dataset it is from, for a tokenizer without chat template.
    """

    turns: list[dict[str, Any]]
    published: Written | None = None


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


def conversation(turns: object, column: str, published: Written | None = None) -> Conversation:
    """The conversation of a list of turns.

    Raises:
        BadRecord: it is no list of turns, their roles are out of order, or none is the assistant's.
        EmptyAnswer: an answer is empty.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRecord(f"{column} is no list of turns")
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise BadRecord(f'each turn of {column} needs a "role" and a "content" text')
    before = ""
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in ROLES:
            raise BadRecord(f"turn {number} of {column} has the role {role[:40]!r}; known are {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRecord(f"turn {number} of {column} is the system's, which may only be the first")
        if role == before:
            raise BadRecord(f"turns {number - 1} and {number} of {column} are both the {role}'s; they should alternate")
        if turn.get("weight", 1) not in (0, 1, None):
            raise BadRecord(f"the weight of turn {number} of {column} is {str(turn['weight'])[:40]}; it may be 0 or 1")
        before = role
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise BadRecord(f"{column} has no turn of the assistant, so nothing to learn")
    if not all(answer.strip() for answer in answers):
        raise EmptyAnswer(f"an answer in {column} is empty")
    return Conversation([{key: value for key, value in turn.items() if value is not None} for turn in turns], published)


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
