"""LoRA: ``lora_A`` and ``lora_B`` of each layer, with rsLoRA, DoRA, patterns of rank and alpha, and biases."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.core import anatomy
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Grafted
from lightning_peft.interop.converters.base import Converter, Exported, Parts, delta_name, places, refuse
from lightning_peft.interop.converters.lora_targets import (
    add_biases,
    called_in,
    check_layers,
    check_parts,
    file_shapes,
    found_in,
    warn_of_padding,
    wrapped_keys,
)
from lightning_peft.interop.names import Names, compact, selection
from lightning_peft.interop.patterns import common, number, pattern_of, spread, their_pattern_of, value_of
from lightning_peft.updates.factors import Factors
from lightning_peft.updates.low_rank import LowRank
from lightning_peft.updates.low_rank_weights import LowRankWeights

_WITHOUT_TWIN = (
    *("layer_replication", "alora_invocation_tokens", "use_bdlora"),
    *("use_qalora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    "megatron_config",
)
_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""The initial values that leave the base as it is; of the others (PiSSA, OLoRA ...) PEFT saves A and B for a base that
it has changed."""


class Update(NamedTuple):
    """One low-rank update, on both sides.

    Attributes:
        key: where PEFT keeps it.
        target: what our ``target_modules`` call it.
        start: of the names of its tensors in the delta.
        factors: its tensors.
        host: the layer, or the module that reads the matrix itself.
        weight: the name of that matrix below the host; None: the host is the layer.
    """

    key: str
    target: str
    start: str
    factors: Factors
    host: nn.Module
    weight: str | None = None


class LoRAConverter(Converter):
    """``W + (alpha / r) B A``, the same matrices on both sides."""

    peft_type: ClassVar[str] = "LORA"
    methods: ClassVar[tuple[str, ...]] = ("LoRA",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_modules": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
    }

    def export(self, model: nn.Module, method: Any, names: Names) -> Exported:
        """Return A, B and, for DoRA, the magnitudes of each layer."""
        exported = Exported({})
        updates = [update for place in places(model, method) for update in _updates(place)]
        warn_of_padding(model, [update.target for update in updates], "this LoRA")
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        given = spread(method.alpha_pattern, [update.target for update in updates], method.alpha)
        for update in updates:
            exported.layers.setdefault(update.key, {}).update(_tensors(update))
            exported.delta |= {f"{update.start}{name}" for name in update.factors.state_dict()}
            axis = update.factors.rank_axes[0]
            ours, rank = update.factors.A.shape[axis], update.factors.factors()[0].shape[axis]
            ranks[update.target] = rank  # twice ours where the factors of the start are taken off again
            alphas[update.target] = given[update.target] * (
                math.sqrt(rank / ours) if method.use_rslora else rank / ours
            )
            if method.init == "eva":  # whose factors have more room than the scale is for
                alphas[update.target] = update.factors.scale * (math.sqrt(rank) if method.use_rslora else rank)
        r, alpha = common(ranks, method.r), common(alphas, method.alpha)
        exported.config = {
            "fan_in_fan_out": any(isinstance(update.host, Conv1D) for update in updates),
            "lora_alpha": number(alpha),
            "lora_dropout": method.dropout,
            "r": r,
            "alpha_pattern": their_pattern_of(alphas, alpha),
            "rank_pattern": their_pattern_of(ranks, r),
            "target_modules": selection([u.target for u in updates if u.weight is None], names.modules),
            "target_parameters": compact([u.target for u in updates if u.weight is not None], names.tensors) or None,
            "use_rslora": method.use_rslora,
            "use_dora": method.use_dora,
        }
        return exported

    def config_of_bias(self, biases: set[str], layers: Iterable[str]) -> str | None:
        """Return 'lora_only' if the biases are those of the layers, else 'all'."""
        return "lora_only" if biases <= {f"{layer}.bias" for layer in layers} else "all"

    def trains_bias(self, parts: Parts, name: str) -> bool:
        """Tell whether ``bias`` covers it."""
        return parts.config["bias"] == "all" or name.removesuffix(".bias") in parts.layers

    def arguments(self, parts: Parts, names: Names) -> dict[str, Any]:
        """Return the arguments of LoRA, after seeing that every layer has its tensors, of the rank that is said."""
        config, source = parts.config, parts.source
        _check_kind(config, source)
        found = found_in(parts, names)
        check_layers(parts, names, found)
        warn_of_padding(names.model, found, source)
        head = set(anatomy.said_head_names(names.model) or [])  # a pattern may name the last layer of a plain module
        in_head = [target for target in found if f"{target}.weight" in head]
        if in_head:
            raise TuningError(
                f"{source} has a low-rank update of {in_head[0]}, the task head, which is trained whole here: "
                "merge that update with PEFT, or train with exclude_modules."
            )
        called = {target: called_in(parts, target, names.modules.get(target)) for target in found}
        ranks = {target: value_of(config["rank_pattern"], called[target], config["r"]) for target in found}
        alphas = {t: value_of(config["alpha_pattern"], called[t], config["lora_alpha"]) for t in found}
        if config["lora_bias"]:
            scale = {t: alphas[t] / (math.sqrt(ranks[t]) if config["use_rslora"] else ranks[t]) for t in found}
            add_biases(parts, names, {key: scale[target] for target, (key, _) in found.items()})
        for target, (key, shape) in found.items():
            check_parts(parts, key, file_shapes(shape, ranks[target], config["use_dora"]), ranks[target])
        candidates = [n for n in {*names.modules, *names.tensors} if n not in head and f"{n}.weight" not in head]
        arguments = {
            "r": config["r"],
            "alpha": float(config["lora_alpha"]),
            "dropout": config["lora_dropout"],
            "target_modules": selection(found, candidates),
            "rank_pattern": pattern_of(ranks, config["r"]),
            "alpha_pattern": {key: float(v) for key, v in pattern_of(alphas, config["lora_alpha"]).items()},
            "use_rslora": config["use_rslora"],
        }
        if config["use_dora"]:
            arguments["use_dora"] = True
        own = {f"{target}.bias" for target in found}
        if any(name in own or (config["bias"] == "all" and name.endswith(".bias")) for name in names.tensors):
            arguments["bias"] = config["bias"]  # of which PEFT says nothing where there are none
            if config["lora_bias"] and config["bias"] == "none":
                arguments["bias"] = "lora_only"
        return arguments

    def fill(self, parts: Parts, model: nn.Module, method: Any) -> dict[str, Tensor]:
        """Return A, B and magnitudes by the names of the grafts."""
        filled = {}
        for place in places(model, method):
            for update in _updates(place):
                for name, tensor in update.factors.named_parameters():
                    theirs = parts.layers[update.key][_PARTS[isinstance(update.host, nn.Embedding)][name]]
                    filled[f"{update.start}{name}"] = _unstacked(theirs, tensor, name) if update.weight else theirs
        return filled


