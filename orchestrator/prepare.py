"""From a specification to a run that could be started: model and data read, the plan made, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from clusters.errors import Problem, RequestError, request_error
from orchestrator.base import Base, find_base
from orchestrator.durations import duration
from orchestrator.identity import identity
from orchestrator.ledger import known_history
from orchestrator.machine import Machine, describe, target_of
from orchestrator.planner import divisors, plan_run
from orchestrator.plans import Plan, Target
from orchestrator.question import place_of
from orchestrator.record import RunRecord, load_record
from orchestrator.rules import unbuilt
from orchestrator.spec import DatasetSpec, RunSpec, StrategySpec
from orchestrator.targets import check_targets
from orchestrator.trackers import missing
from qlora_core.data import hub_dataset
from qlora_core.training.dataset import DataOptions, DataReport, encode_file
from qlora_core.training.dataset.cache import cache_folder
from qlora_core.training.dataset.mixing import combined, divide, together
from qlora_core.training.dataset.tokens import EncodedExamples
from qlora_core.training.layout import Layout, lay_out
from qlora_core.training.shown import Shown, samples
from qlora_core.training.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that could be started: its data read, its plan made, nothing written yet.

    Attributes:
        base: the base model, on this machine.
        data: what became of the data, of several datasets as of one.
        datasets: what became of each, by its name and as a record has it, where there are several.
        evaluated: of the examples to evaluate on, where these are other data.
        train, held_out: the encoded examples; of an epoch, and those that are evaluated on.
        samples: a few of the first, as text.
        layout: the rows in which the training examples lie.
        total_steps: optimizer steps of the whole run.
    """

    spec: RunSpec
    base: Base
    plan: Plan
    machine: Machine
    data: DataReport
    datasets: dict[str, dict[str, Any]]
    evaluated: DataReport | None
    train: EncodedExamples
    held_out: EncodedExamples
    samples: list[Shown]
    layout: Layout
    total_steps: int
    identity: dict[str, Any]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return longest_row(self.layout, self.data, self.evaluated)


def prepare(
    spec: RunSpec,
    tell: Callable[[str], None] = lambda text: None,
    machine: Machine | None = None,
    model_name: str | None = None,
) -> Prepared:
    """Read model and data and make the plan; writes nothing but the caches of the Hub and of encoded data.

    Args:
        tell: is told of what takes long, a line at a time.
        machine: that the plan is for; this one as it is now, where it is not given.
        model_name: what the base is called in plan and records, where its files were copied from elsewhere.

    Raises:
        RequestError: anything about the request that cannot work, found before a worker is started.
    """
    refuse_unbuilt(spec)
    base = find_base(spec, tell)
    if model_name is not None:
        base = replace(base, architecture=replace(base.architecture, name=model_name))
    check_targets(base.architecture, spec.recipe)
    adapter = None
    if spec.adapter is not None:
        from qlora_core.training.adapters import check_continues, read_adapter  # peft: seconds that most runs save

        adapter = read_adapter(Path(spec.adapter))
        check_continues(adapter, base.folder, spec.recipe)
    tokenizer = load_tokenizer(str(base.folder), spec.data.chat_template)
    learned = read_data(spec, base, tokenizer)
    data = combined([report for _, report in learned.values()])
    evaluated, fraction = None, 0 if spec.data.evaluates_other else spec.data.eval_fraction
    train, held_out = divide(list(learned.values()), fraction, spec.seed)
    if spec.data.evaluates_other:
        others = read_evaluated(spec, base, tokenizer)
        held_out = together([examples for examples, _ in others])
        evaluated = combined([report for _, report in others])
    if not held_out and (spec.evaluation.patience is not None or spec.evaluation.result == "best"):
        rule = "nothing is held out, and evaluation.patience and evaluation.result=best go by that"
        remedy = "Raise it, give data.eval_path or data.eval_split, or leave the others out"
        raise request_error("data.eval_fraction", str(spec.data.eval_fraction), rule, remedy)
    # The workers of a running Ray are planned as this machine's, which is one of its nodes: see docs/running.md.
    machine = machine or describe()
    target = target_for(spec, machine)
    layout = lay_out(train.lengths, spec.recipe)
    history = known_history(tell)
    plan = plan_run(
        spec,
        base.architecture,
        target,
        machine.devices,
        longest=longest_row(layout, data, evaluated),
        history=history,
        at_most=history.room(target, base.architecture.name, spec.recipe),
    )
    total_steps = spec.recipe.total_steps(len(layout.rows))
    return Prepared(
        spec=spec,
        base=base,
        plan=timed(plan, machine, layout, total_steps),
        machine=machine,
        data=data,
        datasets={name: asdict(report) for name, (_, report) in learned.items() if spec.data.datasets is not None},
        evaluated=evaluated,
        train=train,
        held_out=held_out,
        samples=samples(train, tokenizer),
        layout=layout,
        total_steps=total_steps,
        identity=identity(
            spec,
            base.identity,
            data,
            target.compute_dtype,
            adapter=None if adapter is None else adapter.digest,
            evaluated=evaluated,
        ),
    )


