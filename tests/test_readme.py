"""The README's Python blocks run, in order, and its set-up lines are what CI and users paste."""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from benchmarks import _finetune_table, manifold, training_step
from benchmarks._harness import RESULTS
from benchmarks._methods import (
    DORA_SHORT,
    FORA,
    FORA_BY_ROW,
    FORA_SHARED,
    LORA_RANKS,
    LORA_SHARED_LINEAR_FASTER,
    LORA_SHARED_LINEAR_SHORT,
    LORA_SHORT,
    LORA_SHORT_FASTER,
    METHODS,
    RANDOM_BY_ROW,
    RANDOM_SHARED,
    RANKS_BY_ROW,
    RANKS_SCALED,
    SHARED_LINEAR_FASTER,
    SHARED_LINEAR_SHORT,
    SHARED_LINEAR_TWICE,
    STRATIFIED_SHARED,
)

ROOT = Path(__file__).parent.parent
README, FINDINGS = (ROOT / "README.md").read_text(), (ROOT / "benchmarks" / "FINDINGS.md").read_text()


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
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize(("text", "least"), [(README, 8), (FINDINGS, 25)], ids=["README", "FINDINGS"])
def test_the_quoted_comparison_is_what_the_committed_results_say(text: str, least: int) -> None:
    """Trainable parameters, rates tried, seeds, loss and effective rank share of each row of the table."""
    cells = json.loads((RESULTS / "finetune.json").read_text())["results"]["cells"]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.search(r"\| [\d.]+M \|", line)
    ]
    quoted = {row[0]: row[1:] for row in rows}
    assert quoted.keys() <= METHODS.keys()
    assert len(quoted) > least
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
        check_speeds(f"{name}, {model['rank']}", SPEEDS, model["adapter"]["rows"])


def check_speeds(title: str, solvers: Sequence[str], rows: dict[str, Any]) -> None:
    """Compare README's row of that title with what was measured."""
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {title} |"))
    for cell, solver in zip(line.strip("| ").split("|")[1:], solvers, strict=True):
        row = rows.get(solver)
        if row is None:
            assert cell.strip() == "not run"
            continue
        # Two to three digits are quoted.
        milliseconds, times = (float(number) for number in re.findall(r"[\d.]+", f"{cell} 1")[:2])
        assert milliseconds == pytest.approx(1e3 * row["median_s"], rel=1e-2), (title, solver)
        assert times == pytest.approx(row["times_fused_adamw"], rel=1e-2), (title, solver)


CUDA_SPEEDS = (
    "torch AdamW, fused",
    "ours, qr",
    "ours, qr, in a CUDA graph",
    "torch AdamW, fused, in a CUDA graph",
    "geoopt, EuclideanStiefel",
)


def test_the_quoted_speeds_on_cuda_are_what_the_committed_results_say() -> None:
    results = result("optimizer_step_cuda")
    for name, model in results["models"].items():
        assert model["adapter"]["rows"].keys() >= set(CUDA_SPEEDS)
        check_speeds(f"{name}, {model['rank']}, CUDA", CUDA_SPEEDS, model["adapter"]["rows"])
    rows = {name: found["rows"] for name, found in results["training"].items()}
    shares = [[100 * rows[name][solver]["optimizer_share"] for solver in CUDA_SPEEDS[1::-1]] for name in rows]
    assert list(rows) == ["SmolLM2-135M", "LLaMA-3.2-1B", "LLaMA-3.1-8B"]
    assert [found["tokens"] for found in results["training"].values()] == [4096] * 3
    large = quoted_numbers(r"optimizer takes ([\d.]+) % of it, fused AdamW ([\d.]+) %")
    assert large == pytest.approx(shares[2], rel=2e-2)
    small = quoted_numbers(r"there it takes ([\d.]+) and ([\d.]+) % \(AdamW ([\d.]+) and ([\d.]+) %\)")
    assert small == pytest.approx([shares[0][0], shares[1][0], shares[0][1], shares[1][1]], rel=2e-2)


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def quoted_numbers(pattern: str) -> list[float]:
    """Return the numbers of a sentence of README, given as a pattern with a group for each, over line breaks."""
    found = re.search(pattern, " ".join(README.split()))
    assert found, pattern
    return [float(number) for number in found.groups()]


