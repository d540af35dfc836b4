"""Names of options shared by the package; imported by the command line, so without torch."""

from typing import Literal, TypeAlias

Retraction: TypeAlias = Literal["qr", "cayley", "polar", "exp"]
Metric: TypeAlias = Literal["euclidean", "canonical"]
SecondMoment: TypeAlias = Literal["mean", "norm", "row", "element"]
# Which factor of an adapter is orthonormal.
Orthonormal: TypeAlias = Literal["A", "B", "both"]
# What Fisher scores are for: whole layers or single linear maps.
Granularity: TypeAlias = Literal["layer", "module"]
# What they are divided by: nothing, the number of weights, or the weights' squared norm.
Normalize: TypeAlias = Literal["raw", "params", "weight"]
# Whose labels the loss is of: the data's, or such as the model draws.
Labels: TypeAlias = Literal["data", "model"]
