"""The report of a run, from its record and its events: what was predicted beside what was measured, and how it went."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.errors import RequestError
from launch.command import warn
from launch.report.components import COMPONENT_TITLES, GROUPS
from launch.report.document import DRAWS, Document, Section, drawn, write
from launch.report.terminal import memory_rows
from launch.report.words import (
    ending,
    error,
    gib,
    mixture,
    price_range,
    time_range,
    time_words,
    visible,
    what_bounds_are,
    written_otherwise,
)
from orchestrator.ledger import held_seconds, own_cost
from orchestrator.plans import Duration
from orchestrator.record import REPORT_NAME, REPORT_PAGE_NAME, SAMPLES_NAME, SPECIFICATION_NAME, RunRecord, read_events
from qlora_core.data import in_an_epoch, left_out
from qlora_core.perplexity import perplexity

if TYPE_CHECKING:  # it imports transformers
    from qlora_core.training.shown import Shown

LOSS_ROWS = 20
TRAVELLED = "/runtime_resources/"
"""In the paths of what travelled with a job, which Ray keeps only as long as its session."""
SHOWN_PARTS = 6
SHOWN_CHARACTERS = 400
"""Of one part of a sample."""
PARTS = {
    "products": "matrix products",
    "adapters": "adapters",
    "attention": "attention",
    "memory": "all else that moves memory",
    "dequantization": "dequantization",
    "starting": "waiting for kernels to be started",
    "exchange": "exchange between workers",
    "host": "to and from the host",
    "optimizer": "optimizer",
}
"""Of a step's time, as `qlora_core.step_time` counts them."""


def write_report(record: RunRecord, folder: Path) -> Path | None:
    """Write ``report.md`` beside the record and return its path; ``report.html`` too where what draws is installed.

    None where they cannot be written: a run that has ended is not the worse for it, and only a warning tells it.
    """
    document = run_report(record, read_events(folder / "events.jsonl"), read_samples(folder / SAMPLES_NAME))
    try:
        if all(importlib.util.find_spec(name) is not None for name in DRAWS):
            write(document, folder / REPORT_PAGE_NAME)
        write(document, folder / REPORT_NAME)  # the last, so that where it lies nothing is to be written again
    except RequestError as error:
        remedy = "Put that right, and the same command writes the report"
        warn("\n".join(str(replace(problem, where="output", remedy=remedy)) for problem in error.problems))
        return None
    return folder / REPORT_NAME


def read_samples(path: Path) -> list[Shown]:
    """A few of a run's examples; none where an earlier version ran it."""
    found: list[Shown] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def run_report(record: RunRecord, events: Sequence[Mapping[str, Any]], samples: Sequence[Shown] = ()) -> Document:
    """The whole report."""
    return Document(f"Run {record.name}", tuple(sections(record, events, samples)))


def sections(
    record: RunRecord, events: Sequence[Mapping[str, Any]], samples: Sequence[Shown] = ()
) -> Iterator[Section]:
    """Its parts, in order; those with nothing to say are left out."""
    yield result(record)
    yield from attempts(record)
    yield from memory(record)
    yield from time(record)
    yield training(events)
    yield from evaluation(events)
    yield from data(record.data)
    yield from learned_from(samples)
    choices = [(item["field"].replace("_", " "), item["value"], item["reason"]) for item in record.plan["choices"]]
    yield Section("Choices", ("what", "is", "because"), choices)
    yield from specification(record)
    yield again(record)


def result(record: RunRecord) -> Section:
    """Evaluation before and after, and the sample answers."""
    results = record.results
    before, after = results.get("eval_before"), results.get("eval_after")
    said = [
        f"Status: {record.status}. {record.total_steps} steps planned, {len(record.attempts)} attempt(s). "
        f"Machine: {record.machine['name']}."
    ]
    if before is not None and after is not None:
        said.append(
            f"Evaluation loss on held-out examples: {before:.4f} before, {after:.4f} after; perplexity "
            f"{perplexity(before):.2f} and {perplexity(after):.2f}."
        )
    if record.status == "complete":
        said += ending(results, record.attempts[-1].to_step, record.total_steps)
    said += [f"Adapter: {record.adapter}"] if record.adapter else []
    said += [f"Model: {record.weights}"] if record.weights else []
    answers = [
        (first["question"], first["expected"], first["given"] or "(nothing)", last["given"] or "(nothing)")
        for first, last in zip(results.get("answers_before", []), results.get("answers_after", []), strict=False)
    ]
    return Section("Result", ("asked", "expected", "before", "after"), answers, text=tuple(said))


