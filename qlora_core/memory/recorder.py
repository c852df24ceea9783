"""Records what real PyTorch code allocates and releases on the meta device, with the operators that CUDA would run.

Meta tensors have shapes, storages and lifetimes, but no bytes: the code of transformers, peft and bitsandbytes runs
unchanged, in seconds, for models of any size. Where CUDA's own choice of operator or its kernels' temporaries differ
from what the meta device would do, `chosen_operators` and `Recorder` put CUDA's in.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_core.memory.attention import AttentionKernel
from qlora_core.memory.autocast import narrowed
from qlora_core.memory.replay import Allocated, Event, Marked, Moved, Released

aten: Any = torch.ops.aten
composed = F.scaled_dot_product_attention
"""As meta tensors have no kernel of their own, this is PyTorch's own composition of operators there."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Follows every meta storage from the operator that makes it to its release, in order.

    Args:
        vocab: rows whose last dimension this is are logits.
        cuda: add the temporaries of CUDA's kernels.

    Attributes:
        events: what happened.
        room: the component that new storages count for.
        where: what is at work, for `Allocated.where`.
        workspaces: bytes that the first matrix product of the forward and of the backward thread still has to ask for.
        composes_attention: scaled_dot_product_attention is made of other operators.
    """

    def __init__(self, vocab: int, cuda: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab, self.cuda = vocab, cuda
        self.events: list[Event] = []
        self.room = "activations"
        self.where = ""
        self.workspaces: dict[str, int] = {}
        self.composes_attention = False
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._number = 0

    def mark(self, name: str) -> None:
        """Note that a phase begins."""
        self.events.append(Marked(name))

    def move(self, tensor: torch.Tensor, room: str) -> None:
        """Count the storage of `tensor` for `room` from now on."""
        known = self._live.get(tensor.untyped_storage()._cdata)
        if known is not None:
            self.events.append(Moved(known[0], room))

    def brief(self, size: int, room: str | None = None) -> Callable[[], None]:
        """A storage that no tensor stands for; call the result to release it."""
        self._number += 1
        number = self._number
        self.events.append(Allocated(number, size, room or self.room, self.where))
        return lambda: self.events.append(Released(number))

    def follow(self, tensor: torch.Tensor, room: str | None = None) -> None:
        """Record the storage of `tensor` as made now, unless it is known."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or not size:
            return
        self._number += 1
        number = self._number

        def gone(_: object) -> None:
            del self._live[key]
            self.events.append(Released(number))

        self._live[key] = number, weakref.ref(storage, gone)
        if room is None:
            room = "logits_and_loss" if tensor.dim() and tensor.shape[-1] == self.vocab else self.room
        self.events.append(Allocated(number, size, room, self.where))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and record what it returns, with CUDA's temporaries around it."""
        kwargs = kwargs or {}
        if (special := BY_VALUE.get(func)) is not None:
            return special(self, func, args, kwargs)
        if self.cuda and (temporaries := TEMPORARIES.get(func)) is not None:
            return temporaries(self, func, args, kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any, room: str | None = None) -> Any:
        """Run `func` and record what it returns."""
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.follow(result, room)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.follow(leaf, room)
        return result


# --- what CUDA's kernels need beside their results --------------------------------------------------------------------

WORKSPACE = "dequantization_workspace"


