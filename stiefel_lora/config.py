"""What decides the numbers of a fine-tuning run, and the names of its files."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Literal, TypeAlias, get_args

from stiefel_lora._budget import count_of
from stiefel_lora._types import Orthonormal, Retraction, SecondMoment
from stiefel_lora.errors import InputError, check_choice

# What a run puts into its folder.
RUN_FILE, METRICS_FILE, CHECKPOINT_FILE = "run.json", "metrics.json", "checkpoint.pt"
SCORES_PICTURE, RANKS_PICTURE, LOSS_PICTURE, ADAPTER_FOLDER = "fisher.png", "ranks.png", "loss.png", "adapter"
PICTURES = (SCORES_PICTURE, RANKS_PICTURE, LOSS_PICTURE)
# What an adapter's folder holds.
ADAPTER_FILES = ("adapter.json", "adapter.safetensors")

# Rank by default of adapters that share A. On a LLaMA-like model's seven linear maps these then have about as many
# parameters as adapters of rank 16 on five maps that do not share it.
SHARED_RANK = 20
# Of these numbers: products of two, and a first step of Adam with them, stay finite in float32.
_LARGEST = 1e18

# What is chosen: whole layers, single linear maps, or single directions, which gives each linear map its own rank.
Chosen: TypeAlias = Literal["layer", "module", "direction"]
Optimizer: TypeAlias = Literal["adam", "sgd"]
Start: TypeAlias = Literal["random", "svd", "gradient"]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
# The options that are one word out of several.
CHOICES: dict[str, tuple[str, ...]] = {
    "granularity": get_args(Chosen),
    "optimizer": get_args(Optimizer),
    "second_moment": get_args(SecondMoment),
    "retraction": get_args(Retraction),
    "orthonormal": get_args(Orthonormal),
    "init": get_args(Start),
    "dtype": get_args(Dtype),
}


def option(name: str) -> str:
    """Return how a setting is spelt on the command line, and so in messages: "seq_len" is --seq-len."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class FinetuneConfig:
    """What decides the numbers of a run; two runs with the same configuration are the same run.

    Raises:
        InputError: On construction, for a value that no model or data could make right.

    Attributes:
        model: Folder, .gguf file or hub name; None for the default model.
        data: File or folder; None for the standard library's source.
        rank: Rank of the adapters; None for 20 where they share A, else 16.
        alpha: Numerator of their scaling; None for twice the rank, or with ``rslora`` and granularity "direction" for
            what scales the update of the mean rank by 2.
        budget: Share of the layers to adapt in (0, 1], or their number. With another granularity: share of the
            parameters that adapters on all linear maps would have, spent by score per parameter; with "module" also a
            number, which takes that many linear maps of the highest scores. With 1.0 nothing is scored, but for
            directions.
        granularity: What is chosen: whole layers ("layer"), single linear maps ("module") or single directions of their
            gradients ("direction"; `allocate_ranks`).
        stratified: Choose the layer of the highest score in each of as many runs of neighbouring layers as the budget
            allows, in place of the highest scores of all; None for where whole layers are chosen.
        calibration_samples: Samples that the layers are scored on.
        steps: Optimizer steps.
        batch_size: Samples of a forward pass.
        seq_len: Longest sample in tokens.
        grad_accum: Forward passes of a step.
        lr: Highest learning rate; None for 2e-3, or 5e-4 with a start from the gradient.
        lr_ratio: Learning rate of the orthonormal factors, as a multiple of ``lr``; None for 1, or 4 with a start from
            the gradient.
        warmup: Steps over which the rate rises to it, None for 5, but at most a tenth of all; it falls along a cosine
            afterwards.
        optimizer: "adam" or "sgd".
        momentum: Decay rate of the mean of the gradients: Adam's beta1, or SGD's momentum. None for 0.9, or 0.6 for
            Adam where adapters share A.
        second_moment: Of Adam for the orthonormal factors: "mean", "norm", "row" or "element", see `RiemannianAdam`;
            None for "row", or "mean" with a start from the gradient.
        retraction: "qr", "cayley", "polar" or "exp".
        rslora: Scale the updates by alpha / sqrt(rank) instead of alpha / rank; None for where each linear map has a
            rank of its own (granularity "direction"), but not with a start from the gradient.
        orthonormal: Which factor is orthonormal: "A", "B" or "both".
        init: Start of the orthonormal factors: "random", "svd" (leading directions of the weight) or "gradient" (of the
            gradient on the calibration samples).
        share_A: Let a linear map have one A for all layers, and a B for each; see `add_adapters`. None for where whole
            layers are adapted, A is the orthonormal factor and starts at random.
        target_modules: Names of the linear maps to adapt and score, or "all-linear" alone for all of them; None for all
            of them where they share A, but for those too small for the rank by default, else for the architecture's
            default.
        dropout: Dropout of the adapters' input.
        eval_samples: Held-out samples that are evaluated.
        seed: Seed of the adapters, the order of the data and dropout.
        dtype: "float32", "bfloat16" or "float16" (trained with torch's scaling of the loss); None for the
            device's default.
    """

    model: str | None = None
    data: str | None = None
    rank: int | None = None
    alpha: float | None = None
    budget: float | int = 0.5
    granularity: Chosen = "layer"
    stratified: bool | None = None
    calibration_samples: int = 32
    steps: int = 50
    batch_size: int = 4
    seq_len: int = 128
    grad_accum: int = 1
    lr: float | None = None
    lr_ratio: float | None = None
    warmup: int | None = None
    optimizer: Optimizer = "adam"
    momentum: float | None = None
    second_moment: SecondMoment | None = None
    retraction: Retraction = "qr"
    rslora: bool | None = None
    orthonormal: Orthonormal = "A"
    init: Start = "random"
    share_A: bool | None = None
    target_modules: tuple[str, ...] | None = None
    dropout: float = 0.0
    eval_samples: int = 48
    seed: int = 0
    dtype: Dtype | None = None

    @property
    def targets(self) -> Sequence[str] | Literal["all-linear"] | None:
        """Linear maps to adapt and score, as `add_adapters` takes them."""
        if self.target_modules is None:
            return "all-linear" if self.shares_A else None
        return "all-linear" if self.target_modules == ("all-linear",) else self.target_modules

    @property
    def shares_A(self) -> bool:
        """Whether a linear map has one A for all layers, given or by default."""
        if self.share_A is None:
            return (self.granularity, self.orthonormal, self.init) == ("layer", "A", "random")
        return self.share_A

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapters, given or by default."""
        return self.rank or (SHARED_RANK if self.shares_A else 16)

    @property
    def leaves_out_below(self) -> int:
        """Least dimension of linear maps to adapt; of those that were not named, such as a router of few experts."""
        named = self.target_modules is not None or not self.shares_A
        return 0 if named else min(self.adapter_rank, SHARED_RANK)

    @property
    def decay(self) -> float:
        """Decay rate of the mean of the gradients, given or by default."""
        if self.momentum is None:
            return 0.6 if self.shares_A and self.optimizer == "adam" else 0.9
        return self.momentum

    @property
    def budget_is_parameters(self) -> bool:
        """Whether the budget is a share of parameters, not of what is scored, nor a number of it."""
        return self.granularity != "layer" and isinstance(self.budget, float)

    @property
    def from_each_depth(self) -> bool:
        """Whether layers are chosen from each depth, given or by default."""
        return self.granularity == "layer" if self.stratified is None else self.stratified

    @property
    def adapts_all(self) -> bool:
        """Whether the budget is all there is, so that nothing has to be scored."""
        return self.granularity != "direction" and isinstance(self.budget, float) and self.budget == 1

    @property
    def by_root(self) -> bool:
        """Whether updates are scaled by alpha / sqrt(rank), given or by default."""
        # Else the maps of the highest ranks take the longest steps, which can break a run.
        return (self.granularity == "direction" and self.init != "gradient") if self.rslora is None else self.rslora

    def numerator(self, ranks: Iterable[int]) -> float | None:
        """Return the numerator of the scaling, given or by default, of maps of these ranks; None for twice the rank."""
        if self.alpha is None and self.granularity == "direction" and self.by_root:
            return 2 * math.sqrt(fmean(ranks))
        return self.alpha

    @property
    def highest_lr(self) -> float:
        """Highest learning rate, given or by default."""
        return self.lr or (5e-4 if self.init == "gradient" else 2e-3)

    @property
    def ratio(self) -> float:
        """Learning rate of the orthonormal factors as a multiple of the others', given or by default."""
        return self.lr_ratio or (4.0 if self.init == "gradient" else 1.0)

    @property
    def moment(self) -> SecondMoment:
        """Second moment of Adam for the orthonormal factors, given or by default."""
        return self.second_moment or ("mean" if self.init == "gradient" else "row")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up, given or by default."""
        return min(5, self.steps // 10) if self.warmup is None else self.warmup

    def resolved(self) -> "FinetuneConfig":
        """Return the configuration with those defaults filled in that depend on other options."""
        moment = self.moment if self.optimizer == "adam" else None
        return replace(
            self,
            lr=self.highest_lr,
            lr_ratio=self.ratio,
            warmup=self.warmup_steps,
            second_moment=moment,
            rslora=self.by_root,
            stratified=self.from_each_depth,
            share_A=self.shares_A,
            rank=self.adapter_rank,
            momentum=self.decay,
        )

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            raise InputError(
                f"{option('target_modules')} must be a list of names, got the string {self.target_modules!r}"
            )
        # JSON and the command line have lists.
        object.__setattr__(self, "target_modules", tuple(self.target_modules) if self.target_modules else None)
        for name in ("calibration_samples", "steps", "batch_size", "grad_accum", "eval_samples"):
            check_positive(name, getattr(self, name))
        if self.seq_len < 2:
            raise InputError(f"{option('seq_len')} must be at least 2 tokens, got {self.seq_len}")
        check_seed(self.seed)
        optional = {field.name for field in fields(self) if field.default is None}
        given = {name: value for name, value in vars(self).items() if value is not None or name not in optional}
        for name, value in given.items():
            if name in ("lr", "lr_ratio", "alpha") and not 0 < value <= _LARGEST:
                raise InputError(f"{option(name)} must be positive and at most {_LARGEST:g}, got {value}")
            if name == "rank":
                check_positive(name, value)
            if name in ("dropout", "momentum") and not 0 <= value < 1:
                raise InputError(f"{option(name)} must be in [0, 1), got {value}")
            if name in CHOICES:
                check_choice(option(name), value, CHOICES[name])
        if self.optimizer == "sgd" and self.second_moment is not None:
            raise InputError(f"--second-moment is an option of --optimizer adam, got {self.second_moment!r} with sgd")
        if not 0 <= self.warmup_steps <= self.steps:
            raise InputError(f"--warmup must be in [0, {self.steps}], the number of steps, got {self.warmup}")
        if self.granularity == "direction" and not isinstance(self.budget, float):
            raise InputError(f"--budget must be a share of the adapters' parameters such as 0.5, got {self.budget}")
        if self.stratified and self.granularity != "layer":
            raise InputError(f"--stratified chooses whole layers, --granularity layer, got {self.granularity!r}")
        self._check_sharing()
        if isinstance(self.budget, float):
            count_of(self.budget, 1, "the adapters' parameters" if self.budget_is_parameters else "the layers")

    def _check_sharing(self) -> None:
        """Raise InputError if one A is to be shared that cannot be: of several ranks or starts, or not orthonormal."""
        for name, wanted in (("granularity", ("layer", "module")), ("orthonormal", ("A",)), ("init", ("random",))):
            value = getattr(self, name)
            if self.share_A and value not in wanted:
                raise InputError(f"--share-A needs {option(name)} {' or '.join(wanted)}, got {value!r}")


def check_positive(name: str, value: int) -> None:
    """Raise InputError unless a setting that counts something is at least 1."""
    if value < 1:
        raise InputError(f"{option(name)} must be at least 1, got {value}")


def check_seed(seed: int) -> None:
    """Raise InputError unless all that draws random numbers takes the seed."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be in [0, 2^63), got {seed}")
