"""Data by an address of fsspec's, such as s3:// or gs://: copied to a temporary folder, read from there, and gone.

A copy, because a file is read twice, for its digest and its records, and Parquet from its end. Credentials come from
where each service's library looks for them, and never stand in the address.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clusters.errors import request_error
from qlora_core.training.dataset.readers import first_line

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""Which package fsspec needs for an address."""


@contextlib.contextmanager
def local_copy(address: str) -> Iterator[Path]:
    """A copy of the file or folder at an address, on this machine for as long as the block lasts.

    Raises:
        RequestError: the address's kind is not known, its package is missing, or it cannot be read.
    """
    import fsspec

    scheme = address.split("://", 1)[0].lower()
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except ImportError:
        package = PACKAGES.get(scheme, f"fsspec's package for {scheme}")
        raise request_error(
            "data.path", address, f"reading {scheme}:// needs {package}", f"Install it: pip install {package}"
        ) from None
    except ValueError as error:
        raise request_error(
            "data.path", address, f"it cannot be understood: {first_line(error)}", "Give an s3:// or gs:// address, say"
        ) from None
    with tempfile.TemporaryDirectory(prefix="qlora-data-") as folder:
        # the name as it stands in the address, for its suffix says how it is read
        local = Path(folder) / (PurePosixPath(path).name or "data")
        try:
            if filesystem.isdir(path):
                filesystem.get(path.rstrip("/") + "/", f"{local}/", recursive=True)
            else:
                filesystem.get_file(path, str(local))
        except FileNotFoundError:
            raise request_error("data.path", address, "there is no such file", "Check the address") from None
        except Exception as error:  # each service's library has its own errors; their messages may hold secrets
            rule = f"it cannot be read ({type(error).__name__})"
            raise request_error(
                "data.path", address, rule, "Check the address, and the credentials in the environment"
            ) from None
        yield local
