"""What only a CUDA device can show: no waiting for it, the same numbers as the CPU's, state that moves between both."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stiefel_lora import (
    _head_loss,
    add_adapters,
    deferred_logits,
    fisher_scores,
    load_adapter,
    save_adapter,
    stiefel,
    training,
)
from stiefel_lora.errors import InputError
from stiefel_lora.optim import RiemannianAdam, RiemannianSGD
from stiefel_lora.training import finetune
from tests.models import FAMILIES
from tests.tiny import tiny_run

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

# Of several sizes, alone, with leading dimensions, square, single columns, and those that LU libraries treat apart;
# the last has its inner products in blocks.
SHAPES = [(64, 8), (64, 8), (40, 8), (3, 20, 4), (6, 6), (12, 1), (80, 32), (80, 32), (2, 2048, 32)]
# The documented exception: torch.linalg.matrix_exp waits.
ASYNCHRONOUS = [name for name in stiefel.RETRACTIONS if name != "exp"]
OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (RiemannianAdam, {}),
    (RiemannianAdam, {"metric": "canonical", "amsgrad": True}),
    (RiemannianAdam, {"second_moment": "row"}),
    (RiemannianAdam, {"second_moment": "element"}),
    (RiemannianSGD, {"momentum": 0.9, "nesterov": True}),
]


def make_parameters(device: str, dtype: torch.dtype, *, ordinary: bool = True) -> list[Tensor]:
    """Return the same parameters with gradients on any device."""
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for *batch, n, r in SHAPES:
        x = stiefel.random_point(n, r, batch=batch, dtype=torch.float64, generator=generator)
        params.append(geoopt.ManifoldParameter(x.to(device, dtype), manifold=geoopt.EuclideanStiefel()))
    if ordinary:
        start = torch.randn(7, 5, dtype=torch.float64, generator=generator)
        params.append(torch.nn.Parameter(start.to(device, dtype)))
    return params


def set_gradients(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.device, p.dtype)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Make waiting for the device an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("retraction", stiefel.RETRACTIONS)
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=str)
def test_steps_are_those_of_the_cpu(make: Any, options: dict[str, Any], retraction: Any) -> None:
    ends = {}
    for device in ("cpu", "cuda"):
        params = make_parameters(device, torch.float64)
        optimizer = make(params, lr=0.05, retraction=retraction, **options)
        for seed in range(10):
            set_gradients(params, seed)
            optimizer.step()
        ends[device] = [p.detach().cpu() for p in params]
        assert max(float(stiefel.orthogonality_error(p).max()) for p in params[:-1]) < 1e-13
    for ours, theirs in zip(ends["cuda"], ends["cpu"], strict=True):
        # Rounding of 1e-16 an operation; these random gradients do not amplify it.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("retraction", ASYNCHRONOUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS, ids=str)
@pytest.mark.usefixtures("no_waiting")
def test_a_step_does_not_wait_for_the_device(
    make: Any, options: dict[str, Any], dtype: torch.dtype, retraction: Any
) -> None:
    params = make_parameters("cuda", dtype)
    optimizer = make(params, lr=0.05, retraction=retraction, **options)
    set_gradients(params, 0)
    optimizer.step()  # makes the state
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()


@pytest.mark.usefixtures("no_waiting")
def test_a_gradient_that_is_not_finite_is_skipped_without_waiting() -> None:
    params = make_parameters("cuda", torch.float32)
    optimizer = RiemannianAdam(params, lr=0.05)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    set_gradients(params, 1)
    for p in params[:2]:
        assert p.grad is not None
        p.grad[0, 0] = torch.inf
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    stayed = [bool((p == old).all()) for p, old in zip(params, before, strict=True)]
    assert stayed == [True] * 2 + [False] * (len(SHAPES) - 1)
    assert optimizer.skipped_updates == 2


CAPTURED: list[tuple[Any, dict[str, Any]]] = [
    (RiemannianAdam, {"capturable": True}),
    (RiemannianAdam, {"capturable": True, "metric": "canonical", "amsgrad": True}),
    (RiemannianAdam, {"capturable": True, "second_moment": "row"}),
    (RiemannianAdam, {"capturable": True, "second_moment": "element"}),
    (RiemannianSGD, {"momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize("retraction", ASYNCHRONOUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "options"), CAPTURED, ids=str)
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_a_captured_step_is_the_step(make: Any, options: dict[str, Any], dtype: torch.dtype, retraction: Any) -> None:
    plain, captured = make_parameters("cuda", dtype), make_parameters("cuda", dtype)
    # torch's own SGD, which has the ordinary ones, cannot be captured with a rate on the device.
    rates = [torch.tensor(0.05, device="cuda") if make is RiemannianAdam else 0.05 for _ in range(2)]
    optimizers = [
        make(params, lr=lr, retraction=retraction, foreach=True, **options)
        for params, lr in zip((plain, captured), rates, strict=True)
    ]
    for params, optimizer in zip((plain, captured), optimizers, strict=True):
        set_gradients(params, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for seed in range(1, 6):
        for rate in rates:
            if isinstance(rate, Tensor):
                rate.fill_(0.05 / seed)
        set_gradients(plain, seed)
        if seed == 3:
            assert plain[0].grad is not None
            plain[0].grad[0, 0] = torch.nan
        for p, q in zip(plain, captured, strict=True):
            assert p.grad is not None
            assert q.grad is not None
            q.grad.copy_(p.grad)
        optimizers[0].step()
        graph.replay()
    for p, q in zip(plain, captured, strict=True):
        # The same kernels on the same numbers, in an order of adding up that need not be the same.
        atol = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(p.detach().as_subclass(Tensor), q.detach().as_subclass(Tensor), rtol=0, atol=atol)
    assert [optimizer.skipped_updates for optimizer in optimizers] == [1, 1]


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_that_could_not_be_replayed_is_refused() -> None:
    params = make_parameters("cuda", torch.float32, ordinary=False)
    set_gradients(params, 0)
    optimizer = RiemannianAdam(params)
    optimizer.step()
    with pytest.raises(InputError, match="needs capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    optimizer = RiemannianAdam(params, capturable=True)
    with pytest.raises(InputError, match="take a step before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_low_precision_keeps_a_master_copy_on_the_device() -> None:
    params = make_parameters("cuda", torch.bfloat16, ordinary=False)
    optimizer = RiemannianAdam(params, lr=0.01)
    for seed in range(20):
        set_gradients(params, seed)
        optimizer.step()
    for p in params:
        master = optimizer.state[p]["master"]
        assert (master.device, master.dtype) == (p.device, torch.float32)
        assert float(stiefel.orthogonality_error(master).max()) < 5e-6
        assert torch.equal(master.to(p.dtype), p.detach().as_subclass(Tensor))


@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_state_moves_between_devices(source: str, target: str) -> None:
    params = {device: make_parameters(device, torch.float64) for device in ("cpu", "cuda")}
    optimizers = {device: RiemannianAdam(p, lr=0.05) for device, p in params.items()}
    for seed in range(3):
        set_gradients(params[source], seed)
        optimizers[source].step()
    with torch.no_grad():
        for own, other in zip(params[target], params[source], strict=True):
            own.copy_(other)
    # A state that is loaded shares the counts of steps, as torch's does.
    optimizers[target].load_state_dict(copy.deepcopy(optimizers[source].state_dict()))
    for device in (source, target):
        set_gradients(params[device], 3)
        optimizers[device].step()
    for own, other in zip(params[target], params[source], strict=True):
        torch.testing.assert_close(own.detach().cpu(), other.detach().cpu(), rtol=0, atol=1e-12)


def test_parameters_on_two_devices_and_a_rate_on_the_device() -> None:
    params = make_parameters("cuda", torch.float32) + make_parameters("cpu", torch.float32, ordinary=False)
    set_gradients(params, 0)
    expected = [p.detach().clone() for p in params]
    RiemannianAdam(params, lr=0.05).step()
    with torch.no_grad():
        for p, old in zip(params, expected, strict=True):
            moved = p.detach().clone()
            p.copy_(old)
            old.copy_(moved)
    RiemannianAdam(params, lr=torch.tensor(0.05, device="cuda"), foreach=False).step()
    for p, moved in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().as_subclass(Tensor), moved.as_subclass(Tensor), rtol=0, atol=1e-6)


def test_scaled_gradients_of_float16() -> None:
    params = make_parameters("cuda", torch.float32)
    optimizer, scaler = RiemannianAdam(params, lr=0.01), torch.amp.GradScaler("cuda", init_scale=1024.0)
    before = [p.detach().clone() for p in params]
    with torch.autocast("cuda", torch.float16):
        # Linear: a quadratic function of a square orthogonal matrix may be constant.
        loss = sum((torch.rand(3, p.shape[-2], device="cuda") @ p).mean() for p in params)
    scaler.scale(loss).backward()  # type: ignore[union-attr]
    scaler.step(optimizer)
    scaler.update()
    assert all(bool((p != old).any()) for p, old in zip(params, before, strict=True))
    assert max(float(stiefel.orthogonality_error(p).max()) for p in params[:-1]) < 5e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_fisher_scores_are_those_of_the_cpu(family: str) -> None:
    kind = FAMILIES[family]
    batches = [kind.batch(4, 12) for _ in range(3)]
    found = {}
    for device in ("cpu", "cuda"):
        model = kind.build().to(device)
        scores = fisher_scores(model, batches, progress=False)
        found[device] = torch.tensor(scores.scores)
    # float32 products in another order.
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-4, atol=0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let several lots of rows and parts of the classes be needed."""
    monkeypatch.setattr(_head_loss, "_ROWS_ACCELERATOR", 512)
    monkeypatch.setattr(_head_loss, "_ENTRIES_ACCELERATOR", 512 * 30)
    monkeypatch.setattr(_head_loss, "_CLASSES", 1)


