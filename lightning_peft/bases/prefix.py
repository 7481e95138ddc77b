"""The base class of methods that train prefixes: which attentions get one, its initial values, and positions.

Where an attention sees a window of the text, all of the text sees the prefix, in training as in generate(): it is no
text that went before but a part of what is computed, and would else be lost where a text is longer than the window.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import attention, select, structure, text_structure
from lightning_peft.core.arguments import choice, natural, rate
from lightning_peft.core.attention_probe import Attention
from lightning_peft.core.delta_file import read_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.eval_mode import in_eval
from lightning_peft.core.graft import attach, detach, grafts
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.placement import device_of, has_values
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.core.reach import reached
from lightning_peft.prompts.prefix import Prefix, PrefixNetwork, ShiftedPositions, ShiftedTable, TextPositions
from lightning_peft.training.method import Method

NETWORK: Rates = Rates(3e-3, 3e-2, MEASURED)
"""The learning rates of a prefix that a network computes."""
BARE: Rates = Rates(9e-2, 3e-2, MEASURED)
"""The learning rates of a prefix that is trained itself."""


@dataclass(eq=False, kw_only=True)
class PrefixMethod(Method):
    """Base class of methods that train prefixes.

    Args:
        num_virtual_tokens: length P of the prefix [tokens].
        mid_dim: width of the network that the prefix is computed by in training; None trains the prefix itself, at
            thirty times the recommended rate.
        embedding_dim: width of the network's table; None: that of the model, as in the authors' code, where the paper
            (section 4.3) says that the table is smaller.
        sets: of an encoder-decoder, which attentions get a prefix: 'encoder', 'decoder', 'cross'; None: all.
        layers: blocks that get a prefix, negative ones counted from the end; None: all.
        positions: 'shifted' lets the text's positions start at P, as if the prefix stood before it; 'unshifted' at 0.
        init: 'random'; or 'text', the keys and values that the frozen model has for the words of ``text``.
        text: the words of init='text'; the prefix is as long as they are.
        tokenizer: folder or hub id of the tokenizer; None: that of the backbone.
        dropout: probability for each number of the prefix in training.
        init_from: a delta of this method whose prefix to start from, e.g. one that was trained on several tasks.
    """

    num_virtual_tokens: int = natural(20, "is no prefix")
    mid_dim: int | None = natural(None, "is no width of a network")
    embedding_dim: int | None = natural(None, "is no width of a table")
    sets: list[Literal["encoder", "decoder", "cross"]] | None = choice(None, "names no attentions")
    layers: list[int] | None = None
    positions: Literal["shifted", "unshifted"] = "shifted"
    init: Literal["random", "text"] = choice("random", "is no initial value of a prefix")
    text: str | None = None
    tokenizer: str | None = None
    dropout: float | None = rate(None)
    init_from: str | None = None

    kind: ClassVar[str] = "prefix"
    trains: ClassVar[str] = "keys and values before those of the text, in every attention"
    std: ClassVar[float] = 1.0
    """Standard deviation of a prefix that is trained itself."""
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"init", "text", "tokenizer", "dropout", "init_from"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach a prefix to each attention and let positions count from P."""
        words = self._words(backbone)
        if words is not None:
            self.num_virtual_tokens = len(words)
        count = self.num_virtual_tokens
        found = attention.join(backbone, self.key)
        kinds = {place.kind for place in found}
        if self.sets is not None and kinds == {"self"}:
            raise TuningError(
                f"sets={self.sets} names parts of an encoder-decoder, which {type(backbone).__name__} is not: "
                "leave it out."
            )
        chosen = [place for place in found if place.kind in (self.sets or kinds)]
        kept = set(reached(backbone, [place.path for place in chosen]))
        chosen = [place for place in chosen if place.path in kept]
        if self.layers is not None:
            kept = select.in_layers(backbone, [place.path for place in chosen], self.layers)
            chosen = [place for place in chosen if place.path in kept]
        network = self._network(backbone, chosen)
        states = None if words is None else _states(backbone, chosen, words)
        prefixes = {place.path: self._prefix(backbone, place, network) for place in chosen}
        for place in chosen:
            attach(place.module, prefixes[place.path].to(device_of(place.module)), self.key)
        shifted = self.positions == "shifted" and self._shift(backbone, found, prefixes)
        decoder = text_structure.text_decoder_of(backbone)
        if decoder is not None:
            rest = count if self.positions == "shifted" and not shifted else 0
            attach(decoder, TextPositions(decoder, rest), f"{self.key}_text")
        self._limit = text_structure.max_positions(backbone)
        if self._limit is not None and count >= self._limit:
            raise TuningError(
                f"num_virtual_tokens={count} leaves no room in the {self._limit} positions of "
                f"{type(backbone).__name__}: take fewer."
            )
        if states is not None:
            _start(prefixes, network, states)
        if self.init_from is not None:
            self._continue(backbone, self.init_from)
        return ()

    def advice(self) -> Rates:
        """Return the rates of a network, or those of numbers that are trained themselves."""
        return BARE if self.mid_dim is None else NETWORK

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch as it is.

        Raises:
            TuningError: with the prefix it is longer than the positions of the model.
        """
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if self.positions == "unshifted" or self._limit is None or not isinstance(tokens, Tensor):
            return batch
        if tokens.shape[1] + self.num_virtual_tokens > self._limit:
            raise TuningError(
                f"{tokens.shape[1]} tokens and a prefix of {self.num_virtual_tokens} do not fit the {self._limit} "
                f"positions of the model: set max_length to {self._limit - self.num_virtual_tokens}, or "
                "positions='unshifted'."
            )
        return batch

    def _assert_applied(self, module: L.LightningModule) -> None:
        super()._assert_applied(module)
        attention.check_joined(self._tuned(module))

    def drop_network(self, model: nn.Module) -> None:
        """Keep the prefix that the network gives and drop the network; what follows is a method with mid_dim=None.

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        applied = self.applied_to(model)
        for place in self.own_grafts(model, Prefix):
            if place.graft.network is not None:
                place.graft.drop_network()
        for network in self.own_grafts(model, PrefixNetwork):
            detach(network.host, network.name)
        self.mid_dim = applied.mid_dim = self.embedding_dim = applied.embedding_dim = None

    def _dropout(self, backbone: nn.Module) -> float:
        return self.dropout or 0.0

    def _words(self, backbone: nn.Module) -> list[int] | None:
        if self.init != "text" or not has_values(backbone):
            return None
        if not self.text:
            raise TuningError("init='text' needs the words of the prefix: give text=.")
        tokenizer = tokenizer_of(backbone, self.tokenizer, "init='text'")
        words: list[int] = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not words:
            raise TuningError(f"text={self.text!r} has no tokens: give the words of the prefix.")
        return words

    def _network(self, backbone: nn.Module, chosen: Sequence[Attention]) -> PrefixNetwork | None:
        if self.mid_dim is None:
            if self.embedding_dim is not None:
                raise TuningError(
                    f"embedding_dim={self.embedding_dim} is the width of a table that a network reads, and "
                    "mid_dim=None has no network: give mid_dim, or leave embedding_dim out."
                )
            return None
        kinds = dict.fromkeys(place.kind for place in chosen)
        width = self.embedding_dim or _width(backbone)
        network = PrefixNetwork(kinds, self.num_virtual_tokens, width, self.mid_dim)
        return attach(backbone, network.to(device_of(backbone)), self.key)

    def _prefix(self, backbone: nn.Module, place: Attention, network: PrefixNetwork | None) -> Prefix:
        """Return the prefix of one attention, with its initial values."""
        return Prefix(place, self.num_virtual_tokens, self.std, network, self._dropout(backbone))

    def _shift(self, backbone: nn.Module, found: Sequence[Attention], prefixes: Mapping[str, Prefix]) -> bool:
        """Let positions start at P; return whether something that computes from positions has been found."""
        stacks = {prefix.kind for prefix in prefixes.values()}
        tables = text_structure.position_tables(backbone)
        for path, table in tables.items():
            if "self" in stacks or ("decoder" if "decoder" in path.split(".") else "encoder") in stacks:
                attach(table, ShiftedTable(self.num_virtual_tokens), self.key)
        counting = [module for module in backbone.modules() if text_structure.counts_positions(module)]
        for module in counting:
            attach(module, ShiftedPositions(self.num_virtual_tokens), self.key)
        # The first layer of each of T5's stacks computes the position bias of all its layers.
        with_bias = [place for place in found if getattr(place.module, "has_relative_attention_bias", False)]
        biases = {place.kind: place.module for place in with_bias}
        for prefix in prefixes.values():
            prefix.refer(bias_table=biases.get(prefix.kind))
        return bool(tables or counting)

    def _continue(self, backbone: nn.Module, path: str) -> None:
        """Start from the prefix of a delta; its heads, which are those of other tasks, are left there."""
        tensors, _ = read_delta(Path(path))
        own = {n: p for place in grafts(backbone, self.key) for n, p in _named(place)}
        for name, parameter in own.items():
            tensor = next((t for key, t in tensors.items() if key == name or key.endswith(f".{name}")), None)
            if tensor is None or tensor.shape != parameter.shape:
                shape = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise TuningError(
                    f"init_from={path!r} has {shape} where {name} is {tuple(parameter.shape)}: "
                    f"it must be a delta of {type(self).__name__} with equal num_virtual_tokens, mid_dim and backbone."
                )
            parameter.data.copy_(tensor)


