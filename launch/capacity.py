"""qlora-capacity: what a fleet's runs came to. Planning a fleet's work is not built yet, and it says so."""

from __future__ import annotations

import click

from clusters.errors import request_error
from launch import command
from launch.ledger import ledger


@click.command(
    "qlora-capacity",
    cls=command.WithSubcommands,
    subcommands=(ledger,),
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.version_option(package_name="qlora-orchestrator")
def capacity(arguments: tuple[str, ...]) -> int:
    """Will plan a fleet's capacity; of this the ledger of past runs is built."""
    raise request_error(
        "qlora-capacity",
        " ".join(arguments),
        "this part of the command is not built yet",
        "Past runs: qlora-capacity ledger. Single plans: qlora-plan --model NAME --gpus N",
    )


def main() -> None:
    """The console script."""
    command.main(capacity)
