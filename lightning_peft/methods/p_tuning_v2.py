"""P-Tuning v2: prefixes of every attention, trained with a task head, without a verbalizer.

The keys and values are those of Prefix-Tuning; here they are trained themselves unless ``mid_dim`` asks for the network
(the authors' ``prefix_projection``, of width 512), they start from N(0, 0.02), the network as transformers starts what
a saved model lacks: weights from N(0, initializer_range), biases from 0. Their dropout is the model's, and the model is
in training mode. What is pooled stays [CLS], token labels and answer spans keep their places: the prefix is
in no output. The pooler is frozen, the head is trained.

Source: Liu et al. 2022, arXiv 2110.07602, and the authors' ``model/prefix_encoder.py``. One prompt for several tasks,
adapted to one afterwards, is in the paper and not in their code: train it under a multi-task module and give the delta
as ``init_from``; its heads stay behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lightning_peft.bases.prefix import BARE, PrefixMethod
from lightning_peft.core import structure
from lightning_peft.core.attention_probe import Attention
from lightning_peft.core.rates import Rates
from lightning_peft.prompts.prefix import Prefix, PrefixNetwork
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class PTuningV2(PrefixMethod):
    """Train P keys and values before those of the text in every attention, and the task head.

    Args:
        dropout: probability for each number of the prefix in training; None: the model's hidden_dropout_prob.
    """

    backbone_mode: Literal["train", "eval"] = "train"

    trains: ClassVar[str] = "keys and values before those of the text, without a network, and the task head"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2110.07602"
    advised: ClassVar[Rates] = BARE
    std: ClassVar[float] = 0.02

    def _network(self, backbone: nn.Module, chosen: Sequence[Attention]) -> PrefixNetwork | None:
        network = super()._network(backbone, chosen)
        if network is not None:
            start_as_new(network, structure.initializer_range(backbone))
        return network

    def _prefix(self, backbone: nn.Module, place: Attention, network: PrefixNetwork | None) -> Prefix:
        prefix = super()._prefix(backbone, place, network)
        if network is not None:
            start_as_new(prefix, structure.initializer_range(backbone))
        return prefix

    def _dropout(self, backbone: nn.Module) -> float:
        if self.dropout is not None:
            return self.dropout
        names = ("hidden_dropout_prob", "dropout", "resid_pdrop", "dropout_rate")
        return float(structure.setting(structure.config_of(backbone), *names) or 0.0)


def start_as_new(module: nn.Module, std: float) -> None:
    """Draw linear layers and tables from N(0, std), biases 0, as transformers does with what a saved model lacks."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)


class PTuningV2Mixin(TunedBy[PTuningV2]):
    """For a LightningModule that is tuned by P-Tuning v2: set ``self.method`` to change its arguments."""

    def drop_network(self) -> None:
        """Keep the prefix that the network gives and drop the network."""
        method, module = self._owned()
        method.drop_network(module)
