"""Formats and presets: rows in exactly the published layout (written by ourselves) and the tokens that they teach."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import pytest

from clusters.errors import RequestError
from qlora_core.data import FormatName
from qlora_core.training.dataset import DataOptions, DataReport, encode_file
from qlora_core.training.dataset.formats import FORMATS
from qlora_core.training.tokenizer import load_tokenizer

Read = Callable[..., tuple[list[tuple[str, str]], DataReport]]


@pytest.fixture(scope="module")
def chatty(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


@pytest.fixture(scope="module")
def plain(tiny_base: Path) -> Any:
    """As a base model's tokenizer is: without chat template."""
    tokenizer = load_tokenizer(str(tiny_base))
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def read(tmp_path: Path, plain: Any) -> Read:
    """What rows become: for each example its text and the part of it that is learned, special tokens visible."""

    def reading(rows: list[dict[str, Any]], format_: str = "auto", tokenizer: Any = plain, **options: Any) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        examples, report = encode_file(path, format_, tokenizer, 512, DataOptions(**options))
        texts = []
        for example in examples:
            learned = [token for token, flag in zip(example.ids, example.learned, strict=True) if flag]
            # the tokenizer writes a space before whatever begins a text
            texts.append((tokenizer.decode(example.ids).lstrip(), tokenizer.decode(learned).lstrip()))
        return texts, report

    return reading


END = "<|eos|>"

# huggingface.co/datasets/timdettmers/openassistant-guanaco, column text
GUANACO: dict[str, Any] = {
    "text": "### Human: Who is Ada?### Assistant: A keeper.### Human: Of what?### Assistant: Of bees."
}
# huggingface.co/datasets/tatsu-lab/alpaca: instruction, input, output, text
ALPACA = {"instruction": "Name it.", "input": "a red fruit", "output": "An apple.", "text": "Below is ..."}
# huggingface.co/datasets/SirNeural/flan_v2: inputs, targets, task
FLAN = {"inputs": "Is ice cold?\nOPTIONS:\n- yes\n- no\nA: ", "targets": "yes", "task": "boolq"}
# huggingface.co/datasets/Anthropic/hh-rlhf: chosen, rejected
HH: dict[str, Any] = {
    "chosen": "\n\nHuman: Who is Ada?\n\nAssistant: A keeper.\n\nHuman: Of what?\n\nAssistant: Of bees.",
    "rejected": "\n\nHuman: Who is Ada?\n\nAssistant: No.",
}
# huggingface.co/datasets/mrm8488/unnatural-instructions-full: instruction, instances, reformulations
UNNATURAL = {
    "instruction": "Name the fruit.",
    "instances": [
        {
            "instruction_with_input": "Name the fruit. It is red.",
            "input": "It is red.",
            "constraints": "None.",
            "output": "Apple",
        }
    ],
    "reformulations": [
        {
            "instruction": "What fruit is {INPUT}",
            "instruction_with_input": "What fruit is red?",
            "input": "red",
            "output": "Apple",
        }
    ],
}
# huggingface.co/datasets/laion/OIG, unified_chip2.jsonl: text, metadata
CHIP2: dict[str, Any] = {"text": "<human>: Who is Ada?\n<bot>: A keeper.", "metadata": {"source": "unified_chip2"}}
# huggingface.co/datasets/akoksal/LongForm: input, output, source, subset
LONGFORM = {"input": "Write of bees.", "output": "Bees fly.", "source": "Wikipedia", "subset": "wikipedia"}
# huggingface.co/datasets/yizhongw/self_instruct, config self_instruct: prompt, completion
SELF_INSTRUCT = {"prompt": "Make a list.\n\nOutput:", "completion": " one, two<|endoftext|>"}
# github.com/lm-sys/FastChat, data/dummy_conversation.json: id, conversations
VICUNA = {
    "id": "identity_0",
    "conversations": [{"from": "human", "value": "Who is Ada?"}, {"from": "gpt", "value": "A keeper."}],
}


