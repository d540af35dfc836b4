"""Gradient starts against a dense SVD of autograd's gradients."""

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stiefel_lora._budget import share_of
from stiefel_lora._losses import SampleLosses
from stiefel_lora._models import is_conv1d, linear_shape
from stiefel_lora._sketches import GradientSketches
from stiefel_lora._targets import find_targets
from stiefel_lora.adapted import adapter_layers
from stiefel_lora.adapters import add_adapters, remove_adapters
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import Scoring, fisher_select, score
from stiefel_lora.initialisation import allocate_ranks, gradient_init, select_and_start
from tests.models import FAMILIES, plain_batch, side_by_side
from tests.ranks import run_on_ranks
from tests.reference.fisher import singles
from tests.test_layer import QuantisedLinear


def dense_gradient(family: str, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """The sum of the batches' gradients of one weight, shape (out, in)."""
    model = FAMILIES[family].build().double()
    for batch in batches:
        model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).loss.backward()
    gradient = model.get_submodule(name).weight.grad
    return gradient.T if family == "gpt2" else gradient


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_spans_are_those_of_the_gradient(family: str, orthonormal: Any) -> None:
    model = FAMILIES[family].build().double()
    batches = [FAMILIES[family].batch(2, 7), FAMILIES[family].batch(3, 9)]
    options = {"layers": [1], "rank": 3, "orthonormal": orthonormal}
    starts = gradient_init(model, iter(batches), **options)
    add_adapters(model, **options, init=starts)
    for name, layer in adapter_layers(model).items():
        u, _, vh = torch.linalg.svd(dense_gradient(family, name, batches))
        expected = {"lora_A": vh[:3].T, "lora_B": u[:, :3]}
        for key, factor in layer.manifold_parameters().items():
            # The models take the loss in float32, and round its gradient by 1e-7; gaps between values enlarge that.
            projector = expected[key] @ expected[key].T
            torch.testing.assert_close(factor @ factor.T, projector, rtol=0, atol=1e-6)


