"""On a GPU: memory really runs out in the midst of a run, which is planned anew and finished."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from make_demo_base import train_tokenizer
from real_runs import make_run
from strikes import Row, Rows
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.chaos,
    pytest.mark.xdist_group("workers"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
INJECT = Path(__file__).with_name("inject")
SEQ_LEN = 1024


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Large enough for its activations, and not the CUDA context, to be most of a process."""
    folder = tmp_path / "base"
    tokenizer = train_tokenizer(seed=0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=SEQ_LEN,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def long_texts(tmp_path: Path) -> Path:
    """As long as the sequences."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} the blue lamp " * 400}) + "\n" for number in range(80)))
    return path


def test_a_real_cuda_out_of_memory_is_planned_around(tmp_path: Path, base: Path, long_texts: Path, rows: Rows) -> None:
    changes: dict[str, dict[str, Any]] = {
        "recipe": {"seq_len": SEQ_LEN, "tokens_per_step": 16 * SEQ_LEN, "steps": 12, "optimizer": "adamw"},
        "strategy": {"world_size": 1, "zero_stage": 0, "micro_batch": "auto"},
    }
    run = make_run(tmp_path, base, long_texts, **changes)
    faults = [{"fault": "full gpu", "rank": 0, "step": 7, "attempts": [1]}]
    path = f"{INJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run.environment |= {"QLORA_FAULTS": json.dumps(faults), "PYTHONPATH": path}
    started = time.time()
    code, output = run.finish()
    print(output)
    assert code == 0, output
    first, second = run.record["attempts"]
    assert (first["failure"]["kind"], first["decision"]["action"]) == ("gpu memory", "replan")
    assert first["failure"]["measured"]["reserved"] > 0
    assert second["process_bytes"] <= 0.9 * first["process_bytes"]
    assert second["from_step"] == 6
    predicted, measured = run.record["predicted"], run.record["measured"]
    print(json.dumps({"predicted": predicted, "measured": measured}))
    assert measured["allocated_bytes"] == pytest.approx(predicted["allocated_bytes"], rel=0.03)
    assert measured["reserved_bytes"] == pytest.approx(predicted["reserved_bytes"], rel=0.1)
    rows.add(Row("out of GPU memory, really", True, 0, time.time() - started))
