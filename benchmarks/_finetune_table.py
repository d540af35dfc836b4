"""What the cells of the fine-tuning comparison say: a table, and a verdict on each comparison of two rows."""

import statistics
from collections import Counter
from pathlib import Path
from textwrap import fill
from typing import Any

import scipy.stats

from benchmarks import _harness
from benchmarks._methods import (
    ALL_BY_ROW,
    ALL_SHORT,
    ALLOCATED,
    BY_ELEMENT,
    BY_ROW,
    CALIBRATED,
    DORA_SHORT,
    FASTER,
    FORA,
    FORA_BY_ROW,
    FORA_SHARED,
    LORA_LINEAR,
    LORA_LINEAR_SHORT,
    LORA_RANKS,
    LORA_SHARED_LINEAR_FASTER,
    LORA_SHARED_LINEAR_SHORT,
    LORA_SHARED_LINEAR_TWICE,
    LORA_SHORT,
    LORA_SHORT_FASTER,
    METHODS,
    RANDOM_BY_ROW,
    RANDOM_SHARED,
    RANKS_BY_ROW,
    RANKS_BY_ROW_FASTER,
    RANKS_SCALED,
    RANKS_SHORT,
    RANKS_SHORT_SCALED,
    SELECTED,
    SHARED_LINEAR,
    SHARED_LINEAR_FASTER,
    SHARED_LINEAR_SHORT,
    SHARED_LINEAR_TWICE,
    SHARED_SHORT,
    STARTED,
    STRATIFIED_BY_ROW,
    STRATIFIED_SHARED,
)

Cell = dict[str, Any]

