"""`deferred_logits`: the same losses and gradients with a few of the logits at a time, and logits for who asks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from stiefel_lora import InputError, _head_loss, add_adapters, deferred_logits, fisher_scores, logits
from stiefel_lora._head_loss import head_losses

CLASSES = 301
SIZES: dict[str, Any] = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=CLASSES, n_embd=32, n_layer=2, n_head=4)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),  # its head has a bias
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=CLASSES, decoder_start_token_id=0, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8
        )
    ),
}


def frozen(make: Callable[[], Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return make().eval().requires_grad_(False).to(dtype)


def a_batch(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, CLASSES, (3, 20), generator=generator)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    labels = ids.clone()
    labels[0, :7] = -100
    return {"inputs_embeds": embeddings, "labels": labels}


class Largest(TorchDispatchMode):
    """Records the most rows of as many columns as there are classes."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if type(x) is Tensor and x.shape[-1:] == (CLASSES,) and x.device.type != "meta":
                self.rows = max(self.rows, x.numel() // CLASSES)
        return found


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let many lots of rows and parts of the classes be needed, the last ones short."""
    monkeypatch.setattr(_head_loss, "_ROWS", 7)
    monkeypatch.setattr(_head_loss, "_ENTRIES", 7 * 50)
    monkeypatch.setattr(_head_loss, "_CLASSES", 1)


def loss_and_gradient(
    model: Any, context: Any, loss_of: Callable[[Any, Tensor], Tensor] = lambda output, labels: output.loss
) -> tuple[Tensor, Tensor]:
    batch = a_batch(model)
    with context:
        loss = loss_of(model(**batch), batch["labels"])
    loss.backward()
    gradient = batch["inputs_embeds"].grad
    assert gradient is not None
    return loss.detach(), gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("small_parts")
def test_loss_and_gradient_are_those_of_all_logits(name: str) -> None:
    model = frozen(MODELS[name])
    expected = loss_and_gradient(model, nullcontext())
    with Largest() as made:
        found = loss_and_gradient(model, deferred_logits(model))
    # Models take the loss in float32, in which its gradient is rounded.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    # The head's own weight, turned, has as many columns.
    assert made.rows <= 32
    with Largest() as made:
        loss_and_gradient(model, nullcontext())
    assert made.rows >= 57


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_parts")
def test_in_lower_precisions_they_differ_by_rounding(dtype: torch.dtype) -> None:
    exact = loss_and_gradient(frozen(MODELS["llama"]), nullcontext())
    model = frozen(MODELS["llama"], dtype)
    errors = [
        [(x.double() - y).norm() / y.norm() for x, y in zip(loss_and_gradient(model, context), exact, strict=True)]
        for context in (nullcontext(), deferred_logits(model))
    ]
    # Both round as often; which is closer to the exact one is luck.
    assert all(ours < 2 * theirs + 10 * torch.finfo(dtype).eps for theirs, ours in zip(*errors, strict=True))


@pytest.mark.usefixtures("small_parts")
def test_under_autocast_they_differ_by_rounding() -> None:
    model = frozen(MODELS["llama"], torch.float32)

    def losses(context: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_and_gradient(model, context)

    for found, expected in zip(losses(deferred_logits(model)), losses(nullcontext()), strict=True):
        assert (found - expected).norm() <= 2e-2 * expected.norm()


def of_all(output: Any, labels: Tensor) -> Tensor:
    return output.logits.logsumexp(-1).mean()


def capped(output: Any, labels: Tensor) -> Tensor:
    return cross_entropy(30 * (output.logits / 30).tanh().view(-1, CLASSES), labels.view(-1))


def smoothed(output: Any, labels: Tensor) -> Tensor:
    return cross_entropy(output.logits.view(-1, CLASSES), labels.view(-1), label_smoothing=0.1)


def summed(output: Any, labels: Tensor) -> Tensor:
    shifted = output.logits[..., :-1, :].contiguous().view(-1, output.logits.size(-1))
    return cross_entropy(shifted, labels[..., 1:].reshape(-1), reduction="sum") / 40


def one_word(output: Any, labels: Tensor) -> Tensor:
    return output.logits[:, -1].square().mean() + output.logits[:, :, 5].mean() + output.logits[1:, :3, :].mean()


def looked_at_first(output: Any, labels: Tensor) -> Tensor:
    with torch.no_grad():
        assert output.logits.argmax(-1).shape == labels.shape
    return output.loss + of_all(output, labels)


class Squares(torch.autograd.Function):
    """A loss that Python's part of torch does not see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


def by_a_function(output: Any, labels: Tensor) -> Tensor:
    return Squares.apply(output.logits)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("loss_of", [of_all, capped, smoothed, summed, one_word, looked_at_first, by_a_function])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.usefixtures("small_parts")
def test_whoever_asks_for_the_logits_has_them(loss_of: Callable[[Any, Tensor], Tensor], inside: bool) -> None:
    model = frozen(MODELS["llama"])
    expected = loss_and_gradient(model, nullcontext(), loss_of)
    if inside:
        found = loss_and_gradient(model, deferred_logits(model), loss_of)
    else:
        batch = a_batch(model)
        with deferred_logits(model):
            output = model(**batch)
        loss = loss_of(output, batch["labels"])
        loss.backward()
        found = loss.detach(), batch["inputs_embeds"].grad
    # The model's own loss, where it takes part, is of float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_logits_look_like_a_tensor() -> None:
    model = frozen(MODELS["llama"], torch.float32)
    batch = a_batch(model)
    expected = model(**batch).logits
    with deferred_logits(model):
        found = model(**batch).logits
    assert isinstance(found, Tensor) and isinstance(found, logits.Logits)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.size(-1) == CLASSES and found.dim() == 3 and found.numel() == expected.numel()
    assert found.is_deferred
    assert repr(found) == repr(expected)
    assert not found.is_deferred
    torch.testing.assert_close(found.detach(), expected.detach())
    assert type(found.detach()) is Tensor


@pytest.mark.usefixtures("small_parts")
def test_without_gradients_nothing_is_kept() -> None:
    model = frozen(MODELS["llama"])
    batch = a_batch(model)
    with torch.no_grad(), deferred_logits(model), Largest() as made:
        found = model(**batch).loss
    assert made.rows <= 32 and not found.requires_grad
    torch.testing.assert_close(found, model(**batch).loss.detach(), rtol=1e-6, atol=0)


def test_of_no_labels_the_loss_is_nan_and_the_gradient_zero() -> None:
    model = frozen(MODELS["llama"])
    for context in (nullcontext(), deferred_logits(model)):
        batch = a_batch(model)
        batch["labels"].fill_(-100)
        with context:
            loss = model(**batch).loss
        loss.backward()
        assert loss.isnan()
        assert batch["inputs_embeds"].grad is not None and not batch["inputs_embeds"].grad.any()


@contextmanager
def hooked(model: Any) -> Iterator[None]:
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def trained(model: Any) -> Iterator[None]:
    model.lm_head.weight.requires_grad_(True)
    yield


@contextmanager
def adapted(model: Any) -> Iterator[None]:
    from stiefel_lora.adapters import insert_adapters

    insert_adapters(model, {"lm_head": {"rank": 2}})
    yield


@contextmanager
def half(model: Any) -> Iterator[None]:
    model.half()
    yield


@pytest.mark.parametrize("changed", [hooked, trained, adapted, half])
def test_a_head_that_is_more_than_a_frozen_linear_map_stays(changed: Callable[[Any], Any]) -> None:
    model = frozen(MODELS["llama"], torch.float32)
    with changed(model), deferred_logits(model):
        assert type(model(**{k: v for k, v in a_batch(model).items()}).logits) is Tensor


def test_the_head_comes_back_and_other_models_are_left_alone() -> None:
    model = frozen(MODELS["llama"], torch.float32)
    before = dict(vars(model.lm_head))
    with pytest.raises(ZeroDivisionError), deferred_logits(model):
        assert "forward" in vars(model.lm_head)
        1 / 0  # noqa: B018
    assert vars(model.lm_head) == before
    with deferred_logits(model), deferred_logits(model):  # one in the other
        assert isinstance(model(**a_batch(model)).logits, logits.Logits)
    assert vars(model.lm_head) == before
    plain = nn.Linear(3, 2)
    with deferred_logits(plain):
        assert type(plain(torch.zeros(1, 3))) is Tensor


@pytest.mark.usefixtures("small_parts")
def test_adapters_train_as_with_all_logits() -> None:
    def gradients(defer: bool) -> list[Tensor]:
        model = frozen(MODELS["llama"])
        torch.manual_seed(0)
        add_adapters(model, layers=None, rank=2)
        labels = a_batch(model)["labels"]
        with deferred_logits(model) if defer else nullcontext():
            model(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    # The factors are float32.
    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-7)


def head_and_input(scale: float = 20.0) -> tuple[Any, Tensor, Tensor]:
    model = frozen(MODELS["llama"], torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(9, 32, generator=generator)).requires_grad_(True)
    return model, hidden, torch.randint(CLASSES, (9,), generator=generator)


def test_second_derivatives_are_refused() -> None:
    model = frozen(MODELS["llama"])
    batch = a_batch(model)
    with deferred_logits(model):
        loss = model(**batch).loss
    with pytest.raises(InputError, match="no second derivative; leave deferred_logits off"):
        torch.autograd.grad(loss, batch["inputs_embeds"], create_graph=True)


@pytest.mark.parametrize("name", ["llama", "bert"])  # the latter leaves its logits in bfloat16
def test_autocast_takes_the_loss_in_float32(name: str) -> None:
    model = frozen(MODELS[name], torch.float32)
    batch = a_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
        with deferred_logits(model):
            found = model(**batch).loss
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # both of the same rounded logits


def test_the_head_multiplies_in_the_precision_that_it_was_called_in() -> None:
    model, hidden, target = head_and_input()
    with deferred_logits(model):
        found = model.lm_head(hidden)
        other = model.lm_head(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        loss, values = cross_entropy(found, target), other + 0
    expected = model.lm_head(hidden)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(loss, cross_entropy(expected, target))


@pytest.mark.parametrize("look", [torch.no_grad, torch.inference_mode])
def test_who_looks_without_gradients_takes_none_from_the_next(look: Callable[[], Any]) -> None:
    model, hidden, _ = head_and_input()
    with deferred_logits(model):
        found = model.lm_head(hidden)
    with look():
        found.argmax(-1)
    found.logsumexp(-1).sum().backward()
    (expected,) = torch.autograd.grad(model.lm_head(hidden).logsumexp(-1).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected)


def test_logits_made_without_gradients_have_none() -> None:
    model, hidden, target = head_and_input()
    with deferred_logits(model), torch.no_grad():
        found = model.lm_head(hidden)
    assert not found.requires_grad
    assert not cross_entropy(found, target).requires_grad
    assert not (found + 1).requires_grad


def test_hooks_on_a_gradient_that_is_not_made_are_refused() -> None:
    model, hidden, _ = head_and_input()
    with deferred_logits(model):
        found = model.lm_head(hidden)
    with pytest.raises(InputError, match=r"no gradient to look at, got retain_grad\(\)"):
        found.retain_grad()
    with pytest.raises(InputError, match=r"got register_hook\(\)"):
        found.register_hook(lambda g: g)


def test_logits_that_went_through_another_function_give_it_the_gradient() -> None:
    def gradient(context: Any) -> Tensor:
        model, hidden, target = head_and_input()
        with context(model):
            found: Any = checkpoint(model.lm_head, hidden, use_reentrant=True)
        cross_entropy(found, target).backward()
        assert hidden.grad is not None
        return hidden.grad

    torch.testing.assert_close(gradient(deferred_logits), gradient(lambda model: nullcontext()))


def test_what_is_changed_before_the_logits_are_looked_at_is_refused() -> None:
    def change_input(model: Any, x: Tensor) -> None:
        x.mul_(2)

    def change_head(model: Any, x: Tensor) -> None:
        model.lm_head.weight.mul_(2)

    def convert(model: Any, x: Tensor) -> None:
        model.to(torch.bfloat16)

    for change in (change_input, change_head, convert):
        model, hidden, target = head_and_input()
        hidden = hidden.detach().clone()
        with deferred_logits(model):
            found = model.lm_head(hidden)
        change(model, hidden)
        for use in (lambda x, t: x + 1, cross_entropy, lambda x, t: x[1:]):
            with pytest.raises(InputError, match="was changed before these were looked at"):
                use(found, target)


def test_a_head_that_is_unfrozen_within_the_context_is_trained() -> None:
    model = frozen(MODELS["llama"])
    with deferred_logits(model):
        model.lm_head.weight.requires_grad_(True)
        model(**a_batch(model)).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_another_weight_for_the_head_counts() -> None:
    model, hidden, _ = head_and_input()
    weight = torch.randn_like(model.lm_head.weight).requires_grad_(True)
    with deferred_logits(model):
        found = torch.func.functional_call(model.lm_head, {"weight": weight}, (hidden,))
        still = torch.func.functional_call(model.lm_head, {"weight": weight.detach()}, (hidden,))
    torch.testing.assert_close(found, hidden @ weight.mT)
    torch.testing.assert_close(still + 0, hidden @ weight.mT)


def test_views_share_their_memory() -> None:
    model, hidden, target = head_and_input()
    with deferred_logits(model):
        found = model.lm_head(hidden)
    view, part, copy = found.view(3, 3, CLASSES), found[2:], found.to(torch.float64)
    with torch.no_grad():
        view[..., 5] = -1e4
    expected = model.lm_head(hidden).detach()
    expected[:, 5] = -1e4
    torch.testing.assert_close(part.detach(), expected[2:])
    with pytest.raises(InputError, match="or what its logits are a copy of was changed"):
        copy + 1
    torch.testing.assert_close(cross_entropy(found, target).detach(), cross_entropy(expected, target))


@pytest.mark.parametrize(
    "target", [torch.tensor([4]), torch.zeros(9, dtype=torch.int32), torch.full((9, CLASSES), 1 / CLASSES)]
)
def test_other_targets_are_torchs(target: Tensor) -> None:
    model, hidden, _ = head_and_input()

    def outcome(context: Any) -> Any:
        with context:
            found = model.lm_head(hidden)
        try:
            return cross_entropy(found, target).detach()
        except Exception as error:  # whatever torch makes of it
            return type(error), str(error)

    found, expected = outcome(deferred_logits(model)), outcome(nullcontext())
    assert found == expected or torch.allclose(found, expected)


def test_transforms_of_functions_see_the_plain_head() -> None:
    model, hidden, target = head_and_input()
    with deferred_logits(model):
        found = torch.func.grad(lambda x: cross_entropy(model.lm_head(x), target))(hidden.detach())
    (expected,) = torch.autograd.grad(cross_entropy(model.lm_head(hidden), target), hidden)
    torch.testing.assert_close(found, expected)


def test_a_loss_of_logits_that_were_looked_at_is_scored_the_same() -> None:
    model = frozen(MODELS["llama"], torch.float32)
    ids = a_batch(model)["labels"].clamp(min=0)
    batches = [{"input_ids": ids, "labels": ids}]

    def loss_fn(model: Any, batch: dict[str, Tensor]) -> Tensor:
        with deferred_logits(model):
            output = model(input_ids=batch["input_ids"])
        assert output.logits.isfinite().all()
        return cross_entropy(output.logits[:, :-1].reshape(-1, CLASSES), batch["labels"][:, 1:].reshape(-1))

    found = fisher_scores(model, batches, loss_fn=loss_fn, progress=False).scores
    # Float32 rounding.
    assert found == pytest.approx(fisher_scores(model, batches, progress=False).scores, rel=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_scoring_makes_no_logits() -> None:
    model = frozen(MODELS["llama"], torch.float32)
    ids = a_batch(model)["labels"].clamp(min=0)
    batch = {"input_ids": ids, "labels": ids}
    with Largest() as made:
        fisher_scores(model, [batch], progress=False)
    assert made.rows <= 32


# -- the loss of a head ------------------------------------------------------------------------------------------------


def a_head(scale: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input, weight, bias and targets; the logits are about so many in size."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, dtype=torch.float64, generator=generator)
    weight = torch.randn(CLASSES, 16, dtype=torch.float64, generator=generator) * scale / 4
    bias = torch.randn(CLASSES, dtype=torch.float64, generator=generator)
    target = torch.randint(CLASSES, (20,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), target


def dense(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and gradient as the formula says, in float64."""
    hidden = hidden.double().requires_grad_(True)
    whole = hidden @ weight.double().T + (0 if bias is None else bias.double())
    losses = whole.logsumexp(1) - whole.gather(1, target[:, None]).squeeze(1)
    ((share.double() * losses).sum()).backward()
    assert hidden.grad is not None
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.usefixtures("small_parts")
def test_losses_of_a_head_are_the_formulas(scale: float, has_bias: bool) -> None:
    hidden, weight, bias, target = a_head(scale)
    factors = hidden, weight, bias if has_bias else None, target
    share = torch.rand(20, dtype=torch.float64)
    expected = dense(*factors, share)
    torch.testing.assert_close(head_losses(*factors, torch.float64, share), expected, rtol=1e-12, atol=1e-12)
    losses, none = head_losses(*factors, torch.float64)
    torch.testing.assert_close(losses, expected[0], rtol=1e-12, atol=1e-12)
    assert none is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_parts")
def test_the_gradient_of_a_target_that_is_all_but_certain_keeps_its_digits(dtype: torch.dtype) -> None:
    hidden, weight, bias, _ = a_head(3.0, dtype)
    # What is likeliest, by a margin: its probability is about 1 - 1e-4, which bfloat16 does not tell from 1.
    target = (hidden @ weight.T).argmax(1)
    bias[:] = 0
    weight = weight + 0.5 * torch.nn.functional.one_hot(target, CLASSES).to(dtype).T @ hidden
    share = torch.ones(20)
    losses, gradient = dense(hidden, weight, bias, target, share)
    confident = losses < 1e-2
    assert confident.sum() > 5
    _, found = head_losses(hidden, weight, bias, target, torch.float32, share)
    assert found is not None
    error = (found.double() - gradient)[confident].norm(dim=1) / gradient[confident].norm(dim=1)
    # The logits and the products are rounded; 1 less a probability is not.
    assert float(error.max()) < 100 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("small_parts")
def test_great_logits_lose_no_more_than_their_own_rounding() -> None:
    hidden, weight, _, target = a_head(1.0, torch.float32)
    # A number added to all logits changes nothing; these are about 1e6 in size and 1 apart, by an exact product.
    hidden, weight = hidden.round(), weight.mul(4).round()
    hidden[:, 0], weight[:, 0] = 1.0, 2.0**20
    share = torch.ones(20)
    expected = dense(hidden, weight, None, target, share)
    losses, gradient = head_losses(hidden, weight, None, target, torch.float32, share)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-6, atol=1e-6)
    assert gradient is not None
    # That of the first feature is 2^20 times a sum of probabilities less 1, which is 0.
    torch.testing.assert_close(gradient[:, 1:].double(), expected[1][:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("small_parts")
def test_classes_that_are_ruled_out_have_no_part() -> None:
    hidden, weight, bias, target = a_head(1.0)
    bias[100:200] = -torch.inf  # two whole parts of them
    bias[:50] = -torch.inf  # the first
    target = target % 50 + 50
    share = torch.ones(20, dtype=torch.float64)
    expected = dense(hidden, weight, bias, target, share)
    torch.testing.assert_close(head_losses(hidden, weight, bias, target, torch.float64, share), expected)
    losses, _ = head_losses(hidden, weight, bias, target * 0, torch.float64, share)
    assert losses.isposinf().all()


@pytest.mark.usefixtures("small_parts")
def test_a_logit_that_is_not_a_number_makes_the_loss_none() -> None:
    hidden, weight, bias, target = a_head(1.0)
    for bad in (torch.nan, torch.inf):
        bias[150] = bad
        losses, gradient = head_losses(hidden, weight, bias, target, torch.float64, torch.ones(20).double())
        assert gradient is not None and losses.isnan().all() and gradient.isnan().all()


def test_a_target_that_is_no_class_is_refused_as_by_torch() -> None:
    hidden, weight, bias, target = a_head(1.0)
    target[3] = CLASSES
    with pytest.raises(IndexError):
        cross_entropy(hidden @ weight.T, target)
    with pytest.raises(IndexError):
        head_losses(hidden, weight, bias, target, torch.float64)
    model = frozen(MODELS["llama"])
    with deferred_logits(model), pytest.raises(IndexError):
        cross_entropy(model(input_ids=target[None] % CLASSES).logits[0], target)
