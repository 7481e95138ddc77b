"""Finds the parts of a backbone: its blocks, its task head, its norms and its biases.

No table lists architectures. A list of blocks is one whose entries have a linear layer or two matrices each; a head is
what the class of a task adds to its base model, what ``get_classifier()`` says (timm), or, of a module that says
nothing, its last linear layer.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from lightning_peft.core import structure, task_class
from lightning_peft.core.graft import graft_prefixes

BlockList = nn.ModuleList | nn.Sequential


def block_lists(backbone: nn.Module) -> dict[str, BlockList]:
    """Return the outermost lists of blocks by name: ``encoder.layer``, or T5's two lists ``*.block``.

    A ``ModuleList`` may hold blocks of several classes (Jamba); of an ``nn.Sequential`` most are of one class. Lists of
    other things (convolutions of positions, patch embeddings) and of the parts of a head are none.
    """
    head = set(head_names(backbone))
    return {
        name: entries
        for name, entries in _lists(backbone).items()
        if not head or not head.issuperset(f"{name}.{parameter}" for parameter, _ in entries.named_parameters())
    }


def blocks(backbone: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Return, for each of the ``block_lists``, its blocks in order, with their names; a stage counts as its blocks.

    A stage (Swin, ResNet) is an entry with a list ``blocks`` or ``layers`` of equal modules of its own.
    """
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, entries in block_lists(backbone).items():
        found[name] = []
        for i, entry in entries.named_children():
            children = dict(entry.named_children())
            leaf = "blocks" if "blocks" in children else "layers"
            inner = children.get(leaf)
            if isinstance(entry, nn.ModuleList):  # which is never called
                found[name] += [(f"{name}.{i}.{j}", block) for j, block in entry.named_children()]
                continue
            path = f"{name}.{i}".lstrip(".")
            if isinstance(inner, (nn.ModuleList, nn.Sequential)) and len({type(block) for block in inner}) == 1:
                found[name] += [(f"{path}.{leaf}.{j}", block) for j, block in inner.named_children()]
            else:
                found[name].append((path, entry))
    return found


def block_index(lists: Iterable[str], name: str) -> tuple[str, int] | None:
    """Return ``(list, index)`` of the block that ``name`` lies in, or None outside of the ``block_lists``."""
    for outer in lists:
        prefix = f"{outer}." if outer else ""
        if name.startswith(prefix):
            entry = name[len(prefix) :].split(".")[0]
            if entry.isdigit():
                return outer, int(entry)
            entries = lists[outer] if isinstance(lists, Mapping) else nn.ModuleList()
            names = [child for child, _ in entries.named_children()]  # torchvision: encoder_layer_0 ...
            return (outer, names.index(entry)) if entry in names else None
    return None