def attempts(record: RunRecord) -> Iterator[Section]:
    """What happened on the way and what was decided; nothing where the first attempt came to the end."""
    if len(record.attempts) == 1 and not record.attempts[0].failure:
        return
    rows: list[tuple[str, ...]] = []
    for number, attempt in enumerate(record.attempts, start=1):
        failure, decision = attempt.failure or {}, attempt.decision or {}
        strategy = attempt.strategy
        how = (
            f"{strategy['world_size']} x {strategy['micro_batch']} x {strategy['gradient_accumulation']}, "
            f"ZeRO {strategy['zero_stage']}"
            if strategy
            else ""
        )
        kind = f"{failure['kind']}: " if failure else ""
        then = f"{decision['action']}: {decision['reason']}" if decision else ""
        steps = f"{attempt.from_step} to {'?' if attempt.to_step is None else attempt.to_step}"
        rows.append((str(number), steps, how, attempt.status, f"{kind}{attempt.reason or ''}", then))
        rows += [("", "", "", "passed over", f"{one['checkpoint']}: {one['reason']}", "") for one in attempt.skipped]
    columns = (" attempt", "steps", "workers x micro-batch x accumulation", "ended", "what happened", "what followed")
    yield Section("Attempts", columns, rows)


def memory(record: RunRecord) -> Iterator[Section]:
    """Predicted beside measured, and what the prediction is made of."""
    if record.measured is None:
        return
    found = [row for row in memory_rows(record.predicted, record.measured) if row[2]]
    yield Section(
        "Memory of the fullest rank",
        ("phase", " predicted", " measured", " error"),
        [(title, gib(guess), gib(seen), error(guess, seen)) for title, guess, seen in found],
        f"Measured: {record.measured['allocated_is']}. Predicted peak: {record.predicted['peak_moment']}.",
        draw=drawn("run", "predicted_and_measured", found),
    )
    gpu = record.plan["estimate"]["gpu"]
    sizes = {name: size for name, size in gpu["components"].items() if size}
    rows = [(COMPONENT_TITLES[name], gib(size), f"{size / gpu['allocated_bytes']:.1%}") for name, size in sizes.items()]
    yield Section("What the predicted peak is made of", ("component", " predicted", " share"), rows)
    yield from held(sizes, record.measured, divided=record.plan["strategy"]["zero_stage"] == 3)


def held(sizes: Mapping[str, int], measured: Mapping[str, Any], *, divided: bool) -> Iterator[Section]:
    """The peak's parts that can be told apart in a real process: weights, the optimizer's state, and all else."""
    weights = measured.get("weights")
    if weights is None:  # records of earlier versions do not have them
        return
    base = sum(sizes.get(name, 0) for name in GROUPS["base model"])
    adapters = sizes.get("lora_weights", 0)
    # with method full it is the base that is trained
    frozen, trained = (weights["frozen"], weights["trained"]) if adapters else (sum(weights.values()), 0)
    state = sizes.get("optimizer_state", 0), measured.get("optimizer_state", 0)
    # where weights are divided, those of the layer at the peak are whole there, and at no other time
    parts = [] if divided else [("base model", base, frozen), ("adapters", adapters, trained)]
    if all(state):  # an earlier version's record does not have it
        parts.append(("optimizer state", *state))
    left = sum(sizes.values()) - sum(part[1] for part in parts)
    unexplained = measured["allocated_bytes"] - sum(part[2] for part in parts)
    parts.append((f"{'weights, ' if divided else ''}activations, gradients and all else", left, unexplained))
    rows = [(title, gib(guess), gib(found), error(guess, found)) for title, guess, found in parts if found > 0]
    yield Section("Its parts, measured", ("part", " predicted", " measured", " error"), rows)


