"""Adapters beside a base that FSDP has split train as in one process, and are never split silently."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from stiefel_lora import RiemannianSGD, add_adapters, load_adapter, orthogonality_error, save_adapter
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
