"""Exports a tuned model as an adapter of PEFT."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.delta import delta_names
from lightning_peft.core.errors import TuningError
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.core.graft import grafts
from lightning_peft.core.method import TuningMethod
from lightning_peft.core.tuning import tunings
from lightning_peft.interop import adapter_config, base_tensors, card, folder, serving
from lightning_peft.interop.adapter import PeftAdapter
from lightning_peft.interop.converters import CONVERTERS, Converter
from lightning_peft.interop.converters.base import Exported, check_names
from lightning_peft.interop.converters.tokens import KEY, export_beside
from lightning_peft.interop.facts import Facts
from lightning_peft.interop.names import BASE_LAYER, PREFIX, PROMPT_PREFIX, Names, selection
from lightning_peft.interop.patterns import selects, their_pattern_of, value_of
from lightning_peft.interop.task_types import prompt_task_of, task_of
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.trainable_tokens import TrainableTokens


def to_peft(
    model: nn.Module,
    path: str | Path,
    names: Literal["memory", "disk"] = "memory",
    profile: str | None = None,
    facts: Facts | None = None,
) -> Path:
    """Write what is trained in ``model`` as an adapter that PEFT reads: configuration, tensors and a model card.

    Args:
        model: a tuned model, or a LightningModule with one tuned backbone.
        path: the folder to write; it must be new, empty, or an older adapter.
        names: 'memory': the module names of this version of transformers, which PEFT wants beside it; 'disk': those of
            the model's checkpoints, which are also the names of transformers 4. Most models have the same.
        profile: a server that must be able to read the adapter, 'vllm'; checked before anything is written.
        facts: what the model card says of data, metrics and command.

    Returns:
        The folder.

    Raises:
        TuningError: PEFT has no twin of what is trained, or would compute something else; nothing is written then.
    """
    path = Path(path)
    folder.check_free(path)
    serving.known(profile)
    backbone, methods = _tuned(model)
    adapter = adapter_of(backbone, methods, "disk" if profile else names)
    serving.check_profile(profile, adapter)
    facts = facts or Facts()
    facts = replace(facts, words=facts.words or _words(backbone, methods[0]))
    if known := facts.as_plain():
        adapter.header["training"] = known
    folder.write(path, adapter, card.text(adapter, methods, facts, path.name, profile))
    return path


def adapter_of(backbone: nn.Module, methods: Sequence[TuningMethod], naming: str = "memory") -> PeftAdapter:
    """Return what is trained in a backbone as an adapter.

    Args:
        backbone: the tuned model.
        methods: the one of its methods that has grafts, and what trains rows of the word table beside it.
        naming: 'memory' or 'disk'.

    Raises:
        TuningError: PEFT has no twin of it.
    """
    converter, names = _converter(methods[0]), Names(backbone)
    exported = converter.export(backbone, methods[0], names)
    check_names(backbone, exported.layers, f"this {type(methods[0]).__name__}")
    for words in methods[1:]:
        export_beside(exported, backbone, words, names)
    found = base_tensors.trained_outside(names, exported.layers)
    config = {"peft_type": converter.peft_type} | exported.config | _base(backbone)
    if found.biases:
        config["bias"] = _bias(converter, found.biases, exported)
    kept = base_tensors.saved_tensors(names, found, every_bias=config.get("bias") == "all")
    config |= _saved(converter, found.modules) | _task(names, found.modules, converter.is_prompt)
    if found.tied and "ensure_weight_tying" in converter.defaults:
        config["ensure_weight_tying"] = True
    lost = set(delta_names(backbone)) - exported.delta - kept.keys()
    if lost:
        raise TuningError(f"PEFT has no place for {min(lost)}, which is trained: exclude it, or keep the delta.")
    called = names.on_disk if naming == "disk" else {}
    tensors = _named(exported, kept, called, PROMPT_PREFIX if converter.is_prompt else PREFIX)
    if called:
        config |= _renamed(config, called, names, exported)
    header = {
        "fingerprint": fingerprint(backbone, skipped(names, kept)),
        "names": naming,
        "on_disk": {m: names.on_disk[m] for m in sorted({*exported.layers, *found.modules} & names.on_disk.keys())},
        "versions": folder.writer_versions(),
    }
    return PeftAdapter(adapter_config.full(config), _plain(tensors), header)


def _bias(converter: Converter, biases: set[str], exported: Exported) -> str:
    """Return PEFT's word for the biases that are trained.

    Raises:
        TuningError: it has none.
    """
    word = converter.config_of_bias(biases, exported.layers)
    if word is None:
        raise TuningError(
            f"{converter.peft_type} of PEFT has no place for trained biases such as {min(biases)}: "
            "exclude them, or tune with LoRA."
        )
    return word


def _saved(converter: Converter, modules: list[str]) -> dict[str, Any]:
    """Return the key that names the modules of the base that are saved whole.

    Raises:
        TuningError: some are, and the type has no such key.
    """
    if "modules_to_save" in adapter_config.DEFAULTS[converter.peft_type]:
        return {"modules_to_save": modules or None}
    if modules:
        raise TuningError(
            f"{converter.peft_type} of PEFT saves no whole modules such as {modules[0]}, which is trained: exclude it, "
            "or train the words beside a LoRA."
        )
    return {}


def _named(exported: Exported, kept: dict[str, Tensor], called: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter by the names that they have in its file."""
    tensors = dict(exported.bare)
    for module, parts in exported.layers.items():
        tensors |= {f"{prefix}{called.get(module, module)}.{part}": tensor for part, tensor in parts.items()}
    for name, tensor in kept.items():
        module, _, leaf = name.rpartition(".")
        wrapped = f".{BASE_LAYER}" if module in exported.layers else ""
        tensors[f"{prefix}{called.get(module, module)}{wrapped}.{leaf}"] = tensor
    return tensors


