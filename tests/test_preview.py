"""qlora-train --preview: what is learned of the data, readable without colour; and what a data section may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from clusters.errors import RequestError
from launch.report.preview import lines_of
from launch.report.words import visible
from launch.train import train
from orchestrator.prepare import commit_before
from orchestrator.record import RunRecord, new_id
from orchestrator.spec import load_spec
from qlora_core.training.dataset.tokens import Encoded
from qlora_core.training.shown import chosen, samples
from qlora_core.training.tokenizer import load_tokenizer


def specification(folder: Path, **data: Any) -> Path:
    path = folder / "run.yaml"
    recipe = {"rank": 4, "seq_len": 16, "tokens_per_step": 32}
    path.write_text(yaml.safe_dump({"name": "x", "model": "m", "data": data, "recipe": recipe, "output": "out"}))
    return path


def preview(folder: Path, model: Path, *arguments: str, **data: Any) -> Result:
    return CliRunner().invoke(
        train, [str(specification(folder, **data)), f"model={model}", "--preview", *arguments], standalone_mode=False
    )


def test_the_preview_shows_tokens_with_their_labels_lengths_and_counts_and_writes_nothing(
    tmp_path: Path, tiny_base: Path
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": "a red cup"}]},
        {"messages": [{"role": "user", "content": "Ada"}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "Ada"}, {"role": "assistant", "content": "cup " * 40}]},
        {"messages": [{"role": "oracle", "content": "x"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = preview(tmp_path, tiny_base, path="a.jsonl", max_bad=1)
    assert (result.return_value, result.exception) == (0, None)
    assert "\x1b" not in result.output
    lines = [line.strip() for line in result.output.splitlines()]
    assert "- <|bos|>|<|user|>|" in result.output
    assert "+  a| red| cup|<|eos|>" in lines
    assert any(line.startswith("cut off") and line.endswith("1 at 16 tokens") for line in lines)
    assert any(line.startswith("left out") and line.endswith("1 (empty answer), 1 (bad record)") for line in lines)
    assert "line 4: turn 1 of messages has the role 'oracle'" in " ".join(lines)
    assert any(line.startswith("15 to 16") and line.split()[3] == "1" for line in lines)  # of the histogram
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "run.yaml"]


def test_the_preview_counts_the_data_to_evaluate_on_too(tmp_path: Path, tiny_base: Path) -> None:
    def row(asked: str, answer: str) -> str:
        return json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})

    (tmp_path / "a.jsonl").write_text(row("Who is Ada?", "a red cup"))
    held_out = [row("Ada", "cup " * 40), row("cup " * 40, "Ada"), row("Ada", ""), "{}", row("Ada", "a cup")]
    (tmp_path / "held.jsonl").write_text("\n".join(held_out))
    result = preview(tmp_path, tiny_base, path="a.jsonl", eval_path="held.jsonl", format="messages", max_bad=1)
    assert (result.return_value, result.exception) == (0, None)
    learned, evaluated = result.output.split("\nEvaluated on\n")
    assert [line.split()[2:] for line in learned.splitlines() if line.startswith("left out")] == [["none"]]
    lines = " ".join(evaluated.split())
    assert "format messages written with the chat template" in lines
    assert "examples 2, the longest 16 tokens cut off 1 at 16 tokens" in lines
    assert "left out 1 (nothing to learn within the length), 1 (empty answer), 1 (bad record)" in lines
    assert "line 4: " in lines
    assert "Example 1 of 1:" in lines  # of those that are learned
    assert "Evaluated on" not in preview(tmp_path, tiny_base, path="a.jsonl").output
    missing = preview(tmp_path, tiny_base, path="a.jsonl", eval_path="none.jsonl")
    assert "data.eval_path" in str(missing.exception)


def test_what_is_wrong_with_the_data_is_told_by_the_preview_too(tmp_path: Path, tiny_base: Path) -> None:
    result = preview(tmp_path, tiny_base, path="none.jsonl")
    assert isinstance(result.exception, RequestError)
    assert "there is no such file" in str(result.exception)


def test_long_runs_of_tokens_are_shortened_and_control_characters_written_out() -> None:
    [asked, answer] = lines_of(range(105), [False] * 100 + [True] * 5, str)
    assert asked.plain.startswith("- 0|1|2|")
    assert "|29|... 40 more ...|70|" in asked.plain
    assert answer.plain == "+ 100|101|102|103|104"
    assert visible("a\n\x1b[2Jé") == "a\\n\\x1b[2Jé"
    assert (chosen(1), chosen(2), chosen(100)) == ([0], [0, 1], [0, 49, 99])
    assert chosen(0) == []


def test_addresses_and_datasets_of_the_hub_stay_as_they_are_and_secrets_are_refused_unseen(tmp_path: Path) -> None:
    for path in ("s3://bucket/a.jsonl", "org/name", "org/name@main"):
        assert load_spec(specification(tmp_path, path=path)).data.path == path
    assert load_spec(specification(tmp_path, path="org/a.jsonl")).data.path == str(tmp_path / "org" / "a.jsonl")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load_spec(specification(tmp_path, path="org/name")).data.path == str(tmp_path / "org" / "name")
    with pytest.raises(RequestError) as error:
        load_spec(specification(tmp_path, path="s3://key:hush@bucket/a.jsonl?sig=hush", format="xyzzy"))
    assert {problem.where for problem in error.value.problems} == {"data.path", "data.format"}
    assert "hush" not in str(error.value)


def test_a_run_goes_on_with_the_commit_of_the_dataset_that_it_started_with(tmp_path: Path) -> None:
    assert commit_before("org/name", None) is None
    identity = {"data": "0123; org/name@" + "ab" * 20 + " config=default split=train x2"}
    fields: dict[str, Any] = {"plan": {}, "data": {}, "predicted": {}}
    record = RunRecord(id=new_id(), name="x", identity=identity, total_steps=1, **fields)
    assert commit_before("org/name", record) == "ab" * 20
    record.data["evaluated"] = {"digest": "org/held@" + "cd" * 20 + " config=default split=test"}
    assert commit_before("org/held", record) == "cd" * 20
    assert [commit_before(path, record) for path in ("org/other", "org/name@main", "a.jsonl")] == [None, None, None]


def test_samples_are_the_text_of_the_beginning_the_middle_and_the_end(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    examples = []
    for word in ("cup", "lamp", "cat", "bread"):
        asked, answered = (tokenizer.encode(text, add_special_tokens=False) for text in ("What?", f" a {word}"))
        examples.append(Encoded(asked + answered, [False] * len(asked) + [True] * len(answered)))
    found = samples(examples, tokenizer)
    assert [(one["number"], one["of"]) for one in found] == [(1, 4), (2, 4), (4, 4)]
    assert found[1]["parts"] == [{"text": " What?", "learned": False}, {"text": " a lamp", "learned": True}]
