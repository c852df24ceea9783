"""The report of a run that failed on its way says what happened and what was decided."""

from __future__ import annotations

from launch.report.document import Document, markdown
from launch.report.run_report import attempts, learned_from
from orchestrator.record import Attempt, RunRecord

STRATEGY = {"world_size": 2, "micro_batch": 4, "gradient_accumulation": 1, "zero_stage": 2}


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
