"""What every study shares: the command line, interleaved timing, the JSON envelope around a result.

A study is a module of this folder with ``add_arguments(parser)``, ``run(args) -> dict`` (its numbers, JSON-ready) and
``report(results) -> str`` (a Markdown table made from such numbers alone). It may have ``plot(results, path)``, a
picture of them for the page, ``THREADS``, its default number of threads, and ``IN_PIECES``, true if it adds to the
results that are in the output, with other options as well. Besides its own options, ``args`` has those of every study,
``save(results)`` to keep what there is so far, ``previous`` (the results that are in the output), ``interrupted`` (the
same if that run was stopped and is to be gone on with; both None where there are none) and ``command``.
"""

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import subprocess  # noqa: S404  asks git for the revision
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from stiefel_lora._files import locked, other_than_a_file, path_of, write_json
from stiefel_lora.errors import InputError

RESULTS = Path(__file__).parent / "results"
_PEERS = (
    "torch",
    "geoopt",
    "transformers",
    "peft",
    "pogo-torch",
    "geotorch",
    "pymanopt",
    "opacus",
    "scikit-learn",
    "numpy",
)
# Exit statuses of a run that a person or the machine stopped: Ctrl-C and SIGTERM.
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# What must be the same for parts of one result that were measured at different times; the revision is kept for each.
_CONDITIONS = ("options", "seed", "quick", "python", "packages", "machine")
# What every result has.
_NEEDED = {"study", "command", "started", "seed", "quick", "packages", "machine", "revision", "results", "status"}
# What a run has so far, beside the finished result that it is to replace.
UNFINISHED = ".unfinished"
# Options that say nothing about a result.
_NOT_OF_THE_RESULT = ("output", "overwrite")


def main(study: ModuleType, argv: list[str] | None = None) -> None:
    """Run one study from the command line, print its table and write its result."""
    name = study.__name__.rsplit(".", 1)[-1] if study.__name__ != "__main__" else Path(study.__file__ or "").stem
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=study.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=path_of, help=f"where the JSON goes (default: {RESULTS.name}/{name}.json)")
    add_common(parser, threads=getattr(study, "THREADS", None))
    study.add_arguments(parser)
    args = parser.parse_args(argv)
    options = {key: value for key, value in vars(args).items() if key not in _NOT_OF_THE_RESULT}
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    _limit_blas(args.threads)
    # A quick run must not take the place of a committed result.
    args.output = args.output or (Path("runs") / f"{name}-quick.json" if args.quick else RESULTS / f"{name}.json")
    envelope: dict[str, Any] = {
        "study": name,
        "command": shlex.join(["python", "-m", "benchmarks", name, *(sys.argv[1:] if argv is None else argv)]),
        "options": options,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": args.seed,
        "quick": args.quick,
        **environment(),
    }
    with ExitStack() as stack:
        try:
            _check_writable(args.output)
            stack.enter_context(_alone(args.output))
            in_pieces = getattr(study, "IN_PIECES", False)
            found = {} if args.overwrite else _previous(args.output, envelope, in_pieces=in_pieces)
            so_far = args.output
            if not in_pieces and _is_finished(args.output):
                so_far = args.output.with_name(args.output.name + UNFINISHED)
                found = {} if args.overwrite else _previous(so_far, envelope, in_pieces=False)
            _run(study, args, envelope, found, so_far)
        except InputError as error:
            parser.error(str(error))


