"""Chooses modules and parameters of a backbone by pattern, by role and by layer.

No table lists architectures: a role (query, value ...) is one name pattern. Names are matched by whole dotted parts:
``"layers.1"`` is a substring of ``"layers.10"`` and ``relative_attention_bias.weight`` is no bias.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_peft.core import anatomy, structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import graft_prefixes
from lightning_peft.core.pattern import matcher

ROLES: dict[str, str] = {
    "query": r"q|query|q_proj|q_lin|query_proj|to_q|[wW]q|q_linear|linear_q|q_head|q_b_proj",
    "key": r"k|key|k_proj|k_lin|key_proj|to_k|[wW]k|k_linear|linear_k|k_head|kv_b_proj|kv_proj",
    "value": r"v|value|v_proj|v_lin|value_proj|to_v|[wW]v|v_linear|linear_v|v_head|kv_b_proj|kv_proj",
    "fused_qkv": r"c_attn|query_key_value|qkv|qkv_proj|Wqkv|W_pack|in_proj|qkv_lin",
    "intermediate": r"intermediate\.dense|ffn\.lin1|lin1|fc1|c_fc|[wW]i|wi_0|wi_1|up_proj|gate_proj|dense_h_to_4h"
    r"|linear1|linear_1|intermediate_dense|w1|w3",
    "attention_output": r"(?:cross)?attention\.output\.dense|(?:self_)?attention\.dense|self_attn\.dense|out_lin|o_proj"
    r"|out_proj|o|(?:attn|attention|crossattention)\.c_proj|attn\.(?:proj|Wo)|linear_out|post_proj",
    "ffn_output": r"(?<!attention\.)output\.dense|lin2|fc2|mlp\.c_proj|wo|down_proj|dense_4h_to_h|linear2|fc_out"
    r"|ffn_output|mlp\.Wo|linear_2|output_dense|w2",
    "ffn_norm": r"(?<!attention\.)output\.LayerNorm|output_layer_norm|full_layer_layer_norm|layernorm_after|layer_norm2"
    r"|norm2|ln_2|post_attention_layernorm|final_layer_norm",
    "post_norm": r"(?<!attention\.)output\.LayerNorm|output_layer_norm|full_layer_layer_norm",
    "attention_scale": r"layer_scale1|layer_scale_1|ls1",
    "ffn_scale": r"layer_scale2|layer_scale_2|ls2",
    "cross_attention": r"crossattention|cross_attn|encoder_attn|EncDecAttention",
}
"""Role of a projection in a block -> pattern of the last parts of its name."""


def backbone_of(module: nn.Module, path: str | None = None) -> nn.Module:
    """Return the submodule at ``path``; without one, the only outermost PreTrainedModel, else the module itself.

    Raises:
        TuningError: no submodule has that path, or there are several PreTrainedModels to choose from.
    """
    if path is not None:
        modules = dict(module.named_modules())
        if path not in modules:
            raise TuningError(f"backbone={path!r} is no submodule of {type(module).__name__}{near(path, modules)}.")
        return modules[path]
    found = structure.pretrained_models(module)
    if len(found) > 1:
        raise TuningError(
            f"{type(module).__name__} has {len(found)} pretrained models ({', '.join(found)}): name one with backbone=."
        )
    return next(iter(found.values()), module)


def match(names: Iterable[str], patterns: str | Sequence[str]) -> dict[str, list[str]]:
    r"""Return pattern -> the names it selects: a string is one regex for the whole name, a list holds dotted suffixes.

    >>> match(["layers.1.q", "layers.10.q", "layers.1.kq"], ["1.q"])
    {'1.q': ['layers.1.q']}
    >>> match(["layers.1.q", "layers.10.q"], r"layers\.\d+\.q")
    {'layers\\.\\d+\\.q': ['layers.1.q', 'layers.10.q']}
    """
    names = list(names)
    if isinstance(patterns, str):
        return {patterns: [name for name in names if matcher(patterns).fullmatch(name)]}
    return {p: [name for name in names if name == p or name.endswith(f".{p}")] for p in patterns}


def hosts(
    backbone: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    patterns: str | Sequence[str],
    layers: Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """Return the modules of these kinds that the patterns select, in the order of the model.

    The head and what methods have added are left out.

    ``"all-linear"`` selects every linear layer inside the blocks: poolers and heads lie outside them. A pattern may
    name the last layer of a plain module. ``layers`` keeps the blocks of these indices, negative ones counted from the
    end.

    Raises:
        TuningError: a pattern selects nothing, or a layer index is out of range.
    """
    head = set(closed_head(backbone, patterns))
    added = graft_prefixes(backbone)
    found = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, kinds)
        and not f"{name}.".startswith(added)
        and not any(f"{name}.{p}" in head for p, _ in module.named_parameters(recurse=False))
    }
    if patterns == "all-linear":
        chosen = every_linear(backbone, [name for name, module in found.items() if _is_linear(module)])
    else:
        chosen = set()
        for each, names in match(found, patterns).items():
            if not names:
                kind = " or ".join(k.__name__ for k in kinds)
                raise TuningError(f"{each!r} matches no {kind} of {type(backbone).__name__}{near(each, found)}.")
            chosen.update(names)
    if layers is not None:
        chosen = in_layers(backbone, chosen, layers)
    return {name: module for name, module in found.items() if name in chosen}


def closed_head(backbone: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """Return the parameters of the head that these patterns do not reach: of a plain module, a pattern may name it."""
    return anatomy.head_names(backbone) if patterns == "all-linear" else anatomy.said_head_names(backbone) or []


def every_linear(backbone: nn.Module, linear: Sequence[str], convolutions: Sequence[str] = ()) -> set[str]:
    """Return what ``"all-linear"`` selects of a backbone's linear layers and convolutions.

    It is the linear layers inside the blocks; where they have none, their convolutions, which are linear too; where the
    backbone has no blocks, those anywhere.

    Raises:
        TuningError: there are none.
    """
    lists = anatomy.block_lists(backbone)
    for names in (linear, convolutions):
        if inside := {name for name in names if anatomy.block_index(lists, name)}:
            return inside
    for names in (linear, convolutions):
        if found := {name for name in names if name}:
            return found
    raise TuningError(
        f"'all-linear' finds no linear layer in a list of blocks of {type(backbone).__name__}, nor elsewhere but in a "
        "head: name target_modules."
    )


def by_role(backbone: nn.Module, roles: Iterable[str], kinds: tuple[type[nn.Module], ...]) -> str:
    """Return a regex for the projections of these roles inside the blocks, or for the fused one where they are one.

    Each tower of a backbone that has several is looked at by itself, since one may fuse what another has apart.

    Raises:
        TuningError: the backbone has no projection of these roles under a known name.
    """
    lists: Mapping[str, nn.Module] = anatomy.block_lists(backbone) or {"": backbone}
    inside: dict[str, list[str]] = {outer: [] for outer in lists}
    for name, module in backbone.named_modules():
        place = anatomy.block_index(lists, name)
        if place and isinstance(module, kinds):
            inside[place[0]].append(name)
    ways = ("|".join(ROLES[role] for role in roles), ROLES["fused_qkv"])
    chosen = {outer: way for outer, names in inside.items() if (way := _way(names, ways)) is not None}
    if not chosen:
        raise TuningError(
            f"{type(backbone).__name__} has no {' or '.join(roles)} projection under a known name: give "
            "target_modules, e.g. 'all-linear' or a list of suffixes."
        )
    if len(set(chosen.values())) == 1:
        return rf"(?:.*\.)?(?:{next(iter(chosen.values()))})"
    return "|".join(rf"{re.escape(outer)}\.(?:.*\.)?(?:{way})" for outer, way in chosen.items())


def _way(names: Sequence[str], ways: Iterable[str]) -> str | None:
    return next((way for way in ways if any(re.fullmatch(rf"(?:.*\.)?(?:{way})", name) for name in names)), None)


def has_role(name: str, *roles: str) -> bool:
    """Tell whether the last parts of a module's name are those of one of the ``ROLES``."""
    return re.fullmatch(rf"(?:.*\.)?(?:{'|'.join(ROLES[role] for role in roles)})", name) is not None


