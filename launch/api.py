"""The planner behind HTTP: the options of `qlora-plan` as parameters, its JSON as the answer; and the page that asks.

What a question may be comes from the command's own options (`launch.options`), and so do its rules: a question is
turned into the command line that asks the same, which is in the answer too.
"""

# Annotations are not postponed here: FastAPI reads them, and those of a question are made as the application is.

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import click
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clusters.errors import Problem, RequestError, request_error
from clusters.gpu import list_gpus
from launch.options import AUTO, NumberOrAuto, Tokens, command_line, passed
from launch.plan import measured, plan
from launch.report.alternatives import alternative_rows, title_of
from launch.report.components import GROUPS, grouped
from launch.report.page import asset, environment
from launch.report.terminal import request_rows, verdict_line
from launch.request import plan_of
from orchestrator.history import NOTHING_MEASURED, History
from orchestrator.plans import Plan
from qlora_core.catalogue import list_models

ASKED = (
    "model",
    "gpu",
    "gpus",
    "method",
    "seq_len",
    "micro_batch",
    "rank",
    "tokens",
    "objective",
    "optimizer",
    "quant",
    "no_double_quant",
    "targets",
    "lora_dtype",
    "lora_dropout",
    "rslora",
    "dora",
    "tokens_per_step",
    "packing",
    "attention",
    "no_gradient_checkpointing",
    "loss",
    "compute_dtype",
    "upcast",
    "autocast",
    "zero_stage",
    "offload",
    "host_ram",
)
"""Options that a question may have, in the page's order; none of them reads or writes a file."""
SHOWN_FIRST = ASKED[: ASKED.index("optimizer")]
MODULES = r"^[A-Za-z0-9_-]+(,[A-Za-z0-9_-]+)*$"
"""Targets by name; a pattern from outside could take for ever."""
TOKENS = r"^[0-9]{1,12}(\.[0-9]{1,6})?[kKmMbB]?$"
MOST_WAITING = 64
"""Searches and reports that may wait for their turn; more are sent away."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Parameters = dict[str, click.Option]


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
    """A question as a command line, and which other ways are looked for."""

    words: tuple[str, ...]
    alternatives: Literal["none", "nearest", "all"]


# --- from a question to a plan ----------------------------------------------------------------------------------------


def planned(question: Question, history: History) -> tuple[Plan, str]:
    """The plan of a question, and the command that asks for it.

    Raises:
        RequestError: what the planner refuses.
    """
    try:
        context = plan.make_context("qlora-plan", list(question.words))
    except click.BadParameter as error:
        where = error.param.opts[0] if error.param is not None else ""
        raise request_error(where, "", error.message.rstrip("."), "Choose another value") from None
    found = plan_of(context.params, passed(context), history, alternatives=question.alternatives)
    return found, command_line(context)


def answered(question: Question, history: History) -> Answer:
    """The answer to a question."""
    found, command = planned(question, history)
    ways = None
    if found.alternatives:
        titles, rows = alternative_rows(found)
        columns = [" ".join(title.split()) for title in ("where", *titles[1:])]
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


def outcome(question: Question, history: History) -> tuple[int, bytes]:
    """A response's status and body."""
    try:
        return 200, answered(question, history).model_dump_json().encode()
    except RequestError as error:
        return 409, refused(error.problems).model_dump_json().encode()


def reported(question: Question, history: History) -> tuple[int, bytes]:
    """The same for the report of a plan, as a page."""
    from launch.report.document import html
    from launch.report.plan_report import document

    try:
        found, command = planned(question, history)
        return 200, html(document(found, command=command)).encode()
    except RequestError as error:
        return 409, refused(error.problems).model_dump_json().encode()


def refused(problems: Sequence[Problem]) -> Refused:
    """Mistakes as a response has them."""
    faults = [Fault(where=one.where, given=one.given, rule=one.rule, remedy=one.remedy) for one in problems]
    return Refused(problems=faults)


# A second process has searches and pictures, which would hold up the estimates of others.
_history = NOTHING_MEASURED


def _begin() -> None:
    global _history
    _history = measured()


