"""From samples to token ids, and which of them are learned: the answers, with what ends them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from clusters.errors import request_error
from qlora_core.training.dataset.formats import FORMATS, find_format, samples_of
from qlora_core.training.dataset.options import DataOptions
from qlora_core.training.dataset.report import BadRecord, BadRecords, DataReport, EmptyAnswer
from qlora_core.training.dataset.samples import Conversation, Pair, Sample, Text, Written
from qlora_core.training.dataset.sources import Source, find_source
from qlora_core.training.dataset.tokens import EncodedExamples
from qlora_core.training.examples import Encoded

Learned = Literal["assistant", "completion", "all"]
NO_TEMPLATE = "the model's tokenizer has no chat template"


def encode_file(
    path: Path, format_: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, options: DataOptions | None = None
) -> tuple[EncodedExamples, DataReport]:
    """All examples of a file, a folder or a dataset on disk, cut to `seq_len` tokens, and what became of the rest.

    Raises:
        RequestError: the data cannot be used, or more of it is bad than may be; all bad records in one error.
    """
    options = options or DataOptions()
    source = find_source(path, options.split)
    name, found, learn = reading(source, format_, options)
    examples, bad = EncodedExamples.empty(), BadRecords()
    records = truncated = unlearnable = empty = 0
    for place, sample in samples_of(name, source.records()):
        records += 1
        try:
            example = encoded(sample, tokenizer, learn)
        except EmptyAnswer:
            empty += 1
            continue
        except BadRecord as error:
            bad.add(place, str(error))
            continue
        except (TemplateError, ValueError, TypeError) as error:  # a chat template or a tokenizer that will not have it
            bad.add(place, f"it cannot be made into tokens: {error}")
            continue
        # The first token has nothing before it to be predicted from, so it is never learned.
        if not any(example.learned[1:seq_len]):
            unlearnable += 1
            continue
        truncated += len(example.ids) > seq_len
        examples.append(example.ids[:seq_len], bytes(example.learned[:seq_len]))
    bad.check(records, options.max_bad, source.name)
    lengths = examples.lengths
    report = DataReport(
        format=name,
        examples=len(examples),
        truncated=truncated,
        unlearnable=unlearnable,
        longest=max(lengths, default=0),
        tokens=sum(lengths),
        digest=source.digest(),
        token_digest=examples.digest(),
        found=found,
        learn=learn,
        learned=examples.learned_count(),
        empty_answers=empty,
        bad=bad.count,
        bad_records=bad.shown(),
    )
    if not lengths:
        left_out = f": {', '.join(report.left_out())}" if report.left_out() else ""
        rule = f"no example has a token to learn within {seq_len} tokens{left_out}"
        raise request_error("data.path", path, rule, "Raise recipe.seq_len, or look at the data")
    check_vocabulary(examples, tokenizer, options.vocab_size)
    return examples, report


def reading(source: Source, format_: str, options: DataOptions) -> tuple[str, str, Learned]:
    """The format of a source, how it was found, and what of it is learned.

    Raises:
        RequestError: it holds no record, its first has no known columns, or what is to be learned is not in it.
    """
    bad = BadRecords()
    for place, record in source.records():
        if isinstance(record, BadRecord):
            bad.add(place, str(record))
            continue
        name, found = find_format(format_, record, source.name)
        plain = FORMATS[name].plain
        learn: Learned = ("all" if plain else "assistant") if options.learn == "auto" else options.learn
        if plain and learn != "all":
            rule = "the data is plain text, in which nobody answers"
            raise request_error("data.learn", learn, rule, "Leave it out, or name another data.format")
        return name, found, learn
    bad.check(bad.count, 0, source.name)
    raise request_error("data.path", source.name, "it holds no example", "Give data with one example a record")


def check_vocabulary(examples: EncodedExamples, tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Raise a RequestError for a token that the model's embedding has no row for."""
    if rows is not None and (highest := examples.highest()) >= rows:
        raise request_error(
            "model",
            f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r})",
            f"the tokenizer makes it of the data, but the embedding has {rows} rows",
            "Use the tokenizer that belongs to the model, or resize the model's embedding",
        )


