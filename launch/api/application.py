"""The application: the addresses, what answers which, and whom it lets in.

What a question may be comes from the command's own options (`parameters.py`), and so do its rules: a question is turned
into the command line that asks the same, which is in the answer too (`answers.py`).
"""

# Annotations are not postponed here: FastAPI reads them, and those of a question are made as the application is.

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clusters.errors import Problem
from launch import history
from launch.api.answers import Answer, Question, Refused, Reply, outcome, refused, reported
from launch.api.parameters import inputs, is_searched, problem_of, question_form, words_of
from launch.report.page import asset, environment
from orchestrator.history import NOTHING_MEASURED, History
from qlora_core.catalogue import list_models

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
REPORT_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
}
"""A report has its script in itself, as where it is a file."""


_history = NOTHING_MEASURED


def _begin() -> None:
    global _history
    _history = history.known()


def second_process() -> ProcessPoolExecutor:
    """What has searches and pictures, which would hold up the estimates of others."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)


def _work(do: Callable[[Question, History], Reply], question: Question) -> Reply:
    return do(question, _history)


def application(offered: Sequence[str] = (), hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The page and the API.

    Args:
        offered: folders and Hub ids that may be asked for besides the catalogue's models.
        hosts: names by which it may be called: a page of somebody else's could else have its own name lead here.
    """
    names = [name for model in list_models() for name in (model.entry.name, *model.entry.aliases)]
    models = list(dict.fromkeys([*offered, *names]))
    form = question_form(models)
    known = history.known()
    waiting = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.pool = second_process()
        try:
            yield
        finally:
            app.state.pool.shutdown()

    app = FastAPI(
        title="qlora-plan",
        version="1",
        description="What a fine-tune needs, where it fits, how to run it best. Parameters are qlora-plan's options.",
        lifespan=lifespan,
        docs_url=None,  # those pages are fetched from elsewhere
        redoc_url=None,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(Guarded)
    estimated = lru_cache(maxsize=4096)(lambda question: outcome(question, known))

    @app.exception_handler(RequestValidationError)
    async def mistaken(_: Request, error: RequestValidationError) -> Response:
        told: dict[str, Problem] = {}
        for problem in map(problem_of, error.errors()):
            # a value that may be of two types is refused by both
            first = told.setdefault(problem.where, problem)
            if first is not problem:
                told[problem.where] = replace(first, rule=f"{first.rule}, or {problem.rule}")
        return as_json(refused(422, told.values()))

    async def aside(do: Callable[[Question, History], Reply], question: Question) -> Reply:
        nonlocal waiting
        if waiting >= MOST_WAITING:
            busy = Problem("", "", "too many searches wait already", "Ask again in a few seconds")
            return refused(503, [busy])
        waiting += 1
        try:
            for _ in range(2):
                pool = app.state.pool
                try:
                    return await asyncio.get_running_loop().run_in_executor(pool, _work, do, question)
                except BrokenProcessPool:
                    if app.state.pool is pool:  # all that waited are told, and one of them begins another
                        app.state.pool = second_process()
            rule = "the process that looks for it was ended twice, as where memory is short"
            return refused(503, [Problem("", "", rule, "Ask again in a few seconds")])
        finally:
            waiting -= 1

    responses: dict[int | str, dict[str, Any]] = {
        409: {"model": Refused, "description": "The values do not go together"},
        422: {"model": Refused, "description": "A value is none that the parameter has"},
        503: {"model": Refused, "description": "Too many searches wait already, or what searches was ended"},
    }

    asked_for: Any = Annotated[form, Query()]

    @app.get("/api/plan", response_model=Answer, responses=responses, summary="Plan a fine-tune")
    async def ask(asked: asked_for) -> Response:
        question = Question(words_of(asked))
        return as_json(await aside(outcome, question) if is_searched(asked) else estimated(question))

    @app.get("/api/ways", response_model=Answer, responses=responses, summary="Plan it, and look for other ways")
    async def ask_for_ways(asked: asked_for) -> Response:
        return as_json(await aside(outcome, Question(words_of(asked), ways=True)))

    @app.get("/report", response_class=HTMLResponse, responses=responses, summary="The plan as a page of its own")
    async def report(asked: asked_for) -> Response:
        status, body = await aside(reported, Question(words_of(asked), ways=True))
        return HTMLResponse(body, headers=REPORT_HEADERS) if status == 200 else as_json((status, body))

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


class Guarded:
    """Puts HEADERS into all responses that lack them. Starlette's decorator for that takes a task for each."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, guarded if scope["type"] == "http" else send)


def as_json(reply: Reply) -> Response:
    """A response."""
    status, body = reply
    return Response(body, status, media_type="application/json")
