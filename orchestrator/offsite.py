"""A second home for checkpoints in object storage: they outlive the machine, and a run goes on from them elsewhere.

The process that was started copies them, in a thread of its own: workers need no credentials, and no step waits. Below
the address lies a folder with the run's name, in it the last few checkpoints and the best as they lie in the output
folder, each with its manifest uploaded last, and in the end the result.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tenacity import Retrying, retry_if_not_exception_type, stop_after_delay, wait_exponential

from orchestrator.identity import check_same
from orchestrator.spec import RunSpec
from qlora_core.files import replace_folder
from qlora_core.remote import PACKAGES, opened, told
from qlora_core.training import manifest
from qlora_core.training.manifest import FOLDER, InvalidCheckpoint, newest_valid

FIELD = "checkpoints.storage"
PATIENCE_SECONDS = 300.0
"""For so long what fails is tried again; the run goes on meanwhile."""
FINISH_SECONDS = 600.0
"""What is still to be copied when the run is over gets so long."""


class Offsite:
    """The storage of one run.

    Args:
        address: its folder there.
        keep: checkpoints that stay.
        tell: is told of what could not be copied.

    Raises:
        RequestError: nothing can be written there.
    """

    def __init__(self, address: str, keep: int, tell: Callable[[str], None]) -> None:
        self._address, self._keep, self._tell = address, keep, tell
        self._filesystem, path = opened(address, FIELD)
        self._root = path.rstrip("/")
        self._has_buckets = address.split("://", 1)[0].lower() in PACKAGES
        self._queue: SimpleQueue[tuple[Path, str] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="offsite", daemon=True)
        probe = f"{self._root}/.probe"
        with told(FIELD, address):
            self._make_folder(self._root)
            self._filesystem.pipe_file(probe, b"can be written")
            self._filesystem.rm_file(probe)
        self._thread.start()

    def fetch(self, checkpoints: Path, identity: Mapping[str, Any]) -> Path | None:
        """Copy the newest valid checkpoint here, and the best, if there is none as new; returns where it lies.

        Raises:
            RequestError: the storage cannot be read, or another run's checkpoints lie there.
        """
        here, _ = newest_valid(checkpoints)
        newest_here = int(FOLDER.fullmatch(here.name)[1]) if here is not None else -1  # type: ignore[index]
        with told(FIELD, self._address):
            there = self._steps()
            for step in sorted(there, reverse=True):
                if step <= newest_here:
                    return None
                checkpoints.mkdir(parents=True, exist_ok=True)
                if self._get(there[step], checkpoints, identity):
                    if self._filesystem.exists(f"{self._root}/{manifest.BEST}/{manifest.FILE_NAME}"):
                        self._get(manifest.BEST, checkpoints, identity)
                    return checkpoints / there[step]
        return None

    def _get(self, name: str, checkpoints: Path, identity: Mapping[str, Any]) -> bool:
        """Copy a checkpoint of that name here; whether it is whole."""
        try:
            with replace_folder(checkpoints / name) as temporary:
                self._filesystem.get(f"{self._root}/{name}/", f"{temporary}/", recursive=True)
                fields = manifest.check(temporary)
                check_same(fields["identity"], identity, f"{self._address}/{name}")
        except (InvalidCheckpoint, FileNotFoundError) as error:
            self._tell(f"The checkpoint {name} in {self._address} was passed over: {error}.")
            return False
        return True

    def keep(self, folder: Path) -> None:
        """Copy a folder there, soon; a checkpoint lets older ones go."""
        self._queue.put((folder, folder.name))

    def finish(self) -> None:
        """Wait until all is copied."""
        self._queue.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._tell(f"Not all was copied to {self._address} in {FINISH_SECONDS:.0f} s; the output folder has it.")

    def _work(self) -> None:
        while (wanted := self._queue.get()) is not None:
            folder, name = wanted
            try:
                self._patiently(self._put, folder, name)
                self._patiently(self._retire)
            except FileNotFoundError:
                continue  # a newer one has replaced it meanwhile
            except Exception as error:  # each service's library has its own; their messages may hold secrets
                what = f"{name} could not be copied to {self._address} ({type(error).__name__})"
                self._tell(f"{what}; it lies in {folder}, and the run goes on.")

    def _patiently(self, call: Callable[..., None], *arguments: Any) -> None:
        retrying = Retrying(
            retry=retry_if_not_exception_type(FileNotFoundError),
            wait=wait_exponential(multiplier=0.5, max=15),
            stop=stop_after_delay(PATIENCE_SECONDS),
            reraise=True,
        )
        retrying(call, *arguments)

    def _put(self, folder: Path, name: str) -> None:
        """Copy all files of a folder, its manifest last."""
        files = sorted(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == manifest.FILE_NAME
        )
        for path in files:
            if path.is_file():
                target = f"{self._root}/{name}/{path.relative_to(folder).as_posix()}"
                self._make_folder(target.rpartition("/")[0])
                self._filesystem.put_file(str(path), target)

    def _make_folder(self, path: str) -> None:
        """Make a folder where there are folders; where there are buckets, one that does not exist must not be made."""
        if not self._has_buckets:
            self._filesystem.makedirs(path, exist_ok=True)

    def _retire(self) -> None:
        """Let checkpoints go that are older than the last few whole ones."""
        whole = 0
        for name in (name for _, name in sorted(self._steps().items(), reverse=True)):
            if whole >= self._keep:
                self._filesystem.rm(f"{self._root}/{name}", recursive=True)
            elif self._is_whole(name):
                whole += 1

    def _is_whole(self, name: str) -> bool:
        """Whether all files that the manifest names are there at their sizes; their hashes are asked when fetched."""
        self._filesystem.invalidate_cache()
        try:
            text = self._filesystem.cat_file(f"{self._root}/{name}/{manifest.FILE_NAME}")
            fields: Mapping[str, Any] = json.loads(text)
            return all(
                self._filesystem.size(f"{self._root}/{name}/{file}") == facts["bytes"]
                for file, facts in fields["files"].items()
            )
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def _steps(self) -> dict[int, str]:
        """The names of the checkpoints there, by step."""
        self._filesystem.invalidate_cache()
        try:
            listed = self._filesystem.ls(self._root, detail=False)
        except FileNotFoundError:
            return {}
        names = (str(path).rstrip("/").rpartition("/")[2] for path in listed)
        return {int(match[1]): match[0] for name in names if (match := FOLDER.fullmatch(name))}


@contextmanager
def offsite(spec: RunSpec, tell: Callable[[str], None]) -> Iterator[Offsite | None]:
    """The storage that a specification names, if it does; when the block ends, all is copied.

    Raises:
        RequestError: nothing can be written there.
    """
    if spec.checkpoints.storage is None:
        yield None
        return
    storage = Offsite(f"{spec.checkpoints.storage.rstrip('/')}/{spec.name}", spec.checkpoints.keep, tell)
    try:
        yield storage
    finally:
        storage.finish()
