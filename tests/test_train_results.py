"""What comes out of a run, through the command: export, evaluate and score, and how they refuse."""

from __future__ import annotations

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from clusters.errors import RequestError, RunFailed
from launch.train import train
from qlora_core.recipe import Recipe
from qlora_core.training.check import check_merged
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.examples import Examples
from qlora_core.training.model import attach_adapters
from qlora_core.training.vllm import outside_vllm, vllm_rank


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(train, [str(argument) for argument in arguments], standalone_mode=False)


def told(*arguments: object) -> dict[str, Any]:
    result = ask(*arguments, "--json")
    assert result.exception is None, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def refusal(*arguments: object) -> str:
    result = ask(*arguments)
    assert isinstance(result.exception, RequestError | RunFailed), result.exception
    return str(result.exception)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with the adapters zero, which changes nothing, and much, which changes a lot."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, spread in (("zero", 0.0), ("much", 0.3)):
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(0)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data = spread * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def test_an_adapter_is_exported_as_it_is_with_what_vllm_makes_of_it(adapters: Path, tmp_path: Path) -> None:
    answer = told("export", adapters / "much", "--out", tmp_path / "out")
    assert answer["vllm"] == {"max_lora_rank": 8, "outside": []}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (adapters / "much" / name).read_bytes()
    assert "it is there already" in refusal("export", adapters / "much", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"r": 513}, "rank 513 is above 512"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"alpha_pattern": {"q_proj": 4}}, "ranks and alphas by module"),
    ],
)
def test_what_is_outside_of_vllms_limits_is_told(changes: dict[str, Any], shown: str) -> None:
    config = {"r": 64, "lora_alpha": 16, "bias": "none", **changes}
    (reason,) = outside_vllm(config, ["base_model.model.q_proj.lora_A.weight"])
    assert shown in reason


def test_vllm_takes_ranks_up_to_the_next_of_its_list_and_no_other_tensors() -> None:
    assert [vllm_rank({"r": rank}) for rank in (1, 4, 8, 64, 65, 300, 512, 513)] == [8, 8, 8, 64, 128, 320, 512, None]
    assert outside_vllm({"r": 8}, ["base_model.model.lm_head.weight"]) == [
        "tensors other than lora_A and lora_B are refused, such as base_model.model.lm_head.weight"
    ]


def test_an_export_into_16_bit_says_what_it_did_and_could_not_check(adapters: Path, tmp_path: Path) -> None:
    answer = told("export", adapters / "much", "--merge", "--out", tmp_path / "out", "--max-shard-size", "300KB")
    assert (answer["dtype"], answer["layers"], answer["held_out_loss"]) == ("bfloat16", 4, None)
    assert answer["shards"] > 1
    assert "no held-out examples" in answer["warnings"][0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_merge_that_cannot_be_is_refused_and_writes_nothing(adapters: Path, tmp_path: Path, tiny_base: Path) -> None:
    def merge(*arguments: object) -> str:
        return refusal("export", adapters / "much", "--merge", "--out", tmp_path / "out", *arguments)

    other = tmp_path / "other"
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **shape)).save_pretrained(other)
    assert "was trained on a base of another size" in merge("--base", other)
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    assert "pickles are not read" in merge("--base", other)
    assert "the base model is not there" in merge("--base", tmp_path / "nowhere")
    assert "base: it is a file" in merge("--base", other / "config.json")
    assert "without its run's held-out examples" in merge("--check")
    for size in ("much", "-5GB", "0"):
        assert "it is no size of a file" in merge("--max-shard-size", size)
    assert "is no LoRA adapter" in refusal("export", pickled_adapter(tmp_path, "IA3"), "--out", tmp_path / "out")
    assert "pickles are not read" in refusal("export", pickled_adapter(tmp_path, "LORA"), "--out", tmp_path / "out")
    assert "holds no adapter_config.json" in refusal("export", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "run.json").write_text("{}")
    assert "has not come to its end" in refusal("export", tmp_path, "--out", tmp_path / "out")
    (tmp_path / "model").mkdir()
    assert "its result is a whole model and no adapter" in refusal("export", tmp_path, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_what_only_a_merge_has_a_use_for_is_not_passed_over(adapters: Path, tmp_path: Path) -> None:
    result = ask("export", adapters / "much", "--out", tmp_path / "out", "--dtype", "float32", "--no-check")
    assert isinstance(result.exception, click.UsageError)
    assert "Only a merge has a use for --check, --dtype" in result.exception.message


def test_a_merged_model_with_another_loss_than_the_adapter_is_found_out(
    adapters: Path, tiny_base: Path, tmp_path: Path
) -> None:
    save_examples([Encoded(list(range(5, 25)), [False] * 5 + [True] * 15)], tmp_path / "examples.safetensors")
    examples, cpu = Examples(tmp_path / "examples.safetensors"), torch.device("cpu")
    told("export", adapters / "much", "--merge", "--out", tmp_path / "out", "--dtype", "float32")
    check = check_merged(tmp_path / "out", tiny_base, adapters / "much", examples, "float32", cpu)
    assert check.merged == pytest.approx(check.unmerged, abs=1e-5)
    with pytest.raises(RunFailed, match="so nothing was written"):
        check_merged(tmp_path / "out", tiny_base, adapters / "zero", examples, "float32", cpu)


def pickled_adapter(folder: Path, kind: str) -> Path:
    path = folder / kind
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4}))
    (path / "adapter_model.bin").write_bytes(b"")
    return path


