"""Fisher scoring and its surroundings: the model comes back as it was; wrapped models, modes of torch, many ranks."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stiefel_lora.errors import InputError
from stiefel_lora.fisher import fisher_scores
from stiefel_lora.initialisation import gradient_init
from stiefel_lora.scores import FisherScores
from tests.models import FAMILIES, causal_batch, plain_batch
from tests.ranks import run_on_ranks

LLAMA = FAMILIES["llama"]


# -- the model comes back as it was ------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "use_cache": model.config.use_cache,
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = fingerprint(model)
    for key in ("training", "requires_grad", "hooks", "use_cache"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"], after["rng"])
    for key in ("grads", "values"):
        for a, b in zip(before[key], after[key], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), key


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("backward broke")


def _broken_forward(*_: Any) -> None:
    raise RuntimeError("forward broke")


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("fails", ["", "loader", "forward", "backward"])
def test_the_model_comes_back_as_it_was(labels: Any, fails: str) -> None:
    model = LLAMA.build()
    model.train()
    model.model.layers[1].eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
        if i % 4 == 0:
            p.grad = torch.ones_like(p)
    last = model.model.layers[2].mlp.down_proj
    if fails == "forward":
        last.register_forward_hook(_broken_forward)
    if fails == "backward":
        last.register_forward_hook(lambda _, __, output: _BrokenBackward.apply(output))
    model.model.norm.register_forward_hook(lambda *_: None)
    before = fingerprint(model)

    def batches() -> Iterator[Any]:
        yield causal_batch(2, 7)
        torch.rand(3)
        if fails == "loader":
            raise RuntimeError("loader broke")

    if fails:
        with pytest.raises(RuntimeError, match=f"{fails} broke"):
            fisher_scores(model, batches(), labels=labels, progress=False)
    else:
        fisher_scores(model, batches(), labels=labels, progress=False)
    assert_unchanged(before, model)


# -- wrapped models and modes of torch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_is_scored_as_the_model_inside(wrap: Callable[[nn.Module], Any]) -> None:
    model, batch = FAMILIES["sequential"].build(), plain_batch(3, 5)
    plain = fisher_scores(model, [batch], progress=False)
    wrapped = fisher_scores(wrap(model), [batch], progress=False)
    assert wrapped.names == plain.names == ["net.0", "net.1", "net.2"]
    assert wrapped.scores == plain.scores


def test_it_works_in_inference_mode() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    plain = fisher_scores(model, [batch], progress=False)
    with torch.inference_mode():
        inside = {k: v.clone() for k, v in batch.items()}
        assert fisher_scores(model, [inside], progress=False).scores == plain.scores
        starts = gradient_init(model, [inside], layers=None, rank=2)
    for name, start in gradient_init(model, [batch], layers=None, rank=2).items():
        assert torch.equal(starts[name], start)


def test_empty_batches_are_passed_over() -> None:
    model, batch = LLAMA.build(), causal_batch(3, 8)
    empty = {k: v[:0] for k, v in batch.items()}
    assert fisher_scores(model, [empty, batch], progress=False).n_samples == 3
    with pytest.raises(InputError, match="no calibration batches"):
        fisher_scores(model, [empty], progress=False)


# -- many ranks --------------------------------------------------------------------------------------------------------


def _score_on_rank(rank: int, folder: str, shares: list[list[int]]) -> None:
    model, batch = LLAMA.build(), causal_batch(5, 9)
    mine = [{k: v[shares[rank]] for k, v in batch.items()}] if shares[rank] else []
    try:
        fisher_scores(model, mine, progress=False).save(Path(folder) / f"{rank}.json")
    except InputError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4]], [[0, 1, 2, 3, 4], []]])
def test_ranks_of_a_distributed_job_agree(shares: list[list[int]]) -> None:
    """Also where they see different numbers of samples, or one of them none."""
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, _score_on_rank, folder, shares)
        first, second = (FisherScores.load(Path(folder) / f"{rank}.json") for rank in range(2))
    assert first.scores == second.scores
    assert first.n_samples == 5
    alone = fisher_scores(LLAMA.build(), [causal_batch(5, 9)], progress=False)
    assert first.scores == pytest.approx(alone.scores, rel=1e-5)
    assert first.select() == second.select() == alone.select()


def test_ranks_without_any_batches_fail_together() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, _score_on_rank, folder, [[], []])
        for rank in range(2):
            assert "no calibration batches" in (Path(folder) / f"{rank}.txt").read_text()


def _fail_on_rank(rank: int, folder: str) -> None:
    model, batch = LLAMA.build(), causal_batch(2, 9)
    if rank == 1:
        del batch["labels"]
    for calibrate in (
        lambda: fisher_scores(model, [batch], progress=False),
        lambda: gradient_init(model, [batch], layers=[0], rank=2),
    ):
        with pytest.raises(InputError) as raised:
            calibrate()
        with (Path(folder) / f"{rank}.txt").open("a") as file:
            file.write(f"{raised.value}\n")


def test_an_error_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    run_on_ranks(2, _fail_on_rank, tmp_path)
    others, own = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2))
    assert len(own) == 2 and all("labels" in line for line in own)
    assert others == [f"process 1 of the job failed with InputError: {line}" for line in own]


def _unused_on_rank(rank: int, folder: str) -> None:
    model = Sometimes()
    batches = [{"x": torch.ones(2, 4), "which": torch.tensor([rank, rank])}] if rank < 2 else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = fisher_scores(model, batches, loss_fn=lambda m, b: m(b).mean(1), granularity="module", progress=False)
    (Path(folder) / f"{rank}.txt").write_text("\n".join(str(w.message) for w in caught))
    scores.save(Path(folder) / f"{rank}.json")


class Sometimes(nn.Module):
    """Four layers of which a sample goes through one; nothing goes through the last two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layers[int(batch["which"][0])](batch["x"])


def test_what_another_rank_has_called_is_no_unused_linear(tmp_path: Path) -> None:
    run_on_ranks(3, _unused_on_rank, tmp_path)
    for rank in range(3):
        assert (tmp_path / f"{rank}.txt").read_text().splitlines() == [
            "never called, so their score is zero: layers.2, layers.3; modules= leaves them out"
        ]
        assert [score > 0 for score in FisherScores.load(tmp_path / f"{rank}.json").scores] == [
            True,
            True,
            False,
            False,
        ]
