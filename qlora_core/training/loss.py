"""The loss: summed cross-entropy over labelled tokens, so that any split of a step into micro-batches adds up the same.

Shapes: B micro-batch, S sequence, H hidden, V vocabulary, N labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from clusters.errors import not_installed
from qlora_core.strategy import LOSS_CHUNK_TOKENS, LOSS_PARTS, Loss
from qlora_core.training.examples import IGNORED
from qlora_core.training.lora import adapt_under_autocast


class SummedLoss(nn.Module):
    """A causal language model with its loss as the output, so that engines see a single forward pass.

    Args:
        model: a causal language model of transformers, with peft's adapters or without.
        kind: "full" lets transformers make all logits; "chunked" makes LOSS_CHUNK_TOKENS tokens' at a time, only for
            labelled tokens, and keeps none of them; "liger" does so with Liger's kernel, for a head that is frozen.
        narrow: the dtype of torch.autocast; None leaves it as it is around the call. With one, the model's adapters run
            under `autocast` alone from here on.

    Raises:
        RequestError: Liger is asked for, and not installed.
    """

    def __init__(self, model: nn.Module, kind: Loss, narrow: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.narrow = narrow
        self.fused = liger_cross_entropy() if kind == "liger" else None
        if narrow is not None:
            adapt_under_autocast(model)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        position_ids_BS: torch.Tensor | None = None,
    ) -> Any:
        """The sum of -log p(label) over all labelled tokens, float32, shape [].

        Args:
            input_ids_BS: padded on the right, where at all.
            position_ids_BS: of packed rows: where they begin anew, another example does.
        """
        with self.autocast(input_ids_BS.device):
            return self._loss(input_ids_BS, labels_BS, position_ids_BS)

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """The context in which the model computes."""
        if self.narrow is None:
            return nullcontext()  # a context that is not enabled would switch off one that is around the call
        # no cache: an adapter's weight is used once, and its narrow copy would stay until the forward pass ends
        return torch.autocast(device.type, self.narrow, cache_enabled=False)

    def _loss(
        self,
        input_ids_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        position_ids_BS: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `forward`."""
        causal = cast(Any, self.model)
        transformer = causal.get_base_model() if isinstance(causal, PeftModel) else causal
        inputs = {"input_ids": input_ids_BS, "use_cache": False}
        if position_ids_BS is not None:
            if transformer.config._attn_implementation == "flash_attention_2":
                # transformers tells packed examples apart for flash attention in a single row only
                # (modeling_flash_attention_utils.py, _is_packed_sequence); in several they would see each other
                input_ids_BS, position_ids_BS, labels_BS = (
                    each.reshape(1, -1) for each in (input_ids_BS, position_ids_BS, labels_BS)
                )
            inputs |= {"input_ids": input_ids_BS, "position_ids": position_ids_BS}
        # The labels are shifted, not the logits: a slice of the logits would be a copy of them.
        if self.kind == "full":
            shifted_BS = F.pad(labels_BS, (0, 1), value=IGNORED)[:, 1:]
            return summed_cross_entropy(causal(**inputs).logits.flatten(0, 1), shifted_BS.flatten())
        hidden_BSH = transformer.get_decoder()(**inputs).last_hidden_state
        labels_BS = labels_BS[:, 1:]
        learned_BS = labels_BS != IGNORED
        hidden_NH = hidden_BSH[:, :-1][learned_BS]
        del hidden_BSH  # or it would lie beside the logits
        head, change = transformer.get_output_embeddings(), LogitChange.of(transformer.config.get_text_config())
        return chunked_cross_entropy(head, hidden_NH, labels_BS[learned_BS], change, self.fused)


