"""The commands ``export``, ``import`` and ``info``: from arguments to library calls, which are imported on use."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from stiefel_lora._files import atomic_folder, path_of
from stiefel_lora._types import Orthonormal
from stiefel_lora.config import ADAPTER_FOLDER, CHOICES, RUN_FILE
from stiefel_lora.errors import InputError


def add_adapter_commands(commands: "argparse._SubParsersAction[Any]") -> None:
    """Register the commands; each parser's ``run`` takes the parsed arguments.

    Args:
        commands: What ``ArgumentParser.add_subparsers()`` returned.
    """
    export = commands.add_parser("export", help="write an adapter as a PEFT LoRA, or merged into its base model")
    export.add_argument("adapter", type=path_of, help="folder of an adapter, or of a run")
    export.add_argument("--format", choices=["peft", "merged"], required=True, help="what to write")
    export.add_argument("--output", type=path_of, required=True, help="folder to write; it must not hold anything yet")
    export.add_argument(
        "--model", type=os.path.expanduser, help="base model for 'merged' (default: the one named in the adapter)"
    )
    export.add_argument(
        "--dtype", choices=CHOICES["dtype"], help="precision of 'merged' (default: the one that the base is stored in)"
    )
    export.set_defaults(run=_export)

    imported = commands.add_parser("import", help="turn a PEFT LoRA into a Stiefel adapter of the same function")
    imported.add_argument("adapter", type=path_of, help="PEFT adapter folder")
    imported.add_argument(
        "--output", type=path_of, required=True, help="folder to write; it must not hold anything yet"
    )
    imported.add_argument(
        "--orthonormal", choices=get_args(Orthonormal), default="A", help="factor to make orthonormal (default: A)"
    )
    imported.set_defaults(run=_import)

    info = commands.add_parser("info", help="show what an adapter folder holds, Stiefel or PEFT")
    info.add_argument("adapter", type=path_of, help="folder of an adapter, or of a run")
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    info.set_defaults(run=_info)


def adapter_folder(path: Path) -> Path:
    """Return the folder of an adapter, given it or the folder of its run.

    Raises:
        InputError: If the run has not come to its adapter yet.
    """
    from stiefel_lora.checkpoint import CONFIG_FILE
    from stiefel_lora.convert import PEFT_CONFIG_FILE

    is_itself = any((path / name).is_file() for name in (CONFIG_FILE, PEFT_CONFIG_FILE))
    if is_itself:
        return path
    if (path / ADAPTER_FOLDER).is_dir():
        return path / ADAPTER_FOLDER
    if (path / RUN_FILE).is_file():
        raise InputError(
            f"the run in {path} has no adapter yet; go on with: stiefel-lora finetune --output "
            f"{shlex.quote(str(path))} --resume"
        )
    return path


def named_base(folder: Path, base_model: Mapping[str, Any]) -> str:
    """Return the base model that an adapter names, or raise InputError if it names none that is there."""
    from stiefel_lora.pretrained import find_base

    name = base_model.get("name_or_path")
    if not name:
        raise InputError(f"{folder} does not name its base model; give it with --model")
    return find_base(name)


def _export(args: argparse.Namespace) -> None:
    from stiefel_lora.checkpoint import load_adapter, read_adapter
    from stiefel_lora.convert import write_peft
    from stiefel_lora.merging import merge_adapters
    from stiefel_lora.pretrained import load_base

    if args.dtype and args.format != "merged":
        raise InputError(f"--dtype is an option of --format merged; a {args.format} adapter has that of its factors")
    folder = adapter_folder(args.adapter)
    state = read_adapter(folder)
    _check_new(args.output)
    if args.format == "peft":
        write_peft(state, args.output)
        print(f"PEFT LoRA of {len(state.modules)} linears written to {args.output}")
        return
    base = state.base_model
    name = args.model or named_base(folder, base)
    model, processor = load_base(name, base.get("class"), state.parameters, base.get("task"), dtype=args.dtype)
    load_adapter(model, folder)
    merged: Any = merge_adapters(model)
    with atomic_folder(args.output) as output:
        try:
            merged.save_pretrained(output)
            if processor is not None:
                processor.save_pretrained(output)
        except Exception as error:  # on a full disk safetensors and tokenizers raise exceptions of their own
            raise InputError(f"cannot write to {args.output}: {error}") from error
    print(f"{type(merged).__name__} with {len(state.modules)} merged linears written to {args.output}")


def _import(args: argparse.Namespace) -> None:
    from stiefel_lora.checkpoint import write_adapter
    from stiefel_lora.convert import read_peft

    state = read_peft(args.adapter, orthonormal=args.orthonormal)
    _check_new(args.output)
    write_adapter(state, args.output)
    print(f"Stiefel adapter of {len(state.modules)} linears written to {args.output}")


def _info(args: argparse.Namespace) -> None:
    from stiefel_lora.info import adapter_info

    info = adapter_info(adapter_folder(args.adapter))
    print(json.dumps(asdict(info), indent=1) if args.json else info.table())


def _check_new(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError(f"{path} exists already; give another --output or remove it first")
