"""What does exact per-sample Fisher scoring cost, in time and memory?

On SmolLM2-135M (or --model) with random tokens: our scores against a forward pass, against a loop over single samples
with full weight gradients, and against the ghost norms of opacus; all of them over the same samples, in turn, with the
agreement of the scores. Where ours multiplies by oneDNN and torch would not, the first two do so as well, once more.
The peak memory of each is measured in a process of its own. Also: the time against a forward pass for a wide random
model, and what share of a training run the scoring takes.

    python -m benchmarks fisher_cost
"""

import argparse
import copy
import os
import statistics
import subprocess  # noqa: S404  runs this very file again
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _harness, _tasks
from stiefel_lora import add_adapters, fisher_scores
from stiefel_lora._models import find_linears
from stiefel_lora.errors import InputError
from stiefel_lora.onednn import is_faster, onednn_products
from stiefel_lora.optim import RiemannianAdam
from stiefel_lora.pretrained import load_pretrained

Batch = dict[str, Tensor]
Method = Callable[[Any, list[Batch]], Tensor]
OURS, LOOP, GHOST, FORWARD = "ours", "loop of single samples", "opacus ghost norms", "forward pass"
# The paper's setting: calibration samples, epochs, training samples.
PAPER = (128, 3, 170_000)
# Batches that are timed as one: the samples that the command scores by default.
_TOGETHER = 8
_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this study's options."""
    _harness.add_model(parser)
    parser.add_argument(
        "--samples", type=_harness.positive(int), default=64, help="samples of 128 tokens (default: 64)"
    )
    parser.add_argument(
        "--long-samples", type=_harness.positive(int), default=16, help="samples of 512 tokens (default: 16)"
    )
    parser.add_argument(
        "--rounds", type=_harness.positive(int), default=1, help="timed rounds over all samples (default: 1)"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, or (in a child process) the peak memory of one method."""
    if args.peak_of:
        print(f"peak {_peak(args.peak_of, load_pretrained(args.model)[0])}")
        sys.exit(0)
    rounds = 1 if args.quick else args.rounds
    for option, samples in (("--samples", args.samples), ("--long-samples", args.long_samples)):
        part = min(samples, _TOGETHER * _BATCH)
        if samples % _BATCH or samples % part:
            raise InputError(
                f"{option} must be a multiple of {_BATCH}, and above {_TOGETHER * _BATCH} of that: parts of one size "
                f"are timed; got {samples}"
            )
    lengths = {128: args.samples, 512: args.long_samples} if not args.quick else {16: 4}
    model: Any = _tasks.tiny()[0] if args.quick else load_pretrained(args.model)[0]
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    compared = {str(t): _compare(model, _batches(model, n, t), rounds) for t, n in lengths.items()}
    able = {name for part in compared.values() for name in part["rows"]}
    return {
        "model": "tiny" if args.quick else model.config._name_or_path.rsplit("/", 1)[-1],
        "model_mib": model_bytes / 2**20,
        "lengths": compared,
        "peak_mib": {}
        if args.quick
        else {m: [_child_peak(m, args, trim=trim) for trim in (False, True)] for m in METHODS if m in able},
        "wide": _wide(rounds, quick=args.quick),
        "share": _share(model, *((4, 16) if args.quick else (32, 128))),
    }


def _batches(model: Any, samples: int, length: int, size: int = _BATCH) -> list[Batch]:
    generator = torch.Generator().manual_seed(torch.initial_seed())
    ids = torch.randint(0, model.config.vocab_size, (samples, length), generator=generator)
    return [{"input_ids": part, "labels": part} for part in ids.split(size)]


def _weights(model: nn.Module) -> dict[str, Any]:
    return {name: m.weight for layer in find_linears(model).values() for name, m in layer.items()}


# -- the methods: each returns a score for every layer -----------------------------------------------------------------


def forward(model: Any, batches: list[Batch]) -> Tensor:
    """Only predict, without gradients."""
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    return torch.zeros(0)


def ours(model: Any, batches: list[Batch]) -> Tensor:
    """Score all layers with the library."""
    return torch.tensor(fisher_scores(model, batches, progress=False).scores)


def loop(model: Any, batches: list[Batch]) -> Tensor:
    """One sample at a time, with the gradient of every parameter, as the definition says."""
    model.requires_grad_(True)
    weights = _weights(model)
    total = torch.zeros(len(weights))
    for batch in batches:
        for n in range(len(batch["labels"])):
            model.zero_grad(set_to_none=True)
            model(**{key: value[n : n + 1] for key, value in batch.items()}, use_cache=False).loss.backward()
            total += torch.stack([w.grad.square().sum() for w in weights.values()])
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return _by_layer(model, total / sum(len(batch["labels"]) for batch in batches))


def ghost(model: Any, batches: list[Batch]) -> Tensor:
    """The per-sample norms of opacus' ghost clipping, on the linear maps of the layers."""
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    model.requires_grad_(False)  # it has no rule for tied weights that are trained
    weights = _weights(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    # It refuses eval mode; this model has no dropout. Its hooks warn that the first layer's inputs need no gradients.
    model.train()
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="mean", strict=False, max_grad_norm=1.0, use_ghost_clipping=True
    )
    total = torch.zeros(len(weights))
    for batch in batches:
        wrapped(**batch, use_cache=False).loss.backward()
        total += torch.stack([w._norm_sample.square().sum() for w in weights.values()])
        wrapped.zero_grad(set_to_none=True)
    wrapped.to_standard_module()
    model.requires_grad_(False).eval()
    return _by_layer(model, total / sum(len(batch["labels"]) for batch in batches))


METHODS: dict[str, Method] = {FORWARD: forward, OURS: ours, LOOP: loop, GHOST: ghost}
# With the matrix products that ours has: they tell how much of our lead is the library's.
FORWARD_BY_ONEDNN, LOOP_BY_ONEDNN = f"{FORWARD}, by oneDNN", f"{LOOP}, by oneDNN"
BY_ONEDNN: dict[str, Method] = {
    FORWARD_BY_ONEDNN: onednn_products()(forward),
    LOOP_BY_ONEDNN: onednn_products()(loop),
}


def _by_layer(model: nn.Module, values: Tensor) -> Tensor:
    sizes = [len(layer) for layer in find_linears(model).values()]
    return torch.stack([part.sum() for part in values.split(sizes)])


# -- the measurements --------------------------------------------------------------------------------------------------


def _compare(model: Any, batches: list[Batch], rounds: int) -> dict[str, Any]:
    absent: dict[str, str] = {}
    methods = METHODS | (BY_ONEDNN if is_faster() else {})
    try:
        ghost(copy.deepcopy(model), batches[:1])
    except Exception as error:  # another package on a model it was not made for: whatever it raises is the finding
        absent[GHOST] = f"{type(error).__name__}: {str(error)[:200]}"
        methods.pop(GHOST)
    forward(model, batches[:1])
    times: dict[str, list[float]] = {name: [] for name in methods}
    sums: dict[str, Tensor] = {}
    # A few batches in turn: the machine's other work then disturbs all methods alike.
    parts = [batches[n : n + _TOGETHER] for n in range(0, len(batches), _TOGETHER)]
    for part in parts:
        scores: dict[str, Tensor] = {}

        def recorded(name: str, part: list[Batch] = part, scores: dict[str, Tensor] = scores) -> Callable[[], None]:
            return lambda: scores.update({name: methods[name](model, part)})

        label = f"{len(part)} batches of {tuple(part[0]['labels'].shape)}"
        measured = _harness.interleave({m: recorded(m) for m in methods}, rounds=rounds, warmup=0, label=label)
        for name in methods:
            times[name] += measured[name]
            sums[name] = sums.get(name, 0) + len(part) * scores[name]
    rows = {
        name: {
            **_harness.summary(times[name]),
            "times_forward": _harness.median_ratio(times, name, FORWARD),
            "times_ours": _harness.median_ratio(times, name, OURS),
            "score_difference": _difference(sums[name], sums[_loop_like(name, sums)]),
        }
        for name in methods
    }
    return {
        "samples": sum(len(b["labels"]) for b in batches),
        "samples_timed_together": sum(len(b["labels"]) for b in parts[0]),
        "batch": len(batches[0]["labels"]),
        "rows": rows,
        "absent": absent,
    }


def _loop_like(name: str, scores: dict[str, Tensor]) -> str:
    """Return the loop with the same library: samples of random tokens may differ by its rounding in the third digit."""
    return LOOP_BY_ONEDNN if LOOP_BY_ONEDNN in scores and name in (OURS, LOOP_BY_ONEDNN) else LOOP


def _difference(scores: Tensor, expected: Tensor) -> float:
    return float(((scores - expected).abs() / expected).max()) if len(scores) else 0


def _child_peak(method: str, args: argparse.Namespace, *, trim: bool) -> float | None:
    """Return the peak of one method in a process of its own, None if it failed there.

    With ``trim`` the C library gives freed tensors back to the system at once, which leaves what the method needs; the
    peak without it includes gaps in the heap.
    """
    words = ["--peak-of", method, "--seed", str(args.seed), "--threads", str(args.threads)]
    words += ["--model", args.model] if args.model else []
    with tempfile.TemporaryDirectory() as folder:  # it writes nothing
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "benchmarks.fisher_cost", *words, "--output", f"{folder}/x.json"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(2**18)} if trim else {})},
        )
    return float(done.stdout.split("peak ")[-1].split()[0]) if done.returncode == 0 else None


