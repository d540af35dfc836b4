"""The mean cross entropy in the memory of its logits alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from stiefel_lora.logits import Logits, bound, is_plain, row_shares, rowwise_cross_entropy

# Entries of the logits that are worked on at a time: few enough to stay in a processor's cache. An accelerator has
# none that would matter, and each operation costs it a start.
_CHUNK, _CHUNK_ACCELERATOR = 1 << 18, 1 << 26


@dataclass(frozen=True)
class Rows:
    """The rows of a mean cross entropy.

    Attributes:
        losses: Shape (rows,), NaN where the target is ignored.
        targets: Classes, shape (rows,).
    """

    losses: Tensor
    targets: Tensor


class LeanCrossEntropy(TorchFunctionMode):
    """While it is entered, ``cross_entropy`` keeps its logits, and its backward pass writes their gradient over them.

    torch keeps the log-probabilities and makes two more tensors of their size; for a large vocabulary these are the
    greatest tensors of a model. Whoever keeps the logits for another use in the backward pass must see that their
    version has changed, and run again without ``in_place``.

    Args:
        in_place: Whether the gradient may take the logits' place; else it gets memory of its own.
    """

    def __init__(self, *, in_place: bool = True) -> None:
        super().__init__()
        self._in_place = in_place
        self._taken: list[tuple[Tensor, Rows]] = []

    def rows_of(self, loss: Tensor) -> Rows | None:
        """Return the rows of the logits if ``loss`` is the mean of their cross entropy."""
        return next((rows for mean, rows in self._taken if mean is loss), None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is cross_entropy:
            call = bound(*args, **(kwargs or {}))
            logits, target, ignored = (call[k] for k in ("input", "target", "ignore_index"))
            if isinstance(logits, Logits) and not logits.is_deferred:
                call["input"] = logits = logits.made()
            if _is_plain_mean(call):
                if isinstance(logits, Logits):
                    mean, losses = rowwise_cross_entropy(call)
                # Autocast would widen a low precision.
                elif logits.dtype in (torch.float32, torch.float64):
                    mean, losses = _Mean.apply(logits, target, ignored, self._in_place)
                else:
                    mean, losses = func(*args, **(kwargs or {})), _rows(logits.detach().float(), target, ignored)
                self._taken.append((mean, Rows(losses, target)))
                return mean
        return func(*args, **(kwargs or {}))


def _rows(logits: Tensor, target: Tensor, ignored: int) -> Tensor:
    losses = cross_entropy(logits, target, ignore_index=ignored, reduction="none")
    return losses.masked_fill(target == ignored, torch.nan)


def _is_plain_mean(call: dict[str, Any]) -> bool:
    logits = call["input"]
    return is_plain(call) and call["reduction"] == "mean" and logits.requires_grad and not logits.is_leaf


class _Mean(torch.autograd.Function):
    """The mean over the rows whose target is not ignored of logsumexp(logits) - logits[target], and these losses."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignored: int, in_place: bool) -> tuple[Tensor, Tensor]:
        ctx.in_place = in_place
        valid = target != ignored
        weight = row_shares(valid, "mean", logits.dtype)
        rows = torch.cat([_rows(logits[part], target[part], ignored) for part in _chunks(logits)])
        ctx.save_for_backward(logits, torch.where(valid, target, 0), weight)
        ctx.mark_non_differentiable(rows)
        return rows[valid].mean(), rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target, weight = ctx.saved_tensors
        # Rows that are expanded from one are one place in memory.
        if not ctx.in_place or not logits.is_contiguous():
            logits = logits.clone()
        return _write_gradient_(logits, target, weight * grads[0]).detach(), None, None, None


def _write_gradient_(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Write weight (softmax(logits) - onehot(target)) over the logits, shape (rows, classes), and return it.

    Args:
        logits: Shape (rows, classes), dense.
        target: Classes, shape (rows,).
        weight: Of each row in the loss, shape (rows,).
    """
    for rows in _chunks(logits):
        part, own = logits[rows], weight[rows, None]
        part.sub_(part.amax(1, keepdim=True)).exp_()
        part.mul_(own / part.sum(1, keepdim=True)).scatter_add_(1, target[rows, None], -own)
    return logits


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of the rows, at least one, which then may be empty."""
    step = max(1, (_CHUNK if logits.device.type == "cpu" else _CHUNK_ACCELERATOR) // logits.shape[1])
    for begin in range(0, max(1, len(logits)), step):
        yield slice(begin, begin + step)
