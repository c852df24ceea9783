"""What `qlora-plan` chooses, compares, writes and completes: objectives, auto, clusters, sweeps, run files, reports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plan_command import Ask, ask

from launch.run_file import write_run
from orchestrator import plan
from orchestrator.spec import ClusterSpec, load_spec

__all__ = ["ask"]
ROOT = Path(__file__).parents[1]
GIB = 1024**3
TWO_POOLS = """
name: team
currency: EUR
prices_as_of: 2026-11-01
pools:
- {name: big, gpu: a100-80gb, gpus_per_node: 2, nodes: 2, host_ram_gib: 512, price_per_hour: 8}
- {name: small, gpu: l4, gpus_per_node: 4, nodes: 1, host_ram_gib: 192, price_per_hour: 3}
"""


@pytest.fixture
def team(tmp_path: Path) -> str:
    path = tmp_path / "team.yaml"
    path.write_text(TWO_POOLS)
    return str(path)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_a_request_is_answered_as_it_is_and_the_search_fills_alternatives_only(ask: Ask) -> None:
    answer = ask("--model", "7b", "--gpu", "rtx-4090", "--json").json
    assert answer["strategy"]["micro_batch"] == 1
    assert answer["strategy"]["gradient_checkpointing"] is True
    best = answer["alternatives"][0]
    assert best["fits"]
    assert best["gpus"] == 1
    own = answer["verdicts"][0]["step_time"]["tokens_per_second"]
    assert best["step_time"]["tokens_per_second"] > own
    assert best["process_bytes"] <= best["usable_bytes"]


def test_a_faster_alternative_is_under_autocast_as_a_run_is(ask: Ask) -> None:
    """The request stays without, as the contract has it; who asked for it has nothing to be told."""
    answer = ask("--model", "7b", "--gpu", "rtx-4090", "--json").json
    assert answer["recipe"]["autocast"] is False
    assert answer["alternatives"]
    for other in answer["alternatives"]:
        assert {"field": "autocast", "value": "true", "reason": "instead of False"} in other["changes"]
    for more in (["--autocast"], ["--compute-dtype", "float32"], ["--lora-dtype", "bfloat16"], ["--dora"]):
        others = ask("--model", "7b", "--gpu", "rtx-4090", *more, "--json").json["alternatives"]
        assert others
        assert "autocast" not in {change["field"] for other in others for change in other["changes"]}


def test_under_an_objective_what_was_passed_stays_and_the_rest_is_chosen_with_reasons(ask: Ask) -> None:
    answer = ask("--model", "7b", "--gpu", "rtx-4090", "--objective", "fastest", "--loss", "full", "--json").json
    assert answer["strategy"]["loss"] == "full"
    chosen = {choice["field"]: choice["reason"] for choice in answer["choices"]}
    assert {"world_size", "micro_batch", "gradient_checkpointing", "zero_stage", "offload"} <= set(chosen)
    assert "loss" not in chosen
    assert all(chosen.values())
    assert answer["recipe"]["seq_len"] == 512, "the context is the person's to shorten"
    assert answer["recipe"]["rank"] == 64


@pytest.mark.parametrize(
    ("gpus", "value", "reason"),
    [("1", "true", "survives spikes of memory, at no cost"), ("4", "false", "paged state would be no faster")],
)
def test_the_reason_for_paging_is_that_of_what_was_chosen(ask: Ask, gpus: str, value: str, reason: str) -> None:
    answer = ask("--model", "llama-3.1-8b", "--gpu", "h200", "--gpus", gpus, "--objective", "fastest", "--json").json
    assert {"field": "paged_optimizer", "value": value, "reason": reason} in answer["choices"]


def test_auto_opens_one_field(ask: Ask) -> None:
    answer = ask("--model", "7b", "--gpu", "rtx-4090", "--micro-batch", "auto", "--json").json
    assert answer["strategy"]["micro_batch"] > 1
    assert answer["strategy"]["gradient_checkpointing"] is True
    assert answer["strategy"]["world_size"] == 1


def test_the_step_that_was_asked_for_is_kept_whatever_is_chosen(ask: Ask) -> None:
    asked = ("--model", "7b", "--gpu", "rtx-4090", "--objective", "fastest", "--tokens-per-step", "6144", "--json")
    answer = ask(*asked).json
    strategy = answer["strategy"]
    made = strategy["world_size"] * strategy["micro_batch"] * strategy["gradient_accumulation"]
    assert made * 512 == answer["recipe"]["tokens_per_step"] == 6144
    fixed = ask("--model", "7b", "--micro-batch", "4", "--tokens-per-step", "8192", "--json").json
    assert fixed["strategy"]["gradient_accumulation"] == 4


def test_the_longest_context_fits_and_ends_at_the_model_s_positions(ask: Ask) -> None:
    answer = ask("--model", "65b", "--gpu", "l40s", "--gpus", "1", "--objective", "longest", "--json").json
    assert answer["recipe"]["seq_len"] == 2048  # LLaMA's max_position_embeddings
    assert answer["verdicts"][0]["fits"]
    narrow = ("--model", "65b", "--gpu", "a100-40gb", "--gpus", "1", "--objective", "longest", "--offload", "none")
    found = ask(*narrow, "--json").json
    short = found["recipe"]["seq_len"]
    assert 0 < short < 512
    kept = () if found["strategy"]["gradient_checkpointing"] else ("--no-gradient-checkpointing",)
    assert ask("--model", "65b", "--gpu", "a100-40gb", "--seq-len", str(short), *kept).code == 0
    assert ask("--model", "65b", "--gpu", "a100-40gb").code == 1, "at 512, the default"


def test_where_nothing_fits_the_nearest_that_would_are_shown_with_their_numbers(ask: Ask) -> None:
    asked = ("--model", "7b", "--gpu", "t4", "--micro-batch", "16", "--seq-len", "2048", "--loss", "full")
    answer = ask(*asked, "--json")
    assert answer.code == 1
    titles = [each["title"] for each in answer.json["alternatives"]]
    assert titles[0] == "a smaller micro-batch", "the cheapest sacrifice first"
    assert titles[-1] == "a larger GPU"
    for each in answer.json["alternatives"]:
        assert each["process_bytes"] <= each["usable_bytes"]
        assert each["changes"]
    screen = ask(*asked)
    assert "The nearest that would fit" in screen.out
    assert "a smaller micro-batch" in screen.out


def test_a_default_that_the_model_s_code_has_not_is_changed_and_said_and_refused_where_it_was_passed(ask: Ask) -> None:
    answer = ask("--model", "gemma-2-2b", "--json").json
    assert answer["strategy"]["attention"] == "eager"
    assert "attention" in {choice["field"] for choice in answer["choices"]}
    refused = ask("--model", "gemma-2-2b", "--attention", "sdpa")
    assert refused.code == 2
    assert "--attention" in refused.err


def test_int8_is_refused_under_zero_3_and_never_offered_with_it(ask: Ask) -> None:
    # Linear8bitLt computes with state.CB, which is all of the weight: there is nothing that a division would save
    refused = ask("--model", "7b", "--gpu", "t4", "--gpus", "2", "--quant", "int8", "--zero-stage", "3")
    assert refused.code == 2
    assert "int8 layers keep their whole weight" in refused.err
    chosen = ask(
        "--model", "33b", "--gpu", "rtx-4090", "--gpus", "4", "--quant", "int8", "--objective", "fastest", "--json"
    )
    offered = [chosen.json["strategy"], *(each["strategy"] for each in chosen.json["alternatives"])]
    assert all(strategy["zero_stage"] < 3 for strategy in offered)


def test_what_is_chosen_for_the_trace_is_what_it_can_follow(ask: Ask) -> None:
    # adapters of rank 1536, their gradients and states in float32 are 16 bytes for each of 470 million weights
    asked = ("--model", "smollm2-135m", "--gpu", "rtx-3070", "--gpus", "2", "--rank", "1536", "--optimizer", "adamw")
    assert ask(*asked, "--zero-stage", "auto", "--json").json["strategy"]["zero_stage"] > 0
    answer = ask(*asked, "--zero-stage", "auto", "--estimator", "trace", "--json")
    assert answer.code == 1, answer.err
    assert (answer.json["estimator"], answer.json["strategy"]["zero_stage"]) == ("trace", 0)
    reason = next(choice["reason"] for choice in answer.json["choices"] if choice["field"] == "zero_stage")
    assert "trace does not follow ZeRO" in reason


@pytest.mark.parametrize(("offload", "least"), [("optimizer", 2), ("all", 3)])
def test_an_offload_that_was_passed_brings_the_zero_stage_that_it_needs(ask: Ask, offload: str, least: int) -> None:
    asked = ("--model", "7b", "--gpu", "l4", "--gpus", "2", "--offload", offload, "--json")
    for opened in (("--zero-stage", "auto"), ("--objective", "fastest")):
        strategy = ask(*asked, *opened).json["strategy"]
        assert (strategy["offload"], strategy["zero_stage"]) == (offload, least)


# --- time and price ---------------------------------------------------------------------------------------------------


def test_a_run_s_time_and_price_have_bounds_and_follow_from_the_step(ask: Ask, team: str) -> None:
    answer = ask("--model", "7b", "--cluster", team, "--gpus", "1", "--tokens", "5.12M", "--json").json
    run, step = answer["duration"], answer["verdicts"][0]["step_time"]
    assert run["tokens"] == 5_120_000
    assert run["steps"] == 10_000  # of 512 tokens
    assert run["low_seconds"] < run["seconds"] < run["high_seconds"]
    assert run["seconds"] == pytest.approx(10_000 * step["seconds"])
    assert run["currency"] == "EUR"
    # the l4 is the smaller that fits: one GPU of a node of 3 EUR an hour, which is rented whole
    assert run["price"] == pytest.approx(3 * run["seconds"] / 3600)


def test_no_price_is_made_up(ask: Ask) -> None:
    run = ask("--model", "7b", "--gpu", "l4", "--tokens", "1M", "--json").json["duration"]
    assert (run["price"], run["currency"]) == (None, None)


def test_the_data_s_text_is_counted_where_there_is_no_tokenizer_and_that_is_said(ask: Ask, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "abc", "completion": "defg"}\n' * 1000)
    answer = ask("--model", "7b", "--gpu", "l4", "--data", str(data), "--json").json
    # 20 of 1000 are held out; 40 bytes a line, 4 a token; an example is a sequence, however short
    assert answer["duration"]["tokens"] == 9_800
    assert answer["duration"]["steps"] == 980
    by_sixteen = ask("--model", "7b", "--gpu", "l4", "--data", str(data), "--tokens-per-step", "8192", "--json").json
    assert by_sixteen["duration"]["steps"] == 61  # 980 of 16 sequences of 512, the last 4 dropped
    assert by_sixteen["duration"]["seconds"] < answer["duration"]["seconds"] * 1.01
    assert any(choice["field"] == "tokens" and "about" in choice["reason"] for choice in answer["choices"])


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_the_pools_of_a_cluster_are_what_it_may_run_on(ask: Ask, team: str) -> None:
    answer = ask("--model", "7b", "--cluster", team, "--json").json
    assert [verdict["gpu"] for verdict in answer["verdicts"]] == ["l4", "a100-80gb"]
    assert answer["estimate"]["host"]["fits"] is True, "its description states the hosts' memory"
    wide = ask("--model", "7b", "--cluster", team, "--gpus", "4", "--json").json
    assert wide["strategy"]["world_size"] == 4
    refused = ask("--model", "7b", "--cluster", team, "--gpus", "5")
    assert refused.code == 2
    assert "the largest pool has 4" in refused.err


def test_the_cheapest_may_be_another_pool_than_the_fastest(ask: Ask, team: str) -> None:
    def place(objective: str) -> tuple[str, int]:
        answer = ask("--model", "7b", "--cluster", team, "--objective", objective, "--json").json
        return answer["estimate"]["gpu"]["name"], answer["strategy"]["world_size"]

    assert place("fastest") == ("a100-80gb", 4)
    assert place("fewest-gpus")[1] == 1
    # 4 L4 for 3 EUR an hour, 2 A100 for 8: an A100 has 5 times the bandwidth and 2.6 times the tensor cores of an L4
    assert place("cheapest") in {("l4", 4), ("a100-80gb", 2)}


def test_without_a_gpu_named_a_fake_nvidia_smi_s_gpus_are_planned_for(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\n"
        "echo 'NVIDIA GeForce RTX 4090, 24564, 24000, 8.9'\n"
        "echo 'NVIDIA GeForce RTX 4090, 24564, 23500, 8.9'\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer = ask("--model", "7b", "--json").json
    assert answer["strategy"]["world_size"] == 2, answer["warnings"]
    assert [verdict["gpu"] for verdict in answer["verdicts"]] == ["rtx-4090"]
    assert answer["verdicts"][0]["usable_bytes"] == 23500 * 1024**2, "what is free on the fuller one"
    assert any("this machine" in choice["reason"] for choice in answer["choices"])


def test_unlike_pools_in_one_group_are_called_what_they_are(ask: Ask) -> None:
    pools = str(ROOT / "clusters" / "examples" / "two-pools.yaml")
    # one sequence on each GPU: long enough for what they compute to count more than what they send
    asked = ("--model", "llama-3.1-8b", "--cluster", pools, "--objective", "fastest", "--seq-len", "2048")
    answer = ask(*asked, "--json").json
    assert " + " in answer["group"]
    assert len(answer["verdicts"]) == 2
    assert answer["group"] in ask(*asked).out.splitlines()[0]
    assert any("wait for" in choice["reason"] for choice in answer["choices"])


def test_kinds_that_are_only_compared_are_not_put_together(ask: Ask) -> None:
    asked = (
        "--model",
        "7b",
        "--compare",
        "rtx-3090,rtx-4090",
        "--objective",
        "fastest",
        "--tokens-per-step",
        "1048576",
    )
    answer = ask(*asked, "--json").json
    assert answer["group"] is None
    assert answer["strategy"]["world_size"] <= 8


def test_a_stated_host_memory_limits_what_is_chosen(ask: Ask) -> None:
    # each rank loads through the host, where its embedding takes 128,256 x 4,096 x 2 bytes: of 8 ranks 7.8 GiB
    asked = ("--model", "llama-3.1-8b", "--gpu", "rtx-4090", "--objective", "fastest", "--json")
    assert ask(*asked).json["strategy"]["world_size"] == 8
    tight = ask(*asked, "--host-ram", "2.5")
    assert tight.code == 0
    assert tight.json["strategy"]["world_size"] == 2


def test_of_which_day_prices_are_is_told(ask: Ask, tmp_path: Path) -> None:
    pools = str(ROOT / "clusters" / "examples" / "two-pools.yaml")
    told = ask("--model", "7b", "--cluster", pools, "--tokens", "1M", "--json").json["choices"]
    [prices] = [choice for choice in told if choice["field"] == "prices"]
    assert prices["value"] == "EUR, as of 2026-11-01"  # as the file says
    (tmp_path / "free.yaml").write_text(
        "name: a\nprices_as_of: 2026-01-01\npools:\n- {name: b, gpu: l4, gpus_per_node: 1}\n"
    )
    told = ask("--model", "7b", "--cluster", str(tmp_path / "free.yaml"), "--json").json["choices"]
    assert "prices" not in {choice["field"] for choice in told}, "it has none"


def test_a_pool_that_fits_is_shown_before_one_whose_hosts_are_too_small(ask: Ask, tmp_path: Path) -> None:
    # 8 ranks under ZeRO 3 each load the whole of 70 billion weights, in 4 bits 40 GB and more, through their host
    path = tmp_path / "two.yaml"
    path.write_text(
        "name: two\npools:\n"
        "- {name: small, gpu: l40s, gpus_per_node: 8, nodes: 1, host_ram_gib: 64}\n"
        "- {name: big, gpu: a100-80gb, gpus_per_node: 8, nodes: 1, host_ram_gib: 2048}\n"
    )
    asked = ("--model", "llama-3.1-70b", "--cluster", str(path), "--gpus", "8", "--zero-stage", "3")
    answer = ask(*asked, "--json")
    assert (answer.code, answer.json["estimate"]["gpu"]["name"]) == (0, "a100-80gb")
    assert {each["gpu"]: (each["fits"], each["host_fits"]) for each in answer.json["verdicts"]} == {
        "l40s": (False, False),
        "a100-80gb": (True, True),
    }
    assert ask(*asked).out.startswith("FITS")


def test_other_ways_on_a_cluster_look_at_all_its_pools(ask: Ask, team: str) -> None:
    answer = ask("--model", "7b", "--cluster", team, "--json").json
    assert {"a100-80gb"} <= {each["gpu"] for each in answer["alternatives"]}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--seq-len", "auto"), "only --objective longest"),
        (("--objective", "longest", "--seq-len", "64"), "looks for it"),
    ],
)
def test_a_length_is_chosen_for_the_longest_context_only(ask: Ask, extra: tuple[str, ...], words: str) -> None:
    refused = ask("--model", "7b", "--gpu", "t4", *extra)
    assert refused.code == 2
    assert words in refused.err


def test_a_network_that_nobody_stated_is_told(ask: Ask) -> None:
    assert "10 Gbit/s" in ask("--model", "7b", "--gpu", "h100-80gb", "--gpus", "16").err
    assert "10 Gbit/s" not in ask("--model", "7b", "--gpu", "h100-80gb", "--gpus", "8").err


@pytest.mark.parametrize(
    ("asked", "code", "gpu"),
    [
        # one GPU fits, and all four of two nodes, which exchange little, are faster
        ("--model 7b --rank 8 --cluster {team}", 0, "a100-80gb"),
        # 8 GPUs of one node do not suffice
        ("--model llama-2-70b --method lora --gpu rtx-4070", 1, "rtx-4070"),
    ],
)
def test_a_network_that_nobody_stated_is_told_once_where_only_another_way_crosses_it(
    ask: Ask, team: str, asked: str, code: int, gpu: str
) -> None:
    answer = ask(*asked.format(team=team).split(), "--json")
    assert (answer.code, answer.json["strategy"]["world_size"]) == (code, 1)
    told = {each["nodes"] > 1: "10 Gbit/s" in " ".join(each["warnings"]) for each in answer.json["alternatives"]}
    assert told == {True: True, False: False}
    assert answer.err.count(f"the network between nodes of {gpu} is not stated") == 1


def test_a_wrong_report_is_refused_before_a_run_is_written(ask: Ask, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    assert ask("--model", "7b", "--gpu", "t4", "--write", str(run), "--report", str(tmp_path / "x.pdf")).code == 2
    assert not run.exists()


def test_gpus_that_are_compared_are_told_of_though_another_is_better_or_none_fits(ask: Ask) -> None:
    alone = ("--model", "33b", "--objective", "fewest-gpus", "--gpus", "1", "--offload", "none", "--json")
    answer = ask(*alone, "--compare", "a100-80gb,l40s,t4").json
    assert answer["estimate"]["gpu"]["name"] == "a100-80gb"  # twice the bandwidth, and no dearer: neither has a price
    assert [each["gpu"] for each in answer["alternatives"]] == ["l40s"]
    # 33 billion weights in 4 bits are more than 16 GB
    assert [choice["value"] for choice in answer["choices"] if choice["field"] == "compare"] == ["t4"]
    many = "a100-80gb,a100-40gb,l40s,rtx-3090,rtx-4090,l4,t4"
    answer = ask("--model", "7b", "--objective", "fewest-gpus", "--compare", many, "--json").json
    shown = {answer["estimate"]["gpu"]["name"], *(each["gpu"] for each in answer["alternatives"])}
    assert shown == set(many.split(","))


# --- sweeps and reports -----------------------------------------------------------------------------------------------


def test_a_sweep_is_a_row_for_each_value_and_a_column_for_each_gpu(ask: Ask) -> None:
    asked = ("--model", "7b", "--compare", "t4,rtx-4090", "--sweep", "seq-len=512,4096,16384")
    answer = ask(*asked, "--json").json
    plans = answer["sweep"]["plans"]
    assert [plan["values"] for plan in plans] == [{"seq-len": value} for value in ("512", "4096", "16384")]
    sizes = [[verdict["process_bytes"] for verdict in plan["verdicts"]] for plan in plans]
    assert sizes[0][1] < sizes[1][1] < sizes[2][1]
    alone = ask("--model", "7b", "--compare", "t4,rtx-4090", "--seq-len", "4096", "--json").json
    assert sizes[1] == [verdict["process_bytes"] for verdict in alone["verdicts"]]
    screen = ask(*asked).out
    assert f"{sizes[1][1] / GIB:.2f}" in screen
    assert "x does not fit" in screen


def test_two_sweeps_are_a_map(ask: Ask) -> None:
    asked = ("--model", "7b", "--gpu", "t4", "--sweep", "seq-len=512,8192", "--sweep", "micro-batch=1,2,64")
    plans = ask(*asked, "--json").json["sweep"]["plans"]
    assert len(plans) == 6
    assert [plan["fits"] for plan in plans] == [True, True, False, True, False, False] or plans[0]["fits"]
    assert "across" in ask(*asked).out


def test_a_value_that_makes_no_plan_is_told_in_its_place(ask: Ask) -> None:
    answer = ask("--model", "7b", "--gpu", "t4", "--sweep", "quant=nf4,none", "--json").json
    right, wrong = answer["sweep"]["plans"]
    assert right["refused"] is None
    assert "qlora needs a quantized base" in wrong["refused"]
    screen = " ".join(ask("--model", "7b", "--gpu", "t4", "--sweep", "quant=nf4,none").out.split())
    assert "none: --quant: method qlora needs a quantized base" in screen


def test_a_swept_gpu_is_each_value_s_own(ask: Ask) -> None:
    asked = ("--model", "7b", "--gpu", "rtx-4090")
    needed = [
        ask("--model", "7b", "--gpu", gpu, "--json").json["verdicts"][0]["process_bytes"] for gpu in ("t4", "l40s")
    ]
    lines = ask(*asked, "--sweep", "gpu=t4,l40s").out.splitlines()[-4:]
    assert [line.split() for line in lines[:3]] == [
        ["gpu", "needed"],
        ["t4", f"{needed[0] / GIB:.2f}"],
        ["l40s", f"{needed[1] / GIB:.2f}"],
    ]
    screen = ask(*asked, "--sweep", "gpu=t4,l40s", "--sweep", "seq-len=512,1024").out
    assert "(across), in GiB" in " ".join(screen.split())
    assert [line.split()[1] for line in screen.splitlines()[-3:-1]] == [f"{size / GIB:.2f}" for size in needed]


def test_a_sweep_has_a_column_for_each_gpu_that_any_value_chooses(ask: Ask, team: str) -> None:
    asked = ("--model", "llama-3.1-8b", "--cluster", team, "--objective", "cheapest")
    chosen = [ask(*asked, "--seq-len", length, "--json").json["verdicts"] for length in ("512", "65536")]
    assert [[each["gpu"] for each in verdicts] for verdicts in chosen] == [["l4"], ["a100-80gb"]], "says nothing else"
    short, long = (f"{verdict['process_bytes'] / GIB:.2f}" for (verdict,) in chosen)
    lines = ask(*asked, "--sweep", "seq-len=512,65536").out.splitlines()[-4:]
    assert [line.split() for line in lines[:3]] == [
        ["seq-len", "l4", "a100-80gb"],
        ["512", short, "-"],
        ["65536", "-", long],
    ]


def test_reports_hold_what_the_screen_shows_each_in_its_form(ask: Ask, tmp_path: Path) -> None:
    paths = [tmp_path / "plan.html", tmp_path / "plan.md"]
    asked = ("--model", "7b", "--gpu", "t4", "--sweep", "seq-len=512,16384")
    screen = ask(*asked, *(word for path in paths for word in ("--report", str(path))))
    assert screen.code == 0
    for path in paths:
        page = path.read_text()
        for words in ("llama-7b", "16384", "base weights", "FITS"):
            assert words in page
        names_of_markup = r'http-equiv|xmlns(:xlink)?="[^"]*"'
        assert "http" not in re.sub(names_of_markup, "", page), "self-contained"


def test_a_report_has_no_heading_with_nothing_below_it(ask: Ask, tmp_path: Path) -> None:
    assert ask("--model", "7b", "--gpu", "t4", "--report", str(tmp_path / "p.md")).code == 0
    title, *sections = (tmp_path / "p.md").read_text().split("\n## ")
    assert title.startswith("# FITS")
    assert len(sections) > 3
    for section in sections:
        heading, _, below = section.partition("\n")
        assert below.strip(), heading


def test_markup_in_a_model_s_name_stays_text_in_a_report(ask: Ask, tmp_path: Path) -> None:
    folder = tmp_path / "<b>bold<b>"
    folder.mkdir()
    config = json.loads((ROOT / "qlora_core/models/smollm2-135m.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    assert ask("--model", str(folder), "--gpu", "t4", "--report", str(tmp_path / "p.html")).code == 0
    page = (tmp_path / "p.html").read_text()
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page


# --- written runs -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_a_run_of_that_very_plan(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    asked = (
        "--model",
        "7b",
        "--gpu",
        "rtx-4090",
        "--objective",
        "fastest",
        "--rank",
        "16",
        "--targets",
        "q_proj,v_proj",
    )
    answer = ask(*asked, "--write", str(path), "--json").json
    spec = load_spec(path)
    assert spec.model == "llama-7b"
    written = {**spec.recipe.to_json(), "compute_dtype": answer["recipe"]["compute_dtype"]}
    assert written == answer["recipe"]
    strategy = dict(answer["strategy"])
    strategy.pop("gradient_accumulation")
    assert spec.strategy_request.model_dump() == strategy
    again = ask(*asked, "--write", str(path))
    assert again.code == 2
    assert "there is a file" in again.err
    assert yaml.safe_load(path.read_text())["recipe"]["rank"] == 16, "left as it was"


def test_data_that_wants_a_specification_is_told_from_its_size(ask: Ask, tmp_path: Path, tiny_base: Path) -> None:
    rows = [json.dumps({"ask": "x" * 30, "reply": "y"})] * 5  # columns of no format
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    answer = ask("--model", str(tiny_base), "--gpu", "l4", "--data", str(tmp_path / "data.jsonl"), "--json").json
    [choice] = [choice for choice in answer["choices"] if choice["field"] == "tokens"]
    assert choice["value"] == f"{4 * -(-len(rows[0]) // 4):,}"  # four bytes a token, and one of five is held out
    assert choice["reason"].endswith("exactly from a run's specification: no known format has them")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"text": "hello"}\n\n{"text": "no end"\n', "line 3 is not JSON"),
        ('{"text": "hello"}\n["a", "list"]\n', "line 2 is no JSON object"),
        ("question,answer\nwhy,because\n", "line 1 is not JSON"),
        (bytes(range(128, 256)), "line 1 is not JSON"),
    ],
)
def test_what_no_run_would_read_as_data_is_no_data(ask: Ask, tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    answer = ask("--model", "7b", "--gpu", "l4", "--data", str(path))
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err


def test_a_run_for_the_gpus_of_two_pools_is_not_written(ask: Ask, tmp_path: Path) -> None:
    pools = str(ROOT / "clusters" / "examples" / "two-pools.yaml")
    path = tmp_path / "run.yaml"
    asked = ("--model", "llama-3.1-8b", "--cluster", pools, "--objective", "fastest", "--seq-len", "2048")
    answer = ask(*asked, "--write", str(path))
    assert answer.code == 2
    assert "the GPUs of one pool" in answer.err
    assert not path.exists()


def test_a_run_planned_for_a_running_ray_is_written_for_that_ray(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    write_run(plan("7b", gpu="l4"), {"write": path, "model": "7b", "data": None, "cluster": "10.0.0.5:6379"})
    assert load_spec(path).cluster == ClusterSpec(address="10.0.0.5:6379")


@pytest.mark.slow
def test_a_written_run_is_planned_by_a_dry_run_as_it_was_written(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = Path("base")
    make = [sys.executable, str(ROOT / "examples" / "make_demo_base.py"), "--out", str(base), "--steps", "2"]
    subprocess.run(make, check=True, capture_output=True)
    path = tmp_path / "run.yaml"
    asked = ("--model", str(base), "--gpu", "cpu", "--data", str(base / "train.jsonl"), "--seq-len", "64")
    answer = ask(*asked, "--tokens-per-step", "1024", "--objective", "fastest", "--write", str(path), "--json").json
    train = str(Path(sys.executable).with_name("qlora-train"))
    done = subprocess.run([train, str(path), "--dry-run", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned: dict[str, Any] = json.loads(done.stdout)
    assert planned["strategy"] == answer["strategy"]
    assert planned["recipe"] == answer["recipe"]
    assert planned["estimate"]["gpu"]["allocated_bytes"] == answer["estimate"]["gpu"]["allocated_bytes"]
    assert planned["digest"] == answer["digest"]
    assert planned["duration"]["steps"] == answer["duration"]["steps"]


@pytest.fixture
def shorter(tmp_path: Path, tiny_base: Path) -> tuple[str, ...]:
    """A request whose data's longest example is far shorter than the length that is asked for."""
    rows = [json.dumps({"text": "the cat sat on the mat"})] * 50
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    data = str(tmp_path / "short.jsonl")
    return "--model", str(tiny_base), "--gpu", "l4", "--data", data, "--seq-len", "64", "--tokens-per-step", "1024"


