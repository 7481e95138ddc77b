"""BitFit: only the biases of the backbone are trained.

Source: Ben Zaken et al. 2022, arXiv 2106.10199. The authors' code (``glue_evaluator.py``) picks parameters whose name
contains "bias"; we match the last part of the name, since T5 has a ``relative_attention_bias.weight``. LayerNorm
weights are not trained. The subset that the paper finds nearly as good is the biases of the query and of the first
feed-forward projection. Weight decay on biases should be 0.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lightning_peft import select
from lightning_peft.errors import TuningError
from lightning_peft.method import Method
from lightning_peft.mixin import MethodMixin


@dataclass(eq=False, kw_only=True)
class BitFit(Method):
    """Train the biases: ``h = W x + b`` with W frozen.

    Args:
        biases: 'all', 'query+intermediate' (the paper's subset), or a list of suffixes of module names.
        backbone_mode: whether dropout of the frozen backbone is active in training.
    """

    biases: Literal["all", "query+intermediate"] | list[str] = "all"
    backbone_mode: Literal["train", "eval"] = "train"

    kind: ClassVar[str] = "biases"
    trains: ClassVar[str] = "the biases of the backbone"
    paper: ClassVar[str] = "Ben Zaken et al. 2022, arXiv 2106.10199"

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Return the names of the biases to train; nothing is added."""
        every = [name for name, _ in backbone.named_parameters() if name.rpartition(".")[2] == "bias"]
        head = set(select.head_names(backbone))
        modules = {name.rpartition(".")[0]: name for name in every if name not in head}
        if not modules:
            raise TuningError(
                f"{type(backbone).__name__} has no biases (T5 and Llama have none), so BitFit has nothing to train: "
                "use LoRA or IA3, say."
            )
        if self.biases == "all":
            return modules.values()
        if self.biases == "query+intermediate":
            return [modules[name] for name in self._query_and_intermediate(backbone, modules)]
        chosen: list[str] = []
        for pattern, names in select.match(modules, self.biases).items():
            if not names:
                near = select.near(pattern, modules)
                raise TuningError(f"{pattern!r} matches no module with a bias in {type(backbone).__name__}{near}.")
            chosen.extend(modules[name] for name in names)
        return chosen

    def _query_and_intermediate(self, backbone: nn.Module, modules: dict[str, str]) -> list[str]:
        found: list[str] = []
        for role in ("query", "intermediate"):
            names = [name for name in modules if re.fullmatch(rf"(?:.*\.)?(?:{select.ROLES[role]})", name)]
            if not names:
                raise TuningError(
                    f"{type(backbone).__name__} has no {role} projection with a bias of its own (a fused one cannot be "
                    "tuned in part): use biases='all' or a list of suffixes."
                )
            found.extend(names)
        return found


class BitFitMixin(MethodMixin):
    """For a LightningModule that is tuned by BitFit: set ``self.method = BitFit(...)`` to change arguments."""

    default_method = BitFit
