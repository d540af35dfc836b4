"""Start the orthonormal factors from the directions in which a calibration set wants to move the weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from warnings import warn

import torch
from torch import Tensor, nn

from stiefel_lora._batches import to_device
from stiefel_lora._budget import check_least, share_of
from stiefel_lora._losses import LossFn, batch_losses
from stiefel_lora._models import find_linears, is_conv1d, linear_shape, plain_weight, undisturbed, unwrap
from stiefel_lora._precision import LOSS_SCALES, wide_dtype
from stiefel_lora._processes import add_up, failing_together
from stiefel_lora._sketches import GradientSketches
from stiefel_lora._targets import find_targets, module_ranks
from stiefel_lora._types import Normalize, Orthonormal
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.errors import InputError, check_choice, check_count, check_int, listed
from stiefel_lora.factors import CONSTRAINED, adapter_size, leading_singular_vectors
from stiefel_lora.fisher import Scoring, score
from stiefel_lora.layer import Init
from stiefel_lora.stiefel import random_point

_NO_GRADIENT = "the gradients of all linear maps to adapt are zero; are all labels -100?"


def gradient_init(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None,
    rank: int,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    orthonormal: Orthonormal = "A",
    rank_pattern: Mapping[str, int] | None = None,
    layers_path: str | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> dict[str, Init]:
    """Return starts for `add_adapters`: leading singular vectors of the mean gradient of each weight to adapt.

    With A orthonormal the update can first move the weight only within the span of A's columns; these starts are the
    spans that hold most of the gradient. The memory is that of one gradient of the weights to adapt.
    In a torch.distributed job the gradients of all ranks' batches add up, and all get the same starts. A weight that
    several linear maps share has one gradient, the sum over all of them, and they get the same start.

    Args:
        model: The bare base model; it comes back as it was.
        batches: Mappings for ``model(**batch)`` with a ``loss``, or whatever ``loss_fn`` takes. Each batch counts the
            same, so they should be of one size.
        layers: As for `add_adapters`, like the rest.
        rank: As for `add_adapters`.
        target_modules: As for `add_adapters`.
        orthonormal: As for `add_adapters`: right singular vectors for "A", left for "B", pairs for "both".
        rank_pattern: As for `add_adapters`.
        layers_path: As for `add_adapters`.
        loss_fn: As for `fisher_scores`; of one loss a sample the mean is taken.
        seed: Seed of the starts of linears without a gradient; torch's global generators are not touched.

    Returns:
        For each qualified name of a linear to adapt its start, to be given as ``init``.

    Raises:
        InputError: If the model has adapters, there is no batch or loss, a base is quantised, a gradient is not finite,
            all are zero, or for what `add_adapters` raises it.

    Warns:
        UserWarning: If the gradient of a linear to adapt is zero, so that it starts at random.
    """
    model = _bare(model, orthonormal)
    targets = find_targets(model, layers, target_modules, layers_path)
    ranks = module_ranks(model, targets, rank, rank_pattern)
    starts: dict[str, Init | None] = {}
    for name, gradient in _gradients(model, targets, batches, loss_fn):
        right, left, values = leading_singular_vectors(gradient, ranks[name])
        starts[name] = _start(right, left, orthonormal) if values.any() else None
    return _completed(model, starts, ranks, orthonormal, seed)


def allocate_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int,
    budget: float = 0.5,
    max_rank: int | None = None,
    layers: Sequence[int] | None = None,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    orthonormal: Orthonormal = "A",
    layers_path: str | None = None,
    loss_fn: LossFn | None = None,
    oversampling: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, int], dict[str, Init]]:
    """Spread a budget of trainable parameters over the directions in which the loss falls fastest.

    An adapter that starts in the leading r right singular vectors of its weight's gradient, with B = 0, has a gradient
    of squared norm sum_{i <= r} sigma_i^2 (times the scaling squared). So singular values of all linear maps are taken
    in the order of sigma_i^2 / (in + out), each of which is one more rank to its map: the steepest descent that the
    parameters allow, up to what the last directions that do not fit would have added. Where `fisher_select` chooses
    layers or linear maps, this chooses single directions::

        ranks, starts = allocate_ranks(model, batches, rank=16, budget=0.5)
        add_adapters(model, layers=None, target_modules=list(ranks), rank=16, rank_pattern=ranks, init=starts)

    Without ``init`` the factors start at random: at the learning rates of plain LoRA, which the gradient's directions
    do not bear, that trains better with the same ranks (benchmarks/FINDINGS.md).

    With one scaling for all, the default of `add_adapters`, the maps of the highest ranks take the longest steps. With
    ``rslora=True`` and alpha = 2 sqrt(mean rank) all steps are of one length, about the mean of before; that kept runs
    whole which broke or had spikes without, one with beta1 = 0.6 and one of 300 steps.

    (Ranks from spectra: Paischer et al., "One initialization to rule them all", arXiv:2410.07170, from those of the
    inputs.) The memory is that of `gradient_init`, or with ``oversampling`` that of `select_and_start` at the rank
    ``max_rank``, for which quantised bases are possible and each sample counts the same. For SmolLM2-135M, 32 texts and
    ``oversampling=8`` the starts then held 0.999 of the square that exact ones did, and 98 % of the ranks were theirs,
    in a fifth of the memory and 1.5 times the time.

    Args:
        model: The bare base model; it comes back as it was.
        batches: As for `gradient_init`.
        rank: The rank that the budget is counted at.
        budget: Share, a float in (0, 1], of the parameters that adapters of this rank on all the targets have.
        max_rank: Highest rank of one linear map (default: four times ``rank``).
        layers: As for `add_adapters`; None for all.
        target_modules: As for `add_adapters`.
        orthonormal: As for `add_adapters`. With "both" the r x r matrix S counts as well.
        layers_path: As for `add_adapters`.
        loss_fn: As for `gradient_init`.
        oversampling: As for `select_and_start`; None for exact gradients.
        seed: As for `select_and_start`.

    Returns:
        For each linear map that gets any its rank, by qualified name in the model's order, and its start; one without a
        gradient gets none. The budget is not used up where the gradients have no more directions.

    Raises:
        InputError: As `gradient_init`, or if the budget is out of range or too small for one direction.
        TypeError: If a rank is not an int.
    """
    model = _bare(model, orthonormal)
    targets = find_targets(model, layers, target_modules, layers_path)
    shapes = {name: linear_shape(model.get_submodule(name)) for name in targets}
    module_ranks(model, targets, rank)
    most = 4 * rank if max_rank is None else max_rank
    check_count("max_rank", most)
    if not isinstance(budget, float) or not 0 < budget <= 1:
        raise InputError(f"budget must be a share of the adapters' parameters, a float in (0, 1], got {budget!r}")
    total = sum(adapter_size(*shape, rank, orthonormal) for shape in shapes.values())
    parameters = share_of(budget, total)
    least = min(adapter_size(*shape, 1, orthonormal) for shape in shapes.values())
    check_least(budget, parameters, total, least, "direction")
    highest = {name: min(most, *shape) for name, shape in shapes.items()}
    if oversampling is None:
        gradients = _gradients(model, targets, batches, loss_fn)
        found = {name: leading_singular_vectors(gradient, highest[name]) for name, gradient in gradients}
    else:
        sketches = _sketches(highest, shapes, oversampling, seed)
        score(model, batches, Scoring(layers=layers_path, modules=targets, loss_fn=loss_fn, progress=False), sketches)
        leading = {name: sketches.leading(name, r) for name, r in highest.items()}
        found = {name: vectors for name, vectors in leading.items() if vectors is not None}
    spectra = {name: values for name, (_, _, values) in found.items()}
    ranks = _steepest(spectra, shapes, parameters, orthonormal)
    if not ranks:
        if not any(float(values[0]) > 0 for values in spectra.values()):
            raise InputError(_NO_GRADIENT)
        raise InputError(f"no gradient has a direction that takes at most {parameters} parameters, the budget")
    starts: dict[str, Init] = {}
    for name, r in ranks.items():
        right, left, _ = found[name]
        starts[name] = _start(right[:, :r].contiguous(), left[:, :r].contiguous(), orthonormal)
    return ranks, starts


def _steepest(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], parameters: int, orthonormal: Orthonormal
) -> dict[str, int]:
    """Return the ranks above 0 that hold the most of the squared singular values a parameter, filled up greedily."""
    steps = []
    for place, (name, values) in enumerate(spectra.items()):
        # What is rounding alone is no direction, and must not put a later one first.
        rounding = torch.finfo(values.dtype).eps * max(shapes[name]) * float(values[0])
        for r, value in enumerate(values.cummin(0).values.tolist()):
            if value <= rounding:
                break
            cost = adapter_size(*shapes[name], r + 1, orthonormal) - adapter_size(*shapes[name], r, orthonormal)
            steps.append((-(value**2) / cost, place, r, cost, name))
    ranks = dict.fromkeys(spectra, 0)
    for _, _, r, cost, name in sorted(steps):
        # One more rank only on top of those before it.
        if cost <= parameters and ranks[name] == r:
            ranks[name] += 1
            parameters -= cost
    return {name: r for name, r in ranks.items() if r}


def select_and_start(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int,
    budget: float | int = 0.5,
    target_modules: Sequence[str] | Literal["all-linear"] | None = None,
    orthonormal: Orthonormal = "A",
    rank_pattern: Mapping[str, int] | None = None,
    normalize: Normalize = "raw",
    stratified: bool = False,
    layers_path: str | None = None,
    loss_fn: LossFn | None = None,
    max_samples: int | None = None,
    oversampling: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> tuple[list[int], dict[str, Init]]:
    """Choose layers as `fisher_select` does and take their starts as `gradient_init` does, in one pass over the data.

    No gradient of the targets is kept whole. While the samples are scored, those of all layers' targets are summed up
    with the rank k = rank + oversampling, each sample's first; what is cut off makes the starts approximate, unless
    the gradients of all samples together have a rank of at most k. (Halko, Martinsson, Tropp, "Finding structure with
    randomness", 2011; Mroueh, Marcheret, Goel, "Co-occurring directions sketching for approximate matrix multiply",
    2017.) The sums take the memory of adapters of rank k on all layers, and once more for each sample that is evaluated
    together with others; the inputs of the targets are kept as well until their gradients arrive.

    Unlike in `gradient_init`, each sample counts the same, whatever its share of its batch's loss is; samples without
    a finite gradient are left out. Quantised bases are possible.

    Args:
        model: The bare base model; it comes back as it was.
        batches: As for `fisher_scores`.
        rank: As for `add_adapters`.
        budget: As for `fisher_select`: the share or number of layers to choose, of those that hold a target. All their
            linear maps count.
        target_modules: As for `add_adapters`.
        orthonormal: As for `add_adapters`: right singular vectors for "A", left for "B", pairs for "both".
        rank_pattern: As for `add_adapters`.
        normalize: As for `fisher_select`.
        stratified: As for `fisher_select`.
        layers_path: As for `add_adapters`.
        loss_fn: As for `fisher_scores`.
        max_samples: As for `fisher_scores`.
        oversampling: By how much the rank of the sums exceeds that of the adapters; more is more exact.
        seed: Seed of the random starts of these approximations; torch's global generators are not touched.
        progress: As for `fisher_scores`.

    Returns:
        The sorted indices of the layers, to be given to `add_adapters` as ``layers``, and for each qualified name of a
        linear to adapt its start, to be given as ``init`` along with the same rank, targets and the like.

    Raises:
        InputError: If the model has adapters, or for what `fisher_scores` or `add_adapters` raises it.

    Warns:
        UserWarning: If no gradient reached a linear to adapt, which starts at random then, and as `fisher_scores` does.
    """
    model = _bare(model, orthonormal)
    candidates = module_ranks(model, find_targets(model, None, target_modules, layers_path), rank, rank_pattern)
    shapes = {name: linear_shape(model.get_submodule(name)) for name in candidates}
    sketches = _sketches(candidates, shapes, oversampling, seed)
    linears = find_linears(model, layers=layers_path)
    to_adapt = {model.get_submodule(name) for name in candidates}
    # The other layers of a hybrid model cannot be adapted, so they must not be chosen.
    holders = {i: found for i, found in linears.items() if not to_adapt.isdisjoint(found.values())}
    scoring = Scoring(
        layers=layers_path,
        modules=None if len(holders) == len(linears) else [name for found in holders.values() for name in found],
        loss_fn=loss_fn,
        max_samples=max_samples,
        budget=budget,
        normalize=normalize,
        stratified=stratified,
        progress=progress,
    )
    scores = score(model, batches, scoring, sketches)
    layers = scores.select(budget, normalize=normalize, stratified=stratified)
    chosen = {linear for i in layers for linear in holders[i].values()}
    ranks = {name: r for name, r in candidates.items() if model.get_submodule(name) in chosen}
    starts: dict[str, Init | None] = {}
    for name, r in ranks.items():
        vectors = sketches.leading(name, r)
        starts[name] = None if vectors is None else _start(*vectors[:2], orthonormal)
    return layers, _completed(model, starts, ranks, orthonormal, seed)


def _sketches(
    ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], oversampling: int, seed: int
) -> GradientSketches:
    """Return sums of gradients with ``oversampling`` more directions than the ranks that are wanted of them."""
    check_int("oversampling", oversampling)
    if oversampling < 0:
        raise InputError(f"oversampling must not be negative, got {oversampling}")
    return GradientSketches({name: min(r + oversampling, *shapes[name]) for name, r in ranks.items()}, seed)


def _bare(model: nn.Module, orthonormal: str) -> nn.Module:
    """Return the model to take gradients of, or raise InputError if it has adapters or none can be made as asked."""
    model = unwrap(model)
    if adapter_layers(model):
        raise InputError("the model has adapters; take the gradients of the bare base (remove_adapters)")
    check_choice("orthonormal", orthonormal, tuple(CONSTRAINED))
    return model


def _completed(
    model: nn.Module,
    starts: Mapping[str, Init | None],
    ranks: Mapping[str, int],
    orthonormal: Orthonormal,
    seed: int,
) -> dict[str, Init]:
    """Return the starts with random ones in place of None, of which it warns."""
    without = [name for name, start in starts.items() if start is None]
    if len(without) == len(starts):
        raise InputError(_NO_GRADIENT)
    if without:
        warn(f"no gradient reached {listed(without)}, which will start at random", stacklevel=3)
    generator = torch.Generator().manual_seed(seed)

    def at_random(name: str) -> Init:
        shape = linear_shape(model.get_submodule(name))
        right, left = (random_point(n, ranks[name], device="cpu", generator=generator) for n in shape)
        return _start(right, left, orthonormal)

    return {name: at_random(name) if start is None else start for name, start in starts.items()}


def _start(right: Tensor, left: Tensor, orthonormal: Orthonormal) -> Init:
    return (right, left) if orthonormal == "both" else right if orthonormal == "A" else left


def _gradients(
    model: nn.Module, targets: Sequence[str], batches: Iterable[Any], loss_fn: LossFn | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield linear maps and their weights' gradients, (out, in), summed over the batches, one by one.

    They are taken in evaluation mode; the model comes back as it was, before the first is yielded.
    """
    linears = [model.get_submodule(name) for name in targets]
    totals = _total_gradients(model, [plain_weight(linear) for linear in linears], batches, loss_fn)
    for name, linear in zip(targets, linears, strict=True):
        gradient = totals.pop(0)
        yield name, gradient.T if is_conv1d(linear) else gradient