def without_grafts(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a backbone by name, but for those that methods have added."""
    added = graft_prefixes(backbone)
    return {name: module for name, module in backbone.named_modules() if not f"{name}.".startswith(added)}


def norm_names(backbone: nn.Module) -> list[str]:
    """Return the parameter names of the norms that work on each token (LayerNorm, RMSNorm ...), the head's left out."""
    head = set(head_names(backbone))
    first = {id(parameter): name for name, parameter in backbone.named_parameters()}
    found = [
        full
        for module in without_grafts(backbone).values()
        if "Norm" in type(module).__name__ and "BatchNorm" not in type(module).__name__
        for parameter in module.parameters(recurse=False)
        if (full := first[id(parameter)]) not in head
    ]
    return list(dict.fromkeys(found))  # blocks may share norms (Zamba)


def bias_owners(backbone: nn.Module) -> dict[str, str]:
    """Return the name of each module that has a bias, the head's left out, with the name of that bias.

    Biases of other names, such as ``q_bias`` of DeBERTa, ``down_proj_bias`` of experts and ``bias_ih_l0`` of an LSTM,
    stand by their own names; XLNet's ``r_s_bias`` is none, but a table of vectors by head. A bias that several modules
    share is that of the first (BERT's decoder of words shares that of its predictions).
    """
    head = set(head_names(backbone))
    first = {id(parameter): name for name, parameter in backbone.named_parameters()}
    return {
        name if last in ("bias", "in_proj_bias") else f"{name}.{last}".lstrip("."): full
        for name, module in without_grafts(backbone).items()
        for last, parameter in module.named_parameters(recurse=False)
        if is_bias(last) and (parameter.dim() == 1 or len(parameter) in structure.experts_of(module))
        if (full := first[id(parameter)]) not in head
    }


def is_bias(name: str) -> bool:
    """Tell whether a parameter is a bias by the last part of its name.

    >>> [is_bias(name) for name in ("q_bias", "bias_hh_l0", "relative_position_bias_table", "attn.bias_k")]
    [True, True, False, False]
    """
    return re.fullmatch(r"(\w*_)?bias|bias_[ih]h(_\w+)?", name.rpartition(".")[2]) is not None


def head_names(backbone: nn.Module) -> list[str]:
    """Return the parameter names of the task head.

    The head of a language model was pretrained with it, tied or not, so it is none: ``also_train`` can name it.
    """
    said = said_head_names(backbone)
    return _last_layer(backbone) if said is None else said


def said_head_names(backbone: nn.Module) -> list[str] | None:
    """Return the parameter names of the head that a model says it has; None: it says nothing.

    A transformers model says so by its class, which adds it to a base model, and timm's by ``get_classifier()``.
    """
    classifiers = task_class.classifiers_of(backbone)
    if not structure.is_pretrained(backbone):
        return None if classifiers is None else _names(backbone, classifiers)
    if is_language_model(backbone) or task_class.is_headless(backbone):
        return []
    base = structure.base_model_of(backbone)
    if base is not backbone:
        inner = {name: module for name, module in backbone.named_children() if module is base}
        inner = inner or {name: module for name, module in backbone.named_modules() if module is base}
    else:
        children = nn.ModuleDict(dict(backbone.named_children()))
        inner = structure.pretrained_models(children) if task_class.is_of_a_task(backbone) else {}
    if not inner:
        return _names(backbone, classifiers or [])
    # A graft on the whole model, such as the network of a prefix, is of no part of it.
    prefixes = (*(f"{name}." for name in inner), *(p for p in graft_prefixes(backbone) if p.count(".") == 1))
    table = structure.input_embeddings_of(backbone)
    tables = set() if table is None else {id(p) for p in table.parameters()}
    # A head that a decoder refers to (DETR's kin) lies inside of the base model too.
    own = {
        id(parameter)
        for name, parameter in backbone.named_parameters(remove_duplicate=False)
        if not name.startswith(prefixes) and id(parameter) not in tables
    }
    found = [name for name, parameter in backbone.named_parameters() if id(parameter) in own]
    if not found and base is not backbone and task_class.is_of_a_task(backbone):
        found = _added_inside(backbone, next(iter(inner)), base)
    return found or _names(backbone, classifiers or [])


def _added_inside(backbone: nn.Module, path: str, base: nn.Module) -> list[str]:
    """Return what the class of a task has put into its base model, behind the blocks (Perceiver, RT-DETR)."""
    alone = task_class.parameter_names(base)
    if alone is None:
        return []
    names = [name for name, _ in backbone.named_parameters()]
    lists = _lists(backbone)
    start = next((i for i, name in enumerate(names) if block_index(lists, name)), len(names))
    return [name for name in names[start:] if name.removeprefix(f"{path}.") not in alone]


def is_language_model(backbone: nn.Module) -> bool:
    """Tell whether a model scores the words of the table that it reads; a CTC model of speech reads none."""
    if structure.output_embeddings_of(backbone) is None:
        return False
    return structure.is_encoder_decoder(backbone) or isinstance(structure.input_embeddings_of(backbone), nn.Embedding)


def towers(backbone: nn.Module) -> tuple[str, ...]:
    """Return the names of the models side by side that a model is, as CLIP is, none of which feeds another; or none."""
    children = {name: child for name, child in backbone.named_children() if structure.is_pretrained(child)}
    if len(children) == 1 and not head_names(backbone):
        name, child = next(iter(children.items()))
        return tuple(f"{name}.{tower}" for tower in towers(child))
    alone = structure.is_pretrained(backbone) and structure.output_embeddings_of(backbone) is None
    side_by_side = alone and not structure.is_encoder_decoder(backbone) and not head_names(backbone)
    return tuple(children) if side_by_side else ()


def _names(backbone: nn.Module, modules: list[nn.Module]) -> list[str]:
    own = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in backbone.named_parameters() if id(parameter) in own]


def _last_layer(backbone: nn.Module) -> list[str]:
    """Return the parameters of a plain module's last layer, if it is linear, outside of blocks and scores no words."""
    modules = {n: m for n, m in without_grafts(backbone).items() if next(m.parameters(recurse=False), None) is not None}
    if len(modules) < 2:
        return []
    name, last = next(reversed(modules.items()))
    words = {module.num_embeddings for module in modules.values() if isinstance(module, nn.Embedding)}
    inside = isinstance(backbone.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    if not isinstance(last, nn.Linear) or inside or last.out_features in words or block_index(_lists(backbone), name):
        return []
    return [f"{name}.{parameter}" for parameter, _ in last.named_parameters(recurse=False)]


def _lists(backbone: nn.Module) -> dict[str, BlockList]:
    found: dict[str, BlockList] = {}
    for name, module in without_grafts(backbone).items():
        if any(name.startswith(f"{outer}." if outer else "") for outer in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and _holds_blocks(module):
            found[name] = module
    return found


def _holds_blocks(entries: BlockList) -> bool:
    holding = [entry for entry in entries if next(entry.parameters(), None) is not None]
    of_blocks = [entry for entry in holding if _is_block(entry)]
    if isinstance(entries, nn.ModuleList) or not of_blocks:
        return bool(of_blocks) and len(of_blocks) == len(holding)
    kinds = Counter(type(entry) for entry in of_blocks)
    if len(holding) == 1:  # a pipeline of one thing is that thing, unless it is a block itself
        return not _lists(holding[0])
    kind, count = kinds.most_common(1)[0]
    if count == len(holding):
        return True
    # The stem and the end of a convolutional network may stand in line with its blocks.
    return count > 2 and 2 * count > len(holding) and not issubclass(kind, (nn.Sequential, nn.ModuleList))


def _is_block(entry: nn.Module) -> bool:
    inner = [module for module in without_grafts(entry).values() if module is not entry]
    matrices = [p for module in (entry, *inner) for p in module.parameters(recurse=False) if p.dim() > 1]
    return any(isinstance(module, nn.Linear) for module in inner) or (bool(inner) and len(matrices) > 1)
