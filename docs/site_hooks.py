"""The site: the README is its front page, files that are linked to get pages, references come from the code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FRONT = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Documents beside this folder, and what they are on the site."""
LINK = re.compile(r"(\]\()(?!https?://|#|mailto:)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".toml": "toml"}
SPECIFICATION, COMMANDS = "<!-- the fields -->", "<!-- the commands -->"
"""What stands in a document where a reference is to be made from the code."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents beside this folder, and a page for each file or folder that a document links to."""
    linked: set[Path] = set()
    for name, on_site in FRONT.items():
        files.append(File.generated(config, on_site, content=(ROOT / name).read_text(encoding="utf-8")))
        linked |= targets(ROOT / name)
    for document in (ROOT / "docs").rglob("*.md"):
        linked |= targets(document)
    for path in sorted(linked):
        if outside(path):
            files.append(File.generated(config, site_path(path), content=shown(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files into links to their pages, and fill in the fields of a specification."""
    place = page.file.src_uri
    if place.startswith("files/"):
        return markdown
    source = next((ROOT / name for name, on_site in FRONT.items() if on_site == place), ROOT / "docs" / place)

    def moved(link: re.Match[str]) -> str:
        target = (source.parent / link[2]).resolve()
        relative = os.path.relpath(site_path(target), Path(place).parent)
        return link[1] + relative.replace(os.sep, "/")

    for place_of, made in ((SPECIFICATION, specification), (COMMANDS, commands)):
        if place_of in markdown:
            return markdown.replace(place_of, "\n".join(made()))
    return LINK.sub(moved, markdown)


def targets(document: Path) -> set[Path]:
    """All files that a document links to."""
    return {(document.parent / target).resolve() for _, target in LINK.findall(document.read_text(encoding="utf-8"))}


def outside(path: Path) -> bool:
    """Whether a file is neither a document nor a picture of one."""
    return path.exists() and not path.is_relative_to(ROOT / "docs") and path.name not in FRONT


def site_path(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path.is_relative_to(ROOT / "docs"):
        return path.relative_to(ROOT / "docs").as_posix()
    inside = path.relative_to(ROOT).as_posix()
    return FRONT.get(inside, f"files/{inside}.md")


def shown(path: Path) -> str:
    """A file as a page, or what a folder has."""
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return title + "\n".join(f"- `{each.name}`" for each in sorted(path.iterdir()) if not each.name.startswith("_"))
    return title + f"``````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}\n``````\n"


def commands() -> Iterator[str]:
    """What `--help` says of each command."""
    from launch.capacity import capacity
    from launch.command import WithSubcommands
    from launch.plan import plan
    from launch.submit import submit
    from launch.train import train

    for command in (plan, train, submit, capacity):
        if not isinstance(command, WithSubcommands) or command.name is None:
            raise TypeError(command)
        yield from help_of(command, command.name, "##")
        for name, inner in command.subcommands.items():
            yield from help_of(inner, f"{command.name} {name}", "###")


def help_of(command: click.Command, name: str, heading: str) -> Iterator[str]:
    """A command's help under its name."""
    context = click.Context(command, info_name=name, max_content_width=84)
    context.terminal_width = 84
    yield f"\n{heading} {name}\n\n```text\n{click.Command.get_help(command, context)}\n```"


def specification() -> Iterator[str]:
    """The fields of a run's specification, a table for each section, from its schema."""
    from orchestrator.spec import schema as described

    schema = described()
    sections: dict[str, Mapping[str, Any]] = {"": schema}
    for name, field in schema["properties"].items():
        for inner in references(field):
            sections[name] = schema["$defs"][inner]
    for name, section in sections.items():
        yield f"\n## {f'`{name}`' if name else 'The file'}\n"
        if name and "description" in section:
            yield f"{section['description'].splitlines()[0]}\n"
        yield "| field | may be | left out | |\n| --- | --- | --- | --- |"
        required = section.get("required", ())
        for field, about in section["properties"].items():
            left_out = "required" if field in required else f"`{json.dumps(about.get('default'))}`"
            if not name and field in sections:
                left_out, kind = ("required" if field in required else "its defaults"), f"[section](#{field})"
            else:
                kind = " or ".join(kinds(about, schema))
            text = str(about.get("description", "")).replace("\n", " ").replace("|", "\\|").replace("``", "`")
            yield f"| `{field}` | {kind} | {left_out} | {text} |"


def references(field: Mapping[str, Any]) -> Iterator[str]:
    """The names of the sections that a field may be."""
    for member in (field, *field.get("anyOf", ())):
        if "$ref" in member:
            yield str(member["$ref"]).rsplit("/", 1)[1]


def kinds(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """What a field may be, in words."""
    if "anyOf" in field:
        for member in field["anyOf"]:
            yield from kinds(member, schema)
    elif "$ref" in field:
        yield from kinds(schema["$defs"][str(field["$ref"]).rsplit("/", 1)[1]], schema)
    elif "enum" in field:
        yield from (f"`{value}`" for value in field["enum"])
    elif "const" in field:
        yield f"`{field['const']}`"
    else:
        bounds = [
            f"{word} {field[key]:g}"
            for key, word in (
                ("minimum", "from"),
                ("exclusiveMinimum", "above"),
                ("maximum", "to"),
                ("exclusiveMaximum", "below"),
            )
            if key in field and abs(field[key]) < 1e9
        ]
        yield " ".join([{"null": "nothing"}.get(field.get("type", ""), str(field.get("type", "any"))), *bounds])
