"""Sources: the same records wherever they lie, each with its place; and published datasets in their own layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
from pyarrow import Table, csv, parquet

from clusters.errors import RequestError
from orchestrator.spec import DataFormat
from qlora_core.training.dataset import DataOptions, encode_file
from qlora_core.training.dataset.formats import FORMATS
from qlora_core.training.dataset.sources import find_source
from qlora_core.training.model import load_tokenizer

ROWS = [{"prompt": f"question, {number}", "completion": f'an "answer"\n{number}'} for number in range(3)]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def as_json_lines(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "a.jsonl"


def as_json(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1))
    return folder / "a.json"


def as_json_under_a_name(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps({"version": 2, "data": ROWS}))
    return folder / "a.json"


def as_lines_called_json(folder: Path) -> Path:
    return as_json_lines(folder).rename(folder / "a.json")


def as_csv(folder: Path) -> Path:
    csv.write_csv(Table.from_pylist(ROWS), folder / "a.csv")
    return folder / "a.csv"


def as_parquet(folder: Path) -> Path:
    parquet.write_table(Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def as_the_hub_lays_it_out(folder: Path) -> Path:
    (folder / "data").mkdir()
    for shard, rows in enumerate((ROWS[:2], ROWS[2:])):
        parquet.write_table(Table.from_pylist(rows), folder / "data" / f"train-0000{shard}-of-00002.parquet")
    parquet.write_table(Table.from_pylist(ROWS[:1]), folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("a card")
    return folder


def as_saved_by_datasets(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def as_splits_saved_by_datasets(folder: Path) -> Path:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


WAYS = (
    as_json_lines,
    as_json,
    as_json_under_a_name,
    as_lines_called_json,
    as_csv,
    as_parquet,
    as_the_hub_lays_it_out,
    as_saved_by_datasets,
    as_splits_saved_by_datasets,
)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_records_come_out_of_every_kind_of_file(tmp_path: Path, way: Callable[[Path], Path]) -> None:
    source = find_source(way(tmp_path))
    assert [record for _, record in source.records()] == ROWS
    places = [place for place, _ in source.records()]
    assert len(set(places)) == 3
    assert all(place.split(", ")[0].startswith(str(tmp_path)) for place in places)
    assert len(source.digest()) == 64


def test_another_split_is_read_where_it_is_named(tmp_path: Path) -> None:
    for number, way in enumerate((as_the_hub_lays_it_out, as_splits_saved_by_datasets)):
        (tmp_path / str(number)).mkdir()
        source = find_source(way(tmp_path / str(number)), split="test")
        assert [record for _, record in source.records()] == ROWS[:1]
    with pytest.raises(RequestError, match="has the splits train, test"):
        find_source(tmp_path / "1" / "saved", split="dev")


def test_a_truncated_parquet_file_and_a_row_too_long_are_told(tmp_path: Path, tokenizer: Any) -> None:
    whole = as_parquet(tmp_path).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"cannot be read.*a\.parquet"):
        encode_file(tmp_path / "a.parquet", "auto", tokenizer, 512)
    (tmp_path / "b.csv").write_text("prompt,completion\nx,y\nx,y,z\n")
    with pytest.raises(RequestError, match=r"b\.csv, row 2: it has another number of fields"):
        encode_file(tmp_path / "b.csv", "auto", tokenizer, 512)


def test_a_specification_knows_the_formats_that_there_are() -> None:
    assert set(get_args(DataFormat)) == {"auto", *FORMATS}


# --- published layouts ------------------------------------------------------------------------------------------------

OASST1: list[dict[str, Any]] = [
    # columns of OpenAssistant/oasst1 (its dataset card); of two replies the one of rank 0 is the better
    {"message_id": "m1", "parent_id": None, "role": "prompter", "text": "Name a cup.", "rank": None, "deleted": False},
    {"message_id": "m2", "parent_id": "m1", "role": "assistant", "text": "a blue one", "rank": 1, "deleted": False},
    {"message_id": "m3", "parent_id": "m1", "role": "assistant", "text": "a red cup", "rank": 0, "deleted": False},
    {"message_id": "m4", "parent_id": "m3", "role": "prompter", "text": "Why?", "rank": 0, "deleted": False},
    {"message_id": "m5", "parent_id": "m4", "role": "assistant", "text": "it is red", "rank": 0, "deleted": False},
    {"message_id": "m6", "parent_id": "m5", "role": "prompter", "text": "So?", "rank": 0, "deleted": False},
]
PUBLISHED: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    # format that is found, rows as published, the one that is named, and the answers that are learned
    "oasst1": (OASST1, "auto", ["a red cup", "it is red"]),
    "guanaco": (
        [{"text": "### Human: Name a cup.### Assistant: a red cup### Human: Why?### Assistant: it is red"}],
        "auto",
        ["a red cup", "it is red"],
    ),
    "alpaca": (
        [{"instruction": "Name a cup.", "input": "", "output": "a red cup", "text": "Below is ..."}],
        "auto",
        ["a red cup"],
    ),
    "flan-v2": (
        [{"inputs": "Name a cup.\n", "targets": "a red cup", "task_source": "Flan2021", "task_name": "x"}],
        "auto",
        ["a red cup"],
    ),
    "hh-rlhf": (
        [
            {
                "chosen": "\n\nHuman: Name a cup.\n\nAssistant: a red cup\n\nHuman: Why?\n\nAssistant: it is red",
                "rejected": "\n\nHuman: Name a cup.\n\nAssistant: no",
            }
        ],
        "auto",
        ["a red cup", "it is red"],
    ),
    "unnatural-instructions": (
        [
            {
                "instruction": "Name a thing.",
                "instances": [
                    {
                        "instruction_with_input": "Name a thing.\nA cup.",
                        "input": "A cup.",
                        "constraints": "None.",
                        "output": "a red cup",
                    }
                ],
            }
        ],
        "auto",
        ["a red cup"],
    ),
    "chip2": ([{"text": "<human>: Name a cup.\n<bot>: a red cup", "metadata": {"source": "x"}}], "auto", ["a red cup"]),
    "longform": (
        [{"input": "Name a cup.", "output": "a red cup", "source": "C4", "subset": "x"}],
        "auto",
        ["a red cup"],
    ),
    "self-instruct": (
        [{"prompt": "Name a cup.\n\n###\n\n", "completion": " a red cup<|endoftext|>"}],
        "self-instruct",
        ["a red cup"],
    ),
    "vicuna": (
        [
            {
                "id": "x_0",
                "conversations": [{"from": "human", "value": "Name a cup."}, {"from": "gpt", "value": "a red cup"}],
            }
        ],
        "vicuna",
        ["a red cup"],
    ),
    "sharegpt": (
        [{"conversations": [{"from": "human", "value": "Name a cup."}, {"from": "gpt", "value": "a red cup"}]}],
        "auto",
        ["a red cup"],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("template", [True, False], ids=["chat template", "no chat template"])
def test_the_answers_of_a_published_layout_are_learned_with_their_ends(
    tmp_path: Path, tiny_base: Path, name: str, template: bool
) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    rows, asked, answers = PUBLISHED[name]
    if not template:
        if name in ("vicuna", "sharegpt"):
            pytest.skip("conversations without a text of their own need a chat template")
        tokenizer.chat_template = None
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [example], report = encode_file(path, asked, tokenizer, 512)
    assert report.format == name
    learned = [""]
    for token, flag in zip(example.ids, example.learned, strict=True):
        if flag:
            learned[-1] += str(tokenizer.decode([token]))
        elif learned[-1]:
            learned.append("")
    pieces = [piece for piece in learned if piece]
    ends = ("<|eos|>", "### Human:", "Human:", "<human>:", "<|end|>")
    told = [piece.replace("<|eos|>", "").replace("### Human:", "").replace("Human:", "").strip() for piece in pieces]
    assert told == answers
    assert all(piece.rstrip().endswith(ends) for piece in pieces)


def test_plain_text_is_learned_whole_and_has_no_answers(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "Ada brought a red cup."}) + "\n")
    [example], report = encode_file(path, "auto", tokenizer, 512)
    assert (report.format, report.learn) == ("text", "all")
    assert all(example.learned)
    assert example.ids[-1] == tokenizer.eos_token_id
    with pytest.raises(RequestError, match="plain text, in which nobody answers"):
        encode_file(path, "auto", tokenizer, 512, DataOptions(learn="assistant"))


def test_a_conversation_without_a_chat_template_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = None
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}))
    with pytest.raises(RequestError, match="tokenizer has no chat template"):
        encode_file(path, "auto", tokenizer, 512)