# The paper's claims, and this project's own questions.
COMPARISONS = (
    ("FoRA at half the parameters beats LoRA", FORA, "LoRA"),
    ("FoRA at half the parameters beats DoRA", FORA, "DoRA"),
    ("FoRA with a gradient start at half the parameters beats LoRA", STARTED, "LoRA"),
    ("FoRA with a gradient start at half the parameters beats DoRA", STARTED, "DoRA"),
    ("FoRA beats LoRA at half the rank, its equal in parameters", FORA, "LoRA, half the rank"),
    ("FoRA at a quarter of the parameters beats AdaLoRA", FORA, "AdaLoRA"),
    ("The same with a second moment of each row beats AdaLoRA", FORA_BY_ROW, "AdaLoRA"),
    ("LoRA on the MLP alone beats LoRA", "LoRA, MLP only", "LoRA"),
    ("Selection beats random layers, with plain LoRA", "LoRA, Fisher half", "LoRA, random half"),
    ("Selection beats random layers, on the manifold", FORA, "Stiefel A, random half"),
    ("Selection beats random layers, on the manifold with a second moment of each row", FORA_BY_ROW, RANDOM_BY_ROW),
    ("The constraint helps on the selected layers", FORA, "LoRA, Fisher half"),
    ("The constraint helps on all layers", "Stiefel A, all layers", "LoRA"),
    ("Single linear maps by score beat whole layers", "FoRA (A), modules", FORA),
    (
        "Single linear maps by score, with a gradient start, at half the parameters beat LoRA",
        "FoRA (A), modules, gradient start",
        "LoRA",
    ),
    (
        "Half the rank on all layers with a gradient start beats LoRA",
        "Stiefel A, half the rank, gradient start",
        "LoRA",
    ),
    (
        "Half the rank on all layers with rsLoRA's scaling beats LoRA",
        "Stiefel A, half the rank, rsLoRA's scaling",
        "LoRA",
    ),
    (
        "Half the rank on all layers with rsLoRA's scaling beats DoRA",
        "Stiefel A, half the rank, rsLoRA's scaling",
        "DoRA",
    ),
    ("Half the rank on all layers with a second moment of each element beats LoRA", BY_ELEMENT, "LoRA"),
    ("Half the rank on all layers with a second moment of each element beats DoRA", BY_ELEMENT, "DoRA"),
    ("Half the rank on all layers with a second moment of each row beats LoRA", BY_ROW, "LoRA"),
    ("Half the rank on all layers with a second moment of each row beats DoRA", BY_ROW, "DoRA"),
    ("A second moment of each element beats one of each row, at half the rank on all layers", BY_ELEMENT, BY_ROW),
    ("A second moment of each row helps FoRA", FORA_BY_ROW, FORA),
    ("FoRA with a second moment of each row beats LoRA", FORA_BY_ROW, "LoRA"),
    (
        "The constraint helps with a second moment of each element, at half the rank on all layers",
        BY_ELEMENT,
        "LoRA, half the rank",
    ),
    (
        "The constraint helps with a second moment of each row, at half the rank on all layers",
        BY_ROW,
        "LoRA, half the rank",
    ),
    ("The constraint helps with a second moment of each row, on the selected layers", FORA_BY_ROW, "LoRA, Fisher half"),
    ("The constraint helps with a second moment of each row, on random layers", RANDOM_BY_ROW, "LoRA, random half"),
    ("The constraint helps with a second moment of each row, on all layers", ALL_BY_ROW, "LoRA"),
    ("Orthonormal columns on all layers with a second moment of each row beat DoRA", ALL_BY_ROW, "DoRA"),
    (
        "The constraint helps with rsLoRA's scaling, at half the rank on all layers",
        "Stiefel A, half the rank, rsLoRA's scaling",
        "rsLoRA, half the rank",
    ),
    ("rsLoRA's scaling beats LoRA at its parameters", "rsLoRA", "LoRA"),
    ("A gradient start at LoRA's parameters beats LoRA", "Stiefel A, all layers, gradient start", "LoRA"),
    ("A gradient start at LoRA's parameters beats DoRA", "Stiefel A, all layers, gradient start", "DoRA"),
    (
        "The constraint helps after a gradient start, at half the rank on all layers",
        "Stiefel A, half the rank, gradient start",
        "LoRA, half the rank, gradient start",
    ),
    ("Ranks by the gradient's singular values, at half the parameters, beat LoRA", ALLOCATED, "LoRA"),
    ("Ranks by the gradient's singular values, at half the parameters, beat DoRA", ALLOCATED, "DoRA"),
    (
        "Ranks by the gradient's singular values beat one rank for all, both with a gradient start",
        ALLOCATED,
        "Stiefel A, half the rank, gradient start",
    ),
    ("The constraint helps with ranks by the gradient's singular values", ALLOCATED, "LoRA, ranks by gradient"),
    ("Ranks by the gradient and a faster A, at half the parameters, beat LoRA", FASTER, "LoRA"),
    ("Ranks by the gradient and a faster A, at half the parameters, beat DoRA", FASTER, "DoRA"),
    ("Ranks by the gradient and a faster A beat rsLoRA at half the rank", FASTER, "rsLoRA, half the rank"),
    ("A faster A helps with ranks by the gradient", FASTER, ALLOCATED),
    ("The constraint and a faster A help with ranks by the gradient", FASTER, "LoRA, ranks by gradient"),
    ("The same with the gradient of 128 samples, at half the parameters, beats LoRA", CALIBRATED, "LoRA"),
    ("The same with the gradient of 128 samples, at half the parameters, beats DoRA", CALIBRATED, "DoRA"),
    ("The same with the gradient of 128 samples, at half the parameters, beats rsLoRA", CALIBRATED, "rsLoRA"),
    ("The gradient of 128 samples is better than that of 32", CALIBRATED, FASTER),
    ("The constraint and a faster A help with that of 128", CALIBRATED, "LoRA, ranks by gradient of 128 samples"),
    (
        "Ranks by the gradient from a random start with each row, at half the parameters, beat LoRA",
        RANKS_BY_ROW,
        "LoRA",
    ),
    (
        "Ranks by the gradient from a random start with each row, at half the parameters, beat DoRA",
        RANKS_BY_ROW,
        "DoRA",
    ),
    (
        "Ranks by the gradient from a random start with each row beat LoRA at half the rank, their equal in parameters",
        RANKS_BY_ROW,
        "LoRA, half the rank",
    ),
    ("Ranks by the gradient beat one rank for all, both from a random start with each row", RANKS_BY_ROW, BY_ROW),
    ("Ranks by the gradient help plain LoRA", LORA_RANKS, "LoRA, half the rank"),
    ("The constraint helps with ranks by the gradient from a random start with each row", RANKS_BY_ROW, LORA_RANKS),
    ("A faster A helps with ranks by the gradient from a random start", RANKS_BY_ROW_FASTER, RANKS_BY_ROW),
    ("Scaling by 1 / sqrt(rank) helps these ranks", RANKS_SCALED, RANKS_BY_ROW),
    ("These ranks scaled by 1 / sqrt(rank), at half the parameters, beat LoRA", RANKS_SCALED, "LoRA"),
    ("A shorter memory of the gradients helps LoRA", LORA_SHORT, "LoRA"),
    ("A shorter memory helps ranks by the gradient from a random start with each row", RANKS_SHORT, RANKS_BY_ROW),
    ("These ranks beat LoRA, both with a shorter memory, at half the parameters", RANKS_SHORT, LORA_SHORT),
    (
        "These ranks scaled by 1 / sqrt(rank) beat LoRA, both with a shorter memory, at half the parameters",
        RANKS_SHORT_SCALED,
        LORA_SHORT,
    ),
    ("One A for all layers beats LoRA, both with a shorter memory, at half the parameters", SHARED_SHORT, LORA_SHORT),
    ("One A for all layers beats the scaled ranks, both with a shorter memory", SHARED_SHORT, RANKS_SHORT_SCALED),
    ("LoRA on all linear maps beats LoRA at its parameters", LORA_LINEAR, "LoRA"),
    ("One A for all layers, on all linear maps, at half the parameters, beats LoRA", SHARED_LINEAR, "LoRA"),
    ("One A for all layers beats LoRA, both on all linear maps, at half the parameters", SHARED_LINEAR, LORA_LINEAR),
    (
        "One A for all layers, on all linear maps, beats LoRA, both with a shorter memory, at half the parameters",
        SHARED_LINEAR_SHORT,
        LORA_SHORT,
    ),
    (
        "One A for all layers, on all linear maps, beats DoRA, both with a shorter memory, at half the parameters",
        SHARED_LINEAR_SHORT,
        DORA_SHORT,
    ),
    (
        "One A for all layers beats LoRA, both on all linear maps with a shorter memory, at half the parameters",
        SHARED_LINEAR_SHORT,
        LORA_LINEAR_SHORT,
    ),
    (
        "One A for all layers, at twice B's rate, beats LoRA, both with a shorter memory, at half the parameters",
        SHARED_LINEAR_TWICE,
        LORA_SHORT,
    ),
    (
        "One A for all layers, at twice B's rate, beats DoRA, both with a shorter memory, at half the parameters",
        SHARED_LINEAR_TWICE,
        DORA_SHORT,
    ),
    (
        "One A for all layers, at twice B's rate and with a shorter memory, beats LoRA, at half the parameters",
        SHARED_LINEAR_TWICE,
        "LoRA",
    ),
    (
        "One A for all layers, at twice B's rate and with a shorter memory, beats DoRA, at half the parameters",
        SHARED_LINEAR_TWICE,
        "DoRA",
    ),
    (
        "One A for all layers, at 4 times B's rate, beats LoRA, both with a shorter memory, at half the parameters",
        SHARED_LINEAR_FASTER,
        LORA_SHORT,
    ),
    (
        "One A for all layers, at 4 times B's rate, beats LoRA, both on all linear maps with a shorter memory",
        SHARED_LINEAR_FASTER,
        LORA_LINEAR_SHORT,
    ),
    ("LoRA with a shorter memory gains from A at twice the rate", LORA_SHORT_FASTER, LORA_SHORT),
    (
        "The constraint helps with a shorter memory and a second moment of each row, on all layers",
        ALL_SHORT,
        LORA_SHORT,
    ),
    (
        "Layers of each depth beat the highest scores of all, with a second moment of each row",
        STRATIFIED_BY_ROW,
        FORA_BY_ROW,
    ),
    ("Layers of each depth beat random ones, with a second moment of each row", STRATIFIED_BY_ROW, RANDOM_BY_ROW),
    ("Layers of each depth beat the highest scores of all, with one A", STRATIFIED_SHARED, FORA_SHARED),
    ("Layers of each depth beat random ones, with one A", STRATIFIED_SHARED, RANDOM_SHARED),
    ("Layers of each depth beat all layers, with one A and as many parameters", STRATIFIED_SHARED, SHARED_LINEAR_SHORT),
    ("Layers of each depth with one A beat LoRA, at half the parameters", STRATIFIED_SHARED, "LoRA"),
    ("Layers of each depth with one A beat DoRA, at half the parameters", STRATIFIED_SHARED, "DoRA"),
    (
        "Layers of each depth with one A beat LoRA, both with a shorter memory, at half the parameters",
        STRATIFIED_SHARED,
        LORA_SHORT,
    ),
    (
        "Layers of each depth with one A beat DoRA, both with a shorter memory, at half the parameters",
        STRATIFIED_SHARED,
        DORA_SHORT,
    ),
    ("The constraint helps one A for all layers", SHARED_LINEAR_SHORT, LORA_SHARED_LINEAR_SHORT),
    ("The constraint helps one A for all layers, at twice B's rate", SHARED_LINEAR_TWICE, LORA_SHARED_LINEAR_TWICE),
    (
        "The constraint helps one A for all layers, at 4 times B's rate",
        SHARED_LINEAR_FASTER,
        LORA_SHARED_LINEAR_FASTER,
    ),
)