def _softmax_backward(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Computes grad * output first (aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out)."""
    result = recorder.run(func, args, kwargs)
    recorder.brief(args[0].numel() * args[0].element_size())()
    return result


def _safe_softmax(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """softmax, and which scores are -inf, before the result (aten/src/ATen/native/transformers/attention.cpp)."""
    x = args[0]
    undo = [recorder.brief(x.numel() * x.element_size()), recorder.brief(x.numel())]
    result = recorder.run(func, args, kwargs)
    for release in undo:
        release()
    return result


def _flash_backward(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """A row sum per head, a float32 accumulator of dQ and, for grouped keys, dK and dV of all heads (flash_api.cpp)."""
    result = recorder.run(func, args, kwargs)
    query, key = args[1], args[2]
    batch, heads, length, dim = query.shape
    rounded = -(-length // 128) * 128
    sizes = [4 * batch * heads * rounded, 4 * batch * heads * rounded * dim]
    if heads != key.shape[1]:
        sizes += 2 * [batch * heads * length * dim * query.element_size()]
    undo = [recorder.brief(size) for size in sizes]
    for release in undo:
        release()
    return result


def _efficient_backward(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """A row sum per head (attention_backward.cu)."""
    result = recorder.run(func, args, kwargs)
    batch, heads, length, _ = args[1].shape
    recorder.brief(4 * batch * heads * length)()
    return result


def _gemm_4bit(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Dequantizes constants and weight, then multiplies (bitsandbytes/backends/cuda/ops.py, _dequant_linear_fallback).

    For few rows there is a fused kernel without these; the backward pass, where the peak is, always dequantizes.
    """
    x, _, shape = args[:3]
    nested = kwargs.get("absmax_8bit")
    undo = []
    if nested is not None:
        undo += [recorder.brief(4 * nested.numel(), WORKSPACE) for _ in range(2)]
    undo.append(recorder.brief(shape[0] * shape[1] * x.element_size(), WORKSPACE))
    result = _product(recorder, func, args, kwargs)
    for release in undo:
        release()
    return result


def _dequantized(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    return recorder.run(func, args, kwargs, WORKSPACE)


def _chosen_rows(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """x[mask]: CUDA finds the chosen rows' indices first (IndexingUtils.h, expandTensors); all are chosen here."""
    x, indices = args
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        return recorder.run(func, args, kwargs)
    mask = next(index for index in indices if index is not None)
    rows = mask.numel()
    release = recorder.brief(8 * mask.dim() * rows)
    result = recorder.run(aten.new_empty.default, (x, (rows, *x.shape[mask.dim() :])), {})
    release()
    return result


def _add_to_rows(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """x[mask] += rows: the indices, and what sorting them needs (Indexing.cu, index_put_with_sort_kernel)."""
    x, indices = args[:2]
    masks = [index for index in indices if index is not None and index.dtype == torch.bool]
    if not masks:
        return _add_to_numbered_rows(recorder, func, args, kwargs)
    rows = masks[0].numel()
    undo = [recorder.brief(8 * masks[0].dim() * rows), *(recorder.brief(8 * rows) for _ in range(3))]
    result = x if func in IN_PLACE else recorder.run(aten.clone.default, (x,), {})
    for release in undo:
        release()
    return result


def _add_to_numbered_rows(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of x[numbers] on CUDA: added into the zeros themselves, after sorting (as `_add_to_rows`).

    Autograd adds into a copy while a dispatch mode is on (FunctionsManual.cpp, index_backward).
    """
    if not recorder.cuda or func in IN_PLACE or not _in_backward():
        return recorder.run(func, args, kwargs)
    rows = next(index for index in args[1] if index is not None).numel()
    undo = [recorder.brief(8 * rows) for _ in range(3)]
    for release in undo:
        release()
    return args[0]


def _scattered(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of topk on CUDA: into the zeros, as above (value_selecting_reduction_backward_symint)."""
    return args[0] if _in_backward() else recorder.run(func, args, kwargs)


def _in_backward() -> bool:
    """Whether gradients are computed now, not what is recomputed for them."""
    return torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()


def _counted(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """torch.histc, which has no kernel for meta tensors."""
    return recorder.run(aten.new_empty.default, (args[0], (args[1] if len(args) > 1 else kwargs["bins"],)), {})


def _grouped_product(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """[N, in] x [E, in, out] -> [N, out], or [out, N] x [N, in] -> [E, out, in]; meta tensors have bfloat16 only."""
    a, b, offsets = args[:3]
    shape = (a.shape[0], b.shape[-1]) if b.dim() == 3 else (offsets.shape[0], a.shape[0], b.shape[-1])
    return recorder.run(aten.new_empty.default, (a, shape), {})


def _batched_product(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """Batches whose matrices have no stride of 1 are copied (cuda/Blas.cpp, prepare_batch_matrix_for_cublas)."""
    copied = [each for each in args[-2:] if 1 not in each.stride()[1:]]
    undo = [recorder.brief(each.numel() * each.element_size()) for each in copied]
    result = _product(recorder, func, args, kwargs)
    for release in undo:
        release()
    return result


def _product(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """A thread's first product gives its cuBLAS handle a workspace (CublasHandlePool.cpp); backward is a thread."""
    result = recorder.run(func, args, kwargs)
    if recorder.workspaces:
        thread = "backward" if torch._C._current_graph_task_id() >= 0 else "forward"
        if thread in recorder.workspaces:
            recorder.brief(recorder.workspaces.pop(thread), "framework")
    return result


def _sum(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """A sum of gradients: in place where nothing else refers to the first (torch/csrc/autograd/input_buffer.cpp).

    So is composed attention's of scores and mask (aten/src/ATen/native/transformers/attention.cpp). While a dispatch
    mode is on, torch takes all tensors for subclasses and never sums in place; without one it does. What recomputation
    adds is told apart by the gradient mode, which is off while gradients are computed.
    """
    total, more = args[:2]
    if recorder.composes_attention and _is_mask(more, total):
        return total
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return recorder.run(func, args, kwargs)
    if not isinstance(more, torch.Tensor) or more.dtype != total.dtype or total._use_count() > SOLE_TENSOR:
        return recorder.run(func, args, kwargs)
    storage = total.untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) > SOLE_STORAGE:  # a view keeps its base
        return recorder.run(func, args, kwargs)
    return total


def _is_mask(mask: Any, scores: torch.Tensor) -> bool:
    """Whether `mask` is one of scores [B, h, S, S], for all heads the same."""
    return (
        isinstance(mask, torch.Tensor)
        and scores.dim() == 4
        and mask.shape[-2:] == scores.shape[-2:]
        and mask.numel() < scores.numel()
    )


SOLE_TENSOR, SOLE_STORAGE = 4, 2
"""References to a tensor that autograd alone holds, as seen from here: this call's own are among them."""
IN_PLACE = (aten.index_put_.default, aten._index_put_impl_.default)
TEMPORARIES: dict[Any, Callable[[Recorder, Any, Any, Any], Any]] = {
    aten._softmax_backward_data.default: _softmax_backward,
    aten.add.Tensor: _sum,
    aten._safe_softmax.default: _safe_softmax,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten.mm.default: _product,
    aten.bmm.default: _batched_product,
    aten.scatter.src: _scattered,
    aten.addmm.default: _product,
    aten.addmm_.default: _product,
    aten.baddbmm.default: _batched_product,
}
BY_VALUE: dict[Any, Callable[[Recorder, Any, Any, Any], Any]] = {
    aten._grouped_mm.default: _grouped_product,
    aten.histc.default: _counted,
    aten.index.Tensor: _chosen_rows,
    aten.index_put.default: _add_to_rows,
    aten.index_put_.default: _add_to_rows,
    aten._index_put_impl_.default: _add_to_rows,
}
"""Operators whose results' sizes depend on values, which meta tensors do not have, or that have no kernel there."""


def know_bitsandbytes() -> None:
    """Add bitsandbytes' operators, which exist once it has been imported."""
    TEMPORARIES[torch.ops.bitsandbytes.gemm_4bit.default] = _gemm_4bit
    TEMPORARIES[torch.ops.bitsandbytes.dequantize_4bit.default] = _dequantized
    TEMPORARIES[torch.ops.bitsandbytes.dequantize_blockwise.default] = _dequantized


# --- which operators CUDA would choose --------------------------------------------------------------------------------


@contextmanager
def chosen_operators(kernel: AttentionKernel, on_cuda: bool) -> Iterator[None]:
    """Let torch's functions call the operators that they choose on a device where they choose others on meta.

    Not by a TorchFunctionMode, which is off while autograd recomputes a checkpoint. Softmax and dropout are replaced
    where they are made of other operators: autocast and composed attention call them from C++.

    Args:
        kernel: the attention kernel of scaled_dot_product_attention.
        on_cuda: a CPU computes softmax and dropout as meta does.
    """

    def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        # widened inside the kernel, for float16 only (aten/src/ATen/native/SoftMax.cpp)
        if dtype == torch.float32 and x.dtype == torch.float16:
            return cast(torch.Tensor, aten._softmax(x, dim, True))
        return cast(torch.Tensor, aten._softmax(x if dtype is None else x.to(dtype), dim, False))

    def native_dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        return cast(torch.Tensor, aten.native_dropout(x, p, True)[0]) if train and p > 0 else x  # keeps a byte mask

    with ExitStack() as stack:
        if on_cuda:
            library = cast(Any, torch.library.Library)("aten", "IMPL", "AutogradMeta")
            stack.callback(library._destroy)
            library.impl("softmax.int", softmax)
            library.impl("dropout", native_dropout)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", partial(attention, kernel)))
        yield


def attention(
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention by the fused kernel: [B, h, S, D], [B, k, S, D], [B, k, S, D] -> [B, h, S, D].

    Autocast casts its inputs. A mask rules flash out, and becomes a bias in the queries' dtype first
    (aten/src/ATen/native/transformers/attention.cpp, convert_boolean_attn_mask).
    """
    query, key, value = narrowed(query), narrowed(key), narrowed(value)
    if attn_mask is not None:
        attn_mask = narrowed(attn_mask)
    if kernel == "math" and (attn_mask is None or (query.shape[1] != key.shape[1] and not enable_gqa)):
        return composed(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    if kernel == "flash_cpu":
        outputs = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
        return cast(torch.Tensor, outputs[0])
    if kernel == "flash" and attn_mask is None:
        outputs = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return cast(torch.Tensor, outputs[0])
    if enable_gqa and query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    outputs = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )
    return cast(torch.Tensor, outputs[0])