def leads(name: str, method: str, other: str) -> list[float]:
    """Return by how much a row leads another, for each seed."""
    ((task, _),) = result(name)["selection"].items()
    return _finetune_table.gain(result(name)["cells"], task, method, other)


@pytest.mark.parametrize(
    ("method", "other", "seeds", "sign", "pattern"),
    [
        (FORA_BY_ROW, "LoRA", 3, -1, r"by Fisher score are behind LoRA by ([\d.]+) \(([\d.]+)\)"),
        (FORA, "LoRA", 3, -1, r"as published by ([\d.]+) \(([\d.]+)\)"),
        (RANKS_BY_ROW, "LoRA", 4, 1, r"They are ([\d.]+) \(([\d.]+)\) ahead of LoRA with twice"),
        (RANKS_BY_ROW, "DoRA", 3, -1, r"([\d.]+) \(([\d.]+)\) behind DoRA"),
        (SHARED_LINEAR_TWICE, LORA_SHORT, 3, 1, r"`--lr-ratio 2`\) it is ([\d.]+) \(([\d.]+)\) ahead of LoRA so"),
        (LORA_SHORT_FASTER, LORA_SHORT, 2, -1, r"LoRA itself loses ([\d.]+) \(([\d.]+), two seeds\) by such a rate"),
        (STRATIFIED_SHARED, FORA_SHARED, 3, 1, r"in 100 steps, ([\d.]+) \(([\d.]+)\) ahead of the highest scores"),
        (STRATIFIED_SHARED, RANDOM_SHARED, 3, 1, r"and ([\d.]+) \(([\d.]+)\) ahead of random layers, and"),
        (STRATIFIED_SHARED, RANDOM_SHARED, 3, 1, r"two neighbours do, by ([\d.]+) \(([\d.]+)\) where they share A"),
        (LORA_SHORT, "LoRA", 3, 1, r"beta1 = 0.6 in place of Adam's 0.9 gains LoRA ([\d.]+) \(([\d.]+)\)"),
        (RANKS_BY_ROW, "LoRA, half the rank", 3, 1, r"and ([\d.]+) \(([\d.]+)\) ahead of LoRA at half the rank, their"),
        (RANKS_BY_ROW, LORA_RANKS, 2, 1, r"with the same ranks is ([\d.]+) \(([\d.]+), two seeds\) behind them"),
    ],
)
def test_the_quoted_leads_are_what_the_committed_results_say(
    method: str, other: str, seeds: int, sign: int, pattern: str
) -> None:
    check_lead("finetune", method, other, seeds, sign, pattern)


def check_lead(name: str, method: str, other: str, seeds: int, sign: int, pattern: str) -> None:
    """Compare a quoted mean, of the lead or with the sign of -1 of what a row is behind, and its spread over seeds."""
    gains = leads(name, method, other)
    # Four digits are quoted.
    assert quoted_numbers(pattern) == pytest.approx([sign * statistics.mean(gains), statistics.stdev(gains)], abs=6e-5)
    assert len(gains) == seeds


