"""The cross entropy of what a linear map makes of its input, and its gradient, in one pass over the classes.

The classes are gone through in parts, with a running maximum as in FlashAttention's softmax (Dao et al.,
arXiv:2205.14135): of each row so far the greatest logit m, sum_j exp(x_j - m) and sum_j exp(x_j - m) w_j. So a part of
the weight is read once for its logits and its share of the gradient, and no more logits are there at a time.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from stiefel_lora._precision import wide_dtype

# Rows that are worked on together, for which the weight is read once, and logits that are made at a time, of so many
# classes at least. On a CPU these stay in its cache. An accelerator has none that would matter, and each operation
# costs it a start.
_ROWS, _ROWS_ACCELERATOR = 512, 8192
_ENTRIES, _ENTRIES_ACCELERATOR = 1 << 17, 1 << 26
_CLASSES = 512


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the cross entropy of each row of hidden @ weight^T + bias.

    Args:
        hidden: Shape (rows, features).
        weight: Shape (classes, features), in the same dtype.
        bias: Shape (classes,), or None.
        target: Classes, shape (rows,).
        dtype: What the logits are rounded to, as the model would have them; the rest is in float32 at least.
        share: Weight of each row's loss in the whole, shape (rows,); None if no gradient is wanted.

    Returns:
        The losses, shape (rows,), and the gradient of their weighted sum with respect to ``hidden``, in its dtype.

    Raises:
        IndexError: If a target is not among the classes (on a CPU).
    """
    step = _ROWS if hidden.device.type == "cpu" else _ROWS_ACCELERATOR
    # One lot at least, which may be empty.
    lots = [slice(begin, begin + step) for begin in range(0, max(1, len(hidden)), step)]
    losses = []
    gradient = None if share is None else torch.empty_like(hidden)
    for rows in lots:
        own = None if share is None else share[rows, None]
        found, part = _of_rows(hidden[rows], weight, bias, target[rows, None], dtype, own)
        losses.append(found.squeeze(1))
        if gradient is not None and part is not None:
            gradient[rows] = part
    return torch.cat(losses), gradient


def _of_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dtype: torch.dtype, share: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the losses and the gradient of some rows; losses, targets and shares have the shape (rows, 1)."""
    wide = wide_dtype(dtype)
    # Raises where there is no such class; what is below would take it for none.
    own_weight = weight.index_select(0, target.squeeze(1))
    top = torch.full(target.shape, torch.finfo(wide).min, dtype=wide, device=hidden.device)
    own, others = torch.zeros_like(top), torch.zeros_like(top)
    total = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if share is not None else None
    entries = _ENTRIES if hidden.device.type == "cpu" else _ENTRIES_ACCELERATOR
    step = max(_CLASSES, entries // max(1, len(hidden)))
    for begin in range(0, len(weight), step):
        part = weight[begin : begin + step]
        logits = linear(hidden, part, None if bias is None else bias[begin : begin + step]).to(dtype).to(wide)
        place = target - begin
        is_here = (place >= 0) & (place < len(part))
        place = place.clamp(0, len(part) - 1)
        own = torch.where(is_here, logits.gather(1, place), own)
        before, top = top, torch.maximum(top, logits.amax(1, keepdim=True))
        logits.sub_(top).exp_()
        # Without the target itself, beside whose probability near 1 the others would be lost to rounding.
        logits.scatter_(1, place, logits.gather(1, place).masked_fill_(is_here, 0))
        shrink = (before - top).exp_()
        others.mul_(shrink).add_(logits.sum(1, keepdim=True))
        if total is not None:
            total.mul_(shrink).add_(logits.to(weight.dtype) @ part)
    norm = others + (own - top).exp()
    losses = top - own + norm.log()
    if total is None or share is None:
        return losses, None
    # sum_j p_j w_j - w_target, whose p is 1 less that of the others.
    return losses, total.addcmul_(others, own_weight.to(wide), value=-1).mul_(share / norm)
