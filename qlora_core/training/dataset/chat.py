"""The chat template's part: a conversation as one text, and where its answers stand in it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, tzinfo
from functools import cached_property
from typing import Any, Self, cast
from unittest import mock

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from qlora_core.training.dataset.report import BadRecord
from qlora_core.training.dataset.samples import Span, Written, names, with_texts

Turns = Sequence[dict[str, Any]]
Tools = list[Any] | None
PAD = "\u2003"
"""A space that templates do not write: what stays of it around a content tells whether the template strips it."""
TEMPLATE_ERRORS = (
    TemplateError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
"""What a template may end with, which is a program of its own."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@contextlib.contextmanager
def told_the_day(day: date | None) -> Iterator[None]:
    """Let templates that ask for the date, by `strftime_now`, find that day; None is today.

    transformers offers no other way: the function is its own, made where a template is compiled, and looks at the
    `datetime` of its module (5.23, utils/chat_template_utils.py).
    """
    if day is None:
        yield
        return

    then = datetime.combine(day, time())

    class Then(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(then.timestamp(), tz)

    with mock.patch.object(chat_template_utils, "datetime", Then):
        yield


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a template writes around the contents of turns with certain roles.

    Attributes:
        pieces: the text before, between and after the contents; one more than there are contents.
        stripped: for each content, whether spaces at its beginning, and at its end, are dropped.
        reach: for each turn of the assistant, its index, and the characters before the content and after it that belong
            to the answer too.
    """

    pieces: tuple[str, ...]
    stripped: tuple[tuple[bool, bool], ...]
    reach: tuple[tuple[int, int, int], ...]


class ChatTemplate:
    """Conversations in the tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._end = cast("str | None", tokenizer.eos_token) or ""
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}
        template = tokenizer.chat_template
        self.marks_answers = isinstance(template, str) and bool(_GENERATION.search(template))
        """Whether the template itself says what the assistant generates."""

    def write(self, turns: Turns, tools: Tools = None) -> list[Written]:
        """The text of a conversation and its answers; an answer is what follows the prompt for it, to its turn's end.

        A template may write an answer otherwise once another turn follows: without its reasoning, or without its end.
        Then there is a text for each answer, as it is written where it is the last: as at generation.

        What surrounds the contents is learned once for each sequence of roles. Where the conversation is exactly that
        with its own contents put in, the answers' places follow; else each prefix of it is written out.

        Raises:
            BadRecord: an answer cannot be told from its prompt.
        """
        text = self.whole(turns, tools)
        answers = None
        if tools is None and not any("tool_calls" in turn for turn in turns):
            roles = tuple(turn["role"] for turn in turns)
            if roles not in self._skeletons:
                self._skeletons[roles] = self._skeleton(roles)
            skeleton = self._skeletons[roles]
            answers = None if skeleton is None else placed(skeleton, turns, text)
        written = [Written(text, answers)] if answers is not None else self._by_prefixes(turns, text, tools)
        return weighed(turns, written)

    def whole(self, turns: Turns, tools: Tools = None) -> str:
        """The text of a conversation, with an end if its last answer has none."""
        text = self._rendered(turns, tools)
        ends = turns[-1]["role"] != "assistant" or self._closing.strip()
        return text if ends else text + self._end

    def generated(self, turns: Turns, tools: Tools = None) -> tuple[list[int], list[bool]]:
        """Token ids, and those inside the template's generation blocks, as transformers marks them.

        Raises:
            BadRecord: the blocks hold no token.
        """
        encoded = self._tokenizer.apply_chat_template(
            list(turns), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [bool(flag) for flag in encoded["assistant_masks"]]
        if not any(mask):
            raise BadRecord("the chat template's generation blocks hold no token of it")
        return cast(list[int], encoded["input_ids"]), mask

    def _rendered(self, turns: Turns, tools: Tools = None, prompt: bool = False) -> str:
        def rendered(turns: Turns) -> str:
            template = self._tokenizer.apply_chat_template
            return cast(str, template(list(turns), tools=tools, tokenize=False, add_generation_prompt=prompt))

        try:
            return rendered(turns)
        except TypeError:  # DeepSeek's template adds arguments as they are to its text
            return rendered([with_texts(turn) for turn in turns])

    def _by_prefixes(self, turns: Turns, text: str, tools: Tools = None) -> list[Written]:
        """See `write`; each prefix is written out."""
        single: list[Written] = []
        spans: list[Span | None] = []
        for position, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            prompt, answer = self._answer(turns[: position + 1], tools)
            shortened = lacks_a_part(turn, tools, prompt, answer)
            single.append(Written(prompt + answer, ((len(prompt), len(prompt + answer)),), shortened))
            if not text.startswith(prompt + answer) and self._closing.removesuffix(self._end).strip():
                answer = answer.removesuffix(self._end)  # which stands once, behind the last turn
            spans.append((len(prompt), len(prompt + answer)) if text.startswith(prompt + answer) else None)
        answers = tuple(span for span in spans if span is not None)
        if len(answers) < len(single):
            return single
        return [Written(text, answers, any(one.shortened for one in single))]

    def _answer(self, turns: Turns, tools: Tools) -> tuple[str, str]:
        """The last turn, and all that the template writes before it where it is to be generated."""
        upto = self.whole(turns, tools)
        content = turns[-1]["content"]
        content = content if content in upto else content.strip()
        if len(turns) == 1:
            begins = self._opening if self._opening in upto else ""
            at = upto.find(begins or content)
            if at < 0 or not begins + content:
                raise BadRecord("the chat template does not write the conversation's first answer as it is")
            return upto[: at + len(begins)], upto[at + len(begins) :]
        prompt = self._rendered(turns[:-1], tools, prompt=True)
        if upto.startswith(prompt):
            return prompt, upto[len(prompt) :]
        shared, asked = alike(prompt, upto), self._rendered(turns[:-1], tools)
        if shared >= len(asked):  # the prompt begins a reasoning, and this answer is without one
            return upto[:shared], upto[shared:]
        # A system prompt that is written before the last question alone, as Mistral's: not where an answer follows.
        question = turns[-2]["content"].strip()
        at = upto.rfind(content)
        if question and content and question in prompt and question in upto[: max(at, 0)]:
            header, rest = prompt.rpartition(question)[2], upto[:at].rpartition(question)[2]
            if rest.startswith(header):
                return prompt, upto[at - len(rest) + len(header) :]
        raise BadRecord("the chat template writes the prompt otherwise where an answer follows")

    @cached_property
    def _closing(self) -> str:
        """What the template writes behind an answer that is the last turn; with a word where that cannot be told."""
        mark = "\ue000"
        try:
            text = self._rendered([{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}])
        except TEMPLATE_ERRORS:
            return "unknown"
        return text.rpartition(mark)[2] if mark in text else "unknown"

    @cached_property
    def _opening(self) -> str:
        """What the template writes before an answer that is to be generated; nothing where that cannot be told."""
        turns = [{"role": "user", "content": "a"}]
        try:
            asked, prompt = self._rendered(turns), self._rendered(turns, prompt=True)
        except TEMPLATE_ERRORS:
            return ""
        return prompt[alike(asked, prompt) :]

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """What surrounds contents of turns with these roles; None where that cannot be told."""
        marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
        turns = [{"role": role, "content": PAD + mark + PAD} for role, mark in zip(roles, marks, strict=True)]
        try:
            text = self.whole(turns)
            written = self._by_prefixes(turns, text)
        except TEMPLATE_ERRORS:  # the template looks at contents, which these are not
            return None
        if [one.text for one in written] != [text] or any(text.count(mark) != 1 for mark in marks):
            return None
        contents, stripped = [], []
        for mark in marks:
            start = text.index(mark)
            end = start + len(mark)
            kept = text[:start].endswith(PAD), text[end:].startswith(PAD)
            contents.append((start - kept[0], end + kept[1]))
            stripped.append((not kept[0], not kept[1]))
        if contents != sorted(contents):
            return None
        edges = [0, *(edge for content in contents for edge in content), len(text)]
        pieces = tuple(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))
        asked = (index for index, role in enumerate(roles) if role == "assistant")
        reach = tuple(
            (index, contents[index][0] - start, end - contents[index][1])
            for index, (start, end) in zip(asked, written[0].answers, strict=True)
        )
        return Skeleton(pieces, tuple(stripped), reach)


