"""Checkpoints in object storage: a real S3-compatible server, which also fails, is slow, and goes away."""

from __future__ import annotations

import errno
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from real_runs import MARK, TIMEOUT, make_run
from s3_server import new_bucket, s3_server
from small_runs import stand_in_checkpoint
from strikes import Row, Rows

from clusters.errors import RequestError, RunFailed
from launch.train import free_output
from orchestrator import offsite
from orchestrator.offsite import Offsite
from orchestrator.spec import RunSpec
from qlora_core.training import manifest
from qlora_core.training.manifest import complete, newest_valid

SECRET = uuid.uuid4().hex
IDENTITY = {"name": "tiny"}


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What a user of the server sets."""
    with s3_server(SECRET) as environment:
        yield environment


@pytest.fixture
def bucket(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    return new_bucket(environment, monkeypatch)


@pytest.fixture
def told() -> list[str]:
    return []


def make(checkpoints: Path, step: int) -> Path:
    return stand_in_checkpoint(checkpoints, step, identity=IDENTITY)


def stored(bucket: str, told: list[str], *folders: Path) -> Offsite:
    storage = Offsite(f"s3://{bucket}/runs/tiny", 2, told.append)
    for folder in folders:
        storage.keep(folder)
    storage.finish()
    return storage


def names(bucket: str, folder: str = "runs/tiny") -> set[str]:
    filesystem = s3fs.S3FileSystem()
    filesystem.invalidate_cache()
    return {path.rpartition("/")[2] for path in filesystem.ls(f"{bucket}/{folder}", detail=False)}


def test_the_last_few_are_there_and_come_back_whole(tmp_path: Path, bucket: str, told: list[str]) -> None:
    folders = [make(tmp_path / "here", step) for step in (10, 20, 30)]
    storage = stored(bucket, told, *folders)
    assert names(bucket) == {"step-00000020", "step-00000030"}
    fetched = storage.fetch(tmp_path / "elsewhere", IDENTITY)
    assert fetched == tmp_path / "elsewhere" / "step-00000030"
    for path in folders[-1].rglob("*.*"):
        assert (fetched / path.relative_to(folders[-1])).read_bytes() == path.read_bytes()
    assert storage.fetch(tmp_path / "elsewhere", IDENTITY) is None  # it is as new
    assert told == []


def test_the_best_comes_along(tmp_path: Path, bucket: str, told: list[str]) -> None:
    folders = [make(tmp_path / "here", step) for step in (10, 20, 30)]
    best = folders[0].rename(tmp_path / "here" / manifest.BEST)
    storage = stored(bucket, told, best, *folders[1:])
    assert names(bucket) == {"best-00000010", "step-00000020", "step-00000030"}
    storage.fetch(tmp_path / "elsewhere", IDENTITY)
    assert manifest.after_step(tmp_path / "elsewhere", 10) == tmp_path / "elsewhere" / manifest.BEST
    assert manifest.after_step(tmp_path / "elsewhere", 30) == tmp_path / "elsewhere" / "step-00000030"
    assert manifest.after_step(tmp_path / "elsewhere", 20) is None
    assert told == []


def make_best(checkpoints: Path, step: int) -> Path:
    shutil.rmtree(checkpoints / manifest.BEST, ignore_errors=True)
    return make(checkpoints, step).rename(checkpoints / manifest.BEST)


def test_the_best_there_stays_until_another_is_whole(
    tmp_path: Path, bucket: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(number: int) -> None:
        if number > 2:
            raise ConnectionError("the machine is gone")

    storage = stored(bucket, told, make_best(tmp_path / "here", 10), make(tmp_path / "here", 10))
    with monkeypatch.context() as patch:
        patch.setattr(offsite, "PATIENCE_SECONDS", 0.5)
        unreliable(patch, dies)
        stored(bucket, told, make_best(tmp_path / "here", 20))
    s3fs.S3FileSystem.clear_instance_cache()
    storage.fetch(tmp_path / "elsewhere", IDENTITY)
    assert manifest.after_step(tmp_path / "elsewhere", 10) is not None
    assert manifest.check(tmp_path / "elsewhere" / manifest.BEST, 10)
    stored(bucket, told, make_best(tmp_path / "here", 30))
    assert names(bucket) == {"best-00000030", "step-00000010"}


def test_a_best_that_is_replaced_while_it_is_copied_is_none(
    tmp_path: Path, bucket: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"

    def replaced(number: int) -> None:
        if number == 1:
            make_best(here, 30)

    storage = stored(bucket, told, make_best(here, 10), make(here, 10))
    with monkeypatch.context() as patch:
        unreliable(patch, replaced)
        stored(bucket, told, make_best(here, 20))
    s3fs.S3FileSystem.clear_instance_cache()
    storage.fetch(tmp_path / "elsewhere", IDENTITY)
    assert manifest.check(tmp_path / "elsewhere" / manifest.BEST, 10)


def test_another_version_s_checkpoint_is_no_fault_of_the_storage(tmp_path: Path, bucket: str, told: list[str]) -> None:
    folder = make(tmp_path / "here", 10)
    (folder / manifest.FILE_NAME).write_text('{"format_version": 3}')
    storage = stored(bucket, told, folder)
    with pytest.raises(RunFailed, match=rf"The checkpoint s3://{bucket}/runs/tiny/step-00000010 has format version 3"):
        storage.fetch(tmp_path / "elsewhere", IDENTITY)


def test_what_was_harmed_there_is_passed_over(tmp_path: Path, bucket: str, told: list[str]) -> None:
    storage = stored(bucket, told, make(tmp_path / "here", 10), make(tmp_path / "here", 20))
    key = f"{bucket}/runs/tiny/step-00000020/optimizer-00000.safetensors"
    size = (tmp_path / "here" / "step-00000020" / "optimizer-00000.safetensors").stat().st_size
    s3fs.S3FileSystem().pipe_file(key, b"\0" * size)
    assert storage.fetch(tmp_path / "elsewhere", IDENTITY) == tmp_path / "elsewhere" / "step-00000010"
    assert "step-00000020" in told[0]
    assert "SHA-256" in told[0]
    assert list(complete(tmp_path / "elsewhere")) == [10]


def test_a_half_uploaded_one_is_none_and_lets_no_whole_one_go(tmp_path: Path, bucket: str, told: list[str]) -> None:
    filesystem = s3fs.S3FileSystem()
    storage = stored(bucket, told, make(tmp_path / "here", 10), make(tmp_path / "here", 20))
    half = make(tmp_path / "here", 30)
    (half / manifest.FILE_NAME).unlink()  # comes last, so that is what a killed upload leaves
    stored(bucket, told, half)
    assert names(bucket) == {"step-00000010", "step-00000020", "step-00000030"}
    assert storage.fetch(tmp_path / "elsewhere", IDENTITY) == tmp_path / "elsewhere" / "step-00000020"
    assert not filesystem.exists(f"{bucket}/runs/tiny/.probe")


def test_another_run_s_checkpoints_are_refused_and_left_there(tmp_path: Path, bucket: str, told: list[str]) -> None:
    storage = stored(bucket, told, make(tmp_path / "here", 10))
    with pytest.raises(RequestError, match="was started with 'tiny'"):
        storage.fetch(tmp_path / "elsewhere", {"name": "other"})
    assert not complete(tmp_path / "elsewhere")


@pytest.mark.parametrize("storage", ["s3", "folder"])
def test_a_fresh_run_shares_nothing_with_the_one_before(
    tmp_path: Path, bucket: str, told: list[str], storage: str
) -> None:
    address = f"s3://{bucket}/runs" if storage == "s3" else f"file://{tmp_path}/runs"
    fields = {"name": "tiny", "model": "m", "data": {"path": "d"}, "checkpoints": {"storage": address}}
    spec = RunSpec.model_validate({**fields, "output": str(tmp_path / "out")})
    assert free_output(spec) == tmp_path / "out"
    with offsite.offsite(spec, told.append) as first:
        assert first is not None
        first.keep(make(tmp_path / "here", 10))
    fresh = free_output(spec)  # on a machine where the output folder is not
    assert fresh == tmp_path / "out-2"
    with offsite.offsite(spec.model_copy(update={"output": str(fresh)}), told.append) as second:
        assert second is not None
        assert second.fetch(tmp_path / "elsewhere", {"name": "tiny", "recipe.rank": 8}) is None
    with offsite.offsite(spec, told.append) as again:
        assert again is not None
        assert again.fetch(tmp_path / "elsewhere", IDENTITY) is not None
    assert told == []


def unreliable(monkeypatch: pytest.MonkeyPatch, behave: Callable[[int], None]) -> list[float]:
    """Let each upload fail as `behave` raises; returns their times."""
    times: list[float] = []
    original = s3fs.S3FileSystem._put_file

    async def put(self: Any, *arguments: Any, **named: Any) -> Any:
        times.append(time.monotonic())
        behave(len(times))
        return await original(self, *arguments, **named)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", put)
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the methods that its class had
    return times


def test_every_fifth_upload_fails_and_all_arrive(
    tmp_path: Path, bucket: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fifth(number: int) -> None:
        if number % 5 == 0:
            raise OSError(errno.EIO, f"with a secret: {SECRET}")

    times = unreliable(monkeypatch, fifth)
    stored(bucket, told, *(make(tmp_path / "here", step) for step in (10, 20, 30)))
    assert len(times) > 15  # five files in each, and what failed once more
    assert names(bucket) == {"step-00000020", "step-00000030"}
    assert told == []


def test_storage_that_is_away_for_a_while_is_waited_for(
    tmp_path: Path, bucket: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.monotonic()

    def away(number: int) -> None:
        if time.monotonic() - begun < 3:
            raise ConnectionError("it is away")

    unreliable(monkeypatch, away)
    stored(bucket, told, make(tmp_path / "here", 10))
    assert names(bucket) == {"step-00000010"}
    assert told == []


def test_storage_that_stays_away_is_told_of_without_a_secret_and_the_run_goes_on(
    tmp_path: Path, bucket: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(number: int) -> None:
        raise ConnectionError(f"no way for {SECRET}")

    monkeypatch.setattr(offsite, "PATIENCE_SECONDS", 1.0)
    unreliable(monkeypatch, away)
    stored(bucket, told, make(tmp_path / "here", 10))
    assert "step-00000010 could not be copied" in told[0]
    assert SECRET not in told[0]
    assert newest_valid(tmp_path / "here")[0] is not None


def test_a_bucket_that_is_not_there_is_refused_at_the_start(bucket: str, told: list[str]) -> None:
    with pytest.raises(RequestError, match=r"checkpoints\.storage"):
        Offsite("s3://no-such-bucket-of-mine/runs", 2, told.append).fetch(Path("none"), IDENTITY)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.xdist_group("workers")
def test_a_run_whose_machine_is_gone_goes_on_elsewhere(
    tmp_path: Path, tiny_base: Path, conversations: Path, environment: dict[str, str], bucket: str, rows: Rows
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    changes: dict[str, dict[str, Any]] = {
        "recipe": {"steps": 120},
        "checkpoints": {"every_steps": 10, "storage": f"s3://{bucket}/runs"},
        "evaluation": {},
    }
    first, second = (make_run(tmp_path / name, tiny_base, conversations, **changes) for name in ("first", "second"))
    for run in (first, second):
        run.environment |= environment
    process = first.start()
    first.wait_for_step(60, process)
    for each in first.processes():
        each.kill()
    process.communicate(timeout=TIMEOUT)
    struck = time.time()
    code, output = second.finish()
    assert code == 0, output
    assert "came from s3://" in output
    from_step = second.record["attempts"][0]["from_step"]
    assert from_step >= 40
    assert SECRET not in output + (second.folder / "run.json").read_text()
    assert "adapter" in names(bucket, "runs/tiny/out")
    again = next(event["time"] for event in second.events() if event.get("step") == from_step + 1)
    rows.add(
        Row("the machine is gone, the run goes on from S3 elsewhere", True, max(0, 60 - from_step), again - struck)
    )
    assert second.environment[MARK] != first.environment[MARK]
