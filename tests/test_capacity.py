"""Schedules by an independent validator and by brute force; what the outlook says, by hand; what files may say."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from clusters.cluster import Cluster, load_cluster
from clusters.errors import RequestError
from clusters.gpu import find_gpu
from clusters.hours import OpenHours
from launch.capacity import capacity
from launch.report import document
from launch.report.document import Document, Section, escaped
from launch.report.pictures.style import kind
from orchestrator.devices import any_nodes
from orchestrator.fleet import outlook as fleet_outlook
from orchestrator.fleet.jobs import JobForm, Run, load_jobs
from orchestrator.fleet.options import JOBS_OF_A_PROCESS, Option, options, options_of_all, recipe_of, shares
from orchestrator.fleet.outlook import METHODS
from orchestrator.fleet.schedule import Placed, Schedule, by_rules, in_turn
from orchestrator.fleet.solver import by_solver, is_too_large
from orchestrator.history import NOTHING_MEASURED
from qlora_core.recipe import Method, Recipe

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "clusters" / "examples"


def pool(name: str, nodes: int, gpus: int) -> Any:
    return replace(any_nodes(find_gpu("a100-80gb")), name=name, nodes=nodes, gpus_per_node=gpus, exists=True)


def fleet_of(*pools: Any) -> Cluster:
    return Cluster("fleet", pools, None, None, "a test")


def way(pool: str, gpus: int, nodes: int, hours: float, cost: float | None = None) -> Option:
    price = gpus * hours if cost is None else cost
    return Option(pool, gpus, nodes, hours, hours, hours, cost, cost, cost, price, cast(Any, None))


def check(schedule: Schedule, runs: list[Run], ways: dict[int, list[Option]], fleet: Cluster) -> None:
    """All that makes a schedule one that could be carried out; nothing of the scheduler's own is used."""
    sizes = {each.name: (each.nodes, each.gpus_per_node) for each in fleet.pools}
    assert sorted(map(id, runs)) == sorted([*(id(one.run) for one in schedule.placed), *map(id, schedule.nowhere)])
    busy: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    for one in schedule.placed:
        assert one.option in ways[one.run.job]
        assert one.start >= one.run.release
        assert one.end == pytest.approx(one.start + one.option.hours)
        late = 0 if one.run.due is None else max(0.0, one.end - one.run.due)
        assert one.late_hours == pytest.approx(late)
        nodes, per_node = sizes[one.option.pool]
        assert len(set(one.nodes)) == one.option.nodes
        assert all(0 <= node < nodes for node in one.nodes)
        assert one.option.gpus <= len(one.nodes) * per_node
        for node in one.nodes:
            busy.setdefault((one.option.pool, node), []).append(
                (one.start, one.end, one.option.gpus // one.option.nodes)
            )
    for (name, _), all_taken in busy.items():
        for moment, _, _ in all_taken:  # what is taken only grows where something starts
            assert sum(gpus for start, end, gpus in all_taken if start <= moment < end - 1e-6) <= sizes[name][1]
    for run in schedule.nowhere:
        assert not ways[run.job]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Run], dict[int, list[Option]], Cluster]:
    pools = [
        pool(f"p{n}", draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))) for n in range(draw(st.integers(1, 2)))
    ]
    ways: dict[int, list[Option]] = {}
    for job in range(draw(st.integers(1, 4))):
        found = []
        for each in draw(st.lists(st.sampled_from(pools), unique_by=lambda one: one.name)):
            inside = [gpus for gpus in (1, 2, 4) if gpus <= each.gpus_per_node]
            gpus = draw(st.sampled_from([*inside, *(n * each.gpus_per_node for n in range(2, each.nodes + 1))]))
            hours, cost = draw(st.floats(0.05, 30)), draw(st.floats(0, 100))
            found.append(way(each.name, gpus, max(1, gpus // each.gpus_per_node), hours, cost))
        ways[job] = found
    runs = []
    for number in range(draw(st.integers(0, 8))):
        release = draw(st.floats(0, 50))
        within = draw(st.none() | st.floats(0.1, 60))
        due = None if within is None else release + within
        runs.append(Run(draw(st.sampled_from(sorted(ways))), number, release, due, draw(st.integers(1, 5))))
    return runs, ways, fleet_of(*pools)


@given(problems())
def test_schedules_by_rules_could_be_carried_out(problem: tuple[list[Run], dict[int, list[Option]], Cluster]) -> None:
    check(by_rules(*problem), *problem)


@settings(max_examples=25, deadline=None)
@given(problems())
def test_schedules_by_the_solver_could_be_carried_out_and_are_no_worse(
    problem: tuple[list[Run], dict[int, list[Option]], Cluster],
) -> None:
    begun = by_rules(*problem)
    found = by_solver(*problem, begun, 0.5)
    assert found is not None
    check(found, *problem)
    assert found.merit <= begun.merit
    assert found.least_late <= found.late + 1e-6
    assert found.least_price <= found.price + 1e-6


@settings(max_examples=25, deadline=None)
@given(problems())
def test_no_run_could_begin_earlier_where_it_is(
    problem: tuple[list[Run], dict[int, list[Option]], Cluster],
) -> None:
    _, _, fleet = problem
    sizes = {pool.name: pool.gpus_per_node for pool in fleet.pools}
    by_start = [replace(one, start=one.start + 100, end=one.end + 100) for one in by_rules(*problem).placed]
    placed = in_turn(by_start, sizes)
    assert all(after.start <= before.start for after, before in zip(placed, sorted(by_start, key=key), strict=True))
    for one in placed:
        others = [each for each in placed if each is not one and each.option.pool == one.option.pool]
        for start in {one.run.release, *(each.end for each in others)}:
            if not one.run.release <= start < one.start - 1e-6:
                continue
            end = start + one.option.hours
            within = [each for each in others if each.start < end - 1e-6 and each.end > start + 1e-6]
            moments = {start, *(each.start for each in within if each.start > start)}
            assert any(
                sum(each.option.gpus_of_a_node for each in within if node in each.nodes and each.start <= at < each.end)
                + one.option.gpus_of_a_node
                > sizes[one.option.pool]
                for node in one.nodes
                for at in moments
            )


def key(one: Placed) -> tuple[float, float]:
    """The order in which runs are moved."""
    return one.start, one.end


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(2, 25), st.integers(1, 3), st.sampled_from([1, 2])),
        min_size=1,
        max_size=5,
    )
)
def test_the_solver_finds_what_trying_everything_finds(runs: list[tuple[int, int, int, int, int]]) -> None:
    """One node of two GPUs, one way for each run: an order in which each begins as soon as it can is the best."""
    fleet = fleet_of(pool("p", 1, 2))
    ways = {number: [way("p", gpus, 1, hours)] for number, (hours, _, _, _, gpus) in enumerate(runs)}
    asked = [Run(n, 1, release, release + due, weight) for n, (_, release, due, weight, _) in enumerate(runs)]

    def late(order: tuple[int, ...]) -> float:
        taken: list[tuple[float, float, int]] = []
        total = 0.0
        for number in order:
            hours, release, due, weight, gpus = runs[number]
            moments = sorted({float(release), *(end for _, end, _ in taken if end > release)})
            for start in moments:
                inside = [start, *(begin for begin, _, _ in taken if start < begin < start + hours)]
                if all(sum(g for b, e, g in taken if b <= at < e) + gpus <= 2 for at in inside):
                    break
            taken.append((start, start + hours, gpus))
            total += weight * max(0.0, start + hours - release - due)
        return total

    best = min(late(order) for order in itertools.permutations(range(len(runs))))
    found = by_solver(asked, ways, fleet, by_rules(asked, ways, fleet), 60.0)
    assert found is not None
    assert found.late == pytest.approx(best)
    assert found.least_late == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 0.1), st.integers(1, 3)), min_size=1, max_size=6), st.floats(0, 0.2))
