"""The components of an estimate as people read them: each with a title, and in a few groups for pictures."""

from __future__ import annotations

from qlora_core.memory.estimate import Components

COMPONENT_TITLES = {
    "base_weights": "base weights",
    "quantization_constants": "quantization constants",
    "unquantized_weights": "unquantized weights",
    "lora_weights": "adapters (LoRA)",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "dequantization_workspace": "dequantization workspace",
    "communication_buffers": "communication buffers",
    "framework": "framework",
}
GROUPS = {
    "base model": ("base_weights", "quantization_constants", "unquantized_weights"),
    "adapters, gradients, optimizer": ("lora_weights", "gradients", "optimizer_state"),
    "activations": ("activations",),
    "logits and loss": ("logits_and_loss",),
    "workspaces and buffers": ("dequantization_workspace", "communication_buffers"),
    "allocator and context": ("framework",),
}
"""Components that a picture shows together; the last group has what is beyond the allocated bytes, too."""


def grouped(components: Components, beyond: int = 0) -> list[int]:
    """Bytes of each group."""
    sizes = components._asdict()
    found = [sum(sizes[name] for name in names) for names in GROUPS.values()]
    return [*found[:-1], found[-1] + beyond]
