"""qlora-plan: what a fine-tune needs, where it fits, how to run it best. Imports neither torch nor ray."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launch import command, history
from launch.options import command_line, passed, with_options
from launch.request import plan_of
from launch.serve import serve

if TYPE_CHECKING:
    from launch.sweep import Sweep
    from orchestrator.plans import Plan


@click.command(
    "qlora-plan",
    cls=command.WithSubcommands,
    subcommands=(serve,),
    context_settings={"max_content_width": 120},
)
@with_options
@click.version_option(package_name="qlora-orchestrator")
@click.pass_context
def plan(context: click.Context, /, **options: Any) -> int:
    """Plan a fine-tune: memory by component, which GPUs it fits on, time, price, and the best way to run it.

    Exit code 0: it fits (on at least one of the GPUs shown); 1: it does not; 2: the request is wrong.
    """
    if options["list_kind"]:
        from launch import listing

        (listing.print_models if options["list_kind"] == "models" else listing.print_gpus)(options["as_json"])
        return 0
    if options["model"] is None:
        raise click.UsageError("Missing option --model; --list-models shows what is known by name.")
    if options["reports"]:
        from launch.report.document import check_report

        for each in options["reports"]:
            check_report(Path(each))
    given, known = passed(context), history.known()
    wants_all = (
        options["as_json"] or options["explain"] or options["cluster"] or options["reports"] or options["figures"]
    )
    answer = plan_of(options, given, known, alternatives="all" if wants_all else "nearest")
    swept = None
    if options["sweeps"]:
        from launch.sweep import sweep

        swept = sweep(options, given, known)
    if options["write"]:
        from launch.run_file import write_run

        write_run(answer, options)
    if options["reports"] or options["figures"]:
        from launch.report.document import write, write_figures
        from launch.report.plan_report import document

        report = document(answer, swept, command_line(context))
        for each in options["reports"]:
            write(report, Path(each))
        if options["figures"]:
            write_figures(report, Path(options["figures"]))
    show(answer, swept, options)
    return 0 if answer.fits else 1


def show(answer: Plan, swept: Sweep | None, options: dict[str, Any]) -> None:
    """Print a plan as it was asked for."""
    if options["as_json"]:
        print_json(answer, swept, options["explain"])
    else:
        from launch.report.terminal import print_plan  # rich takes a while, and JSON does without

        print_plan(answer, explained=options["explain"], swept=swept)


def print_json(plan: Plan, swept: Sweep | None, explained: bool) -> None:
    """Print a plan as JSON to stdout, its warnings to stderr."""
    answer = plan.to_json()
    if explained:
        from launch.report.explain import explain

        answer["explanation"] = [{"title": part.title, "lines": list(part.lines)} for part in explain(plan)]
    if swept is not None:
        answer["sweep"] = swept.to_json()
    for warning in plan.warnings:
        command.warn(warning)
    click.echo(json.dumps(answer, indent=2))


def main() -> None:
    """The console script."""
    gc.disable()  # it ends in a moment, and collecting would be a tenth of that
    command.main(plan)
