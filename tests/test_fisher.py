"""Fisher scores against one-sample autograd gradients, on real model classes; selection; errors."""

import copy
import math
import warnings
from collections import namedtuple
from typing import Any

import pytest
import torch
import transformers
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from stiefel_lora import _gradnorms
from stiefel_lora._entropy import LeanCrossEntropy
from stiefel_lora._gradnorms import GradientNorms
from stiefel_lora._losses import LabelSampler, SampleLosses
from stiefel_lora._models import find_linears, undisturbed
from stiefel_lora._sketches import GradientSketches
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import Scoring, _is_stable, _Looks, _upper_tail, fisher_scores, fisher_select, score
from tests.models import ENCODER, FAMILIES, Loss, causal_batch, class_batch, masked_batch, plain_batch, side_by_side
from tests.reference import fisher as reference

LLAMA = FAMILIES["llama"]

# These classes of transformers compute norms, rotary embeddings or the loss in float32 whatever the model's dtype.
FLOAT32_INSIDE = {
    "opt",
    "llama",
    "llama-tied",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "gpt2",
    "gpt-neox",
}


def linear_weights(model: nn.Module, layers: str | None = None) -> dict[str, Tensor]:
    found = find_linears(model, layers=layers)
    return {name: module.weight for layer in found.values() for name, module in layer.items()}


def expected_by_module(model: nn.Module, batch: dict[str, Tensor], layers: str | None = None) -> Tensor:
    return reference.squared_norms(model, linear_weights(model, layers), reference.singles(batch)).mean(0)


