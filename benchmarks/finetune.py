"""Does FoRA at half the parameters beat LoRA, DoRA and AdaLoRA, and which of its two parts does it?

Fine-tunes one model with every method on the same data in the same order, for the same steps and schedule, and measures
the loss on held-out data. The learning rate of each method is the best on validation data of those tried, which are on
one grid; the table says how many that were. A cell (task, method, learning rate, seed) runs in a process of its own;
finished cells are in the result file and are not run again, so the table can be made in pieces:

    python -m benchmarks finetune --minutes 60
    python -m benchmarks finetune --tasks instructions --data FOLDER --methods LoRA "FoRA (A)"

A GPU has room for several cells at a time (--jobs).
"""

import argparse
import copy
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import _finetune_table, _harness, _methods, _tasks
from benchmarks._finetune_table import Cell
from benchmarks._methods import MAIN, METHODS, SAMPLES, SAMPLES_OF_THE_PAPER, TARGETS, Setting, Tuned
from benchmarks._peers import NotInstalledError
from stiefel_lora.config import FinetuneConfig
from stiefel_lora.errors import InputError
from stiefel_lora.fisher import fisher_scores
from stiefel_lora.onednn import is_faster, onednn_products
from stiefel_lora.pretrained import find_device, load_pretrained
from stiefel_lora.training import learning_rate

# Tasks that are read from a folder of question sets.
QUESTIONS = {"instructions": _tasks.instructions, "answers": _tasks.answers}


@dataclass(frozen=True)
class Frame:
    """What all cells of one table share.

    Attributes:
        model: Folder, .gguf file or hub name; None for SmolLM2-135M-Instruct.
        data: Folder of question sets.
        rank: Rank of the adapters.
        steps: Optimizer steps.
        batch_size: Samples of a step.
        seq_len: Longest sample in tokens.
        warmup: Steps over which the rate rises; it falls along half a cosine afterwards.
        train_samples: Samples to train on, over and over; None for all that there are.
        eval_samples: Samples of validation and of test data.
        questions: Questions whose answers are counted.
        device: Where to compute.
        dtype: Precision of the base model.
    """

    model: str | None
    data: str | None
    rank: int
    steps: int
    batch_size: int
    seq_len: int
    warmup: int
    train_samples: int | None
    eval_samples: int
    questions: int
    device: str | None
    dtype: str | None


IN_PIECES = True

