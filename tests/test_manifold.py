"""The manifold study's tuning, verdict and picture."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import _harness, manifold
from benchmarks._problems import Problem, pca, streaming_pca
from benchmarks._solvers import FIRST_ORDER


def row(seconds: float | None, kind: str = "first-order") -> dict[str, Any]:
    """Return a row that reaches 1e-6 after so many seconds; its last gap is lost."""
    hit = None if seconds is None else [10, seconds]
    return {
        "kind": kind,
        "settings": {"1e-06": {"rate": 0.1, "decade": None}, "1e-09": {"rate": 0.3, "decade": 50}},
        "orthogonality_error": 1e-15,
        "seconds_an_iteration": 0.1,
        "reached": {"1e-03": hit, "1e-06": hit, "1e-09": None},
        "iterations": [0, 10, 11],
        "seconds": [0, 1.0, 1.1],
        "gaps": [1, 1e-6, None],
    }


def results(**seconds: float | None) -> dict[str, Any]:
    """Return the results of one problem with our choice, two others of ours and two peers."""
    names = {"chosen": manifold.CHOICE, "own": "ours, SGD, qr", "geoopt": "geoopt SGD, Euclidean", "pogo": "POGO, SGD"}
    rows = {names[key]: row(value) for key, value in seconds.items()}
    # Faster than all, but no first-order solver.
    rows["pymanopt, trust regions"] = row(1e-3, "batch")
    problem = {"about": "A problem", "stochastic": True, "rows": rows, "absent": {"geotorch, torch Adam": "not here"}}
    return {"problems": {"problem": problem}, "absent": {"digits": "scikit-learn is not installed"}}


@pytest.mark.parametrize(
    ("seconds", "peer", "all_"),
    [
        (
            {"chosen": 1.0, "geoopt": 2.0, "pogo": None},
            "yes: 2.00 times as fast as geoopt SGD, Euclidean",
            "yes: it is",
        ),
        (
            {"chosen": 1.0, "geoopt": 0.95, "own": 0.5},
            "yes: 1.05 times the time of geoopt",
            "no: 2.00 times the time of our",
        ),
        (
            {"chosen": 1.2, "geoopt": 1.0, "pogo": 3.0},
            "no: 1.20 times the time of geoopt",
            "no: 1.20 times the time of geoopt",
        ),
        ({"chosen": None, "pogo": 3.0}, "no: POGO, SGD reaches it in 3 s", "no: POGO, SGD reaches it in 3 s"),
        ({"chosen": 1.0, "pogo": None}, "no other reaches it", "yes: it is"),
        ({"chosen": None, "pogo": None}, "none reaches it", "none reaches it"),
    ],
)
def test_verdict_compares_with_peers_and_with_all(seconds: dict[str, float | None], peer: str, all_: str) -> None:
    table = manifold.report(results(**seconds))
    (line,) = [line for line in table.splitlines() if line.startswith("| problem | yes")]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[4].startswith(peer)
    assert cells[5].startswith(all_)
    assert "scikit-learn is not installed" in table
    assert "| geotorch, torch Adam | not here" in table
    assert "lost" in table
    assert "| 0.1 / constant | 0.3 / 50 |" in table


def test_picture_is_drawn_from_results_alone(tmp_path: Path) -> None:
    path = tmp_path / "new.png"
    manifold.plot(results(chosen=1.0, geoopt=2.0), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_picture_sets_off_the_choice_and_the_fastest_of_each_other_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.append(self))
    found = results(chosen=2.0, own=1.0, geoopt=2.0, pogo=None)
    rows = found["problems"]["problem"]["rows"]
    rows["geoopt Adam, Euclidean"] = row(1.5)
    # None of this library reaches 1e-6; the one that ends nearer to it stands for it.
    rows["POGO, Nesterov"] = {**row(None), "gaps": [1, 1e-2, 1e-4]}
    manifold.plot(found, Path("x.png"))
    (panel,) = drawn[0].axes
    named = {line.get_label() for line in panel.lines if not line.get_label().startswith("_")}
    assert named == {manifold.CHOICE, "geoopt Adam, Euclidean", "POGO, Nesterov", "pymanopt, trust regions"}
    assert len(panel.lines) == len(rows) + len(manifold.TARGETS)


def test_checkpoints_are_at_most_three_percent_apart_and_include_the_last() -> None:
    checks = sorted(manifold._checkpoints(1000))
    assert checks[0] == 1
    assert checks[-1] == 1000
    assert all(b - a <= max(1, 0.03 * a + 1) for a, b in zip(checks, checks[1:], strict=False))


def test_thinning_keeps_the_ends() -> None:
    assert manifold._thin(3) == [0, 1, 2]
    kept = manifold._thin(1000)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 45)


def test_tuning_returns_the_best_that_it_tried_and_a_run_repeats_it() -> None:
    problem = pca(12, 2, 5, budget=300)
    make = FIRST_ORDER["ours, SGD, qr"]
    cell, tried = manifold._tune(problem, make, 300, 1e-9, quick=False)
    rate, decade = manifold.RATES[cell[0]], manifold.DECADES[cell[1]]
    best = min(n for n in tried.values() if n is not None)
    assert tried[f"{rate:.2g} / {decade}"] == best
    trace = manifold._descend(problem, make(problem), rate, decade, 300, 1e-9)
    assert trace[-1][0] == best
    assert trace[-1][1] <= 1e-9 < trace[-2][1]
    # The grid's own limits did not decide: its neighbours were tried.
    assert manifold.RATES[0] < rate < manifold.RATES[-1]
    assert len(tried) > 8
    # From there it finds nothing better, with fewer runs.
    again, fewer = manifold._tune(problem, make, 300, 1e-9, cell, quick=False)
    assert again == cell
    assert len(fewer) < len(tried)


def test_each_target_is_read_off_the_run_that_was_tuned_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ours, SGD, qr"
    monkeypatch.setattr(manifold, "FIRST_ORDER", {name: FIRST_ORDER[name]})
    monkeypatch.setattr(manifold, "BATCH", {})
    monkeypatch.setattr(manifold, "CHOICE", name)
    problem = pca(12, 2, 5, budget=300)
    args = argparse.Namespace(quick=False, rounds=1)
    row = manifold._measure(problem, args)["rows"][name]
    for tuned, targets in {"1e-06": ("1e-03", "1e-06"), "1e-09": ("1e-09",)}.items():
        setting = row["settings"][tuned]
        trace = manifold._descend(problem, FIRST_ORDER[name](problem), setting["rate"], setting["decade"], 300, 1e-9)
        for target in targets:
            assert row["reached"][target][0] == next(i for i, gap in trace if gap <= float(target))
    assert row["reached"]["1e-06"][0] < row["reached"]["1e-09"][0]
    # A stream is tuned once, with other batches, for less than what is read off.
    aims: list[float] = []
    tune = manifold._tune
    monkeypatch.setattr(
        manifold, "_tune", lambda p, m, n, aim, *a, **k: aims.append(aim) or tune(p, m, n, aim, *a, **k)
    )
    stream = manifold._measure(streaming_pca(12, 2, 16, budget=30), args)["rows"][name]
    assert list(stream["settings"]) == ["1e-06"]
    assert aims == [5e-7]


def test_a_run_stops_at_the_hurdle_and_where_the_point_is_lost() -> None:
    problem = pca(12, 2, 5)
    make = FIRST_ORDER["ours, SGD, qr"]
    assert manifold._descend(problem, make(problem), 1e-4, None, 100, 1e-9, (8, 1e-3))[-1][0] == 8
    descent = make(problem)
    problem_gaps = iter([1.0, 0.5, float("inf")])
    object.__setattr__(problem, "gap", lambda x: next(problem_gaps))
    assert [i for i, _ in manifold._descend(problem, descent, 0.1, None, 100, 1e-9)] == [0, 1, 2]


def test_waiting_is_not_counted_and_warm_up_is_left_out() -> None:
    calls: list[str] = []
    timed = {"sleep": lambda: time.sleep(0.02), "slow": lambda: calls.append("slow")}
    times = manifold._cpu_times(timed, 4, {"slow": 1}, "test")
    assert {name: len(seconds) for name, seconds in times.items()} == {"sleep": 4, "slow": 1}
    assert calls == ["slow"]
    # It slept 80 ms; a call of sleep itself costs microseconds.
    assert sum(times["sleep"]) < 0.04


def test_a_run_that_was_stopped_goes_on_with_the_next_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
        if len(measured) == 1:
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(problem.name)
        return {"rows": {}}

    monkeypatch.setattr(manifold, "_measure", measure)
    monkeypatch.setattr(manifold, "report", lambda results: "")
    options = ["--problems", "pca-50", "procrustes-50", "--output", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit):
        _harness.main(manifold, options)
    _harness.main(manifold, options)
    assert len(measured) == 3 and len(set(measured)) == 3
    assert set(json.loads((tmp_path / "x.json").read_text())["results"]["problems"]) == {measured[0], measured[2]}