def _run(
    study: ModuleType, args: argparse.Namespace, envelope: dict[str, Any], found: Mapping[str, Any], so_far: Path
) -> None:
    """Run a study, going on from what was found; write and print its result; ``so_far`` has its parts until then."""
    begin = time.perf_counter()
    # For a study that goes on where it was stopped: a way to keep what it has so far, what an earlier run found, and
    # the same only if that run did not come to its end.
    args.previous, args.command = found.get("results"), envelope["command"]
    args.interrupted = args.previous if found.get("status") == "partial" else None
    if args.interrupted:
        pieces = {key: found.get(key) for key in ("started", "revision", "dirty", "seconds")}
        envelope["earlier"] = [*found.get("earlier", []), pieces]
        print(f"going on with what {so_far} has of {found['started']}", file=sys.stderr)

    def save(path: Path, status: str, results: dict[str, Any]) -> None:
        write_json(
            path,
            {**envelope, "results": results, "status": status, "seconds": round(time.perf_counter() - begin, 1)},
        )

    args.save = functools.partial(save, so_far, "partial")
    signal.signal(signal.SIGTERM, _stop)
    try:
        results = study.run(args)
    except KeyboardInterrupt:
        sys.exit(STOPPED[0])
    save(args.output, "finished", results)
    if so_far != args.output:
        so_far.unlink(missing_ok=True)
    print(study.report(results))
    print(f"\nwritten to {args.output}")


def _is_finished(output: Path) -> bool:
    return output.is_file() and read_result(output)["status"] == "finished"


def _limit_blas(threads: int) -> None:
    """Limit NumPy's linear algebra, which some peers work with, as torch's is."""
    with suppress(ImportError):  # as in the tests, which have no such peers
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)


