"""Measured memory: the CUDA caching allocator's own counters on a GPU, a storage tracker over real tensors on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_core.memory.estimate import Phase, Phases

FOLLOWED_STEPS = 4
"""Optimizer steps in which a storage tracker follows every tensor, which makes them slower. The run's largest
micro-batch is among what they compute (`loop.rehearse`), so later ones need no more."""
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


class Meter(Protocol):
    """Peaks of a rank's device memory, by phase of the training step, in bytes."""

    allocated_is: str
    """What the figures are: torch's counter on CUDA, tensor bytes on a CPU."""

    def loaded(self, model: nn.Module) -> None:
        """Note what the loaded model holds; called once, before an engine is built around it."""

    def setup(self) -> AbstractContextManager[None]:
        """A context manager: what is allocated inside it is followed, and counts for no phase."""

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """A context manager: the highest allocation inside it counts for phase `name`."""

    def peaks(self) -> Phases:
        """The highest allocation seen in each phase so far."""

    def reserved(self) -> int:
        """The highest memory the allocator held so far; 0 where there is no caching allocator."""


def meter_for(device: torch.device) -> Meter:
    """The meter of a device."""
    return CudaMeter(device) if device.type == "cuda" else StorageMeter()


class _Peaks:
    """The highest value seen per phase."""

    def __init__(self) -> None:
        self.after_load = 0
        self.highest: dict[Phase, int] = dict.fromkeys(PHASES, 0)

    def note(self, phase: Phase, value: int) -> None:
        self.highest[phase] = max(self.highest[phase], value)

    def phases(self) -> Phases:
        return Phases(after_load=self.after_load, **self.highest)


class CudaMeter:
    """`torch.cuda.max_memory_allocated`, reset at the start of each phase."""

    allocated_is = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks = _Peaks()
        self._reserved = 0
        self._on_host = False

    def loaded(self, model: nn.Module) -> None:
        """See `Meter`."""
        self._peaks.after_load = torch.cuda.memory_allocated(self._device)
        self._on_host = next(model.parameters()).device.type == "cpu"

    @contextmanager
    def setup(self) -> Iterator[None]:
        """See `Meter`. A model that is on the host comes to the GPU in here, divided by ZeRO-3."""
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        if self._on_host:
            self._peaks.after_load = torch.cuda.max_memory_allocated(self._device)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """See `Meter`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self._peaks.note(name, torch.cuda.max_memory_allocated(self._device))
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))

    def peaks(self) -> Phases:
        """See `Meter`."""
        return self._peaks.phases()

    def reserved(self) -> int:
        """See `Meter`."""
        return self._reserved


class StorageMeter:
    """The bytes of all live tensor storages of this rank, each followed from its creation to its release.

    It sees what passes PyTorch's dispatcher in the training thread: every operator's result, bitsandbytes' kernels and
    the backward pass included. What native code allocates for itself (gloo, BLAS) is no tensor and is not counted, and
    neither is Python: that is what "tensor bytes" means, and why it equals what a GPU's allocator would be asked for.
    It looks at the first `FOLLOWED_STEPS` steps.
    """

    allocated_is = "tensor bytes by the storage tracker"

    def __init__(self) -> None:
        self._peaks = _Peaks()
        self._tracker = StorageTracker()
        self._steps = 0

    def loaded(self, model: nn.Module) -> None:
        """See `Meter`."""
        self._tracker.adopt(model_tensors(model))
        self._peaks.after_load = self._tracker.current

    @contextmanager
    def setup(self) -> Iterator[None]:
        """See `Meter`."""
        with self._tracker:
            yield

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """See `Meter`."""
        if self._steps >= FOLLOWED_STEPS:
            yield
            return
        self._tracker.peak = self._tracker.current
        try:
            with self._tracker:
                yield
        finally:
            self._peaks.note(name, self._tracker.peak)
            self._steps += name == "optimizer"

    def peaks(self) -> Phases:
        """See `Meter`."""
        return self._peaks.phases()

    def reserved(self) -> int:
        """See `Meter`."""
        return 0


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Follows every storage that an operator returns while the mode is on, until the storage is released.

    Attributes:
        current: bytes of all live storages followed.
        peak: the highest `current` since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._live: dict[int, int] = {}

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before the mode was on."""
        for tensor in tensors:
            self._follow(tensor)

    def _follow(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":  # shapes without bytes, such as ZeRO keeps of every trained parameter
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known == size or (known is None and size == 0):
            return
        if known is not None:  # resized in place, as ZeRO-3 does with the parameters that it gathers and releases
            self._change(size - known)
            self._live[key] = size
            return
        self._live[key] = size
        self._change(size)
        weakref.finalize(storage, self._released, key)

    def _released(self, key: int) -> None:
        self.current -= self._live.pop(key, 0)

    def _change(self, by: int) -> None:
        self.current += by
        self.peak = max(self.peak, self.current)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and follow what it returns."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._follow(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._follow(leaf)
        return result


def model_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers and the quantization constants that bitsandbytes keeps as attributes of a weight."""
    for parameter in model.parameters():
        yield from parameter_tensors(parameter)
    yield from model.buffers()


def parameter_tensors(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """A parameter and what belongs to it."""
    yield parameter
    # ZeRO-3 keeps this rank's part of a parameter beside it
    if isinstance(part := getattr(parameter, "ds_tensor", None), torch.Tensor):
        yield part
    if (state := getattr(parameter, "quant_state", None)) is not None:
        yield from quantization_constants(state)
    if isinstance(scales := getattr(parameter, "SCB", None), torch.Tensor):  # of an int8 weight's rows
        yield scales


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes that this rank holds of frozen weights, their constants and buffers, and of trained weights."""
    sizes = {True: 0, False: sum(buffer.nbytes for buffer in model.buffers())}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += sum(tensor.nbytes for tensor in parameter_tensors(parameter))
    return sizes[False], sizes[True]


def quantization_constants(state: Any) -> Iterator[torch.Tensor]:
    """The tensors of a bitsandbytes QuantState: absmax, code book and, nested, offset and the second level's."""
    second = getattr(state, "state2", None)
    candidates = [state.absmax, state.code, getattr(state, "offset", None)]
    if second is not None:
        candidates += [second.absmax, second.code]
    for tensor in candidates:
        if isinstance(tensor, torch.Tensor):
            yield tensor


def held_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """Bytes of tensors on a device; what bitsandbytes pages is the driver's to place, and not counted."""
    there = (
        tensor for tensor in tensors if tensor.device.type == device.type and not getattr(tensor, "is_paged", False)
    )
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in there)}
    return sum(storages.values())
