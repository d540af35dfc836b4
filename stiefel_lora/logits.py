"""A language model's loss without its logits, of which a few at a time are made, used and dropped.

The logits of a batch are (tokens x vocabulary): with Gemma's 262,144 words those of 512 tokens take 512 MiB in float32,
and torch's cross entropy makes two more tensors of their size, where the model itself has 1 GiB. For a head that is
frozen, as it is beside adapters, nothing of that is needed: the gradient of a row's loss with respect to the head's
input can be taken with the loss, part by part of the vocabulary (`_head_loss`). (Wijmans et al., "Cut your losses in
large-vocabulary language models", arXiv:2411.09009; Hsu et al., "Liger kernel", arXiv:2410.10989.)
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._pytree import tree_leaves, tree_map_only

from stiefel_lora._head_loss import head_losses
from stiefel_lora._precision import wide_dtype
from stiefel_lora.errors import InputError

_CHANGED = (
    "the head of a model, its input or what its logits are a copy of was changed before these were looked at, and "
    "under deferred_logits they are made only then; look at them first, or leave it off"
)

_SIGNATURE = inspect.signature(cross_entropy)


@contextmanager
def deferred_logits(model: nn.Module) -> Iterator[None]:
    """Within the context a language model's logits are not made unless somebody asks for their values.

    ``model(**batch).loss`` then takes the memory of a few logits in place of three times all of them, and less time;
    the loss and its gradient are the same up to rounding. ``output.logits`` still looks like a tensor, and is computed
    as soon as anything but a cross entropy of class labels is done with it. Use it around the forward pass of a
    training or evaluation loop; `fisher_scores`, ``stiefel-lora finetune`` and `StiefelTrainer` do.

    It does nothing where the head that ``model.get_output_embeddings()`` names is trained, adapted, quantised, compiled
    or split, or has hooks, and in float16, whose gradients wait for the loss's scale.

    Args:
        model: A model of transformers, with adapters or without; any other is left as it is.
    """
    head = _plain_head(model)
    if head is None:
        yield
        return
    head.forward = partial(_defer, head)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """Return the head if it is a linear map and nothing else is in its way."""
    if not hasattr(model, "get_output_embeddings") or hasattr(model, "_orig_mod"):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or "forward" in vars(head) or model._compiled_call_impl or head._compiled_call_impl:
        return None
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return None if any(hooks) else head


def _defer(head: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002  as nn.Linear names it
    kind = input.device.type
    narrows = torch.is_autocast_enabled(kind) and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if narrows else input.dtype
    factors = [p for p in (head.weight, head.bias) if p is not None]
    frozen = all(type(p) in (Tensor, nn.Parameter) and not p.requires_grad for p in factors)
    transformed = (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
    # The gradients of float16 want the loss's scale, which is not known yet.
    if type(input) is not Tensor or not frozen or transformed or torch.float16 in (dtype, head.weight.dtype):
        return linear(input, head.weight, head.bias)
    return Logits.of(_Product(input, head.weight, head.bias, dtype), dtype)


class _Product:
    """A head's input and weights, in the dtype that it multiplies in, which must not be written to in between."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.hidden, self.weight, self.bias, self.dtype = hidden, weight, bias, dtype
        self._seen = self._look()

    def of(self, hidden: Tensor) -> "_Product":
        """Return the product of the same weights with what a part of the input is."""
        self._check()
        return _Product(hidden, self.weight, self.bias, self.dtype)

    def factors(self, *, tracked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias, the input with its history if that is asked for."""
        self._check()
        hidden = self.hidden if tracked else self.hidden.detach()
        return (
            hidden.to(self.dtype),
            self.weight.to(self.dtype),
            None if self.bias is None else self.bias.to(self.dtype),
        )

    def _check(self) -> None:
        if self._seen != self._look():
            raise InputError(_CHANGED)

    def _look(self) -> list[tuple[int, torch.dtype, torch.device]]:
        held = (self.hidden, self.weight, self.bias)
        # Tensors of inference mode have no version, and are not to be written to outside of it.
        return [(0 if x.is_inference() else x._version, x.dtype, x.device) for x in held if x is not None]


class Logits(Tensor):
    """What a head makes of its input, computed when its values are asked for.

    Attributes:
        product: The head's input, of shape (..., features) where these logits are (..., classes), and its weights.
    """

    product: _Product
    _parent: "Logits | None"  # of which these are a view or a conversion
    _derived: Callable[[Tensor], Tensor]
    _made: Tensor | None
    _node: Any  # in autograd's graph when they were deferred

    @classmethod
    def of(
        cls,
        product: _Product,
        dtype: torch.dtype,
        parent: "Logits | None" = None,
        derived: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> "Logits":
        """Return the logits in the given dtype, derived from others if these are given."""
        hidden = product.hidden if parent is None or parent.requires_grad else product.hidden.detach()
        logits: Logits = _Deferred.apply(hidden, product.weight, dtype)
        logits.product, logits._made, logits._parent, logits._derived = product, None, parent, derived
        logits._node = logits._graph_node()
        return logits

    @property
    def is_deferred(self) -> bool:
        """Whether nobody has asked for the values. What is then done with those is not to be gone around."""
        root = self._parent is None or self._parent.is_deferred
        return root and self._made is None and self._graph_node() is self._node

    def _graph_node(self) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.grad_fn

    def made(self) -> Tensor:
        """Return the logits as a plain tensor, the same whenever asked; of a view a view."""
        if self._made is None:
            # Who asks first may have no use for the gradient, and the next one may.
            with torch.inference_mode(False), torch.set_grad_enabled(self.requires_grad):
                self._made = self._computed() if self._parent is None else self._derived(self._parent.made())
        return self._made

    def values(self) -> Tensor:
        """Return the logits without their history."""
        with torch.no_grad():
            return self._computed() if self._made is None else self._made.detach()

    def _computed(self) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return linear(*self.product.factors(tracked=True)).to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Logits)]
        if func in _QUERIES or any(x._graph_node() is not x._node for x in found):
            # The latter went through another autograd function, whose gradient `_Deferred` is to be given.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _GRADIENT_HOOKS:
            raise InputError(
                f"deferred logits have no gradient to look at, got {func.__name__}(); leave deferred_logits off, or "
                "call it on what you compute of them"
            )
        if func in _DEFERRED and args and isinstance(args[0], Logits) and args[0].is_deferred:
            deferred = _DEFERRED[func](func, *args, **kwargs)
            if deferred is not None:
                return deferred
        args, kwargs = tree_map_only(Logits, Logits.made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Where Python's part was not asked, as within another autograd function. `_Deferred` has the gradient then.
        args, kwargs = tree_map_only(Logits, Logits.values, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Deferred(torch.autograd.Function):
    """Logits without values, and the gradient of the head's input if theirs is given after all."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = hidden.dtype
        shape = hidden.shape[:-1] + weight.shape[:1]
        return Tensor._make_wrapper_subclass(Logits, shape, dtype=dtype, device=hidden.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (grads[0].to(weight.dtype) @ weight).to(ctx.dtype), None, None


# What tells about a tensor without its values.
_QUERIES = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")),
    }
)
# The gradient that these are about is not made where a cross entropy has gone around it.
_GRADIENT_HOOKS = frozenset({Tensor.register_hook, Tensor.retain_grad})


