"""The training loop: steps, evaluations, checkpoints, and a clean end when it is asked to stop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from clusters.errors import NotFinite, RunFailed
from qlora_core.memory.measure import Meter
from qlora_core.perplexity import perplexity
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training import checkpoint
from qlora_core.training.checkpoint import Progress, Writer, weights_digest
from qlora_core.training.engine import Engine
from qlora_core.training.evaluate import decode, eval_loss, sample_answers
from qlora_core.training.examples import Batch, Examples, Rows
from qlora_core.training.optimizer import build_scheduler
from qlora_core.training.reshard import layout_of
from qlora_core.training.restore import load_progress, restore
from qlora_core.training.sampling import micro_batches

SAMPLED_QUESTIONS = 2
NAMED_EXAMPLES = 8
"""Examples of a bad micro-batch that are named by number; the rest are counted."""
BEGINNING = 32
"""Tokens by which a bad example is shown."""


class Observer(Protocol):
    """Who watches a run from outside the loop."""

    def event(self, kind: str, **facts: Any) -> None:
        """Something happened: a step, an evaluation, a checkpoint, a phase. Called on every rank."""

    def stop_requested(self) -> bool:
        """Whether the run is to end after this step. Only rank 0's answer counts."""

    def alive(self) -> None:
        """Something was done. Called on every rank, after each micro-batch and often while others are waited for."""

    def checkpoint_saved(self, path: Path, step: int) -> None:
        """A checkpoint is complete. Called on rank 0 alone, in the thread that wrote it."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Everything the loop needs, built by the worker.

    Attributes:
        total_steps: optimizer steps of the whole run.
        save_every: steps between two checkpoints; one more is written at the end. Each comes with an evaluation.
        eval_every: steps between two evaluations besides; None for no others.
        patience: checkpoints in a row without a lower evaluation loss that end the run; None: it takes all its steps.
        result: whose answers are taken in the end: the last checkpoint's, or those of the best.
        facts: what identifies the run inside its checkpoints.
        keep: valid checkpoints that stay.
        attempt: the number of this try of the run.
    """

    recipe: Recipe
    strategy: Strategy
    seed: int
    total_steps: int
    save_every: int
    model: nn.Module
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    train_data: Rows
    eval_data: Examples
    meter: Meter
    device: torch.device
    rank: int
    checkpoints: Path
    facts: Mapping[str, Any]
    keep: int = 2
    attempt: int = 1
    eval_every: int | None = None
    patience: int | None = None
    result: Literal["last", "best"] = "last"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the loop ended: after which step, whether that was the last, and what the checkpoints carry along."""

    step: int
    finished: bool
    context: dict[str, Any]


class Step(NamedTuple):
    """What an optimizer step was.

    Attributes:
        loss: mean over all its learned tokens.
        norm: of its gradient, before clipping.
        stop: the run is to end here.
        tokens: in all its rows.
        positions: in all its micro-batches: `tokens` and the padding beside them.
        losses: of this rank's micro-batches: their rows, and the summed loss, float64, shape [].
    """

    loss: float
    norm: float
    stop: bool
    tokens: int
    positions: int
    losses: list[tuple[list[int], torch.Tensor]]


def train(run: TrainingRun, observer: Observer, resume_from: Path | None) -> Outcome:
    """Train from the start, or from a checkpoint, to the end or until a stop is requested.

    Raises:
        NotFinite: the loss or the gradient is not finite any more.
        StorageFailed: a checkpoint cannot be written.
        RunFailed: the weights are not those of the checkpoint, or nothing was learned.
    """
    layout = layout_of(run.recipe, run.strategy)
    writer = checkpoint.Writer(
        run.checkpoints,
        run.model,
        rank=run.rank,
        world_size=run.strategy.world_size,
        facts={**run.facts, "layout": layout},
        keep=run.keep,
        attempt=run.attempt,
        on_saved=observer.checkpoint_saved,
    )
    weights = weights_digest(run.engine.saved_weights())
    scheduler = build_scheduler(run.engine.optimizer, run.recipe, run.total_steps)
    if resume_from is None:
        before = evaluate(run, observer)
        step, context = 0, {"eval_before": before, "answers_before": answers(run), "weights_at_start": weights}
        observer.event("eval", step=0, **measures(before))
        # Evaluation draws no random numbers, but a library might: training starts from a state of its own either way.
        torch.manual_seed(run.seed * 1_000_003 + run.rank)
    else:
        progress = load_progress(resume_from)
        step, context = progress.step, progress.context
        check_resumed(weights, context, resume_from)
        best = cast(dict[str, Any] | None, context.get("best"))
        if run.rank == 0 and best is not None and best["step"] == step:
            checkpoint.keep_best(resume_from)  # its writer may have ended before it did
        scheduler.load_state_dict(progress.scheduler)
        for group, rate in zip(run.engine.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        restore(resume_from, run.engine, rank=run.rank, layout=layout)
        run.engine.scaler.load_state_dict(cast(dict[str, Any], context.get("loss_scale", {})))

    first, stop = step, False
    with writer.finishing(observer.alive):
        while not (ended := is_at_end(run, step, context)) and not stop:
            if step == first + 1:  # the optimizer's state is there now, and the largest micro-batch must fit beside it
                rehearse(run, observer)
            started = time.perf_counter()
            rate = scheduler.get_last_lr()[0]
            loss, norm, stop, tokens, positions, losses = one_step(run, step, observer)
            scheduler.step()
            step += 1
            observer.event(
                "step",
                step=step,
                total=run.total_steps,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=tokens,
                positions=positions,
                seconds=time.perf_counter() - started,
                peaks=run.meter.peaks()._asdict(),
                reserved=run.meter.reserved(),
            )
            if not math.isfinite(loss) or not (math.isfinite(norm) or can_scale_down(run.engine.scaler)):
                raise NotFinite(
                    f"The loss of step {step} is {loss} and its gradient's norm {norm}.{culprits(run, losses)}",
                    "Look at these examples, or lower recipe.learning_rate and start anew with --fresh.",
                )
            if step == run.total_steps or stop or step % run.save_every == 0:
                context = save(run, observer, writer, Progress(step, scheduler.state_dict(), context))
            elif run.eval_every is not None and step % run.eval_every == 0:
                observer.event("eval", step=step, **measures(evaluate(run, observer)))
            writer.check()
    # an attempt that found all steps done wrote no checkpoint: the weights that it began with are the run's last
    last = weights if step == first else writer.digest
    if ended and last == context["weights_at_start"]:
        raise RunFailed(
            f"All {step} steps were done, and the trained weights are what they were before the first.",
            "Raise recipe.learning_rate, or look whether recipe.lora_dtype can hold such small changes.",
        )
    return Outcome(step=step, finished=ended, context=context)


def is_at_end(run: TrainingRun, step: int, context: Mapping[str, Any]) -> bool:
    """Whether all steps are done, or the evaluation loss was not lower at as many checkpoints as are waited for."""
    return step == run.total_steps or (run.patience is not None and context.get("not_lower", 0) >= run.patience)


def can_scale_down(scaler: torch.amp.GradScaler) -> bool:
    """Whether a gradient that is not finite may be so for its scale alone, which is halved at each."""
    return scaler.is_enabled() and scaler.get_scale() >= 1


def check_resumed(weights: str, context: Mapping[str, Any], resume_from: Path) -> None:
    """Raise a RunFailed where the weights in the model, by their digest, are not those that were saved."""
    if weights != context["weights"]:
        raise RunFailed(
            f"The trained weights are not those of the checkpoint {resume_from} after they were loaded from it.",
            "Please report this: going on would silently drop what was learned. --fresh starts anew.",
        )


def rehearse(run: TrainingRun, observer: Observer) -> None:
    """Compute the largest micro-batch of the run, and leave everything as it was but the measured peaks.

    All of its tokens count as learned, as a plan counts them: of a smaller one more may be, and its logits be more.
    Where a step has several micro-batches it is computed twice, the second time beside the gradients of the first.

    Raises:
        NotFinite: its loss is not finite.
    """
    rows = run.train_data.largest_micro_batch(run.total_steps, run.strategy.micro_batch)
    pad_token = int(run.tokenizer.pad_token_id)
    devices = [run.device] if run.device.type == "cuda" else []
    # what is drawn for dropout and noise is drawn once more by the step that follows
    with torch.random.fork_rng(devices=devices):
        for last in (True,) if run.strategy.gradient_accumulation == 1 else (False, True):
            with run.engine.rehearsal(last):
                with run.meter.phase("forward"):
                    loss = run.engine.loss(all_learned(run.train_data.batch(rows, pad_token, run.device)))
                with run.meter.phase("backward"):
                    run.engine.backward(loss * 0)
                value = float(loss.detach())
                del loss
    if not math.isfinite(value):
        raise NotFinite(
            f"The loss of the run's largest micro-batch is {value}. {named(run, rows)}",
            "Look at these examples, or lower recipe.learning_rate and start anew with --fresh.",
        )
    observer.event(
        "rehearsal",
        sequences=len(rows),
        longest=run.train_data.lengths[rows[0]],
        peaks=run.meter.peaks()._asdict(),
        reserved=run.meter.reserved(),
    )


def all_learned(batch: Batch) -> Batch:
    """`batch` with every token of it as its own label."""
    return {**batch, "labels_BS": batch["input_ids_BS"].clone()}


def one_step(run: TrainingRun, step: int, observer: Observer) -> Step:
    """One optimizer step over all ranks."""
    data = run.train_data
    rows = data.order.step(step)
    # The divisor is the labelled tokens of the WHOLE step, which every rank knows without asking: a mean per
    # micro-batch would weigh a token by the length of its neighbours.
    learned = sum(data.learned[row] for row in rows)
    batches = micro_batches(
        rows,
        data.lengths,
        rank=run.rank,
        world_size=run.strategy.world_size,
        micro_batch=run.strategy.micro_batch,
    )
    pad_token = int(run.tokenizer.pad_token_id)
    losses: list[tuple[list[int], torch.Tensor]] = []
    for position, batch in enumerate(batches):
        with run.engine.micro_step(last=position == len(batches) - 1):
            with run.meter.phase("forward"):
                loss = run.engine.loss(data.batch(batch, pad_token, run.device))
            with run.meter.phase("backward"):
                run.engine.backward(loss / learned)
            losses.append((batch, loss.detach().double()))
            del loss
        observer.alive()
    with run.meter.phase("optimizer"):
        norm = run.engine.step()
    # asked as late as can be: what is asked for during a step ends the run after it, not after the next
    stopping = losses[0][1].new_tensor(float(run.rank == 0 and observer.stop_requested()))
    summed = torch.stack([torch.stack([loss for _, loss in losses]).sum(), stopping])
    if dist.is_initialized():
        dist.all_reduce(summed)
    loss_sum, stopped = summed.tolist()
    tokens, positions = sum(data.lengths[row] for row in rows), data.positions(rows, run.strategy.micro_batch)
    return Step(loss_sum / learned, norm, stopped > 0, tokens, positions, losses)


def culprits(run: TrainingRun, losses: list[tuple[list[int], torch.Tensor]]) -> str:
    """The first micro-batch of a step whose loss is not finite, as a sentence; every rank must call it."""
    mine = next((rows for rows, loss in losses if not math.isfinite(float(loss))), None)
    found = [mine]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    for rank, rows in enumerate(found):
        if rows is not None:
            return f" It is so first on rank {rank}. {named(run, rows)}"
    return " The losses of all its micro-batches are finite: it is the gradient that is not."


def named(run: TrainingRun, rows: list[int]) -> str:
    """The examples of rows by where they stand in the data, as a sentence, and how the first of them begins."""
    examples = [index for row in rows for index in run.train_data.members[row]]
    places = ", ".join(run.train_data.places(examples[:NAMED_EXAMPLES]))
    more = f" and {len(examples) - NAMED_EXAMPLES} more" if len(examples) > NAMED_EXAMPLES else ""
    begins = decode(run.tokenizer, run.train_data.example(examples[0])[:BEGINNING])
    return f"It holds the examples of {places}{more}, of which the first begins {begins!r}."


def evaluate(run: TrainingRun, observer: Observer) -> float | None:
    """The loss on the held-out examples, or None where there are none."""
    if not len(run.eval_data):
        return None
    return eval_loss(
        run.engine.module,
        run.eval_data,
        pad_token=int(run.tokenizer.pad_token_id),
        micro_batch=run.strategy.micro_batch,
        rank=run.rank,
        world_size=run.strategy.world_size,
        device=run.device,
        alive=observer.alive,
    )


def measures(loss: float | None) -> dict[str, float | None]:
    """What an evaluation is told as: the loss and its exponential, None for both where nothing is held out."""
    return {"eval_loss": loss, "perplexity": None if loss is None else perplexity(loss)}


def answers(run: TrainingRun) -> list[dict[str, str]]:
    """The model's answers to a few held-out questions, as JSON values."""
    given = sample_answers(run.engine.module, run.tokenizer, run.eval_data, SAMPLED_QUESTIONS, run.device)
    return [dataclasses.asdict(answer) for answer in given]


