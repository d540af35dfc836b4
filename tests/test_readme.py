"""The README's Python blocks run, in order, and its set-up lines are what CI and users paste."""

import re
import subprocess
import sys
from pathlib import Path

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