def skipped(names: Names, kept: dict[str, Tensor]) -> set[str]:
    """Return the tensors of a backbone that its fingerprint leaves out, when an adapter replaces ``kept``."""
    replaced = {id(tensor) for name, tensor in names.tensors.items() if name in kept}
    same = {name for name, tensor in names.tensors.items() if id(tensor) in replaced}
    return same | (names.model.state_dict().keys() - names.tensors.keys())


def _tuned(model: nn.Module) -> tuple[nn.Module, list[TuningMethod]]:
    """Return the tuned backbone and its one method that has grafts; beside a LoRA, also what trains words."""
    found = list(tunings(model))
    if len(found) != 1:
        raise TuningError(
            f"{type(model).__name__} has {len(found)} tuned backbones, and an adapter is of one: give the tuned model."
        )
    _, backbone, tuning = found[0]
    outside = [name for name in delta_names(model) if not name.startswith(found[0][0])]
    if outside:
        raise TuningError(f"{outside[0]} is trained outside of the backbone, where PEFT keeps nothing: give the model.")
    attached = {place.graft.owner for place in grafts(backbone)}
    methods = [method for name, method in tuning.methods.items() if name in attached]
    methods.sort(key=lambda method: isinstance(method, TrainableTokens))
    kinds = [type(method) for method in methods]
    if len(methods) > 1 and kinds != [LoRA, TrainableTokens]:
        both = " + ".join(type(method).__name__ for method in methods)
        raise TuningError(
            f"{both} are in one model, and an adapter of PEFT has one method, or LoRA with TrainableTokens: merge or "
            "remove the others."
        )
    if not methods:
        names = " + ".join(type(method).__name__ for method in tuning.methods.values())
        raise TuningError(
            f"{names} trains tensors of the model in place, which alone is no adapter of PEFT: keep the delta, write "
            "the tuned model whole by merge and save_pretrained, or train LoRA(bias='all'), which PEFT has."
        )
    return backbone, methods


def _words(backbone: nn.Module, method: Any) -> list[list[tuple[str, float]]]:
    """Return the words nearest to each row of a soft prompt, where the model's tokenizer is at hand."""
    if not hasattr(method, "nearest_words"):
        return []
    try:
        return method.nearest_words(backbone, 3)
    except TuningError:  # the card goes without
        return []


def _converter(method: TuningMethod) -> Converter:
    for converter in CONVERTERS.values():
        if type(method).__name__ in converter.methods:
            return converter
    known = ", ".join(name for converter in CONVERTERS.values() for name in converter.methods)
    raise TuningError(f"{type(method).__name__} has no twin in PEFT, which has {known}: keep the delta, or merge it.")


def _base(backbone: Any) -> dict[str, Any]:
    return {"base_model_name_or_path": structure.name_or_path(backbone) or None}


def _task(names: Names, modules: list[str], prompt: bool) -> dict[str, Any]:
    """Return the task, or where PEFT would then want more than is trained, the class that it finds the base by."""
    task = (prompt_task_of if prompt else task_of)(names.model)
    if task is not None and base_tensors.fits_task(names, task, modules):
        return {"task_type": task}
    if prompt:
        raise TuningError(
            f"PEFT trains the head of a {task} model with every prompt, and here it was left out: train it, too."
        )
    kind = type(names.model)
    return {"auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__}}


def _renamed(config: dict[str, Any], called: dict[str, str], names: Names, exported: Exported) -> dict[str, Any]:
    """Return what of the configuration names modules, by the names that the file uses.

    Raises:
        TuningError: it names a matrix, which has another name there.
    """
    if config.get("target_parameters"):
        raise TuningError(
            f"{config['target_parameters'][0]} is one matrix here and several in the checkpoints of the model: export "
            "with names='memory', or leave it out of target_modules."
        )
    every = [called.get(name, name) for name in names.modules]
    changed: dict[str, Any] = {}
    for key in ("target_modules", "feedforward_modules"):
        if config.get(key):
            full = [name for name in names.modules if selects(config[key], name)]
            changed[key] = selection([called.get(name, name) for name in full], every)
    if config.get(KEY):
        changed[KEY] = {called.get(name, name): ids for name, ids in config[KEY].items()}
    if config.get("modules_to_save"):
        changed["modules_to_save"] = [called.get(name, name) for name in config["modules_to_save"]]
    for key, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if config.get(key):
            values = {n: value_of(config[key], n, config[usual]) for n in exported.layers}
            changed[key] = their_pattern_of({called.get(n, n): v for n, v in values.items()}, config[usual])
    return changed


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}
