"""Choose on calibration samples what a run adapts: layers, single linear maps, or single directions of gradients."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from stiefel_lora._budget import check_least, count_of, share_of
from stiefel_lora._models import linear_shape, split_at_layer
from stiefel_lora._precision import autocast_like
from stiefel_lora._progress import progress
from stiefel_lora._targets import find_targets, last_names, module_ranks
from stiefel_lora._types import Granularity
from stiefel_lora.config import FinetuneConfig
from stiefel_lora.data import Dataset, batch_indices
from stiefel_lora.factors import adapter_size
from stiefel_lora.fisher import fisher_scores
from stiefel_lora.initialisation import allocate_ranks, gradient_init
from stiefel_lora.layer import Init
from stiefel_lora.scores import FisherScores

logger = logging.getLogger("stiefel_lora")


@dataclass(frozen=True)
class Selection:
    """What a run adapts.

    Attributes:
        ranks: Rank of each linear map to adapt, by qualified name in the model's order.
        scores: What it was chosen by; None for single directions, which singular values choose, and for all there is.
        selected: What was chosen of it: indices as `FisherScores.select` returns them.
    """

    ranks: dict[str, int]
    scores: FisherScores | None = None
    selected: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Selection":
        """Return what `asdict` made a mapping of."""
        return cls(**{**saved, "scores": saved["scores"] and FisherScores(**saved["scores"])})


def select(model: nn.Module, train: Dataset, config: FinetuneConfig) -> tuple[Selection, Any]:
    """Return what to adapt, and ``init`` of `add_adapters`.

    Raises:
        InputError: If the budget is larger than what there is to choose from, or too small for one.
    """
    if config.granularity == "direction":
        return _select_directions(model, train, config)
    targets, scores = adaptable(model, config), None
    if config.adapts_all:
        chosen = targets if config.granularity == "module" else {split_at_layer(name)[:2] for name in targets}
        selected = list(range(len(chosen)))
    else:
        scores = score_layers(model, train, config, config.granularity, targets)
        selected = choose(scores, config)
        by_layer = config.granularity == "layer"
        targets = find_targets(model, selected, targets, None) if by_layer else [scores.names[i] for i in selected]
    ranks = module_ranks(model, targets, config.adapter_rank)
    init = _gradient_start(model, train, config, targets) if config.init == "gradient" else config.init
    return Selection(ranks, scores, selected), init


def adaptable(model: nn.Module, config: FinetuneConfig) -> list[str]:
    """Return the linear maps that could be adapted, or raise InputError before the slow work starts.

    Those too small for the rank, such as a router of few experts, are left out with a warning where none was named.
    """
    names = find_targets(model, None, config.targets, None)
    least = config.leaves_out_below
    large = [name for name in names if min(linear_shape(model.get_submodule(name))) >= least]
    ranks = module_ranks(model, large or names, config.adapter_rank)
    if len(ranks) < len(names):
        small = last_names(name for name in names if name not in ranks)
        logger.warning("smaller than rank %d, and so left out: %s", config.adapter_rank, small)
    return list(ranks)


def score_layers(
    model: nn.Module, train: Dataset, config: FinetuneConfig, granularity: Granularity, modules: Sequence[str]
) -> FisherScores:
    """Score the layers, or the single linear maps, by those that are `adaptable`, on training data.

    Raises:
        InputError: If the budget is larger than their number, or too small for one.
    """
    if granularity == "module":
        _check_budget(model, modules, config)
    batches = _calibration(train, config)
    with autocast_like(model):
        return fisher_scores(
            model,
            batches,
            modules=modules,
            granularity=granularity,
            max_samples=sum(len(batch["input_ids"]) for batch in batches),  # all; the bar counts to it
            budget=config.budget,
            stratified=config.from_each_depth,
        )


def _check_budget(model: nn.Module, modules: Sequence[str], config: FinetuneConfig) -> None:
    """Raise InputError unless the budget allows a linear map, and not more of them than there are."""
    if not config.budget_is_parameters:
        count_of(config.budget, len(modules), "linear maps")
        return
    sizes = [adapter_size(*linear_shape(model.get_submodule(name)), config.adapter_rank) for name in modules]
    total = sum(sizes)
    check_least(config.budget, share_of(config.budget, total), total, min(sizes), "linear map")


def choose(scores: FisherScores, config: FinetuneConfig) -> list[int]:
    """Return what the budget allows: indices as `FisherScores.select` returns them."""
    if not config.budget_is_parameters:
        return scores.select(config.budget, stratified=config.from_each_depth)
    size = config.adapter_rank * sum(scores.parameters_per_rank)
    return scores.select(budget_params=share_of(config.budget, size), rank=config.adapter_rank)


def _gradient_start(
    model: nn.Module, train: Dataset, config: FinetuneConfig, targets: Sequence[str]
) -> dict[str, Init]:
    """Return starts for the adapters of the targets, from the gradient on the calibration samples."""
    batches = progress(_calibration(train, config), label="gradient start")
    with autocast_like(model):
        return gradient_init(
            model,
            batches,
            layers=None,
            rank=config.adapter_rank,
            target_modules=targets,
            orthonormal=config.orthonormal,
        )


def _select_directions(model: nn.Module, train: Dataset, config: FinetuneConfig) -> tuple[Selection, Any]:
    batches = progress(_calibration(train, config), label="directions")
    with autocast_like(model):
        ranks, starts = allocate_ranks(
            model,
            batches,
            rank=config.adapter_rank,
            budget=config.budget,
            target_modules=config.targets,
            orthonormal=config.orthonormal,
            # Whole gradients of a model of billions are more than what training takes.
            oversampling=8,
        )
    return Selection(ranks), starts if config.init == "gradient" else config.init


def _calibration(train: Dataset, config: FinetuneConfig) -> list[dict[str, Tensor]]:
    """Return as many samples as are asked for, or all there are, each once; the last batch may be smaller."""
    samples = min(config.calibration_samples, len(train))
    order = batch_indices(len(train), samples, 0, config.seed)
    return [train.batch(order[i : i + config.batch_size]) for i in range(0, samples, config.batch_size)]