def test_adapters_on_one_base_are_compared(
    adapters: Path, tiny_base: Path, conversations: Path, tmp_path: Path
) -> None:
    answer = told(
        *("evaluate", adapters / "zero", "--adapter", f"much={adapters / 'much'}", "--data", conversations),
        *("--answers", tmp_path / "answers", "--answer-tokens", 3, "--samples", 4),
    )
    base, zero, much = answer["evaluated"]
    assert [row["name"] for row in answer["evaluated"]] == ["base", "zero", "much"]
    assert base["change"] is None
    assert zero["loss"] == base["loss"]
    assert zero["change"] == {"value": 0, "low": 0, "high": 0}
    assert zero["perplexity"]["value"] == pytest.approx(math.exp(zero["loss"]["value"]))
    assert much["change"]["value"] == pytest.approx(much["loss"]["value"] - base["loss"]["value"])
    # the loss on one example by plain peft, of which there are ten alike
    lines = [json.loads(line) for line in (tmp_path / "answers" / "much.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert lines[0].keys() == {"question", "answer"}
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapters / "much")
    first = conversations.read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(first + "\n")
    one = told("evaluate", adapters / "much", "--data", tmp_path / "one.jsonl", "--samples", 0)["evaluated"][1]
    (tmp_path / "renamed.jsonl").write_text(first.replace('"messages"', '"turns"') + "\n")
    renamed = ("--data", tmp_path / "renamed.jsonl", "--column", "messages=turns", "--samples", 0)
    assert told("evaluate", adapters / "much", *renamed)["evaluated"][1] == one
    assert "it is no pair" in refusal("evaluate", adapters / "much", *renamed, "--column", "messages=again")
    assert one["loss"]["low"] is None
    assert one["loss"]["value"] == pytest.approx(plain_loss(model, tiny_base, json.loads(first)), abs=1e-3)


def test_what_of_the_data_is_left_out_or_cut_off_is_told_beside_the_losses(
    adapters: Path, conversations: Path, tmp_path: Path
) -> None:
    first = json.loads(conversations.read_text().splitlines()[0])["messages"]
    long, empty = ([first[0], {"role": "assistant", "content": text}] for text in ("bread " * 200, ""))
    records = ({"messages": turns} for turns in (first, long, empty))
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = ("evaluate", adapters / "zero", "--data", tmp_path / "three.jsonl", "--seq-len", 64, "--samples", 0)
    found = told(*asked)["data"]
    assert (found["examples"], found["truncated"], found["empty_answers"]) == (2, 1, 1)
    assert found["longest"] == 64
    shown = " ".join(ask(*asked).output.split())
    assert (
        "Data: 2 examples in format messages, the longest 64 tokens, 1 cut off at 64 tokens, 1 left out (empty answer)."
    ) in shown


def test_an_adapter_s_own_chat_template_is_evaluated_with_and_merged(
    adapters: Path, tiny_base: Path, conversations: Path, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    shutil.copytree(adapters / "much", adapter)
    asked = ("--base", base, "--data", conversations, "--samples", 0)
    assert "the model's tokenizer has no chat template" in refusal("evaluate", adapter, *asked)
    (adapter / "chat_template.jinja").write_text(template)
    with_own = told("evaluate", adapter, *asked)["evaluated"]
    by_tokenizer = told("evaluate", adapters / "much", *asked[2:])["evaluated"]
    assert [row["loss"] for row in with_own] == [row["loss"] for row in by_tokenizer]
    told("export", adapter, "--merge", "--base", base, "--out", tmp_path / "merged", "--no-check")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template


def test_a_model_without_sdpa_is_evaluated_by_its_own_attention(
    tiny_base: Path, conversations: Path, tmp_path: Path
) -> None:
    model = saved_model("gemma2", tiny_base, tmp_path / "base", num_key_value_heads=2, head_dim=8)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    asked = ("--base", tmp_path / "base", "--data", conversations, "--samples", 0)
    base, adapter = told("evaluate", tmp_path / "adapter", *asked)["evaluated"]
    assert adapter["loss"] == base["loss"]


def test_an_adapter_of_a_mixture_s_experts_is_evaluated(tiny_base: Path, conversations: Path, tmp_path: Path) -> None:
    model = saved_model("olmoe", tiny_base, tmp_path / "base", num_experts=4, num_experts_per_tok=2)
    recipe = Recipe(method="lora", quantization="none", double_quantization=False, rank=4)
    adapted = attach_adapters(model, recipe, seed=0)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("experts.base_layer.lora_A" in key for key in keys)
    first = conversations.read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(first + "\n")
    asked = ("--base", tmp_path / "base", "--data", tmp_path / "one.jsonl", "--samples", 0)
    _, adapter = told("evaluate", tmp_path / "adapter", *asked)["evaluated"]
    # in the machine's compute dtype beside float32
    assert adapter["loss"]["value"] == pytest.approx(plain_loss(adapted, tiny_base, json.loads(first)), abs=0.01)
    assert abs(adapter["change"]["value"]) > 0.05


def saved_model(kind: str, tiny_base: Path, folder: Path, **fields: Any) -> Any:
    """A small model of another family, with the tiny base's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **shape, **fields))
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return model


def plain_loss(model: Any, base: Path, record: dict[str, Any]) -> float:
    """transformers' own loss on the answer of a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    question, whole = (
        tokenizer.apply_chat_template(turns, add_generation_prompt=asks, return_dict=False)
        for turns, asks in ((record["messages"][:1], True), (record["messages"], False))
    )
    labels = torch.tensor([[-100] * len(question) + whole[len(question) :]])
    with torch.no_grad():
        return float(model.eval()(input_ids=torch.tensor([whole]), labels=labels).loss)


def test_an_evaluation_that_cannot_be_is_refused(adapters: Path, tmp_path: Path, conversations: Path) -> None:
    much = adapters / "much"
    assert "no held-out examples of a run there" in refusal("evaluate", much)
    assert "NAME=FOLDER" in refusal("evaluate", much, "--adapter", much)
    assert "name is letters, digits" in refusal("evaluate", much, "--data", conversations, "--adapter", f"a.b={much}")
    other = tmp_path / "other"
    weights = load_file(much / "adapter_model.safetensors")
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **shape))
    get_peft_model(small, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(other)
    assert len(weights) == len(load_file(other / "adapter_model.safetensors"))
    shown = refusal("evaluate", much, "--data", conversations, "--adapter", f"other={other}")
    assert "--adapter other: its model.layers.0.self_attn.q_proj has 32 inputs, the base model's has 64" in shown


JUDGE = """
def by_length(question, first, second):
    return len(first), len(second)
"""


def answers(path: Path, texts: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in texts.items()))
    return path


