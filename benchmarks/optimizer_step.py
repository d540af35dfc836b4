"""How long does one optimizer step take on the adapters of real models?

Every optimizer updates the same tensors with the same gradients, in turn in one run: the lora_A matrices of all layers
(on the Stiefel manifold) and the lora_B matrices (ordinary), for q, k, v, up and down projections. AdamW, which knows
no manifold, is the floor. "A only" is the same for the lora_A matrices alone. On CUDA also: the time on the device
alone, where the host is ahead of it; a step in a CUDA graph; and the optimizer's share of a training step of a random
bfloat16 model of these shapes with adapters.

    python -m benchmarks optimizer_step
    python -m benchmarks optimizer_step --models LLaMA-3.1-8B --device cuda
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import geoopt
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import _harness, _peers
from benchmarks._shapes import MODELS
from stiefel_lora import add_adapters, stiefel
from stiefel_lora._precision import autocast_like
from stiefel_lora._types import Retraction
from stiefel_lora.errors import InputError
from stiefel_lora.optim import RiemannianAdam
from stiefel_lora.optim._kinds import is_stiefel

Make = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
OURS: dict[str, Make] = {
    f"ours, {name}": partial(RiemannianAdam, retraction=name, fused=True) for name in get_args(Retraction)
}
FLOOR = "torch AdamW, fused"
GRAPH = ", in a CUDA graph"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# Samples and tokens of a training step.
BATCH = (16, 256)
# Rows above which geoopt's canonical retraction (an n x n solve for each matrix) is left out: one step of the
# largest model here would take hours.
CANONICAL_LIMIT = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this study's options."""
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--rounds", type=_harness.positive(int), default=15, help="timed rounds (default: 15)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time all optimizers on all models, and ours over growing sizes."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; leave out --device cuda")
    models = args.models if not args.quick else ["SmolLM2-135M"]
    rounds = args.rounds if not args.quick else 2
    return {
        "device": args.device,
        "cuda": "measured" if args.device == "cuda" else "not measured: run with --device cuda",
        "models": {name: _model(name, rounds, args.device, quick=args.quick) for name in models},
        "exponents": _exponents(args.device, quick=args.quick),
        "training": {name: _training(name, rounds, args.device, quick=args.quick) for name in models}
        if args.device == "cuda" or args.quick
        else {},
    }


def _parameter(shape: tuple[int, int], device: str, manifold: Any = None) -> Tensor:
    x = stiefel.random_point(*shape, device=device)
    p = geoopt.ManifoldParameter(x, manifold=manifold) if manifold is not None else torch.nn.Parameter(x)
    p.grad = torch.randn_like(x)
    return p


def _twin(p: Tensor, manifold: Any = None) -> Tensor:
    """Return a parameter with its own value and the same gradient tensor."""
    value = p.detach().as_subclass(Tensor).clone()
    twin = geoopt.ManifoldParameter(value, manifold=manifold) if manifold is not None else torch.nn.Parameter(value)
    twin.grad = p.grad
    return twin


def _model(name: str, rounds: int, device: str, *, quick: bool) -> dict[str, Any]:
    model = MODELS[name]
    layers = 2 if quick else model.layers
    down = [_parameter(s, device, geoopt.EuclideanStiefel()) for s in model.down()[: 5 * layers]]
    up = [_parameter(s, device) for s in model.up()[: 5 * layers]]
    return {
        "rank": model.rank,
        "matrices": len(down),
        "parameters": sum(p.numel() for p in down + up),
        "adapter": _compare(f"{name}, adapter", down, up, rounds, device),
        "A only": _compare(f"{name}, A only", down, [], rounds, device),
    }


