"""What all commands share: from an exception to one clear message and an exit code."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from clusters.errors import RequestError, RunFailed, not_installed

INTERRUPTED = 130
TRAIN_MODULES = ("torch", "ray", "deepspeed", "bitsandbytes", "transformers", "peft")


class WithSubcommands(click.Command):
    """A command that has others beside it: the first word is one of theirs, or else this command itself is meant.

    Not a click.Group, which would take the options before the subcommand for its own.

    Args:
        subcommands: the others, in the order in which --help lists them.
    """

    def __init__(self, *arguments: Any, subcommands: Sequence[click.Command] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.subcommands = {str(command.name): command for command in subcommands}

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse `args` for the command that is meant."""
        meant = self.subcommands.get(args[0]) if args else None
        if meant is None:
            return super().make_context(info_name, args, parent, **extra)
        return meant.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that `make_context` found."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own options, then the subcommands with a line each."""
        super().format_options(ctx, formatter)
        if self.subcommands:
            with formatter.section("Subcommands (each has its own --help)"):
                limit = formatter.width - max(map(len, self.subcommands)) - 6
                formatter.write_dl([(name, each.get_short_help_str(limit)) for name, each in self.subcommands.items()])


def main(command: click.Command) -> NoReturn:
    """Run a command and exit with its code: 0 done, 1 failed or does not fit, 2 wrong request, 130 interrupted."""
    # as it ends, the interpreter looks for cycles among all that was imported, which takes a second after torch
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show is no reason to fail
    try:
        code = command.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        fail(error.format_message(), hint=f"{context.command_path} --help shows all options." if context else "")
        code = 2
    except (RequestError, RunFailed) as error:
        if debugging():
            raise
        fail(str(error))
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        fail("Interrupted.")
        code = INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        # The last line of defence: a defect of ours is told as one, without a wall of text.
        if debugging():
            raise
        fail(f"Unexpected {type(error).__name__}: {error}. --debug shows the traceback; please report it.")
        code = 1
    sys.exit(code or 0)


def fail(message: str, hint: str = "") -> None:
    """Print an error to stderr."""
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(message, err=True)
    if hint:
        click.echo(hint, err=True)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    click.secho("warning: ", fg="yellow", nl=False, err=True)
    click.echo(message, err=True)


def debugging() -> bool:
    """Whether --debug was given, which shows tracebacks."""
    return "--debug" in sys.argv[1:]


def require_train_extra(what: str) -> None:
    """Raise a RequestError where the packages for training are not installed."""
    missing = [name for name in TRAIN_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise not_installed(what, "", missing)
