"""Reports and the planner's page in a real browser: drawn, read by all, printed whole, and doing what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsers import chromium, drawn, needs_chromium, opened, printed_whole, read_by_all
from click.testing import CliRunner
from playwright.sync_api import Browser, expect
from pypdfium2 import PdfDocument

from launch.capacity import capacity
from launch.plan import plan
from launch.report.document import Document, Section, write
from launch.report.run_report import run_report
from orchestrator.history import NOTHING_MEASURED
from orchestrator.outcome import predicted
from orchestrator.plans import Plan
from orchestrator.record import Attempt, RunRecord

pytestmark = [needs_chromium, pytest.mark.slow, pytest.mark.xdist_group("pages")]
EXAMPLES = Path(__file__).parent.parent / "clusters" / "examples"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each kind."""
    folder = tmp_path_factory.mktemp("reports")
    paths = {name: folder / f"{name}.html" for name in ("plan", "fleet", "nights", "run")}
    ask = ["--model", "33b", "--gpus", "1", "--tokens", "20M", "--report", str(paths["plan"])]
    sweep = ["--sweep", "seq-len=512,2048", "--sweep", "micro-batch=1,8"]
    assert CliRunner().invoke(plan, [*ask, *sweep], standalone_mode=False).return_value == 0
    jobs = EXAMPLES / "jobs" / "two-pools.yaml"
    ask = [str(EXAMPLES / "two-pools.yaml"), "--jobs", str(jobs), "--seconds", "1", "--report", str(paths["fleet"])]
    assert CliRunner().invoke(capacity, ask, standalone_mode=False).return_value == 0
    closed = folder / "closed.yaml"
    closed.write_text(
        "name: nights\npools:\n- {name: night, gpu: a100-80gb, gpus_per_node: 2, hours: 'Mo-Fr 19:00-07:00; Sa,Su'}\n"
    )
    (folder / "jobs.yaml").write_text(
        "jobs:\n- {name: j, model: 7b, tokens: 500M}\n- {name: k, model: 7b, tokens: 1M}\n"
    )
    ask = [str(closed), "--jobs", str(folder / "jobs.yaml"), "--seconds", "1", "--report", str(paths["nights"])]
    assert CliRunner().invoke(capacity, ask, standalone_mode=False).return_value == 0
    assert "Grey: closed" in paths["nights"].read_text()
    write(run_report(record(), events()), paths["run"])
    return paths


def record() -> RunRecord:
    """A run as its plan had it, with a failure on the way and an answer that would be markup."""
    found: Plan = planned("7b")
    phases = {"after_load": 4 * 10**9, "forward": 5 * 10**9, "backward": 7 * 10**9, "optimizer": 6 * 10**9}
    strategy = {"world_size": 1, "micro_batch": 1, "gradient_accumulation": 1, "zero_stage": 0}
    answer = {"question": "<img src=x onerror=alert(1)>", "expected": "fish " * 40, "given": "fish"}
    return RunRecord(
        id="1",
        name="seven",
        status="complete",
        identity={"model": "a" * 64, "seed": 0},
        total_steps=40,
        plan=found.to_json(),
        data={
            "examples": 100,
            "format": "text",
            "tokens": 5000,
            "longest": 90,
            "truncated": 0,
            "unlearnable": 0,
            "row_lengths": {"bin_tokens": 10, "counts": [1, 5, 30, 40, 20, 4]},
        },
        predicted=predicted(found),
        measured={"allocated_bytes": 7 * 10**9, "allocated_is": "a test", "phases": phases, "step_seconds": 1.5},
        results={"eval_before": 2.0, "eval_after": 1.0, "answers_before": [answer], "answers_after": [answer]},
        attempts=[
            Attempt(
                started="2026",
                from_step=0,
                to_step=20,
                status="failed",
                reason="x" * 300,
                strategy=strategy,
                failure={"kind": "gpu memory"},
                decision={"action": "replan", "reason": "the same plan would run out again"},
            ),
            Attempt(started="2026", from_step=20, to_step=40, status="complete", strategy=strategy),
        ],
        machine={"name": "a machine"},
        versions={"torch": "2.13"},
    )


def planned(model: str) -> Plan:
    from launch.options import passed
    from launch.request import plan_of

    context = plan.make_context("qlora-plan", ["--model", model, "--gpus", "1", "--gpu", "rtx-4090"])
    return plan_of(context.params, passed(context), NOTHING_MEASURED)


def events() -> list[dict[str, object]]:
    steps: list[dict[str, object]] = [
        {"event": "step", "step": n, "loss": 2 - n / 40, "learning_rate": 1e-4, "tokens": 512, "seconds": 1.5}
        for n in range(1, 41)
    ]
    held_out: list[dict[str, object]] = [{"event": "eval", "step": n, "eval_loss": 2 - n / 40} for n in (0, 20, 40)]
    return [*steps, *held_out]


