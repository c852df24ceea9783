"""The report of a run that failed on its way says what happened and what was decided."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from launch.progress import became
from launch.report.document import Document, markdown
from launch.report.run_report import again, attempts, data, held, learned_from, time
from launch.report.terminal import memory_rows
from orchestrator.plans import Duration
from orchestrator.record import Attempt, RunRecord
from qlora_core.training.card import measurements
from qlora_core.training.dataset import DataReport

STRATEGY = {"world_size": 2, "micro_batch": 4, "gradient_accumulation": 1, "zero_stage": 2}

WHOLE = DataReport(
    format="messages", examples=9, truncated=0, unlearnable=0, longest=16, tokens=90, digest="", token_digest=""
)
ONE_OF_EACH = replace(
    WHOLE,
    truncated=1,
    unlearnable=1,
    source="held.jsonl, split test",
    unread=("id",),
    in_pieces=2,
    empty_answers=1,
    masked=1,
    bad=1,
    bad_records=("held.jsonl, line 4: it is no JSON",),
)


def record(*attempts: Attempt) -> RunRecord:
    return RunRecord(
        id="1", name="tiny", identity={}, total_steps=6, plan={}, data={}, predicted={}, attempts=list(attempts)
    )


def test_a_run_without_a_failure_has_no_such_section() -> None:
    assert not list(attempts(record(Attempt(started="2026", from_step=0, to_step=6, status="complete"))))


def test_each_attempt_has_its_line_and_what_was_passed_over_too() -> None:
    failed = Attempt(
        started="2026",
        from_step=0,
        to_step=2,
        status="failed",
        reason="a | in\na message",
        strategy=STRATEGY,
        failure={"kind": "gpu memory"},
        decision={"action": "replan", "reason": "the same plan would run out again"},
    )
    resumed = Attempt(
        started="2026",
        from_step=2,
        to_step=6,
        status="complete",
        strategy={**STRATEGY, "micro_batch": 1, "gradient_accumulation": 4},
        skipped=[{"checkpoint": "step-00000004", "reason": "checkpoint.json is missing"}],
    )
    lines = markdown(Document("Run", tuple(attempts(record(failed, resumed))))).splitlines()
    assert lines[-3:] == [
        "| 1 | 0 to 2 | 2 x 4 x 1, ZeRO 2 | failed | gpu memory: a \\| in a message "
        "| replan: the same plan would run out again |",
        "| 2 | 2 to 6 | 2 x 1 x 4, ZeRO 2 | complete |  |  |",
        "|  |  |  | passed over | step-00000004: checkpoint.json is missing |  |",
    ]


def test_what_a_run_cost_is_told_by_the_nodes_of_each_of_its_attempts() -> None:
    began = "2026-11-30T10:00:00+00:00"
    moments: dict[str, Any] = {"started": began, "from_step": 0, "ended": "2026-11-30T10:30:00+00:00"}
    # a node costs what it costs, whether four or two of its GPUs are taken
    moments |= {"price_per_hour": 8.0, "currency": "EUR"}
    tried = (Attempt(**moments, strategy={"world_size": size}) for size in (4, 2))
    running = Attempt(started=began, from_step=4, strategy=STRATEGY)
    run = record(*tried, running)
    step = {"seconds": 1.0, "low_seconds": 0.5, "high_seconds": 2.0, "tokens": 64, "parts": {"products": 1.0}}
    planned = Duration(1000, 9, 1800.0, 1200.0, 3600.0, 1.0, 2.5, 1.67, 5.0, "EUR")
    run.plan |= {"verdicts": [{"step_time": step}], "duration": planned._asdict()}
    run.measured = {"step_seconds": 1.1}
    [section] = time(run)
    assert section.text[-1] == (
        f"Started {began}, ended not yet; its attempts took 60 min. Planned, for its steps alone: 30 min (20 min to "
        "60 min), 2.50 EUR (1.67 to 5.00). It cost 8.00 EUR."
    )
    # planned again where nobody said a price: what was paid before stays paid
    run.plan["duration"] = planned._replace(price=None, low_price=None, high_price=None, currency=None)._asdict()
    [section] = time(run)
    assert section.text[-1].endswith("30 min (20 min to 60 min). It cost 8.00 EUR.")
    run.attempts[0].currency = "USD"
    [section] = time(run)
    assert section.text[-1].endswith("took 60 min. Planned, for its steps alone: 30 min (20 min to 60 min).")


def test_a_run_that_made_no_step_says_what_it_took_and_cost_too() -> None:
    moments: dict[str, Any] = {"started": "2026-11-30T10:00:00+00:00", "ended": "2026-11-30T11:00:00+00:00"}
    run = record(Attempt(**moments, from_step=0, strategy=STRATEGY, price_per_hour=8.0, currency="EUR"))
    run.plan["verdicts"] = []
    [section] = time(run)
    [text] = section.text
    assert text.endswith("its attempts took 60 min. It cost 8.00 EUR.")


def test_a_run_whose_data_travelled_with_its_job_is_not_run_again_from_ray_s_temporary_files() -> None:
    job, here = record(), record()
    cluster = {"cluster": {"address": "10.0.0.1:6379"}, "output": "/shared/tiny"}
    session = "/tmp/ray/session_2026/runtime_resources/working_dir_files/_ray_pkg_1"
    job.specification = {**cluster, "data": {"path": f"{session}/data.path/train.jsonl"}}
    here.specification = {**cluster, "data": {"path": "/shared/train.jsonl"}}
    [away], [kept] = again(job).text, again(here).text
    assert "qlora-train /shared" not in away
    assert "where it was submitted: qlora-submit, with the same file and --fresh" in away
    assert "qlora-train /shared/tiny/specification.yaml --fresh, on a machine of that cluster" in kept


def test_a_step_is_held_against_what_was_predicted_and_against_the_roofline() -> None:
    run = record(Attempt(started="2026-11-30T10:00:00+00:00", from_step=0, strategy=STRATEGY))
    step = {"seconds": 2.0, "low_seconds": 1.0, "high_seconds": 4.0, "floor_seconds": 0.5, "tokens": 6400}
    run.plan["verdicts"] = [{"step_time": {**step, "tokens_per_second": 3200.0, "parts": {"products": 2.0}}}]
    # of a step of 3,200 positions, shorter than planned; three in four of them are tokens, the others padding
    run.measured = {"step_seconds": 1.25, "tokens_per_second": 1920.0, "positions_per_second": 2560.0}
    [section] = time(run)
    assert "1.000 to 4.000 from the fast to the slow end of what is achieved" in section.text[0]
    said = "It went through 2,560 tokens a second, padding included, where 3,200 were predicted: 20% of what"
    assert said in section.text[0]
    assert section.text[0].endswith("(the roofline). Without the padding it trained on 1,920 a second.")
    # without padding, and as a record of an earlier version, which does not tell it
    for measured in ({"tokens_per_second": 2560.0, "positions_per_second": 2560.0}, {"tokens_per_second": 2560.0}):
        run.measured = {"step_seconds": 1.25, **measured}
        [section] = time(run)
        assert "trained on 2,560 tokens a second, where 3,200 were predicted: 20% of what" in section.text[0]
        assert "padding" not in section.text[0]
    run.plan["verdicts"][0]["step_time"]["runs"] = 19
    [section] = time(run)
    assert "1.000 to 4.000 nine times of ten" in section.text[0]


def test_what_each_part_of_the_peak_took_is_told_as_far_as_it_can_be_told_apart() -> None:
    sizes = {"base_weights": 4 * 2**30, "lora_weights": 2**30, "optimizer_state": 2**30, "activations": 2 * 2**30}
    weights = {"frozen": 4 * 2**30, "trained": 2**30}
    measured = {"allocated_bytes": 9 * 2**30, "weights": weights, "optimizer_state": 2 * 2**30}
    [whole] = held(sizes, measured, divided=False)
    assert [row[:3] for row in whole.rows] == [
        ("base model", "4.00 GiB", "4.00 GiB"),
        ("adapters", "1.00 GiB", "1.00 GiB"),
        ("optimizer state", "1.00 GiB", "2.00 GiB"),
        ("activations, gradients and all else", "2.00 GiB", "2.00 GiB"),
    ]
    # under ZeRO 3 what is held of the weights between steps says nothing of the peak, at which some are whole
    [parts] = held(sizes, {**measured, "weights": {"frozen": 2**30, "trained": 2**28}}, divided=True)
    assert [row[:3] for row in parts.rows] == [
        ("optimizer state", "1.00 GiB", "2.00 GiB"),
        ("weights, activations, gradients and all else", "7.00 GiB", "7.00 GiB"),
    ]


def test_what_a_gpu_s_allocator_reserved_stands_beside_what_was_predicted_of_it() -> None:
    phases = dict.fromkeys(("after_load", "forward", "backward", "optimizer"), 3 * 2**30)
    predicted = {"allocated_bytes": 3 * 2**30, "reserved_bytes": 4 * 2**30, "phases": phases}
    on_cpu = {"allocated_bytes": 3 * 2**30, "reserved_bytes": 0, "phases": phases, "allocated_is": "a test"}
    on_gpu = {**on_cpu, "reserved_bytes": 5 * 2**30}
    assert ("reserved", 4 * 2**30, 5 * 2**30) in memory_rows(predicted, on_gpu)
    assert "reserved" not in {title for title, *_ in memory_rows(predicted, on_cpu)}
    assert "| reserved, GiB | 4.000 | 5.000 |" in measurements(predicted, on_gpu)
    assert "reserved" not in measurements(predicted, on_cpu)


def test_samples_show_what_is_learned_on_one_line_each_and_long_ones_without_their_middle() -> None:
    parts = [
        {"text": "a\nquestion <b>", "learned": False},
        {"text": "y" * 1000, "learned": True},
        *({"text": "turn", "learned": False} for _ in range(7)),
    ]
    [section] = learned_from([{"number": 2, "of": 5000, "tokens": 90, "parts": parts}])  # type: ignore[typeddict-item]
    assert section.rows[0] == ("2 of 5,000, 90 tokens", "no", "a\\nquestion <b>")
    name, learned, text = section.rows[1]
    assert (name, learned) == ("", "yes")
    assert text == f"{'y' * 200} ... 600 more characters ... {'y' * 200}"
    assert [row[2] for row in section.rows[2:]] == ["turn"] * 4 + ["... 3 more parts ..."]
    assert "&lt;b&gt;" in markdown(Document("Run", (section,)))
    assert not list(learned_from([]))


COUNTS = (
    "9 examples in format messages, 90 tokens, the longest 16; 1 truncated, "
    "1 left out (nothing to learn within the length), 1 left out (empty answer), "
    "1 left out (all its answers have weight 0), 1 left out (bad record)."
)
REMARKS = (
    "2 texts were longer than a sequence, and became pieces.",
    "Columns that were not read: id.",
    "Left out: held.jsonl, line 4: it is no JSON",
)


def test_what_became_of_the_data_is_told_alike_of_what_is_learned_and_of_what_is_evaluated_on() -> None:
    [section] = data({**asdict(ONE_OF_EACH), "evaluated": asdict(ONE_OF_EACH)})
    assert section.text == (COUNTS, *REMARKS, f"Evaluated on held.jsonl, split test: {COUNTS}", *REMARKS)
    [section] = data(asdict(WHOLE))
    assert section.text == ("9 examples in format messages, 90 tokens, the longest 16; 0 truncated, none left out.",)


def test_the_terminal_tells_what_was_cut_off_and_left_out_of_data_and_nothing_where_all_is_whole() -> None:
    assert became(ONE_OF_EACH, 16) == (
        ", 1 cut off at 16 tokens, 2 texts longer than 16 tokens in pieces, "
        "1 left out (nothing to learn within the length), 1 left out (empty answer), "
        "1 left out (all its answers have weight 0), 1 left out (bad record)"
    )
    assert became(WHOLE, 16) == ""
