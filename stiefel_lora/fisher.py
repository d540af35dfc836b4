"""Choose the layers to adapt by their Fisher information: how much the loss depends on them, sample by sample.

The score of a layer is F_l = 1/N sum_n sum_{W in layer l} |grad_W L(x_n, y_n)|_F^2: the squared norm of each *sample's*
gradient, averaged over samples; the squared gradient of a batch would mix them. (FoRA, arXiv:2605.29317: the diagonal
Fisher information, summed over a layer's linear maps.)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar, cast, get_args
from warnings import warn

import torch
from scipy.special import stdtr
from torch import Tensor, nn

from stiefel_lora._batches import take, to_device
from stiefel_lora._budget import count_of
from stiefel_lora._gradnorms import GradientNorms
from stiefel_lora._losses import LabelSampler, LossFn, SampleLosses
from stiefel_lora._models import (
    find_layers,
    find_linears,
    first_tensor,
    is_plain,
    join,
    linear_shape,
    undisturbed,
    unwrap,
)
from stiefel_lora._precision import wide_dtype
from stiefel_lora._processes import failing_together, gathered, is_distributed
from stiefel_lora._progress import progress as progress_bar
from stiefel_lora._sketches import GradientSketches
from stiefel_lora._types import Granularity, Labels, Normalize
from stiefel_lora.errors import InputError, check_choice, check_count, listed
from stiefel_lora.onednn import onednn_products
from stiefel_lora.scores import (
    FisherScores,
    budget_costs,
    check_budget_rank,
    check_stratified,
    divisors,
    highest,
    strata,
)

Number = TypeVar("Number", int, float)

# Fewer samples than this tell nothing about a standard error.
_FEWEST = 8
# What ``stable`` is decided at, where nothing was stopped by it.
_TOL = 0.05


def fisher_select(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: float | int = 0.5,
    budget_params: int | None = None,
    rank: int | None = None,
    normalize: Normalize = "raw",
    stratified: bool = False,
    layers: str | None = None,
    modules: Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    labels: Labels = "data",
    max_samples: int | None = None,
    tol: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[int]:
    """Return the sorted indices of the layers to adapt: those with the highest Fisher scores.

    Args:
        model: The model, before any adapter.
        batches: Calibration data; see `fisher_scores`.
        budget: Share of the layers in (0, 1], or their number.
        budget_params: Instead, a number of trainable parameters at ``rank``, filled greedily by score per parameter.
        rank: Rank of the adapters that ``budget_params`` counts.
        normalize: "raw" (the paper's score), "params" (per weight) or "weight" (relative to the weights' norm).
        stratified: Choose the highest score in each of as many runs of neighbouring layers as the budget allows, in
            place of the highest of all, which may all be of one depth; not with ``budget_params``.
        layers: See `fisher_scores`, as for all that follow.
        modules: Names of the linear maps that count, such as those that will be adapted.
        loss_fn: Loss for other models and data.
        labels: "data" or "model".
        max_samples: Stop after so many.
        tol: Stop as soon as the set that ``budget`` and ``normalize`` choose is stable; not with ``budget_params``.
        seed: Seed of drawn labels.
        progress: Show a bar on a terminal.

    Returns:
        Indices into the model's list of layers, sorted; of equal scores the lower index is chosen.

    Raises:
        InputError: See `fisher_scores` and `FisherScores.select`.
    """
    options = Scoring(
        layers=layers,
        modules=modules,
        loss_fn=loss_fn,
        labels=labels,
        max_samples=max_samples,
        budget=budget,
        budget_params=budget_params,
        rank=rank,
        normalize=normalize,
        stratified=stratified,
        tol=tol,
        seed=seed,
        progress=progress,
    )
    scores = score(model, batches, options)
    return scores.select(budget, budget_params=budget_params, rank=rank, normalize=normalize, stratified=stratified)


def fisher_scores(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: str | None = None,
    modules: Sequence[str] | None = None,
    loss_fn: LossFn | None = None,
    labels: Labels = "data",
    granularity: Granularity = "layer",
    max_samples: int | None = None,
    budget: float | int = 0.5,
    stratified: bool = False,
    tol: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FisherScores:
    """Score every layer by the squared gradient norm of its linear maps, exact for each sample, in one pass.

    The model is evaluated in eval mode; only gradients of activations are computed. It comes back as it was: training
    mode, ``requires_grad``, gradients, hooks, configuration and random state, also after an error. Linear maps are
    modules that are called: projections inside ``nn.MultiheadAttention`` and experts kept as one tensor are not scored.
    Gradients of float16 are taken of a scaled loss, so that those below its range count.

    Args:
        model: A model with a list of repeated layers, on any device.
        batches: Mappings for ``model(**batch)`` that gives a ``loss``, or whatever ``loss_fn`` takes: tensors with the
            batch as their first dimension, lists with an entry for each sample. Padding has the label -100. Batches
            may mix lengths; their size changes the speed and the memory, not the scores.
        layers: Qualified name of the list of layers, where the longest one is not meant.
        modules: Names of the linear maps that count, matched against the end of their qualified names (default: all).
        loss_fn: Called as ``loss_fn(model, batch)``, with the model out of any wrapper such as DDP; returns the loss of
            each sample, shape (batch,), or one number.
        labels: "data" for the empirical Fisher information; "model" draws the labels from the model's own output, the
            true Fisher information, at the cost of one more forward pass.
        granularity: "layer", or "module" for a score of each linear map.
        max_samples: Stop after so many samples, on each rank.
        budget: What ``tol`` and the field ``stable`` refer to: the share or number of layers to be chosen.
        stratified: Whether they are chosen from each depth (see `fisher_select`), for ``tol`` and ``stable`` as well.
        tol: Stop as soon as the chosen set is stable at the confidence 1 - tol: the chances that a chosen one is behind
            another, of all such pairs, add up to no more than this look's share of tol (Student's t of the paired
            differences, at least 8 samples; there is a look whenever the samples are half as many again, and the k-th
            has the share tol / (k (k + 1))). Student's t takes the differences for nearly normal: where the scores of
            some layers hang on few samples and those of others do not, it may be wrong more often. None takes all
            samples; ``stable`` then is decided at 0.05.
        seed: Seed of the draws of ``labels="model"``.
        progress: Show a bar, on a terminal only.

    Returns:
        The scores, over the samples of all ranks if a torch.distributed group is initialised.

    Raises:
        InputError: If there are no batches, no loss, no linear maps, it cannot be told how many samples a batch has, a
            weight is shared with a module that is not scored, an option is out of range, no sample had a finite
            gradient, or all gradients are zero.

    Warns:
        UserWarning: If samples were left out because their loss or gradient was not finite, or a linear map was never
            called, or as something else: some models, such as Mamba, read the weight of one past its ``forward``.
    """
    options = Scoring(
        layers=layers,
        modules=modules,
        loss_fn=loss_fn,
        labels=labels,
        granularity=granularity,
        max_samples=max_samples,
        budget=budget,
        stratified=stratified,
        tol=tol,
        seed=seed,
        progress=progress,
    )
    return score(model, batches, options)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The options of `fisher_scores` and `fisher_select`.

    Raises:
        InputError: If one is out of range.
    """

    layers: str | None = None
    modules: Sequence[str] | None = None
    loss_fn: LossFn | None = None
    labels: Labels = "data"
    granularity: Granularity = "layer"
    max_samples: int | None = None
    budget: float | int = 0.5
    budget_params: int | None = None
    rank: int | None = None
    normalize: Normalize = "raw"
    stratified: bool = False
    tol: float | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.budget_params is not None:
            check_budget_rank(self.rank)
        if self.budget_params is not None and self.tol is not None:
            raise InputError(
                "tol= cannot tell when a choice by budget_params is stable; give budget= with it, or no tol="
            )
        check_stratified(self.stratified, self.granularity, self.budget_params)
        check_choice("labels", self.labels, get_args(Labels))
        check_choice("granularity", self.granularity, get_args(Granularity))
        if self.max_samples is not None:
            check_count("max_samples", self.max_samples)
        if self.tol is not None and not 0 < self.tol < 1:
            raise InputError(f"tol must be in (0, 1), got {self.tol}")
        if self.tol is not None and is_distributed():
            raise InputError("tol= is not supported in a distributed job, whose ranks would stop at different batches")


