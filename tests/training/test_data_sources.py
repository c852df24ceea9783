"""Where data may lie: files, folders and splits, Arrow, the Hub's cache, fsspec; and what is said otherwise."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clusters.errors import RequestError
from qlora_core.data import has_credentials, hub_dataset, without_credentials
from qlora_core.huggingface.hub import HubId
from qlora_core.training.dataset import DataOptions, encode_file
from qlora_core.training.tokenizer import load_tokenizer

ROWS = [{"prompt": f"Ada carried {number}", "completion": " a red cup"} for number in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_csv(path: Path, separator: str = ",") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def every_kind(folder: Path) -> dict[str, Path]:
    import datasets

    kinds = {
        "jsonl": write_jsonl(folder / "a.jsonl"),
        "gzip": write_jsonl(folder / "a.jsonl.gz"),
        "csv": write_csv(folder / "a.csv"),
        "tsv": write_csv(folder / "a.tsv", "\t"),
        "parquet": write_parquet(folder / "a.parquet"),
        "json": folder / "array.json",
        "object": folder / "object.json",
        "lines": write_jsonl(folder / "lines.json"),
        "arrow": folder / "arrow",
        "splits": folder / "splits",
    }
    kinds["json"].write_text(json.dumps(ROWS))
    kinds["object"].write_text(json.dumps({"version": 1, "data": ROWS}))
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(kinds["arrow"]))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(kinds["splits"]))
    return kinds


def test_the_same_rows_are_the_same_tokens_from_every_kind_of_file(tmp_path: Path, tokenizer: Any) -> None:
    reports = {kind: encode_file(path, "auto", tokenizer, 64)[1] for kind, path in every_kind(tmp_path).items()}
    assert {report.examples for report in reports.values()} == {5}
    assert len({report.token_digest for report in reports.values()}) == 1
    assert {report.format for report in reports.values()} == {"prompt-completion"}
    assert encode_file(tmp_path / "splits", "auto", tokenizer, 64, DataOptions(split="test"))[1].examples == 1


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (["b.jsonl", "a.jsonl"], "train", 2),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000.jsonl"], "train", 2),
        (["data/train-00000.jsonl", "data/test-00000.jsonl"], "test", 1),
        (["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz", "helpful-base/train.jsonl.gz"], "train", 2),
        (["validation/0.jsonl", "train/0.jsonl"], "validation", 1),
        ([".hidden/a.jsonl", "constraints.jsonl"], "train", 1),  # "constraints" is no "train"
    ],
)
def test_a_folder_is_read_by_the_splits_that_its_files_name(
    tmp_path: Path, tokenizer: Any, names: list[str], split: str, read: int
) -> None:
    for name in names:
        write_jsonl(tmp_path / name)
    _, report = encode_file(tmp_path, "auto", tokenizer, 64, DataOptions(split=split))
    assert report.examples == 5 * read


def test_a_folder_may_hold_several_kinds_and_a_glob_chooses(tmp_path: Path, tokenizer: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "b.parquet")
    (tmp_path / "README.md").write_text("about it")
    assert encode_file(tmp_path, "auto", tokenizer, 64)[1].examples == 10
    assert encode_file(tmp_path, "auto", tokenizer, 64, DataOptions(files="*.parquet"))[1].examples == 5
    with pytest.raises(RequestError, match=r"data\.split: the folder has no file of that split"):
        encode_file(tmp_path, "auto", tokenizer, 64, DataOptions(split="test"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"a": 1}', "an object with no array"),
        ("a.json", b'{"a": [], "b": []}', "an object with 2 arrays"),
        ("a.json", b'[{"prompt": "x"', "it is not JSON: .* at line 1"),
        ("a.json", b'[{"prompt": "x", "completion": "y"}, 3]', "record 2: it is a JSON int, not an object"),
        ("a.csv", b"prompt,completion\nx,y\nz\n", "line 3: it has another number of fields"),
        ("a.csv", b'prompt,completion\n"x,y\n', "is no CSV"),
        ("a.parquet", b"PAR1 no more", "it cannot be read as Parquet"),
        ("a.jsonl.gz", b"no gzip", "it cannot be read"),
    ],
)
def test_files_that_are_not_what_their_name_says_are_refused(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        encode_file(tmp_path / name, "auto", tokenizer, 64)


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path: Path, tokenizer: Any) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*ROWS, {"prompt": "x", "completion": None}])
    with pytest.raises(RequestError, match=r"a\.parquet, row 6: prompt and completion must be texts"):
        encode_file(path, "auto", tokenizer, 64)


def test_addresses_are_read_through_fsspec(tmp_path: Path, tokenizer: Any) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/one.jsonl", write_jsonl(tmp_path / "a.jsonl").read_bytes())
    memory.pipe("/bucket/sub/train-0.parquet", write_parquet(tmp_path / "a.parquet").read_bytes())
    memory.pipe("/bucket/sub/test-0.parquet", write_parquet(tmp_path / "a.parquet").read_bytes())
    try:
        local, here = encode_file(tmp_path / "a.jsonl", "auto", tokenizer, 64)
        examples, report = encode_file("memory://bucket/one.jsonl", "auto", tokenizer, 64)
        assert list(examples) == list(local)
        assert (report.digest, report.source) == (here.digest, "memory://bucket/one.jsonl")
        assert encode_file("memory://bucket/sub", "auto", tokenizer, 64)[1].examples == 5
        with pytest.raises(RequestError, match="there is no such file"):
            encode_file("memory://bucket/none.jsonl", "auto", tokenizer, 64)
    finally:
        memory.rm("/bucket", recursive=True)


def test_some_files_of_a_folder_that_name_no_split_are_not_passed_over(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        write_jsonl(tmp_path / name)
    with pytest.raises(
        RequestError, match=r"some of its files name a split and others do not: more\.jsonl.*data\.files"
    ):
        encode_file(tmp_path, "auto", tokenizer, 64)
    assert encode_file(tmp_path, "auto", tokenizer, 64, DataOptions(files="t*.jsonl"))[1].examples == 5


@pytest.mark.parametrize(
    ("kind", "given", "wrong"),
    [
        (
            "file",
            {"split": "test", "config": "x", "files": "*", "revision": "v1"},
            ("split", "config", "files", "revision"),
        ),
        ("folder", {"config": "x", "revision": "v1", "files": "*.jsonl", "split": "train"}, ("config", "revision")),
        ("saved", {"split": "train", "revision": "v1"}, ("split", "revision")),
        ("saved splits", {"split": "train", "files": "*"}, ("files",)),
    ],
)
def test_what_means_nothing_for_the_data_is_refused_all_at_once(
    tmp_path: Path, tokenizer: Any, kind: str, given: dict[str, Any], wrong: tuple[str, ...]
) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    path = tmp_path / "data"
    if kind == "saved":
        rows.save_to_disk(path)
    elif kind == "saved splits":
        datasets.DatasetDict({"train": rows}).save_to_disk(path)
    else:
        path = write_jsonl(path / "train.jsonl")
        path = path.parent if kind == "folder" else path
    with pytest.raises(RequestError) as told:
        encode_file(path, "auto", tokenizer, 64, DataOptions(**given))
    assert [problem.where for problem in told.value.problems] == [f"data.{name}" for name in wrong]


def test_a_saved_dataset_keeps_the_columns_that_its_format_leaves_out(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.set_format("numpy", columns=["prompt"])
    rows.save_to_disk(tmp_path / "saved")
    examples, report = encode_file(tmp_path / "saved", "auto", tokenizer, 64)
    assert report.format == "prompt-completion"
    assert list(examples) == list(encode_file(write_jsonl(tmp_path / "a.jsonl"), "auto", tokenizer, 64)[0])


def test_an_address_whose_package_is_missing_says_which(tokenizer: Any) -> None:
    with pytest.raises(RequestError, match=r"pip install gcsfs|cannot be read"):
        encode_file("gs://bucket/train.jsonl", "auto", tokenizer, 64)
    with pytest.raises(RequestError, match="cannot be understood"):
        encode_file("xyzzy://bucket/train.jsonl", "auto", tokenizer, 64)


def test_credentials_in_an_address_are_found_and_left_out() -> None:
    assert has_credentials("s3://key:secret@bucket/a.jsonl")
    assert has_credentials("https://host/a.jsonl?sig=secret")
    assert not has_credentials("s3://bucket/a@b.jsonl")
    assert without_credentials("s3://key:secret@bucket/a.jsonl?sig=secret") == "s3://bucket/a.jsonl"


def test_what_is_written_like_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_dataset("org/name") == HubId("org/name")
    assert hub_dataset("org/name@v1") == HubId("org/name", "v1")
    assert hub_dataset("data/train.jsonl") is None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_dataset("org/name") is None


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: other
  data_files:
  - split: train
    path: other/*.jsonl
---
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset in the Hub's cache, as huggingface_hub lays it out (docs: "Understand caching")."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "datasets--org--name"
    snapshot = repository / "snapshots" / COMMIT
    write_parquet(snapshot / "data" / "train-00000-of-00001.parquet")
    write_parquet(snapshot / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    write_jsonl(snapshot / "other" / "a.jsonl", ROWS[:2])
    (snapshot / "README.md").write_text(CARD)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_dataset_of_the_hub_is_read_offline_from_the_cache_and_named_by_its_commit(
    hub_cache: Path, tokenizer: Any
) -> None:
    def read(path: str = "org/name", **options: Any) -> Any:
        return encode_file(path, "auto", tokenizer, 64, DataOptions(**options))[1]

    report = read()
    assert (report.examples, report.source) == (5, "org/name")
    assert report.digest == f"org/name@{COMMIT} config=default split=train"
    assert read(split="test").examples == 1
    assert read(config="other").examples == 2
    assert read(files="other/*.jsonl").examples == 2
    assert read(f"org/name@{COMMIT}").digest == report.digest
    with pytest.raises(RequestError, match=r"data\.split: org/name has the splits train, test"):
        read(split="validation")
    with pytest.raises(RequestError, match=r"data\.config: .*other"):
        read(config="none")
    with pytest.raises(RequestError, match="HF_HUB_OFFLINE"):
        read("org/unknown")


def test_code_of_a_dataset_is_not_run(hub_cache: Path, tokenizer: Any, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    shutil.rmtree(hub_cache / "data")
    shutil.rmtree(hub_cache / "other")
    (hub_cache / "README.md").write_text("")
    (hub_cache / f"{COMMIT}.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(RequestError, match=r"data\.path: it cannot be read as a dataset"):
        encode_file("org/name", "auto", tokenizer, 64)
    assert not ran.exists()