def free_gradient(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The squared norm of the free factors' gradients of the summed loss, over the scaling of the updates."""
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    layers = adapter_layers(model).values()
    return sum(float(layer.lora_B.grad.square().sum()) / layer.scaling**2 for layer in layers)  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_allocated_ranks_descend_most_steeply(family: str) -> None:
    batches = [FAMILIES[family].batch(2, 7), FAMILIES[family].batch(3, 9)]
    build = lambda: FAMILIES[family].build().double()  # noqa: E731
    ranks, starts = allocate_ranks(build(), iter(batches), rank=4, budget=0.5, max_rank=12)
    targets = find_targets(build(), None, None, None)
    shapes = {name: linear_shape(build().get_submodule(name)) for name in targets}
    budget = sum(4 * sum(shape) for shape in shapes.values()) // 2
    # Oracle: dense SVDs of autograd's gradients, and the order of their values by square and size.
    values = {name: torch.linalg.svdvals(dense_gradient(family, name, batches))[:12] for name in targets}
    order = sorted(
        ((float(v) ** 2 / sum(shapes[name]), name) for name, all_of in values.items() for v in all_of), reverse=True
    )
    expected, left = dict.fromkeys(targets, 0), budget
    for _, name in order:
        if sum(shapes[name]) <= left:
            expected[name] += 1
            left -= sum(shapes[name])
    assert ranks == {name: r for name, r in expected.items() if r}
    assert len(set(ranks.values())) > 2

    model = build()
    add_adapters(model, layers=None, target_modules=list(ranks), rank=4, rank_pattern=ranks, init=starts)
    assert sum(f.numel() for layer in adapter_layers(model).values() for f in layer.factors().values()) <= budget
    steepness = free_gradient(model, batches)
    # In float64; the Gram matrix squares the condition of the leading values.
    assert steepness == pytest.approx(sum(float(values[n][:r].square().sum()) for n, r in ranks.items()), rel=1e-8)
    alike = build()
    where: dict[str, Any] = {"layers": None, "rank": 2}
    add_adapters(alike, **where, init=gradient_init(build(), batches, **where))
    assert steepness > free_gradient(alike, batches)


def test_ranks_are_not_allocated_to_rounding() -> None:
    """Gradients of so few tokens have a low rank; in float32 their other singular values are not quite zero."""
    batches = [FAMILIES["llama"].batch(1, 3)]
    ranks, _ = allocate_ranks(FAMILIES["llama"].build(), batches, rank=4, budget=1.0)
    exact = {name: dense_gradient("llama", name, batches) for name in ranks}
    # What is zero in float64 is rounding as a whole in float32, which the size of its own values cannot tell.
    largest = max(gradient.norm() for gradient in exact.values())
    some = [name for name, gradient in exact.items() if gradient.norm() > 1e-6 * largest]
    assert len(some) > 8
    assert {name: ranks[name] for name in some} == {name: int(torch.linalg.matrix_rank(exact[name])) for name in some}
    assert len(ranks) == 15


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
@pytest.mark.parametrize("budget", [0.03, 0.4, 1.0])
def test_allocated_ranks_keep_to_the_budget(orthonormal: Any, budget: float) -> None:
    model, batches = FAMILIES["llama"].build(), [FAMILIES["llama"].batch(2, 7)]
    options: dict[str, Any] = {"layers": [0, 2], "rank": 4, "orthonormal": orthonormal}
    ranks, starts = allocate_ranks(model, batches, **options, budget=budget)
    assert max(ranks.values()) <= 16
    full = add_adapters(model, **options)
    parameters = lambda: sum(p.numel() for p in model.parameters() if p.requires_grad)  # noqa: E731
    most = budget * parameters()
    remove_adapters(model)
    names = add_adapters(
        model, layers=None, target_modules=list(ranks), rank=4, rank_pattern=ranks, init=starts, orthonormal=orthonormal
    )
    assert names == list(ranks) and set(names) <= set(full)
    # What is left does not pay for another rank of the smallest map (48 by 32 is the largest).
    assert most - 120 < parameters() <= most


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_ranks_from_sums_of_all_directions_are_those_of_exact_gradients(orthonormal: Any) -> None:
    """Batches of one sample, which count the same either way; only some of the layers."""
    model = FAMILIES["gpt2"].build().double()
    batches = [FAMILIES["gpt2"].batch(1, length) for length in (5, 7, 9)]
    options: dict[str, Any] = {"rank": 4, "budget": 0.4, "layers": [0, 2], "orthonormal": orthonormal}
    ranks, starts = allocate_ranks(model, batches, **options)
    found, near = allocate_ranks(model, iter(batches), **options, oversampling=1000)
    assert found == ranks
    for name, start in starts.items():
        pairs = zip(start, near[name], strict=True) if orthonormal == "both" else [(start, near[name])]
        for x, y in pairs:
            # The model takes its loss in float32; see check_spans.
            torch.testing.assert_close(x @ x.T, y @ y.T, rtol=0, atol=1e-6)


def test_ranks_from_truncated_sums_hold_most_of_the_gradient_and_take_quantised_bases() -> None:
    """Of the mean over samples, which they count alike.

    8 directions besides the 8 that may be used, of 32: 0.9 of what exact ones hold (seen: 1.003)."""
    model, batches = FAMILIES["llama"].build(), [FAMILIES["llama"].batch(3, 24), FAMILIES["llama"].batch(4, 30)]
    options: dict[str, Any] = {"rank": 4, "max_rank": 8}
    _, starts = allocate_ranks(model, batches, **options, oversampling=8)
    _, best = allocate_ranks(model, batches, **options)
    held = []
    for chosen in (starts, best):
        gradients = mean_gradients(model, chosen, batches)
        held.append(sum(float((g @ chosen[name]).square().sum()) for name, g in gradients.items()))
    assert held[0] > 0.9 * held[1]
    for layer in model.model.layers:
        layer.mlp.up_proj = QuantisedLinear(layer.mlp.up_proj)
    quantised, _ = allocate_ranks(model, batches, **options, oversampling=8)
    assert any(name.endswith("up_proj") for name in quantised)
    with pytest.raises(InputError, match="oversampling must not be negative, got -1"):
        allocate_ranks(model, batches, rank=4, oversampling=-1)


def test_bad_input_for_allocated_ranks() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(2, 7)
    for options, error, message in (
        ({"budget": 0.0}, InputError, r"\(0, 1\], got 0.0"),
        ({"budget": True}, InputError, r"\(0, 1\], got True"),
        ({"budget": 1}, InputError, r"a float in \(0, 1\], got 1"),
        ({"budget": 1e-4}, InputError, r"must be at least 0\.\d+, for one direction; got 0.0001"),
        ({"max_rank": 0}, InputError, "max_rank must be at least 1, got 0"),
        ({"max_rank": 2.5}, TypeError, "max_rank must be an int, got float"),
        ({"max_rank": True}, TypeError, "max_rank must be an int, got bool"),
        ({"rank": 17}, InputError, r"k_proj: rank must be in \[1, 16\]"),
        ({"rank": 2.0}, TypeError, "rank must be an int"),
        ({"orthonormal": "C"}, InputError, "orthonormal must be one of"),
    ):
        consumed = iter([batch])
        with pytest.raises(error, match=message):  # type: ignore[call-overload]
            allocate_ranks(model, consumed, **{"rank": 2, **options})  # type: ignore[arg-type]
        assert next(consumed) is batch  # told before the pass
    with pytest.raises(InputError, match="the gradients of all linear maps to adapt are zero"):
        allocate_ranks(model, [batch], rank=2, loss_fn=lambda m, b: 0 * m(**b).loss)


@pytest.mark.parametrize("orthonormal", ["A", "both"])
def test_the_least_budget_that_is_named_is_enough(orthonormal: Any) -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(2, 7)
    options: dict[str, Any] = {"rank": 4, "orthonormal": orthonormal}
    with pytest.raises(InputError, match="for one direction") as caught:
        allocate_ranks(model, [batch], **options, budget=1e-4)
    least = float(str(caught.value).split("at least ")[1].split(",")[0])
    ranks, _ = allocate_ranks(model, [batch], **options, budget=least)
    # Of the smallest, whose adapters of rank 1 have 32 + 16 parameters (key and value), and 1 for S.
    assert list(ranks.values()) == [1] and next(iter(ranks)).endswith(("k_proj", "v_proj"))
    with pytest.raises(InputError, match="for one direction"):
        allocate_ranks(model, [batch], **options, budget=least - 1e-4)


def test_the_model_comes_back_as_it_was_also_after_an_error() -> None:
    model = FAMILIES["llama"].build().train()
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if batch is None:
            raise KeyError
        return model(**batch).logits.square().mean()

    batch = FAMILIES["llama"].batch(2, 7)
    gradient_init(model, [batch], layers=[0], rank=2, loss_fn=loss)
    with pytest.raises(KeyError):
        gradient_init(model, [batch, None], layers=[0], rank=2, loss_fn=loss)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["model.norm.weight"]


def test_bad_input() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(2, 7)
    with pytest.raises(InputError, match="no batches"):
        gradient_init(model, [], layers=[0], rank=2)
    with pytest.raises(InputError, match=r"k_proj: rank must be in \[1, 16\] .*, got 17"):
        gradient_init(model, [batch], layers=[0], rank=17)
    with pytest.raises(TypeError, match="k_proj: rank must be an int, got float"):
        gradient_init(model, [batch], layers=[0], rank=2.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the loss depends on none of the linear maps to adapt"):
        gradient_init(model, [batch], layers=[0], rank=2, loss_fn=lambda m, b: torch.zeros(()))
    with pytest.raises(InputError, match="NaN"):
        gradient_init(model, [batch], layers=[0], rank=2, loss_fn=lambda m, b: m(**b).loss * torch.nan)
    with pytest.raises(InputError, match="the model returned no loss for a batch of input_ids"):
        gradient_init(model, [{"input_ids": batch["input_ids"]}], layers=[0], rank=2)
    with pytest.raises(InputError, match="gradients of all linear maps to adapt are zero; are all labels -100"):
        gradient_init(model, [{**batch, "labels": torch.full_like(batch["labels"], -100)}], layers=[0], rank=2)
    with pytest.raises(InputError, match="orthonormal must be one of"):
        gradient_init(model, [batch], layers=[0], rank=2, orthonormal="C")  # type: ignore[arg-type]
    model.model.layers[0].mlp.up_proj = QuantisedLinear(nn.Linear(32, 56))
    with pytest.raises(InputError, match="quantised"):
        gradient_init(model, [batch], layers=[0], rank=2)
    add_adapters(model, layers=[1], rank=2)
    with pytest.raises(InputError, match="the model has adapters"):
        gradient_init(model, [batch], layers=[1], rank=2)


def test_one_gradient_at_a_time_is_there_besides_the_totals() -> None:
    model, batches = FAMILIES["llama"].build(), [FAMILIES["llama"].batch(2, 7)] * 2
    names = find_targets(model, None, None, None)
    arrived: list[Any] = []
    alive = []

    def see(gradient: Tensor) -> None:
        arrived.append(weakref.ref(gradient))  # lives on as long as autograd holds the tensor
        alive.append(sum(each() is not None for each in arrived))

    for name in names:
        model.get_submodule(name).weight.register_hook(see)
    gradient_init(model, batches, layers=None, rank=2)
    assert len(alive) == 2 * len(names) == 30
    assert max(alive) == 1


def test_other_gradients_are_left_alone() -> None:
    """Those of what else a loss depends on, and those of a step before; the uses of a shared weight add up."""
    torch.manual_seed(1)
    model = Reused().double()
    x, y = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    before = model.layers[0][0].weight.grad = torch.ones(6, 6, dtype=torch.float64)
    options: dict[str, Any] = {"layers": None, "rank": 2, "target_modules": "all-linear"}
    starts = gradient_init(model, [{"x": x, "y": y}], **options, loss_fn=lambda m, b: m(**b)["loss"] * scale)
    assert scale.grad is None and model.layers[0][0].weight.grad is before and bool((before == 1).all())
    assert not any(p._backward_hooks for p in model.parameters())
    check_spans(starts, mean_gradients(model, starts, [{"x": x, "y": y}]), 2)


def test_of_one_loss_a_sample_the_mean_is_taken() -> None:
    model, batch = FAMILIES["sequential"].build(), plain_batch(3, 5)

    def each(net: nn.Module, batch: Any) -> Tensor:
        return (net.net(batch["x"]) - batch["y"]).square().mean((1, 2))

    options: dict[str, Any] = {"layers": [0], "rank": 2, "target_modules": "all-linear"}
    starts = [
        gradient_init(model, [batch], loss_fn=loss_fn, **options)
        for loss_fn in (each, lambda net, batch: each(net, batch).mean())
    ]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[1])


# -- selection and starts in one pass ----------------------------------------------------------------------------------


def mean_gradients(model: Any, names: Iterable[str], batches: list[Any]) -> dict[str, Tensor]:
    """The mean over samples of the gradient of each sample's own loss, by autograd, shape (out, in)."""
    modules = {name: model.get_submodule(name) for name in names}
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    totals = [torch.zeros_like(weight) for weight in weights]
    samples = [one for batch in batches for one in singles(batch)]
    for one in samples:
        for total, gradient in zip(totals, torch.autograd.grad(model(**one)["loss"], weights), strict=True):
            total += gradient / len(samples)
    oriented = (g.T if is_conv1d(m) else g for g, m in zip(totals, modules.values(), strict=True))
    return dict(zip(modules, oriented, strict=True))


def check_spans(starts: dict[str, Any], gradients: dict[str, Tensor], rank: int, side: str = "A") -> None:
    assert list(starts) == list(gradients)
    for name, gradient in gradients.items():
        u, _, vh = torch.linalg.svd(gradient)
        expected = {"A": [vh[:rank].T], "B": [u[:, :rank]], "both": [vh[:rank].T, u[:, :rank]]}[side]
        got = starts[name] if side == "both" else (starts[name],)
        for x, y in zip(got, expected, strict=True):
            # float64, but GPT-2 takes its loss in float32; a sample too much or a wrong weight would change 1e-2.
            torch.testing.assert_close(x @ x.T, y @ y.T, rtol=0, atol=1e-6)


EXACT = {"oversampling": 1000, "progress": False}  # as many columns as the gradient has: nothing is left out


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
@pytest.mark.parametrize("family", ["vit", "gpt2", "sequential"])
def test_one_pass_gives_the_layers_and_the_exact_spans(family: str, orthonormal: Any) -> None:
    """Families that compute in float64 throughout; padded rows, and batches whose loss weights them unequally."""
    model = FAMILIES[family].build().double()
    batches = [to_double(FAMILIES[family].batch(2, 7)), to_double(FAMILIES[family].batch(3, 9))]
    where = {"rank": 3, "orthonormal": orthonormal, "target_modules": "all-linear"}
    layers, starts = select_and_start(model, iter(batches), budget=2, **where, **EXACT)
    assert layers == fisher_select(model, batches, budget=2, progress=False)
    check_spans(starts, mean_gradients(model, starts, batches), 3, orthonormal)
    assert add_adapters(model, layers=layers, **where, init=starts) == list(starts)


@pytest.mark.parametrize(("stratified", "expected"), [(False, [0, 1]), (True, [0, 2])])
def test_one_pass_may_choose_layers_of_each_depth(stratified: bool, expected: list[int]) -> None:
    model, batches = side_by_side(30, 10, 3, 1)
    options: Any = {"budget": 2, "stratified": stratified, "progress": False}
    layers, starts = select_and_start(model, batches, rank=2, target_modules="all-linear", **options)
    assert layers == fisher_select(model, batches, **options) == expected
    assert list(starts) == [f"layers.{i}" for i in expected]


def to_double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def test_pairs_belong_together() -> None:
    """u_i^T G v_i is the i-th singular value, positive."""
    model, batch = FAMILIES["gpt2"].build().double(), FAMILIES["gpt2"].batch(3, 9)
    _, starts = select_and_start(model, [batch], rank=3, orthonormal="both", **EXACT)
    for name, gradient in mean_gradients(model, starts, [batch]).items():
        right, left = starts[name]
        values = torch.linalg.svdvals(gradient)[:3]
        # The loss is taken in float32.
        torch.testing.assert_close(left.T @ gradient @ right, values.diag(), rtol=0, atol=1e-6 * float(values[0]))


def test_few_columns_hold_most_of_the_gradient() -> None:
    """With rank + 8 columns of 32, and slowly falling singular values: 0.9 of what the best 4 hold (seen: 0.967)."""
    model, batches = FAMILIES["llama"].build(), [FAMILIES["llama"].batch(3, 24), FAMILIES["llama"].batch(4, 30)]
    _, starts = select_and_start(model, batches, rank=4, budget=1.0, progress=False)
    shares = []
    for name, gradient in mean_gradients(model, starts, batches).items():
        best = torch.linalg.svdvals(gradient)[:4].square().sum()
        shares.append(float((gradient @ starts[name]).square().sum() / best))
    assert min(shares) > 0.9


@pytest.mark.parametrize("rows", [1, 2])
def test_parts_of_a_batch_count_each_sample_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = FAMILIES["gpt2"].build().double(), [FAMILIES["gpt2"].batch(5, 9), FAMILIES["gpt2"].batch(3, 7)]
    monkeypatch.setattr(SampleLosses, "_rows", lambda self, batch, size: rows)
    _, starts = select_and_start(model, batches, rank=3, **EXACT)
    check_spans(starts, mean_gradients(model, starts, batches), 3)


@pytest.mark.parametrize("length", [5, 3])
def test_what_a_failed_evaluation_brought_is_not_counted(length: int) -> None:
    """Sequence-first: seen from the shape, or (T = batch) only after the batch was evaluated."""

    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = FAMILIES["sequential"].build().net

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x.transpose(0, 1)).transpose(0, 1)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    model = SequenceFirst().double()
    # Samples of unequal weight: were positions taken for samples, theirs would be wrong.
    labels = torch.arange(3 * length).view(3, length) % 12
    labels[torch.arange(length) > torch.arange(3)[:, None]] = -100
    batch = {"x": plain_batch(3, length)["x"].double(), "labels": labels}
    layers, starts = select_and_start(model, [batch], rank=2, budget=1.0, target_modules=["1"], **EXACT)
    assert layers == [0, 1, 2]
    check_spans(starts, mean_gradients(model, starts, [batch]), 2)


