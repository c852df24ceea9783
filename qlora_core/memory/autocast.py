"""torch.autocast for tensors on the meta device, casting what it casts on CUDA or on a CPU.

PyTorch's own kernels of autocast (aten/src/ATen/autocast_mode.cpp) cast tensors of their own device only. The same
operators get kernels here, under a dispatch key that no tensor carries and that is on only while `followed` is. The
state of torch.autocast("cpu") stands for that of the traced device: torch.utils.checkpoint restores that one, too, when
it recomputes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, Literal, cast
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.utils import generic

KEY = cast(Any, torch._C.DispatchKey).AutocastPrivateUse1
Kind = Literal["cuda", "cpu"]
# fmt: off
PROMOTED = frozenset((
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add", "cat", "stack", "index_copy",
))
"""Operators whose inputs are all made float32 where one of them is (ATen/autocast_mode.h, AT_FORALL_PROMOTE; the last
three on a CPU only, autocast_mode.cpp)."""
NARROWED = frozenset((
    "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv",
    "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
))
"""Operators that run in autocast's dtype (AT_FORALL_LOWER_PRECISION_FP)."""
OPTIONAL = frozenset((
    "prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm", "sum",
))
"""Operators that are asked for a float32 result unless they were asked for another, and convert as they go
(AT_FORALL_FP32_SET_OPT_DTYPE). All others that autocast knows have their inputs made float32."""
# fmt: on

_copies: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
"""Autocast's cache: what was made of trained float32 leaves, kept until the outermost context ends."""


@contextmanager
def followed(kind: Kind, casts: bool) -> Iterator[None]:
    """Have torch.autocast act on meta tensors as on tensors of a device of this kind.

    Args:
        kind: the device whose operators are cast, and that code is told of which asks whether autocast is on.
        casts: it will be on; otherwise it is only made known to code that switches it off.
    """
    enabled, dtype, forget, autocast = (
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
        torch.clear_autocast_cache,
        torch.autocast,
    )

    def stand_in(device_type: str) -> str:
        return "cpu" if device_type in ("meta", kind) else device_type

    def forget_all() -> None:
        forget()
        _copies.clear()

    # without a device type, CUDA's state is asked for
    replaced: list[tuple[Any, str, Any]] = [
        (torch, "is_autocast_enabled", lambda device_type="cuda": enabled(stand_in(device_type))),
        (torch, "get_autocast_dtype", lambda device_type: dtype(stand_in(device_type))),
        (torch, "clear_autocast_cache", forget_all),
        (torch, "autocast", lambda device_type, *args, **named: autocast(stand_in(device_type), *args, **named)),
        # what maybe_autocast gives for meta tensors, where all models ask it to switch autocast off
        (generic, "nullcontext", partial(autocast, "cpu", enabled=False)),
    ]
    with ExitStack() as stack:
        for module, name, function in replaced:
            stack.enter_context(mock.patch.object(module, name, new=function))
        if casts:
            stack.enter_context(_kernels(kind))
        yield


@contextmanager
def _kernels(kind: Kind) -> Iterator[None]:
    with ExitStack() as stack:
        others, library = (cast(Any, torch.library.Library)(namespace, "IMPL", KEY.name) for namespace in ("_", "aten"))
        for each in (others, library):
            stack.callback(each._destroy)
        others.fallback(torch.library.fallthrough_kernel)
        for operator, policy in operators(kind).items():
            library.impl(operator, partial(_call, operator, policy))
        stack.callback(torch._C._dispatch_tls_set_dispatch_key_excluded, KEY, True)
        torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, False)
        stack.enter_context(torch._C._IncludeDispatchKeyGuard(KEY))
        yield


Policy = Callable[[Any, Any, Any], tuple[Any, Any]]
"""From an operator and how it was called to how autocast calls it."""


@cache
def operators(kind: Kind) -> dict[Any, Policy]:
    """Every operator of ATen that has a kernel of PyTorch's for autocast on this kind of device, and its policy."""
    found: dict[Any, Policy] = {}
    key = "AutocastCUDA" if kind == "cuda" else "AutocastCPU"
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            continue
        base, _, overload = name.removeprefix("aten::").partition(".")
        operator = getattr(getattr(torch.ops.aten, base), overload or "default")
        if base in NARROWED:
            found[operator] = _narrowing
        elif base in PROMOTED:
            found[operator] = _promoting
        else:
            found[operator] = _asking if base in OPTIONAL else _widening
    return found


def _call(operator: Any, policy: Policy, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(KEY)):
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = policy(operator, args, kwargs)
        return operator(*args, **kwargs)


def _narrowing(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return cast(tuple[Any, Any], tree_map_only(torch.Tensor, narrowed, (args, kwargs)))


def _widening(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return cast(tuple[Any, Any], tree_map_only(torch.Tensor, partial(_cast, dtype=torch.float32), (args, kwargs)))


def _promoting(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    wide = any(tensor.dtype == torch.float32 for tensor in tensors)
    return (_widening if wide else _narrowing)(operator, args, kwargs)


def _asking(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    place = next(index for index, each in enumerate(operator._schema.arguments) if each.name == "dtype")
    if kwargs.get("dtype") is not None or len(args) > place or not _is_cast(args[0]):
        return args, kwargs
    return args, {**kwargs, "dtype": torch.float32}


def narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in autocast's dtype where autocast is on; copies of trained float32 leaves are kept and given again."""
    if not torch.is_autocast_enabled("cpu"):
        return tensor
    dtype = torch.get_autocast_dtype("cpu")
    keeps = tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
    if not (keeps and torch.is_autocast_cache_enabled()):
        return _cast(tensor, dtype)
    known = _copies.get(id(tensor))
    if known is None or known[0]() is not tensor:
        _copies[id(tensor)] = known = weakref.ref(tensor), _cast(tensor, dtype)
    return known[1]


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if _is_cast(tensor) else tensor


def _is_cast(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta" and tensor.is_floating_point() and tensor.dtype != torch.float64
