"""Several datasets learned from together: which examples an epoch has, what is held out, and what is said of each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from test_card import FACTS

from clusters.errors import RequestError
from launch.report import run_report
from launch.train import train
from orchestrator.identity import check_same
from orchestrator.prepare import Prepared, prepare
from orchestrator.spec import load_spec
from qlora_core.training import card
from qlora_core.training.dataset import encode_file
from qlora_core.training.sampling import repeated
from qlora_core.training.tokenizer import load_tokenizer

CHATS = [
    {"messages": [{"role": "user", "content": f"Who is {n}?"}, {"role": "assistant", "content": f"Number {n}."}]}
    for n in range(20)
]
TASKS = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 11)]
TEXTS = [{"text": f"Ada keeps {n} bees."} for n in range(4)]


@pytest.fixture
def ask(tmp_path: Path, tiny_base: Path) -> Callable[..., Prepared]:
    """Prepares a run of these datasets, of which `data` says more."""
    for name, rows in (("chats", CHATS), ("tasks", TASKS), ("texts", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prepared(*overrides: str, **data: Any) -> Prepared:
        fields = {
            "name": "mixed",
            "model": str(tiny_base),
            "data": data,
            "recipe": {"seq_len": 128, "tokens_per_step": 256, "rank": 4},
            "output": "out",
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
        return prepare(load_spec(tmp_path / "run.yaml", overrides))

    return prepared


def named(*names: str, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"path": f"{name}.jsonl", **more.get(name, {})} for name in names}


def tokens(examples: Any) -> Counter[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return Counter((tuple(example.ids), tuple(example.learned)) for example in examples)


def alone(folder: Path, base: Path, name: str) -> Counter[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The examples of one of the files, encoded for itself."""
    examples, _ = encode_file(folder / f"{name}.jsonl", "auto", load_tokenizer(str(base)), 128)
    return tokens(examples)


def test_an_epoch_has_the_examples_of_each_and_of_some_more_often(
    tmp_path: Path, tiny_base: Path, ask: Callable[..., Prepared]
) -> None:
    found = ask(datasets=named("chats", "tasks", "texts", tasks={"times": 3}), eval_fraction=0)
    chats, tasks, texts = (alone(tmp_path, tiny_base, name) for name in ("chats", "tasks", "texts"))
    assert tokens(found.train) == chats + tasks + tasks + tasks + texts
    assert len(found.held_out) == 0
    # the rows that workers train on are these, and the places name the file of each
    assert len(found.layout.rows) == 20 + 3 * 10 + 4
    assert {example.place.partition(",")[0] for example in found.train} == {
        str(tmp_path / f"{name}.jsonl") for name in ("chats", "tasks", "texts")
    }


def test_a_part_is_drawn_by_the_seed(tmp_path: Path, tiny_base: Path, ask: Callable[..., Prepared]) -> None:
    datasets = named("chats", "tasks", chats={"times": 0.25}, tasks={"times": 1.5})
    found, again, other = (ask(f"seed={seed}", datasets=datasets, eval_fraction=0) for seed in (0, 0, 1))
    chats, tasks = (alone(tmp_path, tiny_base, name) for name in ("chats", "tasks"))
    drawn = tokens(found.train)
    assert drawn == tokens(again.train) != tokens(other.train)
    assert {drawn[example] for example in chats} == {0, 1}
    assert sum(drawn[example] for example in chats) == 5
    assert {drawn[example] for example in tasks} == {1, 2}
    assert sum(drawn[example] for example in tasks) == 15


def test_of_each_dataset_a_part_is_held_out_and_not_learned_however_often_the_rest_is(
    tmp_path: Path, tiny_base: Path, ask: Callable[..., Prepared]
) -> None:
    found = ask(datasets=named("chats", "tasks", tasks={"times": 2}), eval_fraction=0.1)
    held_out, learned = tokens(found.held_out), tokens(found.train)
    chats, tasks = (alone(tmp_path, tiny_base, name) for name in ("chats", "tasks"))
    assert [sum(held_out[example] for example in kind) for kind in (chats, tasks)] == [2, 1]
    assert not held_out & learned
    assert [sum(learned[example] for example in kind) for kind in (chats, tasks)] == [18, 2 * 9]


def test_one_dataset_may_be_repeated_too(ask: Callable[..., Prepared]) -> None:
    found = ask(path="tasks.jsonl", times=0.5, eval_fraction=0)
    assert (len(found.train), found.data.examples, found.datasets) == (5, 10, {})


