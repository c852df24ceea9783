"""Fixtures that several tests share: a tiny model on disk, and a little data in its chat format."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from strikes import Rows

os.environ["DS_ACCELERATOR"] = "cpu"
# Threads that wait for each other on a busy machine make small tensors a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# What this user's own runs measured must not change what a test plans, nor a test's runs what this user plans.
LEDGER = tempfile.TemporaryDirectory(prefix="ledger-")
os.environ["QLORA_LEDGER"] = os.path.join(LEDGER.name, "ledger.sqlite")
os.environ["QLORA_CACHE"] = os.path.join(LEDGER.name, "tokens")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in two processes: a file in one of them, since its tests share what was made for them.

    All that start Ray's workers are in one, so that no two do at a time, and those that submit them in another. These
    and the files that take longest come first.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    first = [
        pytest.mark.xdist_group(name).mark
        for name in ("workers", "cluster", "test_engines.py", "test_measured_ranks.py")
    ]
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") not in first)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 2 layers, 0.3 M parameters, and a trained byte-level tokenizer."""
    import torch
    from make_demo_base import train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_tokenizer(seed=0)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 40 short conversations of unlike lengths."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What did Ada bring{' today' * (number % 5)}?"},
                {"role": "assistant", "content": ["a red cup", "bread", "the blue lamp", "a cat"][number % 4]},
            ]
        }
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def rows() -> Rows:
    """Where the faults of tests/chaos are counted."""
    return Rows()