Key = tuple[str, str, float, int]
Ended = Generator[tuple[Key, Cell], None, None]
_KEY = ("task", "method", "lr", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this study's options."""
    parser.add_argument("--tasks", nargs="+", choices=("code", *QUESTIONS), default=["code"], help="default: code")
    parser.add_argument(
        "--data",
        type=os.path.expanduser,
        help=f"folder of NAME_train.jsonl and NAME_test.jsonl, for --tasks {' and '.join(QUESTIONS)}",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
        help="rows to work on (default: all): " + "; ".join(METHODS),
    )  # fmt: skip
    count, rate = _harness.positive(int), _harness.positive(float)
    parser.add_argument("--lrs", nargs="+", type=rate, default=[2e-3, 1e-3, 3e-3, 5e-4], help="grid of learning rates")
    parser.add_argument("--seeds", type=count, default=3, help="seeds of the main rows at their best rate (default: 3)")
    limit = _harness.positive(float, or_zero=True)
    parser.add_argument("--minutes", type=limit, help="begin no cell after so long (default: never); call again")
    parser.add_argument("--jobs", type=count, default=1, help="cells at a time, each of --threads (default: 1)")
    parser.add_argument("--time", action="store_true", help="also time a step of every method, all in turn in one run")
    parser.add_argument("--rounds", type=count, default=7, help="timed steps of each method with --time (default: 7)")
    _harness.add_model(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base (default: the device's)")
    parser.add_argument("--train-samples", type=count, help="samples to train on, over and over (default: all)")
    for name, value, text in (
        ("rank", 16, "rank of the adapters"),
        ("steps", 100, "optimizer steps"),
        ("batch-size", 4, "samples of a step"),
        ("seq-len", 128, "longest sample, in tokens"),
        ("warmup", 10, "steps of linear warm-up"),
        ("eval-samples", 96, "validation samples, and test samples"),
        ("questions", 240, "test questions whose answers are counted"),
    ):
        kind = _harness.positive(int, or_zero=True) if name in ("warmup", "questions") else count
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"{text} (default: {value})")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the missing cells, saving each as it ends."""
    if args.quick:
        return _quick(args)
    frame = Frame(**{key: getattr(args, key) for key in Frame.__annotations__})
    begin = time.monotonic()
    # Where the data are may differ from machine to machine, and is no business of the result.
    settings = {**asdict(frame), "data": None}
    results = args.previous or {"frame": settings, "selection": {}, "cells": [], "timing": {}}
    changed = {k: (results["frame"].get(k), v) for k, v in settings.items() if results["frame"].get(k) != v}
    if changed:
        raise InputError(f"{args.output} was measured with other settings (was, now): {changed}; give another --output")
    for task in args.tasks:
        if task not in results["selection"]:
            results["selection"][task] = _in_a_process(select, frame, task, args.threads)
            args.save(results)
    with closing(_cells(args, frame, results, begin)) as ended:
        for key, cell in ended:
            results["cells"] = [c for c in results["cells"] if _key(c) != key] + [{**cell, **_place(args)}]
            args.save(results)
    # As far as is known yet: more seeds of a row come with its best rate.
    results["missing"] = sum(1 for _ in _missing(args, results["cells"], set()))
    if args.time:
        for task in args.tasks:
            arguments = frame, task, results["selection"][task], args.methods, args.rounds, args.threads
            results["timing"][task] = _in_a_process(time_steps, *arguments)
            args.save(results)
    return results


def _cells(args: argparse.Namespace, frame: Frame, results: dict[str, Any], begin: float) -> Ended:
    """Run the missing cells, so many at a time, and yield each as it ends; ``results`` is to have it then."""
    # What failed in an earlier run is tried again: a peer may be installed now, or more memory free.
    begun: set[Key] = set()
    running: dict[Future[Cell], Key] = {}
    with ThreadPoolExecutor(args.jobs) as pool, _harness.children_end_with_errors():
        while True:
            late = args.minutes is not None and time.monotonic() - begin >= 60 * args.minutes
            while (
                not late
                and len(running) < args.jobs
                and (key := _next(args, results["cells"], begun, running.values()))
            ):
                print(f"{len(results['cells'])} cells done; now {key}", file=sys.stderr, flush=True)
                # The bars of several cells would write over each other.
                arguments = frame, key, results["selection"][key[0]], args.threads, args.jobs == 1
                running[pool.submit(_in_a_process, run_cell, *arguments)] = key
                begun.add(key)
            if not running:
                if late and _next(args, results["cells"], begun, ()):
                    print("out of time; the same command goes on with the missing cells", file=sys.stderr)
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                try:
                    cell = future.result()
                    if args.jobs > 1:  # it is that of all cells that share the device
                        cell.pop("optimizer_share", None)
                except Exception as error:  # one method that fails, say in a peer's code, must not cost the table
                    cell = _failed(key, error)
                yield key, cell


def _place(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a cell says of where it was measured."""
    here, on_cuda = _harness.environment(), find_device(args.device).type == "cuda"
    return {
        "revision": here["revision"],
        "processor": here["machine"]["cuda" if on_cuda else "processor"],
        "packages": {name: here["packages"].get(name) for name in ("torch", "geoopt", "transformers", "peft")},
        "products": "oneDNN" if is_faster() and not on_cuda else "torch's",
        "command": args.command,
    }


def _quick(args: argparse.Namespace) -> dict[str, Any]:
    """Take a few steps with every method on a tiny random model."""
    frame = Frame(None, None, 4, 4, 2, 16, 1, None, 4, 4, "cpu", "float32")
    model, task = _tasks.tiny()
    selection = _select(model, task, frame)
    keys = [("code", method, 1e-3, args.seed) for method in METHODS]
    cells = []
    for key in keys:
        try:
            cells.append(_train(copy.deepcopy(model), task, frame, key, selection))
        except NotInstalledError as error:
            cells.append(_failed(key, error))
    timing = _time_steps(model, task, frame, selection, list(METHODS), rounds=2)
    return {"frame": asdict(frame), "selection": {"code": selection}, "cells": cells, "timing": {"code": timing}}


def _failed(key: Key, error: Exception) -> Cell:
    return {**dict(zip(_KEY, key, strict=True)), "error": f"{type(error).__name__}: {error}"}


def _in_a_process(function: Any, *args: Any) -> Any:
    return _harness.in_a_process(_with_fast_products, function, *args)


def _with_fast_products(function: Any, *args: Any) -> Any:
    """Call a function with the matrix products that the command takes, whichever the method."""
    with onednn_products():
        return function(*args)


def _missing(args: argparse.Namespace, cells: list[Cell], begun: set[Key]) -> Iterator[Key]:
    have = {_key(cell) for cell in cells if "error" not in cell} | begun
    return (key for key in _plan(args, cells) if key not in have)


def _next(args: argparse.Namespace, cells: list[Cell], begun: set[Key], running: Iterable[Key]) -> Key | None:
    """Return the cell to begin now; more seeds of a row wait for its grid, which says at what rate."""
    unsettled = {key[:2] for key in running if key[3] == args.seed}
    missing = _missing(args, cells, begun)
    return next((key for key in missing if key[3] == args.seed or key[:2] not in unsettled), None)


def _plan(args: argparse.Namespace, cells: list[Cell]) -> Iterator[Key]:
    """Yield all cells in order: the grid with the first seed, then more seeds at the best rate of the main rows."""
    for task in args.tasks:
        for lr in args.lrs:
            for method in args.methods:
                yield task, method, lr, args.seed
    for task in args.tasks:
        for seed in range(args.seed + 1, args.seed + args.seeds):
            for method in args.methods:
                best = _finetune_table.best_rate(cells, task, method)
                if method in MAIN and best is not None:
                    yield task, method, best, seed


def _key(cell: Cell) -> Key:
    return tuple(cell[name] for name in _KEY)


# -- in the process of a cell ------------------------------------------------------------------------------------------


def _load(frame: Frame, task: str) -> tuple[Any, _tasks.Task]:
    model, tokenizer = load_pretrained(frame.model, device=find_device(frame.device), dtype=frame.dtype)
    if task == "code":
        data = _tasks.code(tokenizer, frame.seq_len)
    elif frame.data is None:
        raise InputError(f"the task {task} needs --data")
    else:
        data = QUESTIONS[task](frame.data, tokenizer, frame.seq_len, frame.questions)
    return model, data if frame.train_samples is None else _tasks.with_less_to_train_on(data, frame.train_samples)


def select(frame: Frame, task: str, threads: int) -> dict[str, Any]:
    """Score a task's layers and linear maps on training samples and return what is chosen."""
    torch.set_num_threads(threads)
    model, data = _load(frame, task)
    return _select(model, data, frame)


def _select(model: Any, task: _tasks.Task, frame: Frame) -> dict[str, Any]:
    batches = _calibration(task, frame)
    scores = fisher_scores(model, batches, modules=TARGETS)
    single = fisher_scores(model, batches, modules=TARGETS, granularity="module")
    layers = scores.select(0.5)
    size = frame.rank * sum(scores.parameters_per_rank[scores.layers.index(i)] for i in layers)
    modules = single.select(budget_params=size, rank=frame.rank)
    before = {
        "validation_loss": _tasks.mean_loss(model, task.validation, frame.eval_samples, frame.batch_size),
        "test_loss": _tasks.mean_loss(model, task.test, frame.eval_samples, frame.batch_size),
        "accuracy": _tasks.accuracy(model, task.questions, frame.batch_size),
    }
    return {
        "depth": len(scores),
        "layers": layers,
        "modules": [single.names[i] for i in modules],
        "seconds": scores.seconds,
        "scores": scores.scores,
        "before": before,
        "data": [task.train.description, task.validation.description, task.test.description],
    }


def _calibration(task: _tasks.Task, frame: Frame, samples: int = SAMPLES) -> list[dict[str, torch.Tensor]]:
    steps = range(samples // frame.batch_size)
    return [task.train.shuffled_batch(frame.batch_size, step, 0) for step in steps]


def run_cell(frame: Frame, key: Key, selection: dict[str, Any], threads: int, bar: bool) -> Cell:
    """Fine-tune once, with a progress bar or without, and measure."""
    torch.set_num_threads(threads)
    model, task = _load(frame, key[0])
    return _train(model, task, frame, key, selection, bar=bar)


def time_steps(
    frame: Frame, task: str, selection: dict[str, Any], methods: list[str], rounds: int, threads: int
) -> dict[str, Any]:
    """Time one step of every method, all in turn, each on a model of its own."""
    torch.set_num_threads(threads)
    model, data = _load(frame, task)
    return _time_steps(model, data, frame, selection, methods, rounds)


def _time_steps(
    model: Any, task: _tasks.Task, frame: Frame, selection: dict[str, Any], methods: list[str], rounds: int
) -> dict[str, Any]:
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in task.train.batch(range(frame.batch_size)).items()}
    setting = _setting(frame, task, selection, seed=0, lr=1e-4)
    steps: dict[str, Callable[[], object]] = {}
    start_s: dict[str, float] = {}
    for method in methods:
        own = copy.deepcopy(model)
        begin = time.perf_counter()
        try:
            tuned = METHODS[method](own, setting)
        except NotInstalledError as error:
            print(f"{method} is not timed: {error}", file=sys.stderr)
            continue
        start_s[method] = time.perf_counter() - begin
        tuned.model.train()
        # AdaLoRA's schedule is about its first steps, whose cost is that of all.
        steps[method] = lambda tuned=tuned: _step(tuned, batch, 1)  # type: ignore[misc]
    if not steps:
        raise InputError("none of the methods to time is installed")
    times = _harness.interleave(steps, rounds=rounds, device=device.type, label=f"{task.name}, steps")
    base = next(iter(steps))
    return {
        "base": base,
        # In the same run, so that it can be added to the steps.
        "selection_s": fisher_scores(model, _calibration(task, frame), modules=TARGETS).seconds,
        "rows": {
            name: {
                **_harness.summary(times[name]),
                "times_base": _harness.median_ratio(times, name, base),
                "start_s": start_s[name],
            }
            for name in steps
        },
    }


def _step(tuned: Tuned, batch: dict[str, torch.Tensor], number: int) -> tuple[float, float]:
    """Take one step; return the loss and the share of the time that was the optimizer's."""
    device = batch["labels"].device.type
    begin = _harness.mark(device)
    loss = tuned.model(**batch).loss
    loss.backward()
    middle = _harness.mark(device)
    tuned.optimizer.step()
    tuned.after_step(number)
    tuned.optimizer.zero_grad()
    end = _harness.mark(device)
    return float(loss.detach()), _harness.between(middle, end) / _harness.between(begin, end)


def _setting(frame: Frame, task: _tasks.Task, selection: dict[str, Any], *, seed: int, lr: float) -> Setting:
    return Setting(
        rank=frame.rank,
        selected=tuple(selection["layers"]),
        scores=tuple(selection["scores"]),
        modules=tuple(selection["modules"]),
        calibration=tuple(_calibration(task, frame, SAMPLES_OF_THE_PAPER)),
        seed=seed,
        steps=frame.steps,
        lr=lr,
    )


def _train(
    model: Any, task: _tasks.Task, frame: Frame, key: Key, selection: dict[str, Any], *, bar: bool = True
) -> Cell:
    _, method, lr, seed = key
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    loaded = _peak_mib()
    tuned = METHODS[method](model, _setting(frame, task, selection, seed=seed, lr=lr))
    tuned.model.train()
    trainable = sum(p.numel() for group in tuned.optimizer.param_groups for p in group["params"])
    shape = FinetuneConfig(lr=1.0, steps=frame.steps, warmup=frame.warmup)
    schedule = torch.optim.lr_scheduler.LambdaLR(tuned.optimizer, lambda step: learning_rate(shape, step))
    losses, shares = [], []
    begin = time.perf_counter()
    steps = range(frame.steps)
    for step in tqdm(steps, f"{method}, lr {lr:g}, seed {seed}", leave=False, disable=None if bar else True):
        batch = task.train.shuffled_batch(frame.batch_size, step, seed)
        loss, share = _step(tuned, {k: v.to(device) for k, v in batch.items()}, step)
        schedule.step()
        losses.append(loss)
        shares.append(share)
        if not math.isfinite(loss):
            break
    training_s = time.perf_counter() - begin
    peak = _peak_mib()
    result = {
        "task": key[0],
        "method": method,
        "lr": lr,
        "seed": seed,
        "trainable": trainable,
        **tuned.extra,
        "loss_curve": [round(x, 4) if math.isfinite(x) else None for x in losses],
        "diverged": not math.isfinite(losses[-1]),
        "training_s": round(training_s, 1),
        "optimizer_share": statistics.median(shares),
        "peak_mib_above_base": peak - loaded,
    }
    if result["diverged"]:
        return result
    return {**result, **_evaluated(tuned, task, frame)}


def _evaluated(tuned: Tuned, task: _tasks.Task, frame: Frame) -> dict[str, Any]:
    tuned.model.eval()
    return {
        "validation_loss": _tasks.mean_loss(tuned.model, task.validation, frame.eval_samples, frame.batch_size),
        "test_loss": _tasks.mean_loss(tuned.model, task.test, frame.eval_samples, frame.batch_size),
        "accuracy": _tasks.accuracy(tuned.model, task.questions, frame.batch_size),
        "effective_rank_share": _methods.effective_rank_share(tuned.updates()),
    }


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # which Windows has not

    # In KiB, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)


def report(results: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    return _finetune_table.report(results)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the held-out loss of every method, one panel a task."""
    _finetune_table.plot(results, path)


if __name__ == "__main__":
    _harness.main(sys.modules[__name__])
