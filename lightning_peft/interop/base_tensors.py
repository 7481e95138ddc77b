"""Tensors of the base that are trained in place: ``modules_to_save``, biases, heads, tied tables."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.delta import delta_names
from lightning_peft.core.errors import TuningError
from lightning_peft.interop.names import Names

_ADDED_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task -> the ends of module names that PEFT adds to ``modules_to_save``, so that it wants their tensors."""
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
"""What PEFT saves no module of, since it cannot be called."""


@dataclass
class InPlace:
    """The modules and biases of the base that are trained, as PEFT stores them.

    Attributes:
        modules: what ``modules_to_save`` names, whole modules.
        biases: biases of modules that are not saved whole.
        tied: whether PEFT is to share a tensor between the modules again: it does so for linear layers alone.
    """

    modules: list[str]
    biases: set[str]
    tied: bool


def trained_outside(names: Names, grafted: Iterable[str]) -> InPlace:
    """Find the modules and biases that the tensors of the delta outside of grafts make up.

    Raises:
        TuningError: a module has a graft and trains another of its tensors than the bias, or is one that PEFT cannot
            save.
    """
    grafted = set(grafted)
    trained = {name for name in delta_names(names.model) if name in names.tensors}
    trained |= {n for n, t in names.tensors.items() if names.first[id(t)] in trained}  # the other names of tied ones
    modules: set[str] = set()
    biases: set[str] = set()
    for name in sorted(trained):
        owner, _, leaf = name.rpartition(".")
        whole = _outermost(names, owner, trained)
        if whole is not None and not any(g == whole or g.startswith(f"{whole}.") for g in grafted):
            modules.add(whole)
        elif leaf == "bias":
            biases.add(name)
        elif owner in grafted or not owner:
            raise TuningError(f"PEFT cannot store {name}, which is trained beside a graft or at the root: exclude it.")
        elif isinstance(names.model.get_submodule(owner), _CONTAINERS):
            kind = type(names.model.get_submodule(owner)).__name__
            raise TuningError(f"PEFT saves no {kind} alone, and {name}, which is trained, is in one: exclude it.")
        else:
            modules.add(owner)
    modules = {m for m in modules if not any(m.startswith(f"{other}.") for other in modules)}
    biases = {name for name in biases if not any(name.startswith(f"{module}.") for module in modules)}
    _check_ends(names, modules)
    return InPlace(sorted(modules), biases, _tied(names, modules))


def _check_ends(names: Names, modules: set[str]) -> None:
    """Check that PEFT finds these modules, and no others, by the ends of their names."""
    for module in modules:
        other = next((n for n in names.paths if n.endswith(module) and n not in modules), None)
        if other is not None:
            raise TuningError(
                f"PEFT finds the modules that are saved whole by the ends of their names, and {module}, which is "
                f"trained, would find {other}, too: train that one as well, or exclude both."
            )


def saved_tensors(names: Names, found: InPlace, every_bias: bool) -> dict[str, Tensor]:
    """Return the tensors that replace those of the base in the file, by their names in the model.

    ``every_bias`` adds the biases that are not trained, since PEFT's bias='all' means all.
    """
    return {
        name: tensor
        for name, tensor in names.tensors.items()
        if _inside(name, found.modules) or name in found.biases or (every_bias and name.endswith(".bias"))
    }


def fits_task(names: Names, task: str | None, modules: Iterable[str]) -> bool:
    """Tell whether all that PEFT adds to ``modules_to_save`` for this task is saved."""
    ends = _ADDED_BY_TASK.get(task or "", ())
    modules = list(modules)
    return all(_inside(name, modules) for name in names.modules if name.endswith(ends or ("\0",)))


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _outermost(names: Names, owner: str, trained: set[str]) -> str | None:
    """Return the largest module that PEFT can save around a tensor, of which everything is trained."""
    found = None
    while owner:
        inside = [n for n, t in names.tensors.items() if n.startswith(f"{owner}.") and isinstance(t, nn.Parameter)]
        if not trained.issuperset(inside):
            break
        if not isinstance(names.model.get_submodule(owner), _CONTAINERS):
            found = owner
        owner = owner.rpartition(".")[0]
    return found


def _tied(names: Names, modules: set[str]) -> bool:
    """Tell whether what is shared is a word table, and linear layers without biases are all that is tied to it."""
    holders: dict[int, list[nn.Module]] = {}
    for name, tensor in names.tensors.items():
        if _inside(name, modules):
            holders.setdefault(id(tensor), []).append(names.model.get_submodule(name.rpartition(".")[0]))
    saved = {id(names.model.get_submodule(module)) for module in modules}
    tied = [own for own in holders.values() if len(own) > 1]
    table = structure.input_embeddings_of(names.model)
    return bool(tied) and all(
        id(module) in saved and (module is table or (type(module) is nn.Linear and module.bias is None))
        for own in tied
        for module in own
    )
