"""TRL's SFTTrainer over micro-batches that our run left; runs in TRL's own environment and imports nothing of ours.

The recipe is TRL's documented one for QLoRA: a 4-bit base given with a LoraConfig,
and SFTConfig's own defaults for precision (bf16), gradient checkpointing and loss.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Seconds of each optimizer step; ends the training after `at_most` seconds of them."""

    def __init__(self, at_most: float) -> None:
        self.seconds: list[float] = []
        self._at_most = at_most
        self._begin = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self.seconds.append(time.perf_counter() - self._begin)
        # two steps at least: the first is a warm-up
        control.should_training_stop |= sum(self.seconds) > self._at_most and len(self.seconds) > 1


class Recording(SFTTrainer):  # type: ignore[misc]  # trl is not typed here
    """Keeps the loss of each step, which the trainer's own log rounds."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """See `SFTTrainer`."""
        result = super().compute_loss(*args, **kwargs)
        self.losses.append(float(result[0] if isinstance(result, tuple) else result))
        return result


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Train as the order says.

    Args:
        order: model, batches, adapter (paths), rank, alpha, learning_rate, beta2, max_grad_norm; dtype: what the base
            is loaded in and computes in; exact: put the adapter back to float32, which TRL makes bfloat16.
    """
    dtype = getattr(torch, order["dtype"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=dtype, quantization_config=quantization)
    batches = load_file(order["batches"])
    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    return train(model, tokenizer, batches["input_ids"], batches["labels"], order)


def train(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    order: dict[str, Any],
    device: str = "cpu",
    *,
    adapted: bool = False,
) -> dict[str, Any]:
    """Train a loaded model on micro-batches, each a step.

    Args:
        ids, labels: shape [steps, sequences, tokens].
        order: as for `main`; without `adapter` the one that peft initialises; `seconds`, if given, are the most that
            its steps may take, however many there were by then.
        device: "cpu" or "cuda".
        adapted: the model has its adapters.
    """
    data = Dataset.from_dict({"input_ids": ids.flatten(0, 1).tolist(), "labels": labels.flatten(0, 1).tolist()})
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=ids.shape[1],
            max_steps=len(ids),
            max_length=ids.shape[2],
            learning_rate=order["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            adam_beta2=order["beta2"],
            max_grad_norm=order["max_grad_norm"],
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10**6,
            use_cpu=device == "cpu",
            **({} if order["dtype"] == "bfloat16" else {"bf16": False}),
        )
        lora = LoraConfig(
            r=order["rank"],
            lora_alpha=order["alpha"],
            lora_dropout=0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        clock = Clock(order.get("seconds", math.inf))
        trainer = Recording(
            model=model,
            args=config,
            train_dataset=data,
            peft_config=None if adapted else lora,
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.losses = []
        if order["exact"]:
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if "adapter" in order:
            first = load_file(order["adapter"])
            set_peft_model_state_dict(
                trainer.model,
                {
                    name[name.index("base_model.") :].removesuffix(".default.weight") + ".weight": value
                    for name, value in first.items()
                },
            )
        trainer.train()
    trained = {str(parameter.dtype) for parameter in trainer.model.parameters() if parameter.requires_grad}
    return {"seconds": clock.seconds, "losses": trainer.losses, "adapters": sorted(trained)}


def all_threads() -> None:
    """One for each core that this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


if __name__ == "__main__":
    all_threads()
    order_file, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(main(json.loads(order_file.read_text()))))
