"""Answers in chat templates, tokens in flat arrays, the cache of encoded data, and what a model has no row for."""

from __future__ import annotations

import itertools
import json
import shutil
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from clusters.errors import RequestError
from orchestrator.base import find_base
from orchestrator.prepare import prepare, read_data
from orchestrator.record import Attempt, RunRecord, save_record
from orchestrator.spec import load_spec
from qlora_core.training.dataset import DataOptions, cache, encode_file
from qlora_core.training.dataset.chat import ChatTemplate
from qlora_core.training.dataset.report import BadRecord
from qlora_core.training.dataset.samples import Conversation, conversation
from qlora_core.training.dataset.tokenize import Encoder, tokens_of
from qlora_core.training.dataset.tokens import save_examples
from qlora_core.training.examples import Examples
from qlora_core.training.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (  # as Llama 3 has it
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n\n' + m['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
WORDS = (  # no special token stands between the turns
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
THINKING = (  # as Qwen 3 has it: what stands before </think> goes once another question follows
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ENDED_ONCE = (  # as Phi 3 has it: the end token stands behind the last turn alone
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
NEVER_ENDED = (  # as GLM 4 has it: an answer's end is the next question's beginning
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ASKS_FOR_REASONING = (  # as DeepSeek R1 has it: answers are written without their reasoning, the prompt begins one
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'].split('</think>')[-1] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
SYSTEM_LAST = (  # as Mistral 7B v0.3 has it: the system prompt stands before the last question, if no answer follows
    "{% if messages[0]['role'] == 'system' %}{% set system, turns = messages[0]['content'] + ' ', messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def by_ids_of_prefixes(turns: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], bytes] | None:
    """The reference: every prefix is rendered and tokenized for itself; None where one is no prefix of the whole."""

    def ids_of(part: list[dict[str, str]], prompt: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(part, add_generation_prompt=prompt, tokenize=True, return_dict=False))

    ids = ids_of(turns, False)
    flags = bytearray(len(ids))
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = ids_of(turns[:index], True) if index else []
            upto = ids_of(turns[: index + 1], False)
            if ids[: len(upto)] != upto or upto[: len(before)] != before:
                return None
            flags[len(before) : len(upto)] = b"\1" * (len(upto) - len(before))
    return ids, bytes(flags)


CONTENT = st.text(st.sampled_from(list("ab .:\n\tÄ😀-<|>")) | st.characters(codec="utf-8"), min_size=1, max_size=12)


@pytest.mark.parametrize("template", [None, CHATML, TRIMMED, WORDS, THINKING])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENT.filter(str.strip), min_size=2, max_size=5), system=st.booleans())
def test_answers_found_by_characters_are_those_found_by_the_tokens_of_every_prefix(
    tiny_base: Path, tokenizer: Any, template: str | None, contents: list[str], system: bool
) -> None:
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = template or own
        roles = (["system"] if system else []) + ["user", "assistant"] * 3
        turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        if not any(turn["role"] == "assistant" for turn in turns):
            return
        reference = by_ids_of_prefixes(turns, tokenizer)
        [outcome] = Encoder(tokenizer, "assistant").encode([Conversation(turns)])
        assert not isinstance(outcome, ValueError)
        if reference is not None:  # else a token reaches over a border, where only characters tell
            [tokens] = outcome
            assert (tokens.ids, tokens.learned) == reference
    finally:
        tokenizer.chat_template = own


def test_a_token_that_begins_before_an_answer_is_none_of_it() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({"ab": 0, "c": 1, "d": 2}))
    words.pre_tokenizer = WhitespaceSplit()
    text = "ab c d"
    encoding = words.encode(text)
    assert tokens_of(encoding, text, (1, 4)) == (1, 2)  # "ab" reaches over the border
    assert tokens_of(encoding, text, (2, 4)) == (1, 2)  # the space before "c" is no token
    assert tokens_of(encoding, text, (0, 6)) == (0, 3)


TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "<think>hm</think>Yes."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]
SYSTEM, ASKED, ANSWERED, AGAIN, LAST = TURNS


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        pytest.param(
            CHATML,
            [SYSTEM, ASKED, ANSWERED, AGAIN, LAST],
            [
                "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
                "[<think>hm</think>Yes.<|im_end|>\n]<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
                "[No.<|im_end|>\n]"
            ],
            id="every turn alike",
        ),
        pytest.param(
            THINKING,
            [ASKED, ANSWERED, AGAIN, LAST],
            [
                "<|user|>Hi?<|eos|><|assistant|>[<think>hm</think>Yes.<|eos|>]",
                "<|user|>Hi?<|eos|><|assistant|>Yes.<|eos|><|user|>And?<|eos|><|assistant|>[No.<|eos|>]",
            ],
            id="reasoning goes once a question follows",
        ),
        pytest.param(
            ENDED_ONCE,
            [ASKED, ANSWERED, AGAIN, LAST],
            [
                "<|user|>Hi?<|end|><|assistant|>[<think>hm</think>Yes.<|end|>]"
                "<|user|>And?<|end|><|assistant|>[No.<|end|><|eos|>]"
            ],
            id="an end token behind the last turn",
        ),
        pytest.param(
            NEVER_ENDED,
            [ASKED, ANSWERED, AGAIN, LAST],
            [
                "<|user|>Hi?<|assistant|>[<think>hm</think>Yes.<|eos|>]",
                "<|user|>Hi?<|assistant|><think>hm</think>Yes.<|user|>And?<|assistant|>[No.<|eos|>]",
            ],
            id="no end at all: it is given one",
        ),
        pytest.param(
            ASKS_FOR_REASONING,
            [ASKED, ANSWERED, AGAIN, LAST],
            ["<|user|>Hi?<|assistant|>[Yes.<|eos|>]<|user|>And?<|assistant|>[No.<|eos|>]"],
            id="a prompt that ends with what the answer is written without",
        ),
        pytest.param(
            SYSTEM_LAST,
            [SYSTEM, ASKED, ANSWERED, AGAIN, LAST],
            [
                "[INST] Be kind. Hi?[/INST][ <think>hm</think>Yes.<|eos|>]",
                "[INST] Hi?[/INST] <think>hm</think>Yes.<|eos|>[INST] Be kind. And?[/INST][ No.<|eos|>]",
            ],
            id="the system prompt before the last question alone",
        ),
        pytest.param(
            CHATML,
            [ANSWERED, AGAIN, LAST],
            [
                "<|im_start|>assistant\n[<think>hm</think>Yes.<|im_end|>\n]<|im_start|>user\nAnd?<|im_end|>\n"
                "<|im_start|>assistant\n[No.<|im_end|>\n]"
            ],
            id="an answer without a question",
        ),
    ],
)
def test_what_a_template_writes_and_what_of_it_is_learned(
    tiny_base: Path, template: str, turns: list[dict[str, str]], expected: list[str]
) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = template
    assert [marked(one.text, one.answers) for one in ChatTemplate(tokenizer).write(turns)] == expected
    [outcome] = Encoder(tokenizer, "completion").encode([Conversation(turns)])
    assert not isinstance(outcome, ValueError)
    [last] = outcome
    assert "No." in tokenizer.decode([token for token, flag in zip(last.ids, last.learned, strict=True) if flag])


def marked(text: str, answers: tuple[tuple[int, int], ...]) -> str:
    """A text with brackets around its answers."""
    for start, end in reversed(answers):
        text = text[:start] + "[" + text[start:end] + "]" + text[end:]
    return text


def test_an_example_for_each_answer_and_what_a_template_leaves_out_are_counted(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    path = tmp_path / "a.jsonl"
    turns = [ASKED, ANSWERED, AGAIN, LAST]
    path.write_text("".join(json.dumps({"messages": part}) + "\n" for part in (turns, [AGAIN, LAST], turns)))

    tokenizer.chat_template = THINKING
    examples, report = encode_file(path, "auto", tokenizer, 64)
    assert (len(examples), report.divided, report.shortened) == (5, 2, 0)
    assert examples.records() == [0, 0, 1, 2, 2]
    assert examples.select([4, 1, 0]).records() == [2, 0, 0]
    _, everything = encode_file(path, "auto", tokenizer, 64, DataOptions(learn="all"))
    assert (everything.examples, everything.divided) == (3, 0)

    tokenizer.chat_template = ASKS_FOR_REASONING
    examples, report = encode_file(path, "auto", tokenizer, 64)
    assert (len(examples), report.divided, report.shortened) == (3, 0, 2)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
}
TOOL_CHATML = (  # as Qwen's: results of tools in the user's turn
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ '<|im_start|>user\n<result>' + m['content'] + '</result>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls %}{{ '<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_calls_of_tools_are_answers_and_what_tools_say_is_not(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base), TOOL_CHATML)
    turns = [ASKED, CALLING, {"role": "tool", "content": "sunny"}, {"role": "tool", "content": "warm"}, LAST]
    said = conversation(turns, "messages", tools=TOOLS)
    [written] = ChatTemplate(tokenizer).write(said.turns, said.tools)
    assert marked(written.text, written.answers) == (
        '<|im_start|>system\n{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'
        "<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
        '[<call>weather{"city": "Rome"}</call><|im_end|>\n]'
        "<|im_start|>user\n<result>sunny</result><|im_end|>\n<|im_start|>user\n<result>warm</result><|im_end|>\n"
        "<|im_start|>assistant\n[No.<|im_end|>\n]"
    )
    # as a table has it: JSON in texts; and as ShareGPT calls it
    path = tmp_path / "a.jsonl"
    rows: list[dict[str, Any]] = [
        {"messages": turns, "tools": TOOLS},
        {"messages": json.dumps(turns), "tools": json.dumps(TOOLS)},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [one, same], report = encode_file(path, "auto", tokenizer, 512)
    assert (one, report.unread, report.shortened) == (same, (), 0)
    speakers = {"user": "human", "assistant": "gpt", "tool": "observation"}
    named = [{"from": speakers[turn["role"]], **turn, "value": turn["content"]} for turn in turns]
    path.write_text(json.dumps({"conversations": named, "tools": TOOLS}))
    assert encode_file(path, "auto", tokenizer, 512)[0][0] == one
    # a template that knows nothing of tools leaves them out
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for template in (CHATML, "{% for t in tools %}{{ t | tojson }}{% endfor %}" + CHATML, MARKED):
        assert encode_file(path, "auto", load_tokenizer(str(tiny_base), template), 512)[1].shortened == 2
    # and one that adds arguments to its text wants them as a text
    tokenizer.chat_template = TOOL_CHATML.replace("call.function.arguments | tojson", "call.function.arguments")
    assert ChatTemplate(tokenizer).write(said.turns, said.tools) == [written]


@pytest.mark.parametrize(
    ("turns", "tools", "says"),
    [
        ([ASKED, {"role": "tool", "content": "x"}, LAST], None, "turn 2 of messages is a tool's"),
        ([ASKED, CALLING | {"tool_calls": "x"}], None, "tool_calls is no list"),
        ([ASKED, CALLING | {"tool_calls": [{"function": "x"}]}], None, 'each of tool_calls needs a "function"'),
        ([ASKED, LAST], {"name": "x"}, "tools is no list"),
        ([ASKED, LAST], [5], 'each of tools needs a "function" with a "name"'),
        ([ASKED, CALLING | {"tool_calls": []}], None, 'needs a "role" and a "content" text'),
    ],
)
def test_calls_and_tools_that_are_none_are_bad_records(turns: list[dict[str, Any]], tools: Any, says: str) -> None:
    with pytest.raises(BadRecord, match=says):
        conversation(turns, "messages", tools=tools)


@pytest.mark.parametrize("template", [CHATML, THINKING, MARKED])
def test_an_answer_of_weight_0_is_not_learned(tiny_base: Path, template: str) -> None:
    tokenizer = load_tokenizer(str(tiny_base), template)
    weighed = [ASKED, ANSWERED | {"weight": 0}, AGAIN, LAST | {"weight": 1}]

    def learned(learn: str, turns: list[dict[str, Any]]) -> list[str]:
        [outcome] = Encoder(tokenizer, learn).encode([conversation(turns, "messages")])
        assert not isinstance(outcome, ValueError)
        flagged = [[token for token, flag in zip(one.ids, one.learned, strict=True) if flag] for one in outcome]
        return ["".join(tokenizer.decode(each).split()) for each in flagged]

    [text] = learned("assistant", weighed)
    assert text.startswith("No.")
    [text] = learned("all", weighed)
    assert "Yes." in text
    assert learned("assistant", [ASKED, ANSWERED | {"weight": 0}]) == [""]


def test_a_weight_between_is_a_bad_record() -> None:
    with pytest.raises(BadRecord, match=r"the weight of turn 2 of messages is 0\.5; it may be 0 or 1"):
        conversation([ASKED, ANSWERED | {"weight": 0.5}], "messages")


def test_a_template_that_is_none_is_refused_before_any_record_is_read(tiny_base: Path) -> None:
    assert load_tokenizer(str(tiny_base), CHATML).chat_template == CHATML
    for fails in ("{{ raise_exception('never') }}", "{{ 1 / 0 }}", "{% for tool in tools %}{% endfor %}", "{{ a.b }}"):
        tokenizer = load_tokenizer(str(tiny_base), fails)  # what it refuses, it refuses of each conversation
        [outcome] = Encoder(tokenizer, "assistant").encode([Conversation([ASKED, LAST])])
        assert isinstance(outcome, BadRecord)
    with pytest.raises(RequestError, match=r"data\.chat_template: it is no Jinja template: .*, line 2"):
        load_tokenizer(str(tiny_base), "{% for m in messages %}\n{{ m[ }}{% endfor %}")


def test_what_a_turn_says_beside_its_content_reaches_the_template(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.get('reasoning_content', '') }}"
        "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    turns = [ASKED | {"name": None}, LAST | {"reasoning_content": "hm"}]
    [written] = ChatTemplate(tokenizer).write(conversation(turns, "messages").turns)
    assert marked(written.text, written.answers) == "<|user|>Hi?<|eos|><|assistant|>[hmNo.<|eos|>]"


def test_a_template_that_writes_the_date_writes_that_of_the_run_s_first_day(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML  # Llama 3's words
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer.save_pretrained(base)
    fields = {"name": "a", "model": str(base), "data": {"path": str(conversations)}, "output": "out"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    spec = load_spec(tmp_path / "run.yaml")

    def first() -> str:
        found = find_base(spec, lambda text: None)
        return str(tokenizer.decode(read_data(spec, found, tokenizer)[""][0][0].ids)).replace(" ", "")

    assert first().startswith(datetime.now(UTC).strftime("%d%b%Y"))
    started = Attempt(started="2020-02-01T23:59:59+00:00", from_step=0)
    facts: dict[str, Any] = {"id": "1", "name": "a", "identity": {}, "total_steps": 1}
    save_record(RunRecord(**facts, plan={}, data={}, predicted={}, attempts=[started]), Path(spec.output))
    assert first().startswith("01Feb2020")


def test_examples_to_evaluate_on_may_be_other_data(tmp_path: Path, tiny_base: Path, conversations: Path) -> None:
    lines = conversations.read_text().splitlines()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines[:20]))
    (tmp_path / "data" / "validation.jsonl").write_text("\n".join(lines[20:25]))
    longer = json.dumps({"messages": [ASKED, {"role": "assistant", "content": "Yes. " * 30}]})
    (tmp_path / "held.jsonl").write_text(longer)
    fields = {
        "name": "a",
        "model": str(tiny_base),
        "data": {"path": "data"},
        "output": "out",
        "recipe": {"seq_len": 128},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))

    def prepared(*overrides: str) -> Any:
        return prepare(load_spec(tmp_path / "run.yaml", overrides))

    held_out, split, other = prepared(), prepared("data.eval_split=validation"), prepared("data.eval_path=held.jsonl")
    assert [len(each.train) for each in (held_out, split, other)] == [19, 20, 20]
    assert [len(each.held_out) for each in (held_out, split, other)] == [1, 5, 1]
    whole, _ = encode_file(tmp_path / "data" / "validation.jsonl", "auto", load_tokenizer(str(tiny_base)), 128)
    assert list(split.held_out) == list(whole)
    # memory is planned for what is evaluated, too
    assert other.longest == len(other.held_out[0].ids) > held_out.longest
    identities = [each.identity["evaluated as tokens"] for each in (held_out, split, other)]
    assert identities[0] is None
    assert len(set(identities)) == 3
    with pytest.raises(RequestError, match=r"data\.eval_split"):
        prepared("data.eval_split=test")
    with pytest.raises(RequestError, match=r"data\.eval_path.*missing\.jsonl"):
        prepared("data.eval_path=missing.jsonl")