@pytest.mark.parametrize("more", [(), ("--micro-batch", "auto"), ("--objective", "fastest")])
def test_data_that_is_shorter_changes_neither_the_length_nor_the_step_that_were_asked_for(
    ask: Ask, tmp_path: Path, shorter: tuple[str, ...], more: tuple[str, ...]
) -> None:
    path = tmp_path / "run.yaml"
    answer = ask(*shorter, *more, "--write", str(path), "--json").json
    [planned] = [int(each["value"]) for each in answer["choices"] if each["field"] == "planned length"]
    assert planned < 64
    assert (answer["recipe"]["seq_len"], answer["recipe"]["tokens_per_step"]) == (64, 1024)
    written = yaml.safe_load(path.read_text())["recipe"]
    assert (written["seq_len"], written["tokens_per_step"]) == (64, 1024)
    assert {way["recipe"]["seq_len"] for way in answer["alternatives"]} <= {64}
    assert answer["duration"]["steps"] == 3  # 49 examples, 16 sequences a step


def test_what_is_explained_of_shorter_data_is_what_is_planned_of_it(ask: Ask, shorter: tuple[str, ...]) -> None:
    answer = ask(*shorter, "--explain", "--json").json
    [planned] = [int(each["value"]) for each in answer["choices"] if each["field"] == "planned length"]
    step = ("--seq-len", str(planned), "--tokens-per-step", str(16 * planned))
    same = ask(*shorter[:4], *step, "--explain", "--json").json
    text, expected = ([line for part in each["explanation"] for line in part["lines"]] for each in (answer, same))
    assert answer["estimate"]["gpu"]["process_bytes"] == same["estimate"]["gpu"]["process_bytes"]
    assert [line for line in text if "GiB" in line or "MiB" in line] == [
        line for line in expected if "GiB" in line or "MiB" in line
    ]


def test_the_longest_context_is_looked_for_whatever_the_data_and_without_a_fixed_step(
    ask: Ask, shorter: tuple[str, ...]
) -> None:
    at = shorter.index("--seq-len")
    refused = ask(*shorter[:at], *shorter[at + 2 :], "--objective", "longest")
    assert refused.code == 2
    assert "--tokens-per-step: --objective longest looks for the length" in refused.err
    answer = ask(*shorter[:at], "--objective", "longest", "--json").json
    assert not [each for each in answer["choices"] if each["field"] == "planned length"]
    assert answer["duration"] is None


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("qlora-plan --gpu l4", "l40s"),
        ("qlora-plan --compare t4,a100", "t4,a100-80gb"),
        ("qlora-plan --obj", "--objective"),
    ],
)
def test_a_shell_completes_options_and_names(words: str, expected: str) -> None:
    environment = {**os.environ, "_QLORA_PLAN_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "2"}
    if words.count(" ") == 1:
        environment["COMP_CWORD"] = "1"
    command = str(Path(sys.executable).with_name("qlora-plan"))
    printed = subprocess.run([command], capture_output=True, text=True, env=environment).stdout
    assert expected in [line.partition(",")[2] for line in printed.splitlines()]
