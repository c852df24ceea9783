"""The commands about jobs, without a Ray: what they show, a connection that is lost, a result that is copied."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus, JobType

from clusters.errors import RequestError
from launch import jobs, submitted
from launch.submitted import copy_into, list_jobs, standing, waited


def job_of(name: str, status: JobStatus, **fields: Any) -> JobDetails:
    said = {"run": "demo", "model": "demo-base", "workers": "2", "predicted": "21.25 MiB a worker", "owner": "root"}
    told = {"type": JobType.SUBMISSION, "metadata": said, "entrypoint": jobs.ENTRYPOINT, "start_time": 1764500000000}
    return JobDetails(submission_id=name, status=status, **{**told, **fields})


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[JobDetails]:
    """Two jobs of a stand-in for a Jobs API, of which the first has not begun."""
    found = [
        job_of("demo-46f08dc5-2", JobStatus.PENDING, start_time=1764500000001, entrypoint_memory=2**30),
        job_of("demo-46f08dc5-1", JobStatus.FAILED, driver_exit_code=130),
    ]
    monkeypatch.setattr(submitted, "client_of", lambda address: SimpleNamespace(list_jobs=lambda: found))
    return found


def test_a_list_in_a_pipe_has_a_line_for_each_job_and_cuts_nothing_off(listed: list[JobDetails]) -> None:
    header, *lines = CliRunner().invoke(list_jobs, standalone_mode=False).stdout.splitlines()
    assert header.split() == ["job", "status", "model", "workers", "predicted", "owner", "submitted", "waits"]
    facts = "demo-base 2 21.25 MiB a worker root 2025-11-30 10:53:20"
    assert [" ".join(line.split()) for line in lines] == [
        f"demo-46f08dc5-2 pending {facts} waiting for the head to start it",
        f"demo-46f08dc5-1 stopped {facts}",
    ]


def test_in_a_narrow_terminal_jobs_and_their_status_stay_whole(
    listed: list[JobDetails], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitted, "PIPED_WIDTH", 80)
    shown = CliRunner().invoke(list_jobs, standalone_mode=False).stdout
    for one in ("demo-46f08dc5-2  pending", "demo-46f08dc5-1  stopped"):
        assert one in shown


@pytest.mark.parametrize(
    ("status", "code", "word"),
    [
        (JobStatus.FAILED, 130, "stopped"),
        (JobStatus.FAILED, 1, "failed"),
        (JobStatus.STOPPED, None, "stopped"),
        (JobStatus.SUCCEEDED, 0, "succeeded"),
    ],
)
def test_a_job_that_was_asked_to_stop_has_not_failed(status: JobStatus, code: int | None, word: str) -> None:
    assert standing(job_of("demo-1", status, driver_exit_code=code)) == word


# --- a connection that is lost ----------------------------------------------------------------------------------------


class BreaksOff(BaseHTTPRequestHandler):
    """A stand-in for a head that answers, is gone for two questions, and then tells of a job's end."""

    asked = 0

    def do_GET(self) -> None:
        version = self.path == "/api/version"
        if not version:
            BreaksOff.asked += 1
        if not version and BreaksOff.asked in (2, 3):
            if BreaksOff.asked == 2:
                return  # the connection ends without an answer
            self.send_error(500)
            return
        status = "RUNNING" if BreaksOff.asked == 1 else "SUCCEEDED"
        job = f'{{"type": "SUBMISSION", "submission_id": "demo-1", "status": "{status}", "entrypoint": "true"}}'
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "4", "ray_version": "9.9.9"}' if version else job.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def client() -> Iterator[Any]:
    BreaksOff.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield jobs.connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_who_waits_goes_on_waiting_when_a_connection_is_lost(client: Any) -> None:
    assert waited(client, "demo-1").status is JobStatus.SUCCEEDED
    assert BreaksOff.asked == 4


def test_a_connection_that_stays_lost_is_told_with_what_becomes_of_the_job(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOST_SECONDS", 0)
    with pytest.raises(RequestError, match=r"the connection was lost.* the job goes on.* qlora-submit wait demo-1"):
        waited(client, "demo-1")


def test_nothing_is_said_of_large_files_that_travel(
    client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "job").mkdir()
    with (tmp_path / "job" / "model.safetensors").open("wb") as file:
        file.truncate(11 * 2**20)
    create_package(str(tmp_path / "job"), tmp_path / "job.zip", include_gitignore=True)
    assert (tmp_path / "job.zip").is_file()
    assert not caplog.records


# --- a result ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> list[Path]:
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "out" / "run.json").write_text("{}")
    return [tmp_path / "out" / "adapter", tmp_path / "out" / "run.json"]


def test_a_result_that_cannot_be_copied_is_told_as_the_folders_fault(tmp_path: Path, kept: list[Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--to: the result cannot be copied there: Not a directory"):
        copy_into(tmp_path / "file" / "mine", kept)
    with pytest.raises(RequestError, match="--to: the result cannot be copied there"):
        copy_into(Path("/proc/mine"), kept)


def test_a_copy_that_breaks_off_leaves_nothing_and_can_be_made_again(tmp_path: Path, kept: list[Path]) -> None:
    to = tmp_path / "mine"
    with pytest.raises(RequestError, match="No such file"):
        copy_into(to, [*kept, tmp_path / "out" / "gone"])
    assert not list(to.iterdir())
    (to / submitted.COPYING).mkdir()  # of a process that was killed
    copy_into(to, kept)
    assert sorted(path.name for path in to.iterdir()) == ["adapter", "run.json"]
    with pytest.raises(RequestError, match="it is not empty"):
        copy_into(to, kept)
