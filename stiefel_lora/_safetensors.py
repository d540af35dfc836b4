"""Read and write safetensors files, checked."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stiefel_lora.errors import InputError, listed


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        InputError: If it is missing, truncated or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file.

    Raises:
        InputError: If one of them has a NaN or infinity.
    """
    from safetensors.torch import save

    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(f"not saved: {listed(bad)} has NaN or infinite entries")
    # Copies: safetensors refuses what is under several names, as a factor that layers share. And not its own save_file,
    # which makes a file for its owner alone.
    copies = {n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in tensors.items()}
    path.write_bytes(save(copies, metadata))


def taken(
    file: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = ()
) -> Tensor:
    """Take a tensor out of a file's, or raise InputError if it is not as it should be."""
    tensor = tensors.pop(name, None)
    if tensor is None or tuple(tensor.shape) != shape or (dtypes and tensor.dtype not in dtypes):
        found = "is missing" if tensor is None else f"is {tensor.dtype} of shape {tuple(tensor.shape)}"
        raise InputError(f"{file}: {name} {found}; it should be {dtypes[0] if dtypes else ''} of shape {shape}")
    if not tensor.isfinite().all():
        raise InputError(f"{file}: {name} has NaN or infinite entries")
    return tensor