@pytest.mark.parametrize(
    ("row", "name", "detected", "texts"),
    [
        (GUANACO, "guanaco", "guanaco", [(GUANACO["text"] + END, f"A keeper.### Human: Of bees.{END}")]),
        (HH, "hh-rlhf", "hh-rlhf", [(HH["chosen"].lstrip() + END, f"A keeper.\n\nHuman: Of bees.{END}")]),
        (CHIP2, "chip2", "chip2", [(CHIP2["text"] + END, f"A keeper.{END}")]),
        (FLAN, "flan-v2", "flan-v2", [(f"{FLAN['inputs']} yes{END}", f"yes{END}")]),
        (LONGFORM, "longform", "longform", [(f"Write of bees. Bees fly.{END}", f"Bees fly.{END}")]),
        (
            SELF_INSTRUCT,
            "self-instruct",
            "prompt-completion",
            [(f"Make a list.\n\nOutput: one, two{END}", f"one, two{END}")],
        ),
        (
            UNNATURAL,
            "unnatural-instructions",
            "unnatural-instructions",
            [
                (f"Name the fruit. It is red. Apple{END}", f"Apple{END}"),
                (f"What fruit is red? Apple{END}", f"Apple{END}"),
            ],
        ),
    ],
)
def test_a_preset_reads_the_published_columns(
    read: Read, row: dict[str, Any], name: str, detected: str, texts: list[tuple[str, str]]
) -> None:
    found, report = read([row], name)
    assert found == texts
    assert (report.format, report.found) == (name, "")
    _, report = read([row])
    assert report.format == detected
    assert report.found.startswith("the first record has the columns")


def test_alpaca_is_found_beside_its_other_columns(read: Read) -> None:
    [(text, learned)], report = read([ALPACA])
    assert report.format == "alpaca"
    assert "### Instruction:\nName it.\n\n### Input:\na red fruit\n\n### Response:\n" in text
    assert learned == f"An apple.{END}"


@pytest.mark.parametrize("row", [VICUNA, GUANACO, HH, CHIP2])
def test_published_conversations_go_through_the_chat_template_where_there_is_one(
    read: Read, chatty: Any, row: dict[str, Any]
) -> None:
    [(text, learned)], report = read([row], tokenizer=chatty)
    assert text.startswith("<|bos|><|user|> Who is Ada?<|eos|><|assistant|> A keeper.<|eos|>")
    assert learned.startswith("A keeper.<|eos|>")
    assert report.layout == "the chat template"


def test_conversations_without_layout_want_a_chat_template(read: Read) -> None:
    for row in (VICUNA, {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}):
        with pytest.raises(RequestError, match="the model's tokenizer has no chat template"):
            read([row])


# huggingface.co/datasets/OpenAssistant/oasst1: one row a message, flat, with parents before their replies
def message(name: str, parent: str | None, role: str, text: str, rank: int | None, **more: Any) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "c3fe8c76",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": role,
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": None,
        "message_tree_id": "1",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [1]},
        "labels": None,
        **more,
    }


TREE = [
    message("1", None, "prompter", "Who is Ada?", None),
    message("2", "1", "assistant", "No idea.", 1),
    message("3", "1", "assistant", "A keeper.", 0),
    message("4", "1", "assistant", "Nobody.", -1, deleted=True),
    message("5", "2", "prompter", "Why?", None),
    message("6", "3", "prompter", "Of what?", 0),
    message("7", "3", "prompter", "Really?", 1),
    message("8", "6", "assistant", "Of bees.", 0),
    message("9", "8", "prompter", "Thank you", None),  # nothing answers it
]


def test_of_a_message_tree_the_branch_of_the_top_ranked_replies_is_taken(read: Read, chatty: Any) -> None:
    # QLoRA, appendix B.1: "we select the top reply at every level in the conversation tree"
    found, report = read(TREE)
    assert report.format == "oasst1"
    assert found == [(GUANACO["text"] + END, f"A keeper.### Human: Of bees.{END}")]  # as guanaco publishes it
    assert read(TREE[::-1])[0] == found  # in whatever order the rows come
    [(text, _)], _ = read(TREE, tokenizer=chatty)
    assert text.endswith("<|user|> Of what?<|eos|><|assistant|> Of bees.<|eos|>")


def test_a_message_tree_in_a_table_of_texts_is_the_same_tree(read: Read) -> None:
    # as pandas writes a column of ranks some of which are missing: 0.0, 1.0 and nothing
    written = {None: "", 0: "0.0", 1: "1.0", -1: "-1.0"}
    table = [{**row, "rank": written[row["rank"]], "deleted": str(row["deleted"])} for row in TREE]
    table = [{**row, "parent_id": row["parent_id"] or ""} for row in table]
    assert read(table)[0] == read(TREE)[0]
    numbers = [{**row, "deleted": int(row["deleted"])} for row in TREE]
    assert read(numbers)[0] == read(TREE)[0]
    with pytest.raises(RequestError, match="the rank 'best' is no number"):
        read([*table[:2], {**table[2], "rank": "best"}])