def test_the_plan_is_for_the_lengths_of_the_data(tmp_path: Path, tiny_base: Path, conversations: Path) -> None:
    fields: dict[str, Any] = {
        "name": "a",
        "model": str(tiny_base),
        "data": {"path": str(conversations)},
        "output": "out",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))

    def prepared(seq_len: int, packing: bool = False) -> Any:
        recipe = [f"recipe.seq_len={seq_len}", f"recipe.tokens_per_step={4 * seq_len}", f"recipe.packing={packing}"]
        return prepare(load_spec(tmp_path / "run.yaml", [*recipe, "strategy.micro_batch=4"]))

    encoded, _ = encode_file(conversations, "auto", load_tokenizer(str(tiny_base)), 512)
    longest = max(encoded.lengths)
    assert longest < 500
    alone, packed = prepared(512), prepared(512, packing=True)
    assert alone.longest == longest
    assert alone.plan.estimate == prepared(longest).plan.estimate
    assert 500 < packed.longest <= 512
    assert packed.plan.estimate.gpu.allocated_bytes > alone.plan.estimate.gpu.allocated_bytes


def test_a_template_s_own_marks_say_what_is_generated(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = MARKED
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))

    def learned(learn: Any) -> str:
        [example], _ = encode_file(path, "auto", tokenizer, 64, DataOptions(learn=learn))
        return str(tokenizer.decode([token for token, flag in zip(example.ids, example.learned, strict=True) if flag]))

    assert learned("assistant").replace(" ", "") == "b<|eos|>d<|eos|>"
    assert learned("completion").replace(" ", "") == "d<|eos|>"


