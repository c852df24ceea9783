"""A report as sections, and its forms: the terminal, Markdown, a page of its own, and pictures as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusters.errors import not_installed, request_error
from launch.report.words import echo, number_of
from qlora_core.files import replace_atomically

if TYPE_CHECKING:
    from rich.console import RenderableType

    from launch.report.pictures.style import Picture

FLAG = "--report"
PIPED_WIDTH = 160
"""Columns where there is no terminal: nothing is cut off."""
DRAWS = ("jinja2", "matplotlib")
"""What a page needs; the extra `report`."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a report: sentences, a picture, a table, a remark, as far as it has them.

    Attributes:
        title: its heading.
        columns: of the table; those whose names begin with a blank are numbers, and where all are blank there is no
            head.
        rows: of the table.
        note: what is to be known of the table.
        text: paragraphs before it.
        draw: makes the picture, where a form shows one; None where there is nothing to be seen.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    note: str = ""
    text: tuple[str, ...] = ()
    draw: Callable[[], Picture | None] | None = None

    @property
    def headed(self) -> bool:
        """Whether the table has a head."""
        return any(name.strip() for name in self.columns)

    @property
    def worded(self) -> bool:
        """Whether there is more to it than a picture."""
        return bool(self.text or self.rows or self.note)


@dataclass(frozen=True, slots=True)
class Document:
    """A report: its title, and its sections in order."""

    title: str
    sections: tuple[Section, ...]


def drawn(room: str, name: str, *arguments: Any) -> Callable[[], Picture | None]:
    """For a section: makes that picture of a module of `launch.report.pictures` once, when a form first shows it.

    What draws takes a while to import, and the terminal does without.
    """

    @cache
    def make() -> Picture | None:
        picture: Picture | None = getattr(import_module(f"launch.report.pictures.{room}"), name)(*arguments)
        return picture

    return make


def numeric(column: str) -> bool:
    """Whether a column's cells are numbers."""
    return column.startswith(" ") and bool(column.strip())


# --- forms ------------------------------------------------------------------------------------------------------------


def show(document: Document) -> None:
    """Print it, without pictures."""
    from rich.table import Table
    from rich.text import Text

    printed: list[RenderableType] = []
    for number, section in enumerate(filter(attrgetter("worded"), document.sections)):
        printed += [*([""] if number else []), Text(section.title, style="bold"), *section.text]
        if section.rows:
            grid = Table(box=None, show_header=section.headed)
            for name in section.columns:
                grid.add_column(name.strip(), justify="right" if numeric(name) else "left")
            for row in section.rows:
                grid.add_row(*row)
            printed.append(grid)
        printed += [section.note] if section.note else []
    echo(*printed, piped_width=PIPED_WIDTH)


def markdown(document: Document) -> str:
    """It as a Markdown document, without pictures."""
    parts = [f"# {escaped(document.title)}"]
    for section in filter(attrgetter("worded"), document.sections):
        parts += [f"## {escaped(section.title)}", *map(escaped, section.text)]
        if section.rows:
            lines = [
                f"| {' | '.join(escaped(name.strip()) for name in section.columns)} |",
                f"| {' | '.join('---:' if name.startswith(' ') else '---' for name in section.columns)} |",
                *(f"| {' | '.join(map(escaped, row))} |" for row in section.rows),
            ]
            parts.append("\n".join(lines))
        parts += [escaped(section.note)] if section.note else []
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` as Markdown shows it, on one line: no markup of a name's own, and no HTML."""
    for sign in ("\\", "|", "*", "_", "`", "[", "]"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")


def html(document: Document) -> str:
    """It as a page of its own: no network, light and dark, tables that sort, pictures.

    Raises:
        RequestError: a package that draws or fills the page is missing.
    """
    try:
        import markupsafe

        from launch.report.page import environment
        from launch.report.pictures.style import inline
    except ImportError as error:
        raise not_installed(FLAG, "FILE.html", [str(error.name)], extra="report") from error
    sections = []
    for section in document.sections:
        picture = None if section.draw is None else section.draw()
        if picture is None and not section.worded:
            continue
        sections.append(
            {
                "title": section.title,
                "text": section.text,
                # matplotlib escapes the texts of its SVG
                "svg": None if picture is None else markupsafe.Markup(inline(picture)),  # noqa: S704
                "caption": "" if picture is None else picture.caption,
                "headed": section.headed,
                "columns": [{"name": name.strip(), "number": numeric(name)} for name in section.columns],
                "rows": section.rows,
                "note": section.note,
            }
        )
    template = environment().get_template("report.html.j2")
    return template.render(title=document.title, sections=sections, number_of=number_of)


FORMS = {".md": markdown, ".html": html}


def check_report(path: Path) -> None:
    """Raise a RequestError for an ending that names no form of a report."""
    if path.suffix.lower() not in FORMS:
        raise request_error(FLAG, path, "its ending names no form of a report", "Write FILE.html or FILE.md")


def write(document: Document, path: Path) -> None:
    """Write a report in the form that the file's ending names; a file of that name is replaced, whole or not at all.

    Raises:
        RequestError: another ending, a package is missing, or it cannot be written.
    """
    check_report(path)
    text = FORMS[path.suffix.lower()](document)
    try:
        with replace_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        rule = f"it cannot be written: {error.strerror or error}"
        raise request_error(FLAG, path, rule, "Choose a folder that can") from error


def write_figures(document: Document, folder: Path) -> None:
    """Write a report's pictures, each as NAME.svg and NAME.png, into a folder, which is made.

    Raises:
        RequestError: a package is missing, or they cannot be written.
    """
    try:
        from launch.report.pictures.style import save
    except ImportError as error:
        raise not_installed("--figures", "", [str(error.name)], extra="report") from error
    pictures = [picture for section in document.sections if section.draw and (picture := section.draw())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            save(picture, folder)
    except OSError as error:
        rule = f"they cannot be written: {error.strerror or error}"
        raise request_error("--figures", folder, rule, "Choose a folder that can") from error