def time(record: RunRecord) -> Iterator[Section]:
    """A step's predicted time by its parts, beside the measured one."""
    verdict: dict[str, Any] = next(iter(record.plan["verdicts"]), {})
    measured = record.measured or {}
    step, seconds = verdict.get("step_time"), measured.get("step_seconds")
    if step is None or not seconds:
        if record.attempts:
            yield Section("Time", text=(whole_words(record),))
        return
    rows = [
        (PARTS.get(name, name), f"{spent:.4f}", f"{spent / sum(step['parts'].values()):.0%}")
        for name, spent in step["parts"].items()
        if spent >= 1e-4
    ]
    bounds = f"{step['low_seconds']:.3f} to {step['high_seconds']:.3f} {what_bounds_are(step.get('runs', 0))}"
    said = (
        f"A step took {seconds:.3f} s (the median); {step['seconds']:.3f} s were predicted, {bounds}, "
        f"for one of {step['tokens']:,} tokens."
    )
    tokens = measured.get("tokens_per_second")
    if (pace := measured.get("positions_per_second") or tokens) and step.get("floor_seconds"):
        # a plan's rows are full, and padding takes as long as tokens do
        share = pace * step["floor_seconds"] / step["tokens"]
        padded = pace > tokens
        done = (
            f"went through {pace:,.0f} tokens a second, padding included"
            if padded
            else f"trained on {pace:,.0f} tokens a second"
        )
        said += (
            f" It {done}, where {step['tokens_per_second']:,.0f} were predicted: "
            f"{share:.0%} of what the devices' nominal rates allow (the roofline)."
        )
        if padded:
            said += f" Without the padding it trained on {tokens:,.0f} a second."
    yield Section("Time of a step", ("predicted", " s", " share"), rows, text=(said, whole_words(record)))


def whole_words(record: RunRecord) -> str:
    """When it was, for how long it held its devices, and what that cost, beside what was planned."""
    began, ended = record.attempts[0].started, record.attempts[-1].ended
    whole = f"Started {began}, ended {ended or 'not yet'}; its attempts took {time_words(spent_seconds(record))}."
    if duration := record.plan.get("duration"):
        planned = Duration(**duration)
        price = "" if planned.price is None else f", {price_range(planned)}"
        whole += f" Planned, for its steps alone: {time_range(planned)}{price}."
    if (paid := own_cost(record.model_dump())) is not None:
        whole += f" It cost {paid[0]:,.2f} {paid[1]}."
    return whole


def spent_seconds(record: RunRecord) -> float:
    """For how long its attempts that have ended held their devices, all together."""
    return sum(held_seconds(one.model_dump()) for one in record.attempts)