def _work(do: Callable[[Question, History], tuple[int, bytes]], question: Question) -> tuple[int, bytes]:
    return do(question, _history)


# --- parameters -------------------------------------------------------------------------------------------------------


def options() -> Parameters:
    """The options of `qlora-plan` that a question may have, by name."""
    by_name = {str(one.name): one for one in plan.params if isinstance(one, click.Option)}
    return {name: by_name[name] for name in ASKED}


def flag(option: click.Option) -> str:
    """The name of a parameter: the option's, without hyphens before it."""
    return option.opts[0].lstrip("-")


def kind(option: click.Option, models: Sequence[str]) -> Any:
    """The type of a parameter."""
    known = {"model": models, "gpu": [gpu.name for gpu in list_gpus()]}.get(option.name or "")
    if known is not None:
        return Literal[tuple(known)]
    if option.is_flag:
        return bool
    if option.name == "targets":
        return Annotated[str, Field(pattern=MODULES, max_length=500)]
    form: Any = option.type
    if isinstance(form, Tokens):
        return Annotated[str, Field(pattern=TOKENS)]
    if isinstance(form, click.Choice):
        return Literal[tuple(form.choices)]
    if isinstance(form, NumberOrAuto):
        return Annotated[int, Field(ge=form.range.min, le=form.range.max)] | Literal["auto"]
    if isinstance(form, click.IntRange):
        return Annotated[int, Field(ge=form.min, le=form.max)]
    if isinstance(form, click.FloatRange):
        low: dict[str, Any] = {"gt" if form.min_open else "ge": form.min}
        high: dict[str, Any] = {"lt" if form.max_open else "le": form.max}
        return Annotated[float, Field(allow_inf_nan=False, **low, **high)]
    raise TypeError(f"no parameter for {option.name}")


def question_form(models: Sequence[str]) -> type[BaseModel]:
    """What may be asked, from the options; what is left out has the command's default."""
    fields: dict[str, Any] = {}
    for name, option in options().items():
        help_text = (option.help or "").split("  [")[0] or None
        if name == "model":
            fields[name] = (kind(option, models), Field(alias=flag(option), description=help_text))
        else:
            fields[name] = (kind(option, models) | None, Field(None, alias=flag(option), description=help_text))
    return create_model("Asked", __config__=ConfigDict(extra="forbid"), **fields)


def words_of(asked: Mapping[str, Any]) -> tuple[str, ...]:
    """The command line of a question: what is None was not asked."""
    words: list[str] = []
    for name, option in options().items():
        value = asked.get(name)
        if value is None or value is False:
            continue
        words += [f"--{flag(option)}"] if value is True else [f"--{flag(option)}={value}"]
    if all(asked.get(name) is None for name in ("gpu", "gpus", "objective")):
        words.append("--gpus=1")  # the GPUs of the machine that answers are nothing to who asks
    return tuple(words)


# --- the application --------------------------------------------------------------------------------------------------