def longest_row(layout: Layout, data: DataReport, evaluated: DataReport | None) -> int:
    """Tokens of the longest row of a run. What is held out is evaluated one example a row."""
    return max(layout.longest, data.longest, 0 if evaluated is None else evaluated.longest)


def leaner(prepared: Prepared, at_most: int) -> Prepared | None:
    """The run with the fastest plan whose process needs `at_most` bytes, at the same tokens per step; None without.

    What the specification fixes of the strategy stays as long as that is possible; then the plan chooses all of it but
    the number of workers, and last it offloads.
    """
    request = prepared.spec.strategy_request
    free = StrategySpec(world_size=request.world_size)
    ways = [request, free]
    if prepared.plan.target.device.kind == "cuda":
        ways += [free.model_copy(update={"offload": offload}) for offload in ("optimizer", "all")]
    for way in ways:
        with suppress(RequestError):  # some recipes cannot be offloaded
            found = replanned(prepared, way, at_most)
            if found.plan.estimate.gpu.process_bytes <= at_most:
                return found
    return None


def leaner_on_host(prepared: Prepared, at_most: int) -> Prepared | None:
    """The run with the fastest plan for GPUs whose host needs `at_most` bytes for all its ranks; None where none fits.

    What is kept on the host under offload goes back to the GPUs; ZeRO 3, whose ranks load a model each, is the last.
    """
    request = prepared.spec.strategy_request
    on_gpu = [StrategySpec(world_size=request.world_size, offload="none", zero_stage=stage) for stage in (0, 1, 2, 3)]
    found = []
    for way in on_gpu:
        with suppress(RequestError):  # not every recipe goes with every stage
            found.append(replanned(prepared, way))
    lean = [one for one in found if one.plan.fits and one.plan.estimate.host.most_bytes <= at_most]
    return min(
        lean, key=lambda one: one.plan.verdict.step_time.seconds if one.plan.verdict.step_time else 0, default=None
    )


def resized(prepared: Prepared, workers: int) -> Prepared | None:
    """The run with a plan for as many workers as possible, and at most so many; None where none fits."""
    for world_size in reversed(divisors(prepared.spec.recipe.sequences_per_step)):
        if world_size > workers:
            continue
        free = StrategySpec(world_size=world_size)
        for way in (prepared.spec.strategy_request.model_copy(update={"world_size": world_size}), free):
            with suppress(RequestError):  # a strategy that was fixed need not go with another number of workers
                if (found := replanned(prepared, way)).plan.fits:
                    return found
    return None


def replanned(prepared: Prepared, strategy: StrategySpec, at_most: int | None = None) -> Prepared:
    """The run with another plan.

    Args:
        at_most: bytes of a process; where it is not given, what the ledger says after a plan of this kind ran out.

    Raises:
        RequestError: the recipe does not go with that strategy.
    """
    spec, architecture = prepared.spec.model_copy(update={"strategy": strategy}), prepared.base.architecture
    target = target_for(spec, prepared.machine)
    history = known_history(lambda text: None)
    plan = plan_run(
        spec,
        architecture,
        target,
        prepared.machine.devices,
        longest=prepared.longest,
        history=history,
        at_most=history.room(target, architecture.name, spec.recipe) if at_most is None else at_most,
    )
    return replace(prepared, plan=timed(plan, prepared.machine, prepared.layout, prepared.total_steps))


