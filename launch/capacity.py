"""qlora-capacity: what a fleet of GPUs can carry, and what its past runs came to."""

from __future__ import annotations

from pathlib import Path

import click

from launch import command, history
from launch.ledger import ledger


@click.command("qlora-capacity", cls=command.WithSubcommands, subcommands=(ledger,))
@click.argument("fleet", type=click.Path(path_type=Path))
@click.option("--jobs", required=True, type=click.Path(path_type=Path), help="The fine-tunes it is to carry (YAML).")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.1, max=600),
    default=3.0,
    show_default=True,
    help="That the solver may take; longer brings the answer nearer to the best.",
)
@click.option("--methods", is_flag=True, help="Say what the same work takes with QLoRA, LoRA and all weights.")
@click.option(
    "--report",
    "reports",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="Write a FILE.html or FILE.md, too; may be repeated.",
)
@click.option("--figures", type=click.Path(path_type=Path, file_okay=False), help="Write its pictures into a folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="qlora-orchestrator")
def capacity(
    fleet: Path,
    jobs: Path,
    seconds: float,
    methods: bool,
    reports: tuple[Path, ...],
    figures: Path | None,
    as_json: bool,
    debug: bool,
) -> int:
    """What the FLEET of a description (docs/clusters.md) comes to with a list of fine-tunes (docs/capacity.md).

    Exit code 1 where a run fits nowhere or a deadline is missed.
    """
    from clusters.cluster import load_cluster
    from launch.report import document
    from launch.report.capacity import as_json as json_of
    from launch.report.capacity import document as report_of
    from orchestrator.fleet.jobs import load_jobs
    from orchestrator.fleet.outlook import outlook

    for report in reports:
        document.check_report(report)
    answer = outlook(load_cluster(fleet), load_jobs(jobs), history.known(), seconds, other_methods=methods)
    found = report_of(answer)
    for report in reports:
        document.write(found, report)
    if figures is not None:
        document.write_figures(found, figures)
    if as_json:
        click.echo(json_of(answer))
    else:
        document.show(found)
    return 1 if answer.figures.nowhere or answer.figures.late else 0


def main() -> None:
    """The console script."""
    command.main(capacity)
