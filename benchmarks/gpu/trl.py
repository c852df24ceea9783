"""A case of TRL's SFTTrainer on the same random base, where TRL is installed."""

from __future__ import annotations

import time
from typing import Any

import torch
from make_demo_base import train_tokenizer

from benchmarks.gpu.base import random_base
from benchmarks.gpu.job import Job, Start
from benchmarks.gpu.measure import process, rate
from benchmarks.training.order import order_of
from benchmarks.training.trl_loop import train


def measure(job: Job, start: Start) -> dict[str, Any]:
    """What `benchmarks.gpu.measure.measure` says of a step of ours; the peaks are of all steps, not by phase."""
    case, cuda = job.case, job.kind == "cuda"
    device = torch.device(job.place)
    torch.manual_seed(0)
    started = time.perf_counter()
    base = random_base(case.config_fields(), case.recipe, case.strategy, job.compute_dtype, device)
    loaded = time.perf_counter()
    after_load = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    vocabulary: int = base.config.vocab_size  # type: ignore[union-attr,assignment]  # transformers' config
    ids = torch.randint(vocabulary, (case.steps, case.strategy.micro_batch, case.recipe.seq_len))
    order = {**order_of(case.recipe), "dtype": job.compute_dtype}
    done = train(base, train_tokenizer(seed=0), ids, ids, order, job.kind)
    return {
        "phases": {"after_load": after_load},
        "allocated_bytes": torch.cuda.max_memory_allocated(device) if cuda else 0,
        "allocated_is": "torch.cuda.max_memory_allocated",
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else 0,
        **process(job, start),
        "losses": done["losses"],
        "adapters": done["adapters"],
        "load_seconds": round(loaded - started, 2),
        **rate(case, done["seconds"]),
    }
