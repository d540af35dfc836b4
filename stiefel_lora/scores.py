"""Fisher scores as a value: ranking, selection, table, plot and file."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise, starmap
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np

from stiefel_lora._budget import count_of
from stiefel_lora._figures import drawing
from stiefel_lora._files import read_json, write_json
from stiefel_lora._models import split_at_layer
from stiefel_lora._types import Normalize
from stiefel_lora.errors import InputError, check_choice, check_int


@dataclass(frozen=True, repr=False)
class FisherScores:
    """Scores of the layers (or of single linear maps) of a model, by position.

    Attributes:
        scores: Mean over samples of the squared gradient norm, in squared units of loss over weight.
        stderr: Standard errors of these means; 0 for a single sample, which says nothing about it.
        names: Qualified names of the layers, or of the linear maps.
        layers: Position of each in the model's list of layers.
        parameters: Number of weights behind each score.
        parameters_per_rank: Trainable parameters that adapters of rank 1 on its linear maps have: the sum of in + out.
        squared_weight_norm: Squared Frobenius norm of the weights; 0 where one is not an ordinary tensor.
        granularity: "layer" or "module".
        n_samples: Number of samples the means are over.
        n_skipped: Samples left out because their loss or gradient was not finite.
        seconds: What the scoring took.
        stable: Whether the selection at ``budget`` (under the ``normalize`` of `fisher_select`, else by the raw scores)
            is separated from the rest, or with ``stratified`` from the rest of each run, beyond ``confidence``.
        budget: Budget for which ``stable`` was decided.
        confidence: 1 - tol, for differences of scores that are about normal.
    """

    scores: list[float]
    stderr: list[float]
    names: list[str]
    layers: list[int]
    parameters: list[int]
    parameters_per_rank: list[int]
    squared_weight_norm: list[float] = field(repr=False)
    granularity: str
    n_samples: int
    n_skipped: int
    seconds: float
    stable: bool
    budget: float | int
    confidence: float

    def __len__(self) -> int:
        return len(self.scores)

    def normalized(self, normalize: Normalize = "raw") -> list[float]:
        """Return the scores: "raw" (the paper's), "params" (per weight), or "weight" (relative to |W|_F^2)."""
        by = divisors(normalize, self.parameters, self.squared_weight_norm)
        return [score / value for score, value in zip(self.scores, by, strict=True)]

    def ranking(self, normalize: Normalize = "raw") -> list[int]:
        """Return all positions, the highest score first; ties go to the lower position."""
        return highest(self.normalized(normalize), len(self), stratified=False)

    def select(
        self,
        budget: float | int = 0.5,
        *,
        budget_params: int | None = None,
        rank: int | None = None,
        normalize: Normalize = "raw",
        stratified: bool = False,
    ) -> list[int]:
        """Return the sorted indices of the layers to adapt (with "module" granularity: positions in ``names``).

        Args:
            budget: A share of the layers in (0, 1] (rounded to a count, at least one), or a count.
            budget_params: Instead, a number of trainable parameters, filled greedily by score per parameter.
            rank: Rank of the adapters that ``budget_params`` counts.
            normalize: Which score to rank by; see `normalized`.
            stratified: Choose the highest score in each of as many runs of neighbouring layers as the budget allows,
                of lengths as even as can be, in place of the highest of all, which may all be of one depth.

        Raises:
            InputError: If a budget is out of range, or ``stratified`` is not for what is chosen.
        """
        check_stratified(stratified, self.granularity, budget_params)
        if budget_params is not None:
            chosen = self._fill(budget_params, rank, normalize)
        else:
            chosen = highest(self.normalized(normalize), count_of(budget, len(self)), stratified=stratified)
        return sorted(self.layers[i] if self.granularity == "layer" else i for i in chosen)

    def _fill(self, budget_params: int, rank: int | None, normalize: Normalize) -> list[int]:
        cost = budget_costs(budget_params, rank, self.parameters_per_rank)
        values = self.normalized(normalize)
        chosen, left = [], budget_params
        for i in sorted(range(len(self)), key=lambda i: (-values[i] / cost[i], i)):
            if cost[i] <= left:
                chosen.append(i)
                left -= cost[i]
        return chosen

    def table(self, selected: Sequence[int] = (), normalize: Normalize = "raw") -> str:
        """Return the ranking as lines of text, with a mark at the selected ones."""
        values = self.normalized(normalize)
        width = max(len(name) for name in self.names)
        lines = [f"{'rank':>4}  {'':1} {self.granularity:{width}}  {'score':>10}  {'± s.e.':>9}"]
        for place, i in enumerate(self.ranking(normalize), start=1):
            index = self.layers[i] if self.granularity == "layer" else i
            error = self.stderr[i] * (values[i] / self.scores[i] if self.scores[i] else 1)
            mark = "*" if index in selected else " "
            lines.append(f"{place:>4}  {mark} {self.names[i]:{width}}  {values[i]:>10.3g}  {error:>9.2g}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        best = self.ranking()[0]
        return (
            f"FisherScores({len(self)} {self.granularity}s, {self.n_samples} samples, highest {self.names[best]} "
            f"({self.scores[best]:.3g}), stable={self.stable}, {self.seconds:.1f} s)"
        )

    def plot(self, path: str | Path, selected: Sequence[int] | None = None) -> None:
        """Draw the scores into an image file: bars with standard errors, or layers against kinds of linear maps.

        Args:
            path: Where to; the ending decides the format.
            selected: Indices as `select` returns them (default: the selection at ``budget``).

        Raises:
            InputError: If an index does not exist, or no such picture can be drawn.
        """
        chosen = set(self.select(self.budget) if selected is None else selected)
        there = set(self.layers if self.granularity == "layer" else range(len(self)))
        if chosen - there:
            raise InputError(f"no {self.granularity} {', '.join(map(str, sorted(chosen - there)))} to mark as selected")
        with drawing(path, width=grid_width(self.layers)) as axes:
            (self._draw_bars if self.granularity == "layer" else self._draw_grid)(axes, chosen)
            axes.set_title(f"mean squared gradient norm over {self.n_samples} samples")

    def _draw_bars(self, axes: Any, chosen: set[int]) -> None:
        """Draw a bar for each layer, those of the chosen ones in colour."""
        for mine, label, colour in ((True, "selected", "#1f77b4"), (False, "not selected", "#c7c7c7")):
            bars = [
                (i, s, e)
                for i, s, e in zip(self.layers, self.scores, self.stderr, strict=True)
                if (i in chosen) == mine
            ]
            if bars:
                x, y, error = zip(*bars, strict=True)
                axes.bar(x, y, yerr=error, label=label, color=colour, ecolor="#555555", capsize=2)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("Fisher score (± s.e.)")
        axes.legend()

    def _draw_grid(self, axes: Any, chosen: set[int]) -> None:
        """Draw a field for each linear map, darker for a higher score, with a dot in the chosen ones."""
        from matplotlib.colors import LogNorm

        # Of scores that are all zero no field is drawn, so any scale will do.
        norm = LogNorm() if any(self.scores) else LogNorm(vmin=1e-1, vmax=1)
        mesh, rows = draw_grid(axes, self.names, self.layers, self.scores, norm=norm)
        dots = [(self.layers[i], rows[i]) for i in sorted(chosen)]
        axes.plot(*zip(*dots, strict=True), "o", color="#d62728", markersize=4)
        axes.set_xlabel("decoder layer (dots: selected)")
        axes.figure.colorbar(mesh, label="Fisher score")

    def save(self, path: str | Path) -> None:
        """Write the scores as JSON, whole or not at all."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "FisherScores":
        """Read scores written by `save`.

        Raises:
            InputError: If the file is missing or is something else.
        """
        content = read_json(Path(path))
        try:
            scores = cls(**content)
        except TypeError as error:
            raise InputError(f"{path} does not hold Fisher scores: {error}") from error
        wrong = scores._wrong_fields()
        if wrong:
            raise InputError(f"{path} does not hold Fisher scores: {', '.join(wrong)} is not what `save` writes")
        return scores

    def _wrong_fields(self) -> list[str]:
        """Return the names of the fields with a value of another type, or of another length than the scores."""
        kinds = {each.name: each.type for each in fields(self)}
        wrong = [name for name, kind in kinds.items() if not _is_of(kind, getattr(self, name))]
        if wrong:
            return wrong
        wrong = [name for name, kind in kinds.items() if get_origin(kind) is list and not self._has_one_each(name)]
        wrong += ["parameters"] * (min(self.parameters, default=1) < 1)
        return wrong + ["granularity"] * (self.granularity not in ("layer", "module"))

    def _has_one_each(self, name: str) -> bool:
        return len(getattr(self, name)) == len(self.scores) > 0


def _is_of(kind: Any, value: Any) -> bool:
    """Tell whether a value read from JSON is of the type of a field, where whole numbers may stand for others."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(get_args(kind)[0], entry) for entry in value)
    if kind is bool or kind is str:
        return isinstance(value, kind)
    of_kind = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return of_kind and math.isfinite(value)


def grid_width(layers: Sequence[int]) -> float:
    """Return the width of a picture with a column for each layer, in inches."""
    return max(6.0, 0.22 * len(set(layers)))


def draw_grid(
    axes: Any, names: Sequence[str], layers: Sequence[int], values: Sequence[float], **options: Any
) -> tuple[Any, list[int]]:
    """Draw a field for each linear map, its kind against its layer, darker for a higher value and empty for 0.

    Returns:
        The image, and the row of each linear map; its column is its layer.
    """
    kinds = [split_at_layer(name)[2] or name for name in names]
    labels = list(dict.fromkeys(kinds))
    rows = [labels.index(kind) for kind in kinds]
    grid = np.full((len(labels), max(layers) + 1), np.nan)
    grid[rows, layers] = [value or np.nan for value in values]
    image = axes.imshow(grid, cmap="Blues", aspect="auto", **options)
    axes.set_yticks(range(len(labels)), labels)
    axes.locator_params(axis="x", integer=True)
    return image, rows


def strata(available: int, count: int) -> list[range]:
    """Return the positions in ``count`` runs of neighbours, as even as can be."""
    return list(starmap(range, pairwise(i * available // count for i in range(count + 1))))


def highest(values: Sequence[float], count: int, *, stratified: bool) -> list[int]:
    """Return the positions of the ``count`` highest values, or of the highest in each of `strata`; ties to the lower.

    They come with the highest value first, or sorted.
    """
    if stratified:
        return [max(stratum, key=lambda i: (values[i], -i)) for stratum in strata(len(values), count)]
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def check_stratified(stratified: bool, granularity: str, budget_params: int | None) -> None:
    """Raise InputError if single linear maps, or a number of parameters, are to be chosen from each depth."""
    if stratified and (granularity != "layer" or budget_params is not None):
        given = f"granularity={granularity!r}" if budget_params is None else f"budget_params={budget_params}"
        raise InputError(f"stratified=True chooses a share or number of whole layers; it does not go with {given}")


def divisors(normalize: Normalize, parameters: Sequence[int], squared_weight_norm: Sequence[float]) -> Sequence[float]:
    """Return what scores are divided by to normalize them; see `FisherScores.normalized`."""
    check_choice("normalize", normalize, get_args(Normalize))
    if normalize == "raw":
        return [1] * len(parameters)
    if normalize == "params":
        return parameters
    if any(not value > 0 for value in squared_weight_norm):
        raise InputError("normalize='weight' needs weights that are ordinary tensors and not zero")
    return squared_weight_norm


def budget_costs(budget_params: int, rank: int | None, parameters_per_rank: Sequence[int]) -> list[int]:
    """Return what each takes of a budget of parameters, or raise InputError if that is not enough for any."""
    check_int("budget_params", budget_params)
    rank = check_budget_rank(rank)
    cost = [rank * size for size in parameters_per_rank]
    if budget_params < min(cost):
        raise InputError(f"budget_params must be at least {min(cost)}, one at rank {rank}, got {budget_params}")
    return cost


def check_budget_rank(rank: int | None) -> int:
    """Return the rank that a budget of parameters is counted at, or raise InputError if there is none."""
    if rank is not None:
        check_int("rank", rank)
    if rank is None or rank < 1:
        raise InputError(f"budget_params counts the parameters of adapters of some rank: give rank >= 1, got {rank}")
    return rank
