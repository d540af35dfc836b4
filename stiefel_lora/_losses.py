"""From the loss of a batch to the gradient of each sample's own loss."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from stiefel_lora._batches import batch_size, check_rows, has_known_size, sample, take, undivided, values
from stiefel_lora._entropy import Rows
from stiefel_lora._gradnorms import GradientNorms, NotBatchedError
from stiefel_lora.errors import InputError, listed
from stiefel_lora.logits import deferred_logits

LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]

IGNORED = -100  # the label of a position without a loss, as in torch's cross entropy

# A share of all, beside which the shares of single linear maps are not compared more closely than this one.
_SMALL_SHARE = 0.03
# Relative rounding errors above this one are those of float16, bfloat16 and TF32.
_LOW_PRECISION = 1e-4
# A batch is taken in parts that keep at most this share of the model's own size for the backward pass, or these bytes.
_SHARE_OF_MODEL = 0.25
_LEAST_BYTES = 32 * 2**20


class SampleLosses:
    """Measures the gradient norms of each sample's own loss, as if it were scored alone.

    A model returns one loss for a batch, in which each sample has some weight. Where that loss is a mean cross entropy,
    the weights are seen where the mean is taken. Elsewhere they are equal, or shares of the labels, of what a mask
    leaves or of weights: which of these is found by evaluating the samples of each batch alone, without gradients. A
    loss that is none of them is taken one sample at a time, exact but slow.

    Args:
        model: The model; called as ``model(**batch)`` for its ``loss`` unless ``loss_fn`` is given.
        norms: Entered by the caller. Its sketches, if it has any, sum up the gradients of each sample's own loss, each
            sample once, without those that are not finite.
        loss_fn: Returns the losses of a batch, shape (batch,), or one number; one number for several samples is treated
            like the model's own.
    """

    def __init__(self, model: nn.Module, norms: GradientNorms, loss_fn: LossFn | None) -> None:
        self._model = model
        self._norms = norms
        self._sketches = norms.sketches
        self._loss_fn = loss_fn
        # None: nothing tried yet; empty: one at a time
        self._fitting: set[str] | None = set() if loss_fn is None and _balances_experts(model) else None
        self._rows_fit: bool | None = None  # Whether the rows of a mean cross entropy are the samples' in order
        self._checked = False
        self._is_number = False
        self._bytes_per_entry: float | None = None
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self._most_bytes = max(_LEAST_BYTES, _SHARE_OF_MODEL * size)

    def size(self, batch: Any) -> int:
        """Return how many samples a batch has."""
        return batch_size(batch, lambda: self._shape(batch))

    def measure(self, batch: Any, size: int) -> Tensor:
        """Return the squared gradient norms of a batch of that many samples, NaN where the loss is not finite.

        Returns:
            Shape (size, number of linears).
        """
        try:
            squared = self._measure(batch, size)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            whole = undivided(batch, size) if size > 1 else []
            if not whole or isinstance(error, InputError | torch.OutOfMemoryError):
                raise
            raise InputError(
                f"the {size} samples of a batch cannot be taken apart, if {listed(whole)} is not the same for all of "
                f"them; give batches of one sample ({error})"
            ) from error
        if self._sketches is not None:
            self._sketches.commit()
        return squared

    def _measure(self, batch: Any, size: int) -> Tensor:
        if size == 1:
            return self._together(batch, 1)
        if self._fitting == set():
            return self._one_by_one(batch, size)
        alone, loss = self._first_alone(batch, size) if self._bytes_per_entry is None else (None, None)
        rows = self._rows(batch, size)
        # Alone, a sample is not counted in the sketches.
        parts = [alone[None]] if rows == 1 and alone is not None and self._sketches is None else []
        parts += [
            self._together(take(batch, slice(n, n + rows), size), min(rows, size - n), first=None if n else loss)
            for n in range(len(parts), size, rows)
        ]
        squared = torch.cat(parts)
        # Sequence-first layers whose length is the batch size look as if they had the batch in front.
        if rows > 1 and not self._checked and self._is_mixed_up(batch, size, squared, alone):
            self._fitting = set()
            if self._sketches is not None:
                self._sketches.drop()
            return self._one_by_one(batch, size)
        return squared

    def _is_mixed_up(self, batch: Any, size: int, squared: Tensor, first: Tensor | None) -> bool:
        """Tell whether a sample of a batch, the first that allows it, has other norms than when it is alone.

        ``first`` are those of the first sample alone, if they are known.
        """
        # Models of float64 compute their norms in float32 all the same.
        eps = max(self._norms.eps, torch.finfo(torch.float32).eps)
        for n in range(size):
            known = first if n == 0 else None
            alone = self._evaluate(sample(batch, n, size), 1)[0][0] if known is None else known
            shares = torch.stack([alone / alone.sum(), squared[n] / squared[n].sum()])
            if shares.isfinite().all():
                self._checked = True
                return not _same_shares(shares[0], shares[1], eps)
        return False

    def _first_alone(self, batch: Any, size: int) -> tuple[Tensor, Tensor]:
        """Return the norms and the loss of the first sample, and see how much it keeps for the backward pass."""
        squared, loss = self._evaluate(sample(batch, 0, size), 1)
        self._bytes_per_entry = size * self._norms.saved_bytes / _entries(batch)
        return squared[0], loss.sum()

    def _rows(self, batch: Any, size: int) -> int:
        """Return how many samples of a batch are evaluated together, so that they fit into the memory."""
        of_a_sample = (self._bytes_per_entry or 0) * _entries(batch) / size
        most = max(1, int(self._most_bytes / max(1.0, of_a_sample)))
        # In parts of nearly the same size: a small part takes more time a sample.
        return math.ceil(size / math.ceil(size / most))

    def _together(self, batch: Any, size: int, *, first: Tensor | None = None) -> Tensor:
        """Return the squared norms of samples evaluated together; ``first`` is the loss of the first one alone."""
        try:
            squared, losses = self._evaluate(batch, size)
        except NotBatchedError:
            self._fitting = set()
            return self._one_by_one(batch, size)
        if losses.dim() or size == 1:
            if not losses.dim() and not has_known_size(batch):
                raise InputError(
                    f"how many samples a batch of type {type(batch).__name__} has cannot be told; let loss_fn return "
                    "one loss for each, of shape (1,) for a batch of one sample"
                )
            self._keep(squared, torch.ones(size))
            return squared
        weights = self._weights(batch, size, losses, first) if bool(losses.isfinite()) else None
        if weights is None:
            return self._one_by_one(batch, size)
        squared = squared / weights.to(squared)[:, None].square()
        self._keep(squared, weights)
        return squared

    def _evaluate(self, batch: Any, size: int) -> tuple[Tensor, Tensor]:
        """Return the squared norms under the loss of a batch, and that loss: one number, or one for each sample."""
        losses = torch.empty(0)

        def forward() -> Tensor:
            nonlocal losses
            losses = self._losses(batch)
            if losses.dim() and losses.shape != (size,):
                raise InputError(
                    f"the loss of a batch of size {size} must be one number or of shape ({size},), "
                    f"got {tuple(losses.shape)}"
                )
            return losses.sum() if losses.dim() else losses

        squared = self._norms.measure(forward, size)
        losses = losses.detach()
        if losses.dim() or size == 1:
            infinite = ~losses.isfinite().reshape(-1, 1)
            squared = squared.masked_fill(infinite.to(squared.device), torch.nan)
        return squared, losses

    def _keep(self, squared: Tensor, weights: Tensor) -> None:
        """Keep the sketches of the samples that are finite, of which the loss was the weighted sum."""
        if self._sketches is not None:
            finite = squared.isfinite().all(1).nonzero().squeeze(1)
            self._sketches.keep(finite, 1 / weights.to(squared)[finite])

    @torch.no_grad()
    def _shape(self, batch: Any) -> tuple[int, ...]:
        """Return the shape of the loss, () without a look if that of the batch before was one number."""
        if not self._is_number:
            shape = tuple(self._losses(batch).shape)
            self._is_number = not shape
        return () if self._is_number else shape

    def _losses(self, batch: Any) -> Tensor:
        return batch_losses(self._model, batch, self._loss_fn)

    @torch.no_grad()
    def _alone(self, batch: Any, size: int, count: int) -> Tensor:
        """Return the losses of the first samples when each is evaluated alone, shape (count,), in float64."""
        return torch.stack([self._losses(sample(batch, n, size)).double().sum() for n in range(count)])

    def _one_by_one(self, batch: Any, size: int) -> Tensor:
        return torch.cat([self._together(sample(batch, n, size), 1) for n in range(size)])

    def _weights(self, batch: Any, size: int, total: Tensor, first: Tensor | None) -> Tensor | None:
        """Return each sample's weight in the batch's loss, None if it cannot be told."""
        seen = self._seen_weights(batch, size, total, first)
        if seen is not None:
            return seen
        eps = torch.finfo(total.dtype).eps
        if eps > _LOW_PRECISION:  # too coarse to tell one way from another
            self._fitting = set()
            return None
        candidates = {
            name: weights
            for name, weights in _reductions(batch, size).items()
            if self._fitting is None or name in self._fitting
        }
        # For each batch: one of full samples fits many ways of which another, of samples of all lengths, fits one.
        alone = self._alone(batch, size, size)
        tolerance = _rounding(eps) * float(alone.nan_to_num().abs().max())
        candidates = {
            name: weights
            for name, weights in candidates.items()
            # A sample without labels has the weight zero and no loss of its own.
            if abs(float((weights.to(alone) * alone).nan_to_num().sum() - total)) <= tolerance
        }
        self._fitting = set(candidates)
        if not candidates or not _agree(list(candidates.values())):
            return None
        return next(iter(candidates.values()))

    def _seen_weights(self, batch: Any, size: int, total: Tensor, first: Tensor | None) -> Tensor | None:
        """Return each sample's weight in a mean cross entropy, None if the loss is something else."""
        if self._norms.rows is None or self._rows_fit is False or not _in_order(self._norms.rows, batch, size):
            return None
        rows = self._norms.rows.losses.double().view(size, -1)
        if self._rows_fit is None:
            first = self._alone(batch, size, 1)[0] if first is None else first
            if not first.isfinite():
                return None  # a sample without labels tells nothing
            eps = max(self._norms.eps, torch.finfo(total.dtype).eps)
            self._rows_fit = bool((rows[0].nanmean() - first).abs() <= _rounding(eps) * first.abs())
            if not self._rows_fit:
                return None
        counts = (~rows.isnan()).sum(1).double()
        return counts / counts.sum()


