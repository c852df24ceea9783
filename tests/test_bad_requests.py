"""Wrong requests to qlora-train: one clear error, exit code 2, nothing written, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from filelock import FileLock
from small_runs import stand_in_checkpoint

from clusters.errors import RequestError, RunFailed
from launch.train import train

Request = Callable[..., Result]


@pytest.fixture
def ask(tmp_path: Path, tiny_base: Path, conversations: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """Ask for a run that would be right but for the changes, and that is never started."""
    monkeypatch.setenv("QLORA_LEDGER", str(tmp_path / "ledger.sqlite"))

    def run(*arguments: str, **changes: Any) -> Result:
        fields: dict[str, Any] = {
            "name": "tiny",
            "model": str(tiny_base),
            "data": {"path": str(conversations)},
            "recipe": {"rank": 4, "seq_len": 64, "tokens_per_step": 512},
            "strategy": {"world_size": 2, "zero_stage": 2, "micro_batch": 2},
            "output": "out",
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**fields, **changes}))
        return CliRunner().invoke(train, [str(tmp_path / "run.yaml"), *arguments], standalone_mode=False)

    return run


def refusal(result: Result) -> str:
    """The message of a request that was refused as a RequestError, which the command prints as it is."""
    assert isinstance(result.exception, RequestError), result.exception
    return str(result.exception)


def test_a_secret_in_an_address_is_refused_and_not_shown(ask: Request) -> None:
    changes: dict[str, Any] = {
        "model": "s3://user:SECRET@bucket/m",
        "data": {"path": "simplecache::https://user:SECRET@host/x.jsonl"},
        "output": "s3://bucket/out?sig=SECRET",
    }
    message = refusal(ask(**changes))
    assert [message.count(where) for where in ("model: ", "data.path: ", "output: ")] == [1, 1, 1]
    assert "SECRET" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "model: training needs a folder"),
        ({"model": "llama-2-7"}, "(got llama-2-7). Did you mean llama-2-7b,"),
        ({"model": "some/where"}, "model: its files are not all in the Hub's cache"),
        ({"model": "llama-2-7b"}, "model: its files are not all in the Hub's cache"),
        ({"data": {"path": "none.jsonl"}}, "data.path: there is no such file"),
        ({"recipe": {"rank": 0}}, "recipe.rank: "),
        ({"recipe": {"rank": "many"}}, "recipe.rank: "),
        ({"recipe": {"targets": ["q_prj"]}}, "Did you mean q_proj"),
        ({"recipe": {"seq_len": 64, "tokens_per_step": 100}}, "multiple of seq_len"),
        ({"strategy": {"world_size": 3}}, "strategy.world_size: it must divide the 8 sequences"),
        ({"strategy": {"micro_batch": 5}}, "strategy.micro_batch: it must divide"),
        ({"strategy": {"attention": "flash_attention_2"}}, "needs a CUDA GPU"),
        ({"data": {"path": "none.jsonl", "format": "alpacca"}}, "data.format: "),
        ({"recipe": {"packing": True, "group_by_length": True}}, "recipe.group_by_length: packed sequences"),
        ({"name": "../up"}, "name: "),
        ({"checkpoints": {"keep": 0}}, "checkpoints.keep: "),
    ],
)
def test_a_wrong_field_is_refused_before_anything_is_written(
    ask: Request, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refusal(ask(**changes))
    assert not (tmp_path / "out").exists()


def test_a_line_of_data_that_is_not_json_is_named(ask: Request, tmp_path: Path, conversations: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(conversations.read_text().replace("messages", 'mess"ages', 1))
    assert "broken.jsonl, line 1: it is not JSON" in refusal(ask(data={"path": str(broken)}))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_that_is_not_whole_is_refused(
    ask: Request, tmp_path: Path, tiny_base: Path, missing: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    (folder / missing).unlink()
    assert "model" in refusal(ask(model=str(folder)))
    assert not (tmp_path / "out").exists()


def test_a_truncated_weight_file_is_refused(ask: Request, tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors" in refusal(ask(model=str(folder)))


@pytest.mark.parametrize("content", ["{", '{"metadata": {}}', "[]", '{"weight_map": null}', "\xff"])
def test_a_damaged_index_of_weight_files_is_refused(
    ask: Request, tmp_path: Path, tiny_base: Path, content: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    message = refusal(ask(model=str(folder)))
    assert "model: its list of weight files cannot be read" in message
    assert f"(got {folder}/model.safetensors.index.json). Copy it again." in message


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_hidden_layers": 1}, "its files hold 2 layers, and its config.json says 1"),
        ({"num_hidden_layers": 3}, "its files hold 2 layers, and its config.json says 3"),
        (
            {"intermediate_size": 99},
            "mlp.gate_proj.weight is [192, 64] in its files, and by its config.json it is [99, 64]",
        ),
        ({"vocab_size": 9999}, "embed_tokens.weight is"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    ask: Request, tmp_path: Path, tiny_base: Path, changes: dict[str, int], rule: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for arguments in ((), ("--dry-run",)):
        assert rule in refusal(ask(*arguments, model=str(folder)))
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_a_folder_is_refused(ask: Request, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "output: it cannot be written" in refusal(ask(output="file/out"))


def test_an_output_with_something_else_in_it_is_refused(ask: Request, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"not": "ours"}')
    assert "no run record that this version reads" in refusal(ask())
    assert (tmp_path / "out" / "run.json").read_text() == '{"not": "ours"}'


def test_a_checkpoint_of_another_model_is_not_resumed(ask: Request, tmp_path: Path) -> None:
    another = {"name": "tiny", "model": "another"}
    checkpoint = stand_in_checkpoint(tmp_path / "out" / "checkpoints", 2, identity=another)
    message = refusal(ask())
    assert f"model: the run in {checkpoint} was started with 'another'" in message
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_second_process_on_the_same_run_is_refused(ask: Request, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert "another process is carrying out this run" in refusal(ask())
    assert not (tmp_path / "out" / "run.json").exists()


def test_an_unreachable_ray_is_refused_before_anything_is_written(ask: Request, tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", "nowhere", "127.0.0.1:99999"):
        assert "cluster.address: no Ray could be joined there" in refusal(ask(cluster={"address": address}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["block_size", "upcast"])
def test_what_cannot_be_trained_with_yet_is_refused_though_it_can_be_planned(ask: Request, field: str) -> None:
    value = {"block_size": 128, "upcast": "peft"}[field]
    assert f"recipe.{field}: it can be planned, but not trained with yet" in refusal(ask(recipe={field: value}))


def test_an_output_on_a_read_only_folder_is_refused(ask: Request, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    # root may write everywhere but where nobody may
    locked = "/proc/out" if os.geteuid() == 0 else "locked/out"
    assert "output: it cannot be written" in refusal(ask(output=locked))


def test_a_plan_that_does_not_fit_is_not_started(ask: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    tiny = type("Memory", (), {"available": 2**20, "total": 2**20})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: tiny)
    result = ask()
    assert isinstance(result.exception, RunFailed)
    assert "does not fit" in str(result.exception)
    assert "--force" in str(result.exception)
    assert not (tmp_path / "out").exists()
    assert ask("--dry-run").return_value == 1


def test_a_dry_run_writes_nothing_and_its_json_is_the_plan(ask: Request, tmp_path: Path) -> None:
    result = ask("--dry-run", "--json")
    assert result.return_value == 0
    plan = json.loads(result.stdout)
    assert plan["strategy"]["world_size"] == 2
    assert plan["recipe"]["compute_dtype"] in ("float32", "bfloat16")
    assert not (tmp_path / "out").exists()


def test_a_missing_specification_and_stray_json_are_usage_errors() -> None:
    for arguments in ([], ["x.yaml", "--json"]):
        result = CliRunner().invoke(train, arguments, standalone_mode=False)
        assert isinstance(result.exception, click.UsageError)
    missing = CliRunner().invoke(train, ["none.yaml"], standalone_mode=False)
    assert "there is no such file" in refusal(missing)