def _compare(label: str, down: list[Tensor], up: list[Tensor], rounds: int, device: str) -> dict[str, Any]:
    """Time a step of every optimizer on the same tensors.

    The manifold optimizers take turns on the very same parameters, which all of them leave on the manifold (POGO
    approximately, so it has its own); AdamW, which does not, works on a copy.
    """
    plain = [_twin(p) for p in down] + up
    optimizers: dict[str, list[torch.optim.Optimizer]] = {
        FLOOR: [_peers.fused_adamw(plain)],
        "torch AdamW, foreach": [_peers.foreach_adamw(plain)],
        **{ours: [make(down + up)] for ours, make in OURS.items()},
        "geoopt, EuclideanStiefel": [_peers.geoopt_adam(down + up)],
    }
    if up:
        # As one would who does not leave the ordinary parameters to geoopt, which moves them one by one.
        optimizers["geoopt (A), fused AdamW (B)"] = [_peers.geoopt_adam(down), _peers.fused_adamw(up)]
    absent: dict[str, str] = {}
    slow: dict[str, int] = {}
    if max(p.shape[0] for p in down) <= CANONICAL_LIMIT:
        canonical = [_twin(p, geoopt.CanonicalStiefel()) for p in down]
        optimizers["geoopt, CanonicalStiefel"] = [_peers.geoopt_adam(canonical + up)]
        slow["geoopt, CanonicalStiefel"] = min(3, rounds)
    else:
        absent["geoopt, CanonicalStiefel"] = "not run: it solves an n x n system for each matrix"
    own = [_twin(p) for p in down]
    try:
        optimizers["POGO (A), fused AdamW (B)"] = [_peers.pogo(own), *([_peers.fused_adamw(up)] if up else [])]
    except _peers.NotInstalledError as error:
        absent["POGO (A), fused AdamW (B)"] = str(error)

    def step(group: list[torch.optim.Optimizer]) -> Callable[[], None]:
        def go() -> None:
            for optimizer in group:
                optimizer.step()

        return go

    candidates = {name: step(group) for name, group in optimizers.items()}
    if device == "cuda":
        captured = {
            f"ours, qr{GRAPH}": RiemannianAdam(down + up, retraction="qr", fused=True, capturable=True),
            f"{FLOOR}{GRAPH}": _peers.fused_adamw(plain, capturable=True),
        }
        candidates |= {name: _captured(optimizer) for name, optimizer in captured.items()}
        optimizers |= {name: [optimizer] for name, optimizer in captured.items()}
    times = _harness.interleave(
        candidates,
        rounds=rounds,
        device=device,
        slow=slow,
        label=label,
    )
    rows: dict[str, Any] = {}
    for name, group in optimizers.items():
        points = [p for p in group[0].param_groups[0]["params"] if p.dim() == 2][: len(down)]
        rows[name] = {
            **_harness.summary(times[name]),
            "times_fused_adamw": _harness.median_ratio(times, name, FLOOR),
            # After the run; for optimizers that share their points, of the last one to move them.
            "orthogonality_error": max(float(stiefel.orthogonality_error(p)) for p in points),
        }
        if name.startswith("ours"):
            rows[name]["geoopt_euclidean_times_ours"] = _harness.median_ratio(times, "geoopt, EuclideanStiefel", name)
            if up:
                rows[name]["geoopt_and_fused_times_ours"] = _harness.median_ratio(
                    times, "geoopt (A), fused AdamW (B)", name
                )
        if name in OURS:
            rows[name].update(_memory(group[0], down))
        if name in slow:
            rows[name]["times_ours_qr"] = _harness.median_ratio(times, name, "ours, qr")
        # Of what does not wait for the device; geoopt's and POGO's time is the host's all the same.
        if device == "cuda" and ("ours" in name or "torch" in name) and name != "ours, exp":
            rows[name]["device"] = _harness.summary(_harness.device_seconds(candidates[name], rounds))
    for name in OURS:
        rows[name]["orthogonality_error"] = _own_error(down, OURS[name])
    return {"rows": rows, "absent": absent}


