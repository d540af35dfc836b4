"""A linear layer with a low-rank update whose factors may be constrained to the Stiefel manifold."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast
from warnings import warn

import geoopt
import torch
from torch import Tensor, nn
from torch.__future__ import (
    get_overwrite_module_params_on_conversion,
    get_swap_module_params_on_conversion,
    set_overwrite_module_params_on_conversion,
    set_swap_module_params_on_conversion,
)
from torch.nn.functional import linear
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from stiefel_lora._models import first_tensor, is_conv1d, is_linear, linear_shape, plain_weight
from stiefel_lora._precision import exact_products, under_autocast, wide_dtype
from stiefel_lora._sources import takes_one_argument
from stiefel_lora._types import Orthonormal
from stiefel_lora.errors import InputError, ManifoldError, check_choice, check_int
from stiefel_lora.factors import (
    CONSTRAINED,
    factor_shapes,
    folded,
    leading_singular_vectors,
    manifold_error,
    orthonormal_factors,
    rounding_error,
    scaling,
)
from stiefel_lora.stiefel import orthogonality_error, project_point, random_point

Init: TypeAlias = Literal["random", "svd"] | Tensor | tuple[Tensor, Tensor]

# A user's orthonormal factor may come from a bf16 file: eps is 4e-3, and the error of X^T X adds up over r columns.
_INIT_TOLERANCE = 0.05
# float32 training keeps |X^T X - I|_F at about 1e-6; a factor that was rounded to bf16 on the way has 1e-2 or more.
OFF_MANIFOLD = 1e-3
# Stands in a base while an adapter is merged into it; several may share one.
_MERGED = "_stiefel_merged"


class StiefelLoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank update: ``y = base(x) + scaling * (x @ A) @ B^T``.

    One factor has orthonormal columns and is a ``geoopt.ManifoldParameter`` on ``geoopt.EuclideanStiefel``; the factor
    that is free starts at zero, so the layer starts as its base, exactly. The factors are kept in float32 (float64 over
    a float64 base): what is narrower, as after ``half()``, is the base's dtype, not the factors'. Outside autocast
    the update is computed in the factors' dtype, under autocast in autocast's; the output has the base output's dtype.

    Args:
        base: ``nn.Linear``, transformers' ``Conv1D``, or a quantised linear: any leaf module with ``in_features`` and
            ``out_features``. It is kept as the child ``base``, and its parameters are frozen.
        rank: Width r of the factors, in [1, min(in_features, out_features)].
        alpha: Numerator of the scaling, finite and positive (default: 2 * rank).
        dropout: Probability in [0, 1) of dropping an entry of the update's input while training.
        rslora: Scale by alpha / sqrt(rank) instead of alpha / rank.
        orthonormal: Which factor is orthonormal. "A" (in_features, rank), "B" (out_features, rank), or "both", where
            the update is ``scaling * B @ S @ A^T`` with a free (rank, rank) matrix ``lora_S`` that starts at zero.
        init: The orthonormal factor at the start. "random": uniform on the manifold. "svd": leading singular vectors of
            the base weight. Or a tensor of the factor's shape, within 0.05 of orthonormal in the Frobenius norm; a pair
            (A, B) of them for "both".
        generator: CPU source of randomness for "random"; the draw does not depend on the base's device.

    Raises:
        InputError: If a value is outside its range, or an initial factor has another shape or is not orthonormal.
        TypeError: If ``base`` is not a linear layer, or its ``forward`` needs more than the input, or ``rank`` is not
            an int.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_S: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        orthonormal: Orthonormal = "A",
        init: Init = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = _checked_shape(base)
        check_options(self.in_features, self.out_features, rank, alpha, dropout, orthonormal)
        self.rank = rank
        self.alpha = float(2 * rank if alpha is None else alpha)
        self.rslora = bool(rslora)
        self.scaling = scaling(rank, self.alpha, rslora)
        self.orthonormal: Orthonormal = orthonormal
        self.enabled = True
        self.shares_A_of: str | None = None  # a name for all adapters that have one A
        self.is_known = False  # to a model, which has put it in and keeps a record of its adapters
        # Holds the base's own weight while another, merged one is in its place. A tuple hides it from nn.Module, which
        # would list it in parameters() and state_dict().
        self._base_weight: tuple[nn.Parameter, ...] = ()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self._create_factors(_initial_factors(self, init, generator))
        # Not of the layer itself, on which torch.compile would compile the hook alone. The handle goes with a pickled
        # layer, so that no later hook takes this one's number.
        self._hook = self.dropout.register_forward_hook(_keep_called)
        self.train(base.training)

    def _create_factors(self, points: dict[str, Tensor]) -> None:
        example = _example(self.base)
        dtype = wide_dtype(example.dtype)
        for name, shape in factor_shapes(self.in_features, self.out_features, self.rank, self.orthonormal).items():
            if name in points:
                factor = _manifold_parameter(points[name].to(device=example.device, dtype=dtype))
            else:
                factor = nn.Parameter(torch.zeros(shape, dtype=dtype, device=example.device))
            self.register_parameter(name, factor)

    @property
    def merged(self) -> bool:
        """Whether the update is in the base weight at present."""
        return len(self._base_weight) > 0

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight parameter, also while a merged one is in its place."""
        return self._base_weight[0] if self.merged else self.weight

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at a linear's weight, its dtype or its device."""
        return cast(Tensor, self.base.weight)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What transformers may save under one of its names."""
        return {} if self.shares_A_of is None else {"lora_A": "lora_A"}

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return cast("Tensor | None", self.base.bias)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that make another layer of the same form over the same base."""
        dropout = self.dropout.p if isinstance(self.dropout, nn.Dropout) else 0.0
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": dropout,
            "rslora": self.rslora,
            "orthonormal": self.orthonormal,
        }

    def factors(self) -> dict[str, Tensor]:
        """Return all factors by name: lora_A, lora_B, and lora_S if both are orthonormal."""
        return {name: factor for name, factor in self._parameters.items() if factor is not None}

    def manifold_parameters(self) -> dict[str, Tensor]:
        """Return the factors that are constrained to have orthonormal columns, by name."""
        return {name: getattr(self, name) for name in CONSTRAINED[self.orthonormal]}

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``input`` of shape (..., in_features); the result is (..., out_features)."""
        out = self.base(input)
        if self.merged or not self.enabled:
            return out
        self._check_base()
        if self.training and torch.is_grad_enabled():
            self._check_backward(input, out)
            self._check_manifold()
        return out + self._update(input).to(out.dtype)

    def _update(self, x: Tensor) -> Tensor:
        if not under_autocast(x.device.type):
            x = x.to(self.lora_A.dtype)
        # Not "@", which takes no nested tensor.
        hidden = linear(self.dropout(x), self.lora_A.T)
        if self.orthonormal == "both":
            hidden = linear(hidden, self.lora_S)
        return linear(hidden * self.scaling, self.lora_B)

    def delta_weight(self) -> Tensor:
        """Return the update of the weight, ``scaling * B @ A^T``, shape (out_features, in_features).

        It is differentiable, in the factors' dtype and precision, and (out, in) for a ``Conv1D`` base as well.
        """
        with exact_products([self.lora_A.device.type]):
            a, b = folded(self.factors())
            return (self.scaling * b) @ a.T

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def merge(self) -> float:
        """Put the update into the base weight, so that the forward pass is the base's alone.

        The sum is taken in the factors' dtype and rounded once to the weight's. The base gets a new weight parameter
        and the original one is kept, at the cost of its memory, so `unmerge` is exact. A state dict taken meanwhile has
        the original weight. Does nothing if merged already.

        Returns:
            The rounding error, |merged - (W + update)|_F / |update|_F: what part of the update is lost. 0 if the update
            is zero or was merged already.

        Raises:
            InputError: If the base is quantised, the layer is disabled, or the merged weight has a NaN or infinity;
                nothing is changed then.
        """
        if self.merged:
            return 0.0
        if not self.enabled:
            raise InputError("the adapter is disabled, so the layer must stay its base; merge outside disable_adapters")
        self._check_base()
        original = plain_weight(self.base)
        update = self.delta_weight()
        if is_conv1d(self.base):
            update = update.T
        exact = original.to(update.dtype) + update
        merged = exact.to(original.dtype)
        if not merged.isfinite().all():
            raise InputError(f"the merged weight of shape {tuple(merged.shape)} overflows {original.dtype}; not merged")
        self._base_weight = (original,)
        self.base.weight = nn.Parameter(merged, requires_grad=False)
        vars(self.base)[_MERGED] = True
        size = torch.linalg.norm(update)
        return float(torch.linalg.norm(merged.to(exact.dtype) - exact) / size) if size > 0 else 0.0

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight parameter back into the base, bit for bit. Does nothing if not merged.

        Raises:
            InputError: If the merged weight has been parametrized or pruned.
        """
        if not self.merged:
            return
        if "weight" not in self.base._parameters:
            raise InputError(
                f"the weight of the {type(self.base).__name__} was parametrized or pruned while the adapter was merged "
                "into it; undo that first, as with torch.nn.utils.parametrize.remove_parametrizations"
            )
        self.base.weight = self._own_weight()
        self.release()

    def release(self) -> nn.Module:
        """Return the base, and let go of its own weight if it is merged: the sum is the base's weight then."""
        self._base_weight = ()
        vars(self.base).pop(_MERGED, None)
        return self.base

    def _check_base(self) -> None:
        if _MERGED in vars(self.base):
            raise InputError("another adapter over the same linear is merged into it; unmerge that one first")

    def _check_backward(self, input: Tensor, out: Tensor) -> None:
        if input.requires_grad and not out.requires_grad:
            raise InputError(
                f"no gradient goes back through the base {type(self.base).__name__}: it has no backward pass, as "
                "linears that quantise their inputs, so nothing before it would be trained rightly; quantise the "
                "weights alone"
            )

    def _own_weight(self) -> nn.Parameter:
        """Return the base's own weight while a merged one is in its place."""
        (original,) = self._base_weight
        # The model may have been moved or converted in between.
        original.data = original.data.to(self.weight)
        return original

    @contextmanager
    def original_weight(self) -> Iterator[None]:
        """Within the context the base holds its own weight, even if the layer is merged."""
        if not self.merged:
            yield
            return
        merged, self.base.weight = self.base.weight, self._own_weight()
        try:
            yield
        finally:
            if self.merged:  # unmerged in between otherwise
                self.base.weight = merged

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the module's state; the base's weight in it is always the original one, merged or not."""
        with self.original_weight():
            return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        narrow = any(not _is_wide(state_dict.get(prefix + name, factor)) for name, factor in self.factors().items())
        # A state has the base's own weight, and an update that is not merged into it any more.
        self.unmerge()
        with _converted_in_place():
            super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name in self.factors()):
            self._refactor_loaded(_INIT_TOLERANCE if narrow else OFF_MANIFOLD)
        self._keep_manifold(polish=narrow)

    def _refactor_loaded(self, tolerance: float) -> None:
        if any(factor.is_meta for factor in self.factors().values()):
            return
        if tolerance < manifold_error(self.factors(), self.orthonormal) < math.inf:
            warn(
                "a loaded state has factors off the manifold, as after another optimizer or an average; the same "
                "updates are put in with orthonormal factors",
                stacklevel=2,
            )
            self.refactor()

    def refactor(self) -> None:
        """Give the same update, from factors off the manifold as those of an average are, orthonormal ones."""
        self.put(self.refactored())

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def refactored(self) -> dict[str, Tensor]:
        """Return other factors of the same update, orthonormal ones."""
        return orthonormal_factors(*folded(self.factors()), self.orthonormal)

    @torch.inference_mode(mode=False)
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give the factors other values."""
        for name, factor in self.factors().items():
            # Not into the memory that it has, which after ``load_state_dict(assign=True)`` is the caller's.
            factor.data = values[name].to(factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StiefelLoRALinear":
        def keep_precision(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if _is_wide(out) or not tensor.is_floating_point():
                return out
            return tensor.to(out.device, torch.float32)

        if recurse:
            for child in self.children():
                child._apply(fn)
        before = self.lora_A.dtype
        with _converted_in_place():
            super()._apply(keep_precision, recurse=False)
        self._keep_manifold(polish=self.lora_A.dtype != before)
        return self

    def follow_base(self) -> None:
        """Take the device and the mode of the base, and the dtype that factors over it are created with."""
        example = _example(self.base)
        self._apply(lambda tensor: tensor.to(example.device, wide_dtype(example.dtype)), recurse=False)
        self.train(self.base.training)

    def _check_manifold(self) -> None:
        """Raise where something has put plain parameters in place of points, which training would let drift off."""
        for name, factor in self.manifold_parameters().items():
            if type(factor) is nn.Parameter:
                raise ManifoldError(
                    f"{name} is a plain parameter, so its columns would not stay orthonormal; under FSDP, give "
                    "fully_shard ignored_params=stiefel_lora.distributed.replicate_adapters(model)"
                )

    def _keep_manifold(self, *, polish: bool = False) -> None:
        """Undo what ``load_state_dict(assign=True)`` and conversions do: plain, narrow or inexact factors."""
        for name, factor in self.manifold_parameters().items():
            narrow = not _is_wide(factor)
            if narrow or not isinstance(factor, geoopt.ManifoldParameter):
                factor = _manifold_parameter(factor.data.float() if narrow else factor.data, factor.requires_grad)
                self.register_parameter(name, cast(nn.Parameter, factor))
            if (narrow or polish) and not factor.is_meta:
                factor.data = project_point(factor.data)

    def extra_repr(self) -> str:
        """Return the options shown by ``repr``."""
        merged = ", merged=True" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"alpha={self.alpha:g}, rslora={self.rslora}, orthonormal={self.orthonormal!r}{merged}"
        )


def _keep_called(module: nn.Module, args: Any, output: Any) -> None:
    """Change nothing: without a hook nn.TransformerEncoderLayer's inference reads the weight past ``forward``."""


def _checked_shape(base: nn.Module) -> tuple[int, int]:
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise TypeError(
            "the base is the out_proj of an nn.MultiheadAttention, which reads its weight where it should call it: an "
            "adapter would do nothing; leave it out"
        )
    if isinstance(base, nn.Module) and is_linear(base):
        shape = linear_shape(base)
        if min(shape) <= 0 or first_tensor(base) is None:
            raise TypeError(
                f"the base {type(base).__name__} has no weights yet; run a forward pass or initialise it first"
            )
        if first_tensor(base).is_complex():  # type: ignore[union-attr]
            raise TypeError(f"the base {type(base).__name__} has complex weights; factors are real")
        if not takes_one_argument(type(base)):  # type: ignore[arg-type]  # a class is hashable
            raise TypeError(
                f"the base {type(base).__name__} is more than a linear map: its forward needs other arguments besides "
                "the input; leave it out"
            )
        return shape
    inside = isinstance(base, nn.Module) and next(base.children(), None) is not None
    raise TypeError(
        "the base must be a linear layer (nn.Linear, transformers' Conv1D, or a quantised linear with in_features and "
        f"out_features), got {type(base).__name__}{', which has modules inside' if inside else ''}"
    )


def check_rank(rank: int, n_in: int, n_out: int) -> None:
    """Raise TypeError or InputError unless a linear map of this shape can have an update of this rank."""
    check_int("rank", rank)
    limit = min(n_in, n_out)
    if not 1 <= rank <= limit:
        raise InputError(
            f"rank must be in [1, {limit}] for a linear map of {n_in} inputs and {n_out} outputs, got {rank}"
        )


def check_options(n_in: int, n_out: int, rank: int, alpha: float | None, dropout: float, orthonormal: str) -> None:
    """Raise TypeError or InputError unless an adapter on a linear map of this shape can have these options."""
    check_rank(rank, n_in, n_out)
    if alpha is not None and not 0 < alpha <= sys.float_info.max:
        raise InputError(f"alpha must be positive and finite, got {alpha}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be in [0, 1), got {dropout}")
    check_choice("orthonormal", orthonormal, tuple(CONSTRAINED))


def _initial_factors(layer: StiefelLoRALinear, init: Init, generator: torch.Generator | None) -> dict[str, Tensor]:
    sizes = {"lora_A": layer.in_features, "lora_B": layer.out_features}
    names = CONSTRAINED[layer.orthonormal]
    if isinstance(init, str):
        if init == "gradient":
            raise InputError("init='gradient' takes data: give init=gradient_init(model, batches, ...) to add_adapters")
        check_choice("init", init, ("random", "svd"))
        example = _example(layer.base)
        if example.is_meta:
            return {name: torch.empty(sizes[name], layer.rank, device="meta") for name in names}
        if init == "random":
            # On the CPU, whatever torch's default device is.
            options: dict[str, Any] = {"dtype": wide_dtype(example.dtype), "device": "cpu", "generator": generator}
            return {name: random_point(sizes[name], layer.rank, **options) for name in names}
        weight = plain_weight(layer.base)
        right, left, _ = leading_singular_vectors(weight.T if is_conv1d(layer.base) else weight, layer.rank)
        return {name: vectors for name, vectors in (("lora_A", right), ("lora_B", left)) if name in names}
    points = (init,) if isinstance(init, Tensor) else tuple(init)
    if len(points) != len(names):
        raise InputError(f"init must hold {len(names)} tensor(s), {' and '.join(names)}, got {len(points)}")
    return {n: _orthonormal(n, p, (sizes[n], layer.rank)) for n, p in zip(names, points, strict=True)}


def _orthonormal(name: str, point: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the nearest point of the manifold to a user's factor, or say why it is not one."""
    if tuple(point.shape) != shape:
        raise InputError(f"init of {name} must have shape {shape}, got {tuple(point.shape)}")
    error = float(orthogonality_error(point))
    if not error <= _INIT_TOLERANCE:
        raise ManifoldError(
            f"init of {name} must have orthonormal columns: |X^T X - I|_F is {error:.2g}, at most {_INIT_TOLERANCE} is "
            "taken for rounding; use its Q factor from torch.linalg.qr"
        )
    wide = point.detach().to(wide_dtype(point.dtype))
    return wide.clone() if error <= rounding_error(wide) else project_point(wide)


def _manifold_parameter(data: Tensor, requires_grad: bool = True) -> geoopt.ManifoldParameter:
    # Contiguous: factors are saved, and stacked by the optimizer.
    return geoopt.ManifoldParameter(data.contiguous(), manifold=geoopt.EuclideanStiefel(), requires_grad=requires_grad)


def _example(base: nn.Module) -> Tensor:
    """Return a tensor of a linear's, for its device and dtype; that there is one has been checked."""
    return cast(Tensor, first_tensor(base))


@contextmanager
def _converted_in_place() -> Iterator[None]:
    """Let a conversion change the data of parameters; geoopt's cannot be swapped or made anew."""
    swap, overwrite = get_swap_module_params_on_conversion(), get_overwrite_module_params_on_conversion()
    set_swap_module_params_on_conversion(False)
    set_overwrite_module_params_on_conversion(False)
    try:
        yield
    finally:
        set_swap_module_params_on_conversion(swap)
        set_overwrite_module_params_on_conversion(overwrite)


def _is_wide(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize >= 4
