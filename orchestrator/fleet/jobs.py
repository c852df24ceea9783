"""The file of fine-tunes that a fleet is to carry, and the runs that they come to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from clusters.cluster_file import Day
from clusters.errors import Problem, RequestError
from clusters.hours import ANY_MONDAY
from clusters.mistakes import mistakes, mistakes_of_each
from clusters.yaml_file import PlainName, read_yaml
from qlora_core.catalogue import find_model
from qlora_core.recipe import Mistake, Recipe, RecipeError
from qlora_core.tokens import parse_tokens

WHERE = "job list"
START = "Start from clusters/examples/jobs/two-pools.yaml"
WEEK_HOURS = 168.0
MOST_RUNS = 100_000
MOST_JOBS = 10_000
LARGEST_BYTES = 4 * 1024**2
"""Of a job list: so many jobs with all of their fields and much of a recipe."""


def _tokens(value: object) -> object:
    """A validator: a whole number, or text such as 20M."""
    if isinstance(value, bool):
        raise ValueError("it should be a number of tokens such as 12500000, 12.5M or 3B")
    return parse_tokens(value) if isinstance(value, str) else value


def _of_tokens(recipe: Recipe) -> Recipe:
    """A validator: the recipe of a job, which trains for its tokens and not for so many steps."""
    if recipe.steps is not None:
        rule, remedy = "the job's tokens say how long it trains", "Leave it out"
        raise RecipeError((Mistake(("steps",), recipe.steps, rule, remedy),))
    return recipe


Hours = Annotated[float, Field(ge=0, le=100_000, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class JobForm(_Section):
    """A fine-tune that is carried out once, or so many times a week."""

    name: PlainName
    """Names the job; letters, digits, dots, hyphens and underscores."""
    model: str
    """A name of the catalogue, a folder with config.json, or a Hub id."""
    tokens: Annotated[int, Field(ge=1, le=10**18), BeforeValidator(_tokens)]
    """Tokens that one run trains on, all epochs together: 12500000, 12.5M, 3B."""
    recipe: Annotated[Recipe, AfterValidator(_of_tokens)] = Recipe()
    """As in a run specification, but without `steps`."""
    per_week: Annotated[float, Field(gt=0, le=100_000, strict=True)] | None = None
    """Runs a week, evenly over it; left out, one run."""
    start_hours: Hours = 0.0
    """The first run is asked for so many hours after the beginning."""
    deadline_hours: Annotated[float, Field(gt=0, le=100_000, strict=True)] | None = None
    """Hours from when a run is asked for until it has to have ended."""
    priority: Annotated[int, Field(ge=1, le=100, strict=True)] = 1
    """What an hour too late weighs."""
    owner: PlainName | None = None
    """Whose it is."""


class JobListForm(_Section):
    """What a fleet is to carry, from its YAML file."""

    begins: Day | None = None
    """The day, as YYYY-MM-DD, from whose first hour on hours are counted; left out, a Monday."""
    weeks: Annotated[float, Field(gt=0, le=520, strict=True)] = 1.0
    """For so long runs are asked for; what was asked for is carried out to its end."""
    jobs: Annotated[list[Any], Field(min_length=1, max_length=MOST_JOBS)]
    """The jobs, each with a name of its own."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job.

    Attributes:
        job: its index in the list.
        number: of the job's runs, from 1.
        release: hours from the beginning, when it is asked for.
        due: when it has to have ended; None without a deadline.
        priority: what an hour too late weighs.
    """

    job: int
    number: int
    release: float
    due: float | None
    priority: int


@dataclass(frozen=True, slots=True)
class JobList:
    """Jobs, for how many weeks they are asked for, and when hour 0 is."""

    jobs: tuple[JobForm, ...]
    weeks: float
    begins: datetime = ANY_MONDAY

    def runs(self) -> list[Run]:
        """All runs, in the order in which they are asked for."""
        found = []
        for index, job in enumerate(self.jobs):
            count = 1 if job.per_week is None else max(1, round(job.per_week * self.weeks))
            apart = 0.0 if job.per_week is None else WEEK_HOURS / job.per_week
            for number in range(count):
                release = job.start_hours + number * apart
                due = None if job.deadline_hours is None else release + job.deadline_hours
                found.append(Run(index, number + 1, release, due, job.priority))
        return sorted(found, key=lambda run: run.release)


def load_jobs(path: Path) -> JobList:
    """The job list of a YAML file (docs/capacity.md).

    Raises:
        RequestError: with every mistake of the file.
    """
    fields = read_yaml(path, WHERE, START, LARGEST_BYTES)
    given = fields.get("jobs")
    each = given if isinstance(given, list) else []
    problems = [*mistakes(JobListForm, fields), *mistakes_of_each("job", JobForm, each, "model", find_model)]
    if problems:
        raise RequestError(problems)
    form = JobListForm.model_validate(fields)
    begins = ANY_MONDAY if form.begins is None else datetime.combine(form.begins, time())
    found = JobList(tuple(JobForm.model_validate(job) for job in form.jobs), form.weeks, begins)
    wanted = sum(1 if job.per_week is None else job.per_week * found.weeks for job in found.jobs)
    if wanted > MOST_RUNS:
        rule = f"they come to {wanted:,.0f} runs, and at most {MOST_RUNS:,} can be planned"
        raise RequestError([Problem("jobs", str(path), rule, "Lower per_week or weeks")])
    return found