def save(run: TrainingRun, observer: Observer, writer: Writer, progress: Progress) -> dict[str, Any]:
    """Evaluate, begin to write a checkpoint, and return the context with the evaluation in it.

    What an interrupt saves between two checkpoints is not evaluated: who asks for it may not wait, and it is no
    candidate for the best, for a run without it must end alike.

    Raises:
        NotFinite: the evaluation's loss is not finite.
        StorageFailed: the checkpoint before could not be written.
    """
    step, context = progress.step, dict(progress.context)
    due = step == run.total_steps or step % run.save_every == 0
    value = evaluate(run, observer) if due else None
    if value is not None and not math.isfinite(value):
        raise NotFinite(
            f"The loss on the held-out examples is {value} after step {step}, so that step was not saved.",
            "Lower recipe.learning_rate and start anew with --fresh; the last checkpoint is from before.",
        )
    best = context.setdefault("best", None)
    is_best = value is not None and (best is None or value < best["eval_loss"])
    if is_best:
        context["best"], context["not_lower"] = {"step": step, "eval_loss": value}, 0
    elif value is not None:
        context["not_lower"] = context.get("not_lower", 0) + 1
    is_result = is_best if run.result == "best" else is_at_end(run, step, context)
    if is_result:
        context["answers_after"] = answers(run)
    weights = run.engine.saved_weights()
    context |= {"eval_after": value, "loss_scale": run.engine.scaler.state_dict()}
    progress = dataclasses.replace(progress, context=context)
    writer.wait(observer.alive)
    writer.write(checkpoint.snapshot(run.engine, weights, progress, rank=run.rank, best=is_best))
    if due:
        observer.event("eval", step=step, **measures(value))
    return context