def by_module(model: nn.Module, batches: list[Any], **options: Any) -> Tensor:
    scores = fisher_scores(model, batches, granularity="module", progress=False, **options)
    return torch.tensor(scores.scores, dtype=torch.float64)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_scores_are_the_mean_of_per_sample_gradient_norms(name: str, dtype: torch.dtype, rtol: float) -> None:
    """Rows of different length in one padded batch, the loss averaged by the model in its own way."""
    family = FAMILIES[name]
    model = family.build().to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in family.batch(4, 9).items()}
    layers = None if name != "transformer-encoder" else "net.layers"
    expected = expected_by_module(model, batch, layers)
    assert float(expected.max()) > 0
    got = by_module(model, [batch], layers=layers)
    if name in FLOAT32_INSIDE:
        rtol = max(rtol, 1e-6)
    # Relative to the largest score: float32 sums over T positions in another order.
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.max()))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 2, 1), (4, 1), (5,)])
def test_the_split_into_batches_does_not_matter(sizes: tuple[int, ...]) -> None:
    model, batch = LLAMA.build().double(), causal_batch(5, 11)
    parts = [torch.split(value, list(sizes)) for value in batch.values()]
    batches = [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]
    scores = fisher_scores(model, batches, progress=False)
    whole = reference.squared_norms(model, linear_weights(model), reference.singles(batch))
    layers = whole.view(5, 3, -1).sum(2)
    assert scores.n_samples == 5
    torch.testing.assert_close(torch.tensor(scores.scores), layers.mean(0).float(), rtol=1e-6, atol=0)
    expected_error = layers.std(0) / 5**0.5
    torch.testing.assert_close(torch.tensor(scores.stderr), expected_error.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("coefficient", [1e-3, 0.1])
def test_a_loss_of_how_evenly_a_batch_is_routed_is_that_of_each_sample(coefficient: float) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    config = transformers.MixtralConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=coefficient,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    batch = causal_batch(4)
    together = by_module(model, [batch], modules=["v_proj"])
    alone = by_module(model, [{k: v[n : n + 1] for k, v in batch.items()} for n in range(4)], modules=["v_proj"])
    # Taken for a mean of the samples' losses, the batch's gave 1e-4 with the smaller coefficient.
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def test_padding_changes_nothing() -> None:
    model, batch = LLAMA.build().double(), causal_batch(3, 8)
    longer = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 5)),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 5)),
        "labels": nn.functional.pad(batch["labels"], (0, 5), value=-100),
    }
    torch.testing.assert_close(by_module(model, [longer]), by_module(model, [batch]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [3, 40])
def test_both_forms_of_the_norm(length: int) -> None:
    """Short sequences go through Gram matrices, long ones through the gradient itself; 12 x 20 maps change at 7.5."""
    family = FAMILIES["sequential"]
    model, batch = family.build().double(), {k: v.double() for k, v in plain_batch(3, length).items()}
    torch.testing.assert_close(by_module(model, [batch]).double(), expected_by_module(model, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [1, 4, 5, 6])
def test_gram_matrices_by_blocks_of_rows(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four blocks of at least two rows: 1, 2 + 2, 2 + 2 + 1 and 2 + 2 + 2."""
    monkeypatch.setattr(_gradnorms, "_BLOCK_ROWS", 2)
    family = FAMILIES["sequential"]
    model, batch = family.build().double(), {k: v.double() for k, v in plain_batch(3, length).items()}
    monkeypatch.setattr(_gradnorms, "_direct_norms", None)
    torch.testing.assert_close(by_module(model, [batch]).double(), expected_by_module(model, batch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "vector", "odd"])
def test_loss_fn_and_its_reduction(reduction: str) -> None:
    """The loss of each sample; or one number that is their mean, their sum, or no usual mixture of them."""
    model = FAMILIES["sequential"].build().double().net
    x, y = (v.double() for v in plain_batch(4, 5).values())
    linears = linear_weights(model)

    def each(net: nn.Module, batch: Any) -> Tensor:
        return (net(batch[0]) - batch[1]).square().mean((1, 2))

    def loss_fn(net: nn.Module, batch: Any) -> Tensor:
        losses = each(net, batch)
        forms = {"mean": losses.mean(), "sum": losses.sum(), "vector": losses, "odd": losses.square().sum().sqrt()}
        return forms[reduction]

    expected = reference.squared_norms(model, linears, [(x[n : n + 1], y[n : n + 1]) for n in range(4)], each).mean(0)
    # Alone, the odd loss of a sample is the sample's loss.
    got = by_module(model, [(x, y)], loss_fn=loss_fn)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_the_reduction_is_found_again_when_it_matters() -> None:
    """A first batch of equal lengths says nothing about the weights in the second, with unequal ones."""
    model = LLAMA.build().double()
    equal = {k: v[:1].expand(3, -1).contiguous() for k, v in causal_batch(1, 7).items()}
    unequal = causal_batch(4, 9)
    expected = reference.squared_norms(
        model, linear_weights(model), reference.singles(equal) + reference.singles(unequal)
    ).mean(0)
    torch.testing.assert_close(by_module(model, [equal, unequal]).double(), expected, rtol=1e-6, atol=0)


class _Tagger(nn.Module):
    """Two linear layers and a class for each position; counts its calls. Its rows may be in an order of their own."""

    def __init__(self, *, positions_first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 5)
        self.positions_first = positions_first
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits = self.head(x)
        if self.positions_first:
            logits, labels = logits.transpose(0, 1), labels.T
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("positions_first", [False, True])
def test_the_weights_in_a_mean_cross_entropy_are_seen_not_tried(positions_first: bool) -> None:
    """A call for the first sample alone and one a batch; where rows are not the samples' in order, that is seen."""
    torch.manual_seed(0)
    model = _Tagger(positions_first=positions_first).double()
    x, labels = torch.randn(4, 7, 6, dtype=torch.float64), torch.randint(5, (4, 7))
    for n in range(4):
        labels[n, : 2 * n] = -100
    batches = [{"x": x[i], "labels": labels[i]} for i in ([1, 2, 0, 3], [3, 1, 0, 2])]
    singles = [one for batch in batches for one in reference.singles(batch)]
    expected = reference.squared_norms(model, linear_weights(model), singles).mean(0)
    model.calls = 0
    got = by_module(model, batches).double()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    assert (model.calls == 3) is not positions_first


class _Classifier(nn.Module):
    """Two linear layers and logits for five classes at each position, perhaps capped by a last tanh."""

    def __init__(self, *, capped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(6, 6, dtype=torch.float64) for _ in range(2)])
        self.head = nn.Linear(6, 5, dtype=torch.float64)
        self.capped = capped

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.head(x).flatten(0, -2)
        return torch.tanh(x) if self.capped else x


def _mixup(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits, y = model(batch["x"]), batch["y"].flatten()
    return 0.7 * cross_entropy(logits, y) + 0.3 * cross_entropy(logits, 4 - y)


def _penalty_before(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["x"])
    penalty = logits.logsumexp(1).square().mean()
    return cross_entropy(logits, batch["y"].flatten()) + penalty


def _penalty_after(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["x"])
    return cross_entropy(logits, batch["y"].flatten()) + logits.square().mean()


def _plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(model(batch["x"]), batch["y"].flatten())


@pytest.mark.parametrize("loss_fn", [_mixup, _penalty_before, _penalty_after, _plain])
@pytest.mark.parametrize("capped", [False, True])
def test_logits_may_be_used_by_more_than_one_cross_entropy(loss_fn: Any, capped: bool) -> None:
    """A gradient that takes the logits' place must not be in the way of another use of them."""
    model = _Classifier(capped=capped)
    batch = {"x": torch.randn(3, 4, 6, dtype=torch.float64), "y": torch.randint(5, (3, 4))}
    expected = reference.squared_norms(model, linear_weights(model), reference.singles(batch), loss_fn).mean(0)
    got = by_module(model, [batch, batch], loss_fn=loss_fn)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("equal_first", [False, True])
def test_positions_may_be_picked_before_the_cross_entropy(equal_first: bool) -> None:
    """Rows that divide by the batch size are not the samples' then; an even first batch does not hide it."""
    model, x, y = _Classifier(), torch.randn(3, 6, 6, dtype=torch.float64), torch.randint(5, (3, 6))
    uneven, even = y.clone(), y.clone()
    even[:, 4:] = -100
    for n, kept in enumerate((6, 4, 2)):
        uneven[n, kept:] = -100
    batches = [{"x": x, "y": labels} for labels in ((even, uneven) if equal_first else (uneven, even))]

    def loss_fn(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["y"].flatten()
        return cross_entropy(net(batch["x"])[labels != -100], labels[labels != -100])

    singles = [one for batch in batches for one in reference.singles(batch)]
    expected = reference.squared_norms(model, linear_weights(model), singles, loss_fn).mean(0)
    torch.testing.assert_close(by_module(model, batches, loss_fn=loss_fn), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("factor", [1, 2])
def test_the_batch_size_is_that_of_the_labels(factor: int) -> None:
    """Not that of whatever comes first, such as positions, which all samples share."""
    model, x, y = _Classifier(), torch.randn(3, 6, 6, dtype=torch.float64), torch.randint(5, (3, 6))

    def loss_fn(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = cross_entropy(net(batch["x"] + batch["shift"]), batch["labels"].flatten())
        return loss if factor == 1 else factor * loss

    nothing = torch.zeros(3, 0, dtype=torch.int64)
    batch = {"shift": torch.randn(6, 6, dtype=torch.float64), "nothing": nothing, "x": x, "labels": y}
    singles = [{**batch, "x": x[n : n + 1], "labels": y[n : n + 1]} for n in range(3)]
    expected = reference.squared_norms(model, linear_weights(model), singles, loss_fn).mean(0)
    torch.testing.assert_close(by_module(model, [batch], loss_fn=loss_fn), expected, rtol=1e-10, atol=0)


class _Reused(nn.Module):
    """Two layers; the first runs twice in one forward, the second's two maps share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) for _ in range(2)])
        self.layers[1][1].weight = self.layers[1][0].weight

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = self.layers[0]
        c, d = self.layers[1]
        h = torch.tanh(b(torch.tanh(a(torch.tanh(a(x))))))
        return {"loss": (d(torch.tanh(c(h))) - y).square().mean()}


@pytest.mark.parametrize("length", [2, 9])
def test_reused_and_shared_weights_are_exact(length: int) -> None:
    torch.manual_seed(1)
    model = _Reused().double()
    x, y = torch.randn(2, 3, length, 6, dtype=torch.float64)
    batch = {"x": x, "y": y}
    # The shared weight appears under both names, with its whole gradient each time.
    assert len(linear_weights(model)) == 4
    torch.testing.assert_close(by_module(model, [batch]).double(), expected_by_module(model, batch), rtol=1e-6, atol=0)


def test_a_linear_that_is_never_called_is_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.a(x), self.b.weight)

    model = Loss(nn.Sequential(Block(), Block()))
    with pytest.warns(UserWarning, match="never called, so their score is zero: net.0.b, net.1.b"):
        fisher_scores(model, [plain_batch(2, 4)], progress=False)


class _Pair(nn.Linear):
    """Called with a flag it returns a pair: what it is cannot be told from its class."""

    def forward(self, x: Tensor, pair: bool = False) -> Any:
        return (super().forward(x), x) if pair else super().forward(x)


class _InParts(nn.Linear):
    """Takes its input in two halves."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x if x.shape[-1] == 12 else x.flatten(-2), self.weight)


def test_a_linear_that_is_called_as_something_else_is_left_out_and_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 12), _Pair(12, 12), _InParts(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y, x = self.b(torch.tanh(self.a(x)), pair=True)
            return x + y + self.c(x.unflatten(-1, (2, 6)))

    torch.manual_seed(0)
    model, batch = Loss(nn.Sequential(Block(), Block())).double(), {k: v.double() for k, v in plain_batch(3, 4).items()}
    expected = expected_by_module(model, batch)
    assert bool((expected > 0).all())
    with pytest.warns(UserWarning, match="not called as maps .* zero: net.0.b, net.0.c, net.1.b, net.1.c;"):
        got = by_module(model, [batch]).double()
    torch.testing.assert_close(got, expected * torch.tensor([1, 0, 0] * 2), rtol=1e-10, atol=0)


def test_a_parametrized_weight_is_scored_by_its_value() -> None:
    model, batch = FAMILIES["sequential"].build().double(), {k: v.double() for k, v in plain_batch(3, 4).items()}
    expected = expected_by_module(model, batch)
    torch.nn.utils.parametrizations.weight_norm(model.net[0][1])
    torch.testing.assert_close(by_module(model, [batch]).double(), expected, rtol=1e-6, atol=0)


def test_a_weight_shared_with_something_else_is_refused_by_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5)) for _ in range(2)])
            self.layers[0][0].weight = self.embed.weight

    with pytest.raises(InputError, match=r"weight of layers\.0\.0 is shared with embed"):
        fisher_scores(Tied(), [], progress=False)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_padded_transformer_encoder_takes_no_fast_path(batch_first: bool, norm_first: bool) -> None:
    """In eval mode torch would replace the layers by one fused operation, and padded inputs by nested tensors."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=batch_first, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first and not norm_first)

        def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
            swap = lambda t: t if batch_first else t.transpose(0, 1)  # noqa: E731
            out = swap(self.encoder(swap(x), src_key_padding_mask=mask)).masked_fill(mask[..., None], 0)
            return {"loss": (out - y).square().mean()}

    torch.manual_seed(0)
    model = Padded().double()
    batch = {k: v.double() for k, v in plain_batch(3, 5).items()}
    batch["mask"] = torch.arange(5) >= torch.tensor([[5], [4], [3]])
    torch.testing.assert_close(by_module(model, [batch]).double(), expected_by_module(model, batch), rtol=1e-10, atol=0)


def test_hooks_of_others_and_calls_by_keyword() -> None:
    """What a user's hook makes of a linear's output comes after it; its input may be given by name."""

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            for layer in self.layers:
                x = torch.tanh(layer(input=x))
            return {"loss": (x - y).square().mean()}

    torch.manual_seed(0)
    model, batch = Keyword().double(), {k: v.double() for k, v in plain_batch(3, 5).items()}
    model.layers[1].register_forward_hook(lambda _, __, output: output * 2)
    torch.testing.assert_close(by_module(model, [batch]).double(), expected_by_module(model, batch), rtol=1e-10, atol=0)


@pytest.mark.parametrize("length", [5, 3])
def test_an_input_without_the_batch_in_front_falls_back_to_single_samples(length: int) -> None:
    """Sequence-first layers, (T, batch, width); with T = batch the shape alone does not tell."""

    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = FAMILIES["sequential"].build().net

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.net(x.transpose(0, 1)).transpose(0, 1) - y).square().mean()}

    model = SequenceFirst().double()
    batch = {k: v.double() for k, v in plain_batch(3, length).items()}
    torch.testing.assert_close(by_module(model, [batch]).double(), expected_by_module(model, batch), rtol=1e-6, atol=0)


def test_non_reentrant_checkpointing_does_no_harm_and_reentrant_is_refused() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.net = FAMILIES["sequential"].build().net
            self.reentrant = reentrant

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            for block in self.net:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
            return {"loss": (x - y).square().mean()}

    batch = plain_batch(3, 5)
    plain = by_module(FAMILIES["sequential"].build(), [batch])
    torch.testing.assert_close(by_module(Checkpointed(False), [batch]), plain, rtol=1e-5, atol=0)
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad"),
        pytest.raises(InputError, match="use_reentrant"),
    ):
        by_module(Checkpointed(True), [batch])


def test_gradient_checkpointing_and_cache_of_transformers_do_no_harm() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    plain = by_module(model, [batch])
    # Renamed in transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.config.use_cache = True
    model.train()
    torch.testing.assert_close(by_module(model, [batch]), plain, rtol=1e-6, atol=0)
    assert model.config.use_cache is True


def test_an_operation_in_place_after_a_linear_does_no_harm_and_on_its_input_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self, spoil: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.spoil = spoil

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu_(self.a(x))
            # A detour past autograd's own check of its saved tensors.
            return self.b(h) + (h.detach().mul_(2) if self.spoil else h).sum() * 0

    def model(spoil: bool) -> nn.Module:
        torch.manual_seed(2)
        return Loss(nn.Sequential(*[Block(spoil) for _ in range(2)])).double()

    batch = {k: v.double() for k, v in plain_batch(3, 40).items()}
    torch.testing.assert_close(
        by_module(model(False), [batch]).double(), expected_by_module(model(False), batch), rtol=1e-6, atol=0
    )
    with pytest.raises(InputError, match="changed in place"):
        by_module(model(True), [batch])


def test_model_labels_leave_out_a_sample_that_is_not_finite() -> None:
    model, batch = FAMILIES["vit"].build(), FAMILIES["vit"].batch(3, 0)
    batch["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 3 samples"):
        scores = fisher_scores(model, [batch], labels="model", progress=False)
    assert scores.n_samples == 2


def test_autocast_stays_close_to_full_precision() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    plain = by_module(model, [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = by_module(model, [batch])
    # bf16 has 8 bits; squared norms over three layers of it.
    torch.testing.assert_close(low, plain, rtol=0.15, atol=0.01 * float(plain.max()))
    assert not torch.equal(low, plain)


class Stack(nn.Module):
    """Three layers, each a linear map and what a function makes of its input and output, and five classes."""

    def __init__(self, join: Any = lambda layer, x: layer(x).tanh()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 5)
        self.join = join

    def forward(self, x: Tensor) -> Any:
        x = self.embedding(x)
        for layer in self.layers:
            x = self.join(layer, x)
        return self.head(x)


def _add_in_place(layer: nn.Module, x: Tensor) -> Tensor:
    x += layer(x).tanh()
    return x


def _changed_silu(layer: nn.Module, x: Tensor) -> Tensor:
    y = silu(layer(x))
    with torch.no_grad():
        y.clamp_(max=0.05)
    return x * y


@pytest.mark.parametrize(
    ("join", "like"), [(_add_in_place, lambda layer, x: x + layer(x).tanh()), (_changed_silu, _changed_silu)]
)
def test_activations_may_change_in_place(join: Any, like: Any) -> None:
    """The oracle takes gradients of weights, for which autograd refuses inputs that change."""
    model, x, y = Stack(like).double(), torch.randint(50, (4, 12)), torch.randint(5, (4,))

    def each(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    singles = [(x[n : n + 1], y[n : n + 1]) for n in range(4)]
    expected = reference.squared_norms(model, linear_weights(model), singles, each).mean(0)
    model.join = join
    got = by_module(model, [(x, y)], loss_fn=each)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_the_samples_that_are_not_told_are_not_guessed_in_low_precision(dtype: torch.dtype) -> None:
    model = Stack().to(dtype)
    batch = {"x": torch.randint(50, (8, 4)), "y": torch.tensor([0, 0, 1, 0, 0, 1, 2, 0])}
    weight = torch.tensor([1.0, 2, 4, 1, 1], dtype=dtype)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch["x"]).mean(1), batch["y"], weight=weight)

    alone = by_module(model, [{k: v[n : n + 1] for k, v in batch.items()} for n in range(8)], loss_fn=loss_fn)
    together = by_module(model, [batch], loss_fn=loss_fn)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mean_cross_entropy_is_seen_in_every_precision(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sample has to be scored alone, which takes far longer."""
    model, batch = FAMILIES[name].build(), FAMILIES[name].batch(4, 8)
    plain = by_module(model, [batch])
    monkeypatch.setattr(SampleLosses, "_one_by_one", None)
    found = by_module(model.to(dtype), [batch])
    # bf16 has 8 bits; squared norms over three layers of it.
    torch.testing.assert_close(found, plain, rtol=0.15, atol=0.01 * float(plain.max()))


@pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}])
def test_older_arguments_of_cross_entropy_count(options: dict[str, bool]) -> None:
    model, batch = Stack(), (torch.randint(50, (4, 6)), torch.randint(5, (4, 6)))

    def legacy(model: nn.Module, batch: Any) -> Tensor:
        with warnings.catch_warnings(action="ignore"):
            loss = cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), **options)
        return loss if loss.dim() == 0 else loss.view(len(batch[1]), -1).sum(1)

    def total(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="sum")

    expected = by_module(model, [batch], loss_fn=total)
    torch.testing.assert_close(by_module(model, [batch], loss_fn=legacy), expected, rtol=1e-5, atol=0)