def test_no_order_of_short_runs_goes_below_what_the_solver_proves(runs: list[tuple[float, int]], due: float) -> None:
    """One GPU, all asked for at once: the best of all orders, to seconds."""
    fleet = fleet_of(pool("p", 1, 1))
    ways = {number: [way("p", 1, 1, hours)] for number, (hours, _) in enumerate(runs)}
    asked = [Run(number, 1, 0.0, due, weight) for number, (_, weight) in enumerate(runs)]

    def late(order: tuple[int, ...]) -> float:
        ends = itertools.accumulate(runs[number][0] for number in order)
        return sum(runs[number][1] * max(0.0, end - due) for number, end in zip(order, ends, strict=True))

    best = min(late(order) for order in itertools.permutations(range(len(runs))))
    found = by_solver(asked, ways, fleet, by_rules(asked, ways, fleet), 60.0)
    assert found is not None
    assert found.least_late <= best + 1e-9
    seconds = sum(weight for _, weight in runs) * len(runs)  # each run and deadline is rounded to one
    assert best - seconds / 1800 <= found.least_late
    assert found.late <= best + seconds / 1800


def test_of_orders_that_come_to_the_same_price_the_one_is_taken_in_which_runs_wait_less() -> None:
    # one GPU: as they are asked for, the second waits half an hour; by deadline, the first and third wait for longer
    fleet = fleet_of(pool("p", 1, 1))
    ways = {number: [way("p", 1, 1, 1.0, cost)] for number, cost in enumerate((0.1, 0.2, 0.3))}
    runs = [Run(0, 1, 0.0, None, 1), Run(1, 1, 0.5, 9.0, 1), Run(2, 1, 4.0, None, 1)]
    found = by_rules(runs, ways, fleet)
    assert [(one.run.job, one.start) for one in found.placed] == [(0, 0.0), (1, 1.0), (2, 4.0)]
    solved = by_solver(runs, ways, fleet, found, 1.0)
    assert solved is not None
    assert list(solved.merit) == pytest.approx([0.0, 0.6, 0.5])


