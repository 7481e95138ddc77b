"""Ladder side-tuning: a narrow transformer is trained that climbs beside the frozen one and reads each of its blocks.

``z_0 = D_0 h_0;  z_i = block_i(m_i D_i h_i + (1 - m_i) z_{i-1});  y = h_L + U LN(z_L)`` with h_i what block i of the
backbone gives, D_i [w, d] and U [d, w] trained, w = d / reduction, and gates ``m_i = sigmoid(g_i / T)``.

Source: Sung, Cho, Bansal 2022, arXiv 2206.06522. No gradient passes the backbone, which runs without a graph, so that
memory for activations is that of the narrow network; this is side-tuning's memory-saving form. The paper reads the
head's input from the side network alone, cut out of the backbone's weights; ours is random and is added to the
backbone's output with U zero at the start, so that training starts at the frozen model. The blocks are those of
``nn.TransformerEncoderLayer``, the norms first, causal where the backbone is; positions come with h_i.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.core import anatomy, compatibility, structure
from lightning_peft.core.arguments import natural, positive, rate
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.features.side import BesideFrozen, base_of, check_is_read, field_of, with_fields
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


class Rung(Graft):
    """Keeps a block's output, and the first one its input too, until the pass through the backbone is over.

    Args:
        seen: shared with the ladder: index of the block -> its output; -1 -> the input of the first block.
        index: of the block.
    """

    def __init__(self, seen: dict[int, Tensor], index: int) -> None:
        super().__init__()
        self.seen, self.index = seen, index

    def after(self, out: Any, host: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output as it is."""
        if self.index == 0:
            self.seen[-1] = x
        self.seen[self.index] = out if isinstance(out, Tensor) else out[0]
        return out


