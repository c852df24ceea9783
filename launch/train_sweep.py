"""qlora-train sweep: one run for each combination of some fields' values, and the best of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch import command
from launch.report.words import gib
from orchestrator.trials import Trial, trials_of

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.sweep import Outcome


@click.command("sweep")
@click.argument("specification", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, required=True, metavar="FIELD=VALUE[,VALUE]...")
@click.option("--trials", "at_most", type=click.IntRange(min=1), help="Combinations drawn by the seed. Default: all.")
@click.option("--dry-run", is_flag=True, help="Plan each trial, show the plans, and stop. Exit code 1 if none fits.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def sweep(
    specification: Path, overrides: tuple[str, ...], at_most: int | None, dry_run: bool, as_json: bool, debug: bool
) -> int:
    """Run a SPECIFICATION once for each combination of values, such as recipe.learning_rate=1e-4,2e-4 recipe.rank=8,16.

    Each trial is planned, and is a run in a folder of its own below the specification's output. The same command again
    goes on: complete trials are not done again.
    """
    trials = trials_of(specification, overrides, at_most)
    command.require_train_extra("qlora-train sweep")
    from qlora_core.quiet import quiet_libraries

    quiet_libraries()

    from rich.console import Console

    from orchestrator.sweep import plan_trials, summary

    console = Console(stderr=as_json)  # --json owns stdout
    with console.status(f"planning {len(trials)} trials"):
        outcomes = plan_trials(trials, tell=lambda text: click.echo(text, err=True))
    fitting = [outcome for outcome in outcomes if outcome.plan.fits]
    if dry_run or not fitting:
        show_plans(console, outcomes)
    elif len(fitting) < len(outcomes):
        console.print(f"{len(outcomes) - len(fitting)} of {len(outcomes)} trials do not fit and are not started.")
    if fitting and not dry_run:
        output = Path(trials[0].spec.output).parent
        outcomes = run(console, outcomes, len(fitting), output)
        show_outcomes(console, outcomes, output)
    if as_json:
        click.echo(json.dumps(summary(outcomes), indent=2))
    return exit_code(fitting, dry_run)


def exit_code(fitting: Sequence[Outcome], dry_run: bool) -> int:
    """0 where all that fits is complete, 130 where it was interrupted, else 1."""
    statuses = {outcome.status for outcome in fitting}
    if not statuses or "failed" in statuses:
        return 1
    return 0 if dry_run or statuses == {"complete"} else command.INTERRUPTED


def run(console: Console, outcomes: Sequence[Outcome], fitting: int, output: Path) -> list[Outcome]:
    """Run the trials, of which so many fit, under a bar that counts the steps of all, and write the report of each."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from launch.report.run_report import write_report
    from orchestrator.record import load_record
    from orchestrator.sweep import run_trials

    done: dict[str, int] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # the time left goes by all steps: those of the last 30 s, which rich looks at by itself, may be one or none
    with Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=math.inf) as bar:
        task = bar.add_task("steps of all trials", total=None)

        def on_step(trial: Trial, step: int, of: int) -> None:
            done[trial.name] = step
            bar.update(task, completed=sum(done.values()), total=of * fitting, description=trial.name)

        ended = run_trials(outcomes, output, on_step)
    for outcome in ended:
        folder = Path(outcome.trial.spec.output)
        if outcome.status in ("complete", "interrupted") and (record := load_record(folder)) is not None:
            write_report(record, folder)
    return ended


def show_plans(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print what each trial would need."""
    table = outcome_table(outcomes, "predicted", "of usable", "micro-batch", "verdict")
    for outcome in outcomes:
        plan = outcome.plan
        values = gib(outcome.predicted_bytes), gib(plan.verdict.usable_bytes), str(plan.strategy.micro_batch)
        table.add_row(*outcome.trial.swept.values(), *values, "fits" if plan.fits else "does not fit")
    console.print(table)


def show_outcomes(console: Console, outcomes: Sequence[Outcome], output: Path) -> None:
    """Print what became of each trial, the best first, and where the best one lies."""
    table = outcome_table(outcomes, "eval loss", "perplexity", "s/step", "predicted", "measured", "status")
    for outcome in outcomes:
        figures = (outcome.eval_loss, outcome.perplexity, outcome.step_seconds)
        measured = "-" if outcome.measured_bytes is None else gib(outcome.measured_bytes)
        written = ("-" if figure is None else f"{figure:.4g}" for figure in figures)
        table.add_row(*outcome.trial.swept.values(), *written, gib(outcome.predicted_bytes), measured, outcome.status)
    console.print(table)
    for outcome in outcomes:
        if outcome.reason is not None:
            console.print(f"{outcome.trial.name}: {outcome.reason}", highlight=False, markup=False, soft_wrap=True)
    if outcomes[0].result is not None:
        best = f"Best: {outcomes[0].trial.name}, in {outcomes[0].result}"
        console.print(best, highlight=False, markup=False, soft_wrap=True)
    if any(outcome.status in ("interrupted", "not started") for outcome in outcomes):
        console.print("Interrupted. The same command goes on.")


def outcome_table(outcomes: Sequence[Outcome], *columns: str) -> Any:
    """An empty table with a column for each swept field before the given ones."""
    from rich.table import Table

    return Table(*outcomes[0].trial.swept, *columns, box=None, pad_edge=False)
