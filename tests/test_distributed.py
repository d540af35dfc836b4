"""Adapters beside a base that FSDP has split train as in one process, and are never split silently."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from stiefel_lora import RiemannianAdam, RiemannianSGD, add_adapters, load_adapter, orthogonality_error, save_adapter
from stiefel_lora.adapted import adapter_factors
from stiefel_lora.checkpoint import read_adapter
from stiefel_lora.distributed import replicate_adapters
from stiefel_lora.errors import InputError, ManifoldError
from tests.models import FAMILIES, causal_batch
from tests.ranks import run_on_ranks

LLAMA = FAMILIES["llama"]
BATCH = causal_batch(4, 9)

needs_ignored = pytest.mark.skipif(
    "ignored_params" not in inspect.signature(fully_shard).parameters,
    reason="fully_shard ignores parameters, and works with gloo, from torch 2.7 on",
)


def adapted(seed: int = 0) -> Any:
    model = LLAMA.build()
    torch.manual_seed(seed)
    add_adapters(model, layers=[0, 2], rank=4)
    return model.train()


def split(model: Any, **options: Any) -> None:
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)


def steps(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    # Not Adam, which takes the same steps whatever the gradients are multiplied by.
    optimizer = RiemannianSGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    for _ in range(3):
        for batch in batches:  # gradients add up over two backward passes
            (model(**batch).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _train_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Another seed in each process: the second one is to take the first one's adapters.
    model = adapted(seed=rank)
    split(model, ignored_params=replicate_adapters(model))
    mine = {k: v[2 * rank : 2 * rank + 2] for k, v in BATCH.items()}
    steps(model, [{k: v[i : i + 1] for k, v in mine.items()} for i in range(2)])
    for turn in range(2):  # one after the other: saving does not wait for other processes
        if turn == rank:
            save_adapter(model, Path(folder) / f"adapter-{rank}")
        torch.distributed.barrier()


@needs_ignored
def test_two_processes_train_as_one_does() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, _train_on_rank, folder, seconds=200)
        loaded = [LLAMA.build(), LLAMA.build()]
        for rank, model in enumerate(loaded):
            load_adapter(model, Path(folder) / f"adapter-{rank}")
    alone = adapted()
    before = {name: factor.detach().clone() for name, factor in adapter_factors(alone).items()}
    steps(alone, [{k: v[i : i + 1] for k, v in BATCH.items()} for i in range(4)])
    for name, expected in adapter_factors(alone).items():
        first, second = (adapter_factors(model)[name] for model in loaded)
        assert torch.equal(first, second)
        assert not torch.allclose(first, before[name], atol=1e-4)
        # Float32 sums of gradients are taken in another order: gradients that are off by 1e-6 of their size move a
        # factor by 3e-6, and gradients of twice the size by 5e-3 or more.
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
        if name.endswith("lora_A"):
            assert float(orthogonality_error(first)) < 2e-6


def _adam(model: Any, make: Any = RiemannianAdam, **options: Any) -> Any:
    return make([p for p in model.parameters() if p.requires_grad], lr=1e-2, second_moment="row", **options)


def _adam_steps(model: Any, optimizer: Any, count: int) -> None:
    for _ in range(count):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _train_with_split_state(rank: int, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns at import of what torch itself calls

    torch.set_num_threads(1)
    model = adapted()
    optimizer = _adam(model, ZeroRedundancyOptimizer, optimizer_class=RiemannianAdam)
    _adam_steps(model, optimizer, 2)
    held = {id(p) for p in optimizer.optim.state}
    assert 0 < len(held) < len(adapter_factors(model)), "each process holds the state of some parameters"
    optimizer.consolidate_state_dict(0)
    if rank == 0:
        torch.save(optimizer.state_dict(), Path(folder) / "optimizer.pt")
    torch.save(adapter_factors(model), Path(folder) / f"factors-{rank}.pt")


def test_state_split_over_processes_by_zero_trains_as_in_one(tmp_path: Path) -> None:
    run_on_ranks(2, _train_with_split_state, tmp_path, seconds=200)
    alone = adapted()
    optimizer = _adam(alone)
    _adam_steps(alone, optimizer, 2)
    for rank in range(2):
        factors = torch.load(tmp_path / f"factors-{rank}.pt", weights_only=False)
        for name, expected in adapter_factors(alone).items():
            # Pieces of a batch of matrices are of another size there: rounding of a few units in the last place.
            torch.testing.assert_close(factors[name], expected, rtol=0, atol=1e-6)
    # What was put together from all processes goes on in one.
    again = adapted()
    for mine, theirs in zip(again.parameters(), alone.parameters(), strict=True):
        mine.data.copy_(theirs)
    resumed = _adam(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
    _adam_steps(alone, optimizer, 1)
    _adam_steps(again, resumed, 1)
    for name, expected in adapter_factors(alone).items():
        # The moments differ by what the gradients of factors 1e-6 apart do; without them a step is of 1e-2.
        torch.testing.assert_close(adapter_factors(again)[name], expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("default")  # of one process alone, and in torch 2.6 of what torch itself calls
def test_a_distributed_checkpoint_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """torch.distributed.checkpoint makes an optimizer's state by a step without gradients, and fills it."""
    model = adapted()
    optimizer = _adam(model)
    _adam_steps(model, optimizer, 2)
    kept = get_state_dict(model, optimizer)
    checkpoint.save({"model": kept[0], "optimizer": kept[1]}, checkpoint_id=tmp_path / "checkpoint")
    again = adapted(seed=1)
    resumed = _adam(again)
    parts = dict(zip(("model", "optimizer"), get_state_dict(again, resumed), strict=True))
    checkpoint.load(parts, checkpoint_id=tmp_path / "checkpoint")
    set_state_dict(again, resumed, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    for each in ((model, optimizer), (again, resumed)):
        _adam_steps(*each, 2)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def _save_head_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    split(model, ignored_params=replicate_adapters(model))
    with pytest.raises(InputError, match=r"lm_head.weight is split over processes by FSDP.*unshard\(\).*reshard\(\)"):
        save_adapter(model, Path(folder) / f"adapter-{rank}")
    model.unshard()
    save_adapter(model, Path(folder) / f"adapter-{rank}")
    model.reshard()


@needs_ignored
def test_a_head_that_is_split_is_saved_once_it_is_whole() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(2, _save_head_on_rank, folder, seconds=200)
        for rank in range(2):
            saved = read_adapter(Path(folder) / f"adapter-{rank}").parameters
            assert list(saved) == ["lm_head.weight"]
            assert torch.equal(saved["lm_head.weight"], LLAMA.build().lm_head.weight.detach())


@needs_ignored
@pytest.mark.usefixtures("process_group")
def test_split_adapters_do_not_train_silently() -> None:
    model = adapted()
    split(model)
    with pytest.raises(ManifoldError, match="lora_A is a plain parameter.*ignored_params=.*replicate_adapters"):
        model(**BATCH)
    with torch.no_grad():  # an evaluation does no harm
        torch.testing.assert_close(model(**BATCH).logits, adapted()(**BATCH).logits.detach())
    with pytest.raises(InputError, match=r"lora_A is split already; call replicate_adapters before fully_shard"):
        replicate_adapters(model)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no adapters; call add_adapters or load_adapter"):
        replicate_adapters(LLAMA.build())
    with pytest.raises(InputError, match="there is no process group; call torch.distributed.init_process_group"):
        replicate_adapters(adapted())
