"""The process of an attempt, before it has an order."""

from __future__ import annotations

import os
import signal
import time

import psutil

from orchestrator.attempt import READY, ready


def process_that_is_ready() -> psutil.Process:
    process = READY.get()
    assert process is not None
    return psutil.Process(process._process.pid)


def test_a_process_that_was_made_ready_ends_with_its_block_where_no_attempt_took_it() -> None:
    with ready():
        process = process_that_is_ready()
        assert process.is_running()
    assert READY.get() is None
    assert not process.is_running()


def test_the_ctrl_c_of_a_terminal_does_not_reach_it_however_early() -> None:
    with ready():
        process = process_that_is_ready()
        process.send_signal(signal.SIGINT)  # before it has left the terminal's session
        deadline = time.monotonic() + 60
        while os.getsid(process.pid) != process.pid:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # it has let signals in
        assert process.status() != psutil.STATUS_ZOMBIE