def test_what_else_the_loss_depends_on_keeps_its_gradients() -> None:
    model, head = Stack(), nn.Linear(5, 4)
    kept = head.weight.grad = torch.ones(4, 5)
    batch = {"x": torch.randint(50, (3, 6)), "y": torch.randint(4, (3,))}
    fisher_scores(
        model, [batch], loss_fn=lambda model, b: cross_entropy(head(model(b["x"]).mean(1)), b["y"]), progress=False
    )
    assert head.weight.grad is kept
    assert torch.equal(kept, torch.ones(4, 5))
    assert head.bias.grad is None


@pytest.mark.parametrize("first", ["a sample without labels", "a large layer"])
def test_samples_that_are_mixed_up_are_found_out_however_little_the_first_says(first: str) -> None:
    """Sequence-first layers whose length is the batch size, as if the batch were in front."""
    large = 5.0 if first == "a large layer" else 1.0

    def join(layer: nn.Module, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        places = torch.linspace(0.2, 2, len(x))[:, None, None]
        size = large if layer is model.layers[0] else 1.0
        return (0.9 * x + 0.1 * layer(x * size * places)).transpose(0, 1)

    model = Stack(join)
    batch = {"x": torch.randint(50, (8, 4)), "labels": torch.randint(5, (8, 4))}
    if first == "a sample without labels":
        batch["labels"][0] = -100

    def each(model: nn.Module, batch: Any) -> Tensor:
        losses = cross_entropy(model(batch["x"]).transpose(1, 2), batch["labels"], reduction="none")
        return losses.sum(1) / (batch["labels"] != -100).sum(1)

    parts = [{k: v[n : n + size] for k, v in batch.items()} for size in (1, 4) for n in range(0, 8, size)]
    with warnings.catch_warnings(action="ignore"):  # a sample without labels
        alone, together = (by_module(model, batches, loss_fn=each) for batches in (parts[:8], parts[8:]))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_the_shift_of_the_labels_is_found_in_low_precision() -> None:
    """The losses of a fresh model with both shifts are near ln 5, often too near for bfloat16 to tell them apart."""
    config = transformers.BertConfig(**ENCODER)
    for seed in range(8):
        torch.manual_seed(seed)
        model = transformers.BertForTokenClassification(config).bfloat16().eval()
        sampler = LabelSampler(model, seed=0)
        sampler.draw({"input_ids": torch.randint(97, (2, 32)), "labels": torch.randint(5, (2, 32))})
        assert sampler._shift == 0


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_gradients_of_float16_may_be_far_below_its_range_or_near_its_end(size: float) -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    plain = by_module(model, [batch])
    low = by_module(model.half(), [batch], loss_fn=lambda model, batch: size * model(**batch).loss) / size**2
    # float16 has 11 bits; squared norms over three layers of it.
    torch.testing.assert_close(low, plain, rtol=0.02, atol=1e-3 * float(plain.max()))


def test_a_gradient_that_is_too_large_for_float16_takes_no_range_from_the_others() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    plain = by_module(model, [batch])
    large = {**causal_batch(1, 8), "size": torch.tensor([1e12])}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return batch.get("size", 1e-4) * model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    with pytest.warns(UserWarning, match="1 of 4 samples"):
        low = by_module(model.half(), [large, batch], loss_fn=loss_fn) / 1e-8
    torch.testing.assert_close(low, plain, rtol=0.02, atol=1e-3 * float(plain.max()))


def test_a_gradient_that_is_too_large_for_float16_takes_no_range_from_its_batch() -> None:
    model = Stack()
    x, y = torch.randint(50, (4, 12)), torch.randint(5, (4,))
    size = torch.tensor([1e-4, 1e-4, 1e-4, 1e12])
    ranks = dict.fromkeys(linear_weights(model), 2)

    def each(model: nn.Module, batch: Any) -> Tensor:
        return batch[2] * cross_entropy(model(batch[0]).mean(1).float(), batch[1], reduction="none")

    def measured(count: int) -> tuple[Tensor, list[Tensor]]:
        sketches = GradientSketches(ranks)
        options = Scoring(loss_fn=each, granularity="module", progress=False)
        scores = score(model, [(x[:count], y[:count], size[:count])], options, sketches)
        return torch.tensor(scores.scores), [sketches.leading(name, 2)[0] for name in ranks]  # type: ignore[index]

    plain, directions = measured(3)
    model.half()
    with pytest.warns(UserWarning, match="1 of 4 samples"):
        low, found = measured(4)
    # float16 has 11 bits; squared norms over three layers of it.
    torch.testing.assert_close(low, plain, rtol=0.02, atol=0)
    # The share of one plane in the other.
    assert all((a.T @ b).square().sum() > 2 * (1 - 1e-3) for a, b in zip(directions, found, strict=True))


def test_it_works_inside_no_grad_and_on_frozen_models() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    plain = by_module(model, [batch])
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(by_module(model, [batch]), plain)


def test_model_labels_give_the_true_fisher_information() -> None:
    """Over many draws the mean approaches the expectation over the model's own labels, computed class by class."""
    model, batch = FAMILIES["roberta"].build().double(), class_batch(1, 6)
    many = {k: v.expand(400, *v.shape[1:]) for k, v in batch.items()}
    got = by_module(model, [many], labels="model", seed=3)
    probabilities = model(**batch).logits.detach().softmax(-1)[0]
    weights = linear_weights(model)
    each = [reference.squared_norms(model, weights, [{**batch, "labels": torch.tensor([c])}])[0] for c in range(5)]
    expected = sum(p * norms for p, norms in zip(probabilities, each, strict=True))
    # 400 draws: five per cent standard error where classes differ by their own size.
    torch.testing.assert_close(got.double(), expected, rtol=0.2, atol=0)
    assert torch.equal(got, by_module(model, [many], labels="model", seed=3))
    assert not torch.equal(got, by_module(model, [many], labels="model", seed=4))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_model_labels_of_a_language_model_respect_shift_and_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With draws replaced by the likeliest class, the labels are the model's own predictions in the right place."""
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmax(-1, keepdim=True))
    model = FAMILIES[name].build().double()
    batch = FAMILIES[name].batch(3, 8)
    likeliest = model(**batch).logits.argmax(-1)
    labels = batch["labels"].clone()
    if name == "llama":
        labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, likeliest[:, :-1])
    else:
        labels = torch.where(labels == -100, -100, likeliest)
    expected = by_module(model, [{**batch, "labels": labels}])
    torch.testing.assert_close(by_module(model, [batch], labels="model"), expected, rtol=1e-6, atol=0)


