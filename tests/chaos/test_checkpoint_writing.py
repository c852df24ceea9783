"""Checkpoints under attack: killed at every stage of writing one, storage that fails, files that are not ours."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from small_runs import Watcher, build, encode, recipe_of, tensors
from strikes import Row, Rows

from clusters.errors import RunFailed, StorageFailed
from qlora_core.training import checkpoint, manifest
from qlora_core.training.loop import train
from qlora_core.training.manifest import complete, newest_valid, put_aside

AWAY_SECONDS = 20 if os.environ.get("CHAOS_ROWS") else 2
"""The long version is the one that is asked for; the sample takes a tenth of it."""
HARMS: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a bit flipped": lambda path: flip(path),
    "deleted": lambda path: path.unlink(),
}
STAGES = ("save_weights", "save_file", "described", "write_manifest", "publish_folder", "keep_best", "retire")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Path:
    return encode(conversations, tiny_base, tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, data: Path) -> dict[str, bytes]:
    """The last checkpoint of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    train(build(tiny_base, data, folder, recipe_of()), Watcher(), None)
    return tensors(folder / manifest.folder_name(6))


def killed(call: Callable[[], object]) -> None:
    """Carry `call` out in a process of its own, which must die of a SIGKILL that it sends itself."""
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it was not killed: the stage was never reached"
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_of_the_second_checkpoint_the_run_goes_on_bit_for_bit(
    tmp_path: Path, tiny_base: Path, data: Path, whole: dict[str, bytes], stage: str, moment: str, rows: Rows
) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of())
    calls = itertools.count()
    original = getattr(checkpoint, stage)
    # of the first checkpoint, in step 4, all stages are passed
    in_second = 2 if stage == "save_file" else 1  # the adapter and the optimizer's state

    def harmed(*arguments: Any, **named: Any) -> Any:
        fatal = next(calls) == in_second
        if fatal and moment == "before":
            die()
        result = original(*arguments, **named)
        if fatal:
            die()
        return result

    def attempt() -> None:
        setattr(checkpoint, stage, harmed)
        train(run, Watcher(), None)

    killed(attempt)
    found, skipped = newest_valid(tmp_path)
    # it is there once it has its name, and its name comes last
    named = (stage, moment) == ("publish_folder", "after") or stage in ("keep_best", "retire")
    assert found == tmp_path / manifest.folder_name(6 if named else 4)
    for one in skipped:
        assert one.reason
        put_aside(one)
    assert not list(tmp_path.glob(".*.tmp")) or named
    if not named:
        train(build(tiny_base, data, tmp_path, recipe_of(), resume=found), Watcher(), found)
    assert tensors(tmp_path / manifest.folder_name(6)) == whole
    rows.add(Row("kill -9 while a checkpoint is written", True, 0 if named else 2, None))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.chaos
@pytest.mark.parametrize("harm", HARMS)
def test_any_file_of_the_last_checkpoint_harmed_the_run_goes_on_from_the_one_before(
    tmp_path: Path, tiny_base: Path, data: Path, whole: dict[str, bytes], harm: str, rows: Rows
) -> None:
    """A sample of it, on files of no run, is in tests/training/test_manifest.py."""
    train(build(tiny_base, data, tmp_path / "run", recipe_of()), Watcher(), None)
    last = tmp_path / "run" / manifest.folder_name(6)
    for file in sorted(path.relative_to(last) for path in last.rglob("*") if path.is_file()):
        copy = tmp_path / f"{file.name}-copy"
        shutil.copytree(tmp_path / "run", copy)
        HARMS[harm](copy / last.name / file)
        found, (skipped,) = newest_valid(copy)
        assert found == copy / manifest.folder_name(4)
        assert file.as_posix() in skipped.reason
        put_aside(skipped)
        train(build(tiny_base, data, copy, recipe_of(), resume=found), Watcher(), found)
        assert tensors(copy / last.name) == whole
        rows.add(Row(f"a file of the last checkpoint {harm}", True, 2, None))