COMBINATIONS = (
    ("The two parts combine super-additively", "Stiefel A, random half", FORA),
    ("The two parts combine super-additively, with a second moment of each row", RANDOM_BY_ROW, FORA_BY_ROW),
)

# Of one comparison by itself: with so many, one in twenty is to be expected below it by chance.
SIGNIFICANT = 0.05


def best_rate(cells: list[Cell], task: str, method: str) -> float | None:
    """Return the learning rate with the lowest validation loss.

    That is the best of all with the first seed; once it has more seeds, the best over these of all rates that have them
    as well.
    """
    losses: dict[float, dict[int, float]] = {}
    for c in cells:
        if (c["task"], c["method"]) == (task, method) and "validation_loss" in c:
            losses.setdefault(c["lr"], {})[c["seed"]] = c["validation_loss"]
    first = min((seed for of_rate in losses.values() for seed in of_rate), default=None)
    if first is None:
        return None
    with_first = [lr for lr, of_rate in losses.items() if first in of_rate]
    best = min(with_first, key=lambda lr: (losses[lr][first], lr))
    seeds = losses[best].keys()
    rivals = [lr for lr in with_first if seeds <= losses[lr].keys()]
    return min(rivals, key=lambda lr: (statistics.mean(losses[lr][seed] for seed in seeds), lr))