def test_two_systems_answers_are_scored_by_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judges_of_a_test.py").write_text(JUDGE)
    one = answers(tmp_path / "one.jsonl", {"a?": "12345", "b?": "123"})
    other = answers(tmp_path / "other.jsonl", {"b?": "12345", "a?": "12345"})
    found = told("score", one, other, "--judge", "judges_of_a_test:by_length")
    assert (found["mean"]["value"], found["questions"]) == (80, 2)  # 8 of 10 characters
    assert found["mean"]["low"] == pytest.approx(60)  # twice "b?": 3 of 5
    assert found["mean"]["high"] == 100
    assert (found["wins"], found["ties"], found["losses"]) == (0, 1, 1)
    shown = ask("score", one, other, "--judge", "judges_of_a_test:by_length").output
    assert "80.0 %   95 % interval 60.0 to 100.0" in shown
    assert "has no function nothing" in refusal("score", one, other, "--judge", "judges_of_a_test:nothing")
    assert "it cannot be imported: ModuleNotFoundError" in refusal("score", one, other, "--judge", "none_such:judge")
    assert "it is no MODULE:FUNCTION" in refusal("score", one, other, "--judge", "judges")
    answers(other, {"a?": "x"})
    assert "lacks 1 of the questions that the other file has, such as 'b?'" in refusal(
        "score", one, other, "--judge", "judges_of_a_test:by_length"
    )
    other.write_text('{"question": "a?"}\n[1]\n{"question": "a?", "answer": 1}\n')
    assert refusal("score", one, other, "--judge", "judges_of_a_test:by_length").count(", line ") == 3


def test_tasks_want_the_harness(adapters: Path) -> None:
    if find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    assert "not installed: lm-eval" in refusal("evaluate", adapters / "zero", "--tasks", "arc_easy")


TASK = """
task: bread_or_cup
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow  # the harness takes half a minute to import
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `tasks`)")
def test_a_task_of_ones_own_runs_through_the_harness(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": "What?", "choices": ["bread", "bread"], "label": 0} for _ in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    base, zero = told("evaluate", adapters / "zero", "--tasks", tmp_path / "task.yaml", "--limit", 2)["evaluated"]
    assert base["loss"] is None
    # both choices are alike, and the harness takes the first of the likeliest
    assert base["tasks"]["bread_or_cup"]["acc"] == zero["tasks"]["bread_or_cup"]["acc"] == 1
