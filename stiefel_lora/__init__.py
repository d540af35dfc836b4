"""Riemannian optimizers and Fisher-selected, Stiefel-constrained LoRA adapters for PyTorch."""

from stiefel_lora.adapters import add_adapters as add_adapters
from stiefel_lora.adapters import disable_adapters as disable_adapters
from stiefel_lora.adapters import remove_adapters as remove_adapters
from stiefel_lora.adapters import use_adapter as use_adapter
from stiefel_lora.checkpoint import load_adapter as load_adapter
from stiefel_lora.checkpoint import save_adapter as save_adapter
from stiefel_lora.convert import export_peft as export_peft
from stiefel_lora.convert import import_peft as import_peft
from stiefel_lora.errors import InputError as InputError
from stiefel_lora.errors import ManifoldError as ManifoldError
from stiefel_lora.fisher import fisher_scores as fisher_scores
from stiefel_lora.fisher import fisher_select as fisher_select
from stiefel_lora.initialisation import allocate_ranks as allocate_ranks
from stiefel_lora.initialisation import gradient_init as gradient_init
from stiefel_lora.initialisation import select_and_start as select_and_start
from stiefel_lora.layer import StiefelLoRALinear as StiefelLoRALinear
from stiefel_lora.merging import merge_adapters as merge_adapters
from stiefel_lora.merging import unmerge_adapters as unmerge_adapters
from stiefel_lora.optim import RiemannianAdam as RiemannianAdam
from stiefel_lora.optim import RiemannianSGD as RiemannianSGD
from stiefel_lora.scores import FisherScores as FisherScores
from stiefel_lora.stiefel import effective_rank as effective_rank
from stiefel_lora.stiefel import orthogonality_error as orthogonality_error

__version__ = "0.1.0"

__all__ = [
    "add_adapters",
    "allocate_ranks",
    "disable_adapters",
    "effective_rank",
    "export_peft",
    "fisher_scores",
    "fisher_select",
    "FisherScores",
    "gradient_init",
    "import_peft",
    "InputError",
    "load_adapter",
    "ManifoldError",
    "merge_adapters",
    "orthogonality_error",
    "remove_adapters",
    "RiemannianAdam",
    "RiemannianSGD",
    "save_adapter",
    "select_and_start",
    "StiefelLoRALinear",
    "unmerge_adapters",
    "use_adapter",
]
