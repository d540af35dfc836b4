"""A language model's loss without its logits, of which a few rows at a time are made, used and dropped.

The logits of a batch are (tokens x vocabulary): with Gemma's 262,144 words those of 512 tokens take 512 MiB in float32,
and torch's cross entropy makes two more tensors of their size, where the model itself has 1 GiB. For a head that is
frozen, as it is beside adapters, nothing of that is needed: the gradient of a row's loss with respect to the head's
input follows from the row's logits alone. (Wijmans et al., "Cut your losses in large-vocabulary language models",
arXiv:2411.09009; Hsu et al., "Liger kernel", arXiv:2410.10989.)
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear
from torch.utils._pytree import tree_map_only

from stiefel_lora._precision import wide_dtype
from stiefel_lora._softmax import row_losses, write_gradient_

# Rows of logits that are made at a time. A head is read from memory for each lot, which fewer rows would wait for.
_ROWS, _ROWS_ACCELERATOR = 64, 512

_SIGNATURE = inspect.signature(cross_entropy)


@contextmanager
def deferred_logits(model: nn.Module) -> Iterator[None]:
    """Within the context a language model's logits are not made unless somebody asks for their values.

    ``model(**batch).loss`` then takes the memory of a few rows of logits in place of three times all of them, and less
    time; the loss and its gradient are the same up to rounding. ``output.logits`` still looks like a tensor, and is
    computed as soon as anything but a cross entropy of class labels is done with it. Use it around the forward pass of
    a training or evaluation loop; `fisher_scores`, ``stiefel-lora finetune`` and `StiefelTrainer` do.

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
    """Return the head if it is a frozen linear map and nothing else is in its way."""
    if not hasattr(model, "get_output_embeddings") or hasattr(model, "_orig_mod"):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or "forward" in vars(head) or model._compiled_call_impl or head._compiled_call_impl:
        return None
    plain = all(type(p) in (Tensor, nn.Parameter) and not p.requires_grad for p in head.parameters())
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return head if plain and len(list(head.parameters())) and not any(hooks) else None


