"""Several adapters on one base, compared on held-out examples: losses with their intervals, answers, public tasks."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoConfig

from clusters.errors import RequestError, request_error
from orchestrator.machine import describe, target_of
from orchestrator.planner import fitting_defaults
from orchestrator.trained import Trained
from qlora_core.bootstrap import Interval, interval
from qlora_core.data import FormatName, Learn
from qlora_core.huggingface.config import architecture_from_folder
from qlora_core.perplexity import perplexity
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.adapters import load_adapters
from qlora_core.training.dataset import DataOptions, DataReport, encode_file
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.evaluate import Answer, example_losses, sample_answers
from qlora_core.training.examples import Examples
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import load_base
from qlora_core.training.tasks import run_tasks
from qlora_core.training.tokenizer import load_tokenizer

BASE = "base"
"""What the base without an adapter is called in a comparison."""
Storage = Literal["as-trained", "nf4", "fp4", "none"]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What one adapter, or the base alone, can do.

    Attributes:
        loss: mean -log p of a learned token, with its 95 % interval over examples; perplexity is its exponential.
        change: that loss minus the base's, over the same draws of examples; None for the base.
        answers: to the first questions.
        tasks: measures of lm-evaluation-harness, by task.
    """

    name: str
    loss: Interval | None
    perplexity: Interval | None
    change: Interval | None
    answers: list[Answer]
    tasks: dict[str, dict[str, float]]


FLAGS = {
    "data.path": "--data",
    "data.columns": "--column",
    "data.format": "--format",
    "data.learn": "--learn",
    "data.split": "--split",
}
"""A specification's fields by the flags that say the same here."""


@dataclass(frozen=True, slots=True)
class Questions:
    """What to evaluate on.

    Attributes:
        data: what `data.path` of a specification may be; None for the examples that the run held out.
        format, columns, learn, split: how it is read; see `DataOptions`.
        samples: questions that are answered.
        answer_tokens: of the longest answer.
        tasks: of lm-evaluation-harness: names, or YAML files of one's own.
        limit: examples of each task; None for all.
    """

    data: str | None
    seq_len: int
    samples: int
    answer_tokens: int
    format: FormatName = "auto"
    columns: Mapping[str, str] | None = None
    learn: Learn = "auto"
    split: str | None = None
    tasks: Sequence[str] = ()
    limit: int | None = None


def evaluate_adapters(
    trained: Trained, others: Mapping[str, Trained], base: Path, storage: Storage, questions: Questions
) -> tuple[list[Evaluated], DataReport | None]:
    """Evaluate the base alone, what was trained, and other adapters for the same base, in this order.

    Returns also what became of the data; None where it is what the run held out, or none is asked for.

    Raises:
        RequestError: the data cannot be read, there are no examples, or an adapter is for another base.
    """
    machine = describe()
    device = torch.device(machine.kind)
    recipe = trained.base_recipe if storage == "as-trained" else recipe_of(storage)
    dtype = target_of(machine, trained.compute_dtype, 1).compute_dtype
    strategy = fitting_defaults(architecture_from_folder(base), Strategy(gradient_checkpointing=False))
    tokenizer = load_tokenizer(str(base), trained.adapter.chat_template())
    with examples_of(trained, questions, tokenizer, base) as (examples, report):
        model = load_adapters(load_base(str(base), recipe, strategy, dtype, device), named(trained, others))
        found: list[Evaluated] = []
        reference: list[float] = []
        for name in (BASE, *model.peft_config):
            with acting_as(model, name):
                losses = example_losses(model, examples, device) if examples else []
                reference = reference or losses
                answers = sample_answers(
                    SummedLoss(model, "full"), tokenizer, examples, questions.samples, device, questions.answer_tokens
                )
                tasks = run_tasks(model, tokenizer, questions.tasks, questions.limit) if questions.tasks else {}
            loss = mean_loss(losses, examples.learned) if losses else None
            change = mean_change(losses, reference, examples.learned) if losses and name != BASE else None
            found.append(Evaluated(name, loss, loss and loss.map(perplexity), change, answers, tasks))
    return found, report


def named(trained: Trained, others: Mapping[str, Trained]) -> dict[str, Path]:
    """The folders of all adapters by name; a run's name as peft can use it.

    Raises:
        RequestError: a name is taken.
    """
    own = re.sub(r"[^A-Za-z0-9_-]", "-", trained.name).lstrip("_-") or "trained"
    own = "trained" if own == BASE else own
    for name in others:
        if name in (own, BASE):
            raise request_error("--adapter", name, "another is called that already", "Choose another name")
    return {own: trained.adapter.folder, **{name: other.adapter.folder for name, other in others.items()}}


def mean_loss(losses: Sequence[float], tokens: Sequence[int]) -> Interval:
    """The mean over all tokens, from sums over each example."""
    return interval([losses, tokens], lambda sums: sums[0] / sums[1])


def mean_change(losses: Sequence[float], before: Sequence[float], tokens: Sequence[int]) -> Interval:
    """How much that mean changed."""
    return interval([losses, before, tokens], lambda sums: (sums[0] - sums[1]) / sums[2])


def recipe_of(storage: Storage) -> Recipe:
    """The recipe of a base that is stored in that way."""
    if storage == "none":
        return Recipe(method="lora", quantization="none")
    return Recipe(quantization="fp4" if storage == "fp4" else "nf4")


@contextmanager
def examples_of(
    trained: Trained, questions: Questions, tokenizer: Any, base: Path
) -> Iterator[tuple[Examples, DataReport | None]]:
    """The examples to evaluate on: the data's, or those that the run held out; none where only tasks are asked for.

    With the data's comes what became of it.
    """
    if questions.data is None and trained.held_out is not None and len(held_out := Examples(trained.held_out)):
        yield held_out, None
        return
    if questions.data is None and not questions.tasks:
        rule = "there are no held-out examples of a run there"
        raise request_error("--data", trained.adapter.folder, rule, "Give a file of examples with --data, or --tasks")
    with tempfile.TemporaryDirectory() as folder:
        examples: Sequence[Encoded] = []
        report = None
        if questions.data is not None:
            vocabulary = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config().vocab_size
            options = DataOptions(
                learn=questions.learn, columns=questions.columns, split=questions.split, vocab_size=vocabulary
            )
            try:
                examples, report = encode_file(questions.data, questions.format, tokenizer, questions.seq_len, options)
            except RequestError as error:
                raise error.named(FLAGS) from None
        save_examples(examples, Path(folder) / "examples.safetensors")
        yield Examples(Path(folder) / "examples.safetensors"), report


@contextmanager
def acting_as(model: PeftModel, name: str) -> Iterator[None]:
    """`model` with that adapter, or with none for the base."""
    if name == BASE:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(name)
    yield
