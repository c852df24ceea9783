"""qlora-train score: one system's answers in percent of another's, by a judge of one's own."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from clusters.errors import Problem, RequestError, request_error
from launch import command

if TYPE_CHECKING:
    from qlora_core.relative_score import Judge, Pair, RelativeScore

SHOWN_PROBLEMS = 5


@click.command("score")
@click.argument("first", type=click.Path(path_type=Path), metavar="A.jsonl")
@click.argument("second", type=click.Path(path_type=Path), metavar="B.jsonl")
@click.option(
    "--judge",
    required=True,
    metavar="MODULE:FUNCTION",
    help="Python's function(question, first answer, second answer) -> (score of the first, score of the second), "
    "numbers from 0 on. It is imported from here or from what is installed, and run: name only what you trust.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def score(first: Path, second: Path, judge: str, as_json: bool, debug: bool) -> int:
    """Score the answers in A.jsonl in percent of those in B.jsonl.

    Each line is {"question": ..., "answer": ...}. As for the QLoRA paper's tables, the
    judge sees each pair twice, either answer first; the mean of both
    orders is the score, with its 95 % interval over questions.
    """
    pairs = read_pairs(first, second)
    function = load_judge(judge)
    command.require_train_extra("qlora-train score")
    from qlora_core.relative_score import judge_both_orders, relative_score

    judgements = judge_both_orders(pairs, function)
    found = relative_score(judgements)
    if as_json:
        rows = [
            {"question": pair.question, **dataclasses.asdict(each)}
            for pair, each in zip(pairs, judgements, strict=True)
        ]
        answer = {"schema_version": 1, "questions": len(pairs), **dataclasses.asdict(found), "judgements": rows}
        click.echo(json.dumps(answer, indent=2))
    else:
        show(found, first, second, len(pairs))
    return 0


def read_pairs(first: Path, second: Path) -> list[Pair]:
    """The answers of two files to the same questions, in the order of the first.

    Raises:
        RequestError: lines that are no answers, or questions that only one file has.
    """
    from qlora_core.relative_score import Pair

    problems: list[Problem] = []
    one, other = read_answers(first, problems), read_answers(second, problems)
    if not problems:
        for path, mine, theirs in ((first, one, other), (second, other, one)):
            if missing := [question for question in theirs if question not in mine]:
                rule = f"it lacks {len(missing)} of the questions that the other file has, such as {missing[0][:60]!r}"
                problems.append(Problem(str(path), "", rule, "Let both systems answer the same questions"))
    if problems:
        raise RequestError(problems)
    return [Pair(question, answer, other[question]) for question, answer in one.items()]


def read_answers(path: Path, problems: list[Problem]) -> dict[str, str]:
    """The answers of a file by their questions; what is wrong with it goes into `problems`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(str(path), "", f"it cannot be read: {error}", "Give a JSONL file"))
        return {}
    answers: dict[str, str] = {}
    bad = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["question"], row["answer"]
        except (ValueError, KeyError, TypeError):
            bad.append((number, 'it is no object with "question" and "answer"'))
            continue
        if not isinstance(question, str) or not isinstance(answer, str):
            bad.append((number, "question and answer must be texts"))
        elif question in answers:
            bad.append((number, "its question was there before"))
        else:
            answers[question] = answer
    remedy = "Correct or remove that line"
    problems += [Problem(f"{path}, line {number}", "", rule, remedy) for number, rule in bad[:SHOWN_PROBLEMS]]
    if (more := len(bad) - SHOWN_PROBLEMS) > 0:
        problems.append(Problem(str(path), "", f"{more} more lines are bad", "Check how the file was written"))
    if not answers and not bad:
        problems.append(Problem(str(path), "", "it holds no answer", 'Write {"question": ..., "answer": ...} a line'))
    return answers


def load_judge(entry: str) -> Judge:
    """The function that MODULE:FUNCTION names; the working directory's modules count too.

    Raises:
        RequestError: there is no such module, it cannot be imported, or it has no such function.
    """
    module_name, _, name = entry.partition(":")
    if not module_name or not name.isidentifier():
        raise request_error("--judge", entry, "it is no MODULE:FUNCTION", "Write judges:by_length, say")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:  # it is not our code: whatever it raises is told, and not a defect of ours
        rule = f"it cannot be imported: {type(error).__name__}: {error}"
        raise request_error("--judge", entry, rule, "Correct it, or start in the folder where it lies") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    function = getattr(module, name, None)
    if not callable(function):
        raise request_error("--judge", entry, f"the module has no function {name}", "Correct the name")
    return cast("Judge", function)


def show(found: RelativeScore, first: Path, second: Path, questions: int) -> None:
    """Print the figures."""
    click.echo(f"{first} in percent of {second}, {questions} questions")
    for title, figure in (
        ("shown first", found.shown_first),
        ("shown second", found.shown_second),
        ("mean", found.mean),
    ):
        interval = "" if figure.low is None else f"   95 % interval {figure.low:.1f} to {figure.high:.1f}"
        click.echo(f"  {title:<13}{figure.value:6.1f} %{interval}")
    click.echo(f"  {found.wins} wins, {found.ties} ties, {found.losses} losses")
