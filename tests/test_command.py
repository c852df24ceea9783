"""What all commands share: a command with others beside it."""

from __future__ import annotations

import subprocess
import sys

import click
from click.testing import CliRunner

from launch.command import WithSubcommands


@click.command("sweep")
@click.argument("values", nargs=-1)
@click.option("--json", "as_json", is_flag=True)
def sweep(values: tuple[str, ...], as_json: bool) -> None:
    """Run many."""
    click.echo(f"sweep {values} {as_json}")


@click.command("tool", cls=WithSubcommands, subcommands=(sweep,))
@click.argument("words", nargs=-1)
@click.option("--force", is_flag=True, help="Do it anyway.")
def tool(words: tuple[str, ...], force: bool) -> None:
    """Run one."""
    click.echo(f"tool {words} {force}")


def said(*arguments: str) -> str:
    return CliRunner().invoke(tool, arguments).output.strip()


def test_the_first_word_is_a_known_subcommand_or_else_the_command_itself_is_meant() -> None:
    assert said("run.yaml", "sweep", "--force") == "tool ('run.yaml', 'sweep') True"
    assert said("sweep", "run.yaml", "--json") == "sweep ('run.yaml',) True"
    assert said("--force", "sweep") == "tool ('sweep',) True"
    assert said() == "tool () False"


def test_the_help_shows_the_commands_own_options_and_its_subcommands() -> None:
    shown = said("--help")
    assert "--force" in shown
    assert "Do it anyway." in shown
    assert "sweep  Run many." in shown


def test_a_mistake_in_a_subcommands_options_is_told_with_its_name() -> None:
    shown = said("sweep", "--no-such-option")
    assert "tool sweep" in shown
    assert "--no-such-option" in shown


ENDING = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # the first to be registered is the last to be called
import click
from launch.command import main
main(click.Command("tool", callback=lambda: print("done")))
"""


def test_a_command_that_ends_does_not_look_for_cycles_among_all_that_it_imported() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split()) == (0, ["done", "True"]), ended.stderr
