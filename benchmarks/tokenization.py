"""Our encoding against `datasets`' own map with two processes, on the same conversations: ratios of one run.

    PYTHONPATH=examples python -m benchmarks.tokenization

Ours is timed whole: reading the file, rendering, tokenizing, finding the answers, digests. Theirs is `map` alone, over
records that lie in Arrow already: once as people write it for speed (batches, token ids only), once as training
libraries do (one record after the other, with the answers' mask by the template's generation marks).
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results" / "tokenization.json"
PROCESSES = 2
OURS, BATCHED, SINGLE = "ours, whole", "datasets map, batched, ids only", "datasets map, one by one, with the mask"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = TEMPLATE.replace(
    "{{ message['content'] + eos_token }}{% else %}",
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}",
)


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of two to six turns of 5 to 150 words, as long as those of published chat data."""
    import demo_text

    rng = random.Random(seed)  # noqa: S311
    words = " ".join(demo_text.story(rng) for _ in range(50)).split()

    def turn(role: str) -> dict[str, str]:
        start = rng.randrange(len(words) - 150)
        return {"role": role, "content": " ".join(words[start : start + rng.randrange(5, 150)])}

    return [
        {"messages": [turn(("user", "assistant")[index % 2]) for index in range(2 * rng.randint(1, 3))]}
        for _ in range(count)
    ]


def contenders(path: Path, rows: list[dict[str, Any]]) -> dict[str, Callable[[], int]]:
    """What is timed; each gives the tokens that it made."""
    import datasets
    from make_demo_base import train_tokenizer

    from qlora_core.training.dataset import encode_file

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer, marked = train_tokenizer(seed=0), train_tokenizer(seed=0)
    tokenizer.chat_template, marked.chat_template = TEMPLATE, MARKED
    dataset = datasets.Dataset.from_list(rows)

    def batched(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(batch["messages"], tokenize=True, return_dict=False)}

    def single(row: dict[str, Any]) -> dict[str, Any]:
        return dict(
            marked.apply_chat_template(
                row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        )

    def mapped(function: Callable[[dict[str, Any]], dict[str, Any]], batches: bool) -> Callable[[], int]:
        def run() -> int:
            done = dataset.map(function, batched=batches, num_proc=PROCESSES, remove_columns=["messages"])
            return len(done)

        return run

    return {
        OURS: lambda: len(encode_file(path, "messages", tokenizer, 10**6)[0]),
        BATCHED: mapped(batched, True),
        SINGLE: mapped(single, False),
    }


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is: the median of the rounds."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 2)


def cpu_seconds() -> float:
    """Of this process and of those it has waited for, which other work on the machine hardly changes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@click.command()
@click.option("--records", default=10_000, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(records: int, rounds: int) -> None:
    """Time each in turn, several rounds, and write the medians, of the ratios within a round too."""
    from qlora_core.quiet import quiet_libraries

    quiet_libraries()
    load = round(os.getloadavg()[0], 1)
    rows = conversations(records, seed=0)
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        timed = contenders(path, rows)
        for _ in range(rounds):  # in turn, so that whatever else the machine does meets all of them
            for name, run in timed.items():
                begin, used = time.perf_counter(), cpu_seconds()
                if run() != records:
                    raise RuntimeError(f"{name} lost records")
                seconds.setdefault(name, []).append(time.perf_counter() - begin)
                cpu.setdefault(name, []).append(cpu_seconds() - used)
    from qlora_core.files import write_json

    median = {name: statistics.median(each) for name, each in seconds.items()}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load when it began": load,
        "versions": {name: metadata.version(name) for name in ("datasets", "tokenizers", "transformers")},
        "records": records,
        "megabytes": round(sum(len(json.dumps(row)) for row in rows) / 1e6, 1),
        "seconds": {name: round(value, 2) for name, value in median.items()},
        "CPU seconds": {name: round(statistics.median(each), 2) for name, each in cpu.items()},
        "ours is as fast times": {
            name: [round(theirs / ours, 2) for theirs, ours in zip(seconds[name], seconds[OURS], strict=True)]
            for name in (BATCHED, SINGLE)
        },
        "median of that": {name: ratio(seconds[name], seconds[OURS]) for name in (BATCHED, SINGLE)},
    }
    write_json(RESULTS, result)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
