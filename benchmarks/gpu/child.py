"""The process that measures one case: `python -m benchmarks.gpu.child` loads torch and waits for a `Job` on stdin.

It is a process of its own, so that its CUDA context is seen coming, and an out-of-memory ends one row only. While one
measures, the next one loads: until its job comes it must not touch the GPU, and bitsandbytes does when it is imported.
"""

from __future__ import annotations

import pickle
import sys

import torch
import transformers.modeling_utils  # noqa: F401  (most of what has to be loaded, while there is time)

from benchmarks.gpu.device import used_bytes
from benchmarks.gpu.job import Job, Start
from qlora_core.files import write_json
from qlora_core.quiet import quiet_libraries


def open_context(job: Job) -> Start:
    """Open the CUDA context, with a look at the GPU before and after."""
    if job.kind != "cuda" or job.uuid is None:
        return Start(None, None)
    before = used_bytes(job.uuid)
    torch.cuda.set_device(job.place)
    torch.cuda.mem_get_info()  # opens the context, and allocates nothing
    after = used_bytes(job.uuid)
    return Start(before, None if before is None or after is None else after - before)


def main() -> int:
    """Wait for a job and answer it. Exit code 0 with what was measured, 1 with the reason why it was not."""
    quiet_libraries()
    job: Job = pickle.load(sys.stdin.buffer)  # noqa: S301  (from the process that started this one)
    try:
        start = open_context(job)
        if job.case.loop == "trl":
            from benchmarks.gpu.trl import measure  # only now: it imports bitsandbytes
        elif job.case.loop == "unsloth":
            from benchmarks.gpu.unsloth import measure
        else:
            from benchmarks.gpu.measure import measure

        answer = {"measured": measure(job, start)}
    except Exception as error:  # whatever it is, the row says so and the next one runs
        lines = str(error).strip().splitlines()
        write_json(job.result, {"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"})
        raise
    write_json(job.result, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