def application(offered: Sequence[str] = (), hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The page and the API.

    Args:
        offered: folders and Hub ids that may be asked for besides the catalogue's models.
        hosts: names by which it may be called: a page of somebody else's could else have its own name lead here.
    """
    names = [name for model in list_models() for name in (model.entry.name, *model.entry.aliases)]
    models = list(dict.fromkeys([*offered, *names]))
    form = question_form(models)
    history = measured()
    waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin) as pool:
            app.state.pool = pool
            yield

    app = FastAPI(
        title="qlora-plan",
        version="1",
        description="What a fine-tune needs, where it fits, how to run it best. Parameters are qlora-plan's options.",
        lifespan=lifespan,
        docs_url=None,  # those pages are fetched from elsewhere
        redoc_url=None,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    estimated = lru_cache(maxsize=4096)(lambda question: outcome(question, history))

    @app.middleware("http")
    async def guarded(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(RequestValidationError)
    async def mistaken(_: Request, error: RequestValidationError) -> JSONResponse:
        told: dict[str, Problem] = {}
        for problem in map(problem_of, error.errors()):
            # a value that may be of two types is refused by both
            first = told.setdefault(problem.where, problem)
            if first is not problem:
                told[problem.where] = replace(first, rule=f"{first.rule}, or {problem.rule}")
        return JSONResponse(refused(list(told.values())).model_dump(), 422)

    async def aside(do: Callable[[Question, History], tuple[int, bytes]], question: Question) -> tuple[int, bytes]:
        nonlocal waiting
        if waiting >= MOST_WAITING:
            busy = Problem("", "", "too many searches wait already", "Ask again in a few seconds")
            return 503, refused([busy]).model_dump_json().encode()
        waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(app.state.pool, _work, do, question)
        finally:
            waiting -= 1

    responses: dict[int | str, dict[str, Any]] = {
        409: {"model": Refused, "description": "The values do not go together"},
        422: {"model": Refused, "description": "A value is none that the parameter has"},
        503: {"model": Refused, "description": "Too many searches wait already"},
    }

    @app.get("/api/plan", response_model=Answer, responses=responses, summary="Plan a fine-tune")
    async def ask(
        asked: Annotated[form, Query()],  # type: ignore[valid-type]
    ) -> Response:
        fields = asked.model_dump()  # type: ignore[attr-defined]
        question = Question(words_of(fields), "none")
        searched = fields["objective"] is not None or AUTO in fields.values()
        status, body = await aside(outcome, question) if searched else estimated(question)
        return Response(body, status, media_type="application/json")

    @app.get("/api/ways", response_model=Answer, responses=responses, summary="Plan it, and look for other ways")
    async def ask_for_ways(
        asked: Annotated[form, Query()],  # type: ignore[valid-type]
    ) -> Response:
        status, body = await aside(outcome, Question(words_of(asked.model_dump()), "all"))  # type: ignore[attr-defined]
        return Response(body, status, media_type="application/json")

    @app.get("/report", response_class=HTMLResponse, responses=responses, summary="The plan as a page of its own")
    async def report(
        asked: Annotated[form, Query()],  # type: ignore[valid-type]
    ) -> Response:
        status, body = await aside(reported, Question(words_of(asked.model_dump()), "all"))  # type: ignore[attr-defined]
        if status != 200:
            return Response(body, status, media_type="application/json")
        own = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        return HTMLResponse(body, headers={"Content-Security-Policy": own})

    page = environment().get_template("planner.html.j2").render(groups=inputs(models))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/planner.js", include_in_schema=False)
    async def script() -> Response:
        return Response(asset("planner.js"), media_type="text/javascript")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    return app


def problem_of(error: Mapping[str, Any]) -> Problem:
    """What pydantic says of a parameter."""
    name = str(error["loc"][1]) if len(error["loc"]) > 1 else ""
    if error["type"] == "extra_forbidden":
        return Problem(f"--{name}", "", "there is no such parameter", "Leave it out; /openapi.json lists them")
    given = str(error.get("input", ""))[:100] if error["type"] != "missing" else ""
    message = str(error["msg"])
    if error["type"] == "literal_error" and len(message) > 200:
        message = "it is none of those that can be asked for"
    return Problem(f"--{name}", given, message[:1].lower() + message[1:], "/openapi.json says what it may be")


# --- the page ---------------------------------------------------------------------------------------------------------


def inputs(models: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The page's fields, in two groups, from the options."""
    fields = {name: field(option, models) for name, option in options().items()}
    first = [fields[name] for name in SHOWN_FIRST]
    return [("", first), ("More", [fields[name] for name in ASKED if name not in SHOWN_FIRST])]


def field(option: click.Option, models: Sequence[str]) -> dict[str, Any]:
    """A field: its name, what it offers, what it is without a choice, and a word of help."""
    form: Any = option.type
    offered = {"model": models, "gpu": [gpu.name for gpu in list_gpus()]}.get(option.name or "")
    if offered is None and isinstance(form, click.Choice):
        offered = list(form.choices)
    default = option.default if isinstance(option.default, str | int | float) and not option.is_flag else ""
    return {
        "name": flag(option),
        "label": flag(option).replace("-", " "),
        "offered": offered,
        "many": option.name == "model",
        "flag": option.is_flag,
        "default": default,
        "help": (option.help or "").split("  [")[0],
    }