def _encoder_decoder(kind: str) -> tuple[Any, dict[str, Tensor], str]:
    """Return a model with six classes, one sample with two labels, and the name of the decoder's layers."""
    tokens = {"vocab_size": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 24))}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    batch = {"labels": torch.tensor([[3, 4]])}
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        model: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**tokens, **sizes))
    elif kind == "bart":
        bart = transformers.BartConfig(**tokens, **sides, **heads, d_model=16, max_position_embeddings=16)
        model = transformers.BartForConditionalGeneration(bart)
    else:
        sound = {"num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 8, "d_model": 16}
        model = transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(**tokens, **sides, **heads, **sound)
        )
        batch["input_features"] = torch.randn(1, 4, 8, dtype=torch.float64)
    if kind != "whisper":
        batch["input_ids"] = torch.tensor([[3, 5, 4]])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if kind == "t5" else 3)  # so that what the decoder reads matters
    return model.double().eval(), batch, "decoder.block" if kind == "t5" else "model.decoder.layers"


@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_model_labels_leave_the_decoders_inputs_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn are all pairs of classes, one a sample; the decoder of each reads the start and the data's first label."""
    model, batch, layers = _encoder_decoder(kind)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: pairs.reshape(-1, 1))
    start = torch.tensor([[2, 3]])
    fixed = {**batch, "decoder_input_ids": start}
    weights = linear_weights(model, layers)
    expected = reference.squared_norms(model, weights, [{**fixed, "labels": pair[None]} for pair in pairs]).mean(0)
    many = {name: value.repeat_interleave(36, dim=0) for name, value in batch.items()}
    got = by_module(model, [many], labels="model", layers=layers)
    # T5 and Whisper take norms or the loss in float32.
    torch.testing.assert_close(got, expected.double(), rtol=1e-4, atol=1e-4 * float(expected.max()))
    given = by_module(model, [{**many, "decoder_input_ids": start.expand(36, 2)}], labels="model", layers=layers)
    assert torch.equal(given, got)