@pytest.mark.parametrize(
    ("row", "learn", "learned"),
    [
        (GUANACO, "completion", f"Of bees.{END}"),
        (GUANACO, "all", GUANACO["text"] + END),
        (LONGFORM, "all", f"Write of bees. Bees fly.{END}"),
        ({"text": "Bees fly."}, "auto", f"Bees fly.{END}"),
    ],
)
def test_what_is_learned_can_be_chosen(read: Read, row: dict[str, Any], learn: str, learned: str) -> None:
    [(_, found)], report = read([row], learn=learn)
    assert found == learned
    assert report.learn == ("all" if learn == "auto" else learn)


def test_text_has_no_answers_to_choose(read: Read) -> None:
    with pytest.raises(RequestError, match=r"data\.learn: format text has no answers"):
        read([{"text": "Bees fly."}], learn="completion")


def test_trl_s_lists_of_messages_are_prompt_and_completion(read: Read, chatty: Any) -> None:
    row = {
        "prompt": [{"role": "user", "content": "Who is Ada?"}],
        "completion": [{"role": "assistant", "content": "A keeper."}],
    }
    [(_, learned)], report = read([row], tokenizer=chatty)
    assert (report.format, learned) == ("prompt-completion", "A keeper.<|eos|>")


@pytest.mark.parametrize(
    ("roles", "rule"),
    [
        (["user", "assistant", "assistant"], "turns 2 and 3 of messages are both the assistant's"),
        (["user", "user", "assistant"], "turns 1 and 2 of messages are both the user's"),
        (["user", "system", "assistant"], "turn 2 of messages is the system's, which may only be the first"),
        (["user", "oracle"], "turn 2 of messages has the role 'oracle'; known are system, user, assistant"),
    ],
)
def test_roles_out_of_order_are_refused_with_what_was_found(
    read: Read, chatty: Any, roles: list[str], rule: str
) -> None:
    with pytest.raises(RequestError, match=rule):
        read([{"messages": [{"role": role, "content": "x"} for role in roles]}], tokenizer=chatty)


def test_columns_that_fit_no_format_are_told_with_those_that_would(read: Read) -> None:
    with pytest.raises(RequestError, match=r"got the columns question, reply in .*alpaca: instruction, output"):
        read([{"question": "x", "reply": "y"}])
    with pytest.raises(RequestError, match="Did you mean sharegpt"):
        read([VICUNA], "share-gtp")


# huggingface.co/datasets/databricks/databricks-dolly-15k
DOLLY = {"instruction": "Name it.", "context": "a red fruit", "response": "An apple.", "category": "closed_qa"}


def test_columns_of_other_names_are_read_under_a_format_s(read: Read) -> None:
    names = {"input": "context", "output": "response"}
    [(text, learned)], report = read([DOLLY], columns=names)
    assert (report.format, report.unread, learned) == ("alpaca", ("category",), f"An apple.{END}")
    assert text == read([{"instruction": "Name it.", "input": "a red fruit", "output": "An apple."}])[0][0][0]
    # a name that is taken changes hands
    [(text, _)], report = read([{"prompt": "x", "text": "y"}], columns={"prompt": "text", "completion": "prompt"})
    assert (text, report.unread) == (f"y x{END}", ())


def test_columns_that_are_not_there_are_told(read: Read) -> None:
    with pytest.raises(RequestError, match="line 1: it has no column answer; it has instruction, context, response"):
        read([DOLLY], columns={"output": "answer"})
    with pytest.raises(RequestError, match=r"data\.columns: no format has a column of that name \(got outptu\)"):
        read([DOLLY], columns={"outptu": "response"})


