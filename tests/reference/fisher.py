"""Fisher scores the slow way: one sample at a time, full weight gradients from autograd."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def squared_norms(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: list[Any],
    loss_of: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Tensor:
    """Return |dL/dW|_F^2 of each sample (rows) and weight (columns), for batches of one sample each."""
    rows = []
    training = model.training
    model.eval()
    for batch in batches:
        loss = model(**batch)["loss"] if loss_of is None else loss_of(model, batch)
        grads = torch.autograd.grad(loss.sum(), list(weights.values()), allow_unused=True)
        rows.append(torch.stack([torch.zeros(()) if g is None else g.detach().square().sum() for g in grads]))
    model.train(training)
    return torch.stack(rows)


def singles(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Take a batch of tensors apart into batches of one."""
    size = len(next(iter(batch.values())))
    return [{key: value[n : n + 1] for key, value in batch.items()} for n in range(size)]
