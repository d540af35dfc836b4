"""Which solver comes closest to the known optimum of problems on the Stiefel manifold, and how fast?

Top-r PCA (real digits, synthetic spectra, streams of mini-batches), orthogonal Procrustes, Brockett's cost and joint
diagonalisation, from 50 x 5 to 4096 x 64; float64, the streams float32. Every solver starts at the same point.

Learning rates: the rate of iteration t is rate * 10^(-t / decade), for all first-order solvers alike. Both numbers are
tuned for each solver and problem on one grid, by the iterations to a relative gap of 1e-6, and once more by those to
1e-9: rates a factor of ten apart at one decade (the later retractions of ours: the first one's best; for 1e-9: the best
for 1e-6), then from the best to its best neighbour until none is better, at half decades and then at quarters; a
setting is given up when its gap, at half the best one's iterations, is over a hundred times that one's. Streams are
tuned on other batches than they are measured on, and for half of 1e-6 alone: the gap that a stream ends at depends on
its batches, and what just reaches 1e-6 with some of them does not with others. Times to 1e-3 are of the runs tuned for
1e-6. Gaps are measured at iterations 3 % apart, outside the timed part. Times are iterations times the median CPU time
of an iteration (gradient and step) on one thread, taken with all solvers in turn; drawing a batch is not counted.
pymanopt's solvers, which see the whole cost and search along lines, are timed as whole runs. "SGD" has a momentum of
0.9, "Nesterov" is SGD with Nesterov's momentum of 0.9.

    OMP_NUM_THREADS=1 python -m benchmarks manifold
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import _harness, _peers
from benchmarks._problems import SUITE, Problem, pca, streaming_pca
from benchmarks._solvers import BATCH, FIRST_ORDER, Descent, LeftOutError
from stiefel_lora import stiefel

RATES = [10 ** (k / 4) for k in range(-16, 13)]
DECADES: list[int | None] = [25, 50, 100, 200, 400, None]
TARGETS = (1e-3, 1e-6, 1e-9)
# What the verdict is about, and what is drawn.
ASKED = 1e-6
# The part of it that streams are tuned for.
MARGIN = 0.5
# What a user would pick, and how much slower than the fastest it may be.
CHOICE = "ours, Nesterov, qr"
SLACK = 1.1
# The libraries compared, by what the names of their solvers begin with.
_COLOURS = {"ours": "#c1121f", "geoopt": "#1d4ed8", "POGO": "#2a9d8f", "geotorch": "#7b2cbf", "pymanopt": "#555555"}
# CPU seconds of more than one thread are not the time that a run takes.
THREADS = 1
# A trace of gaps: (iteration, relative gap).
Trace = list[tuple[int, float]]
# A point of the grid: the places of a rate and a decade.
Cell = tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this study's options."""
    parser.add_argument("--problems", nargs="+", choices=list(SUITE), default=list(SUITE), help="default: all")
    parser.add_argument("--rounds", type=_harness.positive(int), default=50, help="timed rounds (default: 50)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tune, run and time all solvers on all problems; a run that was stopped goes on with the next problem."""
    makers: dict[str, Callable[[int], Problem]] = {key: SUITE[key] for key in args.problems}
    if args.quick:
        makers = {
            "digits": SUITE["digits"],
            "pca": lambda seed: pca(20, 3, 5, seed=seed, budget=40),
            "stream": lambda seed: streaming_pca(20, 3, 16, seed=seed, budget=40),
        }
    results: dict[str, Any] = {
        "grid": {
            "rates": [_short(r) for r in RATES],
            "decades": DECADES,
            "tuned for": list(TARGETS[1:]),
            "streams": MARGIN * ASKED,
        },
        "rounds": 2 if args.quick else args.rounds,
        "problems": {},
        "absent": {},
    }
    if args.interrupted and all(args.interrupted.get(key) == results[key] for key in ("grid", "rounds")):
        results = {**args.interrupted, "absent": {}}
    for key, make in tqdm(makers.items(), desc="problems", leave=False, disable=None):
        try:
            problem = make(args.seed)
        except _peers.NotInstalledError as error:
            results["absent"][key] = str(error)
            continue
        if problem.name not in results["problems"]:
            results["problems"][problem.name] = _measure(problem, args)
            args.save(results)
    return results


def _tuned_for(problem: Problem) -> dict[float, tuple[float, ...]]:
    """Return the gaps that rates are tuned for, and which targets are read off the run with each."""
    return {ASKED: TARGETS} if problem.stochastic else {ASKED: TARGETS[:2], TARGETS[2]: TARGETS[2:]}


def _measure(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    budget = min(problem.budget, 40) if args.quick else problem.budget
    rows: dict[str, Any] = {}
    absent: dict[str, str] = {}
    # By the target that the run was tuned for.
    traces: dict[str, dict[float, Trace]] = {}
    timed: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[float, Cell]] = {}
    # Many in a row, as in a run: at the first steps of a turn the code of the others has filled the caches.
    steps = 2 if problem.start.numel() > 1e5 else 4 if args.quick else 40
    for name, make in tqdm(FIRST_ORDER.items(), desc=problem.name, leave=False, disable=None):
        try:
            make(problem)
        except (_peers.NotInstalledError, LeftOutError) as error:
            absent[name] = str(error)
            continue
        # The retractions of ours differ little.
        family = name.rsplit(",", 1)[0] if name.startswith("ours") else name
        best = found.setdefault(family, {})
        rows[name], traces[name] = _tuned_runs(problem, make, budget, best, quick=args.quick)
        timed[name] = _repeat(make(problem), steps)
    paths = {}
    for name, solve in BATCH.items():
        # Long enough for 1e-9 where they get there at all.
        limits = (5, 2.0) if args.quick else (500, 20.0)
        try:
            path = paths[name] = solve(problem, *limits)
        except (_peers.NotInstalledError, LeftOutError) as error:
            absent[name] = str(error)
            continue
        trace = [(i, problem.gap(x)) for i, x in enumerate(path.points)]
        traces[name] = dict.fromkeys(_tuned_for(problem), trace)
        rows[name] = {
            "kind": "batch",
            "orthogonality_error": float(stiefel.orthogonality_error(path.points[-1])),
        }
        timed[name] = lambda solve=solve, limits=limits: solve(problem, *limits)  # type: ignore[misc]
    rounds = 2 if args.quick else args.rounds
    times = _cpu_times(timed, rounds, dict.fromkeys(paths, min(2, rounds)), f"{problem.name}, timing")
    for name, row in rows.items():
        median = statistics.median(times[name])
        if name in paths:
            # The clock of the one run, in units of the median one.
            clock = [s / (paths[name].total or 1) * median for s in paths[name].seconds]
        else:
            clock = [i * median / steps for i in range(budget + 1)]
            row["times_choice"] = _ratio(times, name)
        row |= _read_off(problem, traces[name], clock)
    return {
        "about": problem.about,
        "shape": list(problem.start.shape),
        "stochastic": problem.stochastic,
        "budget": budget,
        "rows": rows,
        "absent": absent,
    }


def _tuned_runs(
    problem: Problem, make: Callable[[Problem], Descent], budget: int, best: dict[float, Cell], *, quick: bool
) -> tuple[dict[str, Any], dict[float, Trace]]:
    """Tune a solver for each gap and run it; return the row that this begins, and the traces by gap.

    The search begins at the ``best`` setting so far for a gap, of this solver's family, or else for the gap before;
    what it finds takes that one's place.
    """
    row: dict[str, Any] = {"kind": "first-order", "settings": {}}
    traces: dict[float, Trace] = {}
    cell = None
    for target in _tuned_for(problem):
        aim = MARGIN * target if problem.stochastic else target
        cell, tried = _tune(problem, make, budget, aim, best.get(target, cell), quick=quick)
        best[target] = cell
        rate, decade = RATES[cell[0]], DECADES[cell[1]]
        row["settings"][_key(target)] = {"rate": rate, "decade": decade, "tried": tried}
        descent = make(problem)
        traces[target] = _descend(problem, descent, rate, decade, budget, TARGETS[-1])
        if target == ASKED:
            row["orthogonality_error"] = _finite(float(stiefel.orthogonality_error(descent.point())))
    return row, traces


def _read_off(problem: Problem, traces: dict[float, Trace], clock: Sequence[float]) -> dict[str, Any]:
    """Return what a row says of its runs, given the time of each iteration."""
    reached: dict[str, Any] = {}
    for tuned, targets in _tuned_for(problem).items():
        for target in targets:
            hit = next((i for i, gap in traces[tuned] if gap <= target), None)
            reached[_key(target)] = hit if hit is None else [hit, _short(clock[hit])]
    drawn = [traces[ASKED][k] for k in _thin(len(traces[ASKED]))]
    return {
        "seconds_an_iteration": _short(clock[-1] / max(len(clock) - 1, 1)),
        "reached": reached,
        "iterations": [i for i, _ in drawn],
        "seconds": [_short(clock[i]) for i, _ in drawn],
        "gaps": [_short(gap) for _, gap in drawn],
    }


def _cpu_times(
    timed: dict[str, Callable[[], object]], rounds: int, slow: dict[str, int], label: str
) -> dict[str, list[float]]:
    """Return the CPU seconds of each function in each round, all in turn.

    One thread's CPU time is the elapsed time of a machine that has nothing else to do. With other work there, rounds of
    some milliseconds fall in step with the scheduler, which then takes its pause in the same solver every time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}

    def clocked(name: str) -> None:
        begin = time.process_time()
        timed[name]()
        seconds[name].append(time.process_time() - begin)

    turns = {name: partial(clocked, name) for name in timed}
    counted = _harness.interleave(turns, rounds=rounds, slow=slow, label=label)
    return {name: seconds[name][-len(counted[name]) :] for name in timed}


def _ratio(times: dict[str, list[float]], name: str) -> float | None:
    """Return the time of an iteration over that of our choice."""
    return _short(_harness.median_ratio(times, name, CHOICE))


def _repeat(descent: Descent, steps: int) -> Callable[[], None]:
    """Return a function that takes some steps on the batch that is there."""
    descent.oracle.draw()

    def go() -> None:
        for _ in range(steps):
            descent.step(1e-4)

    return go


def _tune(
    problem: Problem,
    make: Callable[[Problem], Descent],
    budget: int,
    target: float,
    start: Cell | None = None,
    *,
    quick: bool,
) -> tuple[Cell, dict[str, int | None]]:
    """Search the grid by iterations to a gap, then by the last gap.

    Args:
        problem: What to solve.
        make: Makes a run of the solver.
        budget: Iterations of a run at most.
        target: The gap.
        start: Where to begin; without it, at the best of some rates a factor of ten apart.
        quick: Whether to end there.

    Returns:
        The best, and what was tried: "rate / decade" to the iterations, None if not reached or given up.
    """
    problem = replace(problem, oracle=problem.rehearsal or problem.oracle)
    scores: dict[Cell, tuple[float, float]] = {}
    limit, hurdle = budget, (0, math.inf)

    def score(cell: Cell) -> tuple[float, float]:
        nonlocal limit, hurdle
        if cell not in scores:
            trace = _descend(problem, make(problem), RATES[cell[0]], DECADES[cell[1]], limit, target, hurdle)
            last, gap = trace[-1]
            scores[cell] = (last if gap <= target else math.inf, gap)
            if gap <= target:
                # Who is not there when the best so far was cannot win; who is far behind at half the way will not.
                limit = last
                hurdle = next((i, 100 * gap) for i, gap in trace if 2 * i >= last)
        return scores[cell]

    # From the middle outwards, so that the extremes are soon given up.
    coarse = [(k, 2) for k in ((12, 16) if quick else (16, 12, 20, 8, 24, 4))]
    best = min([start] if start else coarse, key=score)
    for stride in () if quick else (2, 1):
        # Diagonally too where a lower rate decays more slowly: there the ridge of good settings lies.
        moves = [(stride * a, b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1), (-1, 1), (1, -1))]
        while True:
            around = [(best[0] + a, best[1] + b) for a, b in moves]
            near = [cell for cell in around if 0 <= cell[0] < len(RATES) and 0 <= cell[1] < len(DECADES)]
            better = min(near, key=score)
            if score(better) >= score(best):
                break
            best = better
    tried = {
        f"{RATES[i]:.2g} / {DECADES[j]}": int(s) if math.isfinite(s) else None for (i, j), (s, _) in scores.items()
    }
    return best, tried


def _descend(
    problem: Problem,
    descent: Descent,
    rate: float,
    decade: int | None,
    budget: int,
    target: float,
    hurdle: tuple[int, float] = (0, math.inf),
) -> Trace:
    """Run until the gap is at most ``target``, the budget is spent, or the point or the rate is lost.

    A run whose gap at the iteration of the ``hurdle`` (iteration, gap) is above it is given up there.
    """
    trace = [(0, problem.gap(descent.point()))]
    checks = _checkpoints(budget)
    for i in range(budget):
        scale = 10 ** (-i / decade) if decade else 1.0
        descent.oracle.draw()
        descent.step(rate * scale)
        if i + 1 in checks:
            trace.append((i + 1, problem.gap(descent.point())))
            gap = trace[-1][1]
            if not target < gap < math.inf or scale < 1e-9 or (i + 1 == hurdle[0] and gap > hurdle[1]):
                break
    return trace


def _checkpoints(budget: int) -> set[int]:
    """Return iterations 3 % apart, the last one included."""
    return {min(math.ceil(1.03**k), budget) for k in range(math.ceil(math.log(budget) / math.log(1.03)) + 1)}


def _thin(count: int, most: int = 45) -> list[int]:
    """Return indices of at most so many points of a trace, the first and the last among them."""
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)}) if count > most else list(range(count))


def _key(target: float) -> str:
    return f"{target:.0e}"


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _short(x: float) -> float | None:
    """Round to four significant digits; what is not finite has no place in JSON."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown: first the verdict on our choice, then each problem."""
    parts = [_verdicts(results["problems"]), _scope(results)]
    tuned = [f"rate / decade to {_key(target)}" for target in TARGETS[1:]]
    header = ["solver", *tuned, "iterations to 1e-6", "ms an iteration", f"times {CHOICE}"]
    header += [f"s to {target:.0e}" for target in TARGETS] + ["last gap", "orthogonality error"]
    for name, problem in results["problems"].items():
        rows: list[list[object]] = []
        for solver, row in problem["rows"].items():
            hits = [row["reached"][_key(target)] for target in TARGETS]
            rows.append(
                [
                    solver,
                    *_settings(row),
                    hits[1][0] if hits[1] else "not reached",
                    1e3 * row["seconds_an_iteration"],
                    row.get("times_choice", ""),
                    *(hit[1] if hit else "not reached" for hit in hits),
                    _or_lost(row["gaps"][-1]),
                    _or_lost(row["orthogonality_error"]),
                ]
            )
        left_out = [[solver, why, *[""] * 9] for solver, why in problem["absent"].items()]
        parts.append(f"### {name}\n\n{problem['about']}.\n\n{_harness.markdown(header, rows + left_out)}")
    parts += [f"{key}: {why}." for key, why in results["absent"].items()]
    return "\n\n".join(parts)


def _scope(results: dict[str, Any]) -> str:
    """Say what the verdicts are over, and how many settings lie on the edge of the grid."""
    fastest = min(decade for decade in results.get("grid", {}).get("decades", DECADES) if decade)
    settings = [
        row["settings"][_key(ASKED)]
        for problem in results["problems"].values()
        for row in problem["rows"].values()
        if row.get("settings", {}).get(_key(ASKED))
    ]
    edge = sum(setting["decade"] == fastest for setting in settings)
    return (
        "Each problem is one random instance with one random start, tuned on itself unless it is a stream: among "
        f"solvers near each other the order is that instance's. Of {len(settings)} settings tuned for {ASKED:g} {edge} "
        f"have the grid's fastest decay, a factor of ten in {fastest} iterations; a faster one might do better."
    )


def _settings(row: dict[str, Any]) -> list[str]:
    """Return the rate and decade that a row was tuned to for each target."""
    if "settings" not in row:
        return ["line search, whole cost", ""]
    tuned = [row["settings"].get(_key(target)) for target in TARGETS[1:]]
    return [f"{s['rate']:.2g} / {s['decade'] or 'constant'}" if s else "" for s in tuned]


def _or_lost(value: float | None) -> object:
    return "lost" if value is None else value


def _verdicts(problems: dict[str, Any]) -> str:
    """Say for each problem whether our choice is the fastest first-order solver to 1e-6 or within a tenth of it."""
    header = ["problem", "stochastic", f"{CHOICE}: s to 1e-6"]
    header += ["fastest first-order peer", "fastest of all first-order", "fastest of those with line searches"]
    rows: list[list[object]] = []
    for name, problem in problems.items():
        reached = {
            s: row["reached"][_key(ASKED)][1] for s, row in problem["rows"].items() if row["reached"][_key(ASKED)]
        }
        seconds = {solver: s for solver, s in reached.items() if problem["rows"][solver]["kind"] == "first-order"}
        searching = {solver: s for solver, s in reached.items() if solver not in seconds}
        peers = {solver: s for solver, s in seconds.items() if not solver.startswith("ours")}
        mine = seconds.get(CHOICE)
        rows.append(
            [
                name,
                "yes" if problem["stochastic"] else "no",
                "not reached" if mine is None else mine,
                _against(mine, peers),
                _against(mine, seconds),
                _against(mine, searching) if searching else "",
            ]
        )
    title = f"Is {CHOICE} (momentum 0.9, tuned rate) the fastest to a gap of 1e-6, or within 10 % of the fastest?"
    return f"{title}\n\n{_harness.markdown(header, rows)}"


def _against(mine: float | None, others: dict[str, float]) -> str:
    if not others:
        return "no other reaches it" if mine is not None else "none reaches it"
    fastest = min(others, key=others.__getitem__)
    if mine is None:
        return f"no: {fastest} reaches it in {others[fastest]:.3g} s"
    ratio = mine / others[fastest]
    if ratio <= 1:
        return "yes: it is" if ratio == 1 else f"yes: {1 / ratio:.2f} times as fast as {fastest}"
    return f"{'yes' if ratio <= SLACK else 'no'}: {ratio:.2f} times the time of {fastest}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw gap against time, of the runs tuned for 1e-6, one panel a problem, from the results alone.

    In each panel the fastest solver of each library stands out, of ours the choice; the others are pale.
    """
    from matplotlib.figure import Figure

    problems = results["problems"]
    columns = max(1, min(4, len(problems)))
    lines = max(1, math.ceil(len(problems) / columns))
    figure = Figure(figsize=(4.2 * columns, 3.3 * lines + 0.3), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, name in itertools.zip_longest(panels, problems):
        if name is None:
            panel.set_axis_off()
            continue
        _draw(panel, problems[name]["rows"])
        panel.set(xscale="log", yscale="log", title=name, ylim=(1e-15, None))
        panel.tick_params(labelsize=8)
        panel.set_xlabel("seconds", fontsize=8)
        panel.set_ylabel("relative gap", fontsize=8)
    figure.supxlabel("pale: each library's other solvers", fontsize=9)
    figure.savefig(path, dpi=110)


def _draw(panel: Any, rows: dict[str, Any]) -> None:
    outstanding = _outstanding(rows)
    for solver, row in rows.items():
        points = [
            (s, max(gap, 1e-13)) for s, gap in zip(row["seconds"], row["gaps"], strict=True) if s and gap is not None
        ]
        style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.25}
        if solver in outstanding:
            style = {"linewidth": 2.4 if solver == CHOICE else 1.4, "label": solver, "zorder": 3}
        panel.plot(*zip(*points, strict=True) if points else ([], []), color=_COLOURS[_library(solver)], **style)
    for target in TARGETS:
        panel.axhline(target, color="0.85", linewidth=0.8, zorder=0)
    panel.legend(loc="lower left", fontsize=6.5)


def _outstanding(rows: dict[str, Any]) -> set[str]:
    """Return the solver of each library that is the first at 1e-6, or else ends the nearest; of ours the choice."""

    def rank(solver: str) -> tuple[float, float]:
        hit, last = rows[solver]["reached"][_key(ASKED)], rows[solver]["gaps"][-1]
        return hit[1] if hit else math.inf, math.inf if last is None else last

    libraries: dict[str, list[str]] = {}
    for solver in rows:
        libraries.setdefault(_library(solver), []).append(solver)
    return {CHOICE if CHOICE in solvers else min(solvers, key=rank) for solvers in libraries.values()}


def _library(solver: str) -> str:
    return next(library for library in _COLOURS if solver.startswith(library))


if __name__ == "__main__":
    _harness.main(sys.modules[__name__])
