"""Numbers of tokens as people write them."""

from __future__ import annotations

UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
MOST = 10**18


def parse_tokens(text: str) -> int:
    """12500000, 12.5M, 3e8, 3B.

    Raises:
        ValueError: it is none, or not between 1 and 1e18.
    """
    plain = text.strip().lower().replace("_", "")
    unit = UNITS.get(plain[-1:], 1)
    try:
        tokens = round(float(plain[:-1] if unit > 1 else plain) * unit)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no number of tokens, such as 12500000, 12.5M or 3B") from None
    if not 1 <= tokens <= MOST:
        raise ValueError(f"{text!r} tokens are not between 1 and 1e18")
    return tokens
