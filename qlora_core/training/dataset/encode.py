"""From data to tokens: every record counted as learned from, cut, left out or refused. The single way in."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from clusters.errors import request_error
from qlora_core.training.dataset import cache
from qlora_core.training.dataset.chat import told_the_day
from qlora_core.training.dataset.formats import FORMATS, Record, find_format, renamed, samples_of, unread
from qlora_core.training.dataset.options import DataOptions
from qlora_core.training.dataset.report import BadRecord, BadRecords, DataReport, EmptyAnswer
from qlora_core.training.dataset.samples import Sample
from qlora_core.training.dataset.sources import INSTEAD, Source, open_source
from qlora_core.training.dataset.tokenize import Encoder, Outcome, Tokens
from qlora_core.training.dataset.tokens import EncodedExamples

AT_ONCE = 128
"""Samples that are rendered and tokenized together."""
THREADS = 3
"""That render and tokenize."""
Chunk = list[tuple[str, Sample | ValueError]]


def encode_file(
    path: Path | str,
    format_: str,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    options: DataOptions = DataOptions(),  # noqa: B008 (frozen)
) -> tuple[EncodedExamples, DataReport]:
    """All examples of the data at `path`, cut to `seq_len` tokens, and what became of them.

    Args:
        path: see `sources`; an address or a Hub id as a text.
        format_: a name of FORMATS, or auto.

    Raises:
        RequestError: the data cannot be used, too many of its records are bad, nothing of it can be learned, or the
            tokenizer knows more tokens than the model.
    """
    with open_source(str(path), options) as source:
        key = cache.key_of(source, format_, tokenizer, seq_len, options)
        kept = cache.load(options.cache, key)
        with parallel_tokenizing(), told_the_day(options.day):
            examples, report = kept or encode_source(source, format_, tokenizer, seq_len, options)
    if kept is None:
        cache.save(options.cache, key, examples, report)
    check_vocabulary(examples, tokenizer, options.vocab_size)
    return examples, report


def encode_source(
    source: Source, format_: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, options: DataOptions
) -> tuple[EncodedExamples, DataReport]:
    """See `encode_file`; one record after the other, so that memory holds tokens and never the data."""
    bad, counted = BadRecords(), itertools.count()
    records: Iterator[tuple[str, Record | BadRecord]]
    records = (record for record, _ in zip(source.records(), counted, strict=False))
    if options.columns:
        records = renamed(records, options.columns)
    held, first = until_good(records)
    if first is None:
        bad_only(bad, held, options, source)
        raise request_error("data.path", source.shown, "the file holds no example", INSTEAD)
    name, found = find_format(format_, first, source.shown)
    learn = learned_part(name, options)
    encoder = Encoder(tokenizer, learn)
    examples = EncodedExamples.of()
    truncated = unlearnable = masked = empty = divided = shortened = in_pieces = 0
    for place, outcome in encoded(encoder, samples_of(name, itertools.chain(held, records))):
        if isinstance(outcome, EmptyAnswer):
            empty += 1
        elif isinstance(outcome, ValueError):
            bad.add(place, str(outcome))
        else:
            divided += len(outcome) > 1
            if FORMATS[name].plain:
                outcome = [piece for tokens in outcome for piece in pieces(tokens, seq_len)]
                in_pieces += len(outcome) > 1
            for tokens in outcome:
                # The first token has nothing before it to be predicted from, so it is never learned.
                if 1 not in tokens.learned[1:seq_len]:
                    unlearnable += 1 in tokens.learned
                    masked += 1 not in tokens.learned
                    continue
                truncated += len(tokens.ids) > seq_len
                shortened += tokens.shortened
                examples.append(tokens.ids[:seq_len], tokens.learned[:seq_len], place)
    bad.check(next(counted), options.max_bad, source.shown)
    report = DataReport(
        format=name,
        examples=len(examples),
        truncated=truncated,
        unlearnable=unlearnable,
        masked=masked,
        longest=max(examples.lengths, default=0),
        tokens=len(examples.ids),
        digest=source.digest,
        token_digest=examples.digest(),
        source=source.shown,
        found=found,
        learn=learn,
        layout=encoder.layout,
        learned=examples.learned_count(),
        unread=unread(name, first),
        in_pieces=in_pieces,
        divided=divided,
        shortened=shortened,
        empty_answers=empty,
        bad=bad.count,
        bad_records=bad.shown(),
    )
    if not examples:
        rule = f"no example has a token to learn within {seq_len} tokens: {', '.join(report.left_out())}"
        remedy = "Raise recipe.seq_len (of evaluate: --seq-len)" if unlearnable else "Check the data"
        raise request_error("data.path", source.shown, rule, remedy)
    return examples, report


def pieces(tokens: Tokens, seq_len: int) -> Iterator[Tokens]:
    """A text in pieces of at most `seq_len` tokens, each of which begins with the last token of the one before it.

    So every token but the first is predicted once.
    """
    for start in range(0, max(1, len(tokens.ids) - 1), max(1, seq_len - 1)):
        yield Tokens(tokens.ids[start : start + seq_len], tokens.learned[start : start + seq_len])


def until_good(
    records: Iterator[tuple[str, Record | BadRecord]],
) -> tuple[list[tuple[str, Record | ValueError]], Record | None]:
    """The records up to the first that is one, and that one; None where there is none."""
    held: list[tuple[str, Record | ValueError]] = []
    for place, record in records:
        held.append((place, record))
        if not isinstance(record, ValueError):
            return held, record
    return held, None


def bad_only(
    bad: BadRecords, held: Iterable[tuple[str, Record | ValueError]], options: DataOptions, source: Source
) -> None:
    """Raise for data that has records, all of them bad."""
    for place, record in held:
        bad.add(place, str(record))
    bad.check(bad.count, options.max_bad, source.shown)


def learned_part(name: str, options: DataOptions) -> str:
    """Which tokens are learned of that format.

    Raises:
        RequestError: answers are asked for of text that has none.
    """
    if not FORMATS[name].plain:
        return "assistant" if options.learn == "auto" else options.learn
    if options.learn not in ("auto", "all"):
        rule = f"format {name} has no answers: all of it is learned"
        raise request_error("data.learn", options.learn, rule, "Leave it out, or choose a format with answers")
    return "all"


def encoded(encoder: Encoder, samples: Iterator[tuple[str, Sample | ValueError]]) -> Iterator[tuple[str, Outcome]]:
    """Samples as examples, many tokenized at once; what is wrong with a sample stays at its place.

    Tokenizing leaves Python's lock: meanwhile another thread reads and renders what comes next.
    """
    waiting: deque[tuple[Chunk, Future[list[Outcome]]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for chunk in iter(lambda: list(itertools.islice(samples, AT_ONCE)), []):
            good = [sample for _, sample in chunk if not isinstance(sample, ValueError)]
            future = pool.submit(encoder.encode, good)
            if not waiting:
                future.result()  # the first call sets the tokenizer up, which no other may be using then
            waiting.append((chunk, future))
            if len(waiting) > THREADS:
                yield from in_place(*waiting.popleft())
        while waiting:
            yield from in_place(*waiting.popleft())


def in_place(chunk: Chunk, future: Future[list[Outcome]]) -> Iterator[tuple[str, Outcome]]:
    """The outcomes of a chunk's samples, each at its place."""
    outcomes = iter(future.result())
    for place, sample in chunk:
        yield place, sample if isinstance(sample, ValueError) else next(outcomes)


def check_vocabulary(examples: EncodedExamples, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Raise a RequestError for tokens, padding among them, that the model's embedding has no row for."""
    if vocab_size is None:
        return
    highest = max(examples.highest(), tokenizer.pad_token_id or 0)
    if highest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(highest)
        rule = f"the tokenizer gives token {highest} ({token!r}), and the model's embedding has {vocab_size} rows"
        raise request_error(
            "model", tokenizer.name_or_path, rule, "Use the tokenizer that belongs to the model, or a resized model"
        )


@contextlib.contextmanager
def parallel_tokenizing() -> Iterator[None]:
    """Let a batch be tokenized on all cores, which `quiet_libraries` turns off for processes that fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