def timed(plan: Plan, machine: Machine, layout: Layout, steps: int) -> Plan:
    """A run's plan, with how long its steps take and what its nodes cost meanwhile.

    Its tokens are those of its rows, of which few are the longest.
    """
    gpus, hourly = plan.strategy.world_size, place_of(plan).price_per_hour
    tokens = round(fmean(layout.lengths) * plan.recipe.sequences_per_step * steps)
    return replace(plan, duration=duration(plan.verdict.step_time, tokens, gpus, hourly, machine.currency, steps=steps))


def target_for(spec: RunSpec, machine: Machine) -> Target:
    """What a specification's workers are planned for on this machine."""
    workers = spec.strategy_request.world_size
    return target_of(machine, spec.recipe.compute_dtype, workers if isinstance(workers, int) else 1)


def read_data(
    spec: RunSpec, base: Base, tokenizer: PreTrainedTokenizerBase
) -> dict[str, tuple[EncodedExamples, DataReport]]:
    """The datasets of a specification as tokens of its model, by their names.

    Raises:
        RequestError: see `encode_file`; what is wrong with each of them.
    """
    found: dict[str, tuple[EncodedExamples, DataReport]] = {}
    problems: list[Problem] = []
    record = load_record(Path(spec.output))
    for name, dataset in spec.data.learned.items():
        try:
            found[name] = encoded(spec, base, tokenizer, dataset, record)
        except RequestError as error:
            section = f"data.datasets.{name}" if name else "data"
            fields = {f"data.{field}": f"{section}.{field}" for field in DatasetSpec.model_fields}
            problems += error.named(fields).problems
    if problems:
        raise RequestError(problems)
    return found


def read_evaluated(
    spec: RunSpec, base: Base, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[EncodedExamples, DataReport]]:
    """The examples to evaluate on, where a specification gives them.

    Raises:
        RequestError: see `encode_file`.
    """
    record = load_record(Path(spec.output))
    try:
        return [encoded(spec, base, tokenizer, dataset, record) for dataset in spec.data.evaluated]
    except RequestError as error:
        path = "data.eval_path" if spec.data.eval_path else "data.eval_split"
        raise error.named({"data.path": path, "data.split": "data.eval_split"}) from None


def encoded(
    spec: RunSpec, base: Base, tokenizer: PreTrainedTokenizerBase, dataset: DatasetSpec, record: RunRecord | None
) -> tuple[EncodedExamples, DataReport]:
    """One dataset of a specification as tokens of its model; `record` is that of the run in its output folder."""
    options = DataOptions(
        learn=dataset.learn,
        columns=dataset.columns,
        split=dataset.split,
        config=dataset.config,
        files=dataset.files,
        revision=dataset.revision or commit_before(dataset.path, record),
        max_bad=dataset.max_bad,
        day=first_day(record),
        vocab_size=base.architecture.vocab_size,
        cache=cache_folder(),
    )
    examples, report = encode_file(dataset.path, dataset.format, tokenizer, spec.recipe.seq_len, options)
    return examples, replace(report, times=dataset.times)


def first_day(record: RunRecord | None) -> date:
    """The day on which a run was first started, by the record's clock: a template that wrote it writes it again."""
    if record is None or not record.attempts:
        return datetime.now(UTC).date()
    return datetime.fromisoformat(record.attempts[0].started).date()


def commit_before(path: str, record: RunRecord | None) -> str | None:
    """The commit of the Hub's dataset at `path` that the run of that record was started with, if it had that one."""
    hub = hub_dataset(path)
    if hub is None or hub.revision is not None or record is None:
        return None
    evaluated = record.data.get("evaluated") or {}
    for digest in f"{record.identity.get('data')}; {evaluated.get('digest')}".split("; "):
        repo, _, rest = digest.partition("@")
        if repo == hub.repo:
            return rest.split(" ")[0] or None
    return None


def refuse_unbuilt(spec: RunSpec) -> None:
    """Raise a RequestError for what a plan can describe and training cannot do yet, and for trackers not to be had."""
    problems = [*unbuilt(spec.recipe), *missing(spec.tracking)]
    if problems:
        raise RequestError(problems)
