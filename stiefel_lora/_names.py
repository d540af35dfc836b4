"""Names of modules and parameters as the plain model has them, whatever its parts are wrapped in.

``model.layers[i] = torch.compile(model.layers[i])`` and torch's checkpoint wrapper put a module around a block, whose
name then stands inside all names in the block. A saved adapter is for the plain model, and for any wrapped one.
"""

from torch import nn

_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
_WRAPPED = (_COMPILED, _CHECKPOINTED)


def plain_name(name: str) -> str:
    """Return a qualified name without the components that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def is_checkpointed(name: str) -> bool:
    """Tell whether what has this name is inside a checkpoint wrapper, whose state leaves its own component out."""
    return _CHECKPOINTED in name.split(".")


def is_compiled(name: str) -> bool:
    """Tell whether what has this name is itself what was compiled, which calls it even when another takes its place."""
    return name.rpartition(".")[2] == _COMPILED


def name_in(model: nn.Module, name: str) -> str:
    """Return the name that something has in a model, given its name in the plain one or in one wrapped otherwise.

    A wrapped module goes by the name of what is in the wrapper. It need not be there.
    """
    module: nn.Module | None = model
    parts: list[str] = []
    for part in plain_name(name).split("."):
        module = None if module is None else module._modules.get(part)
        parts.append(part)
        while module is not None and (inside := next((w for w in _WRAPPED if w in module._modules), None)):
            module = module._modules[inside]
            parts.append(inside)
    return ".".join(parts)


def parents(name: str) -> list[str]:
    """Return the names of the modules around a parameter or module: a and a.b for a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