def test_model_labels_of_an_encoder_decoder_are_drawn_from_its_own_output() -> None:
    """The expectation over all pairs of labels at the decoder's inputs of the data."""
    model, batch, layers = _encoder_decoder("t5")
    with torch.no_grad():
        first, second = model(**batch).logits[0].softmax(-1)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    fixed = {**batch, "decoder_input_ids": torch.tensor([[2, 3]])}
    weights = linear_weights(model, layers)
    norms = reference.squared_norms(model, weights, [{**fixed, "labels": pair[None]} for pair in pairs])
    expected = (first[pairs[:, 0]] * second[pairs[:, 1]]) @ norms.double()
    many = {name: value.repeat_interleave(400, dim=0) for name, value in batch.items()}
    got = by_module(model, [many], labels="model", layers=layers)
    # 400 draws: five per cent standard error where classes differ by their own size.
    torch.testing.assert_close(got, expected, rtol=0.2, atol=0)


class _Copier(nn.Module):
    """An encoder-decoder of a maker's own, whose decoder reads the labels, shifted by its own method."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.config = transformers.PretrainedConfig(is_encoder_decoder=True)

    def shifted(self, labels: Tensor) -> Tensor:
        return nn.functional.pad(labels[:, :-1], (1, 0))

    def forward(self, labels: Tensor, decoder_input_ids: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(self.shifted(labels) if decoder_input_ids is None else decoder_input_ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        logits = x @ self.embed.weight.T
        return {"logits": logits, "loss": cross_entropy(logits.flatten(0, 1), labels.flatten())}


def test_model_labels_are_refused_where_the_decoders_inputs_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = _Copier(), {"labels": torch.randint(6, (3, 4))}
    with pytest.raises(InputError, match="how _Copier makes its decoder's inputs .*; put decoder_input_ids into"):
        fisher_scores(model, [batch], labels="model", progress=False)
    given = by_module(model, [{**batch, "decoder_input_ids": model.shifted(batch["labels"])}], labels="model")
    monkeypatch.setattr(_Copier, "_shift_right", _Copier.shifted, raising=False)
    assert torch.equal(by_module(model, [batch], labels="model"), given)
    # One label a sample is read by no decoder.
    assert fisher_scores(model, [{"labels": torch.randint(6, (3, 1))}], labels="model", progress=False).n_samples == 3


class _Quantised(nn.Module):
    """A linear whose weight is int8 codes and a scale, as quantised layers keep it; gradients pass through."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


