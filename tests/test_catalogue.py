"""The specification of the catalogue: every model is what transformers builds, and as large as its makers say."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meta_models import assert_same, on_meta

from clusters.errors import RequestError, plain
from qlora_core import catalogue
from qlora_core.catalogue import find_model, list_models

FOLDER = Path(catalogue.__file__).parent / "models"
ENTRIES = {listed.entry.name: listed.entry for listed in list_models()}
EXACT = {
    # Biderman et al. 2023 (arXiv 2304.01373), model cards: "total params".
    "pythia-410m": 405_334_016,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    # Black et al. 2022 (arXiv 2204.06745), section 2.
    "gpt-neox-20b": 20_554_567_680,
    # Hugging Face's pages of the models: "tensors" of the safetensors, as the Hub counts them.
    "gemma-3-270m": 268_098_176,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    # Radford et al. 2019, as counted from the published checkpoint: 124M.
    "gpt2": 124_439_808,
}
EXACT_WITHOUT_EMBEDDINGS = {
    # Gemma Team 2024 (arXiv 2403.08295), table 2; the published embedding has 256,128 rows, the checkpoint 256,000.
    "gemma-2b": 1_981_884_416,
    "gemma-7b": 7_751_248_896,
}
BILLIONS = {
    # Touvron et al. 2023 (arXiv 2302.13971), table 2.
    "llama-7b": 6.7,
    "llama-13b": 13.0,
    "llama-33b": 32.5,
    "llama-65b": 65.2,
    # Meta's and Hugging Face's model cards.
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.0,
    "llama-2-70b": 69.0,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 405.0,
    "llama-3.2-1b": 1.23,
    "llama-3.2-3b": 3.21,
    "llama-3.3-70b": 70.6,
    "codellama-34b": 33.7,
    # Mistral AI, "Models" page of its documentation: parameters in billions.
    "mistral-7b-v0.1": 7.24,
    "mistral-7b-v0.2": 7.24,
    "mistral-7b-v0.3": 7.25,
    "mistral-nemo-12b": 12.2,
    "mistral-small-24b": 23.6,
    # NVIDIA's Megatron-Bridge: language model plus vision tower
    "ministral-3-3b": 3.4 + 0.4,
    "ministral-3-8b": 8.4 + 0.4,
    "ministral-3-14b": 13.5 + 0.4,
    "mistral-small-3.1-24b": 24.0,
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    # Qwen2 and Qwen2.5 technical reports and model cards.
    "qwen2-7b": 7.6,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.61,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.5,
    "qwen2.5-72b": 72.7,
    "qwen1.5-moe-a2.7b": 14.3,
    # Qwen3 model cards.
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    # llama.cpp's count of the published weights (llama-bench, "params"): the language models alone.
    "qwen3.5-0.8b": 0.75239,
    "qwen3.5-2b": 1.88,
    "qwen3.5-4b": 4.21,
    "qwen3.5-9b": 8.95,
    "qwen3.5-27b": 26.90,
    "qwen3.5-35b-a3b": 34.66,
    # Gemma 2 (arXiv 2408.00118), table 2: embedding plus non-embedding; Gemma 3 (arXiv 2503.19786), table 1.
    "gemma-2b": 2.51,
    "gemma-7b": 8.54,
    "gemma-2-2b": 0.590 + 2.024,
    "gemma-2-9b": 0.917 + 8.324,
    "gemma-2-27b": 1.180 + 26.047,
    "gemma-3-1b": 0.302 + 0.698,
    # Microsoft's model cards.
    "phi-1.5": 1.42,
    "phi-2": 2.78,
    "phi-3-mini": 3.82,
    "phi-3-medium": 14.0,
    "phi-4": 14.7,
    # Zhang et al. 2022 (arXiv 2205.01068), table 1: the names are the sizes.
    "opt-125m": 0.125,
    "opt-1.3b": 1.3,
    "opt-2.7b": 2.7,
    "opt-6.7b": 6.7,
    "opt-13b": 13.0,
    "opt-30b": 30.0,
    "opt-66b": 66.0,
    # Model cards of the makers.
    "falcon-7b": 7.0,
    "falcon-40b": 41.3,
    "smollm2-135m": 0.135,
    "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.71,
    "smollm3-3b": 3.08,
    "tinyllama-1.1b": 1.10,
    "yi-34b": 34.4,
    "stablelm-base-alpha-3b": 3.64,
    "stablelm-3b": 2.795,
    "stablelm-2-1.6b": 1.644,
    "olmo-2-7b": 7.3,
    "olmo-2-13b": 13.7,
    "olmo-2-32b": 32.2,
    "starcoder2-3b": 3.03,
    "starcoder2-7b": 7.17,
    "gpt-j-6b": 6.05,
    "gpt-oss-20b": 20.9,
}


def config_of(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_bytes())
    return fields


@pytest.mark.parametrize("name", ENTRIES)
def test_a_model_is_what_transformers_builds(name: str) -> None:
    assert_same(find_model(name), on_meta(config_of(name)))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_model_is_as_large_as_published(name: str) -> None:
    parameters = find_model(name).parameters
    assert name in EXACT or name in BILLIONS
    assert parameters == EXACT.get(name, parameters)
    assert parameters == pytest.approx(BILLIONS.get(name, parameters / 1e9) * 1e9, rel=0.022)


@pytest.mark.parametrize("name", EXACT_WITHOUT_EMBEDDINGS)
def test_a_model_without_embeddings_is_as_large_as_published(name: str) -> None:
    model = find_model(name)
    assert model.parameters - model.embedding_parameters == EXACT_WITHOUT_EMBEDDINGS[name]


@pytest.mark.parametrize(
    ("alias", "name"),
    [("7b", "llama-7b"), ("13b", "llama-13b"), ("33b", "llama-33b"), ("30b", "llama-33b"), ("65b", "llama-65b")],
)
def test_bare_sizes_are_the_papers_models(alias: str, name: str) -> None:
    assert find_model(alias) == find_model(name)
    assert find_model(alias).name == name


@pytest.mark.parametrize(
    "given",
    ["llama-3.1-8b", "Llama 3.1 8B", "LLAMA_3.1_8b", "meta-llama/Llama-3.1-8B", "meta-llama/llama-3.1-8b-instruct"],
)
def test_case_spaces_hyphens_and_underscores_do_not_matter(given: str) -> None:
    assert find_model(given).name == "llama-3.1-8b"


def test_no_two_models_share_a_name() -> None:
    names = [plain(name) for entry in ENTRIES.values() for name in (entry.name, *entry.aliases, entry.hub)]
    assert len(names) == len(set(names))


def test_every_file_is_listed_and_every_entry_has_its_source() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {"index", *ENTRIES}
    assert all(entry.source and entry.hub.count("/") == 1 for entry in ENTRIES.values())
    assert len(ENTRIES) >= 45


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama-2-7b")))
    model = find_model(str(tmp_path))
    assert model.parameters == 6_738_415_616
    assert model.name == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("lama-3.1-8b", "Did you mean llama-3.1-8b"),
        ("zzz", "qlora-plan --list-models"),
        ("", "qlora-plan --list-models"),
        ("70b", "Did you mean llama-2-70b, llama-3-70b"),
        ("llama-3", "Did you mean llama-3-8b"),
        ("hello world", "(got hello world). qlora-plan --list-models"),  # nothing is like it
        ("Qwen/Qwen3-8C", "Unset HF_HUB_OFFLINE to ask the Hub. Nearest in the catalogue: Qwen/Qwen3-8B"),
        ("someone/something", "to ask the Hub. Give a folder"),
        ("/no/such/folder", "there is no such folder"),
        ("./models/mine", "there is no such folder"),
        ("x" * 5000, "neither a catalogue name nor a folder"),
        ("a\0b", "neither a catalogue name nor a folder"),
    ],
    ids=["slip", "unknown", "empty", "end", "start", "far", "hub slip", "hub", "folder", "relative", "long", "zero"],
)
def test_what_is_not_found_is_one_helpful_error(given: str, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        find_model(given)
    assert [problem.where for problem in caught.value.problems] == ["--model"]
    assert says in str(caught.value).replace(" (got Qwen/Qwen3-8C)", "")


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ("mine/config.json", "mine"),
        ("./mine/model.gguf", "./mine"),
        ("config.json", "."),
        ("some/org/model.bin", "some/org"),
    ],
)
def test_a_file_is_told_as_one_and_its_folder_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, folder: str
) -> None:
    """`mine/config.json` could be the Hub id of the model config.json of mine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / given).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / given).write_text("{}")
    for name in (given, str(tmp_path / given)):
        with pytest.raises(RequestError, match="--model: it is a file") as caught:
            find_model(name)
        own = folder if name == given else str(Path(name).parent)
        assert str(caught.value) == f"--model: it is a file (got {name}). Give its folder, {own}."


def test_a_file_called_as_a_model_of_the_catalogue_hides_it_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7b").write_text("a log")
    assert find_model("7b").name == "llama-7b"


@given(st.text(max_size=40))
def test_any_name_is_a_model_or_a_request_error(given: str) -> None:
    with suppress(RequestError):
        find_model(given)


def test_finding_one_model_reads_two_files_and_no_yaml() -> None:
    code = (
        "import sys; from pathlib import Path; read = []; original = Path.read_bytes;"
        "Path.read_bytes = lambda self: read.append(self.name) or original(self);"
        "from qlora_core.catalogue import find_model; find_model('65b');"
        "assert read == ['index.json', 'llama-65b.json'], read;"
        "assert not {'yaml', 'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