PICTURES = {"plan": 5, "fleet": 2, "nights": 2, "run": 3}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PICTURES)
def test_a_report_is_drawn_and_can_be_read_by_all(
    browser: Browser, reports: dict[str, Path], name: str, scheme: str
) -> None:
    with opened(browser, reports[name].as_uri(), scheme) as page:
        shapes = drawn(page)
        assert len(shapes) == PICTURES[name]
        assert min(shapes) > 10  # axes alone have fewer
        read_by_all(page)


@pytest.mark.parametrize("name", PICTURES)
def test_a_report_is_whole_on_paper(browser: Browser, reports: dict[str, Path], name: str) -> None:
    assert reports[name].stat().st_size < 3e6
    with opened(browser, reports[name].as_uri()) as page:
        printed_whole(page)


def test_a_table_that_goes_on_has_its_head_on_every_page(browser: Browser, tmp_path: Path) -> None:
    rows = [(f"row {number}", "cell") for number in range(150)]
    write(Document("Long", (Section("Table", ("name", "second"), rows),)), tmp_path / "long.html")
    with opened(browser, (tmp_path / "long.html").as_uri()) as page:
        printed = PdfDocument(page.pdf(format="A4"))
    texts = ["".join(sheet.get_textpage().get_text_range().split()) for sheet in printed]
    assert len(texts) > 1
    assert all("namesecond" in text for text in texts)


def test_a_table_is_sorted_by_a_click_and_turned_by_the_keyboard(browser: Browser, reports: dict[str, Path]) -> None:
    with opened(browser, reports["fleet"].as_uri()) as page:
        head = page.get_by_role("button", name="hours", exact=True).first
        for turn, order in ((1, "ascending"), (2, "descending")):
            head.click() if turn == 1 else head.press("Enter")
            expect(page.locator(f"th[aria-sort={order}]")).to_have_count(1)
            cells = page.locator("section", has=page.get_by_role("heading", name="Where each job fits"))
            hours = [float(text) for text in cells.locator("tbody td:nth-child(4)").all_inner_texts()]
            assert hours == sorted(hours, reverse=turn == 2)


SORTED = {
    "run": ["job 2", "job 9", "job 10", "job 11", "other"],
    "time": ["52 s", "52 min", "1.6 h", "2.5 days", "fits nowhere"],
    "size": ["93.10 MiB", "0.35 GiB", "1.20 GiB", "1,024.00 GiB", "-"],
    "price": ["-3.00 EUR", "9.50 EUR", "1,100.00 EUR", "12,000.00 EUR", ""],
    "rate": ["2.00e-05", "1e-4", "+0.5%", "7 x", "x"],
}
"""Columns as they are in order: what has another unit than its neighbours, and words after numbers."""


@pytest.mark.parametrize("column", SORTED)
def test_a_column_is_sorted_by_what_its_cells_say(browser: Browser, tmp_path: Path, column: str) -> None:
    columns = ("run", *(f" {name}" for name in list(SORTED)[1:]))
    rows = [tuple(cells[at] for cells in SORTED.values()) for at in (3, 0, 4, 2, 1)]
    write(Document("Units", (Section("Table", columns, rows),)), tmp_path / "units.html")
    with opened(browser, (tmp_path / "units.html").as_uri()) as page:
        page.get_by_role("button", name=column, exact=True).click()
        cells = page.locator(f"tbody td:nth-child({list(SORTED).index(column) + 1})")
        assert cells.all_inner_texts() == SORTED[column]


