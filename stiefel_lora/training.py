"""The main job: score the layers, adapt the best, train, evaluate; resumable at any checkpoint."""

import hashlib
import importlib.metadata
import io
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from geoopt import ManifoldParameter
from torch import Tensor, nn

from stiefel_lora import __version__
from stiefel_lora._batches import to_device
from stiefel_lora._files import atomic_file
from stiefel_lora._losses import IGNORED
from stiefel_lora._models import split_at_layer
from stiefel_lora._precision import autocast_like
from stiefel_lora._progress import progress
from stiefel_lora.adapted import adapter_factors, adapter_metrics
from stiefel_lora.adapters import add_adapters
from stiefel_lora.checkpoint import save_adapter
from stiefel_lora.config import ADAPTER_FOLDER, CHECKPOINT_FILE, FinetuneConfig
from stiefel_lora.data import Dataset, load_data, spread
from stiefel_lora.errors import InputError
from stiefel_lora.logits import deferred_logits
from stiefel_lora.onednn import onednn_products
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD
from stiefel_lora.pretrained import check_causal, find_device, load_pretrained, positions_of
from stiefel_lora.selection import Selection, adaptable, select
from stiefel_lora.stiefel import orthogonality_error

VERSIONED = ("torch", "geoopt", "transformers", "numpy")
_REMEDY = "a lower learning rate or a wider dtype may help"


def finetune(
    config: FinetuneConfig,
    folder: Path,
    *,
    device: str | None = None,
    save_every: int = 10,
    resume: bool = True,
    on_start: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the main job, or go on with it where the folder has a checkpoint of it.

    The last checkpoint stays, until whoever called has put the metrics into safety.

    Args:
        config: What to do.
        folder: Where the adapter and the checkpoints go; it exists.
        device: Where to compute; None for CUDA if there is one, else the CPU.
        save_every: Steps between checkpoints.
        resume: Whether to go on with a checkpoint; otherwise one that is there is overwritten.
        on_start: Called once the model and the data have turned out to fit, before anything is written.

    Returns:
        The metrics, ready for JSON, with the scores under "fisher".

    Raises:
        InputError: If the configuration does not fit the model or the data, before anything is trained or written;
            or if the training diverges.
    """
    clock = Clock()
    target = find_device(device)
    with clock.time("loading"):
        model, train, held_out = load_inputs(config, target)
    if config.batch_size > len(train):
        raise InputError(
            f"--batch-size must be at most {len(train)}, the number of training samples, got {config.batch_size}"
        )
    run = _Run(config, model, train, held_out, folder / CHECKPOINT_FILE, clock)
    saved = run.load() if resume else None
    if saved is None:
        with clock.time("selection"):
            selection, init = select(model, train, config)
        with clock.time("evaluation"):
            before = evaluate(model, held_out, config, "before")
    else:
        # The checkpoint has the factors.
        selection, init, before = Selection.of(saved["selection"]), "random", saved["before"]
    torch.manual_seed(config.seed)
    add_adapters(
        model,
        layers=None,
        target_modules=list(selection.ranks),
        rank=config.adapter_rank,
        rank_pattern=selection.ranks,
        alpha=config.numerator(selection.ranks.values()),
        dropout=config.dropout,
        rslora=config.by_root,
        orthonormal=config.orthonormal,
        init=init,
        share_A=config.shares_A,
    )
    on_start()
    run.start(saved, selection, before)
    run.train(save_every)
    with clock.time("evaluation"):
        after = evaluate(model, held_out, config, "after")
    save_adapter(model, folder / ADAPTER_FOLDER)
    return run.metrics(after)


def load_inputs(config: FinetuneConfig, device: torch.device) -> tuple[Any, Dataset, Dataset]:
    """Load the model, the training and the held-out data.

    Raises:
        InputError: If one cannot be read, or the configuration does not fit the model.
    """
    model, tokenizer = load_pretrained(config.model, device=device, dtype=config.dtype)
    positions = positions_of(model)
    if positions is not None and positions < config.seq_len:
        raise InputError(f"--seq-len must be at most {positions}, the positions of the model, got {config.seq_len}")
    train, held_out = load_data(config.data, tokenizer, seq_len=config.seq_len)
    _check_tokens(model, tokenizer, train, held_out)
    adaptable(model, config)
    check_causal(model)
    return model, train, held_out


def _check_tokens(model: Any, tokenizer: Any, *data: Dataset) -> None:
    """Raise InputError if the data have a token that the model has no embedding of."""
    largest = max(tokenizer.eos_token_id, *(int(ids.max()) for part in data for ids in part.input_ids))
    rows = len(model.get_input_embeddings().weight)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"the tokenizer has the token {token!r} as number {largest}, of which the model, with {rows} embeddings, "
            "knows nothing; take the tokenizer that it was trained with, or resize_token_embeddings and save the model"
        )


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, config: FinetuneConfig, label: str) -> dict[str, float]:
    """Return the mean loss per token, in nats, and the perplexity, on samples from all over the held-out data."""
    model.eval()
    total, tokens = 0.0, 0
    chosen = spread(len(data), config.eval_samples)
    for start in progress(range(0, len(chosen), config.batch_size), label=f"held-out loss {label}"):
        batch = to_device(data.batch(chosen[start : start + config.batch_size]), _device_of(model))
        n = _label_count(batch)
        with autocast_like(model), onednn_products(), deferred_logits(model):
            total += float(model(**batch).loss) * n
        tokens += n
    loss = total / max(tokens, 1)
    if not math.isfinite(loss):
        raise InputError(f"the held-out loss {label} training is {loss}; {_REMEDY}")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to zero."""
    warmup, highest = config.warmup_steps, config.highest_lr
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, config.steps - warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * share))


