"""The run specification: every mistake of a file told at once, in the file's own words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusters.errors import Problem, RequestError
from clusters.mistakes import fields_of, mistakes
from orchestrator.machine import describe
from orchestrator.spec import (
    CheckpointSpec,
    ClusterSpec,
    DatasetSpec,
    DataSpec,
    RunSpec,
    StrategySpec,
    apply_overrides,
    load_spec,
    schema,
)
from qlora_core.recipe import Recipe

MINIMAL = """
name: demo
model: base
data: {path: train.jsonl}
output: runs/demo
"""

Load = Callable[..., RunSpec]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a text as a file, with overrides."""

    def load_text(text: str, *overrides: str) -> RunSpec:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_spec(path, overrides)

    return load_text


def problems(load: Load, text: str, *overrides: str) -> dict[str, Problem]:
    """What is wrong with a text, by field."""
    with pytest.raises(RequestError) as error:
        load(text, *overrides)
    found = {problem.where: problem for problem in error.value.problems}
    assert len(found) == len(error.value.problems), "one problem for a field"
    return found


# --- what is right ----------------------------------------------------------------------------------------------------


def test_the_specification_of_the_design_is_read(load: Load) -> None:
    spec = load("""
name: guanaco-7b
model: llama-2-7b
data: {path: oasst1.jsonl, format: messages, eval_fraction: 0.02}
recipe: {rank: 64, seq_len: 2048, tokens_per_step: 131072, learning_rate: 2e-4, epochs: 3}
strategy: auto
cluster: auto
output: runs/guanaco-7b
""")
    assert spec.recipe.learning_rate == 2e-4  # YAML 1.1 takes 2e-4 for text
    assert spec.recipe.sequences_per_step == 64
    assert spec.strategy_request == StrategySpec()


