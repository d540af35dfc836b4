"""The main job: score the layers, adapt the best, train, evaluate; resumable at any checkpoint."""

import hashlib
import importlib.metadata
import io
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from geoopt import ManifoldParameter
from torch import Tensor, nn

from stiefel_lora import __version__
from stiefel_lora._budget import count_of
from stiefel_lora._files import atomic_file
from stiefel_lora._losses import IGNORED
from stiefel_lora._models import linear_shape
from stiefel_lora._progress import progress
from stiefel_lora._targets import find_targets, module_ranks
from stiefel_lora.adapters import adapter_factors, adapter_metrics, add_adapters
from stiefel_lora.checkpoint import save_adapter
from stiefel_lora.config import ADAPTER_FOLDER, CHECKPOINT_FILE, FinetuneConfig
from stiefel_lora.data import Dataset, load_data, spread
from stiefel_lora.errors import InputError
from stiefel_lora.factors import adapter_size
from stiefel_lora.fisher import fisher_scores
from stiefel_lora.initialisation import gradient_init
from stiefel_lora.layer import Init
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD
from stiefel_lora.pretrained import check_causal, find_device, load_pretrained, positions_of
from stiefel_lora.scores import FisherScores
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
    run = _Run(config, model, train, held_out, folder / CHECKPOINT_FILE, clock)
    saved = run.load() if resume else None
    if saved is None:
        with clock.time("selection"):
            scores = score_layers(model, train, config)
        selected = choose(scores, config)
        with clock.time("evaluation"):
            before = evaluate(model, held_out, config, "before")
    else:
        scores = FisherScores(**saved["fisher"])
        selected, before = choose(scores, config), saved["before"]
    where = _places(scores, selected, config)
    init: Any = config.init
    if init == "gradient":
        # The checkpoint of a run that goes on has the factors.
        with clock.time("selection"):
            init = "random" if saved is not None else gradient_start(model, train, config, where)
    torch.manual_seed(config.seed)
    names = add_adapters(
        model,
        **where,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        rslora=config.rslora,
        orthonormal=config.orthonormal,
        init=init,
    )
    on_start()
    run.start(saved, scores, before)
    run.train(save_every)
    with clock.time("evaluation"):
        after = evaluate(model, held_out, config, "after")
    save_adapter(model, folder / ADAPTER_FOLDER)
    return run.metrics(selected, names, before, after)


def load_inputs(config: FinetuneConfig, device: torch.device) -> tuple[Any, Dataset, Dataset]:
    """Load the model, the training and the held-out data.

    Raises:
        InputError: If one cannot be read, or the configuration does not fit the model.
    """
    model, tokenizer = load_pretrained(config.model, device=device, dtype=config.dtype)
    positions = positions_of(model)
    if positions is not None and positions < config.seq_len:
        raise InputError(f"seq_len must be at most {positions}, the positions of the model, got {config.seq_len}")
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


def adaptable(model: nn.Module, config: FinetuneConfig) -> list[str]:
    """Return the linear maps that could be adapted, or raise InputError before the slow work starts."""
    return list(module_ranks(model, find_targets(model, None, config.target_modules, None), config.rank))


def score_layers(model: nn.Module, train: Dataset, config: FinetuneConfig) -> FisherScores:
    """Score the layers, or the single linear maps, by the linear maps that would be adapted, on training data.

    Raises:
        InputError: If the budget is larger than their number, or too small for one.
    """
    modules = adaptable(model, config)
    if config.granularity == "module":
        _check_budget(model, modules, config)
    samples = min(config.calibration_samples, len(train))
    with _autocast(model):
        return fisher_scores(
            model,
            _calibration(train, config),
            modules=modules,
            granularity=config.granularity,
            max_samples=samples,
            budget=config.budget,
        )


def _check_budget(model: nn.Module, modules: Sequence[str], config: FinetuneConfig) -> None:
    """Raise InputError unless the budget allows a linear map, and not more of them than there are."""
    if not config.budget_is_parameters:
        count_of(config.budget, len(modules), "linear maps")
        return
    sizes = [adapter_size(*linear_shape(model.get_submodule(name)), config.rank) for name in modules]
    if round(config.budget * sum(sizes)) < min(sizes):
        least = math.ceil(1e4 * min(sizes) / sum(sizes)) / 1e4
        raise InputError(
            f"budget as a share of the adapters' parameters must be at least {least}, for one linear map; "
            f"got {config.budget}"
        )


def choose(scores: FisherScores, config: FinetuneConfig) -> list[int]:
    """Return what the budget allows: indices as `FisherScores.select` returns them."""
    if not config.budget_is_parameters:
        return scores.select(config.budget)
    size = config.rank * sum(scores.adapter_size)
    return scores.select(budget_params=round(config.budget * size), rank=config.rank)


def _places(scores: FisherScores, selected: Sequence[int], config: FinetuneConfig) -> dict[str, Any]:
    """Return the arguments of `add_adapters` that say where."""
    if config.granularity == "layer":
        return {"layers": selected, "target_modules": config.target_modules}
    return {"layers": None, "target_modules": [scores.names[i] for i in selected]}


def gradient_start(model: nn.Module, train: Dataset, config: FinetuneConfig, where: dict[str, Any]) -> dict[str, Init]:
    """Return starts for the adapters of some layers, from the gradient on the calibration samples."""
    batches = progress(_calibration(train, config), label="gradient start")
    with _autocast(model):
        return gradient_init(model, batches, **where, rank=config.rank, orthonormal=config.orthonormal)


