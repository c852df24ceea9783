"""Causal attention on a CPU in bfloat16, in products of many heads at once, for training.

torch's flash kernel for CPUs (2.13, ATen/native/cpu/FlashAttentionKernel.cpp) multiplies blocks so small that bfloat16
is no faster there than float32, whatever the CPU can do; batched products of the same numbers are.

Shapes: B micro-batch, S sequence, H query heads, K key and value heads, G = H / K, D head, N rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_core.strategy import ATTENTION_BLOCK

DEVICES = ("cpu",)
"""Types of devices where it is used."""


def attend_on_a_cpu() -> None:
    """Let transformers' sdpa be `attention_forward` in this process."""
    AttentionInterface.register("sdpa", attention_forward)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' sdpa: [B, H, S, D], [B, K, S, D], [B, K, S, D] -> [B, S, H, D].

    What is computed in training mode, in bfloat16 and masked by nothing but causality is `CausalAttention`'s. It is the
    mode that decides, so that a checkpoint's first run, which may be without gradients, is computed as its second is.
    """
    device, causal = query.device.type, options.get("is_causal")
    own = (
        device in DEVICES
        and module.training
        and attention_mask is None
        and not dropout
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query.shape[2] == key.shape[2] > 1
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and not any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
        and dtype_on(device, query) == torch.bfloat16
    )
    if not own:
        return cast(
            tuple[torch.Tensor, None],
            sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options),
        )
    query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


def dtype_on(device: str, x: torch.Tensor) -> torch.dtype:
    """In which products of `x` are computed."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class CausalAttention(torch.autograd.Function):
    """softmax(q k * scale) v, where no token sees a later one; it keeps its inputs and nothing else.

    Scores are rounded to 16 bits, as those of eager attention are; sums are not. On the way back they are made again.
    A head's mean key is taken from all of its keys first: that changes a query's scores by one number, which the
    softmax does not see, and keys that have much in common, a bias above all, would make scores large and their
    rounding coarse (as SageAttention does, Zhang et al. 2024).
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """[B, H, S, D], [B, K, S, D], [B, K, S, D] -> [B, H, S, D], laid out as [B, S, H, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        blocks = Blocks(query, key)
        output = blocks.empty(query.shape[1], query.dtype)
        query_RD, key_SD, value_SD = blocks.folded(query), blocks.centred(key), blocks.flat(value)
        for rows, before, own in blocks.each():
            chances = blocks.chances(query_RD[:, rows], key_SD[:, before], own, scale)
            blocks.put(output, own, torch.bmm(chances, value_SD[:, before]))
            del chances
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """The gradients of query, key and value, laid out as [B, S, heads, D]."""
        query, key, value = ctx.saved_tensors
        blocks = Blocks(query, key)
        of_query = blocks.empty(query.shape[1], query.dtype)
        query_RD, gradient_RD = blocks.folded(query), blocks.folded(gradient)
        key_SD, value_SD = blocks.centred(key), blocks.flat(value)
        of_key, of_value = (torch.zeros_like(key_SD, dtype=torch.float32) for _ in range(2))
        for rows, before, own in blocks.each():
            chances = blocks.chances(query_RD[:, rows], key_SD[:, before], own, ctx.scale)
            of_value[:, before] += torch.bmm(chances.transpose(1, 2), gradient_RD[:, rows])
            of_chances = torch.bmm(gradient_RD[:, rows], value_SD[:, before].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_chances, chances, -1, chances.dtype)
            del chances, of_chances
            blocks.put(of_query, own, scaled_product(of_scores, key_SD[:, before], ctx.scale))
            of_key[:, before] += scaled_product(of_scores.transpose(1, 2), query_RD[:, rows], ctx.scale)
            del of_scores
        return of_query, blocks.unflat(of_key, query.dtype), blocks.unflat(of_value, query.dtype), None


def scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """[N, I, J], [N, J, L] -> [N, I, L]: a b * scale, rounded once."""
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scale)


class Blocks:
    """Heads as batched products want them: a key head's queries are the rows of one matrix, R = S * G of them."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        self.batch, heads, self.length, self.dim = query.shape
        self.keys = key.shape[1]
        self.groups = heads // self.keys
        self.later = torch.ones(ATTENTION_BLOCK, ATTENTION_BLOCK, dtype=torch.bool, device=query.device).triu_(1)

    def by_key_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D] -> [B, K, S, G, D], a view."""
        return x.view(self.batch, self.keys, self.groups, self.length, self.dim).transpose(2, 3)

    def folded(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D] -> [B*K, R, D], a copy."""
        copy = x.new_empty(self.batch, self.keys, self.length, self.groups, self.dim)
        return copy.copy_(self.by_key_head(x)).view(self.batch * self.keys, -1, self.dim)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """[B, K, S, D] -> [B*K, S, D]."""
        return x.contiguous().view(self.batch * self.keys, self.length, self.dim)

    def centred(self, key: torch.Tensor) -> torch.Tensor:
        """[B, K, S, D] -> [B*K, S, D]: what each key differs by from its head's mean."""
        copy = key.new_empty(self.batch, self.keys, self.length, self.dim)
        torch.sub(key, key.mean(2, keepdim=True), out=copy)
        return copy.view(self.batch * self.keys, self.length, self.dim)

    def empty(self, number: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for so many heads, [B, number, S, D], laid out as [B, S, number, D]."""
        shape = self.batch, self.length, number, self.dim
        return torch.empty(shape, dtype=dtype, device=self.later.device).transpose(1, 2)

    def unflat(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[B*K, S, D] -> [B, K, S, D] of a dtype, laid out as [B, S, K, D]."""
        return self.empty(self.keys, dtype).copy_(x.view(self.batch, self.keys, self.length, self.dim))

    def each(self) -> Iterator[tuple[slice, slice, slice]]:
        """Of each block: its rows of R, the keys that they see, and its own places in the sequence."""
        for begin in range(0, self.length, ATTENTION_BLOCK):
            end = min(begin + ATTENTION_BLOCK, self.length)
            yield slice(begin * self.groups, end * self.groups), slice(end), slice(begin, end)

    def chances(self, query: torch.Tensor, key: torch.Tensor, own: slice, scale: float) -> torch.Tensor:
        """A block's probabilities: [B*K, N*G, D], [B*K, keys, D] -> [B*K, N*G, keys]."""
        scores = scaled_product(query, key.transpose(1, 2), scale)
        number = own.stop - own.start
        latest = scores.view(-1, number, self.groups, own.stop)[..., own]
        latest.masked_fill_(self.later[:number, None, :number], -math.inf)
        return torch.softmax(scores, -1, scores.dtype)  # autocast would make it float32

    def put(self, x: torch.Tensor, own: slice, rows: torch.Tensor) -> None:
        """Write a block's [B*K, N*G, D] to its places in [B, H, S, D]."""
        self.by_key_head(x)[:, :, own] = rows.view(self.batch, self.keys, -1, self.groups, self.dim)
