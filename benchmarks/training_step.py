"""What does a training step take, in time and memory, as torch computes it and as the commands do?

Forward and backward pass of random tokens, adapters of rank 16 on all layers, the rest frozen: SmolLM2-135M (or
--model), and a random model with the sizes of Gemma-3-270M, whose vocabulary of 262,144 words is the most of it. With
oneDNN's matrix products where those are faster (`onednn_products`), with no more logits at a time than a loss needs
(`deferred_logits`), and with both, all in turn. The peak memory of each is measured in a process of its own, on CUDA
that which torch's allocator has given out.

    python -m benchmarks training_step
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import _harness, _tasks
from stiefel_lora import add_adapters, deferred_logits, onednn_products
from stiefel_lora.onednn import is_faster
from stiefel_lora.pretrained import DTYPES, find_device, load_pretrained

TORCH, ONEDNN, DEFERRED, BOTH = "as torch computes it", "by oneDNN", "logits deferred", "both"
_CONTEXTS: dict[str, tuple[Callable[[Any], Any], ...]] = {
    TORCH: (),
    ONEDNN: (lambda model: onednn_products(),),
    DEFERRED: (deferred_logits,),
    BOTH: (lambda model: onednn_products(), deferred_logits),
}
METHODS = tuple(_CONTEXTS)


@dataclass(frozen=True)
class Size:
    """What is computed, and where: samples x tokens, the device, and the precision of the base."""

    tokens: tuple[int, int]
    device: torch.device
    dtype: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this study's options."""
    count = _harness.positive(int)
    _harness.add_model(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    # float16 defers no logits.
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--batch-size", type=count, default=4, help="samples of a step (default: 4)")
    parser.add_argument("--seq-len", type=count, default=128, help="tokens of a sample (default: 128)")
    parser.add_argument("--rounds", type=count, default=7, help="timed steps of each (default: 7)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of each model, and measure their memory."""
    device = find_device(args.device)
    by_onednn = device.type == "cpu" and is_faster()
    methods = [name for name in METHODS if by_onednn or name in (TORCH, DEFERRED)]
    models: dict[str, Callable[[], Any]] = {"tiny": _tiny}
    if not args.quick:
        name = args.model or "SmolLM2-135M"
        models = {name: partial(_pretrained, args.model), "Gemma-3-270M's sizes": _gemma}
    size = Size((args.batch_size, args.seq_len), device, args.dtype)
    return {
        "tokens": f"{args.batch_size} x {args.seq_len}",
        "dtype": args.dtype,
        "models": {name: _measure(make, size, methods, args) for name, make in models.items()},
    }


def _pretrained(model: str | None) -> Any:
    return load_pretrained(model, dtype="float32")[0]


def _gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes: dict[str, Any] = {"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1}
    sizes |= {"hidden_size": 640, "head_dim": 256, "intermediate_size": 2048, "vocab_size": 262_144}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


def _tiny() -> Any:
    return _tasks.tiny()[0]


def _measure(make: Callable[[], Any], size: Size, methods: list[str], args: argparse.Namespace) -> dict[str, Any]:
    model, ids = _adapted(make, size)
    times = _harness.interleave(
        {name: partial(_step, model, ids, name) for name in methods},
        rounds=1 if args.quick else args.rounds,
        warmup=1,
        device=size.device.type,
    )
    rows = {
        name: {
            **_harness.summary(times[name]),
            "times_torch": _harness.median_ratio(times, name, TORCH),
            "peak_mib": None if args.quick else _harness.in_a_process(_peak, make, size, name, args.threads),
        }
        for name in methods
    }
    return {"model_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, "rows": rows}


def _adapted(make: Callable[[], Any], size: Size) -> tuple[Any, torch.Tensor]:
    """Return a model with adapters, and tokens for it."""
    model = make().to(size.device, DTYPES[size.dtype]).train()
    add_adapters(model, layers=None, rank=16)
    return model, torch.randint(model.config.vocab_size, size.tokens, device=size.device)


def _step(model: Any, ids: torch.Tensor, method: str) -> None:
    with ExitStack() as contexts:
        for context in _CONTEXTS[method]:
            contexts.enter_context(context(model))
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def _peak(make: Callable[[], Any], size: Size, method: str, threads: int) -> float:
    """Return by how many MiB the memory grows over the loaded model in two steps."""
    torch.set_num_threads(threads)
    model, ids = _adapted(make, size)
    _step(model, ids[:1, :8], method)

    def steps() -> None:
        for _ in range(2):
            _step(model, ids, method)

    return _harness.growth_mib(steps, size.device.type)


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for name, found in results["models"].items():
        rows: list[list[object]] = [
            [method, row["median_s"], row["times_torch"], "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"]
            for method, row in found["rows"].items()
        ]
        what = f"{found['model_mib']:.0f} MiB in {results['dtype']}"
        title = f"{name} ({what}), {results['tokens']} tokens, adapters on all layers"
        header = ["forward and backward pass", "s", "times torch's", "peak memory above the model, MiB"]
        parts.append(f"{title}\n\n{_harness.markdown(header, rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    _harness.main(sys.modules[__name__])