def a_language_model(dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Return a frozen model with adapters, the base in a dtype, and labels for it."""
    model = FAMILIES["llama"].build().to("cuda", dtype).requires_grad_(False)
    add_adapters(model, layers=None, rank=4)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(model.config.vocab_size, (3, 256), generator=generator).to("cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("small_parts")
def test_deferred_logits_have_the_loss_and_the_gradients_of_all(dtype: torch.dtype, autocast: bool) -> None:
    found = []
    for context in (nullcontext, deferred_logits):
        torch.manual_seed(0)
        model, ids = a_language_model(dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), context(model):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        grads = [p.grad.double() for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert grads
        found.append((loss.detach().double(), torch.cat([g.flatten() for g in grads])))
    (loss, grad), (deferred_loss, deferred_grad) = found
    # Rounding: transformers takes the loss in float32, whatever the model is in.
    eps = torch.finfo(torch.bfloat16 if autocast or dtype == torch.bfloat16 else torch.float32).eps
    assert float((deferred_loss - loss).abs()) <= 4 * eps * float(loss)
    assert float((deferred_grad - grad).norm()) <= 30 * eps * float(grad.norm())


@pytest.mark.usefixtures("no_waiting", "small_parts")
def test_a_deferred_loss_neither_waits_nor_makes_the_logits() -> None:
    features, classes = 64, 20_000
    head = torch.nn.Linear(features, classes, bias=False, device="cuda").requires_grad_(False)
    hidden = torch.randn(2048, features, device="cuda", requires_grad=True)
    target = torch.randint(classes, (len(hidden),), device="cuda")

    class Model(torch.nn.Module):
        def get_output_embeddings(self) -> torch.nn.Linear:
            return head

    with deferred_logits(Model()):
        cross_entropy(head(hidden), target).backward()  # loads the kernels
        hidden.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        cross_entropy(head(hidden), target).backward()
        torch.cuda.set_sync_debug_mode("default")
    whole = len(hidden) * classes * 4
    assert torch.cuda.max_memory_allocated() - before < 0.1 * whole


def test_adapters_are_saved_from_the_device_and_loaded_anywhere(tmp_path: Path) -> None:
    kind = FAMILIES["llama"]
    model, batch = kind.build().to("cuda"), {k: v.to("cuda") for k, v in kind.batch(2, 10).items()}
    add_adapters(model, layers=[0, 2], rank=4)
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, tmp_path / "adapter")
    expected = model.eval()(**batch).logits.detach().cpu()
    for device in ("cpu", "cuda"):
        other = kind.build().to(device)
        load_adapter(other, tmp_path / "adapter")
        logits = other.eval()(**{k: v.to(device) for k, v in batch.items()}).logits.detach().cpu()
        # A forward pass in float32 on another device.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_that_broke_off_ends_where_the_whole_one_does(
    dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_run(tmp_path), dtype=dtype)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = finetune(config, whole, device="cuda", save_every=2)

    step = training._Run._step

    def failing(run: Any) -> int:
        if run.step == 5:
            raise RuntimeError("power cut")
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            finetune(config, broken, device="cuda", save_every=2)
    resumed = finetune(config, broken, device="cuda", save_every=2)
    # The same dropout masks, or the losses would differ in the second digit; some kernels add up in no fixed order.
    assert resumed["loss_curve"] == pytest.approx(expected["loss_curve"], rel=2e-3)
    assert expected["held_out"]["after"]["loss"] < expected["held_out"]["before"]["loss"]
    assert expected["greatest_orthogonality_error"] < 5e-6  # the factors are float32 whatever the base is
    assert expected["device"] == "cuda:0"
