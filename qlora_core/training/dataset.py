"""Instruction data: read from JSONL and made into tokens, once.

Formats: ``messages`` (a conversation, through the tokenizer's chat template), ``alpaca`` (instruction, input, output)
and ``prompt-completion``. The loss is on what the model is to answer, never on what it is asked.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from clusters.errors import Problem, RequestError, request_error
from qlora_core.training.examples import Encoded

Format = Literal["auto", "messages", "alpaca", "prompt-completion"]
COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
}
SHOWN_PROBLEMS = 5
"""Bad lines that are named one by one; the rest are counted."""

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


class BadRecord(ValueError):
    """A line of the data that is no training example; the message says why."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What became of the data, for the plan and the run's report.

    Attributes:
        examples: examples that can be trained on.
        truncated: of these, cut off at the longest allowed sequence.
        unlearnable: left out, because no token to learn was within that length.
        longest: tokens of the longest example.
        tokens: tokens of all examples.
        digest: SHA-256 over the data file, which names the data in a run's identity.
        token_digest: SHA-256 over the examples as they are learned, which names the tokenizer's part in it.
    """

    format: str
    examples: int
    truncated: int
    unlearnable: int
    longest: int
    tokens: int
    digest: str
    token_digest: str


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The (line number, object) pairs of a JSONL file; blank lines are skipped.

    Raises:
        RequestError: no such file, nothing in it, or lines that are no JSON objects, with their numbers.
    """
    if path.is_dir():
        raise request_error("data.path", path, "it is a folder", "Give the path of a JSONL file")
    if not path.is_file():
        raise request_error("data.path", path, "there is no such file", "Give the path of a JSONL file")
    if not os.access(path, os.R_OK):
        raise request_error("data.path", path, "it may not be read", "Change its permissions")
    records: list[tuple[int, dict[str, Any]]] = []
    bad: list[tuple[int, str]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                bad.append((number, "it is not UTF-8"))
                continue
            except json.JSONDecodeError as error:
                bad.append((number, f"it is not JSON: {error.msg} at column {error.colno}"))
                continue
            except RecursionError:
                bad.append((number, "it is nested too deeply"))
                continue
            if isinstance(record, dict):
                records.append((number, record))
            else:
                bad.append((number, f"it is a JSON {type(record).__name__}, not an object"))
    if bad:
        raise bad_lines(path, bad)
    if not records:
        raise request_error("data.path", path, "the file holds no example", "Give a JSONL file with one object a line")
    return records


def bad_lines(path: Path, bad: Sequence[tuple[int, str]]) -> RequestError:
    """One error for all bad lines of a file: the first few with number and reason, the rest counted."""
    problems = [
        Problem(f"{path}, line {number}", "", reason, "Correct or remove that line")
        for number, reason in bad[:SHOWN_PROBLEMS]
    ]
    if (more := len(bad) - SHOWN_PROBLEMS) > 0:
        problems.append(Problem(str(path), "", f"{more} more lines are bad", "Check how the file was written"))
    return RequestError(problems)


def detect_format(record: Mapping[str, Any], path: Path) -> str:
    """The format whose columns the first record has."""
    for name, columns in COLUMNS.items():
        if all(column in record for column in columns):
            return name
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
    raise request_error(
        "data.format",
        f"the columns {', '.join(record) or '(none)'} in {path}",
        "no known format has them",
        f"Use {known}",
    )


def encode_messages(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A conversation through the chat template; the assistant's turns, with what ends them, are learned."""
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise BadRecord("messages is no list of turns")
    for turn in messages:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise BadRecord('each turn of messages needs a "role" and a "content" text')
    if not any(turn["role"] == "assistant" for turn in messages):
        raise BadRecord("messages has no turn of the assistant, so nothing to learn")

    def rendered(turns: list[dict[str, str]], prompt: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        return cast(list[int], ids)

    ids = rendered(messages, prompt=False)
    learned = [False] * len(ids)
    for position, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = rendered(messages[:position], prompt=True) if position else []
        upto = rendered(messages[: position + 1], prompt=False)
        if ids[: len(upto)] != upto or upto[: len(before)] != before:
            raise BadRecord(
                "the chat template renders a turn differently once another follows, so answers cannot be found"
            )
        learned[len(before) : len(upto)] = [True] * (len(upto) - len(before))
    return Encoded(ids, learned)


def encode_pair(prompt: object, completion: object, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """A prompt and its completion, which is learned with the end token."""
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise BadRecord("prompt and completion must be texts")
    if not prompt.strip():
        raise BadRecord("the question is empty")
    if not completion.strip():
        raise BadRecord("the answer is empty")
    asked = cast(list[int], tokenizer(prompt, add_special_tokens=True)["input_ids"])
    # Many tokenizers end what they encode with the end token, which must not stand between question and answer.
    if asked and asked[-1] == tokenizer.eos_token_id:
        asked = asked[:-1]
    answer = cast(list[int], tokenizer(completion, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        answer = [*answer, cast(int, tokenizer.eos_token_id)]
    return Encoded(asked + answer, [False] * len(asked) + [True] * len(answer))


def encode_alpaca(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """An Alpaca record in the prompt that the model of that name was trained with."""
    if not all(isinstance(record.get(column, ""), str) for column in ("instruction", "input", "output")):
        raise BadRecord("instruction, input and output must be texts")
    template = ALPACA_WITH_INPUT if record.get("input") else ALPACA_WITHOUT_INPUT
    return encode_pair(template.format_map({"input": "", **record}), record["output"], tokenizer)


def encoder(name: str) -> Callable[[Mapping[str, Any], PreTrainedTokenizerBase], Encoded]:
    """The function that encodes records of a format."""
    return {
        "messages": encode_messages,
        "alpaca": encode_alpaca,
        "prompt-completion": lambda record, tokenizer: encode_pair(record["prompt"], record["completion"], tokenizer),
    }[name]


def encode_file(
    path: Path, format_: Format, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> tuple[list[Encoded], DataReport]:
    """All examples of a data file, cut to `seq_len` tokens, and what became of them.

    Raises:
        RequestError: the file or lines of it cannot be used; all bad lines in one error.
    """
    records = read_records(path)
    name = detect_format(records[0][1], path) if format_ == "auto" else format_
    if name == "messages" and tokenizer.chat_template is None:
        raise request_error(
            "data.format",
            "messages",
            "the model's tokenizer has no chat template",
            "Use another format or an instruct model",
        )
    encode = encoder(name)
    examples: list[Encoded] = []
    bad: list[tuple[int, str]] = []
    truncated = unlearnable = 0
    for number, record in records:
        missing = [column for column in COLUMNS[name] if column not in record]
        if missing:
            bad.append((number, f"format {name} needs {' and '.join(missing)}"))
            continue
        try:
            example = encode(record, tokenizer)
        except BadRecord as error:
            bad.append((number, str(error)))
            continue
        except (TemplateError, ValueError, TypeError) as error:  # a chat template or a tokenizer that will not have it
            bad.append((number, f"it cannot be made into tokens: {error}"))
            continue
        # The first token has nothing before it to be predicted from, so it is never learned.
        if not any(example.learned[1:seq_len]):
            unlearnable += 1
            continue
        truncated += len(example.ids) > seq_len
        examples.append(Encoded(example.ids[:seq_len], example.learned[:seq_len]))
    if bad:
        raise bad_lines(path, bad)
    if not examples:
        raise request_error(
            "data.path", path, f"no example has a token to learn within {seq_len} tokens", "Raise recipe.seq_len"
        )
    lengths = [len(example.ids) for example in examples]
    return examples, DataReport(
        format=name,
        examples=len(examples),
        truncated=truncated,
        unlearnable=unlearnable,
        longest=max(lengths),
        tokens=sum(lengths),
        digest=file_digest(path),
        token_digest=token_digest(examples),
    )


def token_digest(examples: Sequence[Encoded]) -> str:
    """SHA-256 over all ids and which of them are learned, as hexadecimal digits."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(array("q", example.ids).tobytes() + bytes(example.learned) + b"|")
    return digest.hexdigest()