def at_best_rate(cells: list[Cell], task: str, method: str) -> dict[int, Cell]:
    """Return the cells of a method at its best rate, by seed."""
    rate = best_rate(cells, task, method)
    rows = [c for c in cells if (c["task"], c["method"], c["lr"]) == (task, method, rate) and "test_loss" in c]
    return {c["seed"]: c for c in rows}


def mean(rows: dict[int, Cell], name: str) -> float | None:
    """Return the mean over seeds of what was measured, None if it was not."""
    values = _present(rows, name)
    return statistics.mean(values) if values else None


def _present(rows: dict[int, Cell], name: str) -> list[float]:
    return [c[name] for c in rows.values() if c.get(name) is not None]


def gain(cells: list[Cell], task: str, a: str, b: str) -> list[float]:
    """Return by how much the test loss of ``a`` is lower than that of ``b``, for each seed that both have.

    The two saw the same data in the same order, so the spread of the difference is less than that of each.
    """
    one, two = at_best_rate(cells, task, a), at_best_rate(cells, task, b)
    return [two[seed]["test_loss"] - one[seed]["test_loss"] for seed in sorted(one.keys() & two.keys())]


def verdict(text: str, gains: list[float]) -> str:
    """Say in plain words whether a claim holds: "yes" and "no" with p < 0.05, in a two-sided paired t test.

    Few seeds, of which there must be one, say little: a lead of more than the spread over them is only a leaning.
    """
    lead = statistics.mean(gains)
    if len(gains) == 1:
        return f"{text}: {'yes' if lead > 0 else 'no'}, by one seed alone (loss lower by {lead:+.4f})."
    spread = statistics.stdev(gains)
    p = float(scipy.stats.ttest_1samp(gains, 0.0).pvalue)
    word = "yes" if lead > 0 else "no"
    if p >= SIGNIFICANT:
        word = f"leans to {word}" if abs(lead) > spread else "not told apart"
    return f"{text}: {word} (loss lower by {lead:+.4f}, spread {spread:.4f} over {len(gains)} seeds, p = {p:.2g})."


