"""Checkpoints: the trainable state of a run, and nothing that the base model's folder already holds.

Layout of ``step-00000040/`` (format version 2); a folder gets that name last, and is valid by its manifest alone::

    adapter/adapter_model.safetensors, adapter_config.json    what peft loads
    model/model*.safetensors, config.json, ...                with method full in its place: what transformers loads
    optimizer-00000.safetensors                               one per rank: raw optimizer state
    rank-00000.json                                           one per rank: random states, plain numbers, and
                                                              which parameter lies where in the optimizer state
    checkpoint.json                                           the manifest: see `manifest`; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential
from torch import nn

from clusters.errors import NEEDS_A_PERSON, StorageFailed, first_line
from qlora_core.files import publish_folder, replace_folder, sync
from qlora_core.training.engine import Engine
from qlora_core.training.manifest import BEST, described, folder_name, is_best, rank_files, retire, write_manifest
from qlora_core.training.optimizer_state import OptimizerState

SHARD_SIZE = "5GB"
"""Of a file of a whole model's weights, as on the Hub."""
DONE, FAILED = ".done-{:05d}.json", ".failed-{:05d}"
"""By which files a rank tells rank 0 that its part is written, or why it is not."""
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 120.0
"""For so long what fails by the storage is tried again, and a run that has failed waits for its last checkpoint."""
OTHERS_SECONDS = 1800.0
"""Rank 0 waits so long for the other ranks' parts."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has to know to go on, beyond weights and optimizer state.

    Attributes:
        step: optimizer steps done; with seed and data it is the position in the data.
        scheduler: the learning rate schedule's own state.
        context: what the run's caller wants back at a resume (first evaluation, sample answers, best loss, a digest of
            the weights at the start). The writer adds that of the weights here.
    """

    step: int
    scheduler: dict[str, Any]
    context: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A rank's part of a checkpoint, copied, so that training goes on while it is written.

    Attributes:
        weights: on rank 0, the trained weights by their names in `engine.module`, whole; elsewhere none.
        best: it has the lowest evaluation loss so far.
    """

    progress: Progress
    weights: Mapping[str, torch.Tensor]
    state: OptimizerState
    random: dict[str, Any]
    best: bool


class Writer:
    """Writes checkpoints in a thread of its own on each rank, one after the other.

    The ranks meet in the folder, not in a collective, which would come between those of the training: each leaves a
    file when its part is written, and rank 0, when all have, writes the manifest, gives the folder its name, and lets
    old checkpoints go.

    Args:
        facts: what identifies the run, for the manifest.
        keep: valid checkpoints that stay, beside the best.
        attempt: tells the half-written folders of an earlier attempt from this one's.
        on_saved: called on rank 0, in the writer's thread, with each finished checkpoint.

    Attributes:
        digest: of the weights that were written last; None before, and on other ranks than 0.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        *,
        rank: int,
        world_size: int,
        facts: Mapping[str, Any],
        keep: int,
        attempt: int = 1,
        on_saved: Callable[[Path, int], None] = lambda path, step: None,
    ) -> None:
        self._folder, self._model, self._rank, self._world_size = folder, model, rank, world_size
        self._facts, self._keep, self._attempt, self._on_saved = facts, keep, attempt, on_saved
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.digest: str | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write; the one before must be finished.

        Raises:
            StorageFailed: the one before could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise a StorageFailed if what was begun has failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, alive: Callable[[], None] = lambda: None, seconds: float = math.inf) -> None:
        """Until what was begun is finished, or `seconds` are over. `alive` is called now and then.

        Raises:
            StorageFailed: it could not be written.
        """
        deadline = time.monotonic() + seconds
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(min(1.0, seconds))
            alive()
        self._thread = None
        self.check()

    @contextmanager
    def finishing(self, alive: Callable[[], None]) -> Iterator[None]:
        """Wait after the block for what was begun in it; the process may end with it, and the thread with the process.

        Raises:
            StorageFailed: it could not be written. An error of the block stands in the place of this one.
        """
        try:
            yield
        except Exception:
            deadline = time.monotonic() + PATIENCE_SECONDS  # no longer: the other ranks may be gone, with their parts
            with suppress(StorageFailed):
                self.wait(alive, PATIENCE_SECONDS)
            # rank 0, which gives the folder its name, is stopped when another rank has failed
            unnamed = f".*.{self._attempt}.tmp"
            while self._rank != 0 and any(self._folder.glob(unnamed)) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                alive()
            raise
        self.wait(alive)

    def _write(self, snapshot: Snapshot) -> None:
        final = self._folder / folder_name(snapshot.progress.step)
        temporary = final.with_name(f".{final.name}.{self._attempt}.tmp")
        try:
            files = self._patiently(self._write_part, snapshot, temporary)
            if self._rank != 0:
                self._patiently(leave, temporary / DONE.format(self._rank), json.dumps(files))
                return
            for rank in range(1, self._world_size):
                files |= json.loads(from_rank(temporary, rank))
            self._patiently(self._publish, snapshot, temporary, final, files)
            self._on_saved(final, snapshot.progress.step)
        except Exception as error:
            self._error = storage_failed(final, error)
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                with suppress(OSError):
                    leave(temporary / FAILED.format(self._rank), reason_of(error))

    def _patiently(self, write: Callable[..., Any], *arguments: Any) -> Any:
        """Write once more where storage fails that often comes back by itself; training goes on meanwhile."""
        retrying = Retrying(
            retry=retry_if_exception(passes_by),
            wait=wait_exponential(multiplier=0.5, max=10),
            stop=stop_after_delay(PATIENCE_SECONDS),
            reraise=True,
        )
        return retrying(write, *arguments)

    def _publish(
        self, snapshot: Snapshot, temporary: Path, final: Path, files: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Make a checkpoint of all ranks' files, and let old ones go. What was done before a failure is not undone."""
        if temporary.exists():
            for rank in range(1, self._world_size):
                (temporary / DONE.format(rank)).unlink(missing_ok=True)
            self.digest = weights_digest(snapshot.weights)
            progress = dataclasses.asdict(snapshot.progress)
            progress["context"]["weights"] = self.digest
            facts = {**progress, "world_size": self._world_size, **self._facts}
            write_manifest(temporary, facts, files)
            publish_folder(temporary, final)
        if snapshot.best:
            keep_best(final)
        retire(self._folder, self._keep)

    def _write_part(self, snapshot: Snapshot, temporary: Path) -> dict[str, dict[str, Any]]:
        """Write this rank's files; their sizes and hashes."""
        temporary.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            save_weights(self._model, snapshot.weights, temporary)
        optimizer, facts = rank_files(self._rank)
        save_file(snapshot.state.tensors, temporary / optimizer)
        rank_facts = {
            "numbers": snapshot.state.numbers,
            "spans": [dataclasses.astuple(span) for span in snapshot.state.spans],
            "random": snapshot.random,
        }
        (temporary / facts).write_text(json.dumps(rank_facts), encoding="utf-8")
        names = [optimizer, facts]
        if self._rank == 0:
            weights = (path for kind in ("adapter", "model") for path in (temporary / kind).rglob("*"))
            names += [path.relative_to(temporary).as_posix() for path in weights if path.is_file()]
        for name in names:
            sync(temporary / name)
        return described(temporary, names)


def leave(path: Path, text: str) -> None:
    """Write a file that others wait for, whole when it is seen."""
    unseen = path.with_name(f"{path.name}.part")
    unseen.write_text(text, encoding="utf-8")
    unseen.rename(path)


def from_rank(temporary: Path, rank: int) -> str:
    """What another rank leaves when its part is written.

    Raises:
        OSError: it could not write it, or left nothing.
    """
    deadline = time.monotonic() + OTHERS_SECONDS
    while time.monotonic() < deadline:
        if (failed := temporary / FAILED.format(rank)).exists():
            raise OSError(f"rank {rank}: {failed.read_text(encoding='utf-8')}")
        with suppress(FileNotFoundError):
            return (temporary / DONE.format(rank)).read_text(encoding="utf-8")
        time.sleep(POLL_SECONDS)
    raise OSError(f"rank {rank} has not written its part in {OTHERS_SECONDS / 60:.0f} minutes")


def keep_best(path: Path) -> None:
    """Copy a checkpoint to ``best`` beside it, unless it is that one, so that it outlives the last few."""
    if is_best(path):
        return
    with replace_folder(path.with_name(BEST)) as temporary:
        shutil.copytree(path, temporary)


def snapshot(
    engine: Engine, weights: Mapping[str, torch.Tensor], progress: Progress, rank: int, best: bool
) -> Snapshot:
    """Copy this rank's part of a checkpoint.

    Args:
        weights: what `engine.saved_weights()` gave.
    """
    return Snapshot(progress, weights if rank == 0 else {}, engine.optimizer_state(), random_state(), best)


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of weights by their names, bit for bit."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(name.encode())
        hashed.update(cast(Any, tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return hashed.hexdigest()


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error; safetensors has it in its text only."""
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    return getattr(error, "errno", None)


def passes_by(error: BaseException) -> bool:
    """Whether an error is of storage, and none that only a person can put right."""
    return isinstance(error, OSError | SafetensorError) and errno_of(error) not in NEEDS_A_PERSON


def reason_of(error: Exception) -> str:
    """What an error of storage says."""
    return getattr(error, "strerror", None) or first_line(error)


def storage_failed(path: Path, error: Exception) -> StorageFailed:
    """The error of a checkpoint that could not be written."""
    return StorageFailed(
        f"The checkpoint {path} could not be written: {reason_of(error)}.",
        "Free space or make the folder writable, then start the same run again: it goes on from the last checkpoint, "
        "or from the start where none was written.",
        errno_of(error),
    )


def save_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the trained weights into `folder`: as ``adapter/``, or as ``model/`` where all are trained.

    Args:
        weights: the trained parameters by their names in `engine.module`, whole.
    """
    named = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if isinstance(model, PeftModel):
        (folder / "adapter").mkdir(exist_ok=True)
        save_adapter(model, named, folder / "adapter")
    else:
        save_model(model, named, folder / "model")


def save_model(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a whole model as transformers does: config.json and safetensors, in several files where it is large.

    A weight that is tied to another has one name in `weights`, and is tied again when it is loaded.
    """
    held = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    cast(Any, model).save_pretrained(folder, state_dict={**weights, **held}, max_shard_size=SHARD_SIZE)


def save_adapter(model: PeftModel, named: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter as peft does: adapter_model.safetensors and adapter_config.json."""
    adapter = get_peft_model_state_dict(model, state_dict=dict(named))
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors")
    config = dataclasses.replace(model.peft_config["default"], inference_mode=True)
    config.save_pretrained(str(folder))


def random_state() -> dict[str, Any]:
    """The states of Python's and PyTorch's generators, as JSON values."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }
