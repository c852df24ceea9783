"""qlora-train --preview: what is learned is seen before anything is trained, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from click.testing import CliRunner

from launch.report.preview import MARKS
from launch.train import train


def test_it_shows_samples_with_their_labels_lengths_and_counts_and_writes_nothing(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text(conversations.read_text() + '{"messages": [3]}\n')
    fields = {
        "name": "x",
        "model": str(tiny_base),
        "data": {"path": str(data), "max_bad": 1},
        "recipe": {"rank": 4, "seq_len": 64, "tokens_per_step": 256},
        "output": "runs/x",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    done = CliRunner().invoke(train, [str(tmp_path / "run.yaml"), "--preview"], standalone_mode=False)
    assert done.return_value == 0, done.output
    shown = " ".join(done.output.split())
    assert "40 examples in format messages" in shown
    assert "1 left out (bad record)" in shown
    assert "line 41: each turn of messages needs" in shown
    # questions of tests/conftest.py and their answers, which alone stand between the marks, with what ends them
    learned = re.findall("{}(.*?){}".format(*MARKS), shown)
    assert len(learned) == 3  # after the words that explain the marks, two samples
    assert all(answer.strip().startswith(("a red cup", "bread", "the blue lamp", "a cat")) for answer in learned[1:])
    assert all("<|eos|>" in answer for answer in learned[1:])
    assert "What did Ada bring" in shown
    counts = re.findall(r"^ *\d+-\d+ +(\d+)", done.output, re.MULTILINE)
    assert sum(map(int, counts)) == 39  # one of 40 is held out
    assert not (tmp_path / "runs").exists()