def test_ten_thousand_runs_on_a_thousand_nodes_are_placed() -> None:
    fleet = fleet_of(*(pool(f"p{n}", 125, 8) for n in range(8)))
    ways = {
        job: [
            way(f"p{(job + n) % 8}", gpus, max(1, gpus // 8), 40 / gpus + job % 7, gpus + n)
            for n in range(2)
            for gpus in (1, 4, 8, 16)
        ]
        for job in range(50)
    }
    runs = [Run(n % 50, n, n / 60, n / 60 + 30 if n % 3 else None, 1 + n % 4) for n in range(10_000)]
    found = by_rules(runs, ways, fleet)
    assert len(found.placed) == 10_000
    assert is_too_large(runs, ways, fleet)
    assert not is_too_large(runs[:9], ways, fleet)  # each on 2 x 4 ways of 125 nodes, and 20,000 are looked at
    assert by_solver(runs[:9], ways, fleet, by_rules(runs[:9], ways, fleet), 1e-3) is None  # in so little time


# --- the questions ----------------------------------------------------------------------------------------------------


def test_what_one_more_node_and_a_lost_pool_come_to_by_hand() -> None:
    fleet = fleet_of(pool("a", 1, 1), pool("b", 1, 1))
    ways = {0: [way("a", 1, 1, 10), way("b", 1, 1, 20)]}
    runs = [Run(0, n, 0.0, 20.0, 1) for n in range(4)]  # a carries two in time, b one
    work, beyond = fleet_outlook.Work(fleet, runs, ways), {0: list[Option]()}
    found = {one.title: one.figures for one in fleet_outlook.changes(work, beyond)}
    assert fleet_outlook.figures_of(by_rules(runs, ways, fleet)).late == 1
    assert found["one more node of a"].late == 0
    assert found["one more node of b"].late == 0
    assert found["without a"].late == 3
    assert found["without b"].late == 2
    # 12 runs: 6 of a carry 12 in time, b one
    assert fleet_outlook.fewest(replace(work, runs=runs * 3), fleet.pools[0], beyond) == 5


def test_a_purchase_keeps_what_can_be_kept_by_hand() -> None:
    fleet = fleet_of(pool("a", 1, 1))
    ways, beyond = {0: [way("a", 1, 1, 10)]}, {0: list[Option]()}

    def bought_for(*runs: Run) -> tuple[tuple[fleet_outlook.Purchase, ...] | None, list[int], list[int]]:
        work = fleet_outlook.Work(fleet, runs, ways)
        return fleet_outlook.purchases(work, beyond, by_rules(runs, ways, fleet))

    alone = [Run(0, 1, 0.0, 10.0, 1)]
    assert bought_for(*alone) == (None, [], [])
    three = [Run(0, n, 0.0, 10.0, 1) for n in range(3)]
    bought = fleet_outlook.Purchase("a", 2, None)
    assert bought_for(*three) == ((bought,), [], [])
    # a job that is late whatever is bought: it is carried out after the others, and asks for nothing
    ways[1], beyond[1] = [way("a", 1, 1, 8)], []
    never = Run(1, 1, 0.0, 5.0, 1)
    assert bought_for(*three, never) == ((bought,), [1], [])
    # on 3 nodes together it is in time, and 3 beside them carry the rest
    beyond[1] = [way("a", 3, 3, 4)]
    assert bought_for(*three, never) == ((replace(bought, nodes=5),), [], [])
    # a job that fits nowhere yet
    ways[1] = []
    assert bought_for(never) == ((replace(bought, nodes=2),), [], [])
    beyond[1] = []
    assert bought_for(*three, never) == ((bought,), [], [1])
    assert bought_for(*alone, never) == (None, [], [1])  # what can be kept is


def fleet_and_jobs(folder: Path, pools: list[str], jobs: list[str]) -> tuple[str | Path, ...]:
    """Files of these, as arguments of the command."""
    description = ["name: f", "currency: EUR", "pools:", *(f"- {{{one}}}" for one in pools)]
    (folder / "fleet.yaml").write_text("\n".join(description))
    (folder / "jobs.yaml").write_text("\n".join(["jobs:", *(f"- {{{one}}}" for one in jobs)]))
    return folder / "fleet.yaml", "--jobs", folder / "jobs.yaml", "--seconds", "1"


A100 = "name: a100, gpu: a100-80gb, gpus_per_node: 8, price_per_hour: 20.5, network_gbit_per_s: 1600, nvlink: true"


@pytest.mark.parametrize(
    "job",
    [
        "name: quick, model: llama-3.1-8b, tokens: 2000M, deadline_hours: 10",  # in time on 16 GPUs alone
        "name: big, model: 65b, tokens: 3M, recipe: {method: full, quantization: none}",  # fits on 16 GPUs alone
    ],
)
def test_one_more_node_opens_the_ways_that_a_fleet_with_one_more_has(tmp_path: Path, job: str) -> None:
    one = json.loads(ask(*fleet_and_jobs(tmp_path, [A100], [job]), "--json").stdout)
    two = json.loads(ask(*fleet_and_jobs(tmp_path, [f"{A100}, nodes: 2"], [job]), "--json").stdout)
    assert (one["figures"]["late"], one["figures"]["nowhere"]) != (0, 0)
    [more] = one["changes"]
    assert {**two["by_rules"], "title": "one more node of a100"} == more
    assert (more["late"], more["nowhere"]) == (0, 0)
    assert one["purchases"] == [{"pool": "a100", "nodes": 1, "per_week": 20.5 * 168}]
    assert two["purchases"] == []


def test_no_purchase_is_told_where_the_solver_keeps_what_the_rules_do_not(tmp_path: Path) -> None:
    each = ((10, 3, 10.1), (29, 0, 13.2), (58, 3, 11.2), (58, 4, 17.2), (48, 5, 12.2))
    jobs = [
        f"name: j{n}, model: qwen2.5-7b, tokens: {tokens}M, start_hours: {start}, deadline_hours: {due}"
        for n, (tokens, start, due) in enumerate(each)
    ]
    given = fleet_and_jobs(tmp_path, ["name: desk, gpu: rtx-4090, gpus_per_node: 1"], jobs)
    answer = ask(*given, "--json", "--seconds", "5", "--report", tmp_path / "report.md")
    found = json.loads(answer.stdout)
    assert found["by_rules"]["late"] > 0
    assert (found["figures"]["late"], found["purchases"]) == (0, [])
    assert "smallest purchase" not in (tmp_path / "report.md").read_text()


def test_where_runs_are_late_a_purchase_is_told_or_that_none_will_do(tmp_path: Path) -> None:
    desk = "name: desk, gpu: rtx-4090, gpus_per_node: 1"
    many = "name: many, model: qwen2.5-7b, tokens: 50M, per_week: 20000, deadline_hours: 6"
    text = ask(*fleet_and_jobs(tmp_path, [desk], [many])).stdout
    assert "The smallest purchase that keeps all deadlines" in text
    assert "not with up to 64" in text
    never = "name: never, model: qwen2.5-7b, tokens: 1B, deadline_hours: 0.1"
    text = ask(*fleet_and_jobs(tmp_path, [desk], [never])).stdout
    assert "More nodes would change nothing. No number up to 64 of one kind keeps the deadline of never." in " ".join(
        text.split()
    )
    some = many.replace("20000", "60")
    text = ask(*fleet_and_jobs(tmp_path, [desk], [some, never])).stdout
    assert "not with up to 64" not in text
    assert "No number up to 64 of one kind keeps the deadline of never." in text
    assert "No GPUs of the fleet as it is keep the deadline of never." in text
    impossible = ["name: ok, model: llama-3.1-8b, tokens: 2000M, per_week: 7, deadline_hours: 30"]
    impossible += ["name: never, model: 65b, tokens: 3B, deadline_hours: 1"]
    found = json.loads(ask(*fleet_and_jobs(tmp_path, [A100], impossible), "--seconds", "5", "--json").stdout)
    assert (found["purchases"], found["no_purchase_keeps"]) == ([], ["never"])


def test_what_fits_nowhere_whatever_is_bought_has_no_deadline_to_keep(tmp_path: Path) -> None:
    huge = "name: huge, model: 65b, tokens: 1M, recipe: {method: full, quantization: none}"
    given = fleet_and_jobs(tmp_path, ["name: t4, gpu: t4, gpus_per_node: 1"], [huge])
    said = " ".join(ask(*given).stdout.split())
    assert "More nodes would change nothing. With none of these does huge fit anywhere." in said
    assert "deadline of huge" not in said
    found = json.loads(ask(*given, "--json").stdout)
    assert (found["no_purchase_keeps"], found["no_purchase_fits"]) == ([], ["huge"])


def test_the_smallest_purchase_is_one_node_where_one_more_does(tmp_path: Path) -> None:
    pool = "name: l, gpu: a100-80gb, gpus_per_node: 4, host_ram_gib: 1500, nvlink: true, network_gbit_per_s: 1600"
    full = "name: full, model: 65b, tokens: 3M, deadline_hours: 5, recipe: {method: full, quantization: none}"
    found = json.loads(ask(*fleet_and_jobs(tmp_path, [pool], [full]), "--json").stdout)
    [more] = found["changes"]
    assert (more["late"], more["nowhere"]) == (0, 0), "two nodes carry it, with its optimizer on their hosts"
    assert [one["nodes"] for one in found["purchases"]] == [1]
    # four nodes carry it without that, and fewer of them all the same as fewer nodes alone would
    four = json.loads(ask(*fleet_and_jobs(tmp_path, [f"{pool}, nodes: 4"], [full]), "--json").stdout)
    ways = {way["nodes"]: way["strategy"]["offload"] for way in four["jobs"][0]["ways"]}
    assert (ways[2], ways[4]) == ("optimizer", "none")


def test_where_a_pool_has_no_price_ways_are_compared_by_gpu_hours_and_no_sum_mixes_them(tmp_path: Path) -> None:
    job = "name: ok, model: llama-3.1-8b, tokens: 2000M, per_week: 7, deadline_hours: 30"
    given = fleet_and_jobs(tmp_path, [A100, "name: desk, gpu: rtx-4090, gpus_per_node: 4"], [job])
    text = ask(*given, "--figures", tmp_path).stdout
    assert "no schedule costs less" not in text
    assert "Ways are compared by GPU hours: no price is given for desk." in text
    assert "GPU hours of a run" in (tmp_path / "ways.svg").read_text()
    fleet = load_cluster(tmp_path / "fleet.yaml")
    found = options(load_jobs(tmp_path / "jobs.yaml").jobs[0], fleet, NOTHING_MEASURED)
    assert {one.pool for one in found} == {"a100", "desk"}
    assert [one.price for one in found] == pytest.approx([one.gpus * one.hours for one in found])


def test_late_runs_are_listed_wherever_in_the_schedule_they_are(tmp_path: Path) -> None:
    jobs = [
        "name: many, model: qwen2.5-7b, tokens: 5M, per_week: 200",
        "name: urgent, model: qwen2.5-7b, tokens: 50M, per_week: 3, start_hours: 100, deadline_hours: 2.2",
    ]
    given = fleet_and_jobs(tmp_path, ["name: desk, gpu: rtx-4090, gpus_per_node: 1"], jobs)
    answer = ask(*given, "--json", "--report", tmp_path / "report.md")
    assert json.loads(answer.stdout)["figures"]["late"] == 3
    text = (tmp_path / "report.md").read_text()
    assert [f"| urgent {number} |" in text for number in (1, 2, 3)] == [True] * 3
    assert text.count("h too late |") == 3
    assert "The first 40 of 203, and all 3 too late; --json has all." in text


def test_too_little_time_is_not_told_as_too_large_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.fleet import solver

    given = fleet_and_jobs(tmp_path, [A100], ["name: one, model: 7b, tokens: 1M"])
    monkeypatch.setattr(solver, "by_solver", lambda *_: None)
    assert "the solver found none in 1 s; a longer --seconds may do." in ask(*given).stdout
    monkeypatch.setattr(solver, "is_too_large", lambda *_: True)
    assert "there are too many runs and nodes for the solver." in ask(*given).stdout


# --- the command ------------------------------------------------------------------------------------------------------


def ask(*arguments: str | Path) -> Any:
    return CliRunner().invoke(capacity, [str(each) for each in arguments], standalone_mode=False)


def test_whose_a_job_is_how_sure_it_fits_and_of_when_its_price_is_are_told(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(
        "name: fleet\ncurrency: EUR\nprices_as_of: 2020-01-01\npools:\n"
        "- {name: desk, gpu: rtx-4090, gpus_per_node: 1, nodes: 1, price_per_hour: 1.0, spot: true}\n"
    )
    (tmp_path / "jobs.yaml").write_text(
        "weeks: 1\njobs:\n- {name: a, model: 33b, tokens: 5M, owner: anna,\n"
        "   recipe: {seq_len: 3264, tokens_per_step: 3264}}\n"
    )
    given = (tmp_path / "fleet.yaml", "--jobs", tmp_path / "jobs.yaml")
    answer = ask(*given, "--json", "--seconds", "1", "--report", tmp_path / "report.md")
    [way] = json.loads(answer.stdout)["jobs"][0]["ways"]
    assert way["confidence"]["chance"] < 0.95
    report = (tmp_path / "report.md").read_text()
    assert f"| a (anna) | 33b | 1 x desk ({way['confidence']['chance']:.0%} sure) |" in report
    assert "EUR (" in report
    assert "prices as of 2020-01-01" in report
    assert "| desk (spot) |" in report


def test_the_example_is_carried_and_its_forms_say_the_same(tmp_path: Path) -> None:
    given = (EXAMPLES / "two-pools.yaml", "--jobs", EXAMPLES / "jobs" / "two-pools.yaml")
    answer = ask(*given, "--json", "--seconds", "1", "--report", tmp_path / "report.md")
    assert answer.return_value == 0
    found = json.loads(answer.stdout)
    assert found["figures"]["runs"] == len(found["schedule"]) == 20
    assert (found["figures"]["late"], found["nowhere"], found["impossible"]) == (0, [], [])
    assert found["figures"]["low_cost"] < found["figures"]["cost"] < found["figures"]["high_cost"]
    prices = {(job["name"], way["pool"], way["gpus"]): way["cost"] for job in found["jobs"] for way in job["ways"]}
    paid = sum(prices[one["job"], one["pool"], one["gpus"]] for one in found["schedule"])
    assert found["figures"]["cost"] == pytest.approx(paid)
    report = (tmp_path / "report.md").read_text()
    assert f"{found['figures']['cost']:,.2f} EUR" in report
    assert report.count("| support ") + report.count("| law ") > 10
    assert found["methods"] == []


@pytest.mark.parametrize(("weekly", "hatched"), [(20, True), (400, False)])
def test_bars_have_hatches_unless_they_are_too_many_to_be_printed(tmp_path: Path, weekly: int, hatched: bool) -> None:
    jobs = [f"- {{name: {name}, model: 7b, tokens: 1M, per_week: {weekly}}}" for name in ("one", "two")]
    (tmp_path / "jobs.yaml").write_text("\n".join(["jobs:", *jobs]))
    given = (EXAMPLES / "two-pools.yaml", "--jobs", tmp_path / "jobs.yaml")
    ask(*given, "--seconds", "0.5", "--figures", tmp_path)
    assert ("<pattern" in (tmp_path / "schedule.svg").read_text()) is hatched


def test_of_many_ways_the_cheapest_on_each_pool_are_listed(tmp_path: Path) -> None:
    given = (EXAMPLES / "thousand-nodes.yaml", "--jobs", EXAMPLES / "jobs" / "two-pools.yaml")
    answer = ask(*given, "--json", "--seconds", "1", "--report", tmp_path / "report.md")
    ways = [(job["name"], way) for job in json.loads(answer.stdout)["jobs"] for way in job["ways"]]
    report = (tmp_path / "report.md").read_text()
    listed = report[report.index("Where each job fits") : report.index("Schedule")]
    assert f"of {len(ways):,} ways; --json has all" in listed
    for of in {(name, way["pool"]) for name, way in ways}:
        least = min(way["cost"] for name, way in ways if (name, way["pool"]) == of)
        [row] = [line for line in listed.splitlines() if line.startswith(f"| {of[0]} (") and f" x {of[1]} " in line]
        assert f"| {least:,.2f} EUR (" in row


class Page(HTMLParser):
    """What a page holds: rows of tables, pictures, and all that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows, self.pictures, self.tags = 0, 0, set[str]()
        self.fetched: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.rows += tag == "tr"
        self.pictures += tag == "svg"
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
        ]


def test_a_page_stands_by_itself_and_has_the_schedule_and_its_pictures(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    given = (EXAMPLES / "two-pools.yaml", "--jobs", EXAMPLES / "jobs" / "two-pools.yaml", "--seconds", "1")
    answer = ask(*given, "--json", "--report", page)
    found, text = json.loads(answer.stdout), page.read_text()
    read = Page(text)
    assert read.fetched == []
    assert read.pictures == 2
    assert read.rows > len(found["schedule"])
    assert f"{found['figures']['cost']:,.2f} EUR" in text
    assert len(text) < 3e6
    assert "#000000" not in text  # pictures have the page's ink, also in the dark


def test_a_name_that_is_markup_is_text() -> None:
    table = Section("<script>alert(1)</script>", ("a",), [("<img src=x onerror=alert(1)>",)], "<b>", ("<i>",))
    text = document.html(Document("</title><script>x</script>", (table,)))
    assert not Page(text).tags & {"img", "b", "i"}
    assert text.count("<script>") == 1


@pytest.mark.parametrize(("jobs", "named_by"), [(3, "legend"), (12, "legend"), (20, "bars"), (40, "bars")])
@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, where a legend leaves the bars no room
def test_each_job_of_a_schedule_s_picture_can_be_told(tmp_path: Path, jobs: int, named_by: str) -> None:
    lines = [f"- {{name: j{n}, model: 7b, tokens: {20 + n % 5}M}}" for n in range(jobs)]
    (tmp_path / "jobs.yaml").write_text("\n".join(["jobs:", *lines]))
    (tmp_path / "fleet.yaml").write_text("name: f\npools:\n- {name: card, gpu: l40s, gpus_per_node: 1}\n")
    given = (tmp_path / "fleet.yaml", "--jobs", tmp_path / "jobs.yaml", "--seconds", "1", "--figures", tmp_path)
    assert ask(*given).exit_code == 0
    picture = (tmp_path / "schedule.svg").read_text()
    names = re.findall(r">(…?[j0-9]+)</text>", picture)
    if named_by == "legend":
        assert sorted(name for name in names if name.startswith("j")) == sorted(f"j{n}" for n in range(jobs))
    else:
        assert set(names) >= {f"j{n}" for n in range(jobs)}
        assert "<pattern" not in picture  # under a name, which it would make hard to read


def test_the_first_64_kinds_of_a_picture_are_all_unlike() -> None:
    looks = [(one["facecolor"], one["hatch"]) for one in map(kind, range(64))]
    assert len(set(looks)) == 64


def test_a_report_of_another_form_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"Write FILE\.html or FILE\.md"):
        document.check_report(tmp_path / "report.pdf")


def test_other_methods_are_planned_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text("jobs:\n- {name: j, model: 33b, tokens: 1M}\n")
    (tmp_path / "fleet.yaml").write_text("name: f\npools:\n- {name: desk, gpu: rtx-4090, gpus_per_node: 1}\n")
    text = ask(tmp_path / "fleet.yaml", "--jobs", tmp_path / "jobs.yaml", "--methods", "--seconds", "1").stdout
    rows = {line.split()[1]: line for line in text.splitlines() if line.split()[:1] == ["j"] and "33b" not in line}
    assert "fits nowhere" in rows["full"]  # 65 GB of weights, as much of gradients, on a card of 24
    assert "fits nowhere" not in rows["qlora"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(quantization="fp4", use_dora=True),
        Recipe(method="lora", quantization="none", use_rslora=True, loraplus_lr_ratio=16.0),
        Recipe(method="full", quantization="none"),
    ],
)
def test_a_recipe_of_any_method_is_known_with_each_other(recipe: Recipe, method: Method) -> None:
    job = JobForm(name="j", model="7b", tokens=1, recipe=recipe)
    found = recipe_of(job, method)
    assert found.method == method
    expected = {"qlora": "fp4" if recipe.method == "qlora" else "nf4", "lora": "none", "full": "none"}
    assert found.quantization == expected[method]
    kept = {name: value for name, value in found.to_json().items() if name not in ("method", "quantization")}
    if method != "full" != recipe.method:  # the adapters are as they were
        assert kept == {name: recipe.to_json()[name] for name in kept}


def test_an_option_takes_the_time_and_a_share_of_the_price_of_the_plan() -> None:
    fleet = load_cluster(EXAMPLES / "two-pools.yaml")
    [job] = [each for each in load_jobs(EXAMPLES / "jobs" / "two-pools.yaml").jobs if each.name == "support"]
    found = {(one.pool, one.gpus): one for one in options(job, fleet, NOTHING_MEASURED)}
    one, whole = found["a100", 1], found["a100", 8]
    assert one.cost == pytest.approx(20.5 / 8 * one.hours)  # the file's price of a node of 8
    assert whole.cost == pytest.approx(20.5 * whole.hours)
    assert one.hours > 4 * whole.hours
    assert one.low_hours < one.hours < one.high_hours
    full = options(job, fleet, NOTHING_MEASURED, "full")
    assert all(each.way.recipe.method == "full" for each in full)
    assert min(each.gpus for each in full if each.pool == "a100") >= 1


def test_a_deadline_that_nothing_can_keep_is_told(tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text("jobs:\n- {name: j, model: llama-3.1-8b, tokens: 1B, deadline_hours: 0.1}\n")
    answer = ask(EXAMPLES / "two-pools.yaml", "--jobs", tmp_path / "jobs.yaml", "--json", "--seconds", "1")
    found = json.loads(answer.stdout)
    assert answer.return_value == 1
    assert found["impossible"] == ["j"]
    assert found["purchases"] == []
    assert found["weighted_hours_too_late_at_least"] > 0


def test_all_mistakes_of_a_job_list_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(
        """
weeks: 0
jobs:
- {name: a, model: no-such-model, tokens: 1M}
- {name: a, model: 7b, tokens: many, per_week: -1}
- {name: yes-and-no, model: 7b, tokens: true, per_week: true, priority: true}
- {name: "<b>", model: 7b, tokens: 1M, deadline_hours: 0, recipe: {rank: 0}, more: 1}
- 7
"""
    )
    with pytest.raises(RequestError) as error:
        load_jobs(tmp_path / "jobs.yaml")
    told = [problem.where for problem in error.value.problems]
    of_truths = [f"job yes-and-no.{field}" for field in ("tokens", "per_week", "priority")]
    for where in ("weeks", "job a.model", "job 2.name", "job 2.tokens", "job 2.per_week", *of_truths, "job 5"):
        assert where in told, told
    assert any(where.endswith("deadline_hours") for where in told)
    assert any("rank" in where for where in told)


def test_a_job_trains_for_its_tokens_and_for_no_steps_beside_them(tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(
        """
jobs:
- {name: a, model: 7b, tokens: 5M, recipe: {steps: 10}}
- {name: b, model: 7b, tokens: 5M, recipe: {steps: 20, rank: 0}}
- {name: c, model: 7b, tokens: 5M, recipe: {steps: null}}
"""
    )
    with pytest.raises(RequestError) as error:
        load_jobs(tmp_path / "jobs.yaml")
    of_a, of_rank, of_b = map(str, error.value.problems)
    assert of_a == "job a.recipe.steps: the job's tokens say how long it trains (got 10). Leave it out."
    assert of_rank.startswith("job b.recipe.rank: ")
    assert of_b == of_a.replace("job a", "job b").replace("10", "20")


JOB = "\n- {name: a, model: 7b, tokens: 1M}"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        pytest.param("jobs: []", "jobs", id="none"),
        pytest.param("x" * 5_000_000, "larger than 4,096 KiB", id="large"),
        pytest.param(
            "jobs:\n- {name: a, model: 7b, tokens: 1M, per_week: 100000}\nweeks: 500",
            "at most 100,000 can be planned",
            id="runs",
        ),
        pytest.param("a: &a [x, x]\nb: &b [*a, *a]\njobs: [*b]", "job 1", id="bomb"),
        pytest.param("jobs:" + JOB.replace("{", "&a {") * 2000 + "\n- *a", r"it repeats \*a: aliases", id="long bomb"),
        pytest.param("jobs: " + "[" * 70_000, "nested too deeply", id="deep"),
        pytest.param("jobs:" + JOB * 2000 + "\n- {a: 1, a: 2}", "a is given twice", id="twice"),
        pytest.param("jobs:" + JOB * 10_001, "at most 10,?000 items", id="many"),
    ],
)
def test_what_is_no_job_list_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(RequestError, match=rule):
        load_jobs(tmp_path / "jobs.yaml")


def test_ten_thousand_jobs_are_read_and_planned_once_for_each_recipe(tmp_path: Path) -> None:
    lines = [
        f"- {{name: job-{n}, model: {('7b', '13b')[n % 2]}, tokens: {1 + n}M, deadline_hours: 100, owner: anna}}"
        for n in range(10_000)
    ]
    (tmp_path / "jobs.yaml").write_text("\n".join(["jobs:", *lines]))
    jobs = load_jobs(tmp_path / "jobs.yaml").jobs
    fleet = fleet_of(pool("p", 2, 8))
    found = options_of_all([(job, None) for job in jobs], fleet, NOTHING_MEASURED)
    assert len(found) == len(jobs) == 10_000
    for number in (0, 5001, 9999):
        assert found[number] == options(jobs[number], fleet, NOTHING_MEASURED)
    assert len({id(each[0].way) for each in found}) == 2


def test_markup_in_a_name_stays_text() -> None:
    assert escaped("<script>|`x`[y](z)") == "&lt;script&gt;\\|\\`x\\`\\[y\\](z)"


def test_many_jobs_are_shared_out_among_processors_and_come_back_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(pool("p", 1, 2))
    models = ["7b", "llama-3.1-8b"] * JOBS_OF_A_PROCESS
    lines = [
        f"- {{name: j{number}, model: {model}, tokens: {number + 1}M, recipe: {{rank: {1 + number // 2}}}}}"
        for number, model in enumerate(models)
    ]
    (tmp_path / "jobs.yaml").write_text("\n".join(["jobs:", *lines]))
    jobs = load_jobs(tmp_path / "jobs.yaml").jobs
    expected = [options(job, fleet, NOTHING_MEASURED) for job in jobs]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert options_of_all([(job, None) for job in jobs], fleet, NOTHING_MEASURED) == expected
    assert len({found[0].hours for found in expected}) == len(jobs)  # no two of them are alike


def test_what_a_process_plans_is_of_one_model_and_what_takes_long_comes_first() -> None:
    models = ["7b", "mixtral-8x7b", "7b", "13b", "7b", "mixtral-8x7b", "7b"]
    asked = [(model, Recipe(rank=rank)) for rank, model in enumerate(models, start=1)]

    def ranks(most: int) -> list[list[int]]:
        return [[recipe.rank for _, recipe in part] for part in shares(asked, most)]

    assert ranks(3) == [[2, 6], [1, 3, 5], [7], [4]]
    asked[2] = ("7b", Recipe(rank=3, method="lora", quantization="none"))
    assert ranks(3) == [[2, 6], [1, 5, 7], [3], [4]]


# --- hours ------------------------------------------------------------------------------------------------------------

NIGHTS = "Mo-Fr 18:00-08:00; Sa,Su"
"""Open, in hours from Monday 0:00 on: 18 to 32, 42 to 56, 66 to 80, 90 to 104, and from 114 on to the week's end."""


def test_work_pauses_while_its_pool_is_closed_by_hand() -> None:
    clock = OpenHours(NIGHTS)
    assert list(clock.spans(0, 200)) == [(18, 32), (42, 56), (66, 80), (90, 104), (114, 168), (186, 200)]
    assert [clock.begin(moment) for moment in (0, 18, 31.5, 32, 113)] == [18, 18, 31.5, 42, 114]
    assert clock.end(18, 14) == 32  # to the closing, and not to the next opening
    assert clock.end(18, 15) == 43
    assert clock.end(31, 1 + 14 + 14 + 14 + 54 + 2) == 188
    assert [clock.opened(moment) for moment in (0, 20, 40, 168)] == [0, 2, 14, 4 * 14 + 54]


def test_a_pool_that_never_opens_again_ends_nothing() -> None:
    clock = OpenHours("2001 Jan 02-03", datetime(2001, 1, 1))
    assert clock.end(clock.begin(0), 48) == 72
    assert clock.end(clock.begin(0), 49) == math.inf
    assert clock.begin(72) == math.inf
    fleet, runs = fleet_of(pool("p", 1, 1)), [Run(0, 1, 0.0, None, 1), Run(0, 2, 0.0, None, 1)]
    found = by_rules(runs, {0: [way("p", 1, 1, 40)]}, fleet, hours={"p": clock})
    assert ([one.end for one in found.placed], len(found.nowhere)) == ([64], 1)
    assert OpenHours("2001 Jan 02+").end(24, 1e5) == 24 + 1e5  # once open, it stays so


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20), st.integers(1, 3)), min_size=1, max_size=5),
    st.integers(0, 400),
    st.integers(1, 60),
)
def test_the_clock_is_what_counting_hour_by_hour_finds(
    given_spans: list[tuple[int, int, int]], release: int, hours: int
) -> None:
    days = ["Mo", "Tu", "We", "Th", "Fr", "Sa", "Su"]
    text = ", ".join(f"{days[day]} {start:02}:00-{start + long:02}:00" for day, start, long in given_spans)
    is_open = {24 * day + hour for day, start, long in given_spans for hour in range(start, start + long)}
    clock = OpenHours(text)
    moment = next(at for at in itertools.count(release) if at % 168 in is_open)
    assert clock.begin(release) == moment
    left, at = hours, moment
    while left:
        left -= at % 168 in is_open
        at += 1
    assert clock.end(moment, hours) == at
    assert clock.opened(release) == sum(at % 168 in is_open for at in range(release))


