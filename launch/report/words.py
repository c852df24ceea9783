"""Sizes and times as people read them."""

from __future__ import annotations

GIB, MIB = 1024**3, 1024**2


def gib(value: int) -> str:
    """Bytes as GiB; as MiB below a tenth of one."""
    return f"{value / GIB:.2f} GiB" if abs(value) >= GIB // 10 else f"{value / MIB:.2f} MiB"


def time_words(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
