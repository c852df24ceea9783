"""Models by an address of fsspec's: copied once, whole or not at all, and without what is not to be read."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
import yaml
from s3_server import new_bucket, s3_server

from clusters.errors import RequestError
from orchestrator.base import base_on_this_node, find_base
from orchestrator.identity import model_fingerprint
from orchestrator.prepare import prepare
from orchestrator.spec import load_spec
from qlora_core.remote import model_folder, told

ADDRESS = "memory://bucket/model"


@pytest.fixture
def bucket(tiny_base: Path) -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    for file in tiny_base.iterdir():
        memory.pipe(f"/bucket/model/{file.name}", file.read_bytes())
    memory.pipe("/bucket/model/pytorch_model.bin", b"a pickle")
    memory.pipe("/bucket/model/modeling.py", b"raise SystemExit")
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_run_takes_its_model_from_an_address(
    bucket: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache" / "tokens"))
    specification = tmp_path / "run.yaml"
    fields = {"name": "a", "model": ADDRESS, "data": {"path": "train.jsonl"}, "output": "out"}
    specification.write_text(yaml.safe_dump(fields))
    said: list[str] = []
    base = find_base(load_spec(specification), said.append)
    assert (base.name, base.commit) == (ADDRESS, None)
    assert base.folder.parent == tmp_path / "cache" / "models"
    copied = {file.name: file.read_bytes() for file in base.folder.iterdir()}
    assert copied == {file.name: file.read_bytes() for file in tiny_base.iterdir()}
    assert len(said) == len(copied)
    # known by its content, wherever it lies
    local = load_spec(specification, [f"model={tiny_base}"])
    assert base.identity == find_base(local, said.append).identity


def test_a_node_that_has_no_copy_makes_one_for_all_its_workers(
    bucket: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache" / "tokens"))
    there, identity = tmp_path / "planned" / "here", model_fingerprint(tiny_base)
    with ThreadPoolExecutor(2) as workers:
        found = set(workers.map(lambda _: base_on_this_node(there, ADDRESS, None, identity), range(2)))
    [folder] = found
    assert folder.parent == tmp_path / "cache" / "models"
    assert [each.name for each in folder.parent.iterdir() if each.is_dir()] == [folder.name]
    assert base_on_this_node(tiny_base, str(tiny_base), None, identity) == tiny_base
    bucket.pipe("/bucket/model/config.json", (tiny_base / "config.json").read_bytes() + b" ")
    with pytest.raises(RequestError, match="is another model than the run was planned for"):
        base_on_this_node(there, ADDRESS, None, identity)
    with pytest.raises(RequestError, match="does not see that folder"):
        base_on_this_node(there, str(there), None, identity)


def test_model_and_data_come_from_a_real_s3(
    tiny_base: Path, conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache" / "tokens"))
    with s3_server("a-secret-of-mine") as environment:
        bucket = new_bucket(environment, monkeypatch)
        storage = s3fs.S3FileSystem()
        for file in tiny_base.iterdir():
            storage.put_file(str(file), f"{bucket}/models/tiny/{file.name}")
        storage.put_file(str(conversations), f"{bucket}/data/train.jsonl")
        specification = tmp_path / "run.yaml"
        fields = {
            "name": "a",
            "model": f"s3://{bucket}/models/tiny",
            "data": {"path": f"s3://{bucket}/data/train.jsonl"},
            "recipe": {"seq_len": 64, "tokens_per_step": 512},
            "output": "out",
        }
        specification.write_text(yaml.safe_dump(fields))
        prepared = prepare(load_spec(specification))
        here = prepare(load_spec(specification, [f"model={tiny_base}", f"data.path={conversations}"]))
    # the same run, wherever its files lie
    assert prepared.identity == here.identity
    assert len(prepared.train) == len(here.train) > 0


def test_it_is_copied_once_and_again_when_it_has_changed(bucket: Any, tmp_path: Path) -> None:
    said: list[str] = []
    first = model_folder(ADDRESS, tmp_path, said.append)
    copies = len(said)
    assert model_folder(ADDRESS, tmp_path, said.append) == first
    assert len(said) == copies
    bucket.pipe("/bucket/model/generation_config.json", b"{}")
    second = model_folder(ADDRESS, tmp_path, said.append)
    assert second != first
    assert (second / "generation_config.json").read_bytes() == b"{}"


def test_of_a_copy_that_broke_off_nothing_is_left(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = type(bucket).get_file

    def cut_short(self: Any, source: str, target: str, **options: Any) -> None:
        whole(self, source, target, **options)
        if source.endswith("model.safetensors"):
            Path(target).write_bytes(Path(target).read_bytes()[:-1])

    monkeypatch.setattr(type(bucket), "get_file", cut_short)
    with pytest.raises(RequestError, match=r"model\.safetensors\)\. Try again|did not come whole"):
        model_folder(ADDRESS, tmp_path, lambda text: None)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("memory://bucket/none", "there is no such file or folder"),
        ("memory://bucket", r"there is no config\.json"),
        ("xyzzy://bucket/model", "cannot be understood"),
    ],
)
def test_an_address_without_a_model_is_refused(bucket: Any, tmp_path: Path, address: str, rule: str) -> None:
    with pytest.raises(RequestError, match=f"^model: {rule}|^model: it {rule}"):
        model_folder(address, tmp_path, lambda text: None)


def test_a_disk_that_is_full_here_is_no_fault_of_the_address() -> None:
    with pytest.raises(RequestError, match="finds no space on this machine"), told("data.path", "s3://bucket/x"):
        raise OSError(errno.ENOSPC, "No space left on device")
