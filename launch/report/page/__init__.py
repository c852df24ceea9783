"""Pages for a browser: their templates, and what fills them."""

from __future__ import annotations

import jinja2


def environment() -> jinja2.Environment:
    """What fills the templates of this folder; all texts are escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("launch.report.page", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
