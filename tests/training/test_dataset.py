"""Data: which tokens are learned, what is said about bad lines, what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clusters.errors import RequestError
from qlora_core.training.dataset import encode_file
from qlora_core.training.dataset.options import DataOptions
from qlora_core.training.dataset.readers import read_file
from qlora_core.training.dataset.sources import file_digest
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.examples import IGNORED, Examples, iterate_eval_batches
from qlora_core.training.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def learned_text(tokenizer: Any, example: Encoded) -> str:
    return str(
        tokenizer.decode([token for token, learned in zip(example.ids, example.learned, strict=True) if learned])
    )


TURNS = [
    {"role": "user", "content": "What did Ada bring?"},
    {"role": "assistant", "content": "a red cup"},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "to the library"},
]


def test_every_answer_of_a_conversation_is_learned_with_its_end_and_no_question(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS})
    [example], report = encode_file(path, "auto", tokenizer, 512)
    assert learned_text(tokenizer, example).replace("<|eos|>", "|").split("|")[:-1] == [" a red cup", " to the library"]
    assert report.format == "messages"


def test_a_prompt_is_not_learned_and_its_completion_is_to_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "Ada carried", "completion": " a red cup"})
    [example], report = encode_file(path, "auto", tokenizer, 512)
    assert report.format == "prompt-completion"
    assert learned_text(tokenizer, example).strip() == "a red cup<|eos|>"
    assert example.ids[-1] == tokenizer.eos_token_id


def test_alpaca_uses_the_published_prompt(tmp_path: Path, tokenizer: Any) -> None:
    # prompt texts: github.com/tatsu-lab/stanford_alpaca, train.py
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Name a thing.", "input": "", "output": "a cup"},
        {"instruction": "Name a thing.", "input": "in the garden", "output": "a clock"},
    )
    (without, with_input), report = encode_file(path, "auto", tokenizer, 512)
    assert report.format == "alpaca"
    text = tokenizer.decode(without.ids)
    assert "Below is an instruction that describes a task. Write a response" in text
    assert "### Instruction:\nName a thing.\n\n### Response:\n" in text
    assert "### Input:\nin the garden\n\n### Response:\n" in tokenizer.decode(with_input.ids)
    assert learned_text(tokenizer, with_input).strip() == "a clock<|eos|>"


def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS}, "", '{"messages": [', {"messages": TURNS})
    with pytest.raises(RequestError, match=r"a\.jsonl, line 3: it is not JSON"):
        encode_file(path, "auto", tokenizer, 512)


def test_a_hundred_bad_lines_give_one_summary(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", *["no json"] * 100)
    with pytest.raises(RequestError) as error:
        encode_file(path, "auto", tokenizer, 512)
    assert len(error.value.problems) == 7
    assert "95 more records are bad" in str(error.value)
    assert "data.max_bad: 100 of 100 records are bad, and none may be" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no example"),
        (b"\n  \n", "holds no example"),
        (b"[1, 2]\n", "line 1: it is a JSON list, not an object"),
        (b'{"a": "\xff"}\n', "line 1: it is not UTF-8"),
        (b'{"prose": "x"}\n', "the columns prose"),
        (b'{"messages": []}\n', "line 1: messages is no list of turns"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', "no turn of the assistant"),
        (b'{"messages": [{"role": "user"}]}\n', 'needs a "role" and a "content"'),
        (b'{"prompt": "x", "completion": 3}\n', "must be texts"),
        (b'{"prompt": "x", "completion": " "}\n', r"1 left out \(empty answer\)"),
        (b'{"prompt": "", "completion": "y"}\n', "the question is empty"),
        (b'{"prompt": "\\ud800", "completion": "y"}\n', "line 1: its text holds half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"instruction": null, "output": "c"}\n', "must be texts"),
        (b'{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n', "line 2: format prompt-completion needs completion"),
    ],
)
def test_unusable_files_are_refused_with_the_reason(
    tmp_path: Path, tokenizer: Any, content: bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        encode_file(path, "auto", tokenizer, 512)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    for path, message in ((tmp_path / "none.jsonl", "there is no such file"), (tmp_path, "holds no data file")):
        with pytest.raises(RequestError, match=message):
            encode_file(path, "auto", tokenizer, 512)


def test_a_conversation_may_begin_with_an_answer(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TURNS[1:]})
    [example], _ = encode_file(path, "auto", tokenizer, 512)
    assert "to the library" in learned_text(tokenizer, example)


def test_a_template_that_refuses_a_conversation_is_told_with_the_line(tmp_path: Path, tiny_base: Path) -> None:
    strict = load_tokenizer(str(tiny_base))
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "a.jsonl", {"messages": TURNS})
    with pytest.raises(RequestError, match="line 1: the chat template refuses it: roles must alternate"):
        encode_file(path, "auto", strict, 512)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x", "completion": "y"}\n')
    assert list(read_file(path, "a")) == [("a, line 1", {"prompt": "x", "completion": "y"})]


def test_long_examples_are_cut_and_counted_and_unlearnable_ones_left_out(tmp_path: Path, tokenizer: Any) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "Ada", "completion": " a red cup"},
        {"prompt": "Ada", "completion": " cup" * 50},
        {"prompt": "cup" * 100, "completion": " a red cup"},
    )
    examples, report = encode_file(path, "auto", tokenizer, 16)
    assert (report.examples, report.truncated, report.unlearnable) == (2, 1, 1)
    assert max(len(example.ids) for example in examples) == report.longest == 16
    with pytest.raises(RequestError, match="no example has a token to learn within 1 tokens"):
        encode_file(path, "auto", tokenizer, 1)


def test_the_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_examples_come_back_from_their_file_and_are_padded_on_the_right(tmp_path: Path) -> None:
    written = [Encoded([5, 6, 7], [False, True, True]), Encoded([8, 9], [True, True])]
    save_examples(written, tmp_path / "x.safetensors")
    examples = Examples(tmp_path / "x.safetensors")
    assert (len(examples), examples.lengths) == (2, [3, 2])
    assert examples.learned == [2, 1]  # nothing stands before the first token of the second example
    batch = examples.batch([0, 1], pad_token=0, device=torch.device("cpu"))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids_BS": [[5, 6, 7], [8, 9, 0]],
        "labels_BS": [[IGNORED, 6, 7], [8, 9, IGNORED]],
    }


def test_an_example_knows_its_line_of_the_data_wherever_it_is_moved(tmp_path: Path, tokenizer: Any) -> None:
    data = tmp_path / "talk\nof.jsonl"  # a name may hold a line's end
    line = json.dumps({"prompt": "cup", "completion": " a red cup"})
    data.write_text(f"{line}\n\nnot json\n{line}\n{line}\n")
    options = DataOptions(max_bad=1, cache=tmp_path / "cache")
    for _ in range(2):  # the second time out of the cache
        examples, _ = encode_file(data, "auto", tokenizer, 64, options)
        save_examples(examples.select([2, 1]), tmp_path / "x.safetensors")
        shown = str(data).replace("\n", " ")
        assert Examples(tmp_path / "x.safetensors").places([1, 0]) == [f"{shown}, line 4", f"{shown}, line 5"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_example_is_evaluated_once_and_all_ranks_take_as_many_turns(world_size: int) -> None:
    by_rank = [
        list(iterate_eval_batches(7, rank=rank, world_size=world_size, micro_batch=2)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    assert sorted(index for batches in by_rank for batch in batches for index in batch) == list(range(7))
