"""From a question to a response: the plan in words, as bars and whole, or what is wrong with the question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import click
from pydantic import BaseModel

from clusters.errors import Problem, RequestError, request_error
from launch.api.parameters import reader
from launch.options import command_line, passed
from launch.report.alternatives import alternative_rows, title_of
from launch.report.components import GROUPS, grouped
from launch.report.terminal import request_rows, verdict_line
from launch.report.words import on_one_line
from launch.request import plan_of
from orchestrator.history import History
from orchestrator.plans import Plan


class Fault(BaseModel):
    """One mistake in a question: where it is, what was passed, which rule it broke, and what to do."""

    where: str
    given: str
    rule: str
    remedy: str


class Refused(BaseModel):
    """All mistakes of a question."""

    problems: list[Fault]


class Bar(BaseModel):
    """What is needed on a kind of GPU, and what it can give, in bytes."""

    gpu: str
    fits: bool
    chance: float
    usable_bytes: int
    process_bytes: int
    groups: list[int]


class Ways(BaseModel):
    """Other ways to run, or the nearest that would fit, as a table."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Answer(BaseModel):
    """A plan: in words, as bars, and whole as `qlora-plan --json` prints it (docs/planning.md)."""

    headline: str
    fits: bool
    command: str
    facts: list[tuple[str, str]]
    groups: list[str]
    bars: list[Bar]
    ways: Ways | None
    warnings: list[str]
    plan: dict[str, Any]


class Question(NamedTuple):
    """A question as a command line, and whether other ways are looked for."""

    words: tuple[str, ...]
    ways: bool = False


Reply = tuple[int, bytes]
"""The status and the body of a response."""


def planned(question: Question, history: History) -> tuple[Plan, str]:
    """The plan of a question, and the command that asks for it.

    Raises:
        RequestError: what the planner refuses.
    """
    try:
        context = reader.make_context("qlora-plan", list(question.words))
    except click.BadParameter as error:
        where = error.param.opts[0] if error.param is not None else ""
        raise request_error(where, "", error.message.rstrip("."), "Choose another value") from None
    found = plan_of(context.params, passed(context), history, alternatives="all" if question.ways else "none")
    return found, command_line(context)


def answered(question: Question, history: History) -> Answer:
    """The answer to a question."""
    found, command = planned(question, history)
    ways = None
    if found.alternatives:
        titles, rows = alternative_rows(found)
        columns = ["where", *map(on_one_line, titles[1:])]
        ways = Ways(title=title_of(found), columns=columns, rows=[list(row) for row in rows])
    return Answer(
        headline=verdict_line(found).plain,
        fits=found.fits,
        command=command,
        facts=list(request_rows(found)),
        groups=list(GROUPS),
        bars=[
            Bar(
                gpu=one.gpu,
                fits=one.fits,
                chance=one.confidence.chance,
                usable_bytes=one.usable_bytes,
                process_bytes=one.process_bytes,
                groups=grouped(one.components, one.process_bytes - one.allocated_bytes),
            )
            for one in found.verdicts
        ],
        ways=ways,
        warnings=list(found.warnings),
        plan=found.to_json(),
    )


def outcome(question: Question, history: History) -> Reply:
    """A response's status and body."""
    try:
        return 200, answered(question, history).model_dump_json().encode()
    except RequestError as error:
        return refused(409, error.problems)


def reported(question: Question, history: History) -> Reply:
    """The same for the report of a plan, as a page."""
    from launch.report.document import html
    from launch.report.plan_report import document

    try:
        found, command = planned(question, history)
        return 200, html(document(found, command=command)).encode()
    except RequestError as error:
        return refused(409, error.problems)


def refused(status: int, problems: Iterable[Problem]) -> Reply:
    """Mistakes as a response has them."""
    faults = [Fault(where=one.where, given=one.given, rule=one.rule, remedy=one.remedy) for one in problems]
    return status, Refused(problems=faults).model_dump_json().encode()
