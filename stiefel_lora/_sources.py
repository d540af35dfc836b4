"""What the source of a module's class says about linear maps: whether they are called, and with what.

An adapter acts where the linear that it stands for is called. Code that computes with ``self.q_proj.weight`` instead,
as fused kernels do, gets the base's weight and passes the adapter by. The source is read, rather than a table of
classes, because it knows models that no table does: new ones, copies under other names, and code from a model's own
repository.
"""

import ast
import inspect
import linecache
import textwrap
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from types import FunctionType

from torch import nn

# What is asked of a weight without computing with it. A gradient does not go through ``data`` either way.
_ABOUT_A_TENSOR = {"data", "device", "dim", "dtype", "is_meta", "itemsize", "ndim", "numel", "requires_grad", "shape"}
_ABOUT_A_TENSOR |= {"element_size", "size"}


@cache
def read_past_forward(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of the children with whose weights a class computes where it should call them.

    Those that are called as well count if the weight is read where the code asks for ``self.training``, as it does
    before Mamba's fused kernels; what it reads elsewhere may be for a setting that is not in use.
    """
    uses = _Uses()
    for method in _methods(cls):
        uses.visit(method)
    return frozenset(uses.read_in_training | (uses.read - uses.called))


@cache
def takes_one_argument(cls: type[nn.Module]) -> bool:
    """Tell whether ``forward`` can be called with one argument."""
    arguments = list(inspect.signature(cls.forward).parameters.values())[1:]
    needed = [a for a in arguments if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    return len(needed) <= 1


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """Yield the methods that a class has beyond ``nn.Module``'s, without those that only initialise."""
    own = [ancestor for ancestor in reversed(cls.__mro__) if ancestor not in nn.Module.__mro__]
    methods = {name: value for ancestor in own for name, value in vars(ancestor).items()}
    for name, method in methods.items():
        if isinstance(method, FunctionType) and "init" not in name and name != "reset_parameters":
            # A lambda inside an expression, or a file that has changed since.
            with suppress(SyntaxError, tokenize.TokenError):
                tree = ast.parse(_source(method))
                yield from (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _source(method: FunctionType) -> str:
    """Return the lines of a method, none if it has no file; ``inspect.getsource`` looks through all modules for it."""
    code = inspect.unwrap(method).__code__
    lines = linecache.getlines(code.co_filename, method.__globals__)[code.co_firstlineno - 1 :]
    return textwrap.dedent("".join(inspect.getblock(lines))) if lines else ""


class _Uses(ast.NodeVisitor):
    """What methods do with the children of ``self``."""

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.read_in_training: set[str] = set()
        self._asks_for_training = False

    def visit_If(self, node: ast.If) -> None:
        """Remember within a branch that it depends on ``self.training``."""
        outside = self._asks_for_training
        self._asks_for_training |= "self.training" in ast.unparse(node.test)
        self.generic_visit(node)
        self._asks_for_training = outside

    def visit_Call(self, node: ast.Call) -> None:
        """Pass over ``isinstance(self.wo.weight, Tensor)``."""
        if not (isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Sort ``self.child``, ``self.child.weight`` and what is asked of a weight."""
        match node:
            case ast.Attribute(ast.Attribute(ast.Attribute(ast.Name("self")), "weight"), about) if (
                about in _ABOUT_A_TENSOR
            ):
                pass
            case ast.Attribute(ast.Attribute(ast.Name("self"), child), "weight", ast.Load()):
                self.read.add(child)
                if self._asks_for_training:
                    self.read_in_training.add(child)
            case ast.Attribute(ast.Attribute(ast.Name("self")), name) if name != "forward":
                pass
            case ast.Attribute(ast.Name("self"), child):
                self.called.add(child)
            case _:
                self.generic_visit(node)