def test_the_quoted_leads_in_longer_runs_are_what_the_committed_results_say() -> None:
    pattern = r"and in 300 ([\d.]+) \(([\d.]+), three seeds, p 0.03\) ahead of it and"
    check_lead("finetune_long", STRATIFIED_SHARED, LORA_SHORT, 3, 1, pattern)
    pattern = r"ahead of it and ([\d.]+) \(([\d.]+)\) of DoRA\."
    check_lead("finetune_long", STRATIFIED_SHARED, DORA_SHORT, 3, 1, pattern)
    gains = leads("finetune_long", STRATIFIED_SHARED, LORA_SHORT)
    assert scipy.stats.ttest_1samp(gains, 0).pvalue == pytest.approx(0.03, abs=0.005)
    pattern = r"leads LoRA with twice the parameters by ([\d.]+) \(([\d.]+), four seeds, p 0.02\) at beta1 0.6"
    check_lead("finetune_long", SHARED_LINEAR_TWICE, LORA_SHORT, 4, 1, pattern)
    gains = leads("finetune_long", SHARED_LINEAR_TWICE, LORA_SHORT)
    assert scipy.stats.ttest_1samp(gains, 0).pvalue == pytest.approx(0.02, abs=0.005)
    pattern = r"at beta1 0.6, by ([\d.]+) \(([\d.]+)\) at 0.9, of two rates"
    check_lead("finetune_long", SHARED_LINEAR_TWICE, "LoRA", 3, 1, pattern)
    check_lead("finetune_long", SHARED_LINEAR_TWICE, "DoRA", 3, 1, r"and DoRA by ([\d.]+) \(([\d.]+)\) at 0.9")
    pattern = r"at 0.9 and by ([\d.]+) \(([\d.]+)\) at 0.6 \(one rate\)"
    check_lead("finetune_long", SHARED_LINEAR_TWICE, DORA_SHORT, 3, 1, pattern)
    (behind,) = quoted_numbers(
        r"once through the data, it is ([\d.]+) behind LoRA with twice the parameters \(one seed\)"
    )
    pattern = r"one rate for both factors is as good or better: ([\d.]+) \(([\d.]+), four seeds\) ahead of LoRA at 0.6"
    check_lead("finetune_long", SHARED_LINEAR_SHORT, LORA_SHORT, 4, 1, pattern)
    pattern = r"without the constraint it is ([\d.]+) \(([\d.]+)\) lower still"
    check_lead("finetune_long", SHARED_LINEAR_SHORT, LORA_SHARED_LINEAR_SHORT, 3, -1, pattern)
    pattern = r"on answers in words the constraint gains ([\d.]+) \(([\d.]+), four seeds, p 0.0004\)"
    check_lead("finetune_answers_long", SHARED_LINEAR_SHORT, LORA_SHARED_LINEAR_SHORT, 4, 1, pattern)
    pattern = r"at four times B's it gains ([\d.]+) \(([\d.]+)\)"
    check_lead("finetune", SHARED_LINEAR_FASTER, LORA_SHARED_LINEAR_FASTER, 3, 1, pattern)
    pattern = r"at one rate nothing \(-([\d.]+), spread ([\d.]+)\)"
    check_lead("finetune", SHARED_LINEAR_SHORT, LORA_SHARED_LINEAR_SHORT, 3, -1, pattern)
    assert leads("finetune_longer", SHARED_LINEAR_TWICE, "LoRA") == [pytest.approx(-behind, abs=6e-5)]
    assert result("finetune_longer")["frame"]["steps"] == 1000
    pattern = r"they are ([\d.]+) \(([\d.]+)\) ahead of LoRA in 300 steps and"
    check_lead("finetune_long", RANKS_SCALED, "LoRA", 3, 1, pattern)
    pattern = r"in 300 steps and ([\d.]+) \(([\d.]+)\) ahead of LoRA at half the rank"
    check_lead("finetune_long", RANKS_SCALED, "LoRA, half the rank", 3, 1, pattern)
    check_lead("finetune", RANKS_SCALED, "LoRA", 3, -1, r"but ([\d.]+) \(([\d.]+)\) behind LoRA in 100")


