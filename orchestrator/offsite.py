"""A second home for checkpoints in object storage: they outlive the machine, and a run goes on from them elsewhere.

The process that was started copies them, in a thread of its own: workers need no credentials, and no step waits. Below
the address a folder with the run's name has one by the name of each output folder, for ``--fresh`` starts another run
of that name. In it lie the last few checkpoints and the best as in the output folder, each with its manifest uploaded
last, and in the end the result. The best has its step in its name: none is overwritten before the next is whole.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tenacity import Retrying, retry_if_not_exception_type, stop_after_delay, wait_exponential

from clusters.errors import RunFailed
from orchestrator.identity import check_same
from orchestrator.spec import RunSpec
from qlora_core.files import replace_folder
from qlora_core.remote import PACKAGES, opened, told
from qlora_core.training import manifest
from qlora_core.training.manifest import FOLDER, InvalidCheckpoint, newest_valid

FIELD = "checkpoints.storage"
BEST = re.compile(r"best-(\d{8})")
"""The names of the best ones there, by their step."""
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
            there = self._named(FOLDER)
            for step, name in there.items():
                if step <= newest_here:
                    return None
                checkpoints.mkdir(parents=True, exist_ok=True)
                if self._get(name, step, checkpoints / name, identity):
                    for number, best in self._named(BEST).items():
                        if self._get(best, number, checkpoints / manifest.BEST, identity):
                            break
                    return checkpoints / name
        return None

    def _get(self, name: str, step: int, folder: Path, identity: Mapping[str, Any]) -> bool:
        """Copy the checkpoint of that name and step here; whether it is whole."""
        there = f"{self._address}/{name}"
        try:
            with replace_folder(folder) as temporary:
                self._filesystem.get(f"{self._root}/{name}/", f"{temporary}/", recursive=True)
                check_same(manifest.check(temporary, step)["identity"], identity, there)
        except (InvalidCheckpoint, FileNotFoundError) as error:
            self._tell(f"The checkpoint {name} in {self._address} was passed over: {error}.")
            return False
        except RunFailed as error:  # of another version: it is to be looked for there, not where it was copied to
            raise RunFailed(error.what.replace(str(temporary), there), error.remedy) from None
        return True

    def keep(self, folder: Path) -> None:
        """Copy a folder there, soon; a checkpoint lets older ones go."""
        if name := _name_there(folder):
            self._queue.put((folder, name))

    def finish(self) -> None:
        """Wait until all is copied."""
        self._queue.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._tell(f"Not all was copied to {self._address} in {FINISH_SECONDS:.0f} s; the output folder has it.")

    def _work(self) -> None:
        while (wanted := self._queue.get()) is not None:
            folder, name = wanted
            if _name_there(folder) != name:
                continue  # a newer best has taken its place, and follows
            try:
                self._put(folder, name)
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
                self._patiently(self._make_folder, target.rpartition("/")[0])
                self._patiently(self._filesystem.put_file, str(path), target)

    def _make_folder(self, path: str) -> None:
        """Make a folder where there are folders; where there are buckets, one that does not exist must not be made."""
        if not self._has_buckets:
            self._filesystem.makedirs(path, exist_ok=True)

    def _retire(self) -> None:
        """Let checkpoints go that are older than the last few whole ones, and than the last best one that is whole."""
        for pattern, keep in ((FOLDER, self._keep), (BEST, 1)):
            whole = 0
            for step, name in self._named(pattern).items():
                if whole >= keep:
                    self._filesystem.rm(f"{self._root}/{name}", recursive=True)
                elif self._is_whole(name, step):
                    whole += 1

    def _is_whole(self, name: str, step: int) -> bool:
        """Whether the manifest is of that step and all files are there at their sizes; hashes are asked when fetched.

        Where a newer best came while one was copied, the manifest is the newer one's.
        """
        self._filesystem.invalidate_cache()
        try:
            text = self._filesystem.cat_file(f"{self._root}/{name}/{manifest.FILE_NAME}")
            fields: Mapping[str, Any] = json.loads(text)
            return fields["step"] == step and all(
                self._filesystem.size(f"{self._root}/{name}/{file}") == facts["bytes"]
                for file, facts in fields["files"].items()
            )
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def _named(self, pattern: re.Pattern[str]) -> dict[int, str]:
        """The names there that match, by their step, the newest first."""
        self._filesystem.invalidate_cache()
        try:
            listed = self._filesystem.ls(self._root, detail=False)
        except FileNotFoundError:
            return {}
        names = (str(path).rstrip("/").rpartition("/")[2] for path in listed)
        found = {int(match[1]): match[0] for name in names if (match := pattern.fullmatch(name))}
        return dict(sorted(found.items(), reverse=True))


def _name_there(folder: Path) -> str | None:
    """What a folder is called there; None where it is a best that is being replaced."""
    if folder.name != manifest.BEST:
        return folder.name
    try:
        return f"{manifest.BEST}-{manifest.read_manifest(folder)['step']:08d}"
    except InvalidCheckpoint:
        return None


def runs_of(spec: RunSpec) -> str:
    """Where all runs of that name lie in the storage that a specification names."""
    return f"{(spec.checkpoints.storage or '').rstrip('/')}/{spec.name}"


def outputs_stored(spec: RunSpec) -> set[str]:
    """The names of the output folders whose runs lie in the storage; none where the specification names no storage.

    Raises:
        RequestError: it cannot be read.
    """
    if spec.checkpoints.storage is None:
        return set()
    filesystem, path = opened(runs_of(spec), FIELD)
    with told(FIELD, runs_of(spec)):
        filesystem.invalidate_cache()
        listed = filesystem.ls(path, detail=False) if filesystem.exists(path) else []
    return {str(each).rstrip("/").rpartition("/")[2] for each in listed}


@contextmanager
def offsite(spec: RunSpec, tell: Callable[[str], None]) -> Iterator[Offsite | None]:
    """The storage that a specification names, if it does; when the block ends, all is copied.

    Raises:
        RequestError: nothing can be written there.
    """
    if spec.checkpoints.storage is None:
        yield None
        return
    storage = Offsite(f"{runs_of(spec)}/{Path(spec.output).name}", spec.checkpoints.keep, tell)
    try:
        yield storage
    finally:
        storage.finish()