def test_quantised_linears_are_scored() -> None:
    model = Loss(nn.Sequential(*[nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh()) for _ in range(3)]))
    batch = plain_batch(3, 5)
    quantised = copy.deepcopy(model)
    for block, original in zip(quantised.net, model.net, strict=True):
        block[0] = _Quantised(original[0])
        original[0].weight.data = block[0].codes * block[0].scale
    torch.testing.assert_close(by_module(quantised, [batch]), by_module(model, [batch]), rtol=1e-5, atol=0)
    scores = fisher_scores(quantised, [batch], progress=False)
    with pytest.raises(InputError, match="ordinary tensors"):
        scores.select(normalize="weight")


# -- samples that are not finite, errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4])
def test_a_sample_that_is_not_finite_is_left_out_and_counted(size: int) -> None:
    model = FAMILIES["sequential"].build()
    batch = plain_batch(4, 5)
    good = {k: v[[0, 1, 3]] for k, v in batch.items()}
    expected = by_module(model, [good])
    batch["x"][2, 1, 1] = torch.nan
    batches = [{k: v[n : n + size] for k, v in batch.items()} for n in range(0, 4, size)]
    with pytest.warns(UserWarning, match="1 of 4 samples were left out"):
        scores = fisher_scores(model, batches, granularity="module", progress=False)
    assert (scores.n_samples, scores.n_skipped) == (3, 1)
    torch.testing.assert_close(torch.tensor(scores.scores, dtype=torch.float64), expected, rtol=1e-6, atol=0)


def test_a_loss_at_the_head_of_a_tuple_is_the_loss() -> None:
    """As models with return_dict=False return it."""

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = LLAMA.build()

        def forward(self, **batch: Tensor) -> tuple[Tensor, ...]:
            out = self.net(**batch)
            return (out.logits,) if out.loss is None else (out.loss, out.logits)

        def get_output_embeddings(self) -> nn.Module:
            return self.net.get_output_embeddings()

    model, batch = Tuple(), causal_batch(3, 6)
    assert torch.equal(by_module(model, [batch]), by_module(model.net, [batch]))
    with pytest.raises(InputError, match="the model returned no loss"):
        fisher_scores(model, [{"input_ids": batch["input_ids"]}], progress=False)


def test_samples_that_all_have_no_labels_are_an_error() -> None:
    batch = {k: v if k != "labels" else torch.full_like(v, -100) for k, v in causal_batch(2, 6).items()}
    with pytest.raises(InputError, match=r"none of the 2 samples had .*; are all labels -100\?"):
        fisher_scores(LLAMA.build(), [batch], progress=False)


def test_a_sample_without_labels_is_left_out() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    expected = by_module(model, [{k: v[1:] for k, v in batch.items()}])
    batch["labels"][0] = -100
    with pytest.warns(UserWarning, match="1 of 3 samples"):
        got = by_module(model, [batch])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 4])
def test_a_loss_that_compares_samples_with_each_other_is_refused(size: int) -> None:
    class Contrast(Loss):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            out = self.net(x)
            return {"loss": (out - out.mean(0)).square().mean()}

    model = Contrast(FAMILIES["sequential"].build().net)
    with pytest.raises(InputError, match="every score is zero: does the loss compare the samples"):
        fisher_select(model, [plain_batch(size, 3)], progress=False)