def claims(cells: list[Cell], task: str) -> list[str]:
    """Return a verdict on each comparison that has been measured, and how many have not."""
    found = [(text, gain(cells, task, a, b)) for text, a, b in COMPARISONS]
    found += [(text, interaction(cells, task, constraint, both)) for text, constraint, both in COMBINATIONS]
    measured = [verdict(text, gains) for text, gains in found if gains]
    rest = len(found) - len(measured)
    return [*measured, *([f"{rest} more comparisons are not measured yet."] if rest else [])]


def interaction(cells: list[Cell], task: str, constraint: str, both: str) -> list[float]:
    """Return by how much the gain of both parts is more than the sum of their gains, for each seed that all have.

    All gains are over plain LoRA on random layers; ``constraint`` is the row on these with orthonormal columns.
    """
    names = ("LoRA, random half", "LoRA, Fisher half", constraint, both)
    neither, selection, constrained, combined = rows = [at_best_rate(cells, task, name) for name in names]
    return [
        (neither[seed]["test_loss"] - combined[seed]["test_loss"])
        - (neither[seed]["test_loss"] - selection[seed]["test_loss"])
        - (neither[seed]["test_loss"] - constrained[seed]["test_loss"])
        for seed in sorted(set.intersection(*map(set, rows)))
    ]


_HEADER = (
    "method", "trainable", "learning rate", "seeds", "held-out loss", "accuracy", "effective rank share",
    "time of a step", "end to end", "optimizer's share", "MiB above loading",
)  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """Return a table and the verdicts for each task, as Markdown."""
    return "\n\n".join(_task(results, task) for task in results["selection"])


def _task(results: dict[str, Any], task: str) -> str:
    frame, selection = results["frame"], results["selection"][task]
    cells = [c for c in results["cells"] if c["task"] == task]
    timing = results["timing"].get(task, {"base": None, "rows": {}})
    before = selection["before"]
    rows: list[list[object]] = [
        ["before", "", "", "", f"{before['test_loss']:.4f}", _percent(before["accuracy"]), *[""] * 5],
        *(_row(m, found, cells, timing, frame["steps"]) for m in METHODS if (found := at_best_rate(cells, task, m))),
    ]
    notes = [
        f"Selection took {selection['seconds']:.0f} s and chose layers {' '.join(map(str, selection['layers']))}.",
        *(f"{c['method']} at {c['lr']:g} diverged." for c in cells if c.get("diverged")),
        *(f"{c['method']} at {c['lr']:g} failed: {c['error']}." for c in cells if "error" in c),
    ]
    places = Counter(cell.get("processor", "a machine that was not kept") for cell in cells)
    revisions = {cell["revision"] for cell in cells if cell.get("revision")}
    notes.append(
        "Cells were measured in pieces, by commands like the one below with its methods, rates and seeds, at "
        f"{len(revisions)} revision(s), on " + ", ".join(f"{name} ({n})" for name, n in places.items()) + "."
    )
    if results.get("missing"):
        notes.append(
            f"**{results['missing']} of the cells that the command below plans are not measured yet**; it goes on."
        )
    if timing["base"]:
        notes.append(
            f"The time of a step is {timing['base']}'s and multiples of it, measured in turn in one run; end to end "
            "adds to all steps what putting in the adapters takes, a gradient start with it, and the "
            f"{timing['selection_s']:.0f} s of selection where layers are chosen by score."
        )
    title = f"{task}: {frame['steps']} steps of {frame['batch_size']} x {frame['seq_len']} tokens, rank {frame['rank']}"
    if frame.get("train_samples"):
        epochs = frame["steps"] * frame["batch_size"] / frame["train_samples"]
        title += f", {epochs:.3g} times through {frame['train_samples']} samples"
    verdicts = "\n".join(f"- {line}" for line in claims(cells, task))
    how = (
        f"Yes and no have p < {SIGNIFICANT} in a paired t test of that comparison alone (with so many, some are to be "
        "expected by chance); what leans to one leads by more than the spread over seeds:"
    )
    table = _harness.markdown(list(_HEADER), rows)
    return f"### {title}\n\n{table}\n\n{' '.join(notes)}\n\n{how}\n\n{verdicts}"