def test_a_named_dataset_alone_is_learned_as_it_is_without_a_name(ask: Callable[..., Prepared]) -> None:
    one, other = ask(path="chats.jsonl"), ask(datasets=named("chats"))
    assert list(one.train) == list(other.train)
    assert list(one.held_out) == list(other.held_out)
    assert one.identity == other.identity


def test_what_became_of_all_and_of_each_is_counted(tmp_path: Path, ask: Callable[..., Prepared]) -> None:
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    found = ask(datasets=named("chats", "texts", chats={"max_bad": 1}, texts={"times": 2}))
    assert (found.data.format, found.data.examples, found.data.bad) == ("messages, text", 24, 1)
    assert found.data.learn == "assistant, all"
    assert [one["examples"] for one in found.datasets.values()] == [20, 4]
    assert [one["times"] for one in found.datasets.values()] == [1, 2]
    assert found.data.tokens == sum(one["tokens"] for one in found.datasets.values())
    assert found.data.longest == max(one["longest"] for one in found.datasets.values())


def test_another_share_is_another_run(ask: Callable[..., Prepared]) -> None:
    before, after = (ask(datasets=named("chats", "tasks", tasks={"times": times})) for times in (1, 2))
    with pytest.raises(RequestError, match="x2"):
        check_same(before.identity, after.identity, "out")


def test_what_is_wrong_with_each_is_told_at_once(ask: Callable[..., Prepared]) -> None:
    datasets = named("chats", "none", "texts", chats={"split": "train"}, texts={"learn": "assistant"})
    with pytest.raises(RequestError) as error:
        ask(datasets=datasets)
    assert {problem.where for problem in error.value.problems} == {
        "data.datasets.chats.split",
        "data.datasets.none.path",
        "data.datasets.texts.learn",
    }


def test_a_split_of_each_is_evaluated_on(tmp_path: Path, tiny_base: Path, ask: Callable[..., Prepared]) -> None:
    for name in ("chats", "tasks"):
        rows = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(rows[2:]))
        (tmp_path / name / "test.jsonl").write_text("\n".join(rows[:2]))
    datasets = {name: {"path": name, "times": 3} for name in ("chats", "tasks")}
    found = ask(datasets=datasets, eval_split="test")
    assert len(found.train) == 3 * (18 + 8)
    wanted = [alone(tmp_path / name, tiny_base, "test") for name in ("chats", "tasks")]
    assert tokens(found.held_out) == wanted[0] + wanted[1]
    assert found.evaluated is not None
    assert found.evaluated.examples == 4


@pytest.mark.parametrize("times", [0.01, 0.3, 0.999, 1, 1.001, 2.5, 7])
def test_so_many_are_drawn_as_it_comes_to(times: float) -> None:
    indexes = range(100, 150)
    drawn = Counter(repeated(indexes, times, "seed"))
    assert sum(drawn.values()) == max(1, round(50 * times))
    assert set(drawn) <= set(indexes)
    assert max(drawn.values()) - min(drawn[index] for index in indexes) <= 1


def test_the_preview_shows_each_with_its_share(
    tmp_path: Path, tiny_base: Path, ask: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = ask(datasets=named("chats", "tasks", tasks={"times": 2}))
    result = CliRunner().invoke(train, [str(tmp_path / "run.yaml"), "--preview"], standalone_mode=False)
    assert (result.return_value, result.exception) == (0, None)
    of_chats, of_tasks = (found.datasets[name]["learned"] for name in ("chats", "tasks"))
    share = 2 * of_tasks / (of_chats + 2 * of_tasks)
    assert f"tasks: 10 examples in format alpaca, 2 times an epoch; {share:.1%} of the learned tokens." in result.output
    assert "chats: 20 examples in format messages; " in result.output
    assert "Example 30 of 30" in result.output


def test_the_report_and_the_card_name_each(ask: Callable[..., Prepared]) -> None:
    found = ask(datasets=named("chats", "texts", texts={"times": 0.5}))
    fields = {**asdict(found.data), "datasets": found.datasets}
    [section] = run_report.data(fields)
    assert any(said.startswith("texts: 4 examples in format text, 0.5 times an epoch; ") for said in section.text)
    written = card.data(replace(FACTS, datasets=found.datasets))
    assert "`chats`: 20 examples in format messages" in written
    assert f"0.5 times an epoch. SHA-256 `{found.datasets['texts']['digest']}`" in written