def score(
    model: nn.Module, batches: Iterable[Any], options: Scoring, sketches: GradientSketches | None = None
) -> FisherScores:
    """Do what `fisher_scores` says, and fill sketches of the gradients, if given, in the same pass."""
    start = perf_counter()
    model = unwrap(model)
    groups = _Groups.of(model, options)
    parameters = groups.sums(lambda linear: math.prod(linear_shape(linear)))
    parameters_per_rank = groups.sums(lambda linear: sum(linear_shape(linear)))
    if options.budget_params is not None:
        budget_costs(options.budget_params, options.rank, parameters_per_rank)  # before the slow pass
    squared_weight_norm = groups.sums(_square)
    count = count_of(options.budget, len(groups.members))
    divisor = torch.tensor(divisors(options.normalize, parameters, squared_weight_norm), dtype=torch.float64)
    looks = None if options.tol is None else _Looks(count, options.tol, stratified=options.stratified)
    stop = None if looks is None else lambda samples: looks.is_stable(samples / divisor)
    norms = GradientNorms(model, groups.linears, sketches)
    with failing_together(), undisturbed(model), onednn_products(), norms:
        rows = _measured(model, batches, options, groups, norms, stop)
    samples, skipped = _together(rows)
    _check_measured(samples, norms)
    if sketches is not None and is_distributed():
        sketches.add_other_ranks()
    chosen_by = samples / divisor
    if looks is None:
        stable = _is_stable(chosen_by, count, _TOL, stratified=options.stratified)
    else:
        stable = looks.is_stable(chosen_by, last=True)
    return FisherScores(
        scores=samples.mean(0).tolist(),
        stderr=(samples.std(0) / math.sqrt(len(samples))).tolist() if len(samples) > 1 else [0.0] * len(parameters),
        names=[name for name, _ in groups.members],
        layers=[layer for _, layer in groups.members],
        parameters=parameters,
        parameters_per_rank=parameters_per_rank,
        squared_weight_norm=squared_weight_norm,
        granularity=options.granularity,
        n_samples=len(samples),
        n_skipped=skipped,
        seconds=perf_counter() - start,
        stable=stable,
        budget=options.budget,
        confidence=1 - (_TOL if options.tol is None else options.tol),
    )