def test_a_chat_template_is_given_by_file_or_as_it_is_or_is_that_of_the_adapter(load: Load, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    assert load(MINIMAL, "data.chat_template=chat.jinja").data.chat_template == "{{ 'é' }}"
    assert load(MINIMAL, "data.chat_template='{% if a %}b{% endif %}'").data.chat_template == "{% if a %}b{% endif %}"
    assert load(MINIMAL).data.chat_template is None
    (tmp_path / "before").mkdir()
    config = {"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}
    (tmp_path / "before" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "before" / "chat_template.jinja").write_text("{{ 1 }}")
    assert load(MINIMAL, "adapter=before").data.chat_template == "{{ 1 }}"
    assert load(MINIMAL, "adapter=before", "data.chat_template=chat.jinja").data.chat_template == "{{ 'é' }}"


def test_examples_to_evaluate_on_lie_where_the_data_could(load: Load, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").touch()
    assert load(MINIMAL, "data.eval_path=held.jsonl").data.eval_path == str(tmp_path / "held.jsonl")
    assert load(MINIMAL, "data.eval_path=s3://bucket/held.jsonl").data.eval_path == "s3://bucket/held.jsonl"
    assert load(MINIMAL, "data.eval_path=org/name@v1").data.eval_path == "org/name@v1"
    assert load(MINIMAL, "data.eval_split=validation").data.eval_path is None
    found = problems(load, MINIMAL, "data.eval_path=s3://user:secret@bucket/held.jsonl")
    assert "secret" not in str(found)


def test_examples_are_either_held_out_or_given(load: Load) -> None:
    found = problems(load, MINIMAL, "data.eval_path=held.jsonl", "data.eval_fraction=0.1", "seed=-1")
    assert set(found) == {"data.eval_fraction", "seed"}
    assert "none are held out" in found["data.eval_fraction"].rule
    assert load(MINIMAL, "data.eval_path=held.jsonl", "data.eval_fraction=0").data.eval_fraction == 0
    assert "trained on" in problems(load, MINIMAL, "data.eval_split=train")["data.eval_split"].rule
    assert "trained on" in problems(load, MINIMAL, "data.eval_split=a", "data.split=a")["data.eval_split"].rule


SEVERAL = """
name: demo
model: base
data:
  datasets:
    chats: {path: chats.jsonl}
    code.v2: {path: "s3://bucket/code.parquet", format: alpaca, times: 2.5}
output: runs/demo
"""


def test_several_datasets_lie_where_one_could(load: Load, tmp_path: Path) -> None:
    spec = load(SEVERAL, "data.datasets.more.path=org/name", "data.datasets.chats.learn=completion")
    assert {name: (one.path, one.times) for name, one in spec.data.learned.items()} == {
        "chats": (str(tmp_path / "chats.jsonl"), 1),
        "code.v2": ("s3://bucket/code.parquet", 2.5),
        "more": ("org/name", 1),
    }
    assert spec.data.path is None
    assert spec.data.evaluates


def test_what_is_wrong_with_several_datasets_is_told_of_each(load: Load) -> None:
    found = problems(
        load,
        """
name: demo
model: base
data:
  format: alpaca
  path: all.jsonl
  eval_split: held
  datasets:
    a: {path: a.jsonl, times: 0}
    b: {format: alpca, spilt: x}
    c: {path: "s3://key:hush@bucket/c.jsonl"}
    d: d.jsonl
    "e/f": {path: e.jsonl}
    g: {path: g, split: held}
output: runs/demo
""",
    )
    assert set(found) == {
        "data.format",
        "data.path",
        "data.eval_split",
        "data.datasets.a.times",
        "data.datasets.b.path",
        "data.datasets.b.format",
        "data.datasets.b.spilt",
        "data.datasets.c.path",
        "data.datasets.d",
        "data.datasets.e/f",
    }
    assert "hush" not in str(found)
    assert found["data.datasets.b.path"].rule == "it is required"
    assert found["data.datasets.b.spilt"].remedy == "Did you mean split?"
    assert found["data.datasets.b.format"].remedy == "Did you mean alpaca?"
    assert found["data.datasets.d"].rule == "it should be a section of fields"
    assert "each says this itself" in found["data.format"].rule


@pytest.mark.parametrize(
    ("data", "where"),
    [("{}", "data.path"), ("{datasets: {}}", "data.datasets"), ("{datasets: [a.jsonl]}", "data.datasets")],
)
def test_there_is_a_dataset(load: Load, data: str, where: str) -> None:
    assert where in problems(load, f"name: demo\nmodel: base\ndata: {data}\noutput: runs/demo\n")


def test_a_template_and_columns_travel_with_a_job(load: Load, tmp_path: Path) -> None:
    from launch.travel import SPECIFICATION, JobOrder, fields_of, texts_of

    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}\n{{ 'é: \"' + m.content }}\n{% endfor %}\n", encoding="utf-8"
    )
    spec = load(MINIMAL, "data.chat_template=chat.jinja", "data.columns={question: ask}")
    (tmp_path / "job").mkdir()
    written = tmp_path / "job" / SPECIFICATION
    order = JobOrder(describe(), "base", force=False)
    written.write_text(texts_of(fields_of(spec), order)[SPECIFICATION], encoding="utf-8")
    again = load_spec(written)
    assert again.data.chat_template == spec.data.chat_template
    assert again.data.columns == {"question": "ask"}


def test_what_is_no_chat_template_is_told_with_all_else(load: Load, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("hello")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe{")
    for name, rule in (
        ("chat.jinja", "it should be a Jinja template"),
        ("binary.jinja", "it is no text"),
        ("missing.jinja", "No such file"),
        (".", "Is a directory"),
    ):
        found = problems(load, MINIMAL, f"data.chat_template={name}", "seed=-1")
        assert set(found) == {"data.chat_template", "seed"}
        assert rule in found["data.chat_template"].rule


def test_what_is_left_out_takes_the_defaults(load: Load) -> None:
    spec = load(MINIMAL)
    assert spec.recipe == Recipe()
    assert (spec.strategy, spec.cluster, spec.seed) == ("auto", "auto", 0)


def test_paths_are_relative_to_the_specification_s_folder(load: Load, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    spec = load(MINIMAL)
    assert spec.model == str(tmp_path / "base")
    assert spec.data.path == str(tmp_path / "train.jsonl")
    assert spec.output == str(tmp_path / "runs" / "demo")


def test_a_model_that_is_no_folder_stays_a_name_unless_it_is_written_like_a_path(load: Load, tmp_path: Path) -> None:
    assert load(MINIMAL).model == "base"
    assert load(MINIMAL, "model=./base").model == str(tmp_path / "base")


@pytest.mark.parametrize(("given", "folder"), [("base/config.json", "base"), ("config.json", ".")])
def test_a_model_that_is_a_file_beside_the_specification_is_told_among_the_others(
    load: Load, tmp_path: Path, given: str, folder: str
) -> None:
    (tmp_path / given).parent.mkdir(exist_ok=True)
    (tmp_path / given).write_text("{}")
    with pytest.raises(RequestError) as caught:
        load(MINIMAL, f"model={given}", "recipe.rank=0")
    of_model, of_rank = map(str, caught.value.problems)
    assert of_model == f"model: it is a file (got {given}). Give its folder, {folder}."
    assert of_rank.startswith("recipe.rank: ")


def test_a_file_beside_the_specification_hides_no_model_of_the_catalogue(load: Load, tmp_path: Path) -> None:
    for name in ("7b", "llama-3.1-8b@main"):
        (tmp_path / name).write_text("a log")
        assert load(MINIMAL, f"model={name}").model == name


def test_absolute_paths_and_the_home_folder_are_kept(load: Load) -> None:
    spec = load(MINIMAL, "data.path=/data/train.jsonl", "output=~/runs/demo")
    assert spec.data.path == "/data/train.jsonl"
    assert spec.output == os.path.realpath(os.path.expanduser("~/runs/demo"))


@pytest.mark.parametrize("pattern", ["''", "/etc/*", "../*.jsonl", "a/../../b", "~/x"])
def test_a_pattern_of_files_stays_in_its_folder(load: Load, pattern: str) -> None:
    with pytest.raises(RequestError, match=r"data\.files: it should be a pattern of names inside the data's folder"):
        load(f"name: a\nmodel: b\ndata: {{path: c, files: {pattern}}}\noutput: d\n")


def test_a_specification_survives_the_way_through_json() -> None:
    spec = RunSpec.model_validate(yaml.safe_load(MINIMAL))
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("recipe.rank=16", lambda spec: spec.recipe.rank == 16),
        ("recipe.learning_rate=1e-5", lambda spec: spec.recipe.learning_rate == 1e-5),
        ("recipe.targets=[q_proj, v_proj]", lambda spec: spec.recipe.targets == ("q_proj", "v_proj")),
        ("recipe={rank: 8}", lambda spec: spec.recipe.rank == 8),
        ("strategy.zero_stage=2", lambda spec: spec.strategy.zero_stage == 2),
        ("cluster.address=head:6379", lambda spec: spec.cluster == ClusterSpec(address="head:6379")),
        ("checkpoints.keep=5", lambda spec: spec.checkpoints == CheckpointSpec(keep=5)),
        ("name=a=b", None),
        ("seed=7", lambda spec: spec.seed == 7),
    ],
)
def test_an_override_replaces_a_field_and_makes_its_section(
    load: Load, override: str, read: Callable[[RunSpec], bool] | None
) -> None:
    if read is None:
        assert problems(load, MINIMAL, override)["name"].given == '"a=b"'
    else:
        assert read(load(MINIMAL, override))


def test_an_override_keeps_the_other_fields_of_its_section(load: Load) -> None:
    spec = load(MINIMAL + "recipe: {rank: 8, alpha: 32}\n", "recipe.rank=16", "recipe.rank=4")
    assert (spec.recipe.rank, spec.recipe.alpha) == (4, 32)


def test_an_override_opens_a_section_where_the_file_says_auto(load: Load) -> None:
    assert load(MINIMAL + "strategy: auto\n", "strategy.world_size=2").strategy_request.world_size == 2


def test_an_override_does_not_reach_into_a_value(load: Load) -> None:
    found = problems(load, MINIMAL, "name.first=x")
    assert "name is no section" in found["name.first"].rule
    assert '"demo"' in found["name.first"].rule


@pytest.mark.parametrize("override", ["recipe.rank", "=3", "recipe..rank=3", ".=1", ""])
def test_an_override_that_is_no_pair_is_refused(load: Load, override: str) -> None:
    assert "FIELD=VALUE" in problems(load, MINIMAL, override)["override"].rule


def test_overrides_are_told_together_with_the_file_s_mistakes(load: Load) -> None:
    found = problems(load, MINIMAL + "sed: 3\n", "recipe.rank=[", "recipe.rnk=16", "rank")
    assert set(found) == {"recipe.rank", "recipe.rnk", "override", "sed"}


# --- all mistakes at once ---------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_file_are_told_at_once_by_their_paths(load: Load) -> None:
    found = problems(
        load,
        """
name: 12
modle: base
data: {path: "", format: mesages, eval_fraction: 3}
recipe: {rank: sixteen, quantization: nf5, learning_rate: 0, seq_len: 100, alpha: .inf, targets: 5, 5: 3}
strategy: {zero_stage: 7, world_size: 0, micro_bach: 2, attention: eagr, offload: [1]}
cluster: 7
checkpoints: {keep: 0}
seed: -1
""",
    )
    assert set(found) == {
        "name",
        "modle",
        "model",
        "output",
        "data.path",
        "data.format",
        "data.eval_fraction",
        "recipe.rank",
        "recipe.quantization",
        "recipe.learning_rate",
        "recipe.alpha",
        "recipe.targets",
        "recipe.5",
        "recipe.tokens_per_step",  # a rule across fields: 8192 is no multiple of 100
        "strategy.zero_stage",
        "strategy.world_size",
        "strategy.micro_bach",
        "strategy.attention",
        "strategy.offload",
        "cluster",
        "checkpoints.keep",
        "seed",
    }


@pytest.mark.parametrize(
    ("text", "where", "near"),
    [
        ("modle: base", "modle", "model"),
        ("recipe: {learning-rate: 1e-4}", "recipe.learning-rate", "learning_rate"),
        ("strategy: {micro_bach: 2}", "strategy.micro_bach", "micro_batch"),
        ("recipe: {quantization: NF-4}", "recipe.quantization", "nf4"),
        ("recipe: {optimizer: adam}", "recipe.optimizer", "adamw"),
        ("strategy: {attention: flash_attention2}", "strategy.attention", "flash_attention_2"),
        ("strategy: {loss: chunk}", "strategy.loss", "chunked"),
        ("data: {path: x, format: message}", "data.format", "messages"),
    ],
)
def test_the_nearest_name_is_offered(load: Load, text: str, where: str, near: str) -> None:
    assert problems(load, text)[where].remedy == f"Did you mean {near}?"


def test_a_name_like_none_gets_the_list(load: Load) -> None:
    assert problems(load, MINIMAL + "xyzzy: 1")["xyzzy"].remedy.startswith(
        "Known are name, model, adapter, data, recipe"
    )


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("strategy: {world_size: many}", "strategy.world_size", ["'auto'", "integer"]),
        ("strategy: {world_size: 0}", "strategy.world_size", ["'auto'", "greater than or equal to 1"]),
        ("strategy: {zero_stage: 4}", "strategy.zero_stage", ["'auto'", "0, 1, 2 or 3"]),
        ("strategy: fast", "strategy", ["'auto'", "section"]),
        ("cluster: {adress: x}", "cluster.adress", ["no such field"]),
        ("cluster: {}", "cluster.address", ["required"]),
        ("recipe: {targets: q_proj}", "recipe.targets", ["'all-linear'", "list"]),
        ("recipe: {rank: 1.5}", "recipe.rank", ["integer"]),
        ("recipe: {rank: true}", "recipe.rank", ["it should be a valid integer"]),
        ("recipe: {rank: yes}", "recipe.rank", ["it should be a valid integer"]),
        ("recipe: {alpha: off}", "recipe.alpha", ["it should be a valid number"]),
        ("recipe: {steps: true}", "recipe.steps", ["it should be a valid integer"]),
        ("seed: true", "seed", ["it should be a valid integer"]),
        ("strategy: {world_size: true}", "strategy.world_size", ["'auto'", "integer"]),
        ("strategy: {zero_stage: true}", "strategy.zero_stage", ["'auto'", "0, 1, 2 or 3"]),
        ("data: {datasets: {a: {path: x, times: true}}}", "data.datasets.a.times", ["it should be a valid number"]),
        ("recipe: {epochs: .nan}", "recipe.epochs", ["finite"]),
        ("recipe: {targets: [1]}", "recipe.targets", ["string"]),
        ("recipe: 5", "recipe", ["section"]),
        ("name: a b", "name", ["letters, digits"]),
        ("name: ../x", "name", ["letters, digits"]),
    ],
)
def test_a_rule_says_what_is_allowed_auto_included(load: Load, text: str, where: str, words: list[str]) -> None:
    rule = problems(load, text)[where].rule
    for word in words:
        assert word in rule


