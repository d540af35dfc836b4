"""transformers' Trainer with Stiefel adapters: a Riemannian optimizer, small checkpoints and metrics."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from geoopt import ManifoldParameter
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stiefel_lora.adapters import adapter_layers, adapter_metrics, adapter_names, required_layers
from stiefel_lora.checkpoint import load_adapter, save_adapter
from stiefel_lora.errors import InputError
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD


def trainer_optimizer(args: TrainingArguments, **options: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the Riemannian optimizer that training arguments ask for, as Trainer's ``optimizer_cls_and_kwargs``.

    Args:
        args: ``learning_rate``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are used; ``optim`` is
            "adamw_torch" (with or without "_fused") or "sgd". Trainer itself applies ``weight_decay`` and the schedule.
        options: More for the optimizer, such as ``retraction`` or SGD's ``momentum``.

    Returns:
        The class and its keyword arguments.

    Raises:
        InputError: If ``optim`` is another, or ``optim_args`` is given.
    """
    if args.optim_args:
        raise InputError(f"optim_args={args.optim_args!r} is not read; give optimizer_options= to StiefelTrainer")
    if args.optim == "sgd":
        return RiemannianSGD, {"lr": args.learning_rate, **options}
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        name = getattr(args.optim, "value", args.optim)
        raise InputError(f"optim={name!r} has no Riemannian form here; use 'adamw_torch' or 'sgd'")
    betas = (args.adam_beta1, args.adam_beta2)
    return RiemannianAdam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, **options}


class AdapterMetricsCallback(TrainerCallback):
    """Logs "orthogonality_error" (greatest) and "effective_rank" (mean) whenever the Trainer logs.

    They go to all that the Trainer reports to. `StiefelTrainer` has one; for a plain Trainer call
    ``trainer.add_callback(AdapterMetricsCallback(trainer))``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log once per logging step; Trainer's own record of the loss follows."""
        model = _model_of(self.trainer)
        if control.should_log and adapter_layers(model):
            self.trainer.log(summary(model))
            control.should_log = True  # logging resets it, and Trainer's own record is still to come

    # With logging_strategy="epoch" it is here that logging is due.
    on_epoch_end = on_step_end


class StiefelTrainer(Trainer):
    """Trainer for a model with Stiefel adapters.

    It differs from Trainer in three things. The optimizer is a Riemannian one made from the training arguments (unless
    ``optimizers`` or ``optimizer_cls_and_kwargs`` is given). A checkpoint holds the adapters and other trainable
    parameters, not the base model: the folder can be given to ``load_adapter``. The adapters' metrics are logged.

    Args:
        args: As Trainer's.
        optimizer_options: More for the optimizer, such as ``{"retraction": "cayley"}``.
        lr_ratio: Learning rate of the orthonormal factors, as a multiple of ``learning_rate``; 4 did well with a start
            from the gradient.
        kwargs: As Trainer's.

    Raises:
        InputError: If the model has no adapters, ``lr_ratio`` is not positive, or FSDP or DeepSpeed is on, which split
            what must stay whole.
    """

    def __init__(
        self, *args: Any, optimizer_options: Mapping[str, Any] | None = None, lr_ratio: float = 1.0, **kwargs: Any
    ) -> None:
        if not 0 < lr_ratio < math.inf:
            raise InputError(f"lr_ratio must be positive and finite, got {lr_ratio}")
        self.lr_ratio = lr_ratio
        model = args[0] if args else kwargs.get("model")
        self.optimizer_options = dict(optimizer_options or {})
        self._is_ours = False  # whether the optimizer is one that was made here
        with _adapters_accepted(model) if isinstance(model, nn.Module) else nullcontext():
            super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "Trainer's FSDP and DeepSpeed split the factors, whose columns must stay orthonormal; use DDP, or in a "
                "loop of your own fully_shard with stiefel_lora.distributed.replicate_adapters"
            )
        required_layers(_model_of(self))
        self.add_callback(AdapterMetricsCallback(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the Riemannian optimizer, anew if the one before holds the factors of another set of adapters."""
        if self._is_ours and not self._is_complete():
            self.optimizer = None
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(*args, **kwargs)
        self._is_ours = True
        kind, options = trainer_optimizer(self.args, **self.optimizer_options)
        if self.lr_ratio != 1:
            options["params"] = self._groups(options["lr"])
        self.optimizer_cls_and_kwargs = kind, options
        try:
            return super().create_optimizer(*args, **kwargs)
        finally:
            # A hyperparameter search changes the arguments and asks again.
            self.optimizer_cls_and_kwargs = None

    def _groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups: first Trainer's two, with and without decay, then the points."""
        model = _model_of(self)
        decayed = set(self.get_decay_parameter_names(model))
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        points = [p for _, p in trainable if isinstance(p, ManifoldParameter)]
        ordinary = [(name, p) for name, p in trainable if not isinstance(p, ManifoldParameter)]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in ordinary if name in decayed], "weight_decay": self.args.weight_decay},
            {"params": [p for name, p in ordinary if name not in decayed], "weight_decay": 0.0},
            {"params": points, "lr": self.lr_ratio * lr},
        ]
        return [group for group in groups if group["params"]]

    def _is_complete(self) -> bool:
        """Tell whether the optimizer has all parameters that are to be trained."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        held = {id(p) for group in groups for p in group["params"]}
        return all(id(p) in held for p in _model_of(self).parameters() if p.requires_grad)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        save_adapter(_model_of(self), folder)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = _model_of(self)
        load_adapter(adapted, resume_from_checkpoint, name=adapter_names(adapted)[0])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _model_of(trainer: Trainer) -> nn.Module:
    return cast(nn.Module, trainer.model)


@contextmanager
def _adapters_accepted(model: nn.Module) -> Iterator[None]:
    """Let Trainer's check of a quantised base, which knows only PEFT's adapters, see that there are some."""
    if not getattr(model, "is_quantized", False) or not adapter_layers(model):
        yield
        return
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def summary(model: nn.Module) -> dict[str, float]:
    """Return the greatest orthogonality error and the mean effective rank of the adapters in use."""
    metrics = adapter_metrics(model).values()
    return {
        "orthogonality_error": max(m["orthogonality_error"] for m in metrics),
        "effective_rank": fmean(m["effective_rank"] for m in metrics),
    }
