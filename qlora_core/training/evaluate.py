"""What a model can do: its loss on held-out examples, and its answers to a few of their questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlora_core.training.examples import Examples, iterate_eval_batches
from qlora_core.training.loss import SummedLoss

MAX_ANSWER_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Answer:
    """A held-out question, the answer of the data, and the model's."""

    question: str
    expected: str
    given: str


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode, without gradients, and back in training mode afterwards."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def total(value: float, device: torch.device) -> float:
    """The sum of `value` over all ranks, on every rank."""
    if not dist.is_initialized():
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed)


def eval_loss(
    module: SummedLoss,
    examples: Examples,
    *,
    pad_token: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    device: torch.device,
    alive: Callable[[], None] = lambda: None,
) -> float:
    """The mean -log p over all learned tokens of `examples`; every rank must call it.

    `alive` is called after each batch.
    """
    loss = 0.0
    with evaluation(module):
        for batch in iterate_eval_batches(len(examples), rank=rank, world_size=world_size, micro_batch=micro_batch):
            # Under ZeRO-3 every rank must take part in every forward pass, also one that has no example left.
            value = module(**examples.batch(batch or [0], pad_token, device))
            loss += float(value) if batch else 0.0
            alive()
    return total(loss, device) / sum(examples.learned)


def example_losses(model: nn.Module, examples: Examples, device: torch.device) -> list[float]:
    """-log p summed over the learned tokens of each example, by the model's own loss: transformers', one at a time."""
    losses = []
    with evaluation(model):
        for index, learned in enumerate(examples.learned):
            batch = examples.batch([index], 0, device)  # alone, so that nothing is padded
            mean = cast(Any, model)(input_ids=batch["input_ids_BS"], labels=batch["labels_BS"], use_cache=False).loss
            losses.append(float(mean) * learned)
    return losses


def sample_answers(
    module: SummedLoss,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    count: int,
    device: torch.device,
    max_tokens: int = MAX_ANSWER_TOKENS,
) -> list[Answer]:
    """Greedy answers to the first `count` held-out questions; every rank must call it, all compute the same."""
    answers = []
    model = cast(Any, module.model)
    with evaluation(module), module.autocast(device):
        for index in range(min(count, len(examples))):
            ids, learned = examples[index]
            first = int(learned.nonzero()[0])
            if first == 0:  # nothing was asked
                continue
            last = first + int((~learned[first:]).nonzero()[0]) if bool((~learned[first:]).any()) else len(ids)
            prompt_BS = ids[:first].unsqueeze(0).to(device)
            output_BS = model.generate(
                input_ids=prompt_BS,
                attention_mask=torch.ones_like(prompt_BS),
                max_new_tokens=max_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers.append(
                Answer(
                    question=decode(tokenizer, ids[:first]),
                    expected=decode(tokenizer, ids[first:last]),
                    given=decode(tokenizer, output_BS[0, first:]),
                )
            )
    return answers


def decode(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> str:
    """Token ids as text, without special tokens."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
