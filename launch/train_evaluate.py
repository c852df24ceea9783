"""qlora-train evaluate: what an adapter can do, beside its base and other adapters."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from clusters.errors import request_error
from launch import command
from qlora_core.data import FormatName, Learn

if TYPE_CHECKING:
    from orchestrator.evaluation import Evaluated
    from qlora_core.bootstrap import Interval
    from qlora_core.training.dataset import DataReport


@click.command("evaluate")
@click.argument("trained", type=click.Path(path_type=Path), metavar="RUN|ADAPTER")
@click.option("--adapter", "others", multiple=True, metavar="NAME=FOLDER", help="Another on the same base; repeatable.")
@click.option("--data", help="Examples to evaluate on, as data.path says them. Default: the run's held-out ones.")
@click.option("--format", "format_", type=click.Choice(get_args(FormatName)), default="auto", help="Of --data.")
@click.option(
    "--column", "columns", multiple=True, metavar="NAME=DATAS", help="What --data calls a column; see data.columns."
)
@click.option("--learn", type=click.Choice(get_args(Learn)), help="Tokens of --data that count. Default: the run's.")
@click.option("--split", help="Of --data, where it has any. Default: train.")
@click.option("--base", help="The base's folder or Hub id, where it is not the one that the adapter names.")
@click.option(
    "--quantization",
    type=click.Choice(["as-trained", "nf4", "fp4", "none"]),
    default="as-trained",
    show_default=True,
    help="How the base is stored; none where an adapter's run is not known.",
)
@click.option("--seq-len", type=click.IntRange(min=2), help="Longest example of --data. Default: the run's, or 2048.")
@click.option(
    "--samples", type=click.IntRange(min=0), help="Questions that are answered. Default: 2; with --answers, all."
)
@click.option("--answer-tokens", type=click.IntRange(min=1), default=48, show_default=True, help="Longest answer.")
@click.option(
    "--answers",
    type=click.Path(path_type=Path),
    help="Folder for the answers, NAME.jsonl each, as `qlora-train score` reads them.",
)
@click.option("--tasks", default="", metavar="NAME,...", help="Tasks of lm-evaluation-harness, or their YAML files.")
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each task. Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def evaluate(
    trained: Path,
    others: tuple[str, ...],
    data: str | None,
    format_: FormatName,
    columns: tuple[str, ...],
    learn: Learn | None,
    split: str | None,
    base: str | None,
    quantization: Any,
    seq_len: int | None,
    samples: int | None,
    answer_tokens: int,
    answers: Path | None,
    tasks: str,
    limit: int | None,
    as_json: bool,
    debug: bool,
) -> int:
    """Measure held-out loss and perplexity of a RUN's or ADAPTER's folder.

    Each comes with its 95 % interval over examples, beside that of the base without the adapter.
    """
    command.require_train_extra("qlora-train evaluate")
    rule = "it is no NAME=FOLDER with a new name"
    named = {name: Path(path) for name, path in pairs("--adapter", others, rule, "Write mine=runs/mine, say").items()}
    rule = "it is no pair of a format's column, once, and the data's"
    renamed = pairs("--column", columns, rule, "Write prompt=question, say")
    if answers is not None and answers.exists():
        raise request_error("--answers", answers, "it is there already", "Choose a folder that is not, or remove it")
    from qlora_core.quiet import quiet_libraries

    quiet_libraries()
    from orchestrator.evaluation import Questions, evaluate_adapters
    from orchestrator.trained import base_of, find_trained
    from qlora_core.training.tasks import require_harness

    chosen = tuple(task.strip() for task in tasks.split(",") if task.strip())
    require_harness(chosen)
    found = find_trained(trained)
    folder, _ = base_of(found, base, lambda text: click.echo(text, err=True))
    if seq_len is None:
        seq_len = 2048 if found.record is None else int(found.record.plan["recipe"]["seq_len"])
    if learn is None:
        before = None if found.record is None else found.record.data.get("learn")
        learn = before if before in ("completion", "all") else "auto"
    if samples is None:
        samples = 2 if answers is None else 2**31
    evaluated, report = evaluate_adapters(
        found,
        {name: find_trained(where) for name, where in named.items()},
        folder,
        quantization,
        Questions(data, seq_len, samples, answer_tokens, format_, renamed, learn, split, chosen, limit),
    )
    if answers is not None:
        write_answers(evaluated, answers)
    if as_json:
        rows = [dataclasses.asdict(row) for row in evaluated]
        data_report = report and dataclasses.asdict(report)
        answer = {"schema_version": 1, "base": str(folder), "data": data_report, "evaluated": rows}
        click.echo(json.dumps(answer, indent=2))
    else:
        show(evaluated, report, seq_len)
    return 0


def pairs(flag: str, given: Sequence[str], rule: str, remedy: str) -> dict[str, str]:
    """What a repeated NAME=VALUE flag says; one that is none, or whose name was there, breaks `rule`."""
    found: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value or name in found:
            raise request_error(flag, text, rule, remedy)
        found[name] = value
    return found


def write_answers(evaluated: Sequence[Evaluated], folder: Path) -> None:
    """Write each one's answers as JSON lines; of equal questions the first, since `score` pairs answers by them."""
    from qlora_core.files import replace_atomically

    for row in evaluated:
        given: dict[str, str] = {}
        for each in row.answers:
            given.setdefault(each.question, each.given)
        lines = [json.dumps({"question": asked, "answer": answer}) + "\n" for asked, answer in given.items()]
        with replace_atomically(folder / f"{row.name}.jsonl") as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def show(evaluated: Sequence[Evaluated], report: DataReport | None, seq_len: int) -> None:
    """Print the figures as a table, what became of the data, and the answers below."""
    from rich.console import Console
    from rich.table import Table

    from launch.progress import became

    console = Console()
    table = Table("", "loss", "perplexity", "change from base", box=None, pad_edge=False)
    for row in evaluated:
        if row.loss is not None:
            table.add_row(row.name, words(row.loss), words(row.perplexity), words(row.change))
    if table.row_count:
        console.print(table)
        console.print("In brackets: the 95 % interval over examples.", highlight=False)
    if report is not None:
        counted = f"Data: {report.examples} examples in format {report.format}, the longest {report.longest} tokens"
        console.print(f"{counted}{became(report, seq_len)}.", highlight=False, markup=False)
    for row in evaluated:
        for task, measures in row.tasks.items():
            figures = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
            console.print(f"{row.name}  {task}: {figures}", highlight=False, markup=False)
    for question, each in enumerate(evaluated[0].answers):
        console.print(f"\n  asked     {each.question}\n  expected  {each.expected}", highlight=False, markup=False)
        for row in evaluated:
            given = row.answers[question].given or "(nothing)"
            console.print(f"  {row.name:<9} {given}", highlight=False, markup=False)


def words(figure: Interval | None) -> str:
    """A figure with its interval."""
    if figure is None:
        return "-"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4f}"
    return f"{figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f})"