def test_a_loss_without_known_weights_is_taken_one_sample_at_a_time() -> None:
    model, batch = FAMILIES["gpt2"].build().double(), FAMILIES["gpt2"].batch(4, 9)
    odd = lambda m, b: m(**b).loss * (1 + len(b["input_ids"]) % 2)  # noqa: E731
    _, starts = select_and_start(model, [batch], rank=3, loss_fn=odd, **EXACT)
    check_spans(starts, mean_gradients(model, starts, [batch]), 3)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("each", [False, True])
def test_samples_that_are_not_finite_do_not_count(size: int, each: bool) -> None:
    model, batch = FAMILIES["sequential"].build().double(), to_double(plain_batch(4, 5))
    good = {k: v[[0, 1, 3]] for k, v in batch.items()}
    batch["x"][2, 1, 1] = torch.nan
    batches = [{k: v[n : n + size] for k, v in batch.items()} for n in range(0, 4, size)]
    loss = lambda m, b: (m(**b)["out"] - b["y"]).square().mean((1, 2))  # noqa: E731
    options = {"rank": 2, "target_modules": ["1", "3"], "loss_fn": loss if each else None}
    with pytest.warns(UserWarning, match="1 of 4 samples"):
        _, starts = select_and_start(model, batches, **options, **EXACT)
    check_spans(starts, mean_gradients(model, starts, [good]), 2)