# --- the planner's page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `qlora-plan serve`; its address."""
    command = [str(Path(sys.executable).parent / "qlora-plan"), "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[0]
        process.terminate()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_answers_at_once_and_can_be_read_by_all(browser: Browser, server: str, scheme: str) -> None:
    with opened(browser, server, scheme) as page:
        expect(page.locator("#headline")).to_contain_text("llama-3.1-8b")
        assert drawn(page)[0] > 20
        page.get_by_text("More", exact=True).click()
        read_by_all(page)


def test_a_change_is_answered_and_the_address_asks_the_same(browser: Browser, server: str) -> None:
    with opened(browser, server) as page:
        page.get_by_label("model", exact=True).fill("65b")
        page.get_by_label("gpu", exact=True).select_option("a100-80gb")
        page.get_by_label("seq len").fill("2048")
        expect(page.locator("#command")).to_have_text("qlora-plan --model 65b --gpu a100-80gb --seq-len 2048")
        headline = page.locator("#headline").inner_text()
        assert "llama-65b on a100-80gb" in headline
        answer = CliRunner().invoke(plan, page.locator("#command").inner_text().split()[1:], standalone_mode=False)
        assert re.sub(r"\s+", " ", headline) in re.sub(r"\s+", " ", answer.stdout)
        address = page.url
    with opened(browser, address) as page:
        expect(page.locator("#headline")).to_have_text(headline)
        expect(page.get_by_label("seq len")).to_have_value("2048")


def test_a_bad_value_is_told_beside_its_field(browser: Browser, server: str) -> None:
    with opened(browser, server) as page:
        page.get_by_label("seq len").fill("0")
        field = page.locator(".field", has=page.locator("#seq-len"))
        expect(field.locator(".mistake")).to_contain_text("greater than or equal to 1")
        expect(page.locator("#seq-len")).to_have_attribute("aria-invalid", "true")
        read_by_all(page)
        page.get_by_label("seq len").fill("512")
        expect(field.locator(".mistake")).to_be_empty()
        page.get_by_label("model", exact=True).fill("llama-9000b")
        expect(page.locator(".field", has=page.locator("#model")).locator(".mistake")).not_to_be_empty()


@pytest.mark.parametrize(
    ("link", "field", "shown", "told"),
    [
        ("model=65b&gpu=a100&gpus=1", "gpu", "a100", "none of those that can be asked for (got a100)"),
        ("model=7b&gpu=l40s&rank=x", "rank", "x", "a valid integer"),
        ("model=7b&gpu=l40s&seqlen=8192", None, "", "--seqlen there is no such parameter"),
    ],
)
def test_what_of_a_link_cannot_be_asked_is_told_and_kept(
    browser: Browser, server: str, link: str, field: str | None, shown: str, told: str
) -> None:
    with opened(browser, f"{server}?{link}") as page:
        expect(page.locator("#headline")).to_contain_text("not right")
        if field is None:
            expect(page.locator("#mistakes")).to_contain_text(told)
        else:
            expect(page.locator(".field", has=page.locator(f"#{field}")).locator(".mistake")).to_contain_text(told)
            expect(page.locator(f"#{field}")).to_have_value(shown)
        assert page.url == f"{server}?{link}"
        page.get_by_label("gpu", exact=True).select_option("l40s")
        page.get_by_label("rank").fill("64")
        expect(page.locator("#headline")).to_contain_text("on l40s")


@pytest.mark.parametrize(
    ("link", "passed"),
    [
        ("gpu=l40s&objective=fastest&micro-batch=1", "--gpu l40s --micro-batch 1 --objective fastest"),
        ("gpu=l40s&no-gradient-checkpointing=1", "--gpu l40s --no-gradient-checkpointing"),
        ("gpu=l40s&seq-len=512&method=qlora", "--gpu l40s --method qlora --seq-len 512"),
        ("gpu=l40s&dora=false", "--gpu l40s"),
    ],
)
def test_a_link_asks_all_that_it_says_a_default_too(browser: Browser, server: str, link: str, passed: str) -> None:
    with opened(browser, f"{server}?model=7b&{link}") as page:
        expect(page.locator("#command")).to_have_text(f"qlora-plan --model 7b {passed}", timeout=20_000)
        page.get_by_label("gpu", exact=True).select_option("h100-80gb")  # from now on the fields are what is asked
        changed = passed.replace("l40s", "h100-80gb")
        expect(page.locator("#command")).to_have_text(f"qlora-plan --model 7b {changed}", timeout=20_000)


def test_an_empty_field_shows_its_default_and_leaves_it_to_an_objective(browser: Browser, server: str) -> None:
    with opened(browser, f"{server}?model=7b&gpu=l40s&objective=fastest") as page:
        size = page.get_by_label("micro batch")
        expect(size).to_have_attribute("placeholder", "1")
        expect(page.locator("#attention option:checked")).to_have_text("sdpa (default)")
        expect(page.locator("#command")).not_to_contain_text("micro-batch", timeout=20_000)
        size.fill("1")
        expect(page.locator("#command")).to_contain_text("--micro-batch 1", timeout=20_000)


def test_what_does_not_fit_shows_the_nearest_that_would(browser: Browser, server: str) -> None:
    with opened(browser, f"{server}?model=65b&gpu=rtx-4090&gpus=1") as page:
        expect(page.locator("#headline")).to_contain_text("DOES NOT FIT")
        expect(page.locator("#ways h2")).to_contain_text("The nearest that would fit", timeout=20_000)
        assert page.locator("#ways tbody tr").count() >= 1


def test_the_page_leads_to_the_report(browser: Browser, server: str) -> None:
    with opened(browser, f"{server}?model=7b&gpu=rtx-4090&gpus=1") as page:
        expect(page.locator("#headline")).to_contain_text("FITS")
        page.get_by_role("link", name="The whole report").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("llama-7b on rtx-4090", timeout=30_000)
        assert min(drawn(page)) > 10
