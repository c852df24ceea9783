"""The strategy: how a recipe's step is spread over GPUs and made to fit. It changes no mathematics."""

# The annotations are not postponed: `broken` reads them.

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qlora_core.checks import Check, check_of
from qlora_core.recipe import Count

ZeroStage = Literal[0, 1, 2, 3]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Loss = Literal["full", "chunked", "liger"]
Offload = Literal["none", "optimizer", "all"]

LOSS_CHUNK_TOKENS = 1024
"""Tokens whose logits the losses other than "full" hold at a time."""
LOSS_PARTS = 8
"""Parts of these logits that are widened to float32 one after the other, where the output head is frozen."""
ATTENTION_BLOCK = 128
"""Queries whose scores the backward pass of attention holds at a time on a CPU."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """A fully decided strategy; ``auto`` exists only in a request for one.

    Attributes:
        world_size: data-parallel workers, one GPU each.
        micro_batch: sequences of one forward pass on one GPU.
        gradient_accumulation: micro-batches of one optimizer step on one GPU.
        gradient_checkpointing: keep one activation per layer and recompute the rest in the backward pass.
        attention: transformers' attention implementation.
        loss: "full" makes all logits at once as transformers does; "chunked" LOSS_CHUNK_TOKENS tokens' at a time, and
            so does "liger", with Liger's kernel in place of torch's operators.
        paged_optimizer: optimizer state in CUDA managed memory (bitsandbytes' paged optimizers).
        zero_stage: 0 is plain torch (DDP over several GPUs); 1 to 3 are DeepSpeed's.
        offload: what DeepSpeed keeps in host memory.
    """

    world_size: Count = 1
    micro_batch: Count = 1
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = True
    attention: Attention = "sdpa"
    loss: Loss = "chunked"
    paged_optimizer: bool = True
    zero_stage: ZeroStage = 0
    offload: Offload = "none"

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step over all GPUs and micro-batches."""
        return self.world_size * self.micro_batch * self.gradient_accumulation


def broken(strategy: Strategy) -> Iterator[tuple[str, object, str]]:
    """Fields whose value is none of theirs: name, value, and the rule it breaks.

    A `Strategy` does not check itself, for a search makes thousands.
    """
    for name, check in _checks():
        value = getattr(strategy, name)
        if rule := check(value):
            yield name, value, rule


@functools.cache
def _checks() -> tuple[tuple[str, Check], ...]:
    return tuple((field.name, check_of(field.type)) for field in dataclasses.fields(Strategy))
