"""Supervision without a cluster: growing event files, interrupts, and what a failure is called."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from orchestrator.supervisor import EventReader, Watchdog, forget_ray_state, interrupts, keep_events_until


def test_a_growing_file_is_read_line_by_line_from_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "old"}\n')
    reader = EventReader(path)
    assert list(reader.new()) == []
    with path.open("a") as file:
        file.write('{"event": "a"}\n{"eve')
        file.flush()
        assert list(reader.new()) == [{"event": "a"}]
        file.write('nt": "b"}\n')
        file.flush()
        assert list(reader.new()) == [{"event": "b"}]
    assert list(EventReader(tmp_path / "none").new()) == []


def test_steps_that_will_be_done_again_are_dropped_and_torn_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [{"event": "phase", "phase": "x"}] + [{"event": "step", "step": step} for step in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    keep_events_until(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_ray_forgets_and_checkpoints_stay(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    (tmp_path / "step-00000002").mkdir()
    forget_ray_state(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_is_handled_as_before_afterwards(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with interrupts(tmp_path / "stop") as asked:
        os.kill(os.getpid(), number)
        assert asked.is_set()
        assert (tmp_path / "stop").exists()
    assert signal.getsignal(number) == before


def test_a_hang_is_noticed_by_the_files_that_no_rank_touches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("orchestrator.supervisor.time.time", lambda: now)
    watchdog = Watchdog(tmp_path, 60)
    for rank, touched in ((0, 1000), (1, 990)):
        (tmp_path / f"rank-{rank}").touch()
        os.utime(tmp_path / f"rank-{rank}", (touched, touched))
    now = 1350.0  # the base may take six times as long
    assert watchdog.hung() is None
    now = 1361.0
    assert watchdog.hung() == "no worker got on for 361 s, first rank-1"
    watchdog.saw({"event": "step"})
    now = 1420.0
    assert watchdog.hung() is None
    os.utime(tmp_path / "rank-0", (1420, 1420))  # in the midst of a long step
    now = 1480.0
    assert watchdog.hung() is None
    now = 1481.0
    assert watchdog.hung() is not None
