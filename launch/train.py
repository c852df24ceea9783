"""qlora-train: plan a run from its specification and carry it out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clusters.errors import RequestError, RunFailed
from launch import command
from launch.command import require_train_extra
from launch.train_evaluate import evaluate
from launch.train_export import export
from launch.train_score import score
from launch.train_sweep import sweep
from orchestrator.record import FILE_NAME as RECORD_NAME
from orchestrator.record import REPORT_NAME, load_record, now
from orchestrator.spec import RunSpec, load_spec, schema

if TYPE_CHECKING:
    from orchestrator.machine import Machine


@click.command("qlora-train", cls=command.WithSubcommands, subcommands=(export, evaluate, score, sweep))
@click.argument("specification", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Plan, show the plan, and stop. Exit code 1 if it does not fit.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON.")
@click.option("--preview", is_flag=True, help="Show the data as it would be learned, token by token, and stop.")
@click.option("--force", is_flag=True, help="Start even if the plan says that it cannot fit.")
@click.option("--fresh", is_flag=True, help="Start anew in a folder beside the output folder, if a run lies there.")
@click.option("--schema", "print_schema", is_flag=True, help="Print the JSON schema of a run specification.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="qlora-orchestrator")
def train(
    specification: Path | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    preview: bool,
    force: bool,
    fresh: bool,
    print_schema: bool,
    debug: bool,
) -> int:
    """Carry out the run of a SPECIFICATION (YAML). FIELD=VALUE pairs such as recipe.rank=16 replace fields of it.

    The same command again resumes a run that was stopped, from its last checkpoint.
    """
    if print_schema:
        click.echo(json.dumps(schema(), indent=2))
        return 0
    if specification is None:
        raise click.UsageError("Missing argument SPECIFICATION: the run's YAML file.")
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run.")
    if preview and dry_run:
        raise click.UsageError("--preview and --dry-run each stop by themselves: give one of them.")
    spec = load_spec(specification, overrides)
    require_train_extra("qlora-train")
    if preview:
        return show_data(spec)
    if fresh:
        spec = spec.model_copy(update={"output": str(free_output(spec))})
        click.echo(f"Output: {spec.output}", err=as_json)
    if dry_run:
        return show_plan(spec, as_json=as_json)
    again = f"with {shlex.quote(f'output={spec.output}')} instead of --fresh " if fresh else ""
    return carry_out(spec, force=force, again=again)


def show_data(spec: RunSpec) -> int:
    """Print what the run would learn from and be evaluated on; nothing is written into its folder."""
    from qlora_core.quiet import quiet_libraries

    quiet_libraries()

    from rich.console import Console

    from launch.report.preview import print_preview
    from orchestrator.base import find_base
    from orchestrator.prepare import read_data, read_evaluated
    from qlora_core.training.dataset.mixing import together
    from qlora_core.training.tokenizer import load_tokenizer

    base = find_base(spec, to_stderr)
    tokenizer = load_tokenizer(str(base.folder), spec.data.chat_template)
    found = read_data(spec, base, tokenizer)
    examples = together([examples for examples, _ in found.values()])
    reports = {name: report for name, (_, report) in found.items()}
    evaluated = [report for _, report in read_evaluated(spec, base, tokenizer)]
    print_preview(Console(), reports, evaluated, examples, examples.lengths, spec.recipe.seq_len, tokenizer)
    return 0


def free_output(spec: RunSpec, known: Callable[[Path], bool] = lambda folder: False) -> Path:
    """The output folder, or the first of folder-2, folder-3, ... of which no run lies there or in the storage.

    Raises:
        RequestError: the storage cannot be read.
    """
    from orchestrator.offsite import outputs_stored

    stored = outputs_stored(spec)
    folder = candidate = Path(spec.output)
    number = 1
    while holds_run(candidate) or candidate.name in stored or known(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def holds_run(folder: Path) -> bool:
    """Whether a run lies in a folder."""
    return any((folder / name).exists() for name in (RECORD_NAME, "checkpoints"))


def show_plan(spec: RunSpec, *, as_json: bool) -> int:
    """Print the plan of the run, and start nothing; returns the exit code."""
    from qlora_core.quiet import quiet_libraries, uncollected

    with uncollected():
        quiet_libraries()

        from launch.report.terminal import print_plan
        from orchestrator.prepare import prepare

    plan = prepare(spec, tell=to_stderr).plan
    if as_json:
        click.echo(json.dumps(plan.to_json(), indent=2))
    else:
        print_plan(plan)
    return 0 if plan.fits else 1


def carry_out(
    spec: RunSpec, *, force: bool, machine: Machine | None = None, model_name: str | None = None, again: str = ""
) -> int:
    """Prepare and run; returns the exit code.

    Args:
        machine, model_name: see `prepare`.
        again: how the command is to be changed to resume, with a blank behind it.
    """
    from orchestrator.attempt import ready

    with ready():  # what drives Ray has as much to import as what follows here
        return prepare_and_run(spec, force=force, machine=machine, model_name=model_name, again=again)


def prepare_and_run(spec: RunSpec, *, force: bool, machine: Machine | None, model_name: str | None, again: str) -> int:
    """See `carry_out`."""
    # Only now, since torch and transformers take seconds to import: a wrong specification is told at once.
    from qlora_core.quiet import quiet_libraries, uncollected

    with uncollected():
        quiet_libraries()  # before the libraries are imported, some of which chat while they are

        from rich.console import Console

        from launch.progress import TerminalDisplay, print_summary
        from launch.report.run_report import write_report
        from orchestrator.prepare import prepare
        from orchestrator.run import execute
        from orchestrator.supervisor import Interrupted

    console, output = Console(), Path(spec.output)
    prepared = prepare(spec, tell=to_stderr, machine=machine, model_name=model_name)
    begun = now()
    try:
        with TerminalDisplay(console) as display:
            record, already = execute(prepared, display, force=force)
    except (RunFailed, RequestError):
        # what was saved of it says how far it came and why it ended, if it had begun; storage that fails has failed it
        with suppress(OSError, RequestError):
            failed = load_record(output)
            if (
                failed is not None
                and failed.status == "failed"
                and any(one.started >= begun for one in failed.attempts)
            ):
                print_summary(console, failed, output, write_report(failed, output))
        raise
    except Interrupted:
        command.fail("Interrupted before the first step; nothing was lost. The same command starts again.")
        return command.INTERRUPTED
    if already:
        text = f"The run in {output} is complete already; nothing was done. --fresh starts anew beside it."
        console.print(text, markup=False)
    report: Path | None = output / REPORT_NAME
    if not (already and (output / REPORT_NAME).is_file()):
        report = write_report(record, output)
    print_summary(console, record, output, report)
    if record.status == "interrupted":
        step = record.attempts[-1].to_step
        text = f"\nInterrupted after step {step} of {record.total_steps}. The same command {again}resumes there."
        console.print(text, markup=False, soft_wrap=True)
        return command.INTERRUPTED
    return 0


def to_stderr(text: str) -> None:
    """Tell of what takes long; --json has stdout for itself."""
    click.echo(text, err=True)


def main() -> None:
    """The console script."""
    command.main(train)