class Reused(nn.Module):
    """Two layers; the first's maps run twice in one forward pass, the second's two maps share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]) for _ in range(2)])
        self.layers[1][1].weight = self.layers[1][0].weight

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        (a, b), (c, d) = self.layers
        h = torch.tanh(b(torch.tanh(a(torch.tanh(a(x))))))
        return {"loss": (d(torch.tanh(c(h))) - y).square().mean()}


def test_a_weight_that_is_used_twice_is_seen_whole() -> None:
    torch.manual_seed(1)
    model = Reused().double()
    x, y = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    batch = {"x": x, "y": y}
    _, starts = select_and_start(model, [batch], rank=2, budget=1.0, target_modules="all-linear", **EXACT)
    assert len(starts) == 4
    check_spans(starts, mean_gradients(model, starts, [batch]), 2)


def test_ranks_and_targets_are_those_of_add_adapters() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(3, 9)
    where = {"rank": 2, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 5}}
    layers, starts = select_and_start(model, [batch], budget=1, **where, progress=False)
    assert [tuple(start.shape) for start in starts.values()] == [(32, 2), (56, 5)]
    add_adapters(model, layers=layers, **where, init=starts)
    for name, layer in adapter_layers(model).items():
        torch.testing.assert_close(layer.lora_A.detach().as_subclass(Tensor), starts[name], rtol=0, atol=0)


class Idle(nn.Module):
    """One layer with a linear that is used and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({n: nn.Linear(6, 6) for n in ("used", "idle")})])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers[0]["used"](x).square().mean()}