def _named(place: Any) -> list[tuple[str, nn.Parameter]]:
    return [(f"{place.full_name}.{n}", p) for n, p in place.graft.named_parameters()]


def _width(backbone: nn.Module) -> int:
    width = structure.width_of(backbone)
    if width is None:
        raise TuningError(f"{type(backbone).__name__} states no hidden_size: train the prefix itself by mid_dim=None.")
    return width


def _states(backbone: nn.Module, places: list[Attention], words: list[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the keys and values [H, P, d] that the frozen model has for words, by the path of the attention."""
    ids = torch.tensor([words], device=device_of(backbone))
    with in_eval(backbone), attention.recorded(places) as seen:
        backbone(input_ids=ids, **({"decoder_input_ids": ids} if structure.is_encoder_decoder(backbone) else {}))
    return {path: (key[0].float(), value[0].float()) for path, (key, value) in seen.items()}


def _start(
    prefixes: Mapping[str, Prefix],
    network: PrefixNetwork | None,
    states: Mapping[str, tuple[Tensor, Tensor]],
    steps: int = 500,
    lr: float = 1e-4,
) -> None:
    """Let the prefixes be the states of real words: as a copy, or by fitting the network without its table."""
    if network is None:
        for path, prefix in prefixes.items():
            prefix.keys.data.copy_(states[path][0])
            prefix.values.data.copy_(states[path][1])
        return
    tables = {id(trunk[0].weight) for trunk in network.trunks.values()}  # type: ignore[index]
    fitted = [p for module in (network, *prefixes.values()) for p in module.parameters() if id(p) not in tables]
    optimizer = torch.optim.Adam(fitted, lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            loss = torch.stack(
                [F.mse_loss(a, b) for path, p in prefixes.items() for a, b in zip(p.rows(), states[path], strict=True)]
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for module in (network, *prefixes.values()):
        module.zero_grad()