@dataclass(frozen=True)
class _Groups:
    """What gets a score: layers, or single linear maps.

    Attributes:
        linears: All linear maps by qualified name.
        members: For each (name, layer) that gets a score, the positions of its linear maps.
    """

    linears: dict[str, nn.Module]
    members: dict[tuple[str, int], list[int]]

    @classmethod
    def of(cls, model: nn.Module, options: Scoring) -> "_Groups":
        prefix, _ = find_layers(model, options.layers)
        linears: dict[str, nn.Module] = {}
        members: dict[tuple[str, int], list[int]] = {}
        for layer, found in find_linears(model, layers=options.layers, targets=options.modules).items():
            for name, linear in found.items():
                key = (join(prefix, layer) if options.granularity == "layer" else name, layer)
                members.setdefault(key, []).append(len(linears))
                linears[name] = linear
        return cls(linears, members)

    def sums(self, measure: Callable[[nn.Module], Number]) -> list[Number]:
        """Return the sums of what is measured of each linear map."""
        values = [measure(linear) for linear in self.linears.values()]
        return [cast(Number, sum(values[i] for i in positions)) for positions in self.members.values()]

    def totals(self, squared: Tensor) -> Tensor:
        """Sum up the squared norms of linear maps, (batch, linear maps), to those of the groups, (batch, groups)."""
        return torch.stack([squared[:, positions].sum(1) for positions in self.members.values()], dim=1)


def _measured(
    model: nn.Module,
    batches: Iterable[Any],
    options: Scoring,
    groups: _Groups,
    norms: GradientNorms,
    stop: Callable[[Tensor], bool] | None,
) -> list[Tensor]:
    """Return the squared norms of each batch, (batch, groups), until ``stop`` has seen enough of the finite ones."""
    rows: list[Tensor] = []
    losses = SampleLosses(model, norms, options.loss_fn)
    # Ranks must not draw the same numbers for their different samples.
    rank = torch.distributed.get_rank() if is_distributed() else 0
    sampler = LabelSampler(model, options.seed + rank) if options.labels == "model" else None
    bar = progress_bar(total=options.max_samples, label="Fisher scores", enabled=None if options.progress else False)
    with bar:
        for batch, size in _limited(batches, _device(groups.linears), options.max_samples, losses.size):
            rows.append(groups.totals(losses.measure(batch if sampler is None else sampler.draw(batch), size)))
            bar.update(size)
            if stop is not None and stop(_finite(rows).cpu()):
                break
    return rows


def _check_measured(samples: Tensor, norms: GradientNorms) -> None:
    """Warn of linear maps of which nothing is known, and raise InputError if that is so for all."""
    parts = gathered((list(norms.unused), list(norms.unlike)))
    never = [name for name in norms.unused if all(name in unused for unused, _ in parts)]
    unlike = list(dict.fromkeys(name for _, names in parts for name in names))
    for how, names in (("never called", never), ("not called as maps of their widths", unlike)):
        if names:
            warn(f"{how}, so their score is zero: {listed(names)}; modules= leaves them out", stacklevel=4)
    if not samples.any():
        raise InputError(
            "every score is zero: does the loss compare the samples of a batch with each other, as a contrastive one? "
            "Each sample is scored by its loss alone"
        )


