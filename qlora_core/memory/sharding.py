"""What several GPUs add and take away: DDP's buckets and DeepSpeed's ZeRO stages, with and without offload.

Read in DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, stage3.py, partitioned_param_coordinator.py, config.py. The
engine is used without a bf16 or fp16 section, so that trainable weights, gradients and master weights are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qlora_core.strategy import Strategy

LARGEST_BUCKET_ELEMENTS = 5_000_000
"""20 MB of float32: a hundredth of DeepSpeed's default, which is meant for models whose every weight has a gradient."""
PREFETCH_BUCKET_ELEMENTS = 50_000_000
"""stage3_prefetch_bucket_size, its default: elements that ZeRO-3 fetches ahead of use."""
PERSISTENCE_ELEMENTS = 100_000
"""stage3_param_persistence_threshold, its default: smaller parameters stay whole on every rank."""
SUB_GROUP_ELEMENTS = 1_000_000_000
"""sub_group_size, its default: elements of a rank's part that ZeRO-3 updates at a time."""
LIVE_ELEMENTS = 1_000_000_000
"""stage3_max_live_parameters and stage3_max_reuse_distance, their defaults: parameters that are used again within so
many elements of the step's trace are not released, and every module that runs fetches ahead until so many are whole."""


@dataclass(frozen=True, slots=True)
class Shard:
    """How trainable state is divided.

    Attributes:
        trainable: bytes of the trainable weights in all.
        numel: their elements.
        largest: elements of the largest of them.
        beyond: elements of all those that are larger than the bucket, which they pass by.
        grouped: elements of the optimizer's largest group of them.
        world: ranks.
        stage: ZeRO stage.
        offload_optimizer: optimizer state and master weights live on the host.
    """

    trainable: int
    numel: int
    largest: int
    beyond: int
    grouped: int
    world: int
    stage: int
    offload_optimizer: bool

    @classmethod
    def of(cls, strategy: Strategy, tensors: Sequence[tuple[int, int]], itemsize: int, grouped: int) -> Shard:
        """The division that `strategy` asks for, of tensors given as (elements of one, how many)."""
        numel = sum(size * count for size, count in tensors)
        beyond = sum(size * count for size, count in tensors if size > bucket_elements(numel))
        return cls(
            trainable=numel * itemsize,
            numel=numel,
            largest=max((size for size, _ in tensors), default=0),
            beyond=beyond,
            grouped=grouped,
            world=strategy.world_size,
            stage=strategy.zero_stage,
            offload_optimizer=strategy.offload != "none",
        )

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the trainable weights."""
        return self.trainable // self.numel

    @property
    def widens(self) -> bool:
        """Whether ZeRO 1 or 2 sums up 16-bit gradients in float32, which the engine's configuration leaves to it.

        ZeRO-1 keeps a float32 copy of each (stage_1_and_2.py, grad_accum), ZeRO-2 one of its part alone
        (_build_compact_grad_partition_buffer), which the optimizer takes as it is.
        """
        return self.stage in (1, 2) and self.itemsize < 4

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of an element of gradients as they are summed up."""
        return 4 if self.widens else self.itemsize

    @property
    def part_numel(self) -> int:
        """Elements of one rank's partition."""
        return -(-self.numel // self.world)

    @property
    def stepped_numel(self) -> int:
        """Elements that the optimizer updates at a time: ZeRO-3 divides a large group once more."""
        of_group = -(-self.grouped // self.world)
        return min(of_group, SUB_GROUP_ELEMENTS) if self.stage == 3 else of_group

    @property
    def master_bytes(self) -> int:
        """Float32 master weights: every stage clones its partition, float32 weights too.

        ZeRO-3 means to skip the clone for float32 weights, but compares a torch.device with a string (stage3.py,
        _create_fp32_partitions), which are never equal.
        """
        return 4 * self.part_numel if self.stage else 0

    @property
    def bucket_bytes(self) -> int:
        """The buffer gradients are reduced in.

        ZeRO 1 and 2 make it with the first gradient of a backward pass and drop it when all are reduced; with several
        micro-batches ZeRO-1 reduces with the last one, and keeps it meanwhile. ZeRO-3 has it always.
        """
        if not self.stage:
            return 0
        return (self.itemsize if self.stage == 2 else 4) * bucket_elements(self.numel)

    @property
    def fills_buckets(self) -> bool:
        """Whether gradients are reduced while the backward pass goes on; else all fit into one bucket."""
        return bucket_elements(self.numel) < self.numel

    @property
    def left_bytes(self) -> int:
        """ZeRO-1's bucket and the float32 gradients that passed by it, of other ranks' parts: they are let go last."""
        of_others = max(self.beyond - self.beyond // self.world, self.largest) if self.beyond else 0
        return self.bucket_bytes + 4 * of_others

    def staying_bytes(self, several: bool) -> int:
        """Gradients of its own part that ZeRO-2 has as long as a backward pass: those that passed the bucket by.

        Widened ones are summed up elsewhere, and offloaded ones copied; either way nothing lets go of them before the
        pass ends, but in the last of `several` micro-batches if they are offloaded (stage_1_and_2.py,
        copy_grads_in_partition, clear_grad_attribute).
        """
        stay = self.stage == 2 and (several if self.offload_optimizer else self.widens)
        own = min(max(self.beyond // self.world, self.largest), self.beyond, self.part_numel)
        return self.itemsize * own if stay else 0

    def reduction_bytes(self, largest: int, kind: Literal["cuda", "cpu"]) -> int:
        """What reducing gradients takes beside them, where the largest of them has so many elements.

        ZeRO 2 and 3 lay those in a bucket side by side in a copy, which ZeRO-2 makes float32 if it sums up 16-bit ones
        so. One that is larger than the bucket passes by it, and if it has 16 bits, ZeRO-3 makes it float32, too.
        """
        if self.stage < 2:
            return 0
        size = bucket_elements(self.numel)
        in_bucket = self.bucket_bytes + (4 * size if self.widens else 0)
        taken = self._taken_bytes(in_bucket, size, min(largest, size), kind)
        if largest <= size:
            return taken
        return max(taken, self._taken_bytes(4 * largest if self.itemsize < 4 else 0, largest, largest, kind))

    def _taken_bytes(self, copy: int, elements: int, largest: int, kind: Literal["cuda", "cpu"]) -> int:
        """What it takes to reduce so many elements, of which there is a copy of so many bytes.

        gloo's reduce_scatter, which ZeRO-3 calls on a CPU, reduces all of another copy. The norm of an offloaded
        gradient, or of a rank's part of it, is taken in float64; ZeRO-3 brings the part back to the GPU for it
        (stage_1_and_2.py, set_norm_for_param_grad_in_gpu; stage3.py, partition_grads).
        """
        reduced = copy + (4 * elements if self.stage == 3 and kind == "cpu" else 0)
        if not self.offload_optimizer:
            return reduced
        if self.stage == 2:
            return max(reduced, 8 * largest)
        return max(reduced, copy + (8 if kind == "cpu" else 8 + 4) * -(-largest // self.world))

    @property
    def norm_bytes(self) -> int:
        """What ZeRO-1 takes for the norm of an offloaded gradient, in float64, more than it has let go of by then.

        That is what has been copied into the bucket, which a weight that is larger than the bucket is not
        (stage_1_and_2.py, copy_grads_in_partition).
        """
        copied = 0 if self.beyond else self.bucket_bytes
        return max(8 * self.largest - copied, 0) if self.offload_optimizer else 0

    @property
    def kept_gradient_bytes(self) -> int:
        """Reduced gradients of a rank's partition, left for the optimizer; of offloaded ones those that are widened."""
        return 0 if not self.stage or (self.offload_optimizer and not self.widens) else 4 * self.part_numel

    @property
    def engine_bytes(self) -> int:
        """What ZeRO-3 makes before the first step: master weights, the buffer, and room for reduced gradients."""
        masters = 0 if self.offload_optimizer else self.master_bytes
        return masters + self.bucket_bytes + self.kept_gradient_bytes

    def step_bytes(self, temporaries: int) -> int:
        """What the optimizer step adds: a copy of the gradients that it takes at a time, and its `temporaries`.

        Of one that is offloaded the temporaries alone, and these on the host.

        ZeRO 1 and 2 drop the gradients they were copied from before the optimizer runs, so that its temporaries take
        their place. Where gradients were widened, the copy is there already, and the norm of the largest one, for which
        it becomes float64, may be more than the temporaries; ZeRO-1 has its bucket until then, and what passed by it.
        Of several groups nothing goes before the last has its copy: their gradients are views of the same buffers.
        """
        if not self.stage or self.offload_optimizer:
            return temporaries
        several = self.grouped < self.numel
        if self.widens:
            left = self.left_bytes if self.stage == 1 else 0
            return max(temporaries + (left if several else 0), left + 8 * self.largest)
        freed = 0 if several or self.stage == 3 else self.kept_gradient_bytes
        return 4 * self.stepped_numel + max(temporaries - freed, 0)

    @property
    def passing_bytes(self) -> int:
        """The buffer through which ZeRO 1 and 2 bring an offloaded gradient back to add the next one to it.

        They have another one on the host, and make both for the largest weight (stage_1_and_2.py,
        temp_grad_buffer_for_gpu_offload and temp_grad_buffer_for_cpu_offload).
        """
        return self.itemsize * self.largest if self.offload_optimizer and self.stage < 3 else 0

    def host_bytes(self, state_bytes: int, several: bool) -> dict[str, int]:
        """By component what offloading the optimizer keeps of a rank on its host: the state, of `state_bytes`, too.

        With float32 master weights and gradients there is a copy of either: in ZeRO 1 and 2 of the new weights, in
        ZeRO-3 of the reduced gradients. A weight that lies in two parts ZeRO-2 sums up in both, which is not counted.

        Args:
            several: of more than one micro-batch ZeRO-2 keeps the sums there, too, if it does not widen them.
        """
        if not self.offload_optimizer:
            return {}
        copies = (4 if self.stage == 3 else self.itemsize) * self.part_numel
        sums = 4 * self.part_numel if several and self.stage == 2 and not self.widens else 0
        return {
            "optimizer_state": state_bytes + self.master_bytes,
            "gradients": 4 * self.part_numel,
            "communication_buffers": copies + sums + self.passing_bytes,
        }


def bucket_elements(trainable: int) -> int:
    """DeepSpeed's reduce_bucket_size and allgather_bucket_size for so many trainable elements."""
    return min(LARGEST_BUCKET_ELEMENTS, trainable)


class Gathered(NamedTuple):
    """What ZeRO-3 has whole at once, and the buffers of what it fetches ahead, in the forward and the backward pass."""

    whole: int
    ahead_forward: int
    ahead_backward: int


def gathered_elements(elements: int) -> Gathered:
    """What ZeRO-3 has whole of `elements` that it divides, counted as stored: two 4-bit weights are one element.

    A fetched group lies in one flat buffer, out of which each parameter is copied; the buffer stays until the last of
    them is used (partition_parameters.py, AllGatherCoalescedHandle; the coordinator's registry refers to it). What was
    never released is not fetched again for the backward pass.
    """
    held, flat = min(elements, LIVE_ELEMENTS), min(elements, PREFETCH_BUCKET_ELEMENTS)
    return Gathered(held, flat, 0 if held == elements else flat)


def stays_whole(size: int, itemsize: int) -> bool:
    """Whether ZeRO-3 keeps a parameter of `size` bytes whole between uses, beside this rank's part of it."""
    return size <= itemsize * PERSISTENCE_ELEMENTS