def fingerprints(model: nn.Module, *data: Dataset) -> dict[str, str]:
    """Return hashes by which a run that goes on knows its base model, of which a sample must do, and its data again."""
    weights, tokens = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        # bfloat16, which is what one device takes by default where another takes float32.
        sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.bfloat16)
        weights.update(f"{name} {tuple(parameter.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
    for part in data:
        for tensor in (*part.input_ids, *part.labels):
            tokens.update(f"{len(tensor)} ".encode() + tensor.numpy().tobytes())
    return {"base model": weights.hexdigest(), "data": tokens.hexdigest()}


class Clock:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        """Count the time inside the context."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + perf_counter() - start


class _Run:
    """The training loop with its state: everything that a checkpoint has to hold."""

    def __init__(
        self, config: FinetuneConfig, model: Any, train: Dataset, held_out: Dataset, path: Path, clock: Clock
    ) -> None:
        self.config, self.model, self.data, self.held_out = config, model, train, held_out
        self.path, self.clock = path, clock
        self.inputs = fingerprints(model, train, held_out)
        self.step = 0
        self.losses: list[float] = []
        self.tokens = 0
        self.orthogonality = 0.0

    def load(self) -> dict[str, Any] | None:
        """Return the saved state if there is one.

        Raises:
            InputError: If it is damaged, or began with another base model or other data.
        """
        if not self.path.is_file():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            changed = [name for name, value in self.inputs.items() if saved["inputs"][name] != value]
        except Exception as error:  # a damaged file makes torch raise anything
            raise InputError(f"{self.path} is damaged; --overwrite starts the run anew") from error
        if changed:
            raise InputError(
                f"cannot resume: the {' and the '.join(changed)} changed since it began; --overwrite starts it anew"
            )
        return saved

    def start(self, saved: dict[str, Any] | None, selection: Selection, before: dict[str, float]) -> None:
        """Make the optimizer; take over a saved state, or save the first one, so that scoring is not done twice."""
        self.selection, self.before = selection, before
        self.factors = adapter_factors(self.model)
        self.points = {name: f for name, f in self.factors.items() if isinstance(f, ManifoldParameter)}
        options: dict[str, Any] = {"lr": self.config.highest_lr, "retraction": self.config.retraction}
        self.optimizer = (
            RiemannianAdam(
                self._groups(), betas=(self.config.decay, 0.999), second_moment=self.config.moment, **options
            )
            if self.config.optimizer == "adam"
            else RiemannianSGD(self._groups(), momentum=self.config.decay, **options)
        )
        # Most gradients of float16 are below its range.
        first = next(self.model.parameters())
        self.scaler = torch.amp.GradScaler(first.device.type, enabled=first.dtype == torch.float16)
        if saved is None:
            self.save()
            return
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(saved["factors"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        if torch.cuda.is_available() and saved["cuda_rng"]:
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        self.step, self.losses, self.tokens = saved["step"], saved["losses"], saved["tokens"]
        self.orthogonality = saved["orthogonality"]
        for what, seconds in saved["seconds"].items():
            self.clock.seconds[what] = self.clock.seconds.get(what, 0.0) + seconds

    def _groups(self) -> list[dict[str, Any]]:
        """Return the factors as groups of the optimizer: those on the manifold, with their ratio, and the others."""
        free = [(name, factor) for name, factor in self.factors.items() if name not in self.points]
        return [{"params": list(self.points.items()), "ratio": self.config.ratio}, {"params": free, "ratio": 1.0}]

    def save(self) -> None:
        """Write one file that holds everything; the one before stays until it is whole."""
        # Not straight into the file: torch has an error of its own for a full disk.
        content = io.BytesIO()
        with atomic_file(self.path) as file:
            torch.save(
                {
                    "inputs": self.inputs,
                    "step": self.step,
                    "factors": {name: factor.detach().as_subclass(Tensor) for name, factor in self.factors.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                    "losses": self.losses,
                    "tokens": self.tokens,
                    "orthogonality": self.orthogonality,
                    "seconds": dict(self.clock.seconds),
                    "selection": asdict(self.selection),
                    "before": self.before,
                },
                content,
            )
            file.write_bytes(content.getbuffer())

    def train(self, save_every: int) -> None:
        """Take the remaining steps."""
        self.model.train()
        bar = progress(total=self.config.steps, initial=self.step, label="training")
        with bar, onednn_products():
            while self.step < self.config.steps:
                start = perf_counter()
                with self.clock.time("training"):
                    tokens = self._step()
                if self.step % save_every == 0 and self.step < self.config.steps:
                    self.save()
                bar.set_postfix_str(f"loss {self.losses[-1]:.3f}, {tokens / (perf_counter() - start):.0f} tokens/s")
                bar.update()

    def _step(self) -> int:
        config, accum = self.config, self.config.grad_accum
        batches = [
            to_device(self.data.shuffled_batch(config.batch_size, i, config.seed), _device_of(self.model))
            for i in range(self.step * accum, (self.step + 1) * accum)
        ]
        counts = [_label_count(batch) for batch in batches]
        loss = 0.0
        for batch, count in zip(batches, counts, strict=True):
            with autocast_like(self.model), deferred_logits(self.model):
                # Each token of the step counts the same, in whichever batch it is.
                part = self.model(**batch).loss * (count / sum(counts))
            self.scaler.scale(part).backward()
            loss += float(part.detach())
        if not math.isfinite(loss):
            raise InputError(f"the loss at step {self.step + 1} is {loss}; {_REMEDY}")
        with self.clock.time("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = group["ratio"] * learning_rate(config, self.step)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if _device_of(self.model).type == "cuda":  # or what waits next would count its time
                torch.cuda.synchronize()
        self.losses.append(loss)
        self.step += 1
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.tokens += tokens
        errors = torch.stack([orthogonality_error(p) for p in self.points.values()])
        # Read once, as a device waits for it; max() of Python would pass over NaN.
        self.orthogonality = float(errors.max().clamp_min(self.orthogonality))
        return tokens

    def metrics(self, after: dict[str, float]) -> dict[str, Any]:
        """Return what the run was and what came out of it, with the held-out loss after it."""
        chosen, before = self.selection, self.before
        trainable = sum(factor.numel() for factor in self.factors.values())
        base = sum(p.numel() for p in self.model.parameters()) - trainable
        effective = {name: found["effective_rank"] for name, found in adapter_metrics(self.model).items()}
        seconds = self.clock.seconds
        return {
            "versions": {
                "stiefel_lora": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in VERSIONED},
            },
            "config": asdict(self.config.resolved()),
            "model": self.model.config._name_or_path,
            "data": {
                "training": self.data.description,
                "held_out": self.held_out.description,
                "format": self.data.format,
            },
            "device": str(_device_of(self.model)),
            "fisher": chosen.scores and asdict(chosen.scores),
            "selected": chosen.selected,
            "selected_layers": sorted({split_at_layer(name)[1] for name in chosen.ranks}),
            "ranks": chosen.ranks,
            "trainable_parameters": trainable,
            "trainable_share": trainable / (base + trainable),
            "loss_curve": self.losses,
            "held_out": {"before": before, "after": after},
            "perplexity_change": after["perplexity"] / before["perplexity"] - 1,
            "tokens_per_second": self.tokens / seconds["training"],
            "seconds": {**seconds, "total": sum(v for k, v in seconds.items() if k != "optimizer")},
            "greatest_orthogonality_error": self.orthogonality,
            "mean_effective_rank": mean(effective.values()),
            "effective_rank_share": mean(value / chosen.ranks[name] for name, value in effective.items()),
            "skipped_updates": self.optimizer.skipped_updates,
        }


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _label_count(batch: dict[str, Tensor]) -> int:
    # A causal model predicts the next token, so the first has no loss.
    return int((batch["labels"][:, 1:] != IGNORED).sum())