class LogitChange(NamedTuple):
    """What a model makes of its output head's product, in the order in which the models' forward passes do.

    Attributes:
        factor: Cohere's logit_scale.
        divisor: Granite's logits_scaling.
        cap: Gemma's final_logit_softcapping: they become cap * tanh(logits / cap).
    """

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitChange:
        """That of a model (transformers 5.23, models/*/modeling_*.py; MPT's code ignores its logit_scale)."""
        return cls(
            getattr(config, "logit_scale", None) if config.model_type != "mpt" else None,
            getattr(config, "logits_scaling", None),
            getattr(config, "final_logit_softcapping", None),
        )

    @property
    def is_none(self) -> bool:
        """The loss is taken of what the head gives."""
        return all(value in (None, 1) for value in (self.factor, self.divisor)) and self.cap is None

    def __call__(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """The logits that the loss is taken of."""
        if self.factor not in (None, 1):
            logits_NV = logits_NV * self.factor
        if self.divisor not in (None, 1):
            logits_NV = logits_NV / self.divisor
        if self.cap is not None:
            logits_NV = torch.tanh(logits_NV / self.cap) * self.cap
        return logits_NV


UNCHANGED = LogitChange()
Fused = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""From an output head, hidden states [C, H] and labels [C] to the summed cross-entropy of what the head gives."""


def liger_cross_entropy() -> Fused:
    """Liger's kernel, which puts the logits' gradient into their place.

    Raises:
        RequestError: it is not installed.
    """
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
    except ImportError as error:
        raise not_installed("strategy.loss", "liger", ["liger-kernel"], extra="liger") from error

    def of_chunk(head: nn.Module, hidden_CH: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
        if not len(labels_C):
            return hidden_CH.float().sum()  # it divides by their number
        vocab, hidden = cast(torch.Tensor, head.weight).shape
        return cast(
            torch.Tensor,
            fused(
                hidden_CH,
                head.weight,
                labels_C,
                head.bias,
                reduction="sum",
                chunk_mem_const=-(-vocab // hidden),  # all rows at once: they are a chunk already
            ),
        )

    return of_chunk


def chunked_cross_entropy(
    head: nn.Module,
    hidden_NH: torch.Tensor,
    labels_N: torch.Tensor,
    change: LogitChange = UNCHANGED,
    fused: Fused | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of `change(head(hidden))`; at most LOSS_CHUNK_TOKENS rows of logits exist at a time.

    Where the head is frozen, the gradient of a chunk is taken while its logits are there, in the forward pass, and they
    are made once. A head that is trained has its logits made again in the backward pass.

    Args:
        labels_N: none is `IGNORED`.
        fused: computes a chunk's in place of torch's operators.

    Raises:
        ValueError: there is a `fused`, and the model changes its logits.
    """
    if fused is not None and not change.is_none:
        raise ValueError(f"the fused loss is of a head's own logits, and here they become {change}")

    def logits(hidden_CH: torch.Tensor) -> torch.Tensor:
        return change(head(hidden_CH))

    def of_chunk(hidden_CH: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
        return summed_cross_entropy(logits(hidden_CH), labels_C)

    if not any(parameter.requires_grad for parameter in head.parameters()):
        by_kernel = None if fused is None else partial(fused, head)
        return cast(torch.Tensor, FrozenHeadLoss.apply(hidden_NH, labels_N, logits, by_kernel))  # type: ignore[no-untyped-call]
    total = hidden_NH.new_zeros((), dtype=torch.float32)
    for hidden_CH, labels_C in chunks(hidden_NH, labels_N):
        total = total + cast(
            torch.Tensor, checkpoint(of_chunk, hidden_CH, labels_C, use_reentrant=False, preserve_rng_state=False)
        )
    return total


def chunks(hidden_NH: torch.Tensor, labels_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of LOSS_CHUNK_TOKENS tokens, and of what is left at the end."""
    return zip(torch.split(hidden_NH, LOSS_CHUNK_TOKENS), torch.split(labels_N, LOSS_CHUNK_TOKENS), strict=True)


class FrozenHeadLoss(torch.autograd.Function):
    """The sum of a loss over chunks, differentiated by the hidden states alone, in the forward pass.

    The idea is Liger's (fused_linear_cross_entropy.py): what is kept is one gradient as large as the hidden states, and
    the gradient by the logits takes their place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        labels_N: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        fused: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """The loss, float32, shape [].

        Args:
            head: gives the logits of hidden states.
            fused: gives the loss in place of that.
        """
        total = hidden_NH.new_zeros((), dtype=torch.float32)
        if not ctx.needs_input_grad[0]:
            for hidden_CH, labels_C in chunks(hidden_NH, labels_N):
                total += fused(hidden_CH, labels_C) if fused else by_parts(head(hidden_CH), labels_C)
            return total
        gradient_NH = torch.empty_like(hidden_NH)
        parts = torch.split(gradient_NH, LOSS_CHUNK_TOKENS)
        for (hidden_CH, labels_C), part_CH in zip(chunks(hidden_NH, labels_N), parts, strict=True):
            with torch.enable_grad():
                leaf_CH = hidden_CH.detach().requires_grad_()
                result = fused(leaf_CH, labels_C) if fused else head(leaf_CH)
            loss, of_result = result.detach(), None
            if not fused:  # what is computed last is a product, with a number or a matrix, which keeps nothing of it
                of_result = loss
                loss = by_parts(of_result, labels_C, into_gradient=True)
            part_CH.copy_(torch.autograd.grad(result, leaf_CH, of_result)[0])
            total += loss
            del result, of_result
        ctx.save_for_backward(gradient_NH)
        return total

    @staticmethod
    def backward(ctx: Any, *of_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient by the hidden states."""
        (gradient_NH,) = ctx.saved_tensors
        # a scalar of float32 leaves the gradient's dtype as it is; rounded to 16 bits, it would scale all of it wrongly
        return gradient_NH * of_loss[0], None, None, None


def by_parts(logits_CV: torch.Tensor, labels_C: torch.Tensor, *, into_gradient: bool = False) -> torch.Tensor:
    """The summed cross-entropy, float32, shape []; a part of the logits at a time is float32.

    Args:
        into_gradient: put the gradient by the logits in their place.
    """
    total = logits_CV.new_zeros((), dtype=torch.float32)
    for logits, labels in zip(torch.chunk(logits_CV, LOSS_PARTS), torch.chunk(labels_C, LOSS_PARTS), strict=True):
        chances = F.log_softmax(logits.float(), -1)
        places = labels[:, None]
        total -= chances.gather(-1, places).sum()
        if into_gradient:
            chances.exp_().scatter_add_(-1, places, chances.new_full(places.shape, -1.0))
            logits.copy_(chances)
        del chances  # or it would lie beside the next
    return total


def summed_cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in float32, as transformers' causal loss upcasts."""
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum")