def in_layers(backbone: nn.Module, names: Iterable[str], layers: Sequence[int]) -> set[str]:
    """Return the names that lie in the blocks of these indices, negative ones counted from the end.

    Raises:
        TuningError: an index is out of range, or none of the names is left.
    """
    lists = anatomy.block_lists(backbone)
    sizes = {outer: len(blocks) for outer, blocks in lists.items()}
    longest = max(sizes.values(), default=0)
    for layer in layers:
        if not -longest <= layer < longest:
            raise TuningError(
                f"layers has {layer}, but {type(backbone).__name__} has blocks 0 to {longest - 1}: take some of them."
            )
    kept = set()
    for name in names:
        place = anatomy.block_index(lists, name)
        if place and place[1] in {layer % sizes[place[0]] for layer in layers if layer < sizes[place[0]]}:
            kept.add(name)
    if not kept:
        raise TuningError(f"layers={list(layers)} keeps none of the selected modules: choose blocks that hold them.")
    return kept


def near(name: str, names: Iterable[str], most: int = 3) -> str:
    """Return ``"; it has e.g. ..."`` with the names most like ``name``, for the end of an error message.

    Where none is, these are the last parts of names that occur most often, such as those of the layers of every block.
    """
    names = list(names)
    tails: dict[str, str] = {}
    for full in names:
        parts = full.split(".")
        for i in range(len(parts)):
            tails.setdefault(".".join(parts[i:]), full)
    close = [tails[tail] for tail in difflib.get_close_matches(name, tails, n=most, cutoff=0.5)]
    often = Counter(full.rpartition(".")[2] for full in names).most_common(most)
    chosen = list(dict.fromkeys(close)) or [last for last, _ in often]
    return f"; it has e.g. {', '.join(chosen)}" if chosen else "; it has none"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