def _row(method: str, found: dict[int, Cell], cells: list[Cell], timing: dict[str, Any], steps: int) -> list[object]:
    losses = [c["test_loss"] for c in found.values()]
    first = next(iter(found.values()))
    rates = sorted({c["lr"] for c in cells if c["method"] == method})
    timed = timing["rows"].get(method)
    share = mean(found, "effective_rank_share")
    return [
        method,
        f"{first['trainable'] / 1e6:.2f}M",
        f"{first['lr']:g} of {', '.join(f'{x:g}' for x in rates)}",
        len(found),
        f"{statistics.mean(losses):.4f}" + (f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""),
        _percent(mean(found, "accuracy")),
        "" if share is None else f"{share:.2f}",
        "" if timed is None else _time(timed, method == timing["base"]),
        "" if timed is None else f"{_end_to_end(method, timing, steps):.0f} s",
        _percent(mean(found, "optimizer_share")),
        "" if not (peaks := _present(found, "peak_mib_above_base")) else f"{max(peaks):.0f}",
    ]


def _time(timed: dict[str, float], is_base: bool) -> str:
    return f"{timed['median_s']:.2f} s" if is_base else f"{timed['times_base']:.2f}x"


def _end_to_end(method: str, timing: dict[str, Any], steps: int) -> float:
    timed = timing["rows"][method]
    return timed["start_s"] + steps * timed["median_s"] + (method in SELECTED) * timing["selection_s"]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _by_loss(cells: list[Cell], task: str) -> list[tuple[float, str, dict[int, Cell]]]:
    """Return the mean test loss, name and cells of each method that was measured, worst first."""
    found = {method: at_best_rate(cells, task, method) for method in METHODS}
    rows = [(statistics.mean(c["test_loss"] for c in r.values()), m, r) for m, r in found.items() if r]
    return sorted(rows, key=lambda row: -row[0])


_LABEL_WIDTH = 64  # characters; longer names take two lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the held-out loss of every method at its best rate, one dot a seed, best at the top; one panel a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {task: _by_loss(results["cells"], task) for task in results["selection"]}
    heights = [1.3 + 0.3 * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (task, rows) in zip(all_axes, panels.items(), strict=True):
        for height, (middle, method, cells) in enumerate(rows):
            colour = "#1f77b4" if method.startswith(("FoRA", "Stiefel")) else "#7f7f7f"
            losses = [c["test_loss"] for c in cells.values()]
            axes.plot(losses, [height] * len(losses), "o", color=colour, alpha=0.35, markersize=5)
            axes.plot(middle, height, "|", color=colour, markersize=14, markeredgewidth=2)
            trainable = next(iter(cells.values()))["trainable"] / 1e6
            axes.annotate(
                f"{trainable:.2f}M",
                (1.01, height),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color="#555555",
            )
        # About half of a long name and a word, so that two lines hold it, and there is room for the dots.
        labels = [fill(method, max(_LABEL_WIDTH, len(method) // 2 + 8)) for _, method, _ in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.set_ylim(-0.8, len(rows) - 0.2)
        axes.set_xlabel("held-out loss (nats per token);\ntrainable parameters on the right")
        axes.set_title(f"{task}: before {results['selection'][task]['before']['test_loss']:.3f}", fontsize=10)
        axes.grid(axis="y", color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
