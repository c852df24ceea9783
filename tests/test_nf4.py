"""NF4 in the open, against the paper's table and against bitsandbytes' kernels, bit for bit."""

from __future__ import annotations

import doctest
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qlora_core import nf4
from qlora_core.memory import bytes as exact

DOCUMENT = Path(__file__).parents[1] / "docs" / "nf4.md"

PAPER = (
    # Dettmers et al. 2023, arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

CPU_KERNEL_STEPS = 65535
"""bitsandbytes' CPU kernel for 8 bits first rounds to a grid of as many steps from -1 to 1 (csrc/cpu_ops.cpp,
norm_to_lut_index), its CUDA kernel does not (csrc/kernels.cu, dQuantize)."""


@pytest.fixture(scope="module", autouse=True)
def _without_the_compiler() -> Iterator[None]:
    """bitsandbytes compiles one of its CPU fallbacks anew for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


# --- the levels -------------------------------------------------------------------------------------------------------


def test_the_levels_are_the_papers() -> None:
    assert nf4.nf4_levels().tolist() == pytest.approx(PAPER, abs=1e-7)


def test_the_levels_are_those_of_bitsandbytes_bit_for_bit() -> None:
    assert torch.equal(nf4.nf4_levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.dynamic_levels(), bnb.create_dynamic_map())


def test_the_offset_is_the_mean_of_two_ways_to_count() -> None:
    assert pytest.approx(1 - (1 / 32 + 1 / 30) / 2, abs=1e-7) == nf4.OUTERMOST


def test_eight_levels_are_above_an_exact_zero_and_seven_below() -> None:
    levels = nf4.nf4_levels()
    assert levels[nf4.ZERO] == 0
    assert (int((levels > 0).sum()), int((levels < 0).sum())) == (8, 7)
    assert (levels[0].item(), levels[-1].item()) == (-1, 1)


def test_normal_weights_use_the_levels_about_equally() -> None:
    normal = statistics.NormalDist()
    levels = nf4.nf4_levels().double() * normal.inv_cdf(nf4.OUTERMOST)  # undo the scaling to [-1, 1]
    borders = [normal.cdf(border) for border in ((levels[:-1] + levels[1:]) / 2).tolist()]
    shares = [high - low for low, high in zip([0.0, *borders], [*borders, 1.0], strict=True)]
    assert all(1 / 20 < share < 1 / 14 for share in shares)


# --- packed bytes: bit for bit ----------------------------------------------------------------------------------------

WEIGHTS = hnp.arrays(
    np.float32,
    st.integers(1, 400),
    elements=st.one_of(
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, -0.0, 1e-40, -1e-45, 1e-38, 3e38, -3e38, 1.0, -1.0]),
    ),
).map(torch.from_numpy)
BORDERS = (nf4.nf4_levels()[:-1] + nf4.nf4_levels()[1:]) / 2
TIES = torch.cat([torch.ones(1), BORDERS, nf4.nf4_levels(), -BORDERS, torch.zeros(16)])
BLOCKS = st.sampled_from([64, 128, 256])


def assert_same_as_bitsandbytes(weight: Tensor, block: int) -> None:
    """Packed bytes and absmax are bitsandbytes', and what either packed the other unpacks to the same weight."""
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=block)
    ours = nf4.quantize(weight, double=False, block=block)
    assert torch.equal(ours.packed_P, packed.flatten())
    assert isinstance(ours.constants, Tensor)
    # bitsandbytes stores 1e-38 for an incomplete last block of zeros
    torch.testing.assert_close(ours.constants, state.absmax, rtol=0, atol=nf4.SMALLEST)
    theirs = bnb.dequantize_4bit(packed, state).flatten()  # a vector comes back as a row
    torch.testing.assert_close(nf4.dequantize(ours), theirs, rtol=1e-6, atol=2 * nf4.SMALLEST)


@settings(max_examples=300, deadline=None)
@given(weight=WEIGHTS, block=BLOCKS)
@example(weight=torch.zeros(64), block=64)
@example(weight=torch.zeros(65), block=64)
@example(weight=-torch.zeros(64), block=64)
@example(weight=torch.tensor([3e38] + [1e-3] * 63), block=64)
@example(weight=torch.full((64,), 1e-45), block=64)
@example(weight=torch.full((7,), -1e-39), block=64)
@example(weight=torch.tensor([0.5]), block=64)
@example(weight=torch.tensor([-0.0]), block=64)
@example(weight=TIES, block=64)
@example(weight=3 * TIES[:-1], block=64)
@example(weight=0.7 * TIES[:31], block=64)
def test_any_blocks_pack_as_bitsandbytes_packs_them(weight: Tensor, block: int) -> None:
    assert_same_as_bitsandbytes(weight, block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(704, 256), (33, 95), (1, 1), (4097,), (3, 5, 64)])