def test_errors_say_what_is_wrong() -> None:
    model, batch = LLAMA.build(), causal_batch(2, 6)
    no_labels = {k: v for k, v in batch.items() if k != "labels"}
    broken = {"x": torch.full((2, 3, 12), torch.nan), "y": torch.zeros(2, 3, 12)}
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: fisher_scores(model, []), InputError, "no calibration batches"),
        (lambda: fisher_scores(model, [no_labels]), InputError, "no loss for a batch of input_ids, attention_mask"),
        (lambda: fisher_scores(model, [batch["input_ids"]]), TypeError, "must be a mapping"),
        (lambda: fisher_scores(nn.Sequential(nn.ReLU()), [batch]), InputError, "no ModuleList or Sequential"),
        (lambda: fisher_scores(FAMILIES["sequential"].build(), [broken]), InputError, "none of the 2 samples"),
        (lambda: fisher_scores(model, [batch], labels="drawn"), InputError, "'data', 'model', got 'drawn'"),  # type: ignore[arg-type]
        (lambda: fisher_scores(model, [batch], granularity="head"), InputError, "'layer', 'module'"),  # type: ignore[arg-type]
        (lambda: fisher_scores(model, [batch], modules=["wq"]), InputError, "q_proj"),
        (lambda: fisher_scores(model, [batch], tol=1.5), InputError, r"tol must be in \(0, 1\), got 1.5"),
        (lambda: fisher_scores(model, [batch], max_samples=0), InputError, "max_samples must be at least 1"),
        (lambda: fisher_scores(model, [batch], max_samples=2.5), TypeError, "max_samples must be an int, got float"),
        (
            lambda: fisher_scores(model, [batch], loss_fn=lambda *_: torch.ones(())),
            InputError,
            "none of the linear maps to score, which are in model.layers; layers= names another",
        ),
        (
            lambda: fisher_scores(model, [batch], loss_fn=lambda *_: torch.ones(3)),
            InputError,
            r"of shape \(1,\), got \(3,\)",
        ),
        (lambda: fisher_scores(model, [batch], loss_fn=lambda *_: 1.0), TypeError, "must return a tensor, got float"),  # type: ignore[arg-type, return-value]
        (
            lambda: fisher_scores(FAMILIES["sequential"].build(), [plain_batch()], labels="model"),
            InputError,
            "integer labels",
        ),
        (lambda: fisher_select(model, [batch], budget=0.0), InputError, r"in \(0, 1\], got 0.0"),
        (lambda: fisher_select(model, [batch], budget=4), InputError, r"in \[1, 3\].*got 4"),
        (lambda: fisher_select(model, [batch], budget=True), TypeError, "got bool"),
        (lambda: fisher_select(model, [], budget_params=100), InputError, "give rank >= 1, got None"),
        (lambda: fisher_select(model, [], budget_params=100, rank=2.5), TypeError, "rank must be an int, got float"),
        (lambda: fisher_select(model, [], budget_params=1e6, rank=2), TypeError, "budget_params must be an int"),
        # Before the pass, which would find no batches.
        (
            lambda: fisher_select(model, [], budget_params=100, rank=2),
            InputError,
            r"budget_params must be at least \d+, one at rank 2, got 100",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# -- selection ---------------------------------------------------------------------------------------------------------


def test_select_takes_the_highest_layers_sorted() -> None:
    model, batch = LLAMA.build(), causal_batch(4, 9)
    scores = fisher_scores(model, [batch], progress=False)
    assert scores.names == ["model.layers.0", "model.layers.1", "model.layers.2"]
    best = sorted(range(3), key=lambda i: -scores.scores[i])
    assert fisher_select(model, [batch], budget=2, progress=False) == sorted(best[:2])
    assert fisher_select(model, [batch], budget=1.0, progress=False) == [0, 1, 2]
    assert fisher_select(model, [batch], budget=0.01, progress=False) == [best[0]]


def test_modules_restrict_what_is_scored() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    scores = fisher_scores(model, [batch], modules=["q_proj", "down_proj"], granularity="module", progress=False)
    assert [name.split("layers.")[1] for name in scores.names] == [
        f"{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    whole = dict(zip(linear_weights(model), by_module(model, [batch]).tolist(), strict=True))
    assert scores.scores == pytest.approx([whole[name] for name in scores.names], rel=1e-6)


def test_max_samples_cuts_the_last_batch() -> None:
    model, batch = LLAMA.build(), causal_batch(4, 9)
    scores = fisher_scores(model, [batch, batch], max_samples=6, progress=False)
    first = {k: v[:2] for k, v in batch.items()}
    expected = fisher_scores(model, [batch, first], progress=False)
    assert scores.n_samples == 6
    assert scores.scores == pytest.approx(expected.scores, rel=1e-6)


def test_early_stopping_takes_few_samples_when_the_choice_is_clear() -> None:
    model, data = side_by_side(10, 1, 1)
    scores = fisher_scores(model, data, budget=1, tol=0.05, progress=False)
    assert scores.stable
    assert 8 <= scores.n_samples <= 60
    assert scores.select(1) == [0]


def test_early_stopping_goes_by_the_scores_that_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights ten times as large the relative scores are no longer apart, so all samples are taken."""
    model, data = side_by_side(10, 1, 1)
    with torch.no_grad():
        for layer, size in zip(model.layers, (10.0, 1.0, 1.0), strict=True):
            layer.weight.copy_(size * torch.eye(4))
    seen: list[int] = []
    monkeypatch.setattr(SampleLosses, "measure", lambda *a, _own=SampleLosses.measure: seen.append(4) or _own(*a))
    assert fisher_select(model, data, budget=1, tol=1e-4, progress=False) == [0]
    assert sum(seen) < 60
    seen.clear()
    fisher_select(model, data, budget=1, tol=1e-4, normalize="weight", progress=False)
    assert sum(seen) == 200
    with pytest.raises(InputError, match="budget_params"):
        fisher_select(model, data, budget_params=8, rank=1, tol=0.1, progress=False)


def test_early_stopping_takes_all_samples_when_it_is_not() -> None:
    model, data = side_by_side(1, 1, 1)
    scores = fisher_scores(model, data, budget=1, tol=1e-4, progress=False)
    assert not scores.stable
    assert scores.n_samples == 200


@pytest.mark.parametrize("seed", range(5))
def test_a_selection_is_stable_when_each_paired_difference_says_so(seed: int) -> None:
    samples = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    samples = samples + torch.linspace(3, 0, 6, dtype=torch.float64) + 5 * samples[:, :1]
    pairs = [(samples[:, i], samples[:, j]) for i in range(2) for j in range(2, 6)]
    tol = sum(stats.ttest_rel(a, b, alternative="greater").pvalue for a, b in pairs)
    assert _is_stable(samples, 2, tol * 1.01)
    assert not _is_stable(samples, 2, tol * 0.99)


@pytest.mark.parametrize("seed", range(5))
def test_a_stratified_selection_is_stable_when_each_paired_difference_within_a_run_says_so(seed: int) -> None:
    samples = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # The highest of positions 0 to 2 and of 3 to 5; which of these two is the higher counts for nothing.
    samples = samples + torch.tensor([0.0, 1.5, 0.0, 1.0, 1.0, 2.5], dtype=torch.float64)
    assert samples.mean(0)[:3].argmax() == 1 and samples.mean(0)[3:].argmax() == 2
    pairs = [(samples[:, i], samples[:, j]) for i, others in ((1, (0, 2)), (5, (3, 4))) for j in others]
    tol = sum(stats.ttest_rel(a, b, alternative="greater").pvalue for a, b in pairs)
    assert _is_stable(samples, 2, tol * 1.01, stratified=True)
    assert not _is_stable(samples, 2, tol * 0.99, stratified=True)


def test_a_stratified_selection_takes_few_samples_when_it_is_clear() -> None:
    """The second layer of the first run is far above the best of the second run."""
    model, data = side_by_side(30, 10, 3, 1)
    assert fisher_select(model, data, budget=2, progress=False) == [0, 1]
    assert fisher_select(model, data, budget=2, stratified=True, progress=False) == [0, 2]
    scores = fisher_scores(model, data, budget=2, stratified=True, tol=0.05, progress=False)
    assert scores.stable
    assert 8 <= scores.n_samples <= 60
    # Which of the two in the middle is the higher is another question.
    model, data = side_by_side(30, 1, 1, 30)
    assert not fisher_scores(model, data, budget=3, tol=1e-4, progress=False).stable
    assert fisher_scores(model, data, budget=2, stratified=True, tol=1e-4, progress=False).stable
    with pytest.raises(InputError, match="stratified=True chooses .* whole layers; .* granularity='module'"):
        fisher_scores(model, data, granularity="module", stratified=True, progress=False)


@pytest.mark.parametrize("freedom", [1, 2, 7, 8, 63])
def test_tails_of_students_distribution(freedom: int) -> None:
    t = torch.tensor([-2.0, 0.0, 0.5, 3.3, 20.0, math.inf], dtype=torch.float64)
    # Differences of numbers near one, in float64.
    torch.testing.assert_close(_upper_tail(t, freedom), torch.tensor(stats.t.sf(t, freedom)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("tol", [0.1, 0.02])
def test_many_looks_together_are_wrong_no_more_often_than_tol(tol: float) -> None:
    """Two layers that are alike: whatever is called stable is wrong half of the time, which is what tol bounds."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(400):
        samples = torch.randn(64, 2, dtype=torch.float64, generator=generator)
        looks = _Looks(1, tol)
        stop = next((n for n in range(4, 65, 4) if looks.is_stable(samples[:n])), None)
        wrong += stop is not None and bool(samples[:stop, 1].mean() > samples[:stop, 0].mean())
    # Three standard deviations above what is expected at most; without shares for the looks there are three times it.
    assert wrong <= 400 * tol + 3 * (400 * tol * (1 - tol)) ** 0.5


def test_a_verdict_is_on_the_scores_that_choose() -> None:
    model, data = side_by_side(10, 1, 1)
    with torch.no_grad():
        for layer, size in zip(model.layers, (10.0, 1.0, 1.0), strict=True):
            layer.weight.copy_(size * torch.eye(4))
    assert score(model, data, Scoring(budget=1, progress=False)).stable
    assert not score(model, data, Scoring(budget=1, progress=False, normalize="weight")).stable


def test_early_stopping_is_rarely_wrong() -> None:
    """At tol 0.1 the set differs from that of all samples in at most a few of 20 shuffles of the data."""
    model, data = side_by_side(1.3, 1, 1)
    full = fisher_scores(model, data, budget=1, progress=False).select(1)
    assert full == [0]
    wrong = 0
    for seed in range(20):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        scores = fisher_scores(model, [data[i] for i in order], budget=1, tol=0.1, progress=False)
        wrong += scores.stable and scores.select(1) != full
    # Two are expected at most; five or more would have a chance below 5 % even if the bound were tight.
    assert wrong <= 4


def test_masked_language_model_batches_of_unequal_counts() -> None:
    """The loss of a masked model averages over labels in place, not over next tokens."""
    model, batch = FAMILIES["bert"].build().double(), masked_batch(4, 8)
    torch.testing.assert_close(by_module(model, [batch]).double(), expected_by_module(model, batch), rtol=1e-6, atol=0)


def test_a_batch_that_is_too_large_for_the_memory_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one, of some, and of all samples give the same scores."""
    from stiefel_lora import _losses

    model, batch = LLAMA.build(), causal_batch(5, 9)
    expected = expected_by_module(model, batch).double()
    sizes: list[int] = []
    evaluate = _losses.SampleLosses._evaluate

    def seen(self: Any, part: Any, size: int) -> tuple[Tensor, Tensor]:
        sizes.append(size)
        return evaluate(self, part, size)

    monkeypatch.setattr(_losses.SampleLosses, "_evaluate", seen)
    with undisturbed(model), GradientNorms(model, dict(find_linears(model)[0])) as norms:
        norms.measure(lambda: model(**_losses.sample(batch, 0, 5)).loss, 1)
    monkeypatch.setattr(_losses, "_SHARE_OF_MODEL", 0.0)
    for samples, parts in ((100.0, [5]), (2.5, [2, 2, 1]), (0.5, [1] * 5)):
        monkeypatch.setattr(_losses, "_LEAST_BYTES", samples * norms.saved_bytes)
        sizes.clear()
        got = by_module(model, [batch])
        # The first sample is measured alone; where all are, that is its part.
        assert sizes == (parts if parts[0] == 1 else [1, *parts])
        # float32 sums over T positions in another order.
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_batches_may_be_named_tuples() -> None:
    Pair = namedtuple("Pair", ["x", "y"])  # noqa: PYI024  the plain kind that data loaders collate
    model, batch = FAMILIES["sequential"].build(), plain_batch(3, 4)

    def loss(model: nn.Module, pair: Any) -> Tensor:
        assert isinstance(pair, Pair)
        return model(x=pair.x, y=pair.y)["loss"]

    got = fisher_scores(model, [Pair(**batch)], loss_fn=loss, max_samples=2, progress=False)
    first = {k: v[:2] for k, v in batch.items()}
    assert got.scores == pytest.approx(fisher_scores(model, [first], progress=False).scores, rel=1e-5)


@pytest.mark.parametrize("shape", [(7, 11), (5, 300_000)])
@pytest.mark.parametrize("ignored", [0, 2, 7])
def test_the_lean_cross_entropy_is_torchs(shape: tuple[int, int], ignored: int) -> None:
    """Also in chunks, and with rows that do not count; where it does not fit, torch's own is left in place."""
    torch.manual_seed(0)
    x, y = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randint(shape[1], shape[:1])
    y[:ignored] = -100
    expected = torch.autograd.grad(cross_entropy(x * 2, y), x)[0]
    with LeanCrossEntropy():
        loss = cross_entropy(x * 2, y)
        assert type(loss.grad_fn).__name__ == "_MeanBackward"
        for options in ({"reduction": "sum"}, {"label_smoothing": 0.1}, {"weight": torch.ones(shape[1]).double()}):
            assert "_Mean" not in type(cross_entropy(x * 2, y, **options).grad_fn).__name__  # type: ignore[arg-type]
    torch.testing.assert_close(loss, cross_entropy(x * 2, y), rtol=1e-12, atol=0, equal_nan=True)
    # Probabilities are at most 1; float64 rounds them to 1e-16.
    torch.testing.assert_close(torch.autograd.grad(3 * loss, x)[0], 3 * expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["no rows", "one row for all", "columns", "transposed"])
def test_the_lean_cross_entropy_takes_logits_of_every_form(form: str) -> None:
    """No rows give NaN as torch's; rows that overlap in memory, or lie in it in parts, are not written to."""
    torch.manual_seed(0)
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    rows, y = {"no rows": 0, "one row for all": 4}.get(form, 6), torch.randint(3, (6,))

    def loss() -> Tensor:
        logits = x * 2
        forms = {
            "no rows": logits[:0],
            "one row for all": logits[:1].expand(4, -1),
            "columns": logits[:, :3],
            "transposed": logits.T,
        }
        return cross_entropy(forms[form], y[:rows])

    expected = torch.autograd.grad(loss(), x)[0]
    with LeanCrossEntropy():
        own = loss()
    torch.testing.assert_close(own, loss(), rtol=1e-12, atol=0, equal_nan=True)
    # Probabilities are at most 1; float64 rounds them to 1e-16.
    torch.testing.assert_close(torch.autograd.grad(own, x)[0], expected, rtol=1e-12, atol=1e-15, equal_nan=True)


def test_logits_that_are_needed_elsewhere_are_an_error_instead_of_a_wrong_score() -> None:
    x = torch.randn(4, 9, requires_grad=True)
    with LeanCrossEntropy():
        logits = x * 2
        loss = logits.exp().sum() + logits.logsumexp(1).sum() + cross_entropy(logits, torch.arange(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