def test_what_is_shown_of_a_truth_value_in_place_of_a_number_is_what_yaml_made_of_it(load: Load) -> None:
    message = str(problems(load, MINIMAL, "recipe.rank=yes")["recipe.rank"])
    assert message == "recipe.rank: it should be a valid integer (got true). Correct it."
    kept = load(MINIMAL, "recipe.use_dora=yes", "strategy.gradient_checkpointing=true", "recipe.autocast=off")
    assert (kept.recipe.use_dora, kept.strategy_request.gradient_checkpointing, kept.recipe.autocast) == (1, 1, 0)


def test_no_message_speaks_python(load: Load) -> None:
    text = "strategy: {offload: 1, world_size: a}\nrecipe: {targets: 1}\ncluster: 1\n2: 3"
    for problem in problems(load, text).values():
        for word in ("literal", "tuple", "dict", "Spec", "Input", "pydantic"):
            assert word not in str(problem).replace("cluster", "")


# --- rules across fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "where", "remedy"),
    [
        ("{quantization: none}", "recipe.quantization", "method lora"),
        ("{method: lora}", "recipe.quantization", "none"),
        ("{method: full, quantization: int8}", "recipe.quantization", "none"),
        ("{seq_len: 100, tokens_per_step: 249}", "recipe.tokens_per_step", "The nearest is 200"),
        ("{seq_len: 100, tokens_per_step: 251}", "recipe.tokens_per_step", "The nearest is 300"),
        ("{seq_len: 100, tokens_per_step: 1}", "recipe.tokens_per_step", "The nearest is 100"),
        ("{targets: []}", "recipe.targets", "all-linear"),
        ("{targets: [q_proj, (]}", "recipe.targets", "Correct it"),
    ],
)
def test_a_rule_across_fields_names_a_field_and_a_remedy(load: Load, recipe: str, where: str, remedy: str) -> None:
    found = problems(load, MINIMAL + f"recipe: {recipe}")
    assert list(found) == [where]
    assert remedy in found[where].remedy


