"""A case of Unsloth on the same random base, which is written down for it, by a Python that has Unsloth."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from make_demo_base import train_tokenizer
from safetensors.torch import save_file

import benchmarks.training
from benchmarks.gpu.base import random_base
from benchmarks.gpu.job import Job, Start
from benchmarks.gpu.measure import rate
from benchmarks.gpu.predict import UNSLOTH_PYTHON
from benchmarks.peers import QUIET, run_to_end
from benchmarks.training.order import order_of
from qlora_core.files import write_json

LOOP = Path(benchmarks.training.__path__[0]) / "unsloth_loop.py"


def measure(job: Job, start: Start) -> dict[str, Any]:
    """What `benchmarks.gpu.measure.measure` says of a step of ours; the peaks are of all steps, not by phase.

    The process is Unsloth's own, and nobody looked at it.
    """
    case = job.case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        vocabulary = write_base(job, folder / "model")
        written = time.perf_counter()
        torch.manual_seed(0)
        ids = torch.randint(vocabulary, (case.steps, case.strategy.micro_batch, case.recipe.seq_len))
        save_file({"input_ids": ids, "labels": ids.clone()}, folder / "batches.safetensors")
        paths = {"model": str(folder / "model"), "batches": str(folder / "batches.safetensors")}
        write_json(folder / "order.json", {**order_of(case.recipe), **paths, "device": job.kind})
        done = run(folder / "order.json", folder / "answer.json")
    peaks = done["peaks"]
    return {
        "phases": {"after_load": peaks["after_load"]},
        "allocated_bytes": peaks["allocated"],
        "allocated_is": "torch.cuda.max_memory_allocated",
        "reserved_bytes": peaks["reserved"],
        "context_bytes": 0,
        "process_bytes": 0,
        "process_is": None,
        "losses": done["losses"],
        "adapters": done["adapters"],
        "compute_dtype": done["compute_dtype"],
        "unsloth": done["unsloth"],
        "load_seconds": round(written - began, 2),
        **rate(case, done["seconds"]),
    }


def write_base(job: Job, folder: Path) -> int:
    """Write the base as bitsandbytes has quantized it, as Unsloth publishes models. Gives its vocabulary's size."""
    device = torch.device(job.place)
    base = random_base(job.case.config_fields(), job.case.recipe, job.case.strategy, job.compute_dtype, device)
    base.save_pretrained(folder)  # type: ignore[operator]  # transformers' model
    vocabulary = cast(int, base.config.vocab_size)  # type: ignore[union-attr]
    train_tokenizer(seed=0).save_pretrained(folder)
    del base
    if job.kind == "cuda":
        torch.cuda.empty_cache()
    return vocabulary


def run(order: Path, answer: Path) -> dict[str, Any]:
    """Unsloth's loop as a process of its own, to its end.

    Raises:
        RunFailed: it ended with another code than 0.
    """
    environment = {**os.environ, **QUIET}
    environment.pop("PYTHONPATH", None)  # packages of other versions than Unsloth's
    argv = [os.environ[UNSLOTH_PYTHON], str(LOOP), str(order), str(answer)]
    run_to_end(argv, environment, order.parent)  # where it leaves what it compiles
    return cast(dict[str, Any], json.loads(answer.read_text(encoding="utf-8")))
