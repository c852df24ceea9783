"""Liger's loss on the meta device: its Triton kernels compute nothing there, and its code asks for two values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from liger_kernel.ops import fused_linear_cross_entropy as fused

from qlora_core.memory.recorder import BY_VALUE, aten

VALUES: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda *_: 1,  # how many labels there are: only a mean depends on it
    aten.equal.default: lambda *_: True,  # the loss's gradient is 1; of another the kernel's product is in place
}


class Kernel:
    """A Triton kernel that is not launched. None of Liger's allocates anything."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """The launch."""
        return lambda *args, **named: None


def valued(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which is told the values that it asks tensors for."""

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        with mock.patch.dict(BY_VALUE, VALUES):
            return function(*args, **named)

    return call


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let Liger's fused loss run on meta tensors, with the allocations that it makes on CUDA (0.8.5)."""
    replaced: list[tuple[str, Any]] = [
        ("liger_cross_entropy_kernel", Kernel()),
        ("element_mul_kernel", Kernel()),
        # it writes the head's product into a buffer of its own on CUDA, where dtypes allow
        ("_can_use_mm_out", lambda x, weight: x.dtype == weight.dtype),
        ("fused_linear_cross_entropy_forward", valued(fused.fused_linear_cross_entropy_forward)),
        ("fused_linear_cross_entropy_backward", valued(fused.fused_linear_cross_entropy_backward)),
    ]
    with ExitStack() as stack:
        for name, stand_in in replaced:
            stack.enter_context(mock.patch.object(fused, name, new=stand_in))
        yield
