"""Which checkpoint is trusted: damage of every kind to every file is found, and the last valid one is never let go."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import FILES
from small_runs import stand_in_checkpoint as make

from clusters.errors import RunFailed
from qlora_core.training import manifest
from qlora_core.training.manifest import InvalidCheckpoint, check, complete, newest_valid, put_aside, retire


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, **changes: Any) -> None:
    """Let a manifest say something else, with the digest of that."""
    fields = {**json.loads((folder / manifest.FILE_NAME).read_text()), **changes}
    del fields["digest"]
    (folder / manifest.FILE_NAME).write_text(json.dumps({**fields, "digest": manifest.digest(fields)}))


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [*FILES, manifest.FILE_NAME])
def test_any_damage_to_any_file_makes_the_one_before_the_newest(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    older, newer = make(tmp_path, 10), make(tmp_path, 20)
    assert newest_valid(tmp_path) == (newer, [])
    harm(newer / name)
    found, (skipped,) = newest_valid(tmp_path)
    assert found == older
    assert skipped.folder == newer
    assert name in skipped.reason
    assert put_aside(skipped).name == "step-00000020.damaged"
    assert newest_valid(tmp_path) == (older, [])
    assert complete(tmp_path) == {10: older}


def test_each_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = make(tmp_path, 7) / manifest.FILE_NAME
    whole = path.read_bytes()
    for place in range(0, len(whole), 17):
        for bit in (1, 16):
            harmed = bytearray(whole)
            harmed[place] ^= bit
            path.write_bytes(harmed)
            try:
                same = json.loads(harmed) == json.loads(whole)  # such as another kind of white space
            except ValueError:
                same = False
            if not same:
                with pytest.raises((InvalidCheckpoint, RunFailed)):
                    check(path.parent)


def test_a_folder_without_a_manifest_or_a_name_is_none(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.1.tmp").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "step-00000005").mkdir()
    found, skipped = newest_valid(tmp_path)
    assert found is None
    assert [one.folder.name for one in skipped] == [".step-00000007.1.tmp", "step-00000005"]
    assert "not finished" in skipped[0].reason
    put_aside(skipped[0])
    assert not skipped[0].folder.exists()
    assert newest_valid(tmp_path / "none") == (None, [])


def test_a_damaged_one_of_the_same_name_is_kept_beside_the_other(tmp_path: Path) -> None:
    for expected in ("step-00000003.damaged", "step-00000003.damaged-2"):
        flip(make(tmp_path, 3) / FILES[0])
        _, (skipped,) = newest_valid(tmp_path)
        assert put_aside(skipped).name == expected


@pytest.mark.parametrize(("keep", "stay"), [(1, [20]), (2, [15, 20]), (9, [5, 10, 15, 20])])
def test_the_last_few_stay(tmp_path: Path, keep: int, stay: list[int]) -> None:
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    retire(tmp_path, keep)
    assert list(complete(tmp_path)) == stay


def test_the_last_valid_one_outlives_newer_ones_that_are_not(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        make(tmp_path, step)
    flip(tmp_path / "step-00000020" / FILES[2])
    flip(tmp_path / "step-00000015" / FILES[0])
    assert [path.name for path in retire(tmp_path, 1)] == ["step-00000005"]
    assert newest_valid(tmp_path)[0] == tmp_path / "step-00000010"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "adapter/../../secret", "link"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = make(tmp_path, 4)
    (folder / "link").symlink_to(tmp_path / "secret")
    files = json.loads((folder / manifest.FILE_NAME).read_text())["files"]
    rewrite(folder, files={**files, name: manifest.described(tmp_path, ["secret"])["secret"]})
    with pytest.raises(InvalidCheckpoint, match="outside its folder"):
        check(folder)


def test_another_version_s_checkpoint_stops_the_run_rather_than_being_passed_over(tmp_path: Path) -> None:
    make(tmp_path, 10)
    later = make(tmp_path, 20) / manifest.FILE_NAME
    rewrite(later.parent, format_version=99)
    with pytest.raises(RunFailed, match=r"format version 99, this program reads 2"):
        newest_valid(tmp_path)
    later.write_text('{"format_version": 1, "step": 3}')  # as the first version wrote it
    with pytest.raises(RunFailed, match="format version 1"):
        newest_valid(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"step": 3}', "[]", "[" * 200_000, '{"format_version": "2"}', "\ud83d"])
def test_what_is_no_manifest_is_passed_over(tmp_path: Path, text: str) -> None:
    older, newer = make(tmp_path, 10), make(tmp_path, 20)
    (newer / manifest.FILE_NAME).write_text(text, encoding="utf-8", errors="surrogatepass")
    found, (skipped,) = newest_valid(tmp_path)
    assert (found, skipped.folder) == (older, newer)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"step": -1}, "step"),
        ({"step": "../../x"}, "step"),
        ({"step": True}, "step"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": 2}, "lists no optimizer-00001.safetensors"),
        ({"context": None}, "context"),
        ({"files": []}, "files"),
        ({"files": {}}, "lists no optimizer-00000.safetensors"),
        ({"files": {"rank-00000.json": None}}, r"files\.rank-00000\.json"),
        ({"files": {"rank-00000.json": {"bytes": 3}}}, r"files\.rank-00000\.json\.sha256"),
    ],
)
def test_a_manifest_with_its_digest_and_another_shape_is_passed_over(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    older = make(tmp_path, 10)
    rewrite(make(tmp_path, 20), **wrong)
    found, (skipped,) = newest_valid(tmp_path)
    assert found == older
    assert re.search(said, skipped.reason)


@pytest.mark.parametrize("name", ["nul\0", "half \ud83d", "loop", "x" * 300])
def test_a_manifest_that_names_what_can_be_no_file_is_passed_over(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, 10)
    (folder / "loop").symlink_to("loop")
    files = json.loads((folder / manifest.FILE_NAME).read_text())["files"]
    rewrite(folder, files={**files, name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(InvalidCheckpoint):
        check(folder)


def test_weights_that_are_not_listed_are_not_loaded(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    files = json.loads((folder / manifest.FILE_NAME).read_text())["files"]
    rewrite(folder, files={name: facts for name, facts in files.items() if name != FILES[0]})
    with pytest.raises(InvalidCheckpoint, match="lists no weights"):
        check(folder)


def test_a_name_that_is_not_its_manifest_s_step_is_passed_over_and_takes_no_valid_one_s_place(tmp_path: Path) -> None:
    make(tmp_path, 8).rename(tmp_path / "step-00000010")
    older = make(tmp_path, 6)
    found, (skipped,) = newest_valid(tmp_path)
    assert found == older
    assert skipped.reason == "its checkpoint.json is of step 8"
    assert manifest.after_step(tmp_path, 10) is None
    make(tmp_path, 4)
    assert retire(tmp_path, 1) == [tmp_path / "step-00000004"]


def test_a_copy_elsewhere_is_as_good(tmp_path: Path) -> None:
    shutil.copytree(make(tmp_path, 6), tmp_path / "elsewhere" / "step-00000006")
    assert newest_valid(tmp_path / "elsewhere")[0] == tmp_path / "elsewhere" / "step-00000006"