def _captured(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return what replays an optimizer's step from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # as torch asks for, and to make the state
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def _training(name: str, rounds: int, device: str, *, quick: bool) -> dict[str, Any]:
    """Time whole training steps of a random model with these shapes, and the optimizer in them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes, (samples, length) = MODELS[name], (2, 8) if quick else BATCH
    config = LlamaConfig(
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=1 if quick else shapes.layers,
        num_attention_heads=shapes.query // shapes.head,
        num_key_value_heads=shapes.key_value // shapes.head,
        head_dim=shapes.head,
        vocab_size=99 if quick else shapes.vocabulary,
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()
    add_adapters(model, layers=None, rank=shapes.rank, target_modules=PROJECTIONS)
    ids = torch.randint(config.vocab_size, (samples, length), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    rows: dict[str, Any] = {}
    # AdamW last: it leaves the manifold.
    makers: dict[str, Make] = {"ours, qr": OURS["ours, qr"], FLOOR: _peers.fused_adamw}
    for label, make in makers.items():
        optimizer = make(trained)
        whole, own = [], []
        for turn in tqdm(range(2 + rounds), desc=f"{name}, training step", leave=False, disable=None):
            begin = _harness.mark(device)
            with autocast_like(model):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            middle = _harness.mark(device)
            optimizer.step()
            optimizer.zero_grad()
            end = _harness.mark(device)
            if turn >= 2:
                whole.append(_harness.between(begin, end))
                own.append(_harness.between(middle, end))
        rows[label] = {"step": _harness.summary(whole), "optimizer": _harness.summary(own)}
        rows[label]["optimizer_share"] = statistics.median(a / b for a, b in zip(own, whole, strict=True))
    return {"samples": samples, "tokens": samples * length, "rows": rows}


def _own_error(down: list[Tensor], make: Make) -> float:
    """Take ten steps of one optimizer alone and measure."""
    points = [_twin(p, geoopt.EuclideanStiefel()) for p in down[:10]]
    optimizer = make(points)
    for _ in range(10):
        optimizer.step()
    return max(float(stiefel.orthogonality_error(p)) for p in points)


def _memory(optimizer: torch.optim.Optimizer, down: list[Tensor]) -> dict[str, float]:
    """Return the state of the matrices and the scratch memory as multiples of what they belong to."""
    sizes: dict[torch.Size, int] = {}
    for p in down:
        sizes[p.shape] = sizes.get(p.shape, 0) + p.numel() * p.element_size()
    state = sum(
        value.numel() * value.element_size()
        for p in down
        if is_stiefel(p)
        for value in optimizer.state[p].values()
        if isinstance(value, Tensor)
    )
    scratch = optimizer._workspace.nbytes  # type: ignore[attr-defined]
    return {
        "state_per_parameter": state / sum(sizes.values()),
        "scratch_per_largest_group": scratch / max(sizes.values()),
    }


def _exponents(device: str, *, quick: bool) -> dict[str, Any]:
    """Fit time ~ n^a at 64 matrices and time ~ k^b at n = 2048, r = 32, over sizes where overhead is small."""
    rounds = 3 if quick else 9
    sizes = {"n": [(64, n) for n in (1024, 2048, 4096, 8192)], "matrices": [(k, 2048) for k in (16, 32, 64, 128)]}
    result: dict[str, Any] = {}
    for axis, grid in sizes.items():
        grid = grid[:2] if quick else grid
        optimizers = {
            str(size): RiemannianAdam(
                [_parameter((size[1], 32), device, geoopt.EuclideanStiefel()) for _ in range(size[0])]
            )
            for size in grid
        }
        times = _harness.interleave(
            {key: o.step for key, o in optimizers.items()},
            rounds=rounds,
            device=device,
            label=f"cost against {axis}",
        )
        medians = [_harness.summary(times[key])["median_s"] for key in optimizers]
        variable = [math.log(size[1] if axis == "n" else size[0]) for size in grid]
        result[axis] = {
            "grid": [size[1] if axis == "n" else size[0] for size in grid],
            "median_s": medians,
            "exponent": _slope(variable, [math.log(m) for m in medians]),
        }
    return result


def _slope(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    parts = []
    on_cuda = results["device"] == "cuda"
    header = ["optimizer", "ms a step", *["ms on the device alone"] * on_cuda, "times fused AdamW", "geoopt / this"]
    header.append("orthogonality error")
    for name, model in results["models"].items():
        for scope in ("adapter", "A only"):
            rows: list[list[object]] = [
                [
                    optimizer,
                    1e3 * row["median_s"],
                    *[1e3 * row["device"]["median_s"] if "device" in row else ""] * on_cuda,
                    row["times_fused_adamw"],
                    row.get("geoopt_euclidean_times_ours", ""),
                    row["orthogonality_error"] if "AdamW," not in optimizer else "no manifold",
                ]
                for optimizer, row in model[scope]["rows"].items()
            ]
            rows += [[other, why, *[""] * (len(header) - 2)] for other, why in model[scope]["absent"].items()]
            parts.append(
                f"### {name}, rank {model['rank']}, {scope} ({results['device']})\n\n" + _harness.markdown(header, rows)
            )
    if results.get("training"):
        rows = [
            [
                name,
                found["tokens"],
                optimizer,
                1e3 * row["step"]["median_s"],
                1e3 * row["optimizer"]["median_s"],
                f"{100 * row['optimizer_share']:.2g} %",
            ]
            for name, found in results["training"].items()
            for optimizer, row in found["rows"].items()
        ]
        columns = ["model", "tokens", "optimizer", "ms a training step", "ms of them the optimizer's", "share"]
        parts.append(
            f"### Training steps of random bfloat16 models with adapters ({results['device']})\n\n"
            + _harness.markdown(columns, rows)
        )
    for axis, fit in results["exponents"].items():
        parts.append(f"Cost grows as {axis}^{fit['exponent']:.2f} over {axis} = {fit['grid']}.")
    parts.append(f"CUDA: {results['cuda']}.")
    return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a step on the whole adapter as a multiple of fused AdamW's, one panel a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = results["models"]
    figure = Figure(figsize=(max(3.0 * len(models) + 1.5, 7.5), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    names = [name for name in dict.fromkeys(n for m in models.values() for n in m["adapter"]["rows"]) if name != FLOOR]
    for axes, (model, scopes) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        rows = scopes["adapter"]["rows"]
        for height, name in enumerate(reversed(names)):
            ratio = rows[name]["times_fused_adamw"] if name in rows else None
            colour = "#1f77b4" if name.startswith("ours") else "#c7c7c7"
            axes.barh(height, ratio or 0, color=colour)
            axes.annotate(
                "not run" if ratio is None else f"{ratio:.3g}", (ratio or 1, height), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=8,
            )  # fmt: skip
        axes.set_yticks(range(len(names)), reversed(names) if model == next(iter(models)) else [], fontsize=8)
        axes.set_xscale("log")
        ratios = [row["times_fused_adamw"] for row in rows.values()]
        axes.set_xlim(min(1, 0.6 * min(ratios)), 4 * max(ratios))
        axes.set_title(f"{model}, rank {scopes['rank']}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of one step, as a multiple of torch's fused AdamW on the same tensors", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    _harness.main(sys.modules[__name__])
