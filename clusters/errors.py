"""The errors a person may meet: what was passed, which rule it broke, what to do.

A command turns them into an exit code (``launch.command``): a `RequestError` is 2, a `RunFailed` is 1. Everything else
that escapes is a defect of ours.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a request.

    Attributes:
        where: the field, flag or file it was found in, such as ``recipe.rank`` or ``--gpu``.
        given: what was passed, as the person would recognise it.
        rule: the rule it broke, as a sentence without a full stop.
        remedy: what to do about it, as a sentence without a full stop, or a question.
    """

    where: str
    given: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        told = without_logins(f"{self.rule} (got {self.given})" if self.given else self.rule)
        return f"{self.where}: {told}. {self.remedy}{'' if self.remedy.endswith('?') else '.'}"


class RequestError(Exception):
    """The request is wrong or cannot be carried out as given; all its mistakes are reported together. Exit code 2."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("a RequestError needs at least one problem")
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[RequestError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)

    def at(self, where: str) -> RequestError:
        """The same mistakes, told of the field or flag by which the value came."""
        return RequestError([replace(problem, where=where) for problem in self.problems])

    def named(self, names: Mapping[str, str]) -> RequestError:
        """The same mistakes, those of the fields in `names` told of what is called so where the person wrote it."""
        return RequestError(
            [replace(problem, where=names.get(problem.where, problem.where)) for problem in self.problems]
        )


class Conflicting(ValueError):
    """Fields of one section that do not go together. A ValueError, so that pydantic reports it among others.

    Attributes:
        mistakes: for each its fields, the value of the first, the rule it broke and what to do.
    """

    mistakes: tuple[tuple[tuple[str, ...], object, str, str], ...]


class RunFailed(Exception):
    """A run that was right as a request, and failed. Exit code 1.

    Args:
        what: what failed, as a sentence.
        remedy: what to do about it, as a sentence.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what} {remedy}")

    def __reduce__(self) -> tuple[type[RunFailed], tuple[object, ...]]:
        return type(self), (self.what, self.remedy)


SECRET = re.compile(r"KEY|TOKEN|PASS|_PWD|SECRET|CREDENTIAL|CONNECTION_STRING|DSN|_SAS")
"""Names of environment variables whose values are never shown."""
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_RIGHTS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
NEEDS_A_PERSON = NO_SPACE | NO_RIGHTS
"""Errors of storage that do not pass by themselves."""


class StorageFailed(RunFailed):
    """A run's files could not be written or read.

    Attributes:
        errno: the system's number of the error, where it has one.
    """

    def __init__(self, what: str, remedy: str, errno: int | None = None) -> None:
        super().__init__(what, remedy)
        self.errno = errno

    def __reduce__(self) -> tuple[type[RunFailed], tuple[object, ...]]:
        return type(self), (self.what, self.remedy, self.errno)


class NotFinite(RunFailed):
    """A loss or a gradient is no longer a finite number."""


class RayNotStarted(RunFailed):
    """Ray's own processes did not come up, as on a machine that is too busy."""


def request_error(where: str, given: object, rule: str, remedy: str) -> RequestError:
    """A `RequestError` with a single problem."""
    return RequestError([Problem(where, str(given), rule, remedy)])


def not_installed(where: str, given: object, packages: Iterable[str], extra: str = "train") -> RequestError:
    """The error of a request that needs packages of an extra.

    pip is given a checkout, not a name: the project is published to no index.
    """
    rule = f"it needs packages that are not installed: {', '.join(packages)}"
    return request_error(where, given, rule, f'Install them, in a checkout: pip install ".[{extra}]"')


def first_line(error: BaseException) -> str:
    """What a library's error says, without what follows it; its kind where it says nothing."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """What an error says last, behind a traceback that was put before it; its kind where it says nothing."""
    return _lines(error)[-1]


def without_secrets(text: str) -> str:
    """`text` without what may be secret in URLs, and without the values of environment variables that hold secrets."""
    for name, value in os.environ.items():
        if SECRET.search(name.upper()) and len(value) >= 6:
            text = text.replace(value, "***")
    # signed addresses have it in their query
    return re.sub(r"""(://[^\s?"']+\?)[^\s"']+""", r"\1***", without_logins(text))


def without_logins(text: str) -> str:
    """`text` without users and passwords in URLs; what is to be written there, USER, is nobody's."""
    return re.sub(r"//(?!USER@)[^/@\s]+@", "//***@", text)


def _lines(error: BaseException) -> list[str]:
    return (str(error).strip() or type(error).__name__).splitlines()


def nearest(name: str, known: Iterable[str], limit: int = 3, cutoff: float = 0.0) -> list[str]:
    """The names most like `name`, best first, compared as `plain` has them.

    `cutoff` is how alike they must be, from 0 (the nearest are named however far they are) to 1.
    """
    import difflib  # only where a name is not known: what goes well does not wait for it

    matcher = difflib.SequenceMatcher(b=plain(name))
    scores: dict[str, float] = {}
    for candidate in known:
        matcher.set_seq1(plain(candidate))
        scores[candidate] = matcher.ratio()
    ranked = sorted(scores, key=lambda candidate: -scores[candidate])  # those alike stay in the order of `known`
    return [candidate for candidate in ranked if scores[candidate] >= cutoff][:limit]


def plain(name: str) -> str:
    """`name` as it is compared: lower case, without spaces, hyphens and underscores."""
    return "".join(c for c in name.lower() if c not in " -_")
