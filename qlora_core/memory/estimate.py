"""An estimate: bytes by component and by phase, per GPU rank and per host. The words of `qlora-plan --json`."""

from __future__ import annotations

from typing import Literal, NamedTuple

Phase = Literal["forward", "backward", "optimizer"]
Estimator = Literal["formula", "played", "trace"]


class Components(NamedTuple):
    """Requested bytes on one GPU at the moment of the peak; they add up to the allocated bytes.

    Attributes:
        base_weights: packed quantized weights (or the 16-bit weights of the linear layers when not quantized).
        quantization_constants: absmax, its second quantization, code books.
        unquantized_weights: embeddings, norms, biases, output head; buffers.
        lora_weights: adapters.
        gradients: gradients of the trainable weights.
        optimizer_state: moments, master copies; paged-out state is not in here.
        activations: what the forward pass keeps for the backward pass, and the recomputed layer.
        logits_and_loss: logits, their float32 copies and gradients.
        dequantization_workspace: dequantized weights of the layer at work.
        communication_buffers: ZeRO's and DDP's buckets and gathered parameters.
        framework: allocator rounding, library workspaces.
    """

    base_weights: int = 0
    quantization_constants: int = 0
    unquantized_weights: int = 0
    lora_weights: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0
    logits_and_loss: int = 0
    dequantization_workspace: int = 0
    communication_buffers: int = 0
    framework: int = 0

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        return sum(self)


class Phases(NamedTuple):
    """Peak allocated bytes on one GPU, by phase of a step that is not the first (the optimizer state exists)."""

    after_load: int
    forward: int
    backward: int
    optimizer: int


class GpuEstimate(NamedTuple):
    """What one GPU rank needs.

    Attributes:
        components: bytes at the peak.
        phases: peaks by phase.
        peak_phase: the phase of the highest peak.
        peak_moment: where exactly it occurs, in words a colleague can follow.
        allocated_bytes: as torch.cuda.max_memory_allocated counts.
        reserved_bytes: as torch.cuda.max_memory_reserved counts.
        reserved_interval: between which bytes that lies in nine cases of ten, as far as an estimator leaves it open.
        process_bytes: as nvidia-smi shows, CUDA context included.
        paged_bytes: optimizer state in managed memory, invisible to the two torch counters.
    """

    components: Components
    phases: Phases
    peak_phase: Phase
    peak_moment: str
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    paged_bytes: int
    reserved_interval: tuple[int, int]


class HostEstimate(NamedTuple):
    """What one host needs for all its ranks: the peaks while loading and while training, in bytes."""

    load_peak_bytes: int
    steady_bytes: int

    @property
    def most_bytes(self) -> int:
        """The larger of the two: what a host has to have."""
        return max(self.load_peak_bytes, self.steady_bytes)


class Estimate(NamedTuple):
    """One estimator's answer for one recipe, strategy and GPU."""

    estimator: Estimator
    gpu: GpuEstimate
    host: HostEstimate