def lacks_a_part(turn: dict[str, Any], tools: Tools, prompt: str, answer: str) -> bool:
    """Whether something of an answer, or of the tools, is not in the text: spaces aside, which templates change."""
    there, answered = "".join((prompt + answer).split()), "".join(answer.split())
    missing = ["".join(part.split()) not in there for part in (turn["content"], *names(tools))]
    missing += ["".join(name.split()) not in answered for name in names(turn.get("tool_calls"))]
    return any(missing)


def weighed(turns: Turns, written: list[Written]) -> list[Written]:
    """The texts of a conversation without the answers that weigh nothing; one text at least."""
    weights = [turn.get("weight", 1) for turn in turns if turn["role"] == "assistant"]
    if 0 not in weights:
        return written
    if len(written) == 1:
        kept = tuple(answer for answer, weight in zip(written[0].answers, weights, strict=True) if weight != 0)
        return [replace(written[0], answers=kept)]
    left = [text for text, weight in zip(written, weights, strict=True) if weight != 0]
    return left or [replace(written[-1], answers=())]


def alike(left: str, right: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(left), len(right)))


def placed(skeleton: Skeleton, turns: Turns, text: str) -> tuple[Span, ...] | None:
    """The answers' places, if `text` is the skeleton with the contents of `turns`; else None."""
    at = 0
    contents: list[Span] = []
    for piece, (left, right), turn in zip(skeleton.pieces, skeleton.stripped, turns, strict=False):
        content = turn["content"]
        content = content.lstrip() if left else content
        content = content.rstrip() if right else content
        start = at + len(piece)
        end = start + len(content)
        if not text.startswith(piece, at) or not text.startswith(content, start):
            return None
        contents.append((start, end))
        at = end
    if text[at:] != skeleton.pieces[-1]:
        return None
    return tuple((contents[index][0] - before, contents[index][1] + after) for index, before, after in skeleton.reach)
