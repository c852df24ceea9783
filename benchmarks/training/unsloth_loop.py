"""Unsloth over micro-batches that another run left; runs in Unsloth's own environment and imports nothing of ours.

The recipe is Unsloth's documented one: FastLanguageModel's 4-bit base and adapters on the seven linear layers, its own
gradient checkpointing, and the trainer of TRL, which Unsloth changes as it is imported. On a machine without a GPU
Unsloth trains by a backend for CPUs (unsloth_zoo/cpu), which chooses bfloat16 where the CPU multiplies it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import unsloth  # before transformers and trl, which it changes
from safetensors.torch import load_file
from trl_loop import all_threads, train

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Train as the order says.

    Args:
        order: as for `trl_loop.main`; without `adapter` the one that Unsloth initialises. `device` is "cpu" or "cuda".
    """
    batches = load_file(order["batches"])
    cuda = order["device"] == "cuda"
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        order["model"], max_seq_length=batches["input_ids"].shape[2], load_in_4bit=True
    )
    loaded = torch.cuda.memory_allocated() if cuda else 0
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=order["rank"],
        target_modules=LINEAR,
        lora_alpha=order["alpha"],
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    order = {**order, "dtype": str(model.dtype).removeprefix("torch.")}
    done = train(model, tokenizer, batches["input_ids"], batches["labels"], order, order["device"], adapted=True)
    peaks = {
        "after_load": loaded,
        "allocated": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
    }
    return {**done, "compute_dtype": order["dtype"], "peaks": peaks, "unsloth": unsloth.__version__}


if __name__ == "__main__":
    all_threads()
    order_file, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(main(json.loads(order_file.read_text()))))