def test_examples_are_selected_without_being_copied_and_saved_as_they_are(
    tmp_path: Path, conversations: Path, tokenizer: Any
) -> None:
    examples, report = encode_file(conversations, "auto", tokenizer, 64)
    chosen = examples.select([3, 1])
    assert list(chosen) == [examples[3], examples[1]]
    assert chosen.ids is examples.ids
    assert list(chosen[1:]) == [examples[1]]
    assert examples.lengths == [len(example.ids) for example in examples]
    assert report.learned == sum(sum(example.learned[1:]) for example in examples)
    save_examples(chosen, tmp_path / "x.safetensors")
    assert Examples(tmp_path / "x.safetensors")[0][0].tolist() == examples[3].ids


def test_memory_grows_with_the_tokens_and_not_with_the_data(tmp_path: Path, tokenizer: Any) -> None:
    def peak(records: int) -> tuple[int, int]:
        path = tmp_path / f"{records}.jsonl"
        row = json.dumps({"prompt": "Ada carried", "completion": " a red cup", "unused": "x" * 4000})
        path.write_text(f"{row}\n" * records)
        tracemalloc.start()
        try:
            _, report = encode_file(path, "auto", tokenizer, 64)
            return tracemalloc.get_traced_memory()[1], report.tokens
        finally:
            tracemalloc.stop()

    peak(10)  # what is imported and compiled on first use
    (few, few_tokens), (many, many_tokens) = peak(1000), peak(3000)
    # 8 MB more of data; by token 5 bytes of arrays, and as much again while they grow and are digested; and where each
    # example stands
    places = 2000 * len(f"{tmp_path}/3000.jsonl, line 3000")
    assert many - few < 20 * (many_tokens - few_tokens) + 2 * places + 100_000


