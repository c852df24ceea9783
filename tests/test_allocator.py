"""The caching allocator's simulation: its rules by hand, from c10/cuda/CUDACachingAllocator.cpp, and laws it keeps."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.errors import RequestError
from launch.request import allocator_settings
from qlora_core.memory.allocator import AllocatorSettings, Block, CachingAllocator, segment_for
from qlora_core.memory.reserve import Growth, packed, slack
from qlora_core.memory.tape import Size, sum_of
from qlora_core.memory.timeline import Scene

KIB, MIB = 1024, 1024**2


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (1 * MIB, 1 * MIB, 2 * MIB),
        (1 * MIB + 1, 1 * MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded before a segment is chosen
        (10 * MIB, 10 * MIB, 10 * MIB),
        # rounded up to 2 MiB, and what is left over is at most 1 MiB: it stays with the block, and is counted
        (11 * MIB, 12 * MIB, 12 * MIB),
        (31 * MIB + 1, 32 * MIB, 32 * MIB),
        (31 * MIB, 32 * MIB, 32 * MIB),
    ],
)
def test_one_request(request_bytes: int, allocated: int, reserved: int) -> None:
    memory = CachingAllocator()
    memory.allocate(request_bytes)
    assert (memory.allocated, memory.reserved) == (allocated, reserved)


def test_what_a_large_block_leaves_is_split_off_from_one_mebibyte_on() -> None:
    memory = CachingAllocator()
    memory.release(memory.allocate(30 * MIB))
    kept = memory.allocate(29 * MIB - 512)  # leaves 1 MiB + 512 B
    assert memory.allocated == 29 * MIB - 512
    memory.release(kept)
    memory.allocate(29 * MIB)  # leaves exactly 1 MiB
    assert memory.allocated == 30 * MIB
    assert memory.reserved == 30 * MIB


def test_the_smallest_block_that_is_large_enough_serves() -> None:
    memory = CachingAllocator()
    large, small = memory.allocate(60 * MIB), memory.allocate(40 * MIB)
    memory.release(large)
    memory.release(small)
    memory.allocate(39 * MIB)
    assert memory.allocated == 40 * MIB  # all of the smaller one
    memory.allocate(60 * MIB)
    assert memory.reserved == 100 * MIB


def test_neighbours_join_again_and_other_segments_never_do() -> None:
    memory = CachingAllocator()
    memory.release(memory.allocate(40 * MIB))
    pieces = [memory.allocate(20 * MIB), memory.allocate(20 * MIB)]
    assert memory.reserved == 40 * MIB
    for piece in pieces:
        memory.release(piece)
    memory.allocate(40 * MIB)
    assert memory.reserved == 40 * MIB

    memory = CachingAllocator()
    for piece in [memory.allocate(20 * MIB), memory.allocate(20 * MIB)]:
        memory.release(piece)
    memory.allocate(40 * MIB)
    assert memory.reserved == 80 * MIB


def test_small_requests_never_come_from_large_segments() -> None:
    memory = CachingAllocator()
    memory.release(memory.allocate(64 * MIB))
    memory.allocate(1 * MIB)
    assert memory.reserved == 66 * MIB


def test_emptying_the_cache_gives_back_what_is_wholly_free() -> None:
    memory = CachingAllocator()
    half_used, free = memory.allocate(64 * MIB), memory.allocate(32 * MIB)
    memory.release(half_used)
    memory.allocate(40 * MIB)
    memory.release(free)
    memory.empty_cache()
    assert memory.reserved == 64 * MIB


def test_a_limit_to_splitting_keeps_large_blocks_whole() -> None:
    limited = AllocatorSettings(max_split_bytes=64 * MIB)
    memory = CachingAllocator(limited)
    memory.release(memory.allocate(100 * MIB))
    memory.allocate(30 * MIB)  # below the limit: it may not break the large block
    assert memory.reserved == 130 * MIB
    memory.allocate(90 * MIB)  # above it, and within 20 MiB of the block: served whole
    assert (memory.allocated, memory.reserved) == (130 * MIB, 130 * MIB)


def test_expandable_segments_grow_instead_of_leaving_holes_behind() -> None:
    memory = CachingAllocator(AllocatorSettings(expandable_segments=True))
    for size in (30, 60, 90):
        memory.release(memory.allocate(size * MIB))
    assert memory.reserved == 100 * MIB  # whole pages of 20 MiB, once; without, 180 MiB
    held = memory.allocate(45 * MIB)
    assert memory.allocated == 45 * MIB
    memory.release(memory.allocate(50 * MIB))
    memory.empty_cache()
    assert memory.reserved == 60 * MIB  # the pages that the block in use lies in
    memory.release(held)
    memory.empty_cache()
    assert memory.reserved == 0


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", AllocatorSettings()),
        ("expandable_segments:True", AllocatorSettings(expandable_segments=True)),
        ("max_split_size_mb:128", AllocatorSettings(max_split_bytes=128 * MIB)),
        (
            "expandable_segments:False, max_split_size_mb:21",
            AllocatorSettings(expandable_segments=False, max_split_bytes=21 * MIB),
        ),
    ],
)
def test_settings_are_read_as_pytorch_writes_them(text: str, settings: AllocatorSettings) -> None:
    assert AllocatorSettings.parse(text) == settings


@pytest.mark.parametrize("text", ["max_split_size_mb:20", "expandable_segments:yes", "roundup_power2_divisions:4"])
def test_settings_that_are_not_simulated_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=text.partition(":")[0]):
        AllocatorSettings.parse(text)


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:77"},
        {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:31"},
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:77", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:31"},
        {"PYTORCH_ALLOC_CONF": "max_split_size_mb:77", "PYTORCH_CUDA_ALLOC_CONF": ""},
        {},
    ],
)
def test_the_environment_is_read_as_pytorch_reads_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert allocator_settings() == AllocatorSettings.parse(told.strip())


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("option", ["max_split_size_mb:20", "roundup_power2_divisions:4"])
def test_a_setting_that_is_refused_is_told_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, option: str
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, option)
    with pytest.raises(RequestError, match=rf"^{variable}: .*max_split_size_mb.*\(got {option}\)"):
        allocator_settings()


SETTINGS = st.builds(
    AllocatorSettings, expandable_segments=st.booleans(), max_split_bytes=st.sampled_from([None, 32 * MIB, 256 * MIB])
)
STEPS = st.lists(
    st.one_of(st.integers(1, 4 * MIB), st.integers(1, 300 * MIB), st.just("release"), st.just("empty")), max_size=60
)


@given(settings=SETTINGS, steps=STEPS, chance=st.randoms(use_true_random=False))
def test_nothing_is_lost_whatever_happens(settings: AllocatorSettings, steps: list[int | str], chance: object) -> None:
    memory = CachingAllocator(settings)
    held: list[tuple[Block, int]] = []
    for step in steps:
        if isinstance(step, int):
            held.append((memory.allocate(step), step))
        elif step == "empty":
            memory.empty_cache()
        elif held:
            memory.release(held.pop(chance.randrange(len(held)))[0])  # type: ignore[attr-defined]
        blocks = sorted((block.segment, block.offset, block.offset + block.size) for block, _ in held)
        assert all(
            first[0] != second[0] or first[2] <= second[1]
            for first, second in pairwise(blocks)  # no two in use overlap
        )
        assert all(block.size >= size for block, size in held)
        assert sum(block.size for block, _ in held) == memory.allocated <= memory.reserved <= memory.peak_reserved
    for block, _ in held:
        memory.release(block)
    memory.empty_cache()
    assert (memory.allocated, memory.reserved) == (0, 0)


@given(
    before=st.lists(st.integers(1, 40 * MIB), max_size=12),
    gone=st.sets(st.integers(0, 11)),
    after=st.lists(st.integers(1, 40 * MIB), min_size=1, max_size=12),
)
def test_a_fork_answers_requests_as_the_first_one_would_and_leaves_it_alone(
    before: list[int], gone: set[int], after: list[int]
) -> None:
    memory = CachingAllocator()
    blocks = [memory.allocate(size) for size in before]
    for index in gone & set(range(len(blocks))):
        memory.release(blocks[index])
    answers = []
    for one in (memory.fork(), memory.fork(), memory):
        for size in after:
            one.allocate(size)
        answers.append((one.allocated, one.reserved, one.peak_allocated, one.peak_reserved))
    assert answers[0] == answers[1] == answers[2]


def test_expandable_segments_are_not_forked() -> None:
    with pytest.raises(ValueError, match="expandable"):
        CachingAllocator(AllocatorSettings(expandable_segments=True)).fork()


# --- what the formula takes it for ------------------------------------------------------------------------------------


@given(size=st.integers(MIB // 512 + 1, 40 * MIB // 512), count=st.integers(1, 60))
def test_tensors_alike_fill_segments_and_the_last_of_each_gets_what_is_left(size: int, count: int) -> None:
    memory = CachingAllocator()
    for _ in range(count):
        memory.allocate(512 * size)
    alike = [(512 * size, count)]
    assert packed(alike) == memory.reserved
    assert slack(alike) == memory.allocated - 512 * size * count


def test_what_stays_in_a_block_between_two_layers_costs_the_next_one_a_segment() -> None:
    layer = {number: Size(size * MIB) for number, size in enumerate((288, 288, 576))}
    checkpoint = Size(4 * MIB)
    nothing = Scene(Size(), {})
    growth = Growth(((Scene(sum_of(layer.values()), layer),), *(3 * [(nothing,)])), [(checkpoint, 1)], True, [])
    memory = CachingAllocator()
    for kept in (checkpoint, None):
        blocks = [memory.allocate(size.fixed) for size in layer.values()]
        for block in blocks:
            memory.release(block)
        if kept is not None:
            memory.allocate(kept.fixed)
    # the block of 288 MiB that the checkpoint broke is taken from that of 576 MiB, and this comes anew
    assert growth.at((1, 1, 1, 1, 1), last_chunk=0) == memory.reserved == (288 + 288 + 576 + 576) * MIB


def test_the_last_chunk_of_a_loss_makes_segments_into_which_the_others_do_not_fit() -> None:
    logits = {0: Size(per_chunk_token=100_000)}
    nothing = Scene(Size(), {})
    growth = Growth(((nothing,), (nothing,), (Scene(logits[0], logits),), (nothing,)), [], True, [])
    memory = CachingAllocator()
    for tokens in (300, 1024):
        memory.release(memory.allocate(100_000 * tokens))
    assert growth.at((1, 2048, 2048, 2048**2, 1024), last_chunk=300) == memory.reserved
    assert growth.at((1, 2048, 2048, 2048**2, 1024), last_chunk=0) == segment_for(100_000 * 1024)
