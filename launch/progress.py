"""A run as it happens: one progress bar on a terminal, a line now and then elsewhere; a summary at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from launch.report.terminal import measured_table, plan_screen
from launch.report.words import ending, gib, mixture, written_otherwise
from orchestrator.prepare import Prepared
from orchestrator.record import RunRecord
from orchestrator.trackers import FILE_NAME
from qlora_core.data import in_an_epoch
from qlora_core.perplexity import perplexity
from qlora_core.training.dataset import DataReport

LINE_SECONDS = 15.0
"""Without a terminal, a line at most this often."""


class TerminalDisplay:
    """Implements `orchestrator.run.Display`; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn(
                "{task.fields[time]}"
            ),  # rich's own column knows the last 30 s, and so no step that takes longer
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting Ray", total=None, figures="", time="")
        self._last_line = 0.0
        self._speed: float | None = None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, prepared: Prepared) -> None:
        """See `Display`."""
        data, plan = prepared.data, prepared.plan
        self._console.print(plan_screen(plan))
        found = f" ({data.found})" if data.found else ""
        found += f", its columns {', '.join(data.unread)} not read" if data.unread else ""
        seq_len, evaluated = plan.recipe.seq_len, prepared.evaluated
        whence = "held out"
        if evaluated is not None:
            whence = f"of {evaluated.source} to evaluate on{became(evaluated, seq_len)}"
        packed = "packed " if plan.recipe.packing else ""
        self._console.print(
            f"\nData: {data.examples} examples in format {data.format}{found}, the longest {data.longest} tokens"
            f"{in_an_epoch(data.times)}{became(data, seq_len)}; "
            f"{len(prepared.held_out)} {whence}. {prepared.total_steps} steps of "
            f"{plan.recipe.sequences_per_step} {packed}sequences.",
            highlight=False,
        )
        for said in (*mixture(prepared.datasets), *written_otherwise(data.divided, data.shortened)):
            self.note(said)
        self._bar.start()

    def resuming(self, step: int, total: int, checkpoint: Path) -> None:
        """See `Display`."""
        self.note(f"Resuming after step {step} of {total} from {checkpoint}")
        self._bar.update(self._task, completed=step)

    def note(self, text: str) -> None:
        """See `Display`."""
        self._console.print(text, highlight=False, markup=False)  # it may quote a library's brackets

    def event(self, event: Mapping[str, Any]) -> None:
        """See `Display`."""
        if event["event"] == "phase":
            self._first = None  # phases come before an attempt's steps
            self._bar.update(self._task, description=event["phase"])
            if self._bar.disable:
                self.note(event["phase"])
        elif event["event"] == "rehearsal":
            largest = f"{event['sequences']} sequences of up to {event['longest']} tokens"
            self.note(f"The run's largest micro-batch, {largest}, was tried: {gib(max(event['peaks'].values()))}")
        elif event["event"] == "prometheus":
            self.note(f"Metrics for Prometheus: {event['url']}")
        elif event["event"] == "step":
            self._step(event)

    def _step(self, event: Mapping[str, Any]) -> None:
        speed = event["tokens"] / event["seconds"]
        self._speed = speed if self._speed is None else 0.9 * self._speed + 0.1 * speed
        figures = (
            f"loss {event['loss']:.3f} lr {event['learning_rate']:.1e} {self._speed:.0f} tok/s "
            f"{gib(max(event['peaks'].values()))}"
        )
        first = self._first = self._first or (event["step"] - 1, event["time"] - event["seconds"])
        clock = time_shown(event, *first)
        self._bar.update(
            self._task, description="", completed=event["step"], total=event["total"], figures=figures, time=clock
        )
        due = time.monotonic() - self._last_line >= LINE_SECONDS
        if self._bar.disable and (due or event["step"] == event["total"]):
            self._last_line = time.monotonic()
            self._console.print(f"step {event['step']}/{event['total']}  {figures}  {clock}", highlight=False)


def time_shown(event: Mapping[str, Any], first_step: int, first_time: float) -> str:
    """The time that is left after `event`'s step; after the last one, what this attempt's steps took."""
    if event["step"] == event["total"]:
        return f"{timedelta(seconds=round(event['time'] - first_time))} elapsed"
    return f"{timedelta(seconds=round(seconds_left(event, first_step, first_time)))} left"


def seconds_left(event: Mapping[str, Any], first_step: int, first_time: float) -> float:
    """The time that the steps after `event`'s take, going by those since `first_step` was done at `first_time`.

    Evaluations and checkpoints between them count, as they will again; steps of earlier attempts do not.
    """
    per_step: float = (event["time"] - first_time) / (event["step"] - first_step)
    return per_step * float(event["total"] - event["step"])


def print_summary(console: Console, record: RunRecord, folder: Path, report: Path | None) -> None:
    """The end of a run on half a screen."""
    results = record.results
    before, after = results.get("eval_before"), results.get("eval_after")
    console.print(f"\n[bold]Run {record.name}: {record.status}[/bold]", highlight=False)
    failed = [
        f"{one.failure['kind']} ({one.decision['action']})" for one in record.attempts if one.failure and one.decision
    ]
    if failed:
        tried = len(record.attempts)
        console.print(f"{tried} attempt{'s' if tried > 1 else ''}; on the way: {', '.join(failed)}.", highlight=False)
    if before is not None and after is not None:
        change = f" ({(after - before) / before:+z.0%})"
        console.print(
            f"Evaluation loss on held-out examples: {before:.4f} before, {after:.4f} after{change}; "
            f"perplexity {perplexity(before):.2f} and {perplexity(after):.2f}",
            highlight=False,
        )
    for said in ending(results, record.attempts[-1].to_step, record.total_steps) if record.status == "complete" else ():
        console.print(said, highlight=False, markup=False)
    for first, last in zip(results.get("answers_before", []), results.get("answers_after", []), strict=False):
        console.print(f"\n  asked     {first['question']}", highlight=False, markup=False)
        console.print(f"  expected  {first['expected']}", highlight=False, markup=False)
        console.print(f"  before    {first['given'] or '(nothing)'}", highlight=False, markup=False)
        console.print(f"  after     {last['given'] or '(nothing)'}", highlight=False, markup=False)
    if record.measured is not None:
        console.print(measured_table(record.predicted, record.measured))
        console.print(f"Measured: {record.measured['allocated_is']}.", highlight=False)
    console.print()
    for title, path in (
        ("model", record.weights) if record.weights else ("adapter", record.adapter),
        ("checkpoints", folder / "checkpoints"),
        ("metrics", folder / FILE_NAME),
        ("report", report),
    ):
        if path is not None:
            console.print(f"  {title:<12}{path}", highlight=False, markup=False, soft_wrap=True)


def became(data: DataReport, seq_len: int) -> str:
    """What of some data was cut off, in pieces or left out, to end a sentence; nothing where all is whole."""
    said = [f"{data.truncated} cut off at {seq_len} tokens"] if data.truncated else []
    said += [f"{data.in_pieces} texts longer than {seq_len} tokens in pieces"] if data.in_pieces else []
    return "".join(f", {part}" for part in [*said, *data.left_out()])
