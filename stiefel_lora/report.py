"""Put the results of a run into files, a table and pictures."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from stiefel_lora._figures import can_draw, drawing
from stiefel_lora._files import write_json
from stiefel_lora._models import split_at_layer
from stiefel_lora._targets import describe, ranges
from stiefel_lora.config import LOSS_PICTURE, METRICS_FILE, RANKS_PICTURE, SCORES_PICTURE
from stiefel_lora.scores import FisherScores, draw_grid, grid_width

logger = logging.getLogger("stiefel_lora")


def write_run(folder: Path, metrics: Mapping[str, Any]) -> list[Path]:
    """Write the metrics and the pictures of a run; returns the files. Without matplotlib there are no pictures."""
    pictures: list[Path] = []
    try:
        if can_draw():
            pictures.extend(_draw_run(folder, metrics))
    except Exception as error:  # a picture is not worth a run's results
        logger.warning("not all pictures could be drawn: %s", error)
    # Last: where there are metrics, the run is finished.
    write_json(folder / METRICS_FILE, metrics)
    return [folder / METRICS_FILE, *pictures]


def _draw_run(folder: Path, metrics: Mapping[str, Any]) -> Iterator[Path]:
    """Draw the pictures of a run, and yield each that is drawn."""
    if metrics["fisher"] is not None:
        FisherScores(**metrics["fisher"]).plot(folder / SCORES_PICTURE, metrics["selected"])
        yield folder / SCORES_PICTURE
    elif metrics["config"]["granularity"] == "direction":
        plot_ranks(metrics["ranks"], folder / RANKS_PICTURE)
        yield folder / RANKS_PICTURE
    plot_loss(metrics, folder / LOSS_PICTURE)
    yield folder / LOSS_PICTURE


def plot_ranks(ranks: Mapping[str, int], path: Path) -> None:
    """Draw the rank of each adapted linear map, its kind against its layer."""
    from matplotlib.colors import LogNorm

    layers = [split_at_layer(name)[1] for name in ranks]
    with drawing(path, width=grid_width(layers)) as axes:
        image, _ = draw_grid(axes, list(ranks), layers, list(ranks.values()), norm=LogNorm(vmin=1))
        axes.set_xlabel("decoder layer (empty: not adapted)")
        axes.set_title(f"{sum(ranks.values())} directions of the gradients")
        axes.figure.colorbar(image, label="rank of the adapter")


def plot_loss(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw the training loss by step, and the held-out loss before and after."""
    losses, held_out = metrics["loss_curve"], metrics["held_out"]
    steps, ends = range(1, len(losses) + 1), [0, len(losses)]
    values = [held_out["before"]["loss"], held_out["after"]["loss"]]
    with drawing(path) as axes:
        axes.plot(steps, losses, color="#c7c7c7", label="training, each step")
        axes.plot(steps, _smooth(losses), color="#1f77b4", label="training, running mean of 10")
        axes.plot(ends, values, "o", color="#d62728", label="held out, before and after")
        for x, y in zip(ends, values, strict=True):
            axes.annotate(f"{y:.3f}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center", color="#d62728")
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
        axes.margins(x=0.06, y=0.12)


def _smooth(values: list[float], width: int = 10) -> list[float]:
    parts = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def table(metrics: Mapping[str, Any]) -> str:
    """Return the short table that ends a run."""
    before, after = metrics["held_out"]["before"], metrics["held_out"]["after"]
    seconds = metrics["seconds"]
    ranks = metrics["ranks"]
    rows = [
        ("training data", metrics["data"]["training"]),
        ("held-out data", metrics["data"]["held_out"]),
        _chosen(metrics),
        ("linears adapted", describe(ranks)),
        ("trainable parameters", f"{metrics['trainable_parameters']:,} ({metrics['trainable_share']:.2%})"),
        ("held-out loss", f"{before['loss']:.4f} -> {after['loss']:.4f}"),
        (
            "held-out perplexity",
            f"{before['perplexity']:.2f} -> {after['perplexity']:.2f} ({metrics['perplexity_change']:+.1%})",
        ),
        ("effective rank", f"{metrics['mean_effective_rank']:.1f} of {mean(ranks.values()):.3g}"),
        ("orthogonality error", f"{metrics['greatest_orthogonality_error']:.1e}"),
        ("training speed", f"{metrics['tokens_per_second']:.0f} tokens/s"),
        (
            "time",
            f"{seconds['total']:.0f} s: "
            + ", ".join(f"{seconds[k]:.0f} s {k}" for k in ("loading", "selection", "training", "evaluation"))
            + f" (optimizer steps {seconds['optimizer']:.1f} s)",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _chosen(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Return the row that says how much of what there was to choose from was chosen."""
    ranks, selected = metrics["ranks"], metrics["selected"]
    granularity = metrics["config"]["granularity"]
    if granularity == "direction":
        between = f"{min(ranks.values())} to {max(ranks.values())}"
        return "directions", f"{sum(ranks.values())} in {len(ranks)} linear maps, {between} in each"
    # Without scores all were chosen.
    total = len(selected) if metrics["fisher"] is None else len(metrics["fisher"]["scores"])
    count = f"{len(selected)} of {total}"
    return (
        ("layers adapted", f"{count}: {ranges(selected)}") if granularity == "layer" else ("linear maps adapted", count)
    )