class Ladder(BesideFrozen):
    """Adds the output of a narrow transformer over the hidden states of its host to the last of them.

    Args:
        host: the frozen model.
        rungs: the blocks of the host that are read, by index.
        width: width d of the host.
        narrow: width w of the ladder.
        heads: number of its attention heads.
        inner: width of its feed-forward layers.
        dropout: rate of its dropout.
        temperature: T of the gates.
        causal: whether a token sees only those before it.
    """

    def __init__(
        self,
        host: nn.Module,
        rungs: list[int],
        width: int,
        narrow: int,
        heads: int,
        inner: int,
        dropout: float,
        temperature: float,
        causal: bool,
    ) -> None:
        super().__init__(host)
        self.rungs, self.temperature, self.causal = rungs, temperature, causal
        self.mask_name = "decoder_attention_mask" if structure.is_encoder_decoder(host) else "attention_mask"
        self.seen: dict[int, Tensor] = {}
        self.first: bool | None = None  # whether the host pools by its first token; None: not known
        place: dict[str, Any] = {"device": device_of(host), "dtype": torch.float32}
        self.downs = nn.ModuleList(nn.Linear(width, narrow, bias=False, **place) for _ in range(len(rungs) + 1))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                narrow, heads, inner, dropout, "gelu", batch_first=True, norm_first=True, **place
            )
            for _ in rungs
        )
        self.gates = nn.Parameter(torch.zeros(len(rungs), **place))
        self.norm = nn.LayerNorm(narrow, **place)
        self.up = nn.Linear(narrow, width, bias=False, **place)
        nn.init.zeros_(self.up.weight)

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the host with the ladder's; what the rungs have noted is forgotten then."""
        self.seen.clear()
        try:
            return super().around(forward, host, *args, **kwargs)
        finally:
            self.seen.clear()

    def beside(self, out: Any, host: nn.Module, given: dict[str, Any]) -> Any:
        """Return the host's output with the ladder added to its last hidden states."""
        states = dict(self.seen)
        if len(states) <= len(self.rungs):
            raise TuningError(
                f"{type(host).__name__} did not run the blocks that the ladder reads ({len(states)} outputs of "
                f"{len(self.rungs) + 1}): use SideTuning."
            )
        last = field_of(out, "last_hidden_state", host)
        shape = (*last.shape[:2], self.downs[0].in_features)
        if odd := [state for state in (*states.values(), last) if state.shape != shape]:
            raise TuningError(
                f"a block of {type(host).__name__} gives {list(odd[0].shape)}, the model {list(last.shape)}: a ladder "
                "needs one shape, so use SideTuning."
            )
        z = self.downs[0](states[-1].to(self.gates))
        mask, padding = self._masks(given, z)
        shares = (self.gates / self.temperature).sigmoid()
        for i, (rung, block) in enumerate(zip(self.rungs, self.blocks, strict=True)):
            mixed = shares[i] * self.downs[i + 1](states[rung].to(z)) + (1 - shares[i]) * z
            z = block(mixed, src_mask=mask, src_key_padding_mask=padding, is_causal=self.causal and padding is None)
        changes: dict[str, Any] = {"last_hidden_state": last + self.up(self.norm(z)).to(last)}
        if isinstance(out, Mapping) and out.get("pooler_output") is not None:
            changes["pooler_output"] = self._pooled(host, last, out["pooler_output"], changes["last_hidden_state"])
        return with_fields(out, changes)

    def _pooled(self, host: nn.Module, last: Tensor, before: Tensor, now: Tensor) -> Tensor:
        """Return what the host's pooler gives of its hidden states now; once it is seen that it reads these alone."""
        pooler = structure.part(host, "pooler")
        if self.first is None:
            with torch.no_grad():
                ways = [last[:, 0]] if pooler is None else [pooler(last), last[:, 0]]
            like = [torch.allclose(way, before, atol=1e-3, rtol=1e-3) for way in ways if way.shape == before.shape]
            if True not in like:
                raise TuningError(
                    f"{type(host).__name__} pools its hidden states in a way of its own, which the ladder cannot do "
                    "anew: use SideTuning."
                )
            self.first = pooler is None or not like[0]
        return now[:, 0] if self.first or pooler is None else pooler(now)

    def _masks(self, given: dict[str, Any], z: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the tokens that a token must not see, [T, T], and those that are padding, [B, T]."""
        length = z.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=z.device).triu(1) if self.causal else None
        attention = given.get(self.mask_name)
        if attention is None or attention.ndim != 2 or attention.shape[1] != length:  # that of samples of sound, say
            return mask, None
        return mask, attention == 0


@dataclass(eq=False, kw_only=True)
class LadderSideTuning(Method):
    """Train a narrow transformer that reads the blocks of the frozen one.

    Args:
        reduction: by how much it is narrower than the backbone.
        every: read every n-th block; the last one is always read.
        dropout: rate of its dropout.
        temperature: T of the gates; the paper has 0.1.
    """

    reduction: int = natural(8)
    every: int = natural(1)
    dropout: float = rate(0.0)
    temperature: float = positive(0.1)

    kind: ClassVar[str] = "side network"
    trains: ClassVar[str] = "a narrow transformer that reads the backbone's blocks"
    paper: ClassVar[str] = "Sung et al. 2022, arXiv 2206.06522"
    advised: ClassVar[Rates] = Rates(1e-2, 1e-2, MEASURED)
    needs: ClassVar[frozenset[str]] = frozenset({compatibility.FEATURES})
    breaks: ClassVar[frozenset[str]] = frozenset({compatibility.GRADIENTS, compatibility.FEATURES})
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"dropout"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the ladder to the base model."""
        base = base_of(backbone)
        config, lists = structure.config_of(base), list(anatomy.blocks(base).values())
        config = structure.setting(config, "text_config") or config
        width, heads = structure.setting(config, "hidden_size"), structure.setting(config, "num_attention_heads") or 1
        if not lists or not isinstance(width, int) or not isinstance(heads, int):
            raise TuningError(
                f"{type(base).__name__} is no single stack of transformer blocks of one width, which a ladder "
                "needs: use SideTuning."
            )
        blocks = [
            block for _, block in lists[-1]
        ]  # of a model of several stacks that of the decoder, or of the text, which gives the output
        count = len(blocks)
        if self.every > count:
            raise TuningError(f"every={self.every} is out of range: {type(base).__name__} has {count} blocks.")
        rungs = list(range(count - 1, -1, -self.every))[::-1]
        heads = max(1, heads // self.reduction)
        narrow = max(1, width // self.reduction // heads) * heads
        text = isinstance(structure.input_embeddings_of(base), nn.Embedding)
        causal = text and not structure.is_encoder(backbone) and base is not structure.encoder_of(backbone)
        ladder = Ladder(base, rungs, width, narrow, heads, 4 * narrow, self.dropout, self.temperature, causal)
        attach(base, ladder, self.key)
        for index in sorted({0, *rungs}):
            attach(blocks[index], Rung(ladder.seen, index), f"{self.key}_rung")
        path = next(name for name, module in backbone.named_modules() if module is ladder)
        check_is_read(backbone, base, f"{path}.up.weight")
        return ()


LadderSideTuningMixin = TunedBy[LadderSideTuning]