def _reshaped(func: Callable[..., Tensor], logits: Logits, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return logits of another shape if the classes stay its last dimension."""
    like = func(torch.empty(logits.shape, dtype=logits.dtype, device="meta"), *args, **kwargs)
    if like.shape[-1:] != logits.shape[-1:] or like.dtype != logits.dtype:
        return None
    hidden = logits.product.hidden
    product = logits.product.of(hidden.reshape(*like.shape[:-1], hidden.shape[-1]))
    return Logits.of(product, logits.dtype, logits, lambda made: func(made, *args, **kwargs))


def _indexed(func: Callable[..., Tensor], logits: Logits, index: Any) -> Tensor | None:
    """Return the logits of some positions if all of their classes are taken."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is ... or isinstance(part, slice) for part in parts):
        return None
    reaches_classes = ... in parts or len(parts) == logits.dim()
    if reaches_classes and parts[-1] != slice(None):
        return None
    product = logits.product.of(func(logits.product.hidden, index))
    return Logits.of(product, logits.dtype, logits, lambda made: func(made, index))


def _converted(func: Callable[..., Tensor], logits: Logits, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the logits in another dtype if they stay where they are, and were not rounded to a third one before."""
    if "memory_format" in kwargs:
        return None
    like = func(torch.empty(0, dtype=logits.dtype, device=logits.device), *args, **kwargs)
    once = logits.dtype in (logits.product.dtype, like.dtype)
    if like.device != logits.device or not once or not like.is_floating_point() or like.dtype == torch.float16:
        return None
    if like.dtype == logits.dtype:
        return logits

    def converted(made: Tensor) -> Tensor:
        if made._version:
            raise InputError(_CHANGED)
        return func(made, *args, **kwargs)

    return Logits.of(logits.product, like.dtype, logits, converted)


def _cross_entropy(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
    call = bound(*args, **kwargs)
    return rowwise_cross_entropy(call)[0] if is_plain(call) else None


def bound(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of ``cross_entropy`` by name, with the defaults of those that are not given."""
    call = _SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def is_plain(call: dict[str, Any]) -> bool:
    """Tell whether a call of ``cross_entropy`` is for the mean or sum of the losses of rows with one class each."""
    # torch's older arguments, where they are given, count and not the reduction.
    reduced = call["reduction"] in ("mean", "sum") and call["size_average"] is None and call["reduce"] is None
    plain = reduced and call["weight"] is None and not call["label_smoothing"]
    logits, target = call["input"], call["target"]
    return plain and logits.dim() == 2 and target.shape == logits.shape[:1] and target.dtype == torch.int64


def rowwise_cross_entropy(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss of deferred logits for a call that `is_plain`.

    Returns:
        One number, and the loss of each row, NaN where the target is ignored.
    """
    logits: Logits = call["input"]
    kind = logits.device.type
    with torch.autocast(kind, enabled=False):
        found: tuple[Tensor, Tensor] = _RowwiseCrossEntropy.apply(
            *logits.product.factors(tracked=logits.requires_grad),
            call["target"],
            call["ignore_index"],
            call["reduction"],
            logits.dtype,
            torch.is_grad_enabled() and logits.requires_grad,
        )
    # Autocast takes cross entropies in float32.
    return found[0] if torch.is_autocast_enabled(kind) else found[0].to(logits.dtype), found[1]


def row_shares(valid: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Return the weight of each row's loss in their mean or sum, zero where it is not valid.

    As in torch, the mean of no rows is 0 / 0, and its gradient zero.
    """
    share = valid.to(dtype)
    return share / valid.sum().clamp(min=1) if reduction == "mean" else share


class _RowwiseCrossEntropy(torch.autograd.Function):
    """The cross entropy of hidden @ weight^T + bias, and the gradient of hidden with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignored: int,
        reduction: str,
        dtype: torch.dtype,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        valid = target != ignored
        share = row_shares(valid, reduction, wide_dtype(dtype))
        target = torch.where(valid, target, 0)
        found, gradient = head_losses(hidden, weight, bias, target, dtype, share if wants_gradient else None)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        rowwise = found.masked_fill(~valid, torch.nan)
        ctx.mark_non_differentiable(rowwise)
        total = torch.where(valid, found, 0).sum()
        return total / valid.sum() if reduction == "mean" else total, rowwise

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InputError("a loss of deferred logits has no second derivative; leave deferred_logits off for that")
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0], *(None,) * 7)


_DEFERRED: dict[Any, Callable[..., Tensor | None]] = {
    cross_entropy: _cross_entropy,
    Tensor.view: _reshaped,
    Tensor.reshape: _reshaped,
    Tensor.contiguous: _converted,
    Tensor.float: _converted,
    Tensor.to: _converted,
    Tensor.__getitem__: _indexed,
}