def test_the_quoted_leads_on_answers_are_what_the_committed_results_say() -> None:
    pattern = r"ranks by the gradient are ([\d.]+) \(([\d.]+)\) behind LoRA, and"
    check_lead("finetune_answers", RANKS_BY_ROW, "LoRA", 3, -1, pattern)
    pattern = r"LoRA at half the rank is ([\d.]+) \(([\d.]+)\) ahead of it: not"
    check_lead("finetune_answers", "LoRA, half the rank", "LoRA", 3, 1, pattern)
    pattern = r"at one rate for both factors, is ([\d.]+) \(([\d.]+), four seeds, p 0.02\) ahead of LoRA and"
    check_lead("finetune_answers_long", SHARED_LINEAR_SHORT, LORA_SHORT, 4, 1, pattern)
    pattern = r"ahead of LoRA and ([\d.]+) \(([\d.]+)\) of DoRA, with half their parameters, on 1000 test samples"
    check_lead("finetune_answers_long", SHARED_LINEAR_SHORT, DORA_SHORT, 4, 1, pattern)
    assert result("finetune_answers_long")["frame"]["eval_samples"] == 1000
    pattern = r"With A at twice the rate it is ([\d.]+) \(([\d.]+)\) and"
    check_lead("finetune_answers_long", SHARED_LINEAR_TWICE, LORA_SHORT, 4, 1, pattern)
    pattern = r"and ([\d.]+) \(([\d.]+)\) ahead, on test samples alone"
    check_lead("finetune_answers_long", SHARED_LINEAR_TWICE, DORA_SHORT, 4, 1, pattern)
    pattern = r"Layers of each depth that share A are ([\d.]+) \(([\d.]+), four seeds\) ahead of LoRA and"
    check_lead("finetune_answers_long", STRATIFIED_SHARED, LORA_SHORT, 4, 1, pattern)
    pattern = r"ahead of LoRA and ([\d.]+) \(([\d.]+)\) of DoRA there, on test samples alone"
    check_lead("finetune_answers_long", STRATIFIED_SHARED, DORA_SHORT, 4, 1, pattern)
    pattern = r"at one rate for both factors, ([\d.]+) \(([\d.]+), two seeds\) ahead of it, not told apart"
    check_lead("finetune_answers_longer", SHARED_LINEAR_SHORT, LORA_SHORT, 2, 1, pattern)
    pattern = r"on answers in words plain LoRA's are ahead by ([\d.]+) \(([\d.]+)\)"
    check_lead("finetune_answers", "LoRA, Fisher half", "LoRA, random half", 3, 1, pattern)
    (behind,) = quoted_numbers(r"FoRA with a second moment of each row is ([\d.]+) behind it \(one seed\)")
    assert leads("finetune_answers", FORA_BY_ROW, "AdaLoRA") == [pytest.approx(-behind, abs=6e-5)]


def test_the_quoted_leads_of_random_layers_are_what_the_committed_results_say() -> None:
    quoted = quoted_numbers(r"they are behind by ([\d.]+) and ([\d.]+) with orthonormal columns")
    assert quoted == pytest.approx([-gain for gain in leads("finetune", FORA_BY_ROW, RANDOM_BY_ROW)], abs=6e-5)
    quoted = quoted_numbers(r"with plain LoRA behind by ([\d.]+) and ahead by ([\d.]+)")
    behind, ahead = leads("finetune", "LoRA, Fisher half", "LoRA, random half")
    assert quoted == pytest.approx([-behind, ahead], abs=6e-5)
    cells = result("finetune")["cells"]
    parts = [_finetune_table.interaction(cells, "code", *pair[1:]) for pair in _finetune_table.COMBINATIONS]
    (more,) = quoted_numbers(r"together they gain ([\d.]+) less than the sum of each")
    assert len(parts[1]) == 1 and parts[1][0] == pytest.approx(-more, abs=6e-5)


def test_the_quoted_cost_of_scoring_is_what_the_committed_results_say() -> None:
    cost = result("fisher_cost")
    rows = {length: cost["lengths"][length]["rows"] for length in ("128", "512")}
    number, cell = r"([\d.]+)", r"([\d.]+) (?:% )?\| "
    methods = ("ours", "loop of single samples", "opacus ghost norms")
    # Two to three digits are quoted.
    for length, found in rows.items():
        quoted = quoted_numbers(rf"time at {length} tokens, forward passes \| {cell * 3}")
        assert quoted == pytest.approx([found[name]["times_forward"] for name in methods], rel=2e-2)
    memory = [[100 * mib / cost["model_mib"] for mib in cost["peak_mib"][name]] for name in methods]
    quoted = quoted_numbers(rf"memory above the model, of its size \| {cell * 3}")
    assert quoted == pytest.approx([allocated for allocated, _ in memory], rel=2e-2)
    assert "Four of the 25 % are gaps that the allocator leaves" in " ".join(README.split())
    assert memory[0] == pytest.approx([25, 25 - 4], abs=0.5)
    (wide,) = quoted_numbers(rf"of hidden size {cost['wide']['hidden_size']} ours takes {number} forward passes")
    assert wide == pytest.approx(cost["wide"]["times"]["forward pass"], rel=2e-2)
    loop, forward = "loop of single samples, by oneDNN", "forward pass, by oneDNN"
    quoted = quoted_numbers(
        rf"it takes {number}, {number} and {number}, and the loop by oneDNN {number} and {number} times as long"
    )
    passes = [*(1 / rows[n][forward]["times_ours"] for n in rows), cost["wide"]["times"][forward]]
    assert quoted == pytest.approx([*passes, *(rows[n][loop]["times_ours"] for n in rows)], rel=2e-2)
    shares = quoted_numbers(rf"Scoring is {number} % of a run at the paper's setting, but {number} % of 50 steps")
    assert shares == pytest.approx([100 * cost["share"][run] for run in ("paper", "default_run")], rel=2e-2)


