"""Why the Hub gave no file: from what ``huggingface_hub`` raises to the message that a person can act on.

Nothing of an exception's own text is passed on: the HTTP client quotes headers, and so the token, in some of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from clusters.errors import RequestError, request_error

Kind = Literal["model", "dataset"]
TOKENS_PAGE = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a person asked for, as a refusal names it.

    Attributes:
        where: the flag or the field, ``--model`` or ``model``.
        repo: the repository, ``org/name``.
        revision: the branch, tag or commit, or None for the default branch.
        instead: what to do where the Hub cannot help, as a sentence without a full stop.
        kind: of repository.
    """

    where: str
    repo: str
    revision: str | None
    instead: str
    kind: Kind = "model"

    @property
    def text(self) -> str:
        """As it was written."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def page(self) -> str:
        """The address at which a person sees it."""
        return f"{endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    def refuse(self, rule: str, remedy: str) -> RequestError:
        """The error of a rule that this repository breaks."""
        return request_error(self.where, self.text, rule, remedy)


def endpoint() -> str:
    """The Hub's address, from HF_ENDPOINT or the library, without a password that may stand in it."""
    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def refusal(asked: Asked, error: Exception) -> RequestError:
    """The error to raise for one that ``huggingface_hub`` raised, or its HTTP client."""
    error, page = cause_of(error), asked.page
    if isinstance(error, OfflineModeIsEnabled):
        name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        rule = f"its files are not all in the Hub's cache ({constants.HF_HUB_CACHE}), and {name} is set"
        return asked.refuse(rule, f"Unset {name} to ask the Hub. {asked.instead}")
    if isinstance(error, GatedRepoError):
        rule = "it is gated: the Hub gives it only to those who accepted its licence"
        return asked.refuse(rule, f"Accept the licence at {page}, and set HF_TOKEN to a token of yours ({TOKENS_PAGE})")
    if isinstance(error, RevisionNotFoundError):
        rule = f"the repository has no branch, tag or commit {asked.revision or constants.DEFAULT_REVISION}"
        return asked.refuse(rule, f"{page}/tree/main lists its branches")
    if isinstance(error, RepositoryNotFoundError):
        rule = f"there is no folder of that name, and no {asked.kind} on {endpoint()} that may be read"
        return asked.refuse(rule, f"If it is private, set HF_TOKEN to a token that may read it. {asked.instead}")
    if isinstance(error, RemoteEntryNotFoundError):
        return asked.refuse("a file that it should have is not in the repository", f"{page}/tree/main shows what is")
    if isinstance(error, HFValidationError):
        rule = "it is neither a folder nor a Hub id: org/name, of letters, digits, hyphens, underscores and dots"
        return asked.refuse(rule, asked.instead)
    if isinstance(error, HfHubHTTPError):
        return _refused_with(asked, error.response.status_code)
    if on_disk(error):
        rule = f"the Hub's cache {constants.HF_HUB_CACHE} cannot be used: {reason(error)}"
        return asked.refuse(rule, "Put that right, or set HF_HOME to a folder that can be written, with free space")
    rule = f"the Hub at {endpoint()} gives no usable answer: {reason(error)}"
    return asked.refuse(rule, f"Check the network, and HF_ENDPOINT and HF_TOKEN if you set them. {asked.instead}")


def is_silence(error: Exception) -> bool:
    """Whether the Hub told nothing about the repository, so that what lies in the cache still counts.

    A Hub that refuses access counts as silent too, as in ``huggingface_hub``: the files were given once.
    """
    error = cause_of(error)
    return not (on_disk(error) or isinstance(error, RevisionNotFoundError | EntryNotFoundError | HFValidationError))


def on_disk(error: Exception) -> bool:
    """Whether the operating system refused something; the library's and the HTTP client's errors have no number."""
    return isinstance(error, OSError) and error.errno is not None


def cause_of(error: Exception) -> Exception:
    """What lies behind the library's remark that a file is not in the cache either."""
    cause = error.__cause__
    return cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def reason(error: BaseException) -> str:
    """The operating system's words behind an error, or else the error's type."""
    found: BaseException | None = error
    for _ in range(10):  # longer than any chain, and chains may be circles
        if found is None:
            break
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    if isinstance(error, FileMetadataError):
        return "what answers is not a Hub"
    return type(error).__name__


def _refused_with(asked: Asked, status: int) -> RequestError:
    """The error of an HTTP status that tells no more than itself."""
    if status in (401, 403):
        rule = f"the Hub refuses access ({status})"
        remedy = f"Set HF_TOKEN to a token that is valid and may read {asked.page} ({TOKENS_PAGE})"
        return asked.refuse(rule, remedy)
    rule = f"the Hub at {endpoint()} answered with {status}"
    return asked.refuse(rule, f"Try again later. {asked.instead}")
