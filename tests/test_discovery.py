"""Where --cluster leads: a file, this machine's GPUs, a running Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_heads import ray_head

from clusters.errors import RequestError
from clusters.gpu import GIB, MIB, find_gpu
from orchestrator.discovery import find_cluster, parse_nvidia_smi, this_machine
from orchestrator.ray_nodes import cluster_of

ROOT = Path(__file__).parents[1]
A100 = "NVIDIA A100-SXM4-80GB, 81920, 81153, 8.0"
T4 = "Tesla T4, 15360, 14923, 7.5"

FakeSmi = Callable[..., None]


# --- this machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSmi:
    """Puts an executable on PATH that stands for nvidia-smi: it prints lines in the real one's format, and fails so."""

    def install(*lines: str, code: int = 0) -> None:
        (tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines))
        script = tmp_path / "nvidia-smi"
        script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n/bin/cat {tmp_path}/lines\nexit {code}\n')
        script.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where no Ray has left its address
    return install


def test_gpus_alike_are_one_pool_with_what_is_free_on_the_fullest_with_a_fake_for_nvidia_smi(
    nvidia_smi: FakeSmi,
) -> None:
    nvidia_smi(A100, A100, "NVIDIA A100-SXM4-80GB, 81920, 40000, 8.0", A100)
    cluster = this_machine()
    assert cluster is not None
    (pool,) = cluster.pools
    assert (pool.gpu, pool.gpus_per_node, pool.nodes) == (find_gpu("a100-80gb"), 4, 1)
    assert pool.usable_bytes == 40000 * MIB
    assert pool.host_ram_bytes == psutil.virtual_memory().total
    assert pool.nvlink
    assert (cluster.unknown, cluster.remarks, cluster.currency) == ((), (), None)


def test_a_free_gpu_offers_no_more_than_cuda_gives_with_a_fake_for_nvidia_smi(nvidia_smi: FakeSmi) -> None:
    nvidia_smi(A100)  # 81153 MiB are 79.25 GiB; CUDA's messages speak of 79.14
    cluster = this_machine()
    assert cluster is not None
    assert cluster.pools[0].usable_bytes == int(79.14 * GIB)


def test_unlike_gpus_are_pools_and_unknown_ones_are_named_with_a_fake_for_nvidia_smi(nvidia_smi: FakeSmi) -> None:
    nvidia_smi(A100, T4, "NVIDIA Quantum 9000, 999999, 999999, 99.0", T4)
    cluster = find_cluster("auto")
    assert {(pool.gpu.name, pool.gpus) for pool in cluster.pools} == {("a100-80gb", 1), ("t4", 2)}
    assert [text.startswith("1 x NVIDIA Quantum 9000 (compute capability 99.0)") for text in cluster.unknown] == [True]


def test_a_card_on_pcie_has_no_fabric_of_nvlink_with_a_fake_for_nvidia_smi(nvidia_smi: FakeSmi) -> None:
    nvidia_smi("NVIDIA A100 80GB PCIe, 81920, 81037, 8.0")
    cluster = this_machine()
    assert cluster is not None
    assert not cluster.pools[0].nvlink


def test_memory_that_is_not_told_is_the_catalogues_with_a_fake_for_nvidia_smi(nvidia_smi: FakeSmi) -> None:
    nvidia_smi("Tesla T4, [N/A], [N/A], 7.5")
    cluster = this_machine()
    assert cluster is not None
    assert cluster.pools[0].usable_bytes == find_gpu("t4").usable_bytes


