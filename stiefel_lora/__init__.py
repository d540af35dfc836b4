"""Riemannian optimizers and Fisher-selected, Stiefel-constrained LoRA adapters for PyTorch.

Public are the names here, and those that README and the docstrings name in other modules, such as
`stiefel_lora.stiefel` for the geometry by itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stiefel_lora.adapters import add_adapters as add_adapters
    from stiefel_lora.adapters import disable_adapters as disable_adapters
    from stiefel_lora.adapters import remove_adapters as remove_adapters
    from stiefel_lora.adapters import use_adapter as use_adapter
    from stiefel_lora.checkpoint import load_adapter as load_adapter
    from stiefel_lora.checkpoint import save_adapter as save_adapter
    from stiefel_lora.convert import export_peft as export_peft
    from stiefel_lora.convert import from_peft as from_peft
    from stiefel_lora.convert import import_peft as import_peft
    from stiefel_lora.convert import to_peft as to_peft
    from stiefel_lora.errors import InputError as InputError
    from stiefel_lora.errors import ManifoldError as ManifoldError
    from stiefel_lora.fisher import fisher_scores as fisher_scores
    from stiefel_lora.fisher import fisher_select as fisher_select
    from stiefel_lora.initialisation import allocate_ranks as allocate_ranks
    from stiefel_lora.initialisation import gradient_init as gradient_init
    from stiefel_lora.initialisation import select_and_start as select_and_start
    from stiefel_lora.layer import StiefelLoRALinear as StiefelLoRALinear
    from stiefel_lora.logits import deferred_logits as deferred_logits
    from stiefel_lora.merging import merge_adapters as merge_adapters
    from stiefel_lora.merging import refactor_adapters as refactor_adapters
    from stiefel_lora.merging import unmerge_adapters as unmerge_adapters
    from stiefel_lora.onednn import onednn_products as onednn_products
    from stiefel_lora.optim import RiemannianAdam as RiemannianAdam
    from stiefel_lora.optim import RiemannianSGD as RiemannianSGD
    from stiefel_lora.scores import FisherScores as FisherScores
    from stiefel_lora.stiefel import effective_rank as effective_rank
    from stiefel_lora.stiefel import orthogonality_error as orthogonality_error

__version__ = "0.1.0"

# Public names by their modules, which are imported when one is asked for: the command line shows its help, and refuses
# what it is given, without waiting for torch.
_PUBLIC = {
    "adapters": ("add_adapters", "disable_adapters", "remove_adapters", "use_adapter"),
    "checkpoint": ("load_adapter", "save_adapter"),
    "convert": ("export_peft", "from_peft", "import_peft", "to_peft"),
    "errors": ("InputError", "ManifoldError"),
    "fisher": ("fisher_scores", "fisher_select"),
    "initialisation": ("allocate_ranks", "gradient_init", "select_and_start"),
    "layer": ("StiefelLoRALinear",),
    "logits": ("deferred_logits",),
    "merging": ("merge_adapters", "refactor_adapters", "unmerge_adapters"),
    "onednn": ("onednn_products",),
    "optim": ("RiemannianAdam", "RiemannianSGD"),
    "scores": ("FisherScores",),
    "stiefel": ("effective_rank", "orthogonality_error"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF, key=str.lower)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    elif name in _PUBLIC:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_PUBLIC})
