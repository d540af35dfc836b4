"""Imports point one way, and importing the package is light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import stiefel_lora

PACKAGE = Path(__file__).parent.parent / "stiefel_lora"

# A module may import from its own level's row only what is named after the colon, and anything of a lower level.
LEVELS: list[dict[str, set[str]]] = [
    {"_types": set(), "_precision": set(), "_processes": {"errors"}, "errors": set(), "_progress": set()},
    {
        "_batches": set(),
        "_budget": set(),
        "_files": set(),
        "_figures": {"_files"},
        "config": {"_budget"},
        "run_folder": {"_files", "config"},
    },
    {
        "_base_model": set(),
        "_safetensors": set(),
        "stiefel": set(),
        "_models": set(),
        "_names": set(),
        "onednn": set(),
        "_head_loss": set(),
        "logits": {"_head_loss"},
        "_sources": set(),
    },
    {
        "optim": set(),
        "factors": set(),
        "layer": {"factors"},
        "_targets": {"factors", "layer"},
        "_bases": {"_targets", "layer"},
        "scores": set(),
        "_entropy": set(),
        "_sketches": set(),
        "_gradnorms": {"_entropy", "_sketches"},
        "_losses": {"_entropy", "_gradnorms"},
        "fisher": {"_gradnorms", "_losses", "_sketches", "scores"},
    },
    {
        "adapted": set(),
        "_sharing": {"adapted"},
        "adapters": {"_sharing", "adapted"},
        "checkpoint": {"_sharing", "adapted", "adapters"},
        "_peft_targets": {"adapted"},
        "convert": {"_peft_targets", "adapted", "adapters", "checkpoint"},
        "initialisation": {"adapted"},
        "distributed": {"adapted"},
        "merging": {"adapted", "adapters"},
        "info": {"checkpoint", "convert"},
    },
    {
        "_records": set(),
        "data": {"_records"},
        "pretrained": set(),
        "selection": {"data"},
        "training": {"data", "pretrained", "selection"},
        "trainer": set(),
    },
    {"report": set(), "adapter_commands": set(), "cli": {"report", "adapter_commands"}, "__main__": {"cli"}},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_name(path: Path) -> str:
    """Return the name of a file's module inside the package; a subpackage counts as one."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Return the names of the package's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "stiefel_lora":
                found |= {alias.name for alias in node.names if alias.name in LEVEL_OF} or {"__init__"}
            elif node.module and node.module.startswith("stiefel_lora."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("stiefel_lora.")}
    return found


def test_every_module_has_a_level() -> None:
    assert set(LEVEL_OF) == {module_name(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    name = module_name(path)
    if name == "__init__":
        assert not imported(path) & {"data", "pretrained", "training", "trainer", *LEVELS[-1]}
        return
    level = LEVEL_OF[name]
    for other in imported(path) - {name}:
        # The command line may name the version, which the package's root holds.
        if other == "__init__":
            assert level >= LEVEL_OF["data"], f"{name} imports from the package's root"
            continue
        allowed = LEVEL_OF[other] < level or other in LEVELS[level][name]
        assert allowed, f"{name} (level {level}) imports {other} (level {LEVEL_OF[other]})"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_importing_the_package_is_light() -> None:
    """Beyond what torch and geoopt load themselves, no heavy package comes with it."""
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch, geoopt; before = set(sys.modules); "
        "from stiefel_lora import *; new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'transformers', 'matplotlib', 'peft', 'safetensors', 'accelerate', 'datasets', 'gguf'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_explains_itself_without_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'numpy', 'geoopt', 'transformers')))\n"  # None: not to be had
        "from stiefel_lora.cli import main\n"
        "main(sys.argv[1:])"
    )
    for words, rc, text in ((["finetune", "--help"], 0, "--granularity"), (["info", "--jsn", "x"], 2, "--help")):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == rc and text in done.stdout + done.stderr, done.stderr


def test_public_names_are_those_that_type_checkers_see() -> None:
    seen = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stiefel_lora."):
            seen.update({alias.asname: f"{node.module}.{alias.name}" for alias in node.names})
    assert stiefel_lora.__all__ == sorted(seen, key=str.lower)
    for name, source in seen.items():
        module, original = source.rsplit(".", 1)
        assert getattr(stiefel_lora, name) is getattr(importlib.import_module(module), original)
        assert name in dir(stiefel_lora)


def test_public_modules_need_no_import_of_their_own() -> None:
    code = "import stiefel_lora; stiefel_lora.optim.RiemannianAdam, stiefel_lora.stiefel.retract, stiefel_lora.layer"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        stiefel_lora.nothing  # noqa: B018