# --- one sample -------------------------------------------------------------------------------------------------------


def encoded(sample: Sample | ValueError, tokenizer: PreTrainedTokenizerBase, learn: Learned) -> Encoded:
    """The tokens of a sample.

    Raises:
        BadRecord, EmptyAnswer: it is none.
        RequestError: a conversation, and the tokenizer has no chat template.
    """
    if isinstance(sample, ValueError):
        raise sample
    if isinstance(sample, Text):
        ids = ended(tokens(sample.text, tokenizer, special=True), tokenizer)
        return Encoded(ids, [True] * len(ids))
    if isinstance(sample, Pair):
        example = encode_pair(sample, tokenizer)
    elif tokenizer.chat_template is not None:
        example = encode_conversation(sample, tokenizer, last_only=learn == "completion")
    elif sample.published is not None:
        example = encode_published(sample.published, tokenizer, last_only=learn == "completion")
    else:
        raise request_error("data.format", "messages", NO_TEMPLATE, "Use another format or an instruct model")
    return Encoded(example.ids, [True] * len(example.ids)) if learn == "all" else example


def tokens(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    """The ids of a text, with the tokens that stand around every text or without."""
    return cast(list[int], tokenizer(text, add_special_tokens=special)["input_ids"])


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with the end token, once, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, cast(int, end)]


def encode_pair(sample: Pair, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A prompt and its completion, which is learned with the end token."""
    asked = tokens(sample.prompt, tokenizer, special=True)
    # Many tokenizers end what they encode with the end token, which must not stand between question and answer.
    if asked and asked[-1] == tokenizer.eos_token_id:
        asked = asked[:-1]
    answer = ended(tokens(sample.completion, tokenizer, special=False), tokenizer)
    return Encoded(asked + answer, [False] * len(asked) + [True] * len(answer))


def encode_conversation(sample: Conversation, tokenizer: PreTrainedTokenizerBase, last_only: bool) -> Encoded:
    """A conversation through the chat template; the assistant's turns, with what ends them, are learned."""

    def rendered(turns: Sequence[dict[str, str]], prompt: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(list(turns), add_generation_prompt=prompt, tokenize=True, return_dict=False)
        return cast(list[int], ids)

    turns = sample.turns
    ids = rendered(turns, prompt=False)
    learned = [False] * len(ids)
    answers = [position for position, turn in enumerate(turns) if turn["role"] == "assistant"]
    for position in answers[-1:] if last_only else answers:
        before = rendered(turns[:position], prompt=True) if position else []
        upto = rendered(turns[: position + 1], prompt=False)
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            raise BadRecord(
                "the chat template renders a turn differently once another follows, so answers cannot be found"
            )
        learned[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return Encoded(ids, learned)


def encode_published(sample: Written, tokenizer: PreTrainedTokenizerBase, last_only: bool) -> Encoded:
    """A conversation in the text of its dataset, for a tokenizer without chat template: answers between their marks.

    Each piece is made into tokens by itself, so that no token is part of a question and of an answer.
    """
    ids: list[int] = []
    learned: list[bool] = []
    at = 0
    answers = sample.answers[-1:] if last_only else sample.answers
    for start, end in answers:
        for piece, flag in ((sample.text[at:start], False), (sample.text[start:end], True)):
            if piece:
                made = tokens(piece, tokenizer, special=not ids)
                if not flag and made and made[-1] == tokenizer.eos_token_id:
                    made = made[:-1]
                ids += made
                learned += [flag] * len(made)
        at = end
    rest = tokens(sample.text[at:], tokenizer, special=False) if sample.text[at:].strip() else []
    ids, learned = ids + rest, learned + [False] * len(rest)
    if learned and learned[-1] and len(whole := ended(ids, tokenizer)) > len(ids):
        ids, learned = whole, [*learned, True]
    return Encoded(ids, learned)