def _in_order(rows: Rows, batch: Any, size: int) -> bool:
    """Tell whether a cross entropy's rows are the samples', each as many: not where positions were picked before.

    Then the targets are those in the batch, in place or the next ones; where they are ignored it does not matter.
    """
    if len(rows.targets) % size:
        return False
    targets, ignored = rows.targets.view(size, -1), rows.losses.isnan().view(size, -1)
    return any(
        bool(((known == targets) | ignored).all())
        for value in values(batch)
        if _may_be_labels(value, size)
        for known in _aligned(value.reshape(size, -1).to(targets), targets.shape[1])
    )


def _balances_experts(model: nn.Module) -> bool:
    """Tell whether a model of transformers adds to its loss how evenly a whole batch is routed to a mixture's experts.

    That is no sum of the samples' losses, and may be too small to be told from one by the losses alone.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    return any(getattr(c, "output_router_logits", False) is True for c in (config, text))


def _may_be_labels(value: Any, size: int) -> bool:
    is_whole = isinstance(value, Tensor) and value.numel() > 0 and not value.is_floating_point()
    return is_whole and value.shape[:1] == (size,)


def _may_be_weights(value: Any, size: int) -> bool:
    is_real = isinstance(value, Tensor) and value.numel() > 0 and value.is_floating_point()
    return (
        is_real
        and value.shape[:1] == (size,)
        and value.dim() <= 2
        and bool((value >= 0).all() & value.isfinite().all())
    )


def _aligned(labels: Tensor, length: int) -> Iterator[Tensor]:
    """Yield labels of shape (batch, T) in place, and the next ones with and without a place for the last."""
    following = labels[:, 1:]
    for known in (labels, following, pad(following, (0, 1), value=IGNORED)):
        if known.shape[1] == length:
            yield known


def batch_losses(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """Return the loss of a batch, one number or one for each sample."""
    if loss_fn is not None:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
        return loss
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a mapping for model(**batch), got {type(batch).__name__}; or give loss_fn=")
    check_rows(batch)
    with deferred_logits(model):
        output = model(**batch)
    # As models with return_dict=False do, and as transformers' Trainer reads them.
    found = output[0] if _begins_with_loss(output) and "labels" in batch else _entry(output, "loss")
    if found is None:
        raise InputError(
            f"the model returned no loss for a batch of {', '.join(map(str, batch)) or 'nothing'}; add labels to it, "
            "or give loss_fn="
        )
    return found


def _begins_with_loss(output: Any) -> bool:
    return type(output) is tuple and bool(output) and isinstance(output[0], Tensor) and not output[0].dim()


def _rounding(eps: float) -> float:
    """Return what two evaluations may differ by in a precision, relatively: batches round differently."""
    return (8 if eps > _LOW_PRECISION else 100) * eps


def _same_shares(first: Tensor, second: Tensor, eps: float) -> bool:
    """Tell whether linear maps have the same shares, up to what precision may change; far more do mixed-up samples."""
    return bool(((first - second).abs() <= eps**0.5 * (torch.maximum(first, second) + _SMALL_SHARE)).all())


def _entries(batch: Any) -> int:
    """Return the number of entries of the first tensor in a batch, a measure of what its activations take."""
    return next((value.numel() for value in values(batch) if isinstance(value, Tensor) and value.dim()), 1)


def _entry(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _reductions(batch: Any, size: int) -> dict[str, Tensor]:
    """Return the weights of a batch's samples in its loss under each usual reduction."""
    found = {"mean": torch.full((size,), 1 / size, dtype=torch.float64), "sum": torch.ones(size, dtype=torch.float64)}
    for place, value in enumerate(values(batch)):
        # Whatever may be labels, a mask of what counts or weights, in place or at the next position.
        if _may_be_labels(value, size):
            value = value.reshape(size, -1)
            found.update(_shares(f"mean over labels {place}", value != IGNORED))
            found.update(_shares(f"mean over mask {place}", (value == 1) & (value.amax() <= 1)))
        elif _may_be_weights(value, size):
            found.update(_shares(f"mean with the weights {place}", value.reshape(size, -1)))
    return found


