"""The specification of the GPU catalogue."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clusters.errors import RequestError
from clusters.gpu import COMMON, GIB, MIB, Gpu, find_gpu, list_gpus

ROOT = Path(__file__).parents[1]
GPUS = {gpu.name: gpu for gpu in list_gpus()}


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("t4", "t4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("RTX_3090", "rtx-3090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla P100-PCIE-16GB", "p100-16gb"),
        ("Quadro RTX 8000", "rtx-8000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
    ],
)
def test_a_gpu_is_found_by_the_names_people_and_torch_use(given_name: str, name: str) -> None:
    assert find_gpu(given_name) is GPUS[name]


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        # The total nvidia-smi shows (its output in public issues); what CUDA gives is a little less.
        ("t4", 15360),
        ("rtx-4090", 24564),
        ("rtx-5090", 32607),
        ("l40s", 46068),
        ("a100-40gb", 40960),
        ("a100-80gb", 81920),
        ("h100-80gb", 81559),
        ("h200", 143771),
        ("b200", 183359),
        ("gh200-96gb", 97871),
        ("rtx-pro-6000", 97887),
        ("rtx-3090", 24576),
        ("rtx-2080-ti", 11264),
        ("l4", 23034),
        ("a10g", 23028),
    ],
)
def test_cuda_gives_a_little_less_than_nvidia_smi_shows(name: str, mib: int) -> None:
    assert 0.94 * mib * MIB < GPUS[name].usable_bytes < mib * MIB


@pytest.mark.parametrize(
    ("name", "terabytes_per_s", "bf16_tflops"),
    [
        # NVIDIA's data-centre datasheets, as cli99/llm-analysis (gpu_configs) and litgpt quote them too.
        ("a100-40gb", 1.555, 312),
        ("a100-80gb", 2.039, 312),
        ("h100-80gb", 3.35, 989.4),
        ("h100-pcie-80gb", 2.0, 756),
        ("rtx-a6000", 0.768, 154.8),
        ("a10", 0.6, 125),
        ("a10g", 0.6, 70),
    ],
)
def test_rates_are_the_datasheets(name: str, terabytes_per_s: float, bf16_tflops: float) -> None:
    assert GPUS[name].bandwidth_bytes_per_s == pytest.approx(terabytes_per_s * 1e12)
    assert GPUS[name].bf16_flops == pytest.approx(bf16_tflops * 1e12)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_gpu_is_plausible_and_has_its_source(gpu: Gpu) -> None:
    assert 0.9 * gpu.memory_bytes <= gpu.usable_bytes < gpu.memory_bytes
    assert gpu.memory_bytes % GIB == 0
    assert 250e9 < gpu.bandwidth_bytes_per_s < 10e12
    assert 10e12 < gpu.fp16_flops < 3e15
    assert (gpu.bf16_flops is not None) == gpu.supports_bfloat16 == gpu.supports_flash_attention
    assert gpu.pcie_bytes_per_s in (15753846154, 31507692308, 63015384615)
    assert 100 * MIB < gpu.context_bytes < 800 * MIB
    assert "NVIDIA" in gpu.source


def test_the_t4s_context_is_the_measured_one() -> None:
    """fitcheck-llm's measurements on a Tesla T4: process minus reserved, 140.875 MiB in every row."""
    assert find_gpu("t4").context_bytes == 147_718_144 == 140.875 * MIB
    assert find_gpu("t4").context_measured
    assert not find_gpu("a100-80gb").context_measured


def test_pcie_rates_are_those_of_the_specification() -> None:
    assert find_gpu("t4").pcie_bytes_per_s / 1e9 == pytest.approx(15.75, abs=0.01)
    assert find_gpu("a100-80gb").pcie_bytes_per_s / 1e9 == pytest.approx(31.5, abs=0.01)
    assert find_gpu("h100").pcie_bytes_per_s / 1e9 == pytest.approx(63.0, abs=0.02)
    assert find_gpu("rtx-4060-ti-16gb").pcie_bytes_per_s == find_gpu("t4").pcie_bytes_per_s


def test_the_catalogue_is_what_a_yaml_parser_reads_in_it() -> None:
    rows = yaml.safe_load((ROOT / "clusters" / "gpus.yaml").read_text())["gpus"]
    assert {row["name"]: tuple(row.get("aliases", ())) for row in rows} == {
        gpu.name: gpu.aliases for gpu in GPUS.values()
    }
    assert all(GPUS[row["name"]].memory_bytes == row["memory_gib"] * GIB for row in rows)


def test_nvlink_is_a_fabric_on_boards_and_a_bridge_between_cards() -> None:
    """NVIDIA's datasheets name a bridge for two cards, or the HGX and DGX boards of SXM modules; Ada has neither."""
    assert all(GPUS[name].has_nvlink_fabric for name in ("v100-16gb", "a100-40gb", "a100-80gb", "h100-80gb", "b200"))
    for name in ("rtx-3090", "rtx-a6000", "a40", "a30", "rtx-8000", "h100-pcie-80gb", "h100-nvl-94gb"):
        assert GPUS[name].nvlink_bytes_per_s
        assert not GPUS[name].has_nvlink_fabric
    assert not any(GPUS[name].nvlink_bytes_per_s or GPUS[name].nvlink_bridge for name in ("t4", "rtx-4090", "l40s"))


def test_there_are_enough_and_they_are_ordered() -> None:
    assert len(GPUS) >= 30
    usable = [gpu.usable_bytes for gpu in list_gpus()]
    assert usable == sorted(usable)
    common = [find_gpu(name).memory_bytes for name in COMMON]
    assert common == sorted(common)


def test_no_two_gpus_share_a_name() -> None:
    found = {name: find_gpu(name) for gpu in GPUS.values() for name in (gpu.name, *gpu.aliases)}
    assert all(name in (gpu.name, *gpu.aliases) for name, gpu in found.items())


@pytest.mark.parametrize(
    ("given_name", "says"),
    [
        ("a100", "Did you mean a100-40gb, a100-80gb"),
        ("rtx-4091", "Did you mean rtx-4090"),
        ("mi300x", "qlora-plan --list-gpus"),
        ("", "qlora-plan --list-gpus"),
        ("x" * 3000, "qlora-plan --list-gpus"),
    ],
    ids=["ambiguous", "slip", "another maker", "empty", "long"],
)
def test_an_unknown_gpu_is_one_helpful_error(given_name: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        find_gpu(given_name)
    assert [problem.where for problem in caught.value.problems] == ["--gpu"]
    assert says in str(caught.value)


@given(st.text(max_size=40))
def test_any_name_is_a_gpu_or_a_request_error(given_name: str) -> None:
    with suppress(RequestError):
        find_gpu(given_name)
