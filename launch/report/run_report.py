"""The report of a run as Markdown, from its record and its events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.report.terminal import memory_rows
from launch.report.words import gib
from orchestrator.record import RunRecord
from qlora_core.perplexity import perplexity

FILE_NAME = "report.md"
LOSS_ROWS = 20


def write_report(record: RunRecord, folder: Path) -> Path:
    """Write ``report.md`` beside the record and return its path."""
    path = folder / FILE_NAME
    path.write_text(run_report(record, read_events(folder / "events.jsonl")), encoding="utf-8")
    return path


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; lines that are none are passed over."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def run_report(record: RunRecord, events: list[dict[str, Any]]) -> str:
    """The whole report."""
    sections = [
        f"# Run {record.name}",
        f"Status: {record.status}. {record.total_steps} steps planned, {len(record.attempts)} attempt(s). "
        f"Machine: {record.machine['name']}.",
        results_section(record),
        attempts_section(record),
        memory_section(record),
        loss_section(events),
        evaluation_section(events),
        data_section(record.data),
        choices_section(record.plan["choices"]),
        versions_section(record.versions),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def results_section(record: RunRecord) -> str:
    """Evaluation before and after, and the sample answers."""
    results = record.results
    before, after = results.get("eval_before"), results.get("eval_after")
    lines = ["## Result"]
    if before is not None and after is not None:
        lines.append(
            f"Evaluation loss on held-out examples: {before:.4f} before, {after:.4f} after; perplexity "
            f"{perplexity(before):.2f} and {perplexity(after):.2f}."
        )
    if record.adapter:
        lines.append(f"Adapter: `{record.adapter}`")
    if record.weights:
        lines.append(f"Model: `{record.weights}`")
    for first, last in zip(results.get("answers_before", []), results.get("answers_after", []), strict=False):
        lines += [
            f"> {first['question']}",
            f"- expected: {first['expected']}\n"
            f"- before: {first['given'] or '(nothing)'}\n"
            f"- after: {last['given'] or '(nothing)'}",
        ]
    return "\n\n".join(lines)


def attempts_section(record: RunRecord) -> str:
    """What happened on the way and what was decided; nothing where the first attempt came to the end."""
    if len(record.attempts) == 1 and not record.attempts[0].failure:
        return ""
    rows = []
    for number, attempt in enumerate(record.attempts, start=1):
        failure, decision = attempt.failure or {}, attempt.decision or {}
        strategy = attempt.strategy
        how = (
            f"{strategy['world_size']} x {strategy['micro_batch']} x {strategy['gradient_accumulation']}, "
            f"ZeRO {strategy['zero_stage']}"
            if strategy
            else ""
        )
        # what a library says may hold what Markdown would take for its own
        said = (attempt.reason or "").replace("|", "\\|").replace("\n", " ")
        kind = f"{failure['kind']}: " if failure else ""
        then = f"{decision['action']}: {decision['reason']}" if decision else ""
        steps = f"{attempt.from_step} to {'?' if attempt.to_step is None else attempt.to_step}"
        rows.append(f"| {number} | {steps} | {how} | {attempt.status} | {kind}{said} | {then} |")
        rows += [f"| | | | passed over | {one['checkpoint']}: {one['reason']} | |" for one in attempt.skipped]
    head = "| attempt | steps | workers x micro-batch x accumulation | ended | what happened | what followed |"
    return "\n".join(["## Attempts", "", head, "| ---: | --- | --- | --- | --- | --- |", *rows])


def memory_section(record: RunRecord) -> str:
    """Predicted beside measured."""
    if record.measured is None:
        return ""
    rows = [
        f"| {title} | {gib(guess)} | {gib(found)} | {(guess - found) / found:+.1%} |"
        for title, guess, found in memory_rows(record.predicted, record.measured)
        if found
    ]
    return "\n".join(
        [
            "## Memory of the fullest rank",
            "",
            f"Measured: {record.measured['allocated_is']}. Predicted peak: {record.predicted['peak_moment']}.",
            "",
            "| | predicted | measured | error |",
            "| --- | ---: | ---: | ---: |",
            *rows,
        ]
    )


def loss_section(events: list[dict[str, Any]]) -> str:
    """The loss curve as a table of at most LOSS_ROWS rows."""
    steps = [event for event in events if event["event"] == "step"]
    every = max(1, -(-len(steps) // LOSS_ROWS))
    rows = [
        f"| {event['step']} | {event['loss']:.4f} | {event['learning_rate']:.2e} "
        f"| {event['tokens'] / event['seconds']:.0f} |"
        for index, event in enumerate(steps, start=1)
        if index % every == 0 or index == len(steps)
    ]
    return "\n".join(
        ["## Training", "", "| step | loss | learning rate | tokens/s |", "| ---: | ---: | ---: | ---: |", *rows]
    )


def evaluation_section(events: list[dict[str, Any]]) -> str:
    """Loss and perplexity on the held-out examples, each time that they were measured."""
    rows = [
        f"| {event['step']} | {event['eval_loss']:.4f} | {perplexity(event['eval_loss']):.2f} |"
        for event in events
        if event["event"] == "eval" and event["eval_loss"] is not None
    ]
    head = ["## Evaluation", "", "| step | held-out loss | perplexity |", "| ---: | ---: | ---: |"]
    return "\n".join([*head, *rows]) if rows else ""


def data_section(data: Mapping[str, Any]) -> str:
    """What became of the data."""
    rows = ""
    if "rows" in data:
        rows = f" They are trained on in {data['rows']} sequences; were all as long as the longest, "
        rows += f"{data['padding_percent']} % would be padding."
    # records of earlier versions do not count these
    bad = "".join(f"\n- left out: {record}" for record in data.get("bad_records", ()))
    return (
        f"## Data\n\n{data['examples']} examples in format {data['format']}, {data['tokens']} tokens, the longest "
        f"{data['longest']}; {data['truncated']} truncated, {data['unlearnable']} left out because nothing to learn "
        f"was within the length, {data.get('empty_answers', 0)} because the answer is empty, {data.get('bad', 0)} as "
        f"bad.{rows} Digest `{data['digest']}`.{bad and chr(10)}{bad}"
    )


def choices_section(choices: list[dict[str, str]]) -> str:
    """What the planner chose, and why."""
    return "\n".join(
        ["## Choices", "", *(f"- {item['field']}: {item['value']} ({item['reason']})" for item in choices)]
    )


def versions_section(versions: Mapping[str, str]) -> str:
    """Versions, one line."""
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items())