def _check_kind(config: dict[str, Any], source: str) -> None:
    """Check that an adapter is a LoRA of a base that PEFT has left as it was.

    Raises:
        TuningError: it is not.
    """
    refuse(config, _WITHOUT_TWIN, source)
    if config["init_lora_weights"] == "mica":
        raise TuningError(
            f"{source} was trained with init_lora_weights='mica', by which B stays as it was at the start, and "
            "here both are trained: merge it with PEFT."
        )
    if config["init_lora_weights"] not in _INITS:
        raise TuningError(
            f"{source} was started with init_lora_weights={config['init_lora_weights']!r}, for which PEFT changes "
            "the base: save it with path_initial_model_for_weight_conversion= of save_pretrained."
        )


_PARTS = (
    {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    {"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
)
"""Our parameter -> PEFT's part, of a layer and of an embedding."""


def _updates(place: Grafted[Any]) -> list[Update]:
    """Return the updates of a graft, in PEFT's order."""
    graft = place.graft
    if not isinstance(graft, LowRankWeights):
        assert isinstance(graft, LowRank)
        return [Update(place.path, place.path, delta_name(place, ""), graft, place.host)]
    names = [name for name, _ in place.host.named_parameters() if name in graft.weights]
    layers = [] if isinstance(place.host, nn.MultiheadAttention) else [n for n in names if _is_of_a_layer(place, n)]
    names = [name for name in names if name not in layers]
    keys = wrapped_keys(place.path, place.host, names) if names else {}
    called = [(f"{place.path}.{name}".removesuffix(".weight").lstrip("."), name) for name in layers]
    return [
        Update(path, path, delta_name(place, f"{graft.part_name(name)}."), graft.part(name), place.host)
        for path, name in called
    ] + [
        Update(
            keys[name],
            f"{place.path}.{name}".lstrip("."),
            delta_name(place, f"{graft.part_name(name)}."),
            graft.part(name),
            place.host,
            name,
        )
        for name in names
    ]


def _is_of_a_layer(place: Grafted[Any], name: str) -> bool:
    """Tell whether a matrix that the host reads is the weight of a linear layer, whose call PEFT changes."""
    return isinstance(place.host.get_submodule(name.rpartition(".")[0]), nn.Linear)


def _tensors(update: Update) -> dict[str, Tensor]:
    """Return the tensors of an update by PEFT's parts, in PEFT's shapes."""
    a, b = (factor.detach() for factor in update.factors.factors())
    if a.ndim == 3 and update.weight is not None:  # one for each expert: PEFT has them side by side
        a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
    elif update.weight is not None and update.host.get_parameter(update.weight).ndim == 3:
        raise TuningError(
            f"PEFT takes a parameter of three dimensions, such as {update.target}, for stacked experts: exclude it, or "
            "merge the delta and save the model."
        )
    names = _PARTS[isinstance(update.host, nn.Embedding)]
    tensors = {names["A"]: a, names["B"]: b}
    if update.factors.m is not None:
        if update.weight is not None:
            raise TuningError(f"PEFT has no DoRA of {update.target}, which is read without a call: exclude it.")
        tensors[names["m"]] = update.factors.m
    return tensors


def _unstacked(theirs: Tensor, ours: Tensor, name: str) -> Tensor:
    """Return a tensor of PEFT in our shape."""
    if ours.ndim != 3:
        return theirs
    if name == "A":
        return theirs.reshape(ours.shape)
    experts, out, r = ours.shape
    return theirs.reshape(out, r, experts).permute(2, 0, 1)
