"""One planner's answers, in its own environment: `python asked.py NAME < rows.json`. It imports nothing of ours.

Each answer is in MiB by what it claims to say (`allocated`, `reserved`, `process`, `after loading`), or why it refuses
the row.
`us` are microseconds of one answer, the median of a few.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

GIB_IN_MIB = 1024.0
T4_GIB = 14912 / 1024
"""As fitcheck-llm has it: with ECC."""
Answer = dict[str, float]
TIMED = 5


def fitcheck(row: dict[str, Any]) -> Answer:
    """`fitcheck.estimate`: the sum without its overhead is what tensors take, with it the process."""
    from fitcheck import TrainingConfig, estimate, fetch_model_config, get_gpu

    found = estimate(
        fetch_model_config(row["model"]),
        TrainingConfig(
            precision="fp16",
            quantization=row["quantization"],
            double_quant=row["double_quant"],
            optimizer="adamw",
            optimizer_dtype="fp32",
            batch_size=row["micro_batch"],
            seq_len=row["seq_len"],
            lora_rank=row["lora_rank"],
            lora_targets=row["lora_targets"],
            grad_checkpoint=row["gradient_checkpointing"],
            flash_attn=row["attention"] != "eager",
        ),
        get_gpu("t4"),
    )
    return {"allocated": found.total_mib - found.overhead_mib, "process": found.total_mib}


def canifinetune(row: dict[str, Any]) -> Answer:
    """`estimate`: "process torch peak reserved", from which its safety margin is taken, "reported separately"."""
    from canifinetune.estimator.memory import EstimateRequest, estimate

    found = estimate(
        EstimateRequest(
            model_id=row["folder"],
            method=row["method"],
            seq_len=row["seq_len"],
            micro_batch_size=row["micro_batch"],
            base_dtype="fp16",
            quantization=row["quantization"],
            lora_rank=row["lora_rank"],
            lora_dropout=0.0,
            lora_target_scope="attention",
            optimizer="adamw_torch",
            gradient_checkpointing=row["gradient_checkpointing"],
            attention_implementation=row["attention"],
            gpu_vram_gb=T4_GIB,
            use_network=False,
        )
    ).memory
    total = found.total_estimated_gb - found.safety_margin_gb
    return {"reserved": GIB_IN_MIB * total, "allocated": GIB_IN_MIB * (total - found.cuda_overhead_gb)}


def peft_doctor(row: dict[str, Any]) -> Answer:
    """`estimate_vram_gb`, the command `peft-doctor estimate`: "estimated training VRAM", in GiB."""
    from peft_doctor.estimator import estimate_vram_gb

    found = estimate_vram_gb(
        row["model"],
        seq_len=row["seq_len"],
        batch_size=row["micro_batch"],
        qlora=row["method"] == "qlora",
        gradient_checkpointing=row["gradient_checkpointing"],
        params_billion=row["parameters"] / 1e9,
        hidden_size=row["config"]["hidden_size"],
        num_layers=row["config"]["num_hidden_layers"],
    )
    return {"process": GIB_IN_MIB * found.metadata["estimated_total_gb"]}


def qmemcalc(row: dict[str, Any]) -> Answer:
    """`estimate_memory`: "GPU memory usage", in megabytes of 10**6."""
    from qmemcalc.memory import estimate_memory

    found = estimate_memory(
        row["folder"],
        row["micro_batch"],
        row["seq_len"],
        lora_r=row["lora_rank"],
        precision="fp16",
        quantization="4bit" if row["method"] == "qlora" else "none",
        optimizer="adamw",
        gradient_checkpointing=row["gradient_checkpointing"],
    )
    return {"process": found["total_MB"] * 1e6 / 2**20}


def accelerate(row: dict[str, Any]) -> Answer:
    """What `accelerate estimate-memory --dtypes int4` (or float16) does with a model of the Hub: its total size."""
    from accelerate import init_empty_weights
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoConfig, AutoModel

    with init_empty_weights():
        model = AutoModel.from_config(AutoConfig.from_pretrained(row["folder"]))
    total, _ = calculate_maximum_sizes(model)
    return {"after loading": total / (8 if row["method"] == "qlora" else 2) / 2**20}


PLANNERS: dict[str, Callable[[dict[str, Any]], Answer]] = {
    "fitcheck-llm": fitcheck,
    "canifinetune": canifinetune,
    "peft-doctor": peft_doctor,
    "qmemcalc": qmemcalc,
    "accelerate": accelerate,
}


def main() -> None:
    """Answer all rows."""
    ask = PLANNERS[sys.argv[1]]
    rows = json.load(sys.stdin)
    answers: list[Any] = []
    for row in rows:
        try:
            answers.append(ask(row))
        except ValueError as error:
            answers.append({"refused": str(error)[:200]})
    took = []
    for _ in range(TIMED):
        began = time.perf_counter()
        ask(rows[0])
        took.append(time.perf_counter() - began)
    print(json.dumps({"answers": answers, "us": 1e6 * statistics.median(took)}))


if __name__ == "__main__":
    main()