def _defer(head: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002  as nn.Linear names it
    kind = input.device.type
    narrows = torch.is_autocast_enabled(kind) and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if narrows else input.dtype
    # The gradients of float16 want the loss's scale, which is not known yet.
    if type(input) is not Tensor or torch.float16 in (dtype, head.weight.dtype) or torch.compiler.is_compiling():
        return linear(input, head.weight, head.bias)
    return Logits.of(input, head, dtype, dtype)


class Logits(Tensor):
    """What a head makes of its input, computed when its values are asked for.

    Attributes:
        hidden: The head's input, shape (..., features), where these logits are (..., classes).
        head: The head.
        product_dtype: What the head multiplies in; its products are then converted to these logits' own dtype.
    """

    hidden: Tensor
    head: nn.Linear
    product_dtype: torch.dtype
    _made: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: nn.Linear, product_dtype: torch.dtype, dtype: torch.dtype) -> "Logits":
        """Return the logits in the given dtype."""
        logits: Logits = _Deferred.apply(hidden, head.weight, dtype)
        logits.hidden, logits.head, logits.product_dtype, logits._made = hidden, head, product_dtype, None
        return logits

    @property
    def is_made(self) -> bool:
        """Whether somebody has asked for the values. What is done with those, as hooks, is not to be gone around."""
        return self._made is not None

    def made(self) -> Tensor:
        """Return the logits as a plain tensor, the same whenever asked."""
        if self._made is None:
            # Who asks first may have no use for the gradient, and the next one may.
            with torch.enable_grad():
                self._made = self._computed()
        return self._made

    def _values(self) -> Tensor:
        """Return the logits where no gradient is kept."""
        return self._computed() if self._made is None else self._made.detach()

    def _computed(self) -> Tensor:
        return linear(self.hidden.to(self.product_dtype), *self.parameters()).to(self.dtype)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return the head's weight and bias in the dtype that it multiplies in."""
        bias = self.head.bias
        return self.head.weight.to(self.product_dtype), None if bias is None else bias.to(self.product_dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUERIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _DEFERRED:
            logits = args[0] if args else None
            found = (
                _DEFERRED[func](func, *args, **kwargs) if isinstance(logits, Logits) and not logits.is_made else None
            )
            if found is not None:
                return found
        args, kwargs = tree_map_only(Logits, Logits.made, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Where Python's part was not asked, as within another autograd function. `_Deferred` has the gradient then.
        args, kwargs = tree_map_only(Logits, Logits._values, (args, kwargs or {}))
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


def _reshaped(func: Callable[..., Tensor], logits: Logits, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return logits of another shape if the classes stay its last dimension."""
    like = func(torch.empty(logits.shape, dtype=logits.dtype, device="meta"), *args, **kwargs)
    if like.shape[-1:] != logits.shape[-1:] or like.dtype != logits.dtype:
        return None
    return _like(logits, logits.hidden.reshape(*like.shape[:-1], logits.hidden.shape[-1]))


def _indexed(func: Callable[..., Tensor], logits: Logits, index: Any) -> Tensor | None:
    """Return the logits of some positions if all of their classes are taken."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is ... or isinstance(part, slice) for part in parts):
        return None
    reaches_classes = ... in parts or len(parts) == logits.dim()
    return None if reaches_classes and parts[-1] != slice(None) else _like(logits, func(logits.hidden, index))


def _converted(func: Callable[..., Tensor], logits: Logits, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the logits in another dtype if they stay where they are, and were not rounded to a third one before."""
    like = func(torch.empty(0, dtype=logits.dtype, device=logits.device), *args, **kwargs)
    once = logits.dtype in (logits.product_dtype, like.dtype)
    if like.device != logits.device or not once or not like.is_floating_point() or like.dtype == torch.float16:
        return None
    return Logits.of(logits.hidden, logits.head, logits.product_dtype, like.dtype)


def _like(logits: Logits, hidden: Tensor) -> Logits:
    return Logits.of(hidden, logits.head, logits.product_dtype, logits.dtype)


def _cross_entropy(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
    call = _SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    return rowwise_cross_entropy(call.arguments)[0] if is_plain(call.arguments) else None


def is_plain(call: dict[str, Any]) -> bool:
    """Tell whether a call of ``cross_entropy`` is for the mean or sum of the losses of rows with one class each."""
    # torch's older arguments, where they are given, count and not the reduction.
    reduced = call["reduction"] in ("mean", "sum") and call["size_average"] is None and call["reduce"] is None
    plain = reduced and call["weight"] is None and not call["label_smoothing"]
    return plain and call["input"].dim() == 2 and not call["target"].is_floating_point()


def rowwise_cross_entropy(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss of deferred logits for a call that `is_plain`.

    Returns:
        One number, and the loss of each row, NaN where the target is ignored.
    """
    logits = call["input"]
    found: tuple[Tensor, Tensor] = _RowwiseCrossEntropy.apply(
        logits.hidden.to(logits.product_dtype),
        *logits.parameters(),
        call["target"],
        call["ignore_index"],
        call["reduction"],
        logits.dtype,
        torch.is_grad_enabled() and logits.hidden.requires_grad,
    )
    return found


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
        # As torch's: without any rows the mean is 0 / 0, and its gradient zero.
        divisor = valid.sum() if reduction == "mean" else target.new_ones(())
        share = valid.to(wide_dtype(dtype)) / divisor.clamp(min=1)
        target = torch.where(valid, target, 0)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        losses = []
        step = _ROWS if hidden.device.type == "cpu" else _ROWS_ACCELERATOR
        for begin in range(0, max(1, len(hidden)), step):
            rows = slice(begin, begin + step)
            # In the model's own dtype first, as the whole would be.
            logits = linear(hidden[rows], weight, bias).to(dtype).to(share.dtype)
            norm, loss = row_losses(logits, target[rows])
            losses.append(loss)
            if gradient is not None:
                gradient[rows] = write_gradient_(logits, target[rows], norm, share[rows]).to(weight.dtype) @ weight
            del logits  # before the next ones are made
        found = torch.cat(losses)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        rowwise = found.masked_fill(~valid, torch.nan)
        ctx.mark_non_differentiable(rowwise)
        return (torch.where(valid, found, 0).sum() / divisor).to(dtype), rowwise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
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
