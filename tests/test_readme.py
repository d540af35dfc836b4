"""The README's Python blocks run, in order, and its set-up lines are what CI and users paste."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _finetune_table
from benchmarks._harness import RESULTS
from benchmarks._methods import METHODS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 7
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "merged" / "config.json").is_file()


def test_the_set_up_lines_are_one_line_each() -> None:
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2
    assert "stiefel-lora finetune" in lines[0] and "-m pytest" in lines[1]


def test_quoted_results_exist() -> None:
    for path in re.findall(r"\((benchmarks/results/[\w.]+)\)", README):
        assert (Path(__file__).parent.parent / path).is_file(), path


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README


def test_the_quoted_comparison_is_what_the_committed_results_say() -> None:
    """Trainable parameters, rates tried, seeds, loss and effective rank share of each row of README's table."""
    cells = json.loads((RESULTS / "finetune.json").read_text())["results"]["cells"]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.splitlines()
        if re.search(r"\| [\d.]+M \|", line)
    ]
    quoted = {row[0]: row[1:] for row in rows if row[0] in METHODS}
    assert len(quoted) > 20
    for method, (trainable, rates, seeds, loss, share) in quoted.items():
        found = _finetune_table.at_best_rate(cells, "code", method)
        losses = [cell["test_loss"] for cell in found.values()]
        first = next(iter(found.values()))
        tried = sorted({cell["lr"] for cell in cells if cell["method"] == method})
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        assert trainable == f"{first['trainable'] / 1e6:.2f}M"
        assert rates == f"{first['lr']:g} of {len(tried)}", method
        assert seeds == str(len(losses)), method
        assert loss == f"{statistics.mean(losses):.4f}{spread}", method
        measured = _finetune_table.mean(found, "effective_rank_share")
        assert share == ("" if measured is None else f"{measured:.2f}"), method


SPEEDS = (
    "torch AdamW, fused",
    "ours, qr",
    "ours, cayley",
    "geoopt, EuclideanStiefel",
    "geoopt, CanonicalStiefel",
    "POGO (A), fused AdamW (B)",
)


def test_the_quoted_speeds_are_what_the_committed_results_say() -> None:
    models = json.loads((RESULTS / "optimizer_step.json").read_text())["results"]["models"]
    for name, model in models.items():
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {name}, {model['rank']} |"))
        for cell, solver in zip(line.strip("| ").split("|")[1:], SPEEDS, strict=True):
            row = model["adapter"]["rows"].get(solver)
            if row is None:
                assert cell.strip() == "not run"
                continue
            # Two to three digits are quoted.
            milliseconds, times = (float(number) for number in re.findall(r"[\d.]+", f"{cell} 1")[:2])
            assert milliseconds == pytest.approx(1e3 * row["median_s"], rel=1e-2), (name, solver)
            assert times == pytest.approx(row["times_fused_adamw"], rel=1e-2), (name, solver)
