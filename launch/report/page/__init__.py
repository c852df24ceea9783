"""Pages for a browser: their templates, and what fills them."""

from __future__ import annotations

from pathlib import Path

import jinja2


def environment() -> jinja2.Environment:
    """What fills the templates of this folder; all texts are escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("launch.report.page", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def asset(name: str) -> bytes:
    """A file of this folder."""
    return (Path(__file__).parent / name).read_bytes()