def test_normal_weights_pack_as_bitsandbytes_packs_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, _ = bnb.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(nf4.quantize(weight).packed_P, packed.flatten())


def test_the_first_of_a_pair_is_in_the_high_half() -> None:
    assert nf4.pack(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x12, 0x30 | nf4.ZERO]


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_unpacking_undoes_packing(indices: list[int]) -> None:
    packed = nf4.pack(torch.tensor(indices, dtype=torch.uint8))
    assert nf4.unpack(packed, len(indices)).tolist() == indices


@given(WEIGHTS)
@settings(deadline=None)
def test_what_was_quantized_once_is_not_changed_by_quantizing_it_again(weight: Tensor) -> None:
    once = nf4.dequantize(nf4.quantize(weight, double=False))
    twice = nf4.dequantize(nf4.quantize(once, double=False))
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=2 * nf4.SMALLEST)


# --- double quantization ----------------------------------------------------------------------------------------------

Nearest = Callable[[Tensor, Tensor], Tensor]


def on_the_cpu_kernels_grid(nearest: Nearest) -> Nearest:
    """`nearest` as bitsandbytes' CPU kernel does it for 8 bits; see `CPU_KERNEL_STEPS`."""

    def snapped(values: Tensor, levels_L: Tensor) -> Tensor:
        if len(levels_L) == 256:
            steps = ((values + 1) * 0.5 * CPU_KERNEL_STEPS + 0.5).floor()
            values = -1 + 2 * steps / CPU_KERNEL_STEPS
        return nearest(values, levels_L)

    return snapped


@pytest.mark.parametrize("numel", [1, 64, 96, 16384, 16384 * 3 + 64, 1_000_000])
@pytest.mark.parametrize("seed", range(3))
def test_after_double_quantization_weights_agree_to_float32_rounding(
    numel: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "nearest", on_the_cpu_kernels_grid(nf4.nearest))
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 0.02
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(weight)
    assert isinstance(ours.constants, nf4.NestedConstants)
    assert torch.equal(ours.constants.absmax_H, state.state2.absmax)
    assert ours.constants.offset == state.offset
    theirs = bnb.dequantize_4bit(packed, state).flatten()
    torch.testing.assert_close(nf4.dequantize(ours), theirs, rtol=1e-6, atol=0)


@settings(max_examples=200, deadline=None)
@given(weight=WEIGHTS)
@example(weight=torch.zeros(300))
@example(weight=torch.tensor([3e38] + [1e-3] * 299))
@example(weight=torch.full((300,), 3e38))
def test_what_bitsandbytes_stored_is_read_to_float32_rounding(weight: Tensor) -> None:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    nested = nf4.NestedConstants(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    read = nf4.dequantize(nf4.Quantized(packed.flatten(), nested, state.code, weight.shape, 64))
    theirs = bnb.dequantize_4bit(packed, state).flatten()
    # the mean of constants that are all huge overflows, in both
    torch.testing.assert_close(read, theirs, rtol=1e-6, atol=2 * nf4.SMALLEST, equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(weight=WEIGHTS.filter(lambda weight: bool(1e-20 < weight.abs().max() < 10)))
def test_the_cpu_kernel_stores_the_nearest_level_but_for_its_grid(weight: Tensor) -> None:
    _, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(weight).constants
    assert isinstance(ours, nf4.NestedConstants)
    if ours.absmax_H[0] < 1e-25:  # all constants alike: nothing is left without their mean
        return
    _, absmax_G = nf4.quantize_blocks(weight, nf4.nf4_levels(), 64)
    scaled_G = (absmax_G - ours.offset) / ours.absmax_H[0]
    best = (ours.levels_L[ours.indices_G.long()] - scaled_G).abs()
    theirs = (ours.levels_L[state.absmax.long()] - scaled_G).abs()
    assert (best <= theirs + 1e-6).all()
    assert (theirs <= best + 2 / CPU_KERNEL_STEPS + 1e-6).all()


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("numel", [1, 63, 64, 65, 16384, 16385, 300 * 257])
def test_it_stores_the_bytes_that_the_memory_model_counts(numel: int, block: Literal[64, 256], double: bool) -> None:
    quantized = nf4.quantize(torch.ones(numel), double=double, block=block)
    assert quantized.packed_P.nbytes == -(-numel // 2)
    assert tuple(each.nbytes for each in quantized.constant_tensors) == exact.constant_tensors(numel, block, double)


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_examples_of_the_document_print_what_it_says() -> None:
    failed, tried = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert (failed, tried > 10) == (0, True)


def test_the_table_of_the_document_is_the_papers() -> None:
    cells = re.findall(r"\| (\d+) \| (-?\d\.\d{7}) (?=\|)", DOCUMENT.read_text())
    table = {int(index): float(level) for index, level in cells}
    assert [table[index] for index in range(16)] == pytest.approx(PAPER, abs=1e-7)