def _shares(name: str, counts: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the samples' shares of what counts, shape (batch, T), in place and at the next position."""
    for shift in (0, 1):
        count = counts[:, shift:].sum(1, dtype=torch.float64)
        if count.sum() > 0:
            yield f"{name} from {shift}", (count / count.sum()).cpu()


def _agree(candidates: list[Tensor]) -> bool:
    return all(torch.allclose(candidates[0], other, rtol=1e-9, atol=0) for other in candidates[1:])


class LabelSampler:
    """Draws labels from the model's own output, which turns the empirical Fisher information into the true one.

    Args:
        model: A model whose output has ``logits``, and whose loss is their cross entropy with ``labels``, at the same
            positions or (in a causal language model) shifted by one.
        seed: Seed of the draws, which do not touch torch's global generators.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model = model
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._shift: int | None = None
        self._decoder_inputs: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def draw(self, batch: Any) -> dict[str, Any]:
        """Return the batch with labels drawn where it has labels.

        What an encoder-decoder's decoder reads stays what the data's labels make of it.

        Raises:
            InputError: If there are no class labels or logits, the loss is not their cross entropy, or it is not known
                how the model makes its decoder's inputs of the labels.
        """
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or not labels.dim() or labels.is_floating_point():
            raise InputError("labels='model' needs batches with integer labels, whose places say what to draw")
        output = self._model(**batch)
        logits, loss = _entry(output, "logits"), _entry(output, "loss")
        if logits is None or loss is None or logits.shape[:-1] != labels.shape:
            raise InputError("labels='model' needs a model with a loss, and logits of the labels' shape and classes")
        batch = self._with_decoder_inputs(batch, logits)
        if self._shift is None:
            self._shift = self._find_shift(batch)
        if self._generator is None:
            self._generator = torch.Generator(logits.device).manual_seed(self._seed)
        # Of a sample that is not finite it does not matter what is drawn: it will be left out.
        probabilities = logits.reshape(-1, logits.shape[-1]).float().softmax(-1).nan_to_num(nan=1.0)
        drawn = torch.multinomial(probabilities, 1, generator=self._generator).view(labels.shape)
        if self._shift:
            drawn = torch.cat((labels[..., :1], drawn[..., :-1]), dim=-1)
        return {**batch, "labels": torch.where(labels == IGNORED, labels, drawn)}

    def _with_decoder_inputs(self, batch: Mapping[str, Any], logits: Tensor) -> Mapping[str, Any]:
        """Return the batch with the decoder's inputs, if the model would make them of the labels."""
        config = getattr(self._model, "config", None)
        given = any(batch.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if given or not getattr(config, "is_encoder_decoder", False):
            return batch
        labels = batch["labels"]
        if self._decoder_inputs is None:
            others = torch.where(labels == IGNORED, labels, (labels + 1) % logits.shape[-1])
            if _same_logits(self._model(**{**batch, "labels": others}), logits):
                return batch  # a classifier's labels, say
            self._decoder_inputs = next(
                (
                    shifted
                    for shifted in _label_shifts(self._model)
                    if _same_logits(self._model(**{**batch, "decoder_input_ids": shifted(labels)}), logits)
                ),
                None,
            )
        if self._decoder_inputs is None:
            raise InputError(
                f"how {type(self._model).__name__} makes its decoder's inputs of the labels is not known, and for "
                "labels='model' they must stay as they are; put decoder_input_ids into the batches"
            )
        return {**batch, "decoder_input_ids": self._decoder_inputs(labels)}

    def _find_shift(self, batch: Any) -> int:
        """Find out from samples with a finite loss, until one shift alone fits; 0 without any: all will be left out."""
        size = len(batch["labels"])
        errors: dict[int, float] = {}
        for n in range(size):
            one = sample(batch, n, size)
            output = self._model(**one)
            if not output["loss"].isfinite():
                continue
            fitting = _label_shifts_of(output["loss"], output["logits"], one["labels"])
            errors = {shift: error + errors.get(shift, 0.0) for shift, error in fitting.items()}
            if len(errors) == 1:
                break
        return min(errors, key=errors.__getitem__, default=0)


def _label_shifts(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the functions by which transformers' encoder-decoders may make their decoder's inputs of labels."""
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, name):
            yield getattr(model, name)
    for kind in type(model).__mro__:
        shift = getattr(sys.modules.get(kind.__module__), "shift_tokens_right", None)
        if shift is not None:
            config: Any = model.config
            tokens = [config.pad_token_id, config.decoder_start_token_id][: len(signature(shift).parameters) - 1]
            yield lambda labels, shift=shift, tokens=tokens: shift(labels, *tokens)  # type: ignore[misc]


def _same_logits(output: Any, logits: Tensor) -> bool:
    found = _entry(output, "logits")
    return found is not None and torch.equal(found.nan_to_num(), logits.nan_to_num())


def _label_shifts_of(loss: Tensor, logits: Tensor, labels: Tensor) -> dict[int, float]:
    """Return the shifts that fit, 1 for a loss that compares logits with the next label, 0 for the one in place.

    Each comes with its error. In a low precision both may fit.
    """
    # The model may have taken the mean in its own precision, or in float32.
    tolerance = max(2 * torch.finfo(loss.dtype).eps, 1e-4) * float(loss.abs())
    errors = {}
    for shift in (1, 0) if labels.dim() > 1 else (0,):
        scores = logits[..., : logits.shape[-2] - shift, :] if shift else logits
        wanted = labels[..., shift:] if shift else labels
        scores, wanted = scores.reshape(-1, scores.shape[-1]), wanted.reshape(-1)
        ours = [cross_entropy(x, wanted, ignore_index=IGNORED) for x in (scores, scores.float())]
        errors[shift] = min(float((x - loss).abs()) for x in ours)
    fitting = {shift: error for shift, error in errors.items() if error <= tolerance}
    if not fitting:
        raise InputError("labels='model' needs a model whose loss is the mean cross entropy of its logits and labels")
    return fitting
