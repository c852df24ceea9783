"""The loss: summed cross-entropy over labelled tokens, so that any split of a step into micro-batches adds up the same.

Shapes: B micro-batch, S sequence, H hidden, V vocabulary, N labelled tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qlora_core.strategy import LOSS_CHUNK_TOKENS, Loss

IGNORED = -100
"""Label of a token that is not learned, as in transformers."""


class SummedLoss(nn.Module):
    """A causal language model with its loss as the output, so that engines see a single forward pass.

    Args:
        model: a causal language model of transformers, with peft's adapters or without.
        kind: "full" lets transformers make all logits; "chunked" makes LOSS_CHUNK_TOKENS tokens' at a time, only for
            labelled tokens, and makes them again in the backward pass instead of keeping them.
    """

    def __init__(self, model: nn.Module, kind: Loss) -> None:
        super().__init__()
        self.model = model
        self.kind = kind

    def forward(self, input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor, labels_BS: torch.Tensor) -> Any:
        """The sum of -log p(label) over all labelled tokens, float32, shape []."""
        causal = cast(Any, self.model)
        if self.kind == "full":
            logits_BSV = causal(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False).logits
            # The labels are shifted, not the logits: a slice of the logits would be a copy of them.
            shifted_BS = F.pad(labels_BS, (0, 1), value=IGNORED)[:, 1:]
            return summed_cross_entropy(logits_BSV.flatten(0, 1), shifted_BS.flatten())
        transformer = causal.get_base_model() if isinstance(causal, PeftModel) else causal
        hidden_BSH = transformer.get_decoder()(
            input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False
        ).last_hidden_state
        labels_BS = labels_BS[:, 1:]
        learned_BS = labels_BS != IGNORED
        return chunked_cross_entropy(
            transformer.get_output_embeddings(), hidden_BSH[:, :-1][learned_BS], labels_BS[learned_BS]
        )


def chunked_cross_entropy(head: nn.Module, hidden_NH: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of `head(hidden)`; at most LOSS_CHUNK_TOKENS rows of logits exist at a time."""

    def of_chunk(hidden_CH: torch.Tensor, labels_C: torch.Tensor) -> torch.Tensor:
        return summed_cross_entropy(head(hidden_CH), labels_C)

    total = hidden_NH.new_zeros((), dtype=torch.float32)
    for hidden_CH, labels_C in zip(
        torch.split(hidden_NH, LOSS_CHUNK_TOKENS), torch.split(labels_N, LOSS_CHUNK_TOKENS), strict=True
    ):
        total = total + cast(
            torch.Tensor, checkpoint(of_chunk, hidden_CH, labels_C, use_reentrant=False, preserve_rng_state=False)
        )
    return total


def summed_cross_entropy(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy in float32, as transformers' causal loss upcasts."""
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum")