def add_common(parser: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Add the options of every study; ``threads`` is the default of a study that needs so many."""
    parser.add_argument("--quick", action="store_true", help="a small run that only shows that everything works")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of all random numbers (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the output has another run's result")
    parser.add_argument(
        "--threads",
        type=positive(int),
        default=threads or torch.get_num_threads(),
        help=f"CPU threads (default: {threads or 'all'})",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the option of a study of one language model."""
    parser.add_argument(
        "--model",
        type=os.path.expanduser,
        help="folder, .gguf file or hub name (default: SmolLM2-135M-Instruct)",
    )


def _seed(text: str) -> int:
    """Read a seed that torch takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^63 - 1, got {text!r}")
    return int(text)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other processes that would write the same result out until the context or the process ends.

    Raises:
        InputError: If there is one.
    """
    name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    # Not beside the output, where a kill would leave it.
    lock = Path(tempfile.gettempdir()) / f"stiefel-lora-{name}.lock"
    try:
        lock.touch()
    except OSError:  # another user's
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except InputError:
            raise InputError(f"another process is writing {output}; wait for it, or give another --output") from None
        stack.callback(lock.unlink, missing_ok=True)
        yield


def _previous(output: Path, envelope: Mapping[str, Any], *, in_pieces: bool) -> dict[str, Any]:
    """Return what an earlier run left at the output, empty if nothing that this run may go on with.

    Raises:
        InputError: If this run would destroy something else: a file that is no result, or a study's that is not this
            one, or a full result where this run is a quick one, or a result of other options or conditions, unless the
            study adds to such results (``in_pieces``).
    """
    if not output.is_file():
        return {}
    found = read_result(output)
    if found["study"] != envelope["study"]:
        raise InputError(f"{output} is a result of the study {found['study']}; give another --output")
    if found.get("quick") != envelope["quick"]:
        if envelope["quick"]:
            raise InputError(f"{output} is a full result; give a quick run another --output")
        return {}
    if in_pieces:
        return found
    finished = found["status"] == "finished"
    other = _differences(found, envelope, ("options",) if finished else _CONDITIONS)
    if other and not found["quick"]:
        what = f"{'finished' if finished else 'stopped'} run of other {', '.join(other)} ({found['command']})"
        raise InputError(f"{output} has a {what}; give another --output, or --overwrite to lose it")
    return {} if finished or other else found


def _differences(found: Mapping[str, Any], envelope: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return what differs between an earlier run and this one; a result from before options were kept has a command."""
    now = json.loads(json.dumps(envelope))
    told = {key: key if key in found else "command" for key in keys}
    return [key for key, where in told.items() if found[where] != now[where]]


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of a file that a study has written.

    Raises:
        InputError: If it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        found = None
    if not isinstance(found, dict) or not found.keys() >= _NEEDED:
        raise InputError(f"{path} is not the result of a study; remove it or choose another place")
    return found


def _check_writable(output: Path) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        InputError: If it cannot.
    """
    try:
        if other := other_than_a_file(output):
            raise OSError(f"it is {other}")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror or error}; give another --output") from error


def positive(kind: Callable[[str], float], *, or_zero: bool = False) -> Callable[[str], float]:
    """Return what reads an option's value, a number above zero."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = -1
        if not (0 < number < math.inf or (or_zero and number == 0)):
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what} {'of 0 or more' if or_zero else 'above 0'}, got {text!r}")
        return number

    return read


def _stop(number: int, frame: object) -> None:
    _end_children()
    sys.exit(128 + number)


def _end_children() -> None:
    """Take along the processes that a study runs its parts in; they would work on for nobody."""
    for child in multiprocessing.active_children():
        child.terminate()


@contextmanager
def children_end_with_errors() -> Iterator[None]:
    """End the processes that are at work where the context is left by an error or an interrupt."""
    try:
        yield
    except BaseException:
        _end_children()
        raise


def environment() -> dict[str, Any]:
    """Return what a number depends on besides the code: versions and their origin, machine, revision."""
    return {
        "python": platform.python_version(),
        "packages": {name: origin for name in _PEERS if (origin := _origin(name))},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "revision": _git("rev-parse", "--short", "HEAD"),
        # The results themselves may be new; what counts is the code.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
    }


def _origin(name: str) -> str | None:
    """Return a package's version and where it was installed from; a version alone does not tell geoopt's code."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    direct = distribution.read_text("direct_url.json")
    if direct is None:
        return f"{distribution.version} (package index)"
    source = json.loads(direct)
    commit = source.get("vcs_info", {}).get("commit_id")
    return f"{distribution.version} ({'git ' + commit if commit else 'local file'})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function in a fresh process, which gives its memory back and shows its own peak."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def growth_mib(function: Callable[[], object], device: str = "cpu") -> float:
    """Return by how many MiB at most this process's resident memory grows while a function runs (on Linux).

    On "cuda" it is the memory that torch's allocator has given out.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - begin) / 2**20
    base, peak, done = _resident_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident_mib())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak - base


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
    slow: Mapping[str, int] | None = None,
    label: str = "timing",
) -> dict[str, list[float]]:
    """Time each candidate once a round, all in turn, so that a busy machine disturbs all of them alike.

    Args:
        candidates: Functions by name.
        rounds: How often each is timed.
        warmup: Rounds before these that are not counted.
        device: On "cuda" the times are those between CUDA events.
        slow: Candidates that take part in so many rounds only (no warm-up), for those a hundred times slower.
        label: What the progress bar says.

    Returns:
        Seconds of each round by name.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in tqdm(range(warmup + rounds), desc=label, leave=False, disable=None):
        for name, function in candidates.items():
            limit = (slow or {}).get(name)
            if limit is not None:
                if warmup <= turn < warmup + limit:
                    times[name].append(_seconds(function, device))
                continue
            seconds = _seconds(function, device)
            if turn >= warmup:
                times[name].append(seconds)
    return times


def _seconds(function: Callable[[], object], device: str) -> float:
    begin = mark(device)
    function()
    return between(begin, mark(device))


def mark(device: str) -> Any:
    """Return a moment in what a device does, for `between`."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Any, end: Any) -> float:
    """Return the seconds from one moment to another; waits for the device."""
    if isinstance(end, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def device_seconds(function: Callable[[], object], rounds: int) -> list[float]:
    """Time on a CUDA device alone what it is long told before it begins: as in a training step that keeps it busy.

    Where a function starts many short operations, the time from an idle device on is that of the host.
    """
    times = []
    for _ in range(rounds):
        # Tens of milliseconds of waiting, in cycles, in which the host gets ahead.
        torch.cuda._sleep(10**8)
        times.append(_seconds(function, "cuda"))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Return the median of some seconds, their quartiles, and how many there are."""
    quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {"median_s": quarters[1], "q1_s": quarters[0], "q3_s": quarters[2], "rounds": len(times)}


def median_ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of one candidate's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=False))


def markdown(header: list[str], rows: list[list[object]]) -> str:
    """Return a Markdown table; floats with three significant digits."""
    text = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *text]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