def without_merges(model: dict[str, Any]) -> None:
    model["merges"] = []


def with_two_tokens_in_turn(model: dict[str, Any]) -> None:
    ids = model["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]


def test_data_is_encoded_once_and_again_where_anything_of_it_changes(
    tmp_path: Path, conversations: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, folder = load_tokenizer(str(tiny_base)), tmp_path / "cache"
    path = tmp_path / "a.jsonl"
    shutil.copyfile(conversations, path)

    def entries() -> int:
        return len(list(folder.glob("*")))

    def assert_encoded_anew(path: Path, tokenizer: Any, seq_len: int = 64, **options: Any) -> None:
        before = entries()
        found, _ = encode_file(path, "auto", tokenizer, seq_len, DataOptions(cache=folder, **options))
        uncached, _ = encode_file(path, "auto", tokenizer, seq_len, DataOptions(**options))
        assert list(found) == list(uncached)
        assert entries() == before + 1

    assert_encoded_anew(path, tokenizer)
    examples, report = encode_file(path, "auto", tokenizer, 64)
    with monkeypatch.context() as patch:
        patch.setattr("qlora_core.training.dataset.encode.encode_source", None)  # nothing is encoded now
        again, same = encode_file(path, "auto", tokenizer, 64, DataOptions(cache=folder))
    assert (list(again), same) == (list(examples), report)
    assert_encoded_anew(path, tokenizer, seq_len=32)
    assert_encoded_anew(path, tokenizer, learn="all")
    assert_encoded_anew(conversations, tokenizer)
    for number, change in enumerate((without_merges, with_two_tokens_in_turn)):
        other = tmp_path / str(number)
        tokenizer.save_pretrained(other)
        fields = json.loads((other / "tokenizer.json").read_text())
        change(fields["model"])
        (other / "tokenizer.json").write_text(json.dumps(fields))
        assert_encoded_anew(path, load_tokenizer(str(other)))
    tokenizer.chat_template += "{# another #}"
    assert_encoded_anew(path, tokenizer)
    path.write_text(path.read_text().replace("Ada", "Eve"))
    assert_encoded_anew(path, tokenizer)


@pytest.mark.parametrize("seq_len", [2, 5, 16, 63, 64, 65])
def test_every_token_of_a_long_text_is_learned_once(tmp_path: Path, tokenizer: Any, seq_len: int) -> None:
    path = tmp_path / "book.jsonl"
    texts = ["Ada keeps bees. " * 9, "Bees fly."]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    whole = [example.ids for example in encode_file(path, "auto", tokenizer, 10_000)[0]]
    examples, report = encode_file(path, "auto", tokenizer, seq_len)
    assert (report.truncated, report.unlearnable) == (0, 0)
    assert report.in_pieces == sum(len(ids) > seq_len for ids in whole)
    for number, ids in enumerate(whole):
        parts = [each for each, record in zip(examples, examples.records(), strict=True) if record == number]
        assert all(len(part.ids) <= seq_len and all(part.learned) for part in parts)
        assert all(one.ids[-1] == other.ids[0] for one, other in itertools.pairwise(parts))
        assert parts[0].ids[:1] + [token for part in parts for token in part.ids[1:]] == ids


def test_a_damaged_entry_is_made_anew(tmp_path: Path, conversations: Path, tokenizer: Any) -> None:
    kept = DataOptions(cache=tmp_path)
    examples, _ = encode_file(conversations, "auto", tokenizer, 64, kept)
    [entry] = tmp_path.glob("*")
    whole = entry.read_bytes()
    for damaged in (whole[:100], b"", whole[:-8] + bytes(8)):
        entry.write_bytes(damaged)
        assert list(encode_file(conversations, "auto", tokenizer, 64, kept)[0]) == list(examples)
        assert entry.read_bytes() == whole
    assert load_file(entry)["ids"].dtype == np.int32


def test_what_was_not_used_for_longest_leaves_the_cache_first(tmp_path: Path) -> None:
    import os

    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(10))
        os.utime(tmp_path / f"{name}.safetensors", (1000 - age, 1000 - age))
    cache.shrink(tmp_path, 20)
    assert sorted(path.stem for path in tmp_path.glob("*")) == ["new", "old"]


def test_a_token_that_the_embedding_has_no_row_for_is_refused(conversations: Path, tokenizer: Any) -> None:
    examples, _ = encode_file(conversations, "auto", tokenizer, 64)
    highest = max(max(example.ids) for example in examples)
    encode_file(conversations, "auto", tokenizer, 64, DataOptions(vocab_size=highest + 1))
    with pytest.raises(RequestError, match=rf"token {highest} \(.*\), and the model's embedding has {highest} rows"):
        encode_file(conversations, "auto", tokenizer, 64, DataOptions(vocab_size=highest))
