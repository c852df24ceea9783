"""What is trained in the benchmarks: a Llama shape made from a config, and texts that all fill the whole length."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestrator.machine import describe, target_of

SEED = 0
LIKE_TRL = {"gradient_checkpointing": True, "attention": "sdpa", "loss": "chunked", "paged_optimizer": False}
"""The strategy that TRL's recipe has, too."""


def chosen_dtype() -> str:
    """What `compute_dtype: auto` is on this machine."""
    return target_of(describe(), "auto", 1).compute_dtype


@dataclass(frozen=True, slots=True)
class Case:
    """One model, one batch, one length.

    Attributes:
        layers, hidden, vocabulary: of the Llama shape; the MLP is 2.75 times as wide as `hidden`.
        seq_len: tokens of each sequence; no batch has padding.
        micro_batch: sequences of a step, which is one micro-batch.
        rank: LoRA's, on all linear layers.
    """

    layers: int = 8
    hidden: int = 512
    vocabulary: int = 8192
    seq_len: int = 512
    micro_batch: int = 2
    rank: int = 16
    learning_rate: float = 1e-3

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch * self.seq_len


def make_model(case: Case, folder: Path) -> Path:
    """The random base of a case in the Hugging Face layout, with a tokenizer; made once."""
    if (folder / "tokenizer.json").exists():
        return folder
    import torch
    from make_demo_base import train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(seed=SEED)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_spec(
    case: Case,
    folder: Path,
    model: Path,
    *,
    steps: int,
    compute_dtype: str = "auto",
    autocast: Literal["auto"] | bool = "auto",
    planned: bool = False,
) -> Path:
    """A run specification and its data in `folder`: texts of random words, longer than a sequence.

    Args:
        planned: leave the strategy to the planner, which keeps all activations where there is the room, in place of
            one like TRL's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)  # noqa: S311  # not cryptography
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(500)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]  # Zipf's law, so that there is something to learn
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(steps * case.micro_batch):
            prompt, *answer = rng.choices(words, weights, k=case.seq_len + 1)
            file.write(json.dumps({"prompt": prompt, "completion": " " + " ".join(answer)}) + "\n")
    fields: dict[str, Any] = {
        "name": "benchmark",
        "model": str(model),
        "data": {"path": "train.jsonl", "eval_fraction": 0},
        "recipe": {
            "rank": case.rank,
            "seq_len": case.seq_len,
            "tokens_per_step": case.tokens,
            "learning_rate": case.learning_rate,
            "warmup_fraction": 0,
            "steps": steps,
            "compute_dtype": compute_dtype,
            "autocast": autocast,
        },
        "strategy": {"world_size": 1} if planned else {"world_size": 1, **LIKE_TRL, "micro_batch": case.micro_batch},
        "checkpoints": {"every_steps": 1000},
        "tracking": {"to": []},
        "output": "out",
    }
    specification = folder / "run.yaml"
    specification.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return specification
