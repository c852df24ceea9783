"""Public benchmarks through EleutherAI's lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clusters.errors import first_line, not_installed, request_error


def require_harness(tasks: Sequence[str]) -> None:
    """Raise a RequestError where tasks are asked for and the harness is not installed."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise not_installed("--tasks", ",".join(tasks), ["lm-eval"], extra="tasks")


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None) -> dict[str, dict[str, float]]:
    """The measures of each task, by its name.

    Args:
        model: a transformers or peft model; it is evaluated as it is.
        tasks: names that the harness knows, whose data it fetches, or YAML files of one's own.
        limit: examples of each task; None for all.

    Raises:
        RequestError: the harness is not installed, or it knows no such task or cannot get its data.
    """
    require_harness(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = [Path(task) for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    names = [task_name(Path(task)) if Path(task) in own else task for task in tasks]
    try:
        manager = TaskManager(include_path=[str(path.parent) for path in own] or None)
        answer = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, trust_remote_code=False),
            tasks=names,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        rule = f"lm-evaluation-harness does not run them: {first_line(error)}"
        raise request_error("--tasks", ",".join(tasks), rule, "`lm-eval ls tasks` lists those it knows") from error
    return {
        task: {name.removesuffix(",none"): float(value) for name, value in measures.items() if is_figure(value)}
        for task, measures in answer["results"].items()
    }


def is_figure(value: object) -> bool:
    """Whether a measure is a number that says something."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def task_name(path: Path) -> str:
    """What a task's YAML file calls it.

    Raises:
        RequestError: there is no such file, or no name in it.
    """
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("task:") and (name := line.removeprefix("task:").strip().strip("\"'")):
                return name
    raise request_error("--tasks", path, "it is no file that has a line with `task: NAME`", "Correct the path")