def _total_gradients(
    model: nn.Module, weights: Sequence[nn.Parameter], batches: Iterable[Any], loss_fn: LossFn | None
) -> list[Tensor]:
    """Return the sums of the weights' gradients over the batches of all processes of a distributed job."""
    with failing_together(), undisturbed(model):
        # A weight that several linear maps share has one. In here, where inference_mode is off.
        totals = {weight: torch.zeros_like(weight, dtype=wide_dtype(weight.dtype)) for weight in weights}
        count = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        for batch in batches:
            count += 1
            batch = to_device(batch, weights[0].device)
            missing: Mapping[nn.Parameter, Tensor] = totals
            for scale in LOSS_SCALES:
                with _added_up(missing, scale) as left:
                    loss = batch_losses(model, batch, loss_fn).mean()
                    if not loss.requires_grad:
                        raise InputError("the loss depends on none of the linear maps to adapt")
                    # Not backward(), which would leave gradients in what else a loss depends on.
                    torch.autograd.grad(loss, list(missing), torch.full_like(loss, scale), allow_unused=True)
                missing = left
                if not missing:
                    break
    # A process without batches takes part as well: the others wait for it.
    add_up([count, *totals.values()])
    if not count:
        raise InputError("no batches to take gradients of")
    return [totals[weight] for weight in weights]


@contextmanager
def _added_up(totals: Mapping[nn.Parameter, Tensor], scale: float) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Within the context gradients of the weights, times ``scale``, go into their totals as soon as each is there.

    What autograd keeps in their place has no memory, so no more than one gradient is there besides the totals. Yielded
    are the weights, with their totals, whose gradient was not finite at a scale above 1 and has not been added.
    """
    left: dict[nn.Parameter, Tensor] = {}

    def hook(weight: nn.Parameter, total: Tensor) -> Callable[[Tensor], Tensor]:
        def take(gradient: Tensor) -> Tensor:
            if scale > 1 and not gradient.isfinite().all():
                left[weight] = total
            else:
                total.add_(gradient, alpha=1 / scale)
            return gradient.new_zeros(()).expand_as(gradient)

        return take

    with ExitStack() as stack:
        for weight, total in totals.items():
            weight.requires_grad_(True)
            stack.callback(weight.register_hook(hook(weight, total)).remove)
        yield left
