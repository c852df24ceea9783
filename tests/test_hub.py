"""Models by Hub id, asked of a stand-in Hub on loopback: real huggingface_hub, real cache, real commands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_in_hub import StandInHub, files_of, serve

from qlora_core import catalogue
from qlora_core.catalogue import hub_id
from qlora_core.huggingface.hub import HubId, parse_hub_id

CONFIG = (Path(catalogue.__file__).parent / "models" / "tinyllama-1.1b.json").read_bytes()
TOKEN = "hf_thisIsATokenThatNobodyMaySee"  # noqa: S105  (nobody's)
SETTINGS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_OFFLINE")


@dataclass
class User:
    """Someone with a Hub cache of their own, who knows of one Hub."""

    folder: Path
    endpoint: str

    def run(self, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(SETTINGS) and not name.lower().endswith("_proxy")
        }
        own = {
            "HF_HOME": str(self.folder / "hf"),
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "QLORA_LEDGER": str(self.folder / "ledger.sqlite"),
            "COLUMNS": "200",
        }
        done = subprocess.run(
            [Path(sys.executable).with_name(command), *arguments],
            env={**inherited, **own, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert TOKEN not in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def plan(self, model: str, **environment: str) -> dict[str, Any]:
        """The JSON of a plan that is made."""
        done = self.run("qlora-plan", "--model", model, "--json", **environment)
        assert done.returncode == 0, done.stderr
        assert "huggingface" not in done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def refusal(self, model: str, **environment: str) -> str:
        """The message of a plan that is refused."""
        done = self.run("qlora-plan", "--model", model, **environment)
        assert done.returncode == 2, done.stdout
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        return done.stderr


@pytest.fixture
def stand_in_hub() -> Iterator[StandInHub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def user(tmp_path: Path, stand_in_hub: StandInHub) -> User:
    return User(tmp_path, stand_in_hub.url)


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1", HubId("org/name", "v1")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("name", None),
        ("./name", None),
        ("../name", None),
        ("~/name", None),
        ("/name", None),
        ("name/", None),
        ("a/b/c", None),
        ("me@host/name", None),
    ],
)
def test_a_hub_id_is_an_organization_and_a_name(text: str, hub: HubId | None) -> None:
    assert parse_hub_id(text) == hub


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("llama-2-7b", HubId("meta-llama/Llama-2-7b-hf")),
        ("Llama 2 7B", HubId("meta-llama/Llama-2-7b-hf")),
        ("llama-2-7b@main", HubId("meta-llama/Llama-2-7b-hf", "main")),
        ("meta-llama/Llama-3.1-8B-Instruct", HubId("meta-llama/Llama-3.1-8B-Instruct")),
        ("meta-llama/llama-3.1-8b-instruct", HubId("meta-llama/Llama-3.1-8B-Instruct")),
        ("yi-1.5-34b", HubId("01-ai/Yi-1.5-34B")),
        ("yi-34b", HubId("01-ai/Yi-34B")),
        ("65b", HubId("huggyllama/llama-65b")),
        ("someone/something@v2", HubId("someone/something", "v2")),
        ("nonsense", None),
    ],
)
def test_a_name_of_the_catalogue_means_the_weights_it_names_and_not_a_sibling_of_the_same_shape(
    name: str, hub: HubId | None
) -> None:
    assert hub_id(name) == hub


def test_a_plan_by_id_from_a_stand_in_hub_names_the_commit(user: User, stand_in_hub: StandInHub) -> None:
    commit = stand_in_hub.publish("org/model", {"config.json": CONFIG})
    model = user.plan("org/model")["model"]
    assert model["name"] == "org/model"
    assert model["parameters"] == 1_100_048_384  # the TinyLlama repository: 1.1B; counted from its published weights
    assert model["source"] == f"{stand_in_hub.url}/org/model/blob/{commit}/config.json"


def test_a_revision_is_a_branch_or_a_commit(user: User, stand_in_hub: StandInHub) -> None:
    changed = json.dumps({**json.loads(CONFIG), "num_hidden_layers": 2}).encode()
    old = stand_in_hub.publish("org/model", {"config.json": CONFIG})
    new = stand_in_hub.publish("org/model", {"config.json": changed}, branch="small")
    assert user.plan("org/model@small")["model"]["layers"] == 2
    assert user.plan(f"org/model@{old}")["model"]["layers"] == 22
    assert new in user.plan("org/model@small")["model"]["source"]


def test_the_catalogue_asks_no_hub(user: User, stand_in_hub: StandInHub) -> None:
    user.plan("65b")
    user.plan("meta-llama/Llama-3.1-8B")
    assert stand_in_hub.requests == []


def test_a_folder_comes_before_a_hub_id_of_that_name(user: User, stand_in_hub: StandInHub) -> None:
    folder = user.folder / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    assert user.plan("org/model")["model"]["source"] == str(folder / "config.json")
    assert stand_in_hub.requests == []


def test_what_was_read_once_needs_no_network_again(tmp_path: Path) -> None:
    with serve() as stand_in_hub:
        user = User(tmp_path, stand_in_hub.url)
        commit = stand_in_hub.publish("org/model", {"config.json": CONFIG})
        first = user.plan("org/model")
        stand_in_hub.requests.clear()
        assert user.plan(f"org/model@{commit}") == first
        assert stand_in_hub.requests == []  # a commit never changes
        assert user.plan("org/model", HF_HUB_OFFLINE="1") == first
        assert stand_in_hub.requests == []
        stand_in_hub.status = 503
        assert user.plan("org/model") == first
    assert user.plan("org/model") == first  # the server is gone
    assert user.plan("org/model", HF_HUB_CACHE=str(tmp_path / "hf" / "hub"), HF_HOME=str(tmp_path)) == first


def test_a_private_model_is_read_with_the_token(user: User, stand_in_hub: StandInHub) -> None:
    stand_in_hub.publish("org/mine", {"config.json": CONFIG})
    stand_in_hub.repositories["org/mine"].token = TOKEN
    assert user.plan("org/mine")["model"]["name"] == "org/mine"
    message = user.refusal("org/mine", HF_HOME=str(user.folder / "other"), HF_TOKEN="")
    assert "no model on" in message
    assert "HF_TOKEN" in message


def test_a_gated_model_names_the_licence_page_and_the_token(user: User, stand_in_hub: StandInHub) -> None:
    stand_in_hub.publish("org/gated", {"config.json": CONFIG})
    stand_in_hub.repositories["org/gated"].gated = True
    message = user.refusal("org/gated")
    assert "--model: it is gated" in message
    assert f"Accept the licence at {stand_in_hub.url}/org/gated, and set HF_TOKEN" in message


def test_what_a_stand_in_hub_does_not_have_is_one_message(user: User, stand_in_hub: StandInHub) -> None:
    stand_in_hub.publish("org/model", {"config.json": CONFIG})
    stand_in_hub.publish("org/gguf", {"model.Q4_K_M.gguf": b"GGUF"})
    stand_in_hub.publish("org/adapter", {"adapter_config.json": b"{}"})
    stand_in_hub.publish("org/broken", {"config.json": b"{"})
    stand_in_hub.publish("org/t5", {"config.json": b'{"model_type": "t5"}'})
    assert "there is no folder of that name, and no model on http" in user.refusal("org/none")
    assert "no branch, tag or commit v9" in user.refusal("org/model@v9")
    assert "has no config.json, but GGUF files" in user.refusal("org/gguf")
    assert "it is a LoRA adapter" in user.refusal("org/adapter")
    assert "/config.json: is not valid JSON" in user.refusal("org/broken")
    assert "an encoder-decoder is not a causal language model" in user.refusal("org/t5")
    assert "Nearest in the catalogue: Qwen/Qwen3-8B" in user.refusal("Qwen/Qwen3-8C")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_an_answer_that_says_nothing_more_is_told_by_its_number(
    user: User, stand_in_hub: StandInHub, status: int
) -> None:
    stand_in_hub.status = status
    begun = time.monotonic()
    message = user.refusal("org/model")
    assert "--model: " in message
    assert str(status) in message or "no model on" in message  # the library takes 401 for a repository that is missing
    assert time.monotonic() - begun < 120


def test_an_id_or_revision_that_cannot_be_one_is_refused(user: User, stand_in_hub: StandInHub) -> None:
    for given in ("org/na me", "org/--x", "org/a..b", f"org/{'x' * 100}"):
        assert "neither a folder nor a Hub id" in user.refusal(given)
    for given in ("org/model@", "org/model@../../x", "org/model@a b"):
        assert "what follows the @ is no revision" in user.refusal(given)
    assert stand_in_hub.requests == []


def test_an_unreachable_hub_is_told_within_seconds(user: User) -> None:
    begun = time.monotonic()
    message = user.refusal("org/model", HF_ENDPOINT=f"http://user:secret@127.0.0.1:{free_port()}")
    assert time.monotonic() - begun < 120
    assert "Connection refused" in message
    assert "Give a folder with its config.json, or a name of the catalogue" in message
    assert "secret" not in message


def test_a_hub_that_accepts_and_never_answers_is_not_waited_for(user: User) -> None:
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        message = user.refusal("org/model", HF_ENDPOINT=endpoint)
        assert time.monotonic() - begun < 120
        assert "ReadTimeout" in message
        begun = time.monotonic()
        user.refusal("org/model", HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="10")
        assert time.monotonic() - begun > 10  # by the user's own limit, where there is one


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_without_the_file_names_the_variable(user: User, stand_in_hub: StandInHub, name: str) -> None:
    stand_in_hub.publish("org/model", {"config.json": CONFIG})
    message = user.refusal("org/model", **{name: "1"})
    assert f"not all in the Hub's cache ({user.folder / 'hf' / 'hub'}), and {name} is set" in message
    assert stand_in_hub.requests == []


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"HF_TOKEN": "hf_sécret"}, "gives no usable answer"),
        ({"HF_ENDPOINT": "nowhere"}, "gives no usable answer"),
        ({"HF_HUB_ETAG_TIMEOUT": "soon"}, "HF_HUB_ETAG_TIMEOUT"),
        ({"HF_HOME": "/proc/none"}, "cache /proc/none/hub cannot be used"),
    ],
    ids=["token", "endpoint", "timeout", "cache"],
)
def test_an_environment_that_cannot_work_is_one_message(
    user: User, stand_in_hub: StandInHub, environment: dict[str, str], says: str
) -> None:
    stand_in_hub.publish("org/model", {"config.json": CONFIG})
    message = user.refusal("org/model", **environment)
    assert says in message
    assert "sécret" not in message


def specification(user: User, conversations: Path, model: str, **changes: Any) -> str:
    fields = {
        "name": "tiny",
        "model": model,
        "data": {"path": str(conversations), "eval_fraction": 0.1},
        "recipe": {"rank": 4, "seq_len": 64, "tokens_per_step": 512, "compute_dtype": "float32"},
        "strategy": {"world_size": 1, "micro_batch": 4},
        "output": "out",
    }
    path = user.folder / "run.yaml"
    path.write_text(yaml.safe_dump({**fields, **changes}))
    return str(path)


def test_a_run_from_a_stand_in_hub_is_planned_with_one_commit_of_everything(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    unneeded = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"twice",
        "modeling.py": b"raise SystemExit",
    }
    with serve() as stand_in_hub:
        user = User(tmp_path, stand_in_hub.url)
        files = files_of(tiny_base)
        files["first.safetensors"] = files.pop("model.safetensors")
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "first.safetensors"}}).encode()
        commit = stand_in_hub.publish("org/tiny", {**files, **unneeded})
        path = specification(user, conversations, "org/tiny")
        done = user.run("qlora-train", path, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["model"]["source"] == f"{stand_in_hub.url}/org/tiny/blob/{commit}/config.json"
        assert f"Fetching org/tiny at {commit[:8]}, file 1 of 1: first.safetensors" in done.stderr
        assert not [request for request in stand_in_hub.requests if any(name in request for name in unneeded)]
    again = user.run("qlora-train", path, "--dry-run", "--json")  # the server is gone, the cache is whole
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["model"] == json.loads(done.stdout)["model"]
    assert "Fetching" not in again.stderr


@pytest.mark.slow
def test_weights_that_cannot_be_had_are_one_message(
    user: User, stand_in_hub: StandInHub, tiny_base: Path, conversations: Path
) -> None:
    files = files_of(tiny_base)
    weights = files.pop("model.safetensors")
    stand_in_hub.publish("org/pickled", {**files, "pytorch_model.bin": weights})
    stand_in_hub.publish("org/gated", files_of(tiny_base))
    stand_in_hub.repositories["org/gated"].gated = True
    refusals = {
        "org/pickled": "model: its weights are pickles (pytorch_model.bin)",
        "org/gated": "model: it is gated",
        "llama-2-7b": "The catalogue's llama-2-7b is meta-llama/Llama-2-7b-hf on the Hub",
        "models/nowhere": "model: there is no folder of that name, and no model on http",
    }
    for model, says in refusals.items():
        done = user.run("qlora-train", specification(user, conversations, model), "--dry-run")
        assert done.returncode == 2, done.stdout
        assert says in done.stderr


def test_a_planned_model_without_weights_in_the_cache_says_so_offline(
    user: User, stand_in_hub: StandInHub, tiny_base: Path, conversations: Path
) -> None:
    stand_in_hub.publish("org/tiny", files_of(tiny_base))
    user.plan("org/tiny")
    path = specification(user, conversations, "org/tiny")
    done = user.run("qlora-train", path, "--dry-run", HF_HUB_OFFLINE="1")
    assert done.returncode == 2, done.stdout
    assert "its files are not all in the Hub's cache" in done.stderr


@pytest.mark.chaos
@pytest.mark.xdist_group("workers")
def test_a_run_from_a_stand_in_hub_resumes_at_its_commit_and_its_adapter_names_it(
    user: User, stand_in_hub: StandInHub, tiny_base: Path, conversations: Path
) -> None:
    files = files_of(tiny_base)
    commit = stand_in_hub.publish("org/tiny", files)
    path = specification(user, conversations, "org/tiny")
    done = user.run("qlora-train", path)
    assert done.returncode == 0, done.stderr
    record = json.loads((user.folder / "out" / "run.json").read_text())
    assert record["identity"]["model"] == f"org/tiny@{commit}"
    assert commit in record["plan"]["model"]["source"]
    adapter = json.loads((user.folder / "out" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("org/tiny", commit)
    assert f"'org/tiny', revision='{commit}'" in (user.folder / "out" / "adapter" / "README.md").read_text()

    newer = stand_in_hub.publish("org/tiny", {**files, "README.md": b"A new commit."})
    # the base is the one that the adapter names, at its commit, from the cache
    merged = user.run(
        "qlora-train", "export", "out/adapter", "--merge", "--out", "merged", "--json", HF_HUB_OFFLINE="1"
    )
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout)["merged"] is True
    card = (user.folder / "merged" / "README.md").read_text()
    assert "base_model:finetune:org/tiny" in card
    assert "and merged into `org/tiny` in bfloat16." in card
    again = user.run("qlora-train", path)
    assert again.returncode == 0, again.stderr
    assert "is complete already" in again.stdout
    other = user.run("qlora-train", path, "model=org/tiny@main")
    assert other.returncode == 2
    assert f"was started with 'org/tiny@{commit}' (got 'org/tiny@{newer}')" in other.stderr
