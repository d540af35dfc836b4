"""transformers' Trainer with Stiefel adapters: a Riemannian optimizer, small checkpoints and metrics."""

import logging
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
from transformers.trainer_utils import HubStrategy

from stiefel_lora.adapted import adapter_layers, adapter_metrics, required_layers
from stiefel_lora.adapters import adapter_names
from stiefel_lora.checkpoint import load_adapter, save_adapter
from stiefel_lora.errors import InputError, listed
from stiefel_lora.factors import FREE
from stiefel_lora.layer import OFF_MANIFOLD
from stiefel_lora.logits import deferred_logits
from stiefel_lora.onednn import onednn_products
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD

logger = logging.getLogger("stiefel_lora")


def trainer_optimizer(args: TrainingArguments, **options: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the Riemannian optimizer that training arguments ask for, as Trainer's ``optimizer_cls_and_kwargs``.

    Args:
        args: ``learning_rate``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` are used; ``optim`` is
            "adamw_torch" (with or without "_fused") or "sgd". Trainer itself applies ``weight_decay`` and the schedule.
        options: More for the optimizer, such as ``retraction`` or SGD's ``momentum``. Adam's ``second_moment`` is "row"
            unless given, which does best on language models' adapters from a random start.

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
    own = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "second_moment": "row"}
    return RiemannianAdam, {**own, **options}


class AdapterMetricsCallback(TrainerCallback):
    """Logs "orthogonality_error" (greatest) and "effective_rank" (mean) whenever the Trainer logs.

    They go to all that the Trainer reports to. It warns once if all updates are zero still after two steps or more, and
    once if the factors have left the manifold.
    `StiefelTrainer` has one; for a plain Trainer call ``trainer.add_callback(AdapterMetricsCallback(trainer))``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._has_warned = False
        self._has_warned_of_drift = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log once per logging step; Trainer's own record of the loss follows."""
        model = _model_of(self.trainer)
        if control.should_log and adapter_layers(model):
            found = summary(model)
            self.trainer.log(found)
            control.should_log = True  # logging resets it, and Trainer's own record is still to come
            self._warn_of_untrained(model, state.global_step)
            self._warn_of_drift(found["orthogonality_error"], state.global_step)

    # With logging_strategy="epoch" it is here that logging is due.
    on_epoch_end = on_step_end

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Warn if nothing was trained, where nothing was logged."""
        self._warn_of_untrained(_model_of(self.trainer), state.global_step)

    def _warn_of_untrained(self, model: nn.Module, steps: int) -> None:
        # A warm-up starts from a learning rate of zero.
        if steps < 2 or self._has_warned or _is_trained(model):
            return
        self._has_warned = True
        logger.warning(
            "all updates are zero after %d steps: the learning rate is zero, or no gradient reaches the adapters, "
            "as in re-entrant checkpoints of blocks whose inputs require none (give use_reentrant=False)",
            steps,
        )

    def _warn_of_drift(self, error: float, steps: int) -> None:
        if error <= OFF_MANIFOLD or self._has_warned_of_drift:
            return
        self._has_warned_of_drift = True
        logger.warning(
            "the orthonormal factors are off the manifold by %.1e after %d steps: the optimizer is no Riemannian one "
            "(give optimizer_cls_and_kwargs=trainer_optimizer(args), or take StiefelTrainer)",
            error,
            steps,
        )


class StiefelTrainer(Trainer):
    """Trainer for a model with Stiefel adapters.

    It differs from Trainer in three things. The optimizer is a Riemannian one made from the training arguments (unless
    ``optimizers`` or ``optimizer_cls_and_kwargs`` is given). A checkpoint holds the adapters and other trainable
    parameters, not the base model: the folder can be given to ``load_adapter``. The adapters' metrics are logged.

    Args:
        args: As Trainer's.
        optimizer_options: More for the optimizer, such as ``{"retraction": "cayley"}``; see `trainer_optimizer`.
        lr_ratio: Learning rate of the orthonormal factors, as a multiple of ``learning_rate``; 4 did well with a start
            from the gradient.
        kwargs: As Trainer's.

    Raises:
        InputError: If the model has no adapters, ``lr_ratio`` is not positive, ``optim`` has no Riemannian form, or
            FSDP or DeepSpeed is on, which split what must stay whole; in ``train``, if the adapters are merged.
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
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            trainer_optimizer(self.args, **self.optimizer_options)  # refuses here what it would in train()
        self.add_callback(AdapterMetricsCallback(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the Riemannian optimizer, anew if the one before holds the factors of another set of adapters.

        Trainer asks for it before it trains, once the model is there: the model is made ready for that as well.
        """
        # Older releases of transformers make the checkpoints later.
        options = self.args.gradient_checkpointing and self.args.gradient_checkpointing_kwargs
        reentrant = isinstance(options, Mapping) and bool(options.get("use_reentrant"))
        _make_ready(_model_of(self), reentrant=reentrant)
        if self._is_ours and not self._is_complete():
            self.optimizer = None
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(*args, **kwargs)
        self._is_ours = True
        kind, options = trainer_optimizer(self.args, **self.optimizer_options)
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

    @onednn_products()
    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute a step's gradients in less time and memory; see `onednn_products` and `deferred_logits`."""
        with deferred_logits(model):
            return super().training_step(model, *args, **kwargs)

    @onednn_products()
    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Predict as the steps do."""
        with deferred_logits(model):
            return super().prediction_step(model, *args, **kwargs)

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

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer uploads the output folder, into which it copies only files that it knows, unless it uploads still.
        pending: Any = self.push_in_progress
        waits = pending is not None and not pending.is_done() and not self.args.hub_always_push
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END and not waits:
            save_adapter(_model_of(self), str(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = _model_of(self)
        load_adapter(adapted, resume_from_checkpoint, name=adapter_names(adapted)[0])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # Trainer restores both or none.
        lost = [name for name in ("optimizer", "scheduler") if not any(Path(checkpoint).glob(f"{name}*"))]
        if lost:
            logger.warning(
                "%s holds no %s, as after save_only_model: moments and the schedule of the learning rate start anew",
                checkpoint,
                " and no ".join(lost),
            )
        if not self._is_ours or self.optimizer is None:
            return
        # The checkpoint's rates go on, as in Trainer. A schedule by plateaus keeps no initial ones.
        rates = {
            isinstance(g["params"][0], ManifoldParameter): g["initial_lr"]
            for g in self.optimizer.param_groups
            if "initial_lr" in g
        }
        if len(rates) == 2 and not math.isclose(rates[True], self.lr_ratio * rates[False]):
            raise InputError(
                f"{checkpoint} was trained with lr_ratio={rates[True] / rates[False]:g}, not {self.lr_ratio:g}, and "
                "would go on with it; give that, or start anew"
            )

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _model_of(trainer: Trainer) -> nn.Module:
    return cast(nn.Module, trainer.model)


def _make_ready(model: nn.Module, *, reentrant: bool) -> None:
    """Let gradients reach the adapters, or raise InputError if they are merged.

    A re-entrant checkpoint has none for what is in it unless one of its inputs requires some. transformers sees to that
    in models of tokens only. ``reentrant`` says that there will be such ones; those that there are count as well.
    """
    merged = [name for name, layer in adapter_layers(model).items() if layer.merged]
    if merged:
        raise InputError(f"{listed(merged)} is merged, so it cannot be trained; call unmerge_adapters first")
    if (reentrant or any(map(_is_reentrant, model.modules()))) and not getattr(model, "_require_grads_hook", None):
        enable = getattr(model, "enable_input_require_grads", None)
        if enable is not None:
            enable()


def _is_reentrant(block: nn.Module) -> bool:
    options = getattr(getattr(block, "_gradient_checkpointing_func", None), "keywords", {})
    return bool(getattr(block, "gradient_checkpointing", False) and options.get("use_reentrant"))


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


def _is_trained(model: nn.Module) -> bool:
    return any(bool(layer.factors()[FREE[layer.orthonormal]].any()) for layer in adapter_layers(model).values())


def summary(model: nn.Module) -> dict[str, float]:
    """Return the greatest orthogonality error and the mean effective rank of the adapters in use."""
    metrics = adapter_metrics(model).values()
    return {
        "orthogonality_error": max(m["orthogonality_error"] for m in metrics),
        "effective_rank": fmean(m["effective_rank"] for m in metrics),
    }
