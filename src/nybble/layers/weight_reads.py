"""Linear layers whose weight or bias the model's own code reads, beside or instead of calling the layer.

A module that computes `self.dt_proj.weight @ x` (Mamba), or hands `self.out_proj.weight` to a fused kernel, goes past
whatever stands in that layer's place: packed bytes are no matrix, and an adapter would have no effect, in PEFT neither.
Such layers stay as they are. They are found in the source of the model's classes, since which of them a pass reads
depends on the device and on kernels that are installed.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from nybble.layers.mixers import calls_its_layers, class_of

READ = ("weight", "bias")
KIND = ("dtype", "device")


@dataclass(frozen=True)
class WeightRead:
    """A place in a class that reads the weight of a module.

    Args:
        path: of that module, from the one that reads; from anywhere below it where `below`.
        where: "class.method".
        conditions: (test, holds): what must be true of the reading module, as far as its own attributes say.
        values: its numbers are read, not only asked of which type they are and where they lie.
        training: only while the reading module is in training mode.
    """

    path: str
    below: bool
    where: str
    conditions: tuple[tuple[str, bool], ...]
    values: bool = True
    training: bool = False


def weights_read(model: nn.Module, values: bool = False) -> dict[str, str]:
    """Names of the modules whose weight or bias is read -> the method that does.

    Args:
        values: only those whose numbers are read. Of layers in few bits `weight` tells a type and a place (T5 asks its
            `wo` for the type of its inputs), but has no numbers.
    """
    names = [name for name, _ in model.named_modules()]
    found: dict[str, str] = {}
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        for read in reads_of(class_of(module)):
            if not all(_holds(test, module) is holds for test, holds in read.conditions):
                continue
            if (values and not read.values) or (read.training and calls_its_layers(module)):
                continue
            if read.below:
                hits = [n for n in names if n.startswith(prefix) and n.endswith(f".{read.path}")]
            else:
                hits = [prefix + read.path]
            found |= dict.fromkeys(hits, read.where)
    return found


@functools.cache
def reads_of(own_class: type[nn.Module]) -> tuple[WeightRead, ...]:
    """The reads in the methods of a class that is no part of torch."""
    if own_class.__module__.partition(".")[0] in ("torch", "nybble"):
        return ()
    methods = dict(inspect.getmembers(own_class, inspect.isfunction))
    reads = []
    for name, method in methods.items():
        if "init" in name or method.__module__ != own_class.__module__:
            continue
        try:
            source = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))
        except OSError:  # made at run time: no source to read
            continue
        reads += list(_reads_in(ast.parse(source), f"{own_class.__name__}.{name}", ()))
    return tuple(dict.fromkeys(reads))


def _reads_in(
    node: ast.AST, where: str, conditions: tuple[tuple[str, bool], ...], values: bool = True, training: bool = False
) -> Iterator[WeightRead]:
    if isinstance(node, ast.If):
        yield from _reads_in(node.test, where, conditions)
        own = [(ast.unparse(node.test), True)] if _is_about_self(node.test) else []
        trains = training or _asks_for_training(node.test)
        for statement in node.body:
            yield from _reads_in(statement, where, (*conditions, *own), training=trains)
        for statement in node.orelse:
            no = (*conditions, *((test, False) for test, _ in own))
            yield from _reads_in(statement, where, no, training=training)
        return
    if isinstance(node, ast.Attribute) and node.attr in READ:
        root, *path = _chain(node.value)
        if path and root:
            yield WeightRead(".".join(path), root != "self", where, conditions, values, training)
    for child in ast.iter_child_nodes(node):
        yield from _reads_in(child, where, conditions, not _asks_kind(node, child), training)


def _asks_for_training(test: ast.expr) -> bool:
    """Whether a condition holds in training mode alone: `self.training`, or that and something else."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return any(ast.unparse(part) == "self.training" for part in parts)


def _asks_kind(node: ast.AST, child: ast.AST) -> bool:
    """Whether a tensor, the child, is only asked of which type it is and where it lies."""
    if isinstance(node, ast.Attribute):
        return node.attr in KIND
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "isinstance" and child is not node.func
    return False


def _chain(node: ast.AST) -> list[str]:
    """["self", "mixer", "out_proj"] of `self.mixer.out_proj`; [""] of what is no plain name."""
    if isinstance(node, ast.Name):
        return [node.id]
    return [*_chain(node.value), node.attr] if isinstance(node, ast.Attribute) else [""]


def _is_about_self(test: ast.expr) -> bool:
    """Whether a condition compares nothing but attributes of the module itself with constants."""
    allowed = ast.Attribute | ast.Constant | ast.BoolOp | ast.UnaryOp | ast.Compare | ast.Name | ast.operator
    quiet = ast.boolop | ast.unaryop | ast.cmpop | ast.expr_context
    nodes = list(ast.walk(test))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    changing = any(isinstance(n, ast.Attribute) and n.attr == "training" for n in nodes)
    return names == {"self"} and not changing and all(isinstance(n, allowed | quiet) for n in nodes)


def _holds(test: str, module: nn.Module) -> bool:
    """A condition of `_is_about_self`: names, comparisons and constants, nothing is called."""
    return bool(eval(test, {"__builtins__": {}}, {"self": module}))
