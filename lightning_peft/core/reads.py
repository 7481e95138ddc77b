"""Finds the weights that a module reads from layers below it without calling them, by the source of its forward pass.

``F.linear(x, self.proj.weight)`` uses the weight of ``proj`` and passes by whatever hangs on its call (WavLM's
attention, Mamba's ``dt_proj``, timm's ``qkv`` with biases apart). What is asked of the weight alone, such as its dtype,
is no use of it. A class whose source cannot be had is taken to call its layers.
"""

import ast
import inspect
import textwrap
from typing import Any, NamedTuple

from torch import nn

from lightning_peft.core import structure
from lightning_peft.core.product import Product

_ASKED = frozenset({"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"})
"""Attributes of a tensor that are no use of its values."""


_FIELDS = ("last_hidden_state", "pooler_output")
"""The first fields of a model's output, in their order."""


class Read(NamedTuple):
    """How a module uses a parameter of a layer below it.

    Attributes:
        layer: the name of the layer below the module.
        parameter: the name of the parameter in the layer.
        called: whether the module calls the layer too, on some way through its forward pass.
        whole: whether all of the parameter is read somewhere, and not a slice of it.
    """

    layer: str
    parameter: str
    called: bool
    whole: bool


def reads_below(module: nn.Module) -> list[Read]:
    """Return the parameters of layers below ``module`` that its own forward pass uses without a call."""
    found = []
    source = _of_class(type(module))
    for (layer, parameter), whole in sorted(source.read.items()):
        try:
            owner = module.get_submodule(layer)
        except AttributeError:
            continue
        if parameter in dict(owner.named_parameters(recurse=False)):
            found.append(Read(layer, parameter, layer in source.called, whole))
    for path in sorted(source.called):  # by a method of the layer's own, such as ``self.experts.reduce(x)``
        layer, _, method = path.rpartition(".")
        child = structure.part(module, layer) if layer else None
        if child is not None and method not in dict(child.named_children()):
            used = _of_class(type(child), method).own
            own = [name for name, _ in child.named_parameters(recurse=False) if name in used]
            found += [Read(layer, name, layer in source.called, True) for name in own]
    return found


def products_of(module: nn.Module) -> dict[str, Product]:
    """Return the parameters of a module that its forward pass multiplies its input by in ``torch.einsum``."""
    return _of_class(type(module)).products