def test_the_quoted_training_steps_are_what_the_committed_results_say() -> None:
    models = result("training_step")["models"]
    assert len(models) == 2
    for name, model in models.items():
        rows = [model["rows"][method] for method in training_step.METHODS]
        for what, unit, key in (("time", "s", "median_s"), ("memory above the model", "MiB", "peak_mib")):
            quoted = quoted_numbers(rf"\| {name}, {what} " + rf"\| ([\d.]+) {unit} " * 4)
            # Three digits are quoted, or a whole number.
            assert quoted == pytest.approx([row[key] for row in rows], rel=5e-3)


def test_the_quoted_early_stopping_is_what_the_committed_results_say() -> None:
    rows = {row["layers"]: row for row in result("early_stopping")["rows"] if row["tol"] == 0.1}
    certain = quoted_numbers(r"the best layer is certain after (\d+) samples and the best six after (\d+)")
    assert certain == [rows[1]["samples"], rows[6]["samples"]]
    assert "the best three, and half of the layers, are not after 64" in " ".join(README.split())
    assert [rows[n]["stable"] for n in (1, 6, 3, 15)] == [True, True, False, False]
    assert rows[3]["samples"] == rows[15]["samples"] == 64


def test_the_quoted_manifold_problems_are_what_the_committed_results_say() -> None:
    problems = result("manifold")["problems"]
    assert len(problems) == 14
    streams = {name for name, problem in problems.items() if problem["stochastic"]}
    assert len(streams) == 3
    reached = {
        name: {s: row["reached"]["1e-06"][1] for s, row in problem["rows"].items() if row["reached"]["1e-06"]}
        for name, problem in problems.items()
    }
    seconds = {name: {s: time for s, time in own.items() if "pymanopt" not in s} for name, own in reached.items()}
    chosen = {name: own[manifold.CHOICE] for name, own in seconds.items()}
    first = {name: min(own, key=own.__getitem__) for name, own in seconds.items()}
    behind = {name: chosen[name] / seconds[name][first[name]] for name in problems}
    others = {name for name, times in behind.items() if times > manifold.SLACK}
    text = " ".join(README.split())
    assert "is the first or within 10 % of the first on ten of them, the streams included" in text
    assert len(problems) - len(others) == 10
    assert not streams & others
    limits = quoted_numbers(r"On the other four it takes ([\d.]+) to ([\d.]+) times the time of the first")
    assert limits == pytest.approx([min(behind[n] for n in others), max(behind[n] for n in others)], abs=0.005)
    assert "geoopt's SGD with the same momentum, which starts otherwise, on three of at most 64 rows" in text
    assert {first[name][:15] for name in others if problems[name]["shape"][0] <= 64} == {"geoopt Nesterov"}
    assert "our own Adam on Brockett's cost at 500 x 10" in text
    assert first["Brockett, 500 x 10"] == "ours, Adam, qr"
    whole = [name for name in problems if name not in streams]
    gradient = [reached[name]["pymanopt, conjugate gradient"] / chosen[name] for name in whole]
    most, *level = quoted_numbers(
        r"takes up to ([\d.]+) times as long; on the two of Procrustes it is level \(([\d.]+) and ([\d.]+) times\)"
    )
    assert max(gradient) == pytest.approx(most, abs=0.05)
    assert sorted(gradient)[:2] == pytest.approx(level, abs=0.005)
    assert {name[:10] for name in whole if reached[name]["pymanopt, conjugate gradient"] < 1.1 * chosen[name]} == {
        "Procrustes"
    }
    geoopt = {name: problem["rows"]["geoopt Nesterov, Euclidean"]["times_choice"] for name, problem in problems.items()}
    (highest,) = quoted_numbers(r"takes as long as ours on 50 x 5, and up to ([\d.]+) times as long on large matrices")
    assert max(geoopt.values()) == pytest.approx(highest, abs=0.05)
    assert [geoopt[name] for name in problems if "50 x 5" in name] == pytest.approx([1] * 5, abs=0.05)
    for pattern, solver in (
        (r"SGD takes ([\d.]+) to ([\d.]+) times", "SGD"),
        (r"and Adam ([\d.]+) to ([\d.]+) times", "Adam"),
    ):
        slower = sorted(seconds[name][f"ours, {solver}, qr"] / chosen[name] for name in whole)[-9:]
        assert quoted_numbers(pattern) == pytest.approx([slower[0], slower[-1]], abs=0.06)