def test_several_rules_across_fields_are_told_at_once(load: Load) -> None:
    found = problems(load, MINIMAL + "recipe: {method: lora, seq_len: 100, targets: []}")
    assert set(found) == {"recipe.quantization", "recipe.tokens_per_step", "recipe.targets"}


def test_rules_across_fields_are_told_beside_mistakes_in_other_fields(load: Load) -> None:
    found = problems(load, "recipe: {method: lora, rank: 0, bogus: 1}")
    assert "recipe.quantization" in found
    assert {"recipe.rank", "recipe.bogus", "name"} <= set(found)


def test_a_rule_is_not_applied_to_a_field_that_is_wrong_itself(load: Load) -> None:
    found = problems(
        load, MINIMAL + "recipe: {seq_len: long, tokens_per_step: 1000, method: lorra, quantization: none}"
    )
    assert set(found) == {"recipe.seq_len", "recipe.method"}


# --- files that cannot be specifications ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("name: demo\nmodel: [base\noutput: x", "line 3"),
        ("name: a\n  model: x", "line 2"),
        ("name: a\nname: b", "name is given twice"),
        ("recipe: {rank: 1, rank: 2}", "rank is given twice"),
        ("", "it is empty"),
        ("# nothing\n", "it is empty"),
        ("- a\n- b", "no mapping"),
        ("just text", "no mapping"),
        ("name: 2024-13-45", "quotes make it text"),
        ("name: !!int x", "quotes make it text"),
        ("name: !!python/object/apply:os.system [ls]", "not YAML at line 1"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("{[1]: 2}", "line 1"),
    ],
)
def test_a_file_that_is_no_specification_says_why(load: Load, text: str, rule: str) -> None:
    (problem,) = problems(load, text).values()
    assert problem.where == "run specification"
    assert rule in problem.rule