def training(events: Sequence[Mapping[str, Any]]) -> Section:
    """The loss curve, and a table of at most LOSS_ROWS rows."""
    steps = [event for event in events if event["event"] == "step"]
    every = max(1, -(-len(steps) // LOSS_ROWS))
    rows = [
        (
            str(event["step"]),
            f"{event['loss']:.4f}",
            f"{event['learning_rate']:.2e}",
            f"{event['tokens'] / event['seconds']:.0f}",
        )
        for index, event in enumerate(steps, start=1)
        if index % every == 0 or index == len(steps)
    ]
    columns = (" step", " loss", " learning rate", " tokens/s")
    overflowed = sum(not math.isfinite(event.get("grad_norm", 0)) for event in steps)
    said = (
        f"{overflowed} steps changed no weight: their gradients, scaled for float16, overflowed; the scale was halved."
    )
    text = (said,) if overflowed else ()
    return Section("Training", columns, rows, text=text, draw=drawn("run", "losses", steps, evaluated(events)))


def evaluated(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations that gave a loss."""
    return [event for event in events if event["event"] == "eval" and event["eval_loss"] is not None]


def evaluation(events: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """Loss and perplexity on the held-out examples, each time that they were measured."""
    rows = [
        (str(event["step"]), f"{event['eval_loss']:.4f}", f"{perplexity(event['eval_loss']):.2f}")
        for event in evaluated(events)
    ]
    if rows:
        yield Section("Evaluation", (" step", " held-out loss", " perplexity"), rows)


def data(found: Mapping[str, Any]) -> Iterator[Section]:
    """What became of the data, and of that to evaluate on where it is other data."""
    counted, *remarks = became(found)
    if "rows" in found:
        counted += (
            f" They are trained on in {found['rows']} sequences; were all as long as the longest, "
            f"{found['padding_percent']} % would be padding."
        )
    said = [counted, *mixture(found.get("datasets", {})), *remarks]
    if other := found.get("evaluated"):
        counted, *remarks = became(other)
        said += [f"Evaluated on {other['source']}: {counted}", *remarks]
    lengths = found.get("row_lengths")  # records of earlier versions do not have them
    yield Section("Data", text=tuple(said), draw=None if lengths is None else drawn("run", "row_lengths", lengths))


def became(found: Mapping[str, Any]) -> list[str]:
    """What became of some data, in sentences: the counts first.

    Args:
        found: `qlora_core.training.dataset.DataReport` as a run's record has it; those of earlier versions lack some.
    """
    said = [
        f"{found['examples']} examples in format {found['format']}, {found['tokens']} tokens, the longest "
        f"{found['longest']}{in_an_epoch(found.get('times', 1))}; {found['truncated']} truncated, "
        f"{', '.join(left_out(found)) or 'none left out'}."
    ]
    if found.get("in_pieces"):
        said.append(f"{found['in_pieces']} texts were longer than a sequence, and became pieces.")
    if found.get("unread"):
        said.append(f"Columns that were not read: {', '.join(found['unread'])}.")
    said += written_otherwise(found.get("divided", 0), found.get("shortened", 0))
    return said + [f"Left out: {bad}" for bad in found.get("bad_records", ())]


def learned_from(samples: Sequence[Shown]) -> Iterator[Section]:
    """Some of the examples, and which of their text is learned."""
    rows = []
    for sample in samples:
        name = f"{sample['number']:,} of {sample['of']:,}, {sample['tokens']:,} tokens"
        for part in sample["parts"][:SHOWN_PARTS]:
            rows.append((name, "yes" if part["learned"] else "no", shortened(visible(part["text"]))))
            name = ""
        if (more := len(sample["parts"]) - SHOWN_PARTS) > 0:
            rows.append(("", "", f"... {more} more parts ..."))
    if rows:
        yield Section("Samples of the data", ("example", "learned", "text"), rows)


def shortened(text: str) -> str:
    """A long text without its middle."""
    half, more = SHOWN_CHARACTERS // 2, len(text) - SHOWN_CHARACTERS
    return text if more <= 0 else f"{text[:half]} ... {more:,} more characters ... {text[-half:]}"


def specification(record: RunRecord) -> Iterator[Section]:
    """What was asked for; all that is not in it is as the defaults say."""

    def flat(fields: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
        for name, value in fields.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{before}{name}.")
            else:
                yield f"{before}{name}", shortened(json.dumps(value, ensure_ascii=False))

    rows = list(flat(record.specification))
    if rows:
        yield Section("The specification", ("field", "is"), rows)


def again(record: RunRecord) -> Section:
    """What decides what is learned, and with which versions it was."""
    identity = {name: value for name, value in record.identity.items() if value is not None}
    rows = [(name, str(value)) for name, value in [*identity.items(), *record.versions.items()]]
    asked = record.specification
    said, submitted = (
        "The same specification with these gives the same run",
        "qlora-submit, with the same file and --fresh",
    )
    if TRAVELLED in json.dumps(asked):
        said += f", where it was submitted: {submitted}"
    elif asked:
        path = Path(asked["output"]) / SPECIFICATION_NAME
        said += f": {shlex.join(['qlora-train', str(path), '--fresh'])}"
        if "cluster" in asked:
            said += f", on a machine of that cluster; where it was submitted: {submitted}"
    said += ". Without --fresh qlora-train resumes it where its folder is kept; with it a run starts anew beside it."
    return Section("To run it again", ("", ""), rows, text=(said,))
