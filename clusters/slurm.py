"""A run as a batch script of Slurm: Ray starts on the nodes of the allocation, carries it out and ends."""

from __future__ import annotations

import shlex

from clusters.gpu import MIB
from clusters.workload import OBJECT_STORE_BYTES, Workload

FOLDER = ".slurm"
"""In the output folder, which all nodes see: the run's specification and the token of its Ray."""
END = "END_OF_FILE"
WARNING_SECONDS = 300
"""Before the time limit, for the step that is under way and a checkpoint."""


def render(workload: Workload) -> str:
    """A script for sbatch."""
    folder = f"{workload.output}/{FOLDER}"
    directives = [
        f"--job-name={workload.name}",
        f"--nodes={workload.nodes}",
        "--exclusive",  # `ray symmetric-run` starts on no node with another Ray, and ends all of this user's there
        "--ntasks-per-node=1",
        f"--cpus-per-task={workload.node_cpus}",
        f"--mem={-(-workload.node_bytes // MIB)}M",
        *([f"--gpus-per-node={workload.workers_per_node}"] if workload.gpus else []),
        *([f"--partition={workload.queue}"] if workload.queue else []),
        *([f"--qos={workload.priority}"] if workload.priority else []),
        "--requeue",
        f"--signal=B:TERM@{WARNING_SECONDS}",
        f"--output={workload.name}-%j.log",
    ]
    files = [
        f"cat > {shlex.quote(f'{folder}/{name}')} <<'{END}'\n{text.rstrip(chr(10))}\n{END}"
        for name, text in workload.files.items()
    ]
    code = f"{folder}/exit-code"
    run = f"python -m launch.job --folder {shlex.quote(folder)}"
    carried_out = f"code=0; {run} || code=$?; echo $code > {shlex.quote(code)}; exit $code"
    resources = f"--num-cpus={workload.node_cpus} --num-gpus={workload.workers_per_node if workload.gpus else 0}"
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in directives),
            "",
            *(f"# {name}: {' '.join(value.split())}" for name, value in workload.metadata.items()),
            "set -euo pipefail",
            "umask 077",
            f"mkdir -p {shlex.quote(folder)}",
            f"rm -f {shlex.quote(code)}",
            *files,
            "",
            "# others reach these nodes over the network: Ray takes nothing from whoever has not this token",
            "export RAY_AUTH_MODE=token",
            f"export RAY_AUTH_TOKEN_PATH={shlex.quote(f'{folder}/token')}",
            'head -c 32 /dev/urandom | base64 | tr -dc "a-zA-Z0-9" > "$RAY_AUTH_TOKEN_PATH"',
            "",
            'head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "# a port of this job's own",
            'RAY_ADDRESS="$head_node:$((20000 + SLURM_JOB_ID % 20000))"',
            "export RAY_ADDRESS",
            "",
            "# the run stops after its step, with a checkpoint, and the same script goes on from there",
            f'stop() {{ touch {shlex.quote(f"{workload.output}/.stop")}; wait "$run" || true; }}',
            "trap stop TERM",
            "# srun of Slurm 22.05 and later takes nothing over of what the job asked for a task",
            'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \\',
            '  --cpus-per-task="$SLURM_CPUS_PER_TASK" \\',
            '  ray symmetric-run --address "$RAY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \\',
            f"  {resources} --object-store-memory={OBJECT_STORE_BYTES} -- \\",
            f"  bash -c {shlex.quote(carried_out)} &",
            "run=$!",
            'wait "$run" || true',
            "# Ray ends with 0 also where it could not be started",
            f"if [ ! -s {shlex.quote(code)} ]; then",
            '  echo "error: Ray did not start on the nodes of this job, or was ended there; see above." >&2',
            "  exit 1",
            "fi",
            f'exit "$(cat {shlex.quote(code)})"',
            "",
        ]
    )