def test_yaml_s_merge_keys_are_no_duplicates(load: Load) -> None:
    spec = load(MINIMAL + "checkpoints:\n  <<: {keep: 3}\n  keep: 4\n")
    assert spec.checkpoints.keep == 4


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.write_bytes(b"name: \xff\xfe"), "not text in UTF-8"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, make: Callable[[Path], Any], rule: str) -> None:
    path = tmp_path / "run.yaml"
    make(path)
    with pytest.raises(RequestError) as error:
        load_spec(path)
    (problem,) = error.value.problems
    assert problem.given == str(path)
    assert rule in problem.rule


def test_a_specification_that_refers_to_itself_is_refused(load: Load) -> None:
    assert "recipe.rank" in problems(load, MINIMAL + "recipe: &r {rank: *r}")


def test_a_bomb_of_aliases_is_refused_in_a_short_message(load: Load) -> None:
    bomb = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n"
    for name, inner in zip("bcdefghi", "abcdefgh", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{inner}'] * 8)}]\n"
    found = problems(load, MINIMAL + bomb + "seed: *i\n")
    assert len(str(found["seed"])) < 500


def test_a_number_too_large_to_print_is_refused(load: Load) -> None:
    assert "too large" in problems(load, MINIMAL + f"seed: 0x{'f' * 5000}")["seed"].given


# --- the schema -------------------------------------------------------------------------------------------------------

SECTIONS: tuple[type[Any], ...] = (RunSpec, DataSpec, DatasetSpec, Recipe, StrategySpec, ClusterSpec, CheckpointSpec)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_schema_describes_every_field(section: type[Any]) -> None:
    document = schema()
    described = document if section is RunSpec else document["$defs"][section.__name__]
    assert set(described["properties"]) == set(fields_of(section))
    for field in described["properties"].values():
        assert field["description"].endswith(".")
    assert described["additionalProperties"] is False


def test_the_schema_describes_in_the_words_of_the_fields_docstrings() -> None:
    assert schema()["$defs"]["Recipe"]["properties"]["rank"]["description"] == "LoRA rank r."


def test_the_schema_is_json_and_says_which_draft() -> None:
    document = json.loads(json.dumps(schema()))
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["required"] == ["name", "model", "data", "output"]
    references = set(_references(document))
    assert references == {f"#/$defs/{name}" for name in document["$defs"]}


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        here = [value["$ref"]] if "$ref" in value else []
        return here + [found for inner in value.values() for found in _references(inner)]
    return [found for inner in value for found in _references(inner)] if isinstance(value, list) else []


# --- junk -------------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(2**63), 2**40 + 1])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "nf4", "lora", "none", "base", "x.jsonl", "all-linear", "\0", "../..", "~nobody/x"])
    | st.dates()
    | st.binary(max_size=3)
)
NAMES = st.sampled_from(sorted({name for section in SECTIONS for name in fields_of(section)})) | st.text(max_size=5)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers(-5, 5), inner, max_size=4),
    max_leaves=12,
)


