"""Data and models by an address of fsspec's, such as s3:// or gs://: copied to this machine, and read there.

Credentials come from where each service's library looks for them, and never stand in the address.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from clusters.errors import NO_SPACE, RequestError, RunFailed, first_line, request_error
from qlora_core.files import replace_folder

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Which package fsspec needs for an address."""
MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken")
"""How weights, configs and tokenizers end. Neither code nor pickles are among them."""
STATES = ("ETag", "etag", "md5Hash", "content_hash", "LastModified", "last_modified", "mtime", "created")
"""By what the kinds of storage tell whether a file is still the same."""


@contextlib.contextmanager
def local_copy(address: str) -> Iterator[Path]:
    """A copy of the data at an address, a file or a folder, on this machine for as long as the block lasts.

    A copy, because a file is read twice, for its digest and its records, and Parquet from its end.

    Raises:
        RequestError: the address's kind is not known, its package is missing, or it cannot be read.
    """
    filesystem, path = opened(address, "data.path")
    with tempfile.TemporaryDirectory(prefix="qlora-data-") as folder:
        # the name as it stands in the address, for its suffix says how it is read
        local = Path(folder) / (PurePosixPath(path).name or "data")
        with told("data.path", address):
            if filesystem.isdir(path):
                filesystem.get(path.rstrip("/") + "/", f"{local}/", recursive=True)
            else:
                filesystem.get_file(path, str(local))
        yield local


def model_folder(address: str, cache: Path, tell: Callable[[str], None]) -> Path:
    """The folder of the model at an address: its copy below `cache`, made where there is none of these very files.

    Args:
        tell: is told of each file before it is copied.

    Raises:
        RequestError: as `local_copy`; there is no model, or a file did not come whole.
    """
    filesystem, path = opened(address, "model")
    with told("model", address):
        # what was listed before may have changed
        filesystem.invalidate_cache()
        listed: list[Mapping[str, Any]] = [each for each in filesystem.ls(path, detail=True) if each["type"] == "file"]
    wanted = {
        PurePosixPath(each["name"]).name: each for each in listed if str(each["name"]).lower().endswith(MODEL_FILES)
    }
    if "config.json" not in wanted:
        raise request_error("model", address, "there is no config.json", "Give the folder of a saved model")
    states = [(name, each["size"], *(str(each.get(key)) for key in STATES)) for name, each in sorted(wanted.items())]
    folder = cache / hashlib.sha256(repr((address, states)).encode()).hexdigest()[:32]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if not folder.is_dir():
                with replace_folder(folder) as temporary:
                    copy(filesystem, wanted, temporary, address, tell)
    except OSError as error:
        rule = f"its copy cannot be written to {cache}: {error.strerror or error}"
        raise request_error("model", address, rule, "Free space there, or set QLORA_CACHE to another folder") from None
    return folder


def copy(
    filesystem: Any, files: Mapping[str, Mapping[str, Any]], folder: Path, address: str, tell: Callable[[str], None]
) -> None:
    """Copy a model's files, by name, into a new folder."""
    folder.mkdir()
    for name, file in files.items():
        tell(f"Copying {name} ({file['size'] / 1e9:.2f} GB) from {address}")
        with told("model", address):
            filesystem.get_file(file["name"], str(folder / name))
        if (folder / name).stat().st_size != file["size"]:
            raise request_error("model", f"{address}/{name}", "it did not come whole", "Try again")


def opened(address: str, where: str) -> tuple[Any, str]:
    """The filesystem of an address, and the path in it.

    Args:
        where: the field by which it came.

    Raises:
        RequestError: the address's kind is not known, or its package is missing.
    """
    import fsspec

    scheme = address.split("://", 1)[0].lower()
    try:
        return fsspec.core.url_to_fs(address)  # type: ignore[no-any-return]
    except ImportError:
        package = PACKAGES.get(scheme, f"fsspec's package for {scheme}")
        raise request_error(
            where, address, f"reading {scheme}:// needs {package}", f"Install it: pip install {package}"
        ) from None
    except ValueError as error:
        raise request_error(
            where, address, f"it cannot be understood: {first_line(error)}", "Give an s3:// or gs:// address, say"
        ) from None


@contextlib.contextmanager
def told(where: str, address: str) -> Iterator[None]:
    """Turn what a storage's library raises into a RequestError."""
    try:
        yield
    except (RequestError, RunFailed):
        raise
    except FileNotFoundError:
        raise request_error(where, address, "there is no such file or folder", "Check the address") from None
    except Exception as error:  # each service's library has its own errors; their messages may hold secrets
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            rule = "its copy finds no space on this machine"
            raise request_error(where, address, rule, "Free space on the disk that it is copied to") from None
        rule = f"it cannot be read ({type(error).__name__})"
        raise request_error(where, address, rule, "Check the address, and the credentials in the environment") from None
