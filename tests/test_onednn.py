"""Matrix products by oneDNN against float64, and what is left to torch."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from stiefel_lora import add_adapters, fisher_scores, onednn, onednn_products
from stiefel_lora.cli import main
from stiefel_lora.config import FinetuneConfig
from stiefel_lora.onednn import batched_products
from stiefel_lora.trainer import StiefelTrainer
from stiefel_lora.training import finetune
from tests.models import FAMILIES
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

# |error|_F / |product|_F of a float32 product of up to 576 terms: oneDNN's were up to 5e-7, MKL's 3e-7. A product in
# TF32 or bfloat16 is off by 1e-4 and more.
ROUNDING = 2e-6

Calls = list[tuple[int, int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The sizes of what oneDNN multiplies, as if it were the faster library, at every size."""
    found: Calls = []
    product = onednn._product

    def spy(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append((*a.shape, b.shape[1]))
        return product(a, b, bias)

    monkeypatch.setattr(onednn, "_product", spy)
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "_ENTRIES", 1)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


INPUTS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(96, 576),
    "batch": lambda: torch.randn(4, 24, 576),
    "vector": lambda: torch.randn(576),
    "rows that are not neighbours": lambda: torch.randn(24, 4, 576).transpose(0, 1),
    "columns first": lambda: torch.randn(576, 96).mT,
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_linear_maps_and_their_gradients_are_those_of_float64(
    make: Callable[[], Tensor], bias: bool, transposed: bool, calls: Calls
) -> None:
    x, weight = make(), torch.randn(576, 192).mT if transposed else torch.randn(192, 576)
    given = [x, weight, *([torch.randn(192)] if bias else [])]
    ours = [z.detach().requires_grad_() for z in given]
    exact = [z.double().requires_grad_() for z in given]
    expected = linear(*exact)
    g = torch.randn(expected.shape)
    with onednn_products():
        y = linear(*ours)
        gradients = torch.autograd.grad(y, ours, g)
    if x.dim() > 1:
        assert {tuple(sorted(call)) for call in calls} == {(96, 192, 576)}
        assert len(calls) >= 3
    assert y.is_contiguous()
    for found, right in zip(
        [y, *gradients], [expected, *torch.autograd.grad(expected, exact, g.double())], strict=True
    ):
        assert found.shape == right.shape
        assert error(found, right) < ROUNDING


@pytest.mark.parametrize("sizes", [(16, 64, 320), (320, 64, 16), (64, 64, 64)])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_either_factor_may_be_turned(sizes: tuple[int, int, int], first: bool, second: bool, calls: Calls) -> None:
    m, k, n = sizes
    a = torch.randn(k, m).mT if first else torch.randn(m, k)
    b = torch.randn(n, k).mT if second else torch.randn(k, n)
    with onednn_products():
        found = a @ b
    assert calls
    assert found.is_contiguous()
    assert error(found, a.double() @ b.double()) < ROUNDING


def _left(name: str) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(8, 64), torch.randn(64, 48)
    return {
        "float64": (a.double(), b.double()),
        "bfloat16": (a.bfloat16(), b.bfloat16()),
        "no memory": (a.to("meta"), b.to("meta")),
        "no rows": (a[:0], b),
        "no columns": (a, b[:, :0]),
        "no terms": (a[:, :0], b[:0]),
        "gaps": (a[:, ::2], b[:32]),
        "sparse": (a.relu().to_sparse_csr(), b),
        "a batch": (a[None].expand(3, 8, 64).contiguous(), b[None].expand(3, 64, 48).contiguous()),
    }[name]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(
    "name",
    ["float64", "bfloat16", "no memory", "no rows", "no columns", "no terms", "gaps", "sparse", "a batch"],
)
def test_other_operands_are_left_to_torch(name: str, calls: Calls) -> None:
    a, b = _left(name)
    expected = a @ b
    with onednn_products():
        found = a @ b
    assert calls == []
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if not found.is_meta:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options", [{"beta": 0.5}, {"alpha": 2}, {"bias": torch.ones(8, 48)}, {"bias": torch.ones(1)}], ids=repr
)
def test_other_sums_are_left_to_torch(options: dict[str, Any], calls: Calls) -> None:
    a, b = torch.randn(8, 64), torch.randn(64, 48)
    bias = options.pop("bias", torch.ones(48))
    expected = torch.addmm(bias, a, b, **options)
    with onednn_products():
        assert torch.equal(torch.addmm(bias, a, b, **options), expected)
    assert calls == []