def _peak(method: str, model: Any) -> float:
    """Return by how many MiB the resident memory grows over the loaded model, for one batch of 4 x 128."""
    batches = _batches(model, 4, 128)
    forward(model, _batches(model, 1, 8))
    return _harness.growth_mib(lambda: METHODS[method](model, batches))


def _wide(rounds: int, *, quick: bool) -> dict[str, Any]:
    """Compare with a forward pass where layers are wide and T (in + out) is small against in * out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = 64 if quick else 2048
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, hidden_size=hidden, intermediate_size=4 * hidden, vocab_size=1000)
    model = LlamaForCausalLM(config).eval()
    # What is found out once, from the first sample alone, is shared by as many as elsewhere in this study.
    batches = _batches(model, _TOGETHER * _BATCH, 128) if not quick else _batches(model, 8, 8)
    forward(model, batches)
    methods: dict[str, Method] = {FORWARD: forward, OURS: ours}
    if is_faster():
        methods[FORWARD_BY_ONEDNN] = BY_ONEDNN[FORWARD_BY_ONEDNN]
    times = _harness.interleave(
        {name: partial(method, model, batches) for name, method in methods.items()},
        rounds=max(3, rounds) if not quick else 1,
        warmup=0,
        label="wide model",
    )
    ratios = {name: _harness.median_ratio(times, OURS, name) for name in methods if name != OURS}
    return {"hidden_size": hidden, "layers": 4, "times": ratios}


def _share(model: Any, calibration: int, length: int) -> dict[str, Any]:
    """Relate scoring to training with adapters on the upper half of the layers, sample by sample."""
    batches = _batches(model, calibration, length)
    start = time.perf_counter()
    ours(model, batches)
    scoring = (time.perf_counter() - start) / calibration
    student = copy.deepcopy(model)
    count = len(find_linears(student))
    add_adapters(student, layers=range(count // 2, count), rank=8)
    optimizer = RiemannianAdam(p for p in student.parameters() if p.requires_grad)
    batch = batches[0]

    def step() -> None:
        student(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # As the command takes them.
    times = _harness.interleave({"step": onednn_products()(step)}, rounds=5, warmup=1, label="training steps")
    training = statistics.median(times["step"]) / len(batch["labels"])
    samples, epochs, data = PAPER
    return {
        "scoring_s_per_sample": scoring,
        "training_s_per_sample": training,
        "paper": samples * scoring / (epochs * data * training),
        "default_run": 32 * scoring / (50 * 4 * training),
    }


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for length, part in results["lengths"].items():
        rows: list[list[object]] = [
            [name, row["median_s"], row["times_forward"], row["times_ours"], row["score_difference"] or ""]
            for name, row in part["rows"].items()
        ]
        rows += [[name, why, "", "", ""] for name, why in part["absent"].items()]
        header = [
            "method",
            f"s for {part['samples_timed_together']} samples",
            "times a forward pass",
            "times ours",
            "largest difference to the loop",
        ]
        parts.append(
            f"{results['model']}, {part['samples']} samples of {length} tokens in batches of {part['batch']}\n\n"
            + _harness.markdown(header, rows)
        )
    if results["peak_mib"]:
        rows = [
            [name, *("failed" if mib is None else f"{mib:.0f} ({mib / results['model_mib']:.0%})" for mib in peaks)]
            for name, peaks in results["peak_mib"].items()
        ]
        title = f"Peak memory above the loaded model ({results['model_mib']:.0f} MiB), one batch of 4 x 128"
        parts.append(f"{title}\n\n" + _harness.markdown(["method", "MiB (of the model)", "without gaps"], rows))
    wide, share = results["wide"], results["share"]
    times = ", ".join(f"{ratio:.2f} times a {name}" for name, ratio in wide["times"].items())
    parts.append(f"Random LLaMA of hidden size {wide['hidden_size']}, batches of 4 x 128: {times}.")
    parts.append(
        f"Share of a training run: {share['paper']:.2%} at the paper's setting ({PAPER[0]} samples against {PAPER[1]} "
        f"epochs of {PAPER[2]:,}), {share['default_run']:.0%} of the 50 steps of `stiefel-lora finetune`."
    )
    return "\n\n".join(parts)


if __name__ == "__main__":
    _harness.main(sys.modules[__name__])
