"""The ways to fine-tune that are compared: ours, PEFT's, and full fine-tuning, each behind one function."""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from geoopt import ManifoldParameter
from torch import Tensor, nn

from benchmarks._peers import NotInstalledError
from stiefel_lora import add_adapters, allocate_ranks, gradient_init, stiefel
from stiefel_lora._types import SecondMoment
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.factors import folded
from stiefel_lora.optim import RiemannianAdam
from stiefel_lora.scores import highest

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = (*TARGETS, "o_proj", "gate_proj")


# Samples that layers are scored on and gradients taken of, and those of the paper.
SAMPLES, SAMPLES_OF_THE_PAPER = 32, 128


@dataclass(frozen=True)
class Setting:
    """What a method may know when it is put into a model.

    Attributes:
        rank: Rank of the adapters; their scaling is 2, or with rsLoRA's 2 sqrt(rank).
        selected: The half of the layers with the highest Fisher scores.
        scores: The scores of all decoder layers.
        modules: Linear maps chosen one by one by Fisher score per parameter, at the parameters of ``selected``.
        calibration: Batches of `SAMPLES_OF_THE_PAPER` training samples, the first of which were scored.
        seed: Seed of what is random.
        steps: Length of the training.
        lr: Learning rate.
    """

    rank: int
    selected: tuple[int, ...]
    scores: tuple[float, ...]
    modules: tuple[str, ...]
    calibration: tuple[Mapping[str, Tensor], ...]
    seed: int
    steps: int
    lr: float

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.scores)

    def calibrate(self, samples: int) -> Sequence[Mapping[str, Tensor]]:
        """Return the batches of the first so many calibration samples."""
        return self.calibration[: samples // len(self.calibration[0]["input_ids"])]


@dataclass
class Tuned:
    """A model made ready for training.

    Attributes:
        model: To be called with a batch that has labels; its loss is what is minimised.
        optimizer: Holds all trainable parameters.
        updates: Returns pairs of factors (out, r), (r, in) whose product is the update of one weight.
        after_step: Called with the number of the step after the optimizer's step, while the gradients are still there.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    updates: Callable[[], Iterable[tuple[Tensor, Tensor]]] = lambda: ()
    after_step: Callable[[int], None] = lambda step: None
    extra: dict[str, Any] = field(default_factory=dict)


Build = Callable[[Any, Setting], Tuned]


def random_half(setting: Setting) -> list[int]:
    """Draw as many layers as were selected."""
    drawn = random.Random(f"layers {setting.seed}").sample(range(setting.depth), len(setting.selected))  # noqa: S311
    return sorted(drawn)


def _selected(setting: Setting) -> list[int]:
    return list(setting.selected)


def _stratified(setting: Setting) -> list[int]:
    """Choose as many layers, the highest score of each two neighbours."""
    return highest(setting.scores, len(setting.selected), stratified=True)


def _all(setting: Setting) -> list[int]:
    return list(range(setting.depth))


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(
    layers: Callable[[Setting], Sequence[int]] | None = None,
    *,
    share: float = 1.0,
    targets: Sequence[str] = TARGETS,
    gradient_start: bool = False,
    allocate: bool = False,
    rate_on_manifold: float = 1.0,
    second_moment: SecondMoment = "mean",
    beta1: float = 0.9,
    constrained: bool = True,
    samples: int = SAMPLES,
    **options: Any,
) -> Build:
    """Put our adapters at ``share`` of the rank on some layers, or on the linear maps chosen one by one.

    With ``gradient_start`` the orthonormal factor starts in the leading directions of the calibration gradient, and
    with ``allocate`` the ranks follow its singular values, at ``share`` of the parameters; the gradient is that of
    ``samples``. The factor's learning rate is ``rate_on_manifold`` times that of the other one; ``beta1`` is the decay
    rate of both first moments; ``options`` go to ``add_adapters``. Not ``constrained``, the factor starts orthonormal
    and is trained by AdamW as any other.
    """

    def build(model: Any, setting: Setting) -> Tuned:
        begin = time.perf_counter()
        if allocate:
            where = _allocated(model, setting, share, samples, targets, gradient_start=gradient_start)
        else:
            chosen = None if layers is None else layers(setting)
            where = {"layers": chosen, "target_modules": setting.modules if chosen is None else targets}
            where["rank"] = round(share * setting.rank)
            where = _started(model, setting, where, samples, gradient_start=gradient_start)
        names = add_adapters(model, **where, **options)
        extra = {"layers": where["layers"], "modules": len(names), "start_s": time.perf_counter() - begin}
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if isinstance(p, ManifoldParameter)], "lr": rate_on_manifold * setting.lr},
            {"params": [p for p in trainable if not isinstance(p, ManifoldParameter)]},
        ]
        alike: dict[str, Any] = {"lr": setting.lr, "betas": (beta1, 0.999), "fused": True}
        optimizer: torch.optim.Optimizer
        if constrained:
            optimizer = RiemannianAdam(groups, second_moment=second_moment, **alike)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0, **alike)
        return Tuned(model, optimizer, lambda: _our_updates(model), extra=extra)

    return build


def _allocated(
    model: Any, setting: Setting, share: float, samples: int, targets: Sequence[str], *, gradient_start: bool
) -> dict[str, Any]:
    """Return which linear maps get which ranks at a share of the parameters, and their starts if asked for."""
    rank = setting.rank
    batches = setting.calibrate(samples)
    ranks, starts = allocate_ranks(model, batches, rank=rank, budget=share, target_modules=list(targets))
    where = {"layers": None, "target_modules": list(ranks), "rank": rank, "rank_pattern": ranks}
    return {**where, "init": starts} if gradient_start else where


def _started(
    model: Any, setting: Setting, where: dict[str, Any], samples: int, *, gradient_start: bool
) -> dict[str, Any]:
    """Return where the adapters are, with the starts that the gradient gives them if asked for."""
    return {**where, "init": gradient_init(model, setting.calibrate(samples), **where)} if gradient_start else where


def _our_updates(model: Any) -> Iterable[tuple[Tensor, Tensor]]:
    for layer in adapter_layers(model).values():
        a, b = folded({key: f.detach().as_subclass(Tensor) for key, f in layer.factors().items()})
        yield b, a.mT


# -- PEFT's ------------------------------------------------------------------------------------------------------------


def lora(
    layers: Callable[[Setting], Sequence[int]] = _all,
    *,
    share: float = 1.0,
    targets: Sequence[str] = TARGETS,
    gradient_start: bool = False,
    allocate: bool = False,
    beta1: float = 0.9,
    rate_of_A: float = 1.0,
    samples: int = SAMPLES,
    **more: Any,
) -> Build:
    """PEFT's LoRA at ``share`` of the rank; ``more`` goes to its configuration.

    With ``gradient_start`` its A starts where ours does, in the leading directions of the gradient of calibration
    ``samples``; with ``allocate`` its ranks are those of ours. ``beta1`` is AdamW's; the learning rate of A is
    ``rate_of_A`` times that of B.
    """

    def build(model: Any, setting: Setting) -> Tuned:
        peft = _peft()
        rank, chosen = round(share * setting.rank), list(layers(setting))
        begin = time.perf_counter()
        if allocate:
            where = _allocated(model, setting, share, samples, targets, gradient_start=gradient_start)
        else:
            alike: dict[str, Any] = {"layers": chosen, "rank": rank, "target_modules": list(targets)}
            where = _started(model, setting, alike, samples, gradient_start=gradient_start)
        starts, ranks = where.get("init", {}), where.get("rank_pattern", {})
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=where["target_modules"],
            layers_to_transform=where["layers"],
            rank_pattern=ranks,
            alpha_pattern={name: 2 * r for name, r in ranks.items()},
            **more,
        )
        adapted = peft.get_peft_model(model, config)
        for name, start in starts.items():
            adapted.get_base_model().get_submodule(name).lora_A["default"].weight.data.copy_(start.T)
        extra = {"layers": chosen, "start_s": time.perf_counter() - begin}
        return _with_adamw(adapted, setting, extra, beta1, rate_of_A)

    return build


def adalora(model: Any, setting: Setting) -> Tuned:
    """PEFT's AdaLoRA with its own schedule, at an average rank that makes four times the parameters of half the layers.

    Its budget starts at 1.5 times that and reaches it after the first tenth and before the last half of the steps.
    """
    peft = _peft()
    target = 2 * setting.rank
    config = peft.AdaLoraConfig(
        init_r=3 * target // 2,
        target_r=target,
        lora_alpha=2 * target,
        target_modules=list(TARGETS),
        total_step=setting.steps,
        tinit=setting.steps // 10,
        tfinal=setting.steps // 2,
        deltaT=1,
    )
    tuned = _with_adamw(peft.get_peft_model(model, config), setting, {"layers": _all(setting)})
    tuned.after_step = lambda step: tuned.model.base_model.update_and_allocate(step)  # type: ignore[operator, union-attr]
    return tuned


def full(model: Any, setting: Setting) -> Tuned:
    """Train the very weights that FoRA would adapt: a ceiling, not a competitor."""
    model.requires_grad_(False)
    for layer in setting.selected:
        for name, module in model.get_submodule(f"model.layers.{layer}").named_modules():
            if name.split(".")[-1] in TARGETS:
                module.weight.requires_grad_(True)
    return _with_adamw(model, setting, {"layers": _selected(setting)})


def _with_adamw(
    model: Any,
    setting: Setting,
    extra: dict[str, Any],
    beta1: float = 0.9,
    rate_of_A: float = 1.0,
) -> Tuned:
    groups: dict[float, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(setting.lr * (rate_of_A if "lora_A" in name else 1.0), []).append(p)
    by_rate = [{"params": params, "lr": lr} for lr, params in groups.items()]
    optimizer = torch.optim.AdamW(by_rate, lr=setting.lr, betas=(beta1, 0.999), weight_decay=0.0, fused=True)

    def updates() -> Iterable[tuple[Tensor, Tensor]]:
        for module in model.modules():
            factors = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
            if not all(isinstance(f, nn.ModuleDict | nn.ParameterDict) and "default" in f for f in factors):
                continue
            a, b = (f["default"] for f in factors)  # type: ignore[index]
            if isinstance(a, nn.Linear):
                yield b.weight.detach(), a.weight.detach()
            else:
                # AdaLoRA: P diag(E) Q, with zeros in E for what was pruned.
                yield b.detach() * module.lora_E["default"].detach().mT, a.detach()

    return Tuned(model, optimizer, updates, extra=extra)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise NotInstalledError("peft is not installed: pip install 'stiefel-lora[bench]'") from error
    return peft


FORA = "FoRA (A)"
STARTED = "FoRA (A), gradient start"
ALLOCATED = "FoRA (A), ranks by gradient"
FASTER = "FoRA (A), ranks by gradient, A at 4 times the rate"
CALIBRATED = "FoRA (A), ranks by gradient of 128 samples, A at 4 times the rate"
BY_ELEMENT = "Stiefel A, half the rank, second moment of each element"
BY_ROW = "Stiefel A, half the rank, second moment of each row"
ALL_BY_ROW = "Stiefel A, all layers, second moment of each row"
RANKS_BY_ROW = "FoRA (A), ranks by gradient of 128 samples, random start, each row"
RANKS_BY_ROW_FASTER = f"{RANKS_BY_ROW}, A at 4 times the rate"
LORA_RANKS = "LoRA, ranks by gradient of 128 samples, random start"
# With a shorter memory of the gradients than by Adam's default, 0.9.
LORA_SHORT, DORA_SHORT, ALL_SHORT, RANKS_SHORT = (
    f"{name}, beta1 0.6" for name in ("LoRA", "DoRA", ALL_BY_ROW, RANKS_BY_ROW)
)
RANKS_SCALED, RANKS_SHORT_SCALED = (f"{name}, scaled by 6 / sqrt(rank)" for name in (RANKS_BY_ROW, RANKS_SHORT))
SHARED = "Stiefel A, one A for all layers, 9/8 of the rank, second moment of each row"
SHARED_LINEAR = "Stiefel A, one A for all layers, all linear maps at 5/8 of the rank, second moment of each row"
LORA_LINEAR = "LoRA, all linear maps at 11/16 of the rank"
SHARED_SHORT, SHARED_LINEAR_SHORT, LORA_LINEAR_SHORT = (
    f"{name}, beta1 0.6" for name in (SHARED, SHARED_LINEAR, LORA_LINEAR)
)
LORA_SHARED_LINEAR_SHORT = "LoRA, one A for all layers, all linear maps at 5/8 of the rank, beta1 0.6"
LORA_SHORT_FASTER, SHARED_LINEAR_TWICE, LORA_SHARED_LINEAR_TWICE = (
    f"{name}, A at twice the rate" for name in (LORA_SHORT, SHARED_LINEAR_SHORT, LORA_SHARED_LINEAR_SHORT)
)
SHARED_LINEAR_FASTER, LORA_SHARED_LINEAR_FASTER = (
    f"{name}, A at 4 times the rate" for name in (SHARED_LINEAR_SHORT, LORA_SHARED_LINEAR_SHORT)
)
FORA_BY_ROW = "FoRA (A), second moment of each row"
RANDOM_BY_ROW = "Stiefel A, random half, second moment of each row"
# The highest scores of each two neighbouring layers, in place of the highest of all.
STRATIFIED_BY_ROW = "FoRA (A), layers of each depth, second moment of each row"
# At as many parameters as SHARED_LINEAR to 3 %.
HALF_SHARED = "one A, all linear maps at 5/4 of the rank, second moment of each row, beta1 0.6"
STRATIFIED_SHARED, FORA_SHARED = f"FoRA (A), layers of each depth, {HALF_SHARED}", f"FoRA (A), {HALF_SHARED}"
RANDOM_SHARED = f"Stiefel A, random half, {HALF_SHARED}"
_half_shared = partial(ours, share_A=True, second_moment="row", share=5 / 4, targets=ALL_LINEAR, beta1=0.6)
_shared = partial(ours, _all, share_A=True, second_moment="row")
_shared_linear_short = partial(_shared, share=5 / 8, targets=ALL_LINEAR, beta1=0.6)
_ranks_by_row = partial(ours, allocate=True, share=0.5, second_moment="row", samples=SAMPLES_OF_THE_PAPER)
METHODS: dict[str, Build] = {
    "LoRA": lora(),
    FORA: ours(_selected),
    "LoRA, half the rank": lora(share=0.5),
    "LoRA, half the rank, gradient start": lora(share=0.5, gradient_start=True),
    "Stiefel A, all layers": ours(_all),
    "LoRA, Fisher half": lora(_selected),
    "DoRA": lora(use_dora=True),
    STARTED: ours(_selected, gradient_start=True),
    "FoRA (A), gradient start, A at twice the rate": ours(_selected, gradient_start=True, rate_on_manifold=2.0),
    "FoRA (A), second moment of each element": ours(_selected, second_moment="element"),
    BY_ELEMENT: ours(_all, share=0.5, second_moment="element"),
    "FoRA (A), modules, second moment of each element": ours(second_moment="element"),
    FORA_BY_ROW: ours(_selected, second_moment="row"),
    "FoRA (A), modules, second moment of each row": ours(second_moment="row"),
    BY_ROW: ours(_all, share=0.5, second_moment="row"),
    ALL_BY_ROW: ours(_all, second_moment="row"),
    "Stiefel A, half the rank, A at rest": ours(_all, share=0.5, rate_on_manifold=0.0),
    "Stiefel A, half the rank, gradient start": ours(_all, share=0.5, gradient_start=True),
    ALLOCATED: ours(allocate=True, share=0.5, gradient_start=True),
    FASTER: ours(allocate=True, share=0.5, gradient_start=True, rate_on_manifold=4.0),
    CALIBRATED: ours(allocate=True, share=0.5, gradient_start=True, rate_on_manifold=4.0, samples=SAMPLES_OF_THE_PAPER),
    RANKS_BY_ROW: _ranks_by_row(),
    RANKS_BY_ROW_FASTER: _ranks_by_row(rate_on_manifold=4.0),
    "LoRA, ranks by gradient": lora(allocate=True, share=0.5, gradient_start=True),
    "LoRA, ranks by gradient of 128 samples": lora(
        allocate=True, share=0.5, gradient_start=True, samples=SAMPLES_OF_THE_PAPER
    ),
    RANKS_SHORT: _ranks_by_row(beta1=0.6),
    # The scaling is 2 at rank 9; the mean rank is 8.
    RANKS_SCALED: _ranks_by_row(rslora=True, alpha=6.0),
    RANKS_SHORT_SCALED: _ranks_by_row(beta1=0.6, rslora=True, alpha=6.0),
    LORA_SHORT: lora(beta1=0.6),
    LORA_SHORT_FASTER: lora(beta1=0.6, rate_of_A=2.0),
    DORA_SHORT: lora(use_dora=True, beta1=0.6),
    ALL_SHORT: ours(_all, second_moment="row", beta1=0.6),
    # As many parameters as half the rank on all layers to 4 %.
    SHARED: _shared(share=9 / 8),
    SHARED_SHORT: _shared(share=9 / 8, beta1=0.6),
    SHARED_LINEAR: _shared(share=5 / 8, targets=ALL_LINEAR),
    SHARED_LINEAR_SHORT: _shared_linear_short(),
    SHARED_LINEAR_TWICE: _shared_linear_short(rate_on_manifold=2.0),
    SHARED_LINEAR_FASTER: _shared_linear_short(rate_on_manifold=4.0),
    # The same but for the constraint.
    LORA_SHARED_LINEAR_SHORT: _shared_linear_short(constrained=False),
    LORA_SHARED_LINEAR_TWICE: _shared_linear_short(constrained=False, rate_on_manifold=2.0),
    LORA_SHARED_LINEAR_FASTER: _shared_linear_short(constrained=False, rate_on_manifold=4.0),
    STRATIFIED_BY_ROW: ours(_stratified, second_moment="row"),
    STRATIFIED_SHARED: _half_shared(_stratified),
    FORA_SHARED: _half_shared(_selected),
    RANDOM_SHARED: _half_shared(random_half),
    LORA_RANKS: lora(allocate=True, share=0.5, samples=SAMPLES_OF_THE_PAPER),
    "Stiefel A, all layers, gradient start": ours(_all, gradient_start=True),
    "Stiefel A, half the rank, rsLoRA's scaling": ours(_all, share=0.5, rslora=True),
    "Stiefel A, half the rank, gradient start, rsLoRA's scaling": ours(
        _all, share=0.5, gradient_start=True, rslora=True
    ),
    "FoRA (both)": ours(_selected, orthonormal="both"),
    "FoRA (B)": ours(_selected, orthonormal="B"),
    "FoRA (A), modules": ours(),
    "FoRA (A), modules, gradient start": ours(gradient_start=True),
    "FoRA (A), modules, rsLoRA's scaling": ours(rslora=True),
    "FoRA (A), modules, gradient start, rsLoRA's scaling": ours(gradient_start=True, rslora=True),
    "Stiefel A, random half": ours(random_half),
    RANDOM_BY_ROW: ours(random_half, second_moment="row"),
    "LoRA, random half": lora(random_half),
    "rsLoRA": lora(use_rslora=True),
    "rsLoRA, half the rank": lora(share=0.5, use_rslora=True),
    "LoRA, MLP only": lora(targets=MLP),
    # As many parameters as the first row to 1 %.
    LORA_LINEAR: lora(share=11 / 16, targets=ALL_LINEAR),
    LORA_LINEAR_SHORT: lora(share=11 / 16, targets=ALL_LINEAR, beta1=0.6),
    "AdaLoRA": adalora,
    "full fine-tuning, Fisher half": full,
}

# Rows that get all seeds; the others show a tendency.
MAIN = ("LoRA", FORA, STARTED, "FoRA (A), modules", "LoRA, half the rank", "DoRA", "AdaLoRA", "LoRA, Fisher half",
        "Stiefel A, random half", "LoRA, random half", "Stiefel A, all layers", "FoRA (A), modules, gradient start",
        "Stiefel A, half the rank, gradient start", "LoRA, half the rank, gradient start",
        "Stiefel A, all layers, gradient start", "rsLoRA", "Stiefel A, half the rank, rsLoRA's scaling",
        "rsLoRA, half the rank", ALLOCATED, "LoRA, ranks by gradient", FASTER, CALIBRATED, BY_ELEMENT, BY_ROW,
        FORA_BY_ROW, ALL_BY_ROW, RANKS_BY_ROW, LORA_RANKS, RANKS_SHORT, LORA_SHORT, DORA_SHORT, ALL_SHORT,
        RANKS_SCALED, RANKS_SHORT_SCALED, SHARED_SHORT, SHARED_LINEAR_SHORT, SHARED_LINEAR_TWICE,
        SHARED_LINEAR_FASTER, STRATIFIED_BY_ROW, STRATIFIED_SHARED)  # fmt: skip
# Rows that Fisher scores choose the places of.
SELECTED = frozenset(
    name for name in METHODS if ("FoRA" in name or "Fisher" in name) and "ranks by gradient" not in name
)


def effective_rank_share(updates: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Return the mean over updates of effective rank / rank, from the R factors of both sides alone."""
    shares = []
    for left, right in updates:
        # Singular values of left @ right are those of the product of the triangular factors.
        core = torch.linalg.qr(left.double(), mode="r").R @ torch.linalg.qr(right.double().mT, mode="r").R.mT
        rank = int((left.abs().sum(0) > 0).sum())
        if rank:
            shares.append(float(stiefel.effective_rank(core)) / rank)
    return sum(shares) / len(shares) if shares else None