def test_the_quoted_times_with_another_seed_are_what_the_committed_results_say() -> None:
    times: dict[str, float] = {}
    for name, problem in result("manifold_seed1")["problems"].items():
        rows = {s: r["reached"]["1e-06"] for s, r in problem["rows"].items() if r["kind"] == "first-order"}
        seconds = {solver: hit[1] for solver, hit in rows.items() if hit}
        assert min(seconds, key=seconds.__getitem__).startswith("geoopt Nesterov")
        times[name] = seconds["ours, Nesterov, qr"] / min(seconds.values())
    worst = times.pop("PCA, condition 1000, 200 x 8")
    quoted = quoted_numbers(
        r"ours takes ([\d.]+) to ([\d.]+) times as long, and ([\d.]+) times on PCA with condition 1000"
    )
    assert quoted == pytest.approx([min(times.values()), max(times.values()), worst], rel=5e-3)
    assert len(times) == 5


def test_the_quoted_steps_of_an_idle_machine_are_what_the_committed_result_says() -> None:
    rows = [model["adapter"]["rows"][SPEEDS[1]] for model in result("optimizer_step_idle")["models"].values()]
    quoted = quoted_numbers(r"ours is ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+) times AdamW's")
    assert quoted == pytest.approx([row["times_fused_adamw"] for row in rows], abs=6e-3)
    ratios = [row["geoopt_euclidean_times_ours"] for row in rows]
    quoted = quoted_numbers(r"times AdamW's, and ([\d.]+) to ([\d.]+) times as fast as geoopt's QR")
    assert quoted == pytest.approx([min(ratios), max(ratios)], rel=2e-2)


def test_the_quoted_ratios_to_geoopt_are_what_the_committed_results_say() -> None:
    models = result("optimizer_step")["models"].values()
    ours, canonical = SPEEDS[1], SPEEDS[4]
    rows = [model["adapter"]["rows"] for model in models]
    ratios = [row[ours]["geoopt_euclidean_times_ours"] for row in rows]
    slower = [row[canonical]["times_ours_qr"] for row in rows if canonical in row]
    least, most, times = quoted_numbers(
        r"default is ([\d.]+) to ([\d.]+) times as fast as geoopt's QR \(.*?\) and (\d+) times as fast as its canonical"
    )
    # Two or three digits are quoted.
    assert [least, most] == pytest.approx([min(ratios), max(ratios)], rel=2e-2)
    assert times == pytest.approx(slower[0], rel=1e-2)
    alone = [model["A only"]["rows"][ours]["geoopt_euclidean_times_ours"] for model in models]
    quoted = quoted_numbers(r"\(([\d.]+) to ([\d.]+) times on A alone")
    assert quoted == pytest.approx([min(alone), max(alone)], rel=2e-2)
    beside = [row[ours]["geoopt_and_fused_times_ours"] for row in rows]
    quoted = quoted_numbers(r"and ([\d.]+) to ([\d.]+) times where B has fused AdamW beside geoopt")
    assert quoted == pytest.approx([min(beside), max(beside)], rel=2e-2)
