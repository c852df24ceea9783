"""The storage tracker, against what is counted by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from qlora_core.memory.measure import StorageMeter, StorageTracker
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.examples import Examples

KIB_FLOATS = 256


def floats(kib: int) -> torch.Tensor:
    return torch.zeros(kib * KIB_FLOATS)


def test_it_follows_a_storage_from_creation_to_release() -> None:
    with StorageTracker() as tracker:
        first = floats(8)
        second = first + 1
        assert tracker.current == 16 * 1024
        del first
        assert tracker.current == 8 * 1024
        del second
    assert (tracker.current, tracker.peak) == (0, 16 * 1024)


def test_views_and_in_place_results_share_their_storage() -> None:
    with StorageTracker() as tracker:
        whole = floats(4)
        views = [whole.view(2, -1), whole[3:], whole.add_(1)]
        assert tracker.current == 4 * 1024
        del whole
        assert tracker.current == 4 * 1024  # the views keep it
        del views
        assert tracker.current == 0


def test_what_was_there_before_is_counted_when_adopted_and_only_once() -> None:
    tensor = floats(2)
    tracker = StorageTracker()
    tracker.adopt([tensor, tensor[5:]])
    assert tracker.current == 2 * 1024
    with tracker:
        tensor.mul_(2)
    assert tracker.current == 2 * 1024
    del tensor
    assert tracker.current == 0


def test_a_resized_storage_counts_its_new_size() -> None:
    with StorageTracker() as tracker:
        tensor = floats(4)
        tensor.untyped_storage().resize_(0)
        tensor = tensor.set_(torch.empty(0))  # type: ignore[call-overload]
        grown = floats(1)
        assert tracker.current == 1024
        del grown, tensor


def test_the_backward_pass_is_seen() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    with StorageTracker() as tracker:
        (weight * 2).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        assert tracker.current >= 64 * 64 * 4


def test_of_the_data_a_batch_counts_and_not_what_it_is_cut_out_of(tmp_path: Path) -> None:
    save_examples([Encoded([7] * 50, [True] * 50)] * 100, tmp_path / "x.safetensors")
    examples = Examples(tmp_path / "x.safetensors")
    with StorageTracker() as tracker:
        batch = examples.batch([0, 1], 0, torch.device("cpu"))
        assert tracker.current == len(batch) * 2 * 50 * 8


def test_phases_keep_their_own_peaks() -> None:
    meter = StorageMeter()
    layer = nn.Linear(16, 16, bias=False)
    meter.loaded(layer)
    with meter.phase("forward"):
        kept = floats(3)
        del kept
    with meter.phase("backward"):
        still = floats(1)
    del still
    peaks = meter.peaks()
    assert peaks.after_load == 16 * 16 * 4
    assert (peaks.forward - 1024, peaks.backward - 1024, peaks.optimizer) == (3 * 1024, 1024, 0)