def passed_by(root: nn.Module, path: str = "") -> dict[str, tuple[nn.Module, str]]:
    """Return the layers below ``root`` that may not be called, since a module above them reads their weights.

    Args:
        root: the model, or a part of it.
        path: its name in the model.

    Returns:
        The name of each layer -> that module, and the layer's name below it.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for name, module in root.named_modules():
        prefix = ".".join(part for part in (path, name) if part)
        layers = [read.layer for read in reads_below(module) if read.whole or not read.called]
        if isinstance(module, nn.MultiheadAttention):
            layers.append("out_proj")
        found |= {f"{prefix}.{layer}".lstrip("."): (module, layer) for layer in layers}
    return found


def layers_called(module: nn.Module) -> frozenset[str]:
    """Return the names below a module of what its forward pass calls, by its source."""
    return _of_class(type(module)).called


def field_read(module: nn.Module) -> str | None:
    """Return whether a model reads the ``last_hidden_state`` or the ``pooler_output`` of what is below it, or None."""
    found = set()
    for node, _ in _nodes(type(module).forward):
        if isinstance(node, ast.Attribute) and node.attr in _FIELDS:
            found.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and "output" in node.value.id:
            index = node.slice.value if isinstance(node.slice, ast.Constant) else None
            if type(index) is int and index in (0, 1):
                found.add(_FIELDS[index])
    return found.pop() if len(found) == 1 else None


def may_overwrite(root: nn.Module, layer: str) -> bool:
    """Tell whether a module around a layer computes in place, so that it may write into what the layer gives.

    DeBERTa and Longformer divide their queries so, Llama 4 adds its experts. Modules with a list of others, such as the
    model itself, are left out; of modules such as ``nn.ReLU(inplace=True)`` another function tells.
    """
    parts = layer.split(".")[:-1]
    around = [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    lists = (nn.ModuleList, nn.Sequential)
    return any(
        _of_class(type(module)).writes
        for module in around
        if module is around[-1] or not any(isinstance(child, lists) for child in module.children())
    )


class _Source(NamedTuple):
    """What the forward pass of a class does, or another method of it.

    Attributes:
        called: the layers that it calls.
        read: the parameters that it reads, by layer and name, and whether as a whole.
        writes: whether it computes in place.
        products: its own parameters that are factors of ``torch.einsum``.
        own: the attributes of its own whose values it uses.
    """

    called: frozenset[str]
    read: dict[tuple[str, str], bool]
    writes: bool
    products: dict[str, Product]
    own: frozenset[str]


_KNOWN: dict[tuple[type[nn.Module], str], _Source] = {}


def _of_class(kind: type[nn.Module], method: str = "forward") -> _Source:
    if (kind, method) not in _KNOWN:
        _KNOWN[kind, method] = _look_at(kind, method)
    return _KNOWN[kind, method]


def _look_at(kind: type[nn.Module], method: str) -> _Source:
    called: set[str] = set()
    own: set[str] = set()
    read: dict[tuple[str, str], bool] = {}
    products: dict[str, Product] = {}
    writes, waiting, seen = False, [method], set()
    while waiting:
        name = waiting.pop()
        function = getattr(kind, name, None)
        if name in seen or not inspect.isfunction(inspect.unwrap(function) if function else None):
            continue
        seen.add(name)
        for node, parent in _nodes(function):
            writes = writes or _writes(node)
            path = _path(node)
            if len(path) == 1 and _is_call_of(node, parent):
                waiting.append(path[0])
            elif len(path) == 1 and (product := _einsum(node, parent)) is not None:
                products[path[0]] = product
            if path and _is_call_of(node, parent):
                called.add(".".join(path))
            elif path and isinstance(parent, ast.Call) and node in parent.args:  # LayoutLMv3 hands a layer on
                read |= {(".".join(path), leaf): True for leaf in ("weight", "bias")}
            if len(path) == 1 and not _is_call_of(node, parent) and _uses(node, parent):
                own.add(path[0])
            if len(path) > 1 and not _is_call_of(node, parent) and _uses(node, parent):
                key = (".".join(path[:-1]), path[-1])
                read[key] = read.get(key, False) or not isinstance(parent, ast.Subscript)
    return _Source(frozenset(called), read, writes, products, frozenset(own))


def _nodes(function: Any) -> list[tuple[ast.AST, ast.AST]]:
    """Return the nodes of a function's source, each with its parent; none of torch's own, or without a source."""
    function = inspect.unwrap(function)
    if (function.__module__ or "").startswith("torch.nn."):  # one that torch.fx has written is of no module
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return []
    return [(child, parent) for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)]


def _path(node: ast.AST) -> tuple[str, ...]:
    """Return ``("a", "b")`` of ``self.a.b``, or nothing."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()


def _einsum(node: ast.AST, parent: ast.AST) -> Product | None:
    """Return how ``torch.einsum("...", x, node)`` multiplies by a node."""
    if not isinstance(parent, ast.Call) or node not in parent.args or not ast.unparse(parent.func).endswith("einsum"):
        return None
    equation = parent.args[0].value if isinstance(parent.args[0], ast.Constant) else None
    return Product.in_einsum(equation, parent.args.index(node) - 1) if isinstance(equation, str) else None


def _writes(node: ast.AST) -> bool:
    if isinstance(node, ast.AugAssign):
        return not isinstance(node.value, (ast.Constant, ast.Tuple))
    return isinstance(node, ast.Attribute) and node.attr.endswith("_") and not node.attr.startswith("_")


def _is_call_of(node: ast.AST, parent: ast.AST) -> bool:
    return isinstance(parent, ast.Call) and parent.func is node


def _uses(node: ast.AST, parent: ast.AST) -> bool:
    """Tell whether the value of a parameter is used, and nothing else of it."""
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _ASKED
    if isinstance(parent, ast.Call):
        return not (isinstance(parent.func, ast.Name) and parent.func.id in ("isinstance", "hasattr", "getattr"))
    return not isinstance(parent, (ast.Compare, ast.If, ast.IfExp)) or (
        isinstance(parent, ast.IfExp) and parent.test is not node
    )
