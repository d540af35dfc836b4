"""Say what an adapter folder holds, without its base model."""

from dataclasses import dataclass
from pathlib import Path

from stiefel_lora.checkpoint import CONFIG_FILE, read_adapter
from stiefel_lora.convert import PEFT_CONFIG_FILE, read_peft
from stiefel_lora.errors import InputError
from stiefel_lora.factors import factor_metrics, scaling


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted linear.

    Attributes:
        name: Its qualified name in the base model.
        shape: (out_features, in_features) of its weight.
        rank: Rank of the factors.
        scaling: What the product of the factors is multiplied by.
        orthonormal: Which factor is orthonormal, or None for a PEFT LoRA.
        parameters: Number of entries of the factors, without an A that is also that of one before.
        orthogonality_error: Greatest |X^T X - I|_F of the orthonormal factors, or None for a PEFT LoRA.
        effective_rank: Exponential of the entropy of the update's normalised singular values; 0 for no update.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    orthonormal: str | None
    parameters: int
    orthogonality_error: float | None
    effective_rank: float


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder holds.

    Attributes:
        kind: "stiefel_lora" or "PEFT LoRA".
        base_model: Name, path or class of the base model, "" if it is not recorded.
        modules: The adapted linears.
        others: Shapes of the base's own parameters that were trained with them.
        parameters: Number of trained entries in all.
        shared: Number of the linears that have the very A of one before.
    """

    kind: str
    base_model: str
    modules: list[ModuleInfo]
    others: dict[str, tuple[int, ...]]
    parameters: int
    shared: int = 0

    def table(self) -> str:
        """Return a description for people, one line a module."""
        width = max(len(module.name) for module in self.modules)
        head = [
            f"{self.kind} adapter for {self.base_model or 'an unnamed model'}: {len(self.modules)} linears, "
            f"{self.parameters:,} parameters" + (f", {self.shared} with the A of one before" if self.shared else ""),
            f"{'module':{width}}  {'out x in':>13}  rank  scaling  orthonormal  orthogonality error  effective rank",
        ]
        rows = [_row(module, width) for module in self.modules]
        return "\n".join(head + rows + [f"{name}  {list(shape)}, trained whole" for name, shape in self.others.items()])


def adapter_info(path: str | Path) -> AdapterInfo:
    """Read what an adapter folder holds: one written by `save_adapter` or any PEFT LoRA.

    Raises:
        InputError: If the folder is missing, damaged or of another kind.
    """
    path = Path(path)
    peft = not (path / CONFIG_FILE).is_file() and (path / PEFT_CONFIG_FILE).is_file()
    if not peft and not (path / CONFIG_FILE).is_file():
        raise InputError(f"{path} is no adapter folder: it holds neither {CONFIG_FILE} nor {PEFT_CONFIG_FILE}")
    state = read_peft(path) if peft else read_adapter(path)
    modules = []
    for name, options in state.modules.items():
        factors, rank = state.factors[name], options["rank"]
        metrics = factor_metrics(factors, options["orthonormal"])
        modules.append(
            ModuleInfo(
                name=name,
                shape=(options["out_features"], options["in_features"]),
                rank=rank,
                scaling=scaling(rank, options["alpha"], options["rslora"]),
                orthonormal=None if peft else options["orthonormal"],
                parameters=sum(f.numel() for key, f in factors.items() if key != "lora_A" or name not in state.shared),
                # A PEFT LoRA has just been factored again, which says nothing about its own factors.
                orthogonality_error=None if peft else metrics["orthogonality_error"],
                effective_rank=metrics["effective_rank"],
            )
        )
    base = state.base_model
    return AdapterInfo(
        kind="PEFT LoRA" if peft else "stiefel_lora",
        base_model=base.get("name_or_path") or base.get("class", ""),
        modules=modules,
        others={name: tuple(tensor.shape) for name, tensor in state.parameters.items()},
        parameters=sum(m.parameters for m in modules) + sum(t.numel() for t in state.parameters.values()),
        shared=len(state.shared),
    )


def _row(module: ModuleInfo, width: int) -> str:
    shape = f"{module.shape[0]} x {module.shape[1]}"
    error = "-" if module.orthogonality_error is None else f"{module.orthogonality_error:.1e}"
    return (
        f"{module.name:{width}}  {shape:>13}  {module.rank:4}  {module.scaling:7.3g}  {module.orthonormal or '-':>11}  "
        f"{error:>19}  {module.effective_rank:14.2f}"
    )
