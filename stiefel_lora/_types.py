"""Type aliases shared by the package."""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch

Retraction: TypeAlias = Literal["qr", "cayley", "polar", "exp"]
Metric: TypeAlias = Literal["euclidean", "canonical"]
SecondMoment: TypeAlias = Literal["mean", "norm", "element"]
Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