@given(junk=st.dictionaries(NAMES | st.integers(-5, 5), JUNK, max_size=8))
@settings(max_examples=150, deadline=None)
def test_junk_is_a_specification_or_a_list_of_problems(junk: dict[Any, Any]) -> None:
    found = mistakes(RunSpec, junk)
    if found:
        assert str(RequestError(found))
        assert len({problem.where for problem in found}) == len(found)
    else:
        RunSpec.model_validate(junk)


VALID = {
    "name": st.just("demo"),
    "model": st.just("base"),
    "data": st.just({"path": "x.jsonl"}),
    "output": st.just("out"),
    "recipe": st.dictionaries(st.sampled_from(sorted(fields_of(Recipe))), SCALARS, max_size=5),
    "strategy": st.dictionaries(st.sampled_from(sorted(fields_of(StrategySpec))), SCALARS, max_size=5),
}


@given(fields=st.fixed_dictionaries(VALID))
@settings(max_examples=150, deadline=None)
def test_junk_in_the_sections_is_a_specification_or_a_list_of_problems(fields: dict[str, Any]) -> None:
    found = mistakes(RunSpec, fields)
    if found:
        assert all(problem.where.startswith(("recipe", "strategy")) for problem in found)
    else:
        RunSpec.model_validate(fields)


@given(text=st.text(max_size=60) | st.text(alphabet="[]{}:,-&*!<>|'\"#%@`\n a1", max_size=60))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_specification_or_a_request_error(load: Load, text: str) -> None:
    with suppress(RequestError):
        load(text, "recipe.rank=3")


@given(override=st.text(max_size=30) | st.text(alphabet="ab.=[]{}:,1", max_size=30))
@settings(max_examples=150, deadline=None)
def test_any_override_is_applied_or_a_problem(override: str) -> None:
    fields: dict[str, Any] = yaml.safe_load(MINIMAL)
    assert all(str(problem) for problem in apply_overrides(fields, [override]))