def test_small_products_are_left_to_torch(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_ENTRIES", 1 << 18)
    with onednn_products():
        torch.randn(8, 64) @ torch.randn(64, 64)
        assert calls == []
        torch.randn(1, 512) @ torch.randn(512, 512)
        torch.randn(512, 64) @ torch.randn(64, 64)
    assert calls == [(1, 512, 512), (512, 64, 64)]


def test_wrong_shapes_have_torchs_errors(calls: Calls) -> None:
    with onednn_products():
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            torch.randn(4, 8) @ torch.randn(9, 4)
        with pytest.raises(RuntimeError, match="expanded size"):
            linear(torch.randn(4, 8), torch.randn(4, 8), torch.randn(3))
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.randn(4, 8) @ torch.randn(8, 4).double()


def test_torchs_kernels_come_back(calls: Calls) -> None:
    a, b = torch.randn(8, 64), torch.randn(64, 64)

    def is_used() -> bool:
        calls.clear()
        torch.addmm(b[0], a, b)
        return bool(calls)

    with onednn_products():
        with onednn_products():
            assert is_used()
        assert is_used()
    assert not is_used()
    with pytest.raises(ZeroDivisionError), onednn_products():
        1 / 0  # noqa: B018
    assert not is_used()


def test_warnings_of_others_are_shown_as_often_as_without(calls: Calls) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            with onednn_products():
                warnings.warn("once a line", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["once a line"]


def test_they_stay_while_any_thread_is_inside(calls: Calls) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with onednn_products():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    with onednn_products():
        pass
    torch.randn(8, 64) @ torch.randn(64, 64)
    assert len(calls) == 1
    leave.set()
    thread.join()
    torch.randn(8, 64) @ torch.randn(64, 64)
    assert len(calls) == 1


def test_autocast_transforms_and_second_derivatives_are_above_it(calls: Calls) -> None:
    x, weight = torch.randn(8, 64), torch.randn(48, 64)
    functions: list[Callable[[], Tensor]] = [
        lambda: torch.func.vmap(linear, (0, None))(x, weight),
        lambda: torch.func.grad(lambda w: linear(x, w).square().sum())(weight),
        lambda: torch.autograd.functional.hvp(lambda w: linear(x, w).pow(3).sum(), weight, weight)[1],
    ]
    for function in functions:
        expected = function()
        with onednn_products():
            assert error(function(), expected.double()) < 10 * ROUNDING  # of products of products
    assert len(calls) > 3
    calls.clear()
    with onednn_products(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert calls == []


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_may_be_run_again_inside_or_outside(use_reentrant: bool, whole: bool, calls: Calls) -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64))
    x = torch.randn(8, 64, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    with onednn_products():
        loss = checkpoint(block, x, use_reentrant=use_reentrant).square().sum()
        if whole:
            loss.backward()
    if not whole:
        loss.backward()
    assert len(calls) >= 2
    for found, right in zip([x, *block.parameters()], expected, strict=True):
        torch.testing.assert_close(found.grad, right)


def test_compiled_functions_run(calls: Calls) -> None:
    x, weight = torch.randn(8, 64), torch.randn(48, 64)
    compiled = torch.compile(lambda: linear(x, weight), backend="aot_eager", fullgraph=True)
    with onednn_products():
        torch.testing.assert_close(compiled(), x @ weight.mT)


def test_it_is_for_processors_that_mkl_leaves_half_unused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    described = tmp_path / "cpuinfo"
    monkeypatch.setattr(onednn, "Path", lambda _: described)
    fresh = onednn.is_faster.__wrapped__
    for vendor, expected in (("GenuineIntel", False), ("AuthenticAMD", True)):
        described.write_text(f"vendor_id\t: {vendor}\n")
        assert fresh() is expected
    described.unlink()
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD")
    assert fresh()
    for backend, name, value in (
        (torch.backends.cpu, "get_cpu_capability", "AVX2"),
        (torch.backends.mkl, "is_available", False),
        (torch.backends.mkldnn, "is_available", False),
    ):
        with monkeypatch.context() as other:
            other.setattr(backend, name, lambda value=value: value)
            assert not fresh()


def test_elsewhere_nothing_is_replaced(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    with onednn_products():
        torch.randn(8, 64) @ torch.randn(64, 64)
    batched_products(torch.randn(2, 8, 64), torch.randn(2, 8, 64))
    assert calls == []


def test_a_lower_precision_that_is_allowed_is_torchs_to_choose(calls: Calls) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with onednn_products():
            torch.randn(8, 64) @ torch.randn(64, 64)
        batched_products(torch.randn(2, 8, 64), torch.randn(2, 8, 64))
    finally:
        torch.set_float32_matmul_precision(before)
    assert calls == []


def test_who_switches_onednn_off_has_none(calls: Calls) -> None:
    torch._C._set_mkldnn_enabled(False)
    try:
        with onednn_products():
            torch.randn(8, 64) @ torch.randn(64, 64)
        batched_products(torch.randn(2, 8, 64), torch.randn(2, 8, 64))
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert calls == []


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("is_faster", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_batched_products_keep_the_precision_of_their_operands(
    is_faster: bool, autocast: bool, turned: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: is_faster)
    a, b = (torch.randn(3, 576, n).mT if turned else torch.randn(3, n, 576) for n in (40, 24))
    with torch.autocast("cpu", enabled=autocast):
        found = batched_products(a, b)
    assert error(found, a.double() @ b.double().mT) < ROUNDING
    assert bool(calls) is is_faster


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_scores_are_the_same_but_for_rounding(family: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(4, 24)
    ours = torch.tensor(fisher_scores(model, [batch], progress=False).scores)
    assert len(calls) > 50
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    torchs = torch.tensor(fisher_scores(model, [batch], progress=False).scores)
    # Squares of gradients through a few layers, in float32.
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=0)


def test_fine_tuning_and_generation_compute_with_it(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FinetuneConfig(
        model=str(save_tiny_model(tmp_path / "model")), steps=3, batch_size=2, seq_len=16, eval_samples=4, budget=1.0
    )
    losses = []
    for is_faster in (True, False):
        calls.clear()
        monkeypatch.setattr(onednn, "is_faster", lambda is_faster=is_faster: is_faster)
        losses.append(finetune(config, tmp_path, device="cpu", resume=False)["loss_curve"])
        assert bool(calls) is is_faster
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32, after up to two steps

    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    words = ["--adapter", str(tmp_path / "adapter"), "--prompt", "x", "--max-new-tokens", "2"]
    assert main(["generate", "--model", str(config.model), *words]) == 0, capsys.readouterr().err
    assert calls


def test_the_trainer_computes_with_it(calls: Calls, tmp_path: Path) -> None:
    llama = FAMILIES["llama"]
    examples: Any = [{key: value[i] for key, value in llama.batch(4, 8).items()} for i in range(4)]
    model = llama.build()
    add_adapters(model, layers=[0, 1], rank=4)
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    trainer = StiefelTrainer(model=model, args=args, train_dataset=examples, eval_dataset=examples)
    for run in (trainer.train, trainer.evaluate):
        calls.clear()
        run()
        assert calls
