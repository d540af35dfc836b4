"""Rows of logits in little memory: their losses, and the gradient of these written over them."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of the logits that are worked on at a time: few enough to stay in a processor's cache. An accelerator has
# none that would matter, and each operation costs it a start.
_CHUNK, _CHUNK_ACCELERATOR = 1 << 18, 1 << 26


def row_losses(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp(logits) of each row, shape (rows,), and the loss of each: that less the logit of its target."""
    norm = torch.cat([logits[rows].logsumexp(1) for rows in _chunks(logits)])
    return norm, norm - logits.gather(1, target[:, None]).squeeze(1)


def write_gradient_(logits: Tensor, target: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """Write weight (softmax(logits) - onehot(target)) over the logits, shape (rows, classes), and return it.

    Args:
        logits: Shape (rows, classes), dense.
        target: Classes, shape (rows,).
        norm: What `row_losses` returned first.
        weight: Of each row in the loss, shape (rows,).
    """
    for rows in _chunks(logits):
        part = logits[rows].sub_(norm[rows, None]).exp_()
        part.mul_(weight[rows, None]).scatter_add_(1, target[rows, None], -weight[rows, None])
    return logits


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of the rows, at least one, which then may be empty."""
    step = max(1, (_CHUNK if logits.device.type == "cpu" else _CHUNK_ACCELERATOR) // logits.shape[1])
    for begin in range(0, max(1, len(logits)), step):
        yield slice(begin, begin + step)