@pytest.mark.parametrize("orthonormal", ["A", "B", "both"])
def test_a_linear_without_a_gradient_starts_at_random_and_says_so(orthonormal: Any) -> None:
    model, batch = Idle(), {"x": torch.randn(3, 4, 6)}
    where: dict[str, Any] = {"rank": 2, "target_modules": ["used", "idle"], "orthonormal": orthonormal}
    no_gradient = pytest.warns(UserWarning, match=r"no gradient reached layers\.0\.idle, which will start at random")
    with pytest.warns(UserWarning, match=r"never called.*layers\.0\.idle"), no_gradient:
        layers, one_pass = select_and_start(model, [batch], **where, progress=False)
    state = torch.get_rng_state()
    with no_gradient:
        starts = gradient_init(model, [batch], layers=[0], **where)
    with no_gradient:
        other = gradient_init(model, [batch], layers=[0], **where, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    flat = lambda start: torch.stack(start) if orthonormal == "both" else start  # noqa: E731
    idle, used = (flat(starts[f"layers.0.{name}"]) for name in ("idle", "used"))
    # The same rows for the same seed; neither the axes, which singular vectors of zero are, nor another seed's.
    assert torch.equal(idle, flat(one_pass["layers.0.idle"]))
    assert bool((idle != 0).all()) and not torch.equal(idle, flat(other["layers.0.idle"]))
    assert torch.equal(used, flat(other["layers.0.used"]))
    add_adapters(model, layers=layers, **where, init=starts)


def test_a_linear_without_a_gradient_gets_no_rank() -> None:
    ranks, starts = allocate_ranks(Idle(), [{"x": torch.randn(3, 4, 6)}], rank=2, target_modules="all-linear")
    assert list(ranks) == list(starts) == ["layers.0.used"]


def test_quantised_bases_and_bfloat16_get_starts() -> None:
    model, batch = FAMILIES["llama"].build().bfloat16(), FAMILIES["llama"].batch(2, 7)
    for layer in model.model.layers:
        layer.mlp.up_proj = QuantisedLinear(nn.Linear(32, 56))
    layers, starts = select_and_start(model, [batch], rank=2, progress=False)
    assert {start.dtype for start in starts.values()} == {torch.float32}
    assert f"model.layers.{layers[0]}.mlp.up_proj" in add_adapters(model, layers=layers, rank=2, init=starts)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_gradients_of_float16_may_be_far_below_its_range_or_near_its_end(size: float) -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(3, 8)
    where: Any = {"layers": None, "rank": 2}
    expected = gradient_init(model, [batch], **where)
    got = gradient_init(model.half(), [batch], **where, loss_fn=lambda model, batch: size * model(**batch).loss)
    for name, start in expected.items():
        # The share of one plane in the other; float16 has 11 bits.
        assert (start.T @ got[name]).square().sum() > 2 * (1 - 1e-3), name


def test_one_pass_leaves_no_trace_and_repeats_itself() -> None:
    model = FAMILIES["llama"].build().train()
    model.lm_head.requires_grad_(False)
    batch = FAMILIES["llama"].batch(2, 7)
    flags, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    state = torch.get_rng_state()
    first, second = (select_and_start(model, [batch], rank=2, progress=False)[1] for _ in range(2))
    other = select_and_start(model, [batch], rank=2, seed=1, progress=False)[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_ranks_may_be_given_for_layers_that_are_not_chosen() -> None:
    model, batches = FAMILIES["llama"].build(), [FAMILIES["llama"].batch(2, 7)]
    pattern = {f"layers.{i}.self_attn.q_proj": 2 + i for i in range(3)}
    layers, starts = select_and_start(model, batches, rank=2, budget=1, rank_pattern=pattern)
    add_adapters(model, layers=layers, rank=2, rank_pattern=pattern, init=starts)
    assert adapter_layers(model)[f"model.layers.{layers[0]}.self_attn.q_proj"].rank == 2 + layers[0]
    with pytest.raises(InputError, match="rank_pattern o_proj matches none of the adapted linears"):
        select_and_start(remove_adapters(model), batches, rank=2, rank_pattern={"o_proj": 2})


def test_bad_input_for_one_pass() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch(2, 7)
    consumed = iter([batch])
    with pytest.raises(InputError, match=r"k_proj: rank must be in \[1, 16\] .*, got 17"):
        select_and_start(model, consumed, rank=17)
    with pytest.raises(TypeError, match="k_proj: rank must be an int, got float"):
        select_and_start(model, consumed, rank=2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="oversampling must not be negative, got -1"):
        select_and_start(model, consumed, rank=2, oversampling=-1)
    with pytest.raises(InputError, match="orthonormal must be one of"):
        select_and_start(model, consumed, rank=2, orthonormal="C")  # type: ignore[arg-type]
    assert next(consumed) is batch  # all of this is told before the pass
    with pytest.raises(InputError, match="no calibration batches"):
        select_and_start(model, [], rank=2)
    add_adapters(model, layers=[1], rank=2)
    with pytest.raises(InputError, match="the model has adapters"):
        select_and_start(model, [batch], rank=2)


def test_a_gradient_of_low_rank_is_found_exactly() -> None:
    """Three samples of one position: rank 3, of 5 columns kept, and one of the 4 directions asked for is free."""
    model = FAMILIES["sequential"].build().double()
    batch = to_double({k: v[:, :1] for k, v in plain_batch(3, 2).items()})
    options: dict[str, Any] = {"target_modules": ["1"], "progress": False, "budget": 1.0}
    _, three = select_and_start(model, [batch], rank=3, oversampling=2, **options)
    check_spans(three, mean_gradients(model, three, [batch]), 3)
    _, four = select_and_start(model, [batch], rank=4, oversampling=0, orthonormal="both", **options)
    for name, gradient in mean_gradients(model, four, [batch]).items():
        right, left = four[name]
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(right.T @ right, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(left @ left.T @ gradient @ right @ right.T, gradient, rtol=0, atol=1e-12)


def test_no_weight_gradient_is_kept() -> None:
    """Over 8 batches, what is held between them is k positions a target, and the test matrices of its widths."""
    model, k = FAMILIES["llama"].build(), 5
    sketches = GradientSketches({name: k for name in find_targets(model, None, None, None)})
    batches = [FAMILIES["llama"].batch(3, 9) for _ in range(8)]
    score(model, batches, Scoring(progress=False), sketches)
    assert sketches.staged_bytes == 0 and not sketches._kept
    for name, (a, g) in sketches._total.items():
        n_in, n_out = linear_shape(model.get_submodule(name))
        assert a.shape == (k, n_in) and g.shape == (k, n_out)


def _starts(model: nn.Module, batches: list[Any]) -> tuple[Any, ...]:
    """Exact starts of some layers, and exact ranks and starts of all."""
    starts = gradient_init(model, batches, layers=[0, 2], rank=2, target_modules=["1"])
    return starts, *allocate_ranks(model, batches, rank=2, target_modules=["1", "3"])


def _parts() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    batch = to_double(plain_batch(5, 4))
    return FAMILIES["sequential"].build().double(), [
        {k: v[rows] for k, v in batch.items()} for rows in ([0, 1, 2], [3, 4])
    ]


def _start_on_rank(rank: int, folder: str) -> None:
    model, parts = _parts()
    mine = parts[rank : rank + 1]
    one_pass = select_and_start(model, mine, rank=2, target_modules=["1"], **EXACT)
    exact = _starts(model, mine)
    with pytest.raises(InputError, match="no batches to take gradients of"):
        _starts(model, [])
    torch.save((one_pass, exact), Path(folder) / f"{rank}.pt")


def test_ranks_of_a_distributed_job_get_the_starts_of_all_samples(tmp_path: Path) -> None:
    """Also one that has no samples of its own."""
    run_on_ranks(3, _start_on_rank, tmp_path)
    model, parts = _parts()
    batch = to_double(plain_batch(5, 4))
    expected = _starts(model, parts)
    for rank in range(3):
        (layers, starts), exact = torch.load(tmp_path / f"{rank}.pt")
        assert layers == fisher_select(model, [batch], progress=False)
        check_spans(starts, mean_gradients(model, starts, [batch]), 2)
        # Sums of two terms in float64 are the same in either order.
        torch.testing.assert_close(exact, expected, rtol=0, atol=0)


def test_a_share_of_the_parameters_is_not_one_short_by_the_rounding_of_floats() -> None:
    assert int(0.29 * 25600) == 7423
    assert [share_of(0.29, 25600), share_of(0.5, 3), share_of(1.0, 7)] == [7424, 1, 7]


def test_batches_without_a_label_are_named() -> None:
    family = FAMILIES["llama"]
    batch = family.batch(2, 8)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    zero = lambda model, batch: model(input_ids=batch["input_ids"]).logits.sum() * 0.0  # noqa: E731
    with pytest.raises(InputError, match="the gradients of all linear maps to adapt are zero"):
        allocate_ranks(family.build(), [batch], rank=2, budget=0.5, loss_fn=zero)


def test_oversampling_is_a_whole_number() -> None:
    family = FAMILIES["llama"]
    with pytest.raises(TypeError, match="oversampling must be an int, got float"):
        allocate_ranks(family.build(), [family.batch(2, 8)], rank=2, budget=0.5, oversampling=2.5)  # type: ignore[arg-type]