def _calibration(train: Dataset, config: FinetuneConfig) -> list[dict[str, Tensor]]:
    samples = min(config.calibration_samples, len(train))
    return [
        train.shuffled_batch(config.batch_size, i, config.seed) for i in range(math.ceil(samples / config.batch_size))
    ]


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, config: FinetuneConfig, label: str) -> dict[str, float]:
    """Return the mean loss per token, in nats, and the perplexity, on samples from all over the held-out data."""
    model.eval()
    total, tokens = 0.0, 0
    chosen = spread(len(data), config.eval_samples)
    for start in progress(range(0, len(chosen), config.batch_size), label=f"held-out loss {label}"):
        batch = _onto(model, data.batch(chosen[start : start + config.batch_size]))
        n = _label_count(batch)
        with _autocast(model):
            total += float(model(**batch).loss) * n
        tokens += n
    loss = total / max(tokens, 1)
    if not math.isfinite(loss):
        raise InputError(f"the held-out loss {label} training is {loss}; {_REMEDY}")
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then half a cosine down to zero."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


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

    def start(self, saved: dict[str, Any] | None, scores: FisherScores, before: dict[str, float]) -> None:
        """Make the optimizer; take over a saved state, or save the first one, so that scoring is not done twice."""
        self.scores, self.before = scores, before
        self.factors = adapter_factors(self.model)
        self.points = {name: f for name, f in self.factors.items() if isinstance(f, ManifoldParameter)}
        options: dict[str, Any] = {"lr": self.config.lr, "retraction": self.config.retraction}
        self.optimizer = (
            RiemannianAdam(self._groups(), **options)
            if self.config.optimizer == "adam"
            else RiemannianSGD(self._groups(), momentum=0.9, **options)
        )
        if saved is None:
            self.save()
            return
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(saved["factors"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
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
        return [{"params": list(self.points.items()), "ratio": self.config.lr_ratio}, {"params": free, "ratio": 1.0}]

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
                    "rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                    "losses": self.losses,
                    "tokens": self.tokens,
                    "orthogonality": self.orthogonality,
                    "seconds": dict(self.clock.seconds),
                    "fisher": asdict(self.scores),
                    "before": self.before,
                },
                content,
            )
            file.write_bytes(content.getbuffer())

    def train(self, save_every: int) -> None:
        """Take the remaining steps."""
        self.model.train()
        bar = progress(total=self.config.steps, initial=self.step, label="training")
        with bar:
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
            _onto(self.model, self.data.shuffled_batch(config.batch_size, i, config.seed))
            for i in range(self.step * accum, (self.step + 1) * accum)
        ]
        counts = [_label_count(batch) for batch in batches]
        loss = 0.0
        for batch, count in zip(batches, counts, strict=True):
            with _autocast(self.model):
                # Each token of the step counts the same, in whichever batch it is.
                part = self.model(**batch).loss * (count / sum(counts))
            part.backward()
            loss += float(part.detach())
        if not math.isfinite(loss):
            raise InputError(f"the loss at step {self.step + 1} is {loss}; {_REMEDY}")
        with self.clock.time("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = group["ratio"] * learning_rate(config, self.step)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.losses.append(loss)
        self.step += 1
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        self.tokens += tokens
        self.orthogonality = max(self.orthogonality, *(float(orthogonality_error(p)) for p in self.points.values()))
        return tokens

    def metrics(
        self, selected: list[int], names: list[str], before: dict[str, float], after: dict[str, float]
    ) -> dict[str, Any]:
        """Return what the run was and what came out of it."""
        by_layer = self.config.granularity == "layer"
        trainable = sum(factor.numel() for factor in self.factors.values())
        base = sum(p.numel() for p in self.model.parameters()) - trainable
        ranks = [measured["effective_rank"] for measured in adapter_metrics(self.model).values()]
        seconds = self.clock.seconds
        return {
            "versions": {
                "stiefel_lora": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in VERSIONED},
            },
            "config": asdict(self.config),
            "model": self.model.config._name_or_path,
            "data": {
                "training": self.data.description,
                "held_out": self.held_out.description,
                "format": self.data.format,
            },
            "device": str(next(self.model.parameters()).device),
            "fisher": asdict(self.scores),
            "selected": selected,
            "selected_layers": selected if by_layer else sorted({self.scores.layers[i] for i in selected}),
            "adapted_modules": names,
            "trainable_parameters": trainable,
            "trainable_share": trainable / (base + trainable),
            "loss_curve": self.losses,
            "held_out": {"before": before, "after": after},
            "perplexity_change": after["perplexity"] / before["perplexity"] - 1,
            "tokens_per_second": self.tokens / seconds["training"],
            "seconds": {**seconds, "total": sum(v for k, v in seconds.items() if k != "optimizer")},
            "greatest_orthogonality_error": self.orthogonality,
            "mean_effective_rank": sum(ranks) / len(ranks),
            "effective_rank_share": sum(ranks) / len(ranks) / self.config.rank,
            "skipped_updates": self.optimizer.skipped_updates,
        }


def _onto(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def _label_count(batch: dict[str, Tensor]) -> int:
    # A causal model predicts the next token, so the first has no loss.
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _autocast(model: nn.Module) -> Any:
    """Compute the adapters of a low-precision model in its precision on CUDA; elsewhere leave all as it is."""
    first = next(model.parameters())
    low = first.device.type == "cuda" and first.dtype != torch.float32
    return torch.autocast(first.device.type, dtype=first.dtype if low else None, enabled=low)
