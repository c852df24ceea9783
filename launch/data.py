"""The tokens of a data set: counted by the model's own tokenizer, as a run would, or told from the size of its text."""

from __future__ import annotations

import codecs
import json
import os
from dataclasses import dataclass
from pathlib import Path

from clusters.errors import RequestError, request_error
from orchestrator.plans import Choice
from qlora_core.recipe import Recipe

BYTES_PER_TOKEN = 4
"""Of English text, about: four characters (OpenAI, "What are tokens and how to count them?"). Code and other languages
have fewer."""

NOT_LINES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip")


@dataclass(frozen=True, slots=True)
class Data:
    """The data of a run.

    Attributes:
        tokens: that it trains on, padding counted.
        longest: of the longest example; None where that is not known.
        filled: which share of a row's positions those tokens are, where they are of rows.
    """

    tokens: int | None = None
    longest: int | None = None
    filled: float | None = None


def measured(path: Path, model: Path, recipe: Recipe, choices: list[Choice]) -> Data:
    """The tokens that a run over the file trains on, padding counted, and its longest example.

    A run holds the default share of its examples out. Tokens are counted by the tokenizer of `model`, if that is a
    folder with one.

    Raises:
        RequestError: it cannot be read as training data.
    """
    from orchestrator.spec import DataSpec  # pydantic; no other plan needs it
    from qlora_core.training.sampling import held_out_of

    has_tokenizer = any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    instead = "exactly from a model's folder with the train extra"
    try:
        if has_tokenizer and (counted := by_tokenizer(path, model, recipe)) is not None:
            return counted
    except RequestError as error:
        if {problem.where for problem in error.problems} != {"data.format"}:
            raise
        # its columns' names or a chat template, which a specification gives
        instead = f"exactly from a run's specification: {error.problems[0].rule}"
    examples, longest = lines_of(path)
    length = min(-(-longest // BYTES_PER_TOKEN), recipe.seq_len)
    examples -= held_out_of(examples, DataSpec.model_fields["eval_fraction"].default)
    reason = (
        f"all padded to the longest of {examples:,} examples to learn from, at about {BYTES_PER_TOKEN} bytes of text a "
        f"token; {instead}"
    )
    choices.append(Choice("tokens", f"{examples * length:,}", reason))
    # memory is planned for the length asked for, since this one is a guess
    return Data(examples * length, filled=1.0 if recipe.packing else length / recipe.seq_len)


def by_tokenizer(path: Path, folder: Path, recipe: Recipe) -> Data | None:
    """What the run's own encoding finds; None where the packages for training are not installed."""
    try:
        from qlora_core.quiet import quiet_libraries

        quiet_libraries()
        from orchestrator.spec import DataSpec, RunSpec
        from qlora_core.training.dataset import encode_file
        from qlora_core.training.dataset.mixing import divide
        from qlora_core.training.layout import lay_out
        from qlora_core.training.tokenizer import load_tokenizer
    except ImportError:
        return None
    data = encode_file(path, "auto", load_tokenizer(str(folder)), recipe.seq_len)
    fraction, seed = DataSpec.model_fields["eval_fraction"].default, RunSpec.model_fields["seed"].default
    examples, _ = divide([data], fraction, seed)
    layout = lay_out(examples.lengths, recipe)
    longest = max(layout.longest, data[1].longest)  # one that is held out may be it
    return Data(len(layout.rows) * longest, longest, 1.0)


def lines_of(path: Path) -> tuple[int, int]:
    """Records of a file, a line each, and bytes of the longest."""
    if path.suffix.lower() in NOT_LINES:
        rule = (
            f"without a model's folder and the train extra only lines of text are measured, and {path.suffix} is none"
        )
        raise request_error("--data", os.fspath(path), rule, "Give JSONL, or name the model by its folder")
    lines = longest = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if text := line.strip():
                    check_record(text, path, number)
                    lines, longest = lines + 1, max(longest, len(text))
    except OSError as error:
        rule = f"it cannot be read: {error.strerror or error}"
        raise request_error("--data", path, rule, "Give a readable JSONL file") from None
    if not lines:
        raise request_error("--data", os.fspath(path), "it is empty", "Give one example a line")
    return lines, longest


def check_record(line: bytes, path: Path, number: int) -> None:
    """Raise a RequestError for a line that is no record of a training file."""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        rule = f"line {number} is not JSON: {str(error).partition(chr(10))[0]}"
    else:
        if isinstance(record, dict):
            return
        rule = f"line {number} is no JSON object"
    raise request_error("--data", path, rule, "Correct the line, or give JSONL: one example a line")
