"""Samples as token ids and which of them are learned, many at once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from clusters.errors import request_error
from qlora_core.training.dataset.chat import TEMPLATE_ERRORS, ChatTemplate
from qlora_core.training.dataset.report import BadRecord
from qlora_core.training.dataset.samples import Conversation, Pair, Sample, Span, Text, Written, names

HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, a byte for each that says whether it is learned, and whether an answer lost a part (see `Written`)."""

    ids: list[int]
    learned: bytes
    shortened: bool = False


Outcome = list[Tokens] | ValueError
"""What becomes of a sample: one example, or one for each answer, or what is wrong with it."""


class Encoder:
    """A tokenizer that knows what is to be learned.

    Attributes:
        layout: what conversations were written with so far; nothing where there was none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, learn: str) -> None:
        self._tokenizer, self._learn = tokenizer, learn
        self._template = None if tokenizer.chat_template is None else ChatTemplate(tokenizer)
        self._end = cast("int | None", tokenizer.eos_token_id)
        self.layout = ""

    def encode(self, samples: Sequence[Sample]) -> list[Outcome]:
        """Each sample as its examples, or what is wrong with it.

        Raises:
            RequestError: a conversation that no layout is known for, because the tokenizer has no chat template.
        """
        try:
            return self._all(samples)
        except TEMPLATE_ERRORS:  # of one of them: each for itself tells which
            return [self._alone(sample) for sample in samples]

    def _alone(self, sample: Sample) -> Outcome:
        """One sample; what a template or the tokenizer will not have is bad."""
        try:
            return self._all([sample])[0]
        except BadRecord as error:
            return error
        except TEMPLATE_ERRORS as error:
            if HALF_PAIR.search(json.dumps(dataclasses.asdict(sample), ensure_ascii=False, default=str)):
                return BadRecord("its text holds half of a surrogate pair, which is no character")
            refused = isinstance(error, TemplateError)
            return BadRecord(
                f"{'the chat template refuses it' if refused else 'it cannot be made into tokens'}: {error}"
            )

    def _all(self, samples: Sequence[Sample]) -> list[Outcome]:
        """All samples, or an error for one of them: the kinds apart, each tokenized at once."""
        outcomes: list[Outcome | None] = [None] * len(samples)
        kinds: tuple[tuple[type[Any], Callable[[Any], list[Outcome]]], ...] = (
            (Conversation, self._conversations),
            (Pair, self._pairs),
            (Text, self._texts),
        )
        for kind, encode in kinds:
            places = [index for index, sample in enumerate(samples) if isinstance(sample, kind)]
            if places:
                for index, outcome in zip(places, encode([samples[at] for at in places]), strict=True):
                    outcomes[index] = outcome
        return cast(list[Outcome], outcomes)

    def _conversations(self, samples: Sequence[Conversation]) -> list[Outcome]:
        if self._template is None:
            return self._published(samples)
        self.layout = "the chat template"
        if self._template.marks_answers and self._learn != "all":
            return [self._marked(self._template, sample) for sample in samples]
        written = [self._texts_of(self._template, sample) for sample in samples]
        tokens = iter(self._written([one for texts in written for one in texts], special=False))
        return [[next(tokens) for _ in texts] for texts in written]

    def _marked(self, template: ChatTemplate, sample: Conversation) -> Outcome:
        """A conversation in a template that marks answers; its marks do not tell which of them weigh nothing."""
        if any(turn.get("weight", 1) == 0 for turn in sample.turns):
            return list(self._written(self._texts_of(template, sample), special=False))
        ids, mask = template.generated(sample.turns, sample.tools)
        learned = self._chosen_runs(mask)
        called = {name for turn in sample.turns for name in names(turn.get("tool_calls"))}
        text = self._tokenizer.decode(list(itertools.compress(ids, learned))) if called else ""
        return [Tokens(ids, learned, any(name not in text for name in called))]

    def _texts_of(self, template: ChatTemplate, sample: Conversation) -> list[Written]:
        """A conversation in its template, and what of it is looked at."""
        if self._learn == "all":
            return [Written(template.whole(sample.turns, sample.tools), ())]
        texts = template.write(sample.turns, sample.tools)
        return texts[-1:] if self._learn == "completion" else texts

    def _published(self, samples: Sequence[Conversation]) -> list[Outcome]:
        """Conversations in the layout of the dataset they are from, and the end token."""
        written = [sample.published for sample in samples]
        if any(one is None for one in written):
            raise request_error(
                "data.format",
                "conversations",
                "the model's tokenizer has no chat template",
                "Give one with data.chat_template, or use another format or an instruct model",
            )
        self.layout = "the dataset's own marks of who speaks"
        encoded = self._written(cast(list[Written], written), special=True)
        ends = [sample.turns[-1]["role"] == "assistant" or self._learn == "all" for sample in samples]
        return [[self._ended(one.ids, one.learned, last=end)] for one, end in zip(encoded, ends, strict=True)]

    def _pairs(self, samples: Sequence[Pair]) -> list[Outcome]:
        """Question and answer, each tokenized for itself, as at generation; the end token belongs to the answer."""
        asked = self._tokenized([sample.prompt for sample in samples], special=True)["input_ids"]
        answers = self._tokenized([sample.completion for sample in samples], special=False)["input_ids"]
        outcomes: list[Outcome] = []
        for prompt, answer in zip(asked, answers, strict=True):
            prompt = self._open(prompt)
            ended = self._ended(answer, b"\1" * len(answer), last=True)
            first = b"\1" if self._learn == "all" else b"\0"
            outcomes.append([Tokens(prompt + ended.ids, first * len(prompt) + ended.learned)])
        return outcomes

    def _texts(self, samples: Sequence[Text]) -> list[Outcome]:
        encoded = self._tokenized([sample.text for sample in samples], special=True)["input_ids"]
        opened = [self._open(ids) for ids in encoded]
        return [[self._ended(ids, b"\1" * len(ids), last=True)] for ids in opened]

    def _written(self, written: Sequence[Written], *, special: bool) -> list[Tokens]:
        """Texts with the places of their answers."""
        encoded = self._tokenized([one.text for one in written], special=special)
        found: list[Tokens] = []
        for index, (one, ids) in enumerate(zip(written, encoded["input_ids"], strict=True)):
            if self._learn == "all":
                learned = b"\1" * len(ids)
            else:
                answers = one.answers[-1:] if self._learn == "completion" else one.answers
                flags = bytearray(len(ids))
                for span in answers:
                    first, end = (
                        tokens_of(encoded.encodings[index], one.text, span)
                        if encoded.encodings is not None
                        else self._tokens_by_prefix(one.text, span, ids, special)
                    )
                    flags[first:end] = b"\1" * (end - first)
                learned = bytes(flags)
            if special:
                ids = self._open(ids)
                learned = learned[: len(ids)]
            found.append(Tokens(ids, learned, one.shortened))
        return found

    def _tokens_by_prefix(self, text: str, span: Span, ids: list[int], special: bool) -> tuple[int, int]:
        """See `tokens_of`, of a tokenizer that does not tell where its tokens come from."""
        before, upto = (self._open(self._tokenized([text[:end]], special=special)["input_ids"][0]) for end in span)
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            raise BadRecord("a token reaches over the border of an answer, so answers cannot be found")
        return len(before), len(upto)

    def _tokenized(self, texts: list[str], *, special: bool) -> Any:
        return self._tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            truncation=False,
            padding=False,
            verbose=False,
        )

    def _open(self, ids: list[int]) -> list[int]:
        """Without the end token with which many tokenizers end what they encode: more is to follow."""
        return ids[:-1] if ids and ids[-1] == self._end else ids

    def _ended(self, ids: list[int], learned: bytes, *, last: bool) -> Tokens:
        """With the end token, which is learned or not."""
        if self._end is None:
            return Tokens(ids, learned)
        return Tokens([*ids, self._end], learned + bytes([last]))

    def _chosen_runs(self, mask: list[bool]) -> bytes:
        """A template's own mask; only its last run where the last answer is asked for."""
        flags = bytes(mask)
        if self._learn != "completion":
            return flags
        end = flags.rindex(1) + 1
        start = flags.rfind(0, 0, end) + 1
        return bytes(start) + flags[start:end] + bytes(len(flags) - end)


def tokens_of(encoding: Any, text: str, span: Span) -> tuple[int, int]:
    """The tokens [first, end) of an answer: those whose first character that is no space belongs to it.

    Args:
        encoding: a `tokenizers.Encoding`, which knows where each token comes from.
    """
    start, stop = span
    first = last = None
    at = start
    while at < stop and (first := encoding.char_to_token(at)) is None:  # byte-level tokenizers leave spaces to no token
        at += 1
    if first is None:
        return 0, 0
    begins = encoding.token_to_chars(first)[0]
    if begins < start and text[begins:start].strip():
        first += 1
    at = stop - 1
    while (last := encoding.char_to_token(at)) is None:
        at -= 1
    end = last + 1
    # the bytes of one character may be several tokens, all from the same place
    while end < len(encoding) and (chars := encoding.token_to_chars(end)) is not None and chars[0] < stop:
        if chars[0] == chars[1]:
            break
        end += 1
    return first, max(first, end)
