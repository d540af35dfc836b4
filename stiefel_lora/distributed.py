"""Adapters that stay whole beside a base model whose weights are split over processes."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stiefel_lora.adapted import adapter_factors, required_layers
from stiefel_lora.errors import InputError


def replicate_adapters(model: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> set[nn.Parameter]:
    """Make the adapters the same in all processes and keep them so, as DDP would, while FSDP splits the base.

    FSDP splits a matrix into rows, whose columns are not orthonormal, and leaves no ``ManifoldParameter``. So the
    factors are small exceptions: they take the first process's values at once, and after every backward pass their
    gradients are averaged::

        whole = replicate_adapters(model)
        for block in model.model.layers:
            fully_shard(block, ignored_params=whole)
        fully_shard(model, ignored_params=whole)
        optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad])

    Call it in all processes, once the model is on its device and before it is split. Every backward pass has to reach
    the same factors in all of them.

    Args:
        model: Has adapters, which may be followed by other trainable parameters: those are FSDP's, and torch neither
            clips both in one ``clip_grad_norm_`` nor steps them in one group with ``foreach`` or ``fused``.
        process_group: Processes that hold copies of the adapters; all of them by default.

    Returns:
        The factors, for ``ignored_params`` of ``torch.distributed.fsdp.fully_shard`` (torch 2.7 and later).

    Raises:
        InputError: If the model has no adapters or is split already, or there is no process group.
    """
    required_layers(model)
    factors = adapter_factors(model)  # each once, also one that several adapters share
    if not dist.is_initialized():
        raise InputError("there is no process group; call torch.distributed.init_process_group first")
    for name, factor in factors.items():
        if isinstance(factor, DTensor):
            raise InputError(f"{name} is split already; call replicate_adapters before fully_shard")
    count = dist.get_world_size(process_group)

    def average(factor: Tensor) -> None:
        dist.all_reduce(factor.grad, group=process_group)
        factor.grad.div_(count)  # type: ignore[union-attr]

    for factor in factors.values():
        dist.broadcast(factor.data, group_src=0, group=process_group)
        factor.register_post_accumulate_grad_hook(average)
    return set(factors.values())  # type: ignore[arg-type]