class Storage:
    """Every write of tensors goes through `save_file`: it can be slow, fail now and then, or be away for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, behave: Callable[[int], None]) -> None:
        self.writes, original = 0, save_file

        def save(*arguments: Any) -> None:
            self.writes += 1
            behave(self.writes)
            original(*arguments)

        monkeypatch.setattr(checkpoint, "save_file", save)


def fails(number: int, every: int) -> None:
    if number % every == 0:
        raise OSError(errno.EIO, "Input/output error")


def test_storage_that_fails_every_fifth_write_costs_nothing(
    tmp_path: Path,
    tiny_base: Path,
    data: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
) -> None:
    storage = Storage(monkeypatch, lambda number: fails(number, 5))
    run = dataclasses.replace(build(tiny_base, data, tmp_path, recipe_of()), save_every=1)
    assert train(run, Watcher(), None).finished
    assert storage.writes >= 12 + 2  # two files at each of six steps, and what failed once more
    assert tensors(tmp_path / manifest.folder_name(6)) == whole
    rows.add(Row("every fifth write fails", True, 0, None))


def test_storage_that_goes_away_for_a_while_costs_nothing(
    tmp_path: Path,
    tiny_base: Path,
    data: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
) -> None:
    gone: list[float] = []

    def away(number: int) -> None:
        if number > 2:
            gone.append(time.monotonic())
            if gone[-1] - gone[0] < AWAY_SECONDS:
                raise OSError(errno.ESTALE, "Stale file handle")  # what NFS says then

    Storage(monkeypatch, away)
    assert train(build(tiny_base, data, tmp_path, recipe_of()), Watcher(), None).finished
    assert gone[-1] - gone[0] >= AWAY_SECONDS
    assert tensors(tmp_path / manifest.folder_name(6)) == whole
    rows.add(Row(f"storage goes away for {AWAY_SECONDS} s", True, 0, None))


def test_slow_storage_holds_up_no_step_before_the_next_checkpoint(
    tmp_path: Path,
    tiny_base: Path,
    data: Path,
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    rows: Rows,
) -> None:
    Storage(monkeypatch, lambda number: time.sleep(0.5 if number <= 2 else 0))
    watcher = Watcher()
    train(build(tiny_base, data, tmp_path, recipe_of()), watcher, None)
    order = [(event["event"], event["step"]) for event in watcher.events if event["event"] in ("step", "checkpoint")]
    # step 5 was done while the checkpoint of step 4 was being written
    assert order.index(("step", 5)) < order.index(("checkpoint", 4))
    assert tensors(tmp_path / manifest.folder_name(6)) == whole
    rows.add(Row("storage is slow", True, 0, None))


def test_storage_that_stays_away_fails_the_run_in_the_end_and_the_last_checkpoint_is_whole(
    tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(number: int) -> None:
        if number > 2:
            raise OSError(errno.EIO, "Input/output error")

    Storage(monkeypatch, away)
    monkeypatch.setattr(checkpoint, "PATIENCE_SECONDS", 1.0)
    run = build(tiny_base, data, tmp_path, recipe_of())
    with pytest.raises(StorageFailed, match=r"step-00000006 could not be written: Input/output error"):
        train(run, Watcher(), None)
    assert newest_valid(tmp_path)[0] == tmp_path / manifest.folder_name(4)


def test_a_pickle_in_the_place_of_weights_is_refused_and_never_run(tmp_path: Path, tiny_base: Path, data: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    train(build(tiny_base, data, tmp_path, recipe_of()), Watcher(stop_after=1), None)
    folder = tmp_path / manifest.folder_name(1)
    fields = manifest.check(folder)
    for victim in ("adapter/adapter_model.safetensors", "optimizer-00000.safetensors"):
        before = (folder / victim).read_bytes()
        (folder / victim).write_bytes(pickle.dumps(Malicious()))
        assert newest_valid(tmp_path)[0] is None
        # one whose author also wrote the manifest
        manifest.write_manifest(folder, fields, manifest.described(folder, list(fields["files"])))
        assert newest_valid(tmp_path)[0] == folder
        with pytest.raises(RunFailed, match="is damaged"):
            train(build(tiny_base, data, tmp_path, recipe_of(), resume=folder), Watcher(), folder)
        (folder / victim).write_bytes(before)
    assert not (tmp_path / "owned").exists()


def test_weights_that_are_not_the_checkpoint_s_after_loading_stop_the_run(
    tmp_path: Path, tiny_base: Path, data: Path
) -> None:
    """As a resume that drops the adapter without a word would leave them."""
    train(build(tiny_base, data, tmp_path, recipe_of()), Watcher(stop_after=2), None)
    folder = tmp_path / manifest.folder_name(2)
    run = build(tiny_base, data, tmp_path, recipe_of())  # nobody loaded the adapter
    with pytest.raises(RunFailed, match="are not those of the checkpoint"):
        train(run, Watcher(), folder)


def test_a_run_that_learns_nothing_fails_loudly(
    tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(tiny_base, data, tmp_path, recipe_of())
    monkeypatch.setattr(run.engine, "step", lambda: 1.0)
    with pytest.raises(RunFailed, match="the trained weights are what they were before the first"):
        train(run, Watcher(), None)
    folder = complete(tmp_path)[6]  # what there is stays, to be looked at
    # the same command again has no step to do, and writes no checkpoint
    again = build(tiny_base, data, tmp_path, recipe_of(), resume=folder)
    with pytest.raises(RunFailed, match="the trained weights are what they were before the first"):
        train(again, Watcher(), folder)
    assert torch.isfinite(next(iter(run.engine.saved_weights().values()))).all()
