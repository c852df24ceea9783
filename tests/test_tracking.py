"""A run's figures: what they are called, who gets them, and that none of these can harm the run. No Ray in here."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from clusters.errors import without_secrets
from launch import progress
from launch.progress import TerminalDisplay, seconds_left
from orchestrator import tracking
from orchestrator.metrics import metrics_of
from orchestrator.prepare import Prepared
from orchestrator.spec import TrackingSpec
from orchestrator.trackers import FILE_NAME, Figures, JsonLines, TensorBoard, Tracked, missing, trackers_of
from orchestrator.tracking import Tracking, told
from qlora_core.recipe import Recipe
from qlora_core.training.dataset import DataReport

PREDICTED = {"phases": {"after_load": 100, "forward": 300, "backward": 400, "optimizer": 200}, "reserved_bytes": 500}
PEAKS = {"after_load": 101, "forward": 290, "backward": 390, "optimizer": 210}


def step(number: int, **changes: Any) -> dict[str, Any]:
    """The event of a step, as `qlora_core.training.loop` tells it."""
    fields = {"event": "step", "time": 1000.0 + number, "step": number, "total": 9, "loss": 8.0 / number}
    rest = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 512, "seconds": 2.0, "peaks": PEAKS, "reserved": 0}
    return {**fields, **rest, **changes}


def evaluation(number: int, loss: float | None) -> dict[str, Any]:
    return {"event": "eval", "time": 1000.5 + number, "step": number, "eval_loss": loss}


def run_in(folder: Path) -> Tracked:
    return Tracked(id="abc123", name="tiny", project="birds", settings={"recipe.rank": 4}, folder=folder)


# --- the figures ------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_step_have_flat_names_and_memory_by_phase_as_predicted_and_as_measured() -> None:
    assert metrics_of(step(4), PREDICTED) == {
        "train/loss": 2.0,
        "train/learning_rate": 1e-3,
        "train/grad_norm": 0.5,
        "train/step_seconds": 2.0,
        "train/tokens_per_second": 256.0,  # 512 tokens in 2 s
        "memory/after_load/predicted_bytes": 100.0,
        "memory/forward/predicted_bytes": 300.0,
        "memory/backward/predicted_bytes": 400.0,
        "memory/optimizer/predicted_bytes": 200.0,
        "memory/after_load/measured_bytes": 101.0,
        "memory/forward/measured_bytes": 290.0,
        "memory/backward/measured_bytes": 390.0,
        "memory/optimizer/measured_bytes": 210.0,
    }
    on_gpu = metrics_of(step(4, reserved=510), PREDICTED)
    assert on_gpu["memory/reserved/measured_bytes"] == 510
    assert on_gpu["memory/reserved/predicted_bytes"] == 500


def test_the_figures_of_an_evaluation_are_its_loss_and_perplexity() -> None:
    # e^0.6931 = 2
    assert metrics_of(evaluation(4, 0.693147181), PREDICTED) == pytest.approx(
        {"eval/loss": 0.6931, "eval/perplexity": 2}, abs=1e-4
    )
    assert metrics_of(evaluation(4, None), PREDICTED) == {}
    assert metrics_of({"event": "phase", "phase": "resuming"}, PREDICTED) == {}


def test_what_is_not_finite_is_no_figure() -> None:
    assert "train/loss" not in metrics_of(step(4, loss=float("nan")), PREDICTED)
    assert metrics_of(evaluation(4, 1000.0), PREDICTED) == {"eval/loss": 1000.0}


def test_the_time_left_counts_evaluations_and_no_earlier_attempt() -> None:
    # resumed after step 4 at t = 100; steps 5 and 6 and an evaluation between them took 30 s; 10 - 6 steps are left
    assert seconds_left({"step": 6, "total": 10, "time": 130.0}, first_step=4, first_time=100.0) == 60.0


@pytest.mark.parametrize("terminal", [True, False])
def test_the_time_left_is_shown_also_where_a_step_takes_a_minute(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "plan_screen", lambda plan: "the plan")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    report = DataReport("text", 9, 0, 0, longest=16, tokens=90, digest="", token_digest="")
    planned = {"plan": SimpleNamespace(recipe=Recipe()), "data": report, "evaluated": None, "held_out": []}
    shown = io.StringIO()

    def comes(*words: str) -> bool:
        """Whether a line with these is shown soon: rich draws the bar again every tenth of a second."""
        deadline = time.monotonic() + 10
        while not any(all(word in line for word in words) for line in shown.getvalue().splitlines()):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    with TerminalDisplay(Console(file=shown, force_terminal=terminal, color_system=None, width=80)) as display:
        display.planned(cast(Prepared, SimpleNamespace(**planned, datasets={}, total_steps=10)))
        for number in range(1, 5):  # steps of 60 s from t = 940, after the second an evaluation of 80 s
            at = 940 + 60 * number + (80 if number > 2 else 0)
            display.event(step(number, total=10, time=at, seconds=60.0))
        # 4 steps in 320 s, so 6 in 480
        assert comes("4/10", "loss 2.000", "0:08:00 left"), shown.getvalue()
        display.event({"event": "phase", "phase": "loading the base model"})  # another attempt, from step 2 at t = 5000
        display.event(step(3, total=10, time=5050, seconds=50.0))
        assert comes("3/10", "0:05:50 left"), shown.getvalue()
        display.event(step(10, total=10, time=5400, seconds=50.0))
        assert comes("10/10", "0:06:40 elapsed"), shown.getvalue()


# --- who gets them ----------------------------------------------------------------------------------------------------


def follow(folder: Path, to: tuple[Any, ...], *events: dict[str, Any], outcome: Any = "complete") -> list[str]:
    """One attempt of a run; returns what the person is told."""
    notes: list[str] = []
    trackers = trackers_of(TrackingSpec(to=to), run_in(folder))
    attempt = Tracking(trackers, told(folder / FILE_NAME), PREDICTED, notes.append)
    for event in events:
        attempt.event(event)
    attempt.finish(outcome)
    return notes


LOSSES = [(1, 8.0), (2, 4.0), (3, 8 / 3), (4, 2.0)]


@pytest.mark.slow
def test_every_tracker_has_each_step_of_a_resumed_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 3, resumed from a checkpoint of step 1: real stores, read by what reads them elsewhere."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = f"file://{tmp_path / 'store'}"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    to: Any = ("tensorboard", "mlflow", "wandb")
    assert missing(TrackingSpec(to=to)) == []
    first = [evaluation(0, 9.0), step(1), evaluation(1, 7.0), step(2), step(3)]
    assert follow(tmp_path, to, *first, outcome="failed") == []
    assert follow(tmp_path, to, step(2), step(3), evaluation(3, 5.0), step(4)) == []

    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] == LOSSES
    assert [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line] == [
        (0, 9.0),
        (1, 7.0),
        (3, 5.0),
    ]

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(one.step, one.value) for one in board.Scalars("train/loss")]
    assert shown == [(number, pytest.approx(loss)) for number, loss in LOSSES]
    assert set(board.Tags()["scalars"]) == {name for line in lines for name in line} - {"step", "time"}

    client = mlflow.MlflowClient(tracking_uri=store)
    [kept] = client.search_runs([client.get_experiment_by_name("birds").experiment_id])
    assert (kept.info.run_name, kept.info.status, kept.data.params) == ("tiny", "FINISHED", {"recipe.rank": "4"})
    assert [(one.step, one.value) for one in client.get_metric_history(kept.info.run_id, "train/loss")] == LOSSES

    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    # offline-run-TIME-ID, and a number where two began within the same second
    assert [folder.name.split("-")[3] for folder in folders] == ["abc123", "abc123"]
    history = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for folder in folders
        for record in wandb_records(next(folder.glob("*.wandb")))
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["step"], row["train/loss"]) for row in history if "train/loss" in row] == LOSSES
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert os.environ["WANDB_API_KEY"].encode() not in everything


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_metrics_go_on_after_a_line_that_was_torn(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text('{"step": 1, "time": 1.0, "train/loss": 2.0}\n{"step": 2, "ti')
    assert told(path)["train/loss"] == 1
    lines = JsonLines(run_in(tmp_path))
    lines.start()
    lines.log(Figures(2, 2.0, {"train/loss": 1.5}))
    assert [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] == [2.0, 1.5]


# --- none can harm the run --------------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_said_once_without_its_password_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    with socket.socket() as nobody:  # a port that is taken, and on which nothing listens
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:hunter22@127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        (tmp_path / "tensorboard").write_text("no folder")
        notes = follow(tmp_path, ("tensorboard", "mlflow"), step(1), step(2))
    assert sorted(note.split(" ended, the run goes on: ")[0] for note in notes) == [
        "Tracking by mlflow",
        "Tracking by tensorboard",
    ]
    assert "hunter22" not in "".join(notes)
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 2


def test_a_full_disk_ends_the_tracking_and_not_the_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")

    class Full(JsonLines):
        def __init__(self) -> None:
            self._path = Path("/dev/full")

        def start(self) -> None:
            """Nothing to cut off: reading this device never ends."""

    notes: list[str] = []
    attempt = Tracking({"full": Full()}, {}, PREDICTED, notes.append)
    attempt.event(step(1))
    attempt.event(step(2))
    attempt.finish("complete")
    assert notes == ["Tracking by full ended, the run goes on: [Errno 28] No space left on device"]


def test_a_tracker_that_hangs_holds_the_run_up_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.05)
    release = threading.Event()

    class Stuck(TensorBoard):
        def log(self, figures: Figures) -> None:
            release.wait()

    notes: list[str] = []
    attempt = Tracking({"stuck": Stuck(run_in(tmp_path))}, {}, PREDICTED, notes.append)
    attempt.event(step(1))
    attempt.finish("complete")
    release.set()
    assert notes == ["Tracking by stuck was not finished within 0 s; metrics.jsonl has all."]


def test_secrets_of_the_environment_and_of_urls_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdef0123456789")
    text = "401 of key abcdef0123456789 at https://me:hunter22@tracker.example/api"
    assert without_secrets(text) == "401 of key *** at https://***@tracker.example/api"


# --- what is refused before anything starts ---------------------------------------------------------------------------


def test_missing_packages_and_credentials_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    to: Any = ("tensorboard", "mlflow", "wandb")
    problems = [str(problem) for problem in missing(TrackingSpec(to=to))]
    assert problems[0] == (
        "tracking.to: the package mlflow is not installed (got mlflow). Run pip install mlflow, or leave mlflow out."
    )
    pytest.importorskip("wandb")
    assert problems[1:] == [
        "tracking.to: WANDB_API_KEY is not set, and nobody is logged in (got wandb). Set it, or WANDB_MODE=offline."
    ]


def test_a_login_of_wandb_is_found_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123456789\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert missing(TrackingSpec(to=("wandb",))) == []
