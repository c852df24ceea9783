"""The device of an estimate: the few facts about a GPU (or the CPU) that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qlora_core.recipe import Dtype

KIB = 1024
MIB = 1024**2
Stack = Literal["ours", "trainer", "loop"]
"""Whose loop trains: ours, that of transformers' Trainer and TRL, or a plain one over transformers and peft."""
STACKS: dict[Stack, dict[str, Any]] = {
    "ours": {},
    "trainer": {"plain_autocast": True},
    "loop": {"plain_autocast": True, "output_held": True},
}
"""In which fields of a Device each is unlike ours."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where one rank computes.

    Attributes:
        kind: "cuda" or "cpu".
        compute_dtype: dtype of activations and dequantized weights; "auto" is resolved before an estimate.
        context_bytes: what the driver keeps per process before the first tensor; 0 on a CPU.
        compute_capability: such as (7, 5) for a T4; (0, 0) on a CPU.
        ranks_per_host: how many ranks share one host's memory.
        emptied_after_load: torch.cuda.empty_cache() runs after loading, as in our loop and, since peft 0.20, in
            prepare_model_for_kbit_training.
        output_held: the model's output stays until the step ends, with the logits and what its graph refers to, as in a
            plain loop over transformers. Our loop and transformers' Trainer let it go.
        plain_autocast: torch.autocast keeps narrow copies of trained weights until it ends, and peft widens inputs of
            adapters that autocast narrows again, and adds what they give out of place, as both do unless they are told
            not to. Our loop tells them (training/loss.py, SummedLoss; training/lora.py).
        warmed_up: from_pretrained loads straight onto the device, for which transformers asks for all the memory at
            once first (modeling_utils.py, caching_allocator_warmup); not so where a loaded model is moved there.
        keys_expanded: grouped keys and values are spread out to all heads before scaled_dot_product_attention, whose
            mask is just causal: older transformers, and other code than its own.
        loading_threads: how many threads bring weights while others are quantized: none since transformers 5.4.
    """

    kind: Literal["cuda", "cpu"]
    compute_dtype: Dtype
    context_bytes: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    ranks_per_host: int = 1
    emptied_after_load: bool = True
    output_held: bool = False
    plain_autocast: bool = False
    warmed_up: bool = True
    keys_expanded: bool = False
    loading_threads: int = 0

    @property
    def flash_attention(self) -> bool:
        """Whether PyTorch's flash kernel can run: sm80 and newer (ATen/native/transformers/cuda/sdp_utils.cpp)."""
        return self.kind == "cuda" and self.compute_capability >= (8, 0)

    @property
    def has_grouped_products(self) -> bool:
        """Whether torch multiplies rows by their expert's weight itself (transformers 5.23, integrations/moe.py)."""
        return self.kind == "cpu" or self.compute_capability >= (8, 0)

    @property
    def blas_workspaces(self) -> tuple[int, ...]:
        """What cuBLAS and cuBLASLt keep once each has multiplied: part of allocated memory.

        PyTorch gives a cuBLAS handle 32 MiB on Hopper and newer, elsewhere 4096 KiB x 2 + 16 KiB x 8 = 8.125 MiB
        (aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize). On a T4 two are seen: 8.125 + 8.0625 MiB.
        """
        if self.kind == "cpu":
            return ()
        if self.compute_capability >= (9, 0):
            return 32 * MIB, 32 * MIB
        return 8 * MIB + 128 * KIB, 8 * MIB + 64 * KIB