@settings(deadline=None)
@given(problems())
def test_schedules_of_pools_that_close_could_be_carried_out(
    problem: tuple[list[Run], dict[int, list[Option]], Cluster],
) -> None:
    """In the hours in which the pools are open they are schedules as any other."""
    runs, ways, fleet = problem
    clock = OpenHours(NIGHTS)
    found = by_rules(*problem, hours={each.name: clock for each in fleet.pools})

    inside = [(18, 32), (42, 56), (66, 80), (90, 104), (114, 168)]

    def opened(moment: float) -> float:
        weeks, rest = divmod(moment, 168)
        return 110 * weeks + sum(min(max(rest - start, 0), end - start) for start, end in inside)

    for one in found.placed:
        assert one.start >= one.run.release
        assert any(start <= one.start % 168 < end for start, end in inside)  # it begins while it is open
    moved = {id(run): replace(run, release=opened(run.release), due=None) for run in runs}
    placed = [
        replace(one, run=moved[id(one.run)], start=opened(one.start), end=opened(one.end)) for one in found.placed
    ]
    nowhere = tuple(moved[id(run)] for run in found.nowhere)
    check(replace(found, placed=tuple(placed), nowhere=nowhere), list(moved.values()), ways, fleet)


def fleet_file(folder: Path, hours: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(
        f"name: f\npools:\n- {{name: night, gpu: a100-80gb, gpus_per_node: 1, hours: {json.dumps(hours)}}}\n"
    )
    return path


def test_the_command_plans_with_hours_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(
        "begins: 2026-11-28\njobs:\n- {name: j, model: 7b, tokens: 1M, start_hours: 40}\n"
    )
    given = (fleet_file(tmp_path, NIGHTS), "--jobs", tmp_path / "jobs.yaml")
    answer = ask(*given, "--json")
    [placed] = json.loads(answer.stdout)["schedule"]
    assert placed["start"] == 40  # a Saturday: it is Sunday, 16:00
    text = ask(*given, "--report", tmp_path / "page.html").stdout
    assert "night: a run pauses when its pool closes, and goes on when it opens." in text
    assert "Hour 0: Saturday, 0:00." in text
    assert "Grey: closed" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("hours", "rule"),
    [
        ("Mo-Fr 8-18", "it is not, from character"),
        ("always", "Mo-Fr 18:00-08:00; Sa,Su"),
        ("off", "hours that come"),
        ("PH off; 24/7", "name days and times alone"),
        ("sunrise-sunset", "name days and times alone"),
        ("24/7 " * 200, "at most 500"),
        ("", "hours that come|OpenStreetMap"),
    ],
)
def test_what_are_no_hours_is_refused(tmp_path: Path, hours: str, rule: str) -> None:
    with pytest.raises(RequestError, match=rule) as error:
        load_cluster(fleet_file(tmp_path, hours))
    assert error.value.problems[0].where == "pool night.hours"