def test_the_visible_devices_are_asked_for_with_a_fake_for_nvidia_smi(
    nvidia_smi: FakeSmi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi(T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert this_machine() is not None
    assert "--id=1,3" in (tmp_path / "asked").read_text().split()
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert this_machine() is None


@pytest.mark.parametrize(
    ("lines", "code", "says"),
    [
        (["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."], 9, "couldn't communicate"),
        (["No devices were found"], 6, "No devices were found"),
        ([], 0, "nvidia-smi shows none"),
        (["NVIDIA Quantum 9000, 999999, 999999, 99.0"], 0, "Quantum 9000"),
    ],
)
def test_where_there_is_no_known_gpu_the_reason_is_told_with_a_fake_for_nvidia_smi(
    nvidia_smi: FakeSmi, lines: list[str], code: int, says: str
) -> None:
    nvidia_smi(*lines, code=code)
    with pytest.raises(RequestError, match=says):
        find_cluster("auto")


def test_where_nothing_is_found_it_is_told_what_was_looked_for(nvidia_smi: FakeSmi) -> None:
    assert this_machine() is None
    with pytest.raises(RequestError, match=r"--cluster: .*no Ray runs here.*no nvidia-smi on PATH.*HOST:PORT"):
        find_cluster("auto")


def test_lines_that_are_no_gpu_are_left_out() -> None:
    """Drivers print warnings among the lines, as of an infoROM that is corrupted."""
    assert [one.name for one in parse_nvidia_smi(f"WARNING: infoROM is corrupted\n{T4}\n")] == ["Tesla T4"]


# --- files and addresses ----------------------------------------------------------------------------------------------


def test_a_file_is_read() -> None:
    assert find_cluster(str(ROOT / "clusters" / "examples" / "two-pools.yaml")).name == "two-pools"


@pytest.mark.parametrize("text", ["", "nowhere.yaml", "a\0b", "ray://host:10001", "host:port", "x" * 5000])
def test_what_is_neither_file_nor_address_is_told_what_may_be_given(text: str) -> None:
    with pytest.raises(RequestError, match=r"--cluster: there is no such file.*HOST:PORT"):
        find_cluster(text)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.0.0.1:99999", "no.invalid:6379"])
def test_an_address_where_no_ray_answers_is_one_error(address: str) -> None:
    with pytest.raises(RequestError, match="--cluster: no Ray could be joined there"):
        find_cluster(address)


def test_a_ray_that_is_named_and_does_not_answer_is_not_passed_over(
    nvidia_smi: FakeSmi, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(T4)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RequestError, match=r"no Ray could be joined there.*127\.0\.0\.1:1"):
        find_cluster("auto")


def test_an_address_that_a_ray_left_behind_is_passed_over(nvidia_smi: FakeSmi, tmp_path: Path) -> None:
    nvidia_smi(T4)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    assert find_cluster("auto").source == "nvidia-smi"


# --- a running Ray ----------------------------------------------------------------------------------------------------


def node(*types: str, gpus: float = 8, alive: bool = True, gib: int = 100) -> dict[str, Any]:
    """A node as ray.nodes() tells of it."""
    resources = {"CPU": 8.0, "memory": gib * 0.7 * GIB, "object_store_memory": gib * 0.3 * GIB, "node:10.0.0.1": 1.0}
    if gpus:
        resources["GPU"] = gpus
    return {"Alive": alive, "Resources": resources | {f"accelerator_type:{name}": 1.0 for name in types}}


@pytest.mark.parametrize(
    ("types", "gpu", "remarked"),
    [
        # ray/util/accelerators/accelerators.py, and the names that ray/_private/accelerators/nvidia_gpu.py makes
        (["T4"], "t4", False),
        (["V100"], "v100-16gb", True),
        (["P100"], "p100-16gb", False),
        (["A10G"], "a10g", False),
        (["L4"], "l4", False),
        (["L40S"], "l40s", False),
        (["A100"], "a100-40gb", True),
        (["A100-40G"], "a100-40gb", False),
        (["A100-80G"], "a100-80gb", False),
        (["A100", "A100-80G"], "a100-80gb", False),
        (["H100"], "h100-80gb", True),
        (["H200"], "h200", False),
        (["B200"], "b200", False),
        (["RTX-PRO-6000"], "rtx-pro-6000", False),
        (["RTX-A6000"], "rtx-a6000", False),
        (["GeForce-RTX-4090"], "rtx-4090", False),
        (["GeForce-RTX-3080"], "rtx-3080", False),
    ],
)
def test_rays_names_are_understood_and_of_several_the_smallest_is_taken(
    types: list[str], gpu: str, remarked: bool
) -> None:
    cluster = cluster_of([node(*types)], "h:1")
    assert [pool.gpu.name for pool in cluster.pools] == [gpu]
    assert [f"{gpu} is assumed" in remark for remark in cluster.remarks] == [True] * remarked


@pytest.mark.parametrize("types", [["H20"], ["GB200"], ["AMD-Instinct-MI250X"], ["TPU-V4"], [""], [], ["T4", "L4"]])
def test_gpus_that_are_not_known_are_named_and_no_other_is_taken_for_them(types: list[str]) -> None:
    cluster = cluster_of([node(*types)], "h:1")
    assert cluster.pools == ()
    assert len(cluster.unknown) == 1
    assert cluster.unknown[0].startswith("8 GPUs: ")


def test_nodes_alike_are_a_pool_with_the_least_memory_among_them() -> None:
    nodes = [node("T4", gib=100), node("T4", gib=90), node("T4", gpus=2), node("L4"), node("L4", alive=False)]
    cluster = cluster_of([*nodes, node(gpus=0)], "h:1")
    assert {(pool.gpu.name, pool.gpus_per_node, pool.nodes) for pool in cluster.pools} == {
        ("t4", 8, 2),
        ("t4", 2, 1),
        ("l4", 8, 1),
    }
    assert len({pool.name for pool in cluster.pools}) == 3
    (eight,) = (pool for pool in cluster.pools if pool.gpu.name == "t4" and pool.gpus_per_node == 8)
    assert eight.host_ram_bytes == pytest.approx(90 * GIB)


@pytest.mark.parametrize("nodes", [[], [node(gpus=0)], [node("T4", alive=False)]])
def test_a_ray_without_gpus_is_a_wrong_request(nodes: list[dict[str, Any]]) -> None:
    with pytest.raises(RequestError, match="no node of that Ray has a GPU"):
        cluster_of(nodes, "h:1")


READ = """
import json, sys
from clusters.errors import RequestError
from orchestrator.discovery import find_cluster
try:
    cluster = find_cluster(sys.argv[1])
except RequestError as error:
    sys.exit(str(error))
print(json.dumps([[pool.gpu.name, pool.gpus_per_node, pool.nodes] for pool in cluster.pools]))
"""


def ask(text: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """find_cluster in a process of its own: Ray reads its token once per process."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    command = [sys.executable, "-c", READ, text]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_a_real_ray_is_read_by_address_and_by_auto_and_wants_its_token_with_resources_that_stand_for_gpus(
    tmp_path: Path,
) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    with ray_head("--num-cpus=1", "--num-gpus=2", '--resources={"accelerator_type:T4": 1}') as (address, users):
        for text in (address, "auto"):
            answer = ask(text, users)
            assert json.loads(answer.stdout) == [["t4", 2, 1]], answer.stderr
        for token in (str(tmp_path / "wrong"), str(tmp_path / "none")):
            answer = ask(address, users | {"RAY_AUTH_TOKEN_PATH": token})
            assert answer.returncode == 1
            (line,) = answer.stderr.splitlines()
            assert line.startswith("--cluster: no Ray could be joined there: ")
            assert "oken" in line
            assert "0" * 64 not in line