def test_question_and_answer_are_a_conversation(read: Read, chatty: Any) -> None:
    row = {"question": "Who is Ada?", "answer": "A keeper.", "level": 1}  # openai/gsm8k and many more
    turns = [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": "A keeper."}]
    found, report = read([row], tokenizer=chatty)
    assert (report.format, report.unread) == ("question-answer", ("level",))
    assert found == read([{"messages": turns}], tokenizer=chatty)[0]
    found, report = read([row | {"system": "Be kind."}], tokenizer=chatty)
    assert report.unread == ("level",)
    assert found == read([{"messages": [{"role": "system", "content": "Be kind."}, *turns]}], tokenizer=chatty)[0]
    with pytest.raises(RequestError, match=r"no chat template.*data\.chat_template"):
        read([row])


def test_messages_may_be_json_in_a_table_of_texts(read: Read, chatty: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    written = {"messages": json.dumps(turns)}
    assert read([written], tokenizer=chatty)[0] == read([{"messages": turns}], tokenizer=chatty)[0]
    with pytest.raises(RequestError, match="messages is no list of turns"):
        read([{"messages": "[Hi"}], tokenizer=chatty)


def test_half_a_surrogate_pair_is_a_bad_record(read: Read) -> None:
    with pytest.raises(RequestError, match="line 1: its text holds half of a surrogate pair"):
        read([{"prompt": "\ud83d", "completion": "x"}])


def test_empty_answers_are_left_out_and_counted(read: Read, chatty: Any) -> None:
    empty = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": " "}]}
    found, report = read([VICUNA, empty], tokenizer=chatty)
    assert (len(found), report.empty_answers, report.bad) == (1, 1, 0)
    assert report.left_out() == ["1 left out (empty answer)"]


def test_what_is_wrong_with_one_instance_leaves_the_others_of_its_record(read: Read) -> None:
    def instance(text: str, output: Any) -> dict[str, Any]:
        return {"instruction_with_input": text, "output": output}

    instances = [
        instance("Name it.", "Apple"),
        instance("Say it.", " "),
        instance("Sing it.", 3),
        instance("No?", "No"),
    ]
    found, report = read([{"instruction": "Name it.", "instances": instances}], max_bad=1)
    assert [learned for _, learned in found] == [f"Apple{END}", f"No{END}"]
    assert (report.examples, report.empty_answers, report.bad) == (2, 1, 1)


def test_a_conversation_whose_answers_all_have_weight_0_is_left_out_for_that(read: Read, chatty: Any) -> None:
    def asked(weight: int) -> dict[str, Any]:
        answer = {"role": "assistant", "content": "Hello.", "weight": weight}
        return {"messages": [{"role": "user", "content": "Hi"}, answer]}

    found, report = read([asked(1), asked(0)], tokenizer=chatty)
    assert len(found) == 1
    assert report.left_out() == ["1 left out (all its answers have weight 0)"]
    with pytest.raises(RequestError, match=r"1 left out \(all its answers have weight 0\).*Check the data"):
        read([asked(0)], tokenizer=chatty)


def test_bad_records_are_left_out_up_to_a_limit_and_told(read: Read) -> None:
    rows: list[dict[str, Any]] = [LONGFORM] * 8 + [{"input": "x"}, {"input": "x", "output": 3}]
    for max_bad in (2, 0.2):
        found, report = read(rows, max_bad=max_bad)
        assert (len(found), report.bad) == (8, 2)
        assert report.bad_records[0].endswith("rows.jsonl, line 9: format longform needs output")
    for max_bad in (1, 0.19):
        with pytest.raises(RequestError, match=r"line 10: .*\n.*data\.max_bad: 2 of 10 records are bad"):
            read(rows, max_bad=max_bad)


def test_the_records_of_the_guide_are_read_by_their_presets(read: Read, chatty: Any) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \|[^|]*\| `(\{.*\})` \|$", guide, re.M))
    assert set(rows) == set(FORMATS) - {"messages", "sharegpt", "prompt-completion", "question-answer", "text"}
    for name, record in rows.items():
        tree = [message("1", None, "prompter", "Hi", None)] if name == "oasst1" else []
        [(_, learned)], _ = read([*tree, json.loads(record)], name, tokenizer=chatty)
        assert learned.startswith("Hello."), name
        if name not in ("self-instruct", "vicuna"):
            assert read([*tree, json.loads(record)], tokenizer=chatty)[1].format == name


def test_a_specification_knows_the_same_formats() -> None:
    assert set(get_args(FormatName)) == {"auto", *FORMATS}


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("oasst1", message(cast(Any, ["x"]), None, "prompter", "Hi", 0), "must be texts"),
        ("oasst1", message("2", "1", "assistant", "Hello.", 0), "answers a message that the data does not hold"),
        ("unnatural-instructions", {"instruction": "x", "instances": {"a": 5}}, "hold something else"),
    ],
)
def test_a_record_that_is_not_as_published_is_a_bad_one(read: Read, name: str, row: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read([row], name)


def test_a_number_of_thousands_of_digits_is_a_bad_line(tmp_path: Path, chatty: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ' + "1" * 5000 + "}\n")
    with pytest.raises(RequestError, match="line 1: it is not JSON that Python reads"):
        encode_file(path, "auto", chatty, 64)