def _limited(
    batches: Iterable[Any], device: torch.device, limit: int | None, size_of: Callable[[Any], int]
) -> Iterator[tuple[Any, int]]:
    """Yield batches on the device, and their sizes, until there are ``limit`` samples."""
    seen = 0
    for batch in batches:
        batch = to_device(batch, device)
        size = size_of(batch)
        if not size:
            continue
        if limit is not None and seen + size > limit:
            batch = take(batch, slice(0, limit - seen), size)
            size = limit - seen
        yield batch, size
        seen += size
        if seen == limit:
            return


def _device(linears: dict[str, nn.Module]) -> torch.device:
    first = first_tensor(next(iter(linears.values())))
    return torch.device("cpu") if first is None else first.device


def _finite(rows: list[Tensor]) -> Tensor:
    samples = torch.cat(rows).double()
    return samples[samples.isfinite().all(1)]


def _together(rows: list[Tensor]) -> tuple[Tensor, int]:
    """Return the finite samples of all ranks, (N, scores) in float64 on the CPU, and how many were not finite."""
    # A rank without batches takes part as well: the others wait for it.
    parts = gathered(([_finite(rows).cpu().numpy()] if rows else [], sum(map(len, rows))))
    total = sum(n for _, n in parts)
    if not total:
        raise InputError("there are no calibration batches to score")
    samples = torch.cat([torch.from_numpy(array) for arrays, _ in parts for array in arrays])
    skipped = total - len(samples)
    if not len(samples):
        raise InputError(f"none of the {total} samples had a finite loss and gradient; are all labels -100?")
    if skipped:
        reason = "their loss or gradient was not finite, or none of their labels counts"
        warn(f"{skipped} of {total} samples were left out: {reason}", stacklevel=4)
    return samples, skipped


class _Looks:
    """Decides again and again, as samples come, whether a choice is stable, with all chances to be wrong within tol.

    That is if the differences of scores are about normal; resampled scores of real text are near enough.

    The k-th look takes its share tol / (k (k + 1)), and there is one whenever the samples are half as many again, as
    each costs some certainty.

    Args:
        count: How many are chosen.
        tol: The chance that all looks together call a choice stable which is not.
        stratified: Whether they are chosen from each depth.
    """

    def __init__(self, count: int, tol: float, *, stratified: bool = False) -> None:
        self._count, self._tol, self._stratified = count, tol, stratified
        self._taken = 0
        self._seen = 0
        self._found = False

    def is_stable(self, samples: Tensor, *, last: bool = False) -> bool:
        """Tell whether the highest means are told apart from the rest, by samples of shape (n, available)."""
        n, available = samples.shape
        if self._count == available:
            return True
        if self._found or n < _FEWEST or n == self._seen or (n < 1.5 * self._seen and not last):
            return self._found
        self._taken, self._seen = self._taken + 1, n
        share = self._tol / (self._taken * (self._taken + 1))
        self._found = _is_stable(samples, self._count, share, stratified=self._stratified)
        return self._found


def _is_stable(samples: Tensor, count: int, tol: float, *, stratified: bool = False) -> bool:
    """Tell whether the ``count`` means that are chosen are told apart from the rest at the confidence 1 - tol."""
    n, available = samples.shape
    if count == available:
        return True
    if n < _FEWEST:
        return False
    means = samples.mean(0)
    chosen = torch.tensor(highest(means.tolist(), count, stratified=stratified))
    rest = torch.tensor(sorted(set(range(available)) - set(chosen.tolist())))
    # Paired: samples with large gradients have them in all layers, which says nothing about the layers' order.
    covariance = samples.T.cov()
    variance = covariance.diagonal()
    spread = variance[chosen, None] + variance[rest] - 2 * covariance[chosen[:, None], rest]
    error = (spread.clamp_min(0) / n).sqrt()
    lead = means[chosen, None] - means[rest]
    # The chance that any pair is the other way round is at most the sum over all, most of which are next to zero.
    chances = _upper_tail(lead / error, n - 1)
    if stratified:  # against the rest of the stratum alone
        stratum = torch.tensor([i for i, run in enumerate(strata(available, count)) for _ in run])
        chances = chances[stratum[chosen, None] == stratum[rest]]
    return bool(chances.sum() <= tol)


def _upper_tail(t: Tensor, freedom: int) -> Tensor:
    """Return P(T > t) of Student's t distribution."""
    return torch.from_numpy(stdtr(freedom, -t.numpy()))


def _square(module: nn.Module) -> float:
    """Return the squared Frobenius norm of a linear map's weight, 0 if that is not an ordinary tensor."""
    if not is_plain(module):
        return 0.0
    weight = cast(Tensor, module.weight)
    # One pass, without a second tensor of the weight's size.
    return float(torch.linalg.vector_norm(weight.detach(), dtype=wide_dtype(weight.dtype))) ** 2
