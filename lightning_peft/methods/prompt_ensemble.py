"""A vote of several prompts of one task on one frozen model: each row is run once with each prompt, in one batch.

N prompts are trained apart (`PromptTuning` or `PTuning`, with other seeds); here they only answer. The majority
decides, and of equal counts the mean log-probability: ``argmax_c (votes_c + softmax(mean_n log p_n(c)) / 2)``, of
which the logarithm is returned as logits. The second form averages probabilities, ``log mean_n p_n(c)``.

Source: Lester et al. 2021, arXiv 2104.08691, section 6, which leaves ties open. Prompts of unequal length are padded
and masked, and positions count what is not masked.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core import structure, text_structure
from lightning_peft.core.arguments import choice
from lightning_peft.core.cache_argument import cache_in
from lightning_peft.core.delta_file import read_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.prompts.virtual_tokens import VirtualTokens, insert
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


class Ballot(Graft):
    """Runs its host, a whole model, with each prompt, and counts the votes.

    Args:
        lengths: of each prompt [tokens].
        vote: 'majority' or 'mean'.
        after: how many real tokens stand before the prompt.
        encoder_decoder: whether labels are what a decoder writes.
        positions: the first position of the model's table, where it takes ``position_ids``.
    """

    def __init__(self, lengths: list[int], vote: str, after: int, encoder_decoder: bool, positions: int | None) -> None:
        super().__init__()
        self.lengths, self.vote, self.in_front, self.positions = lengths, vote, after, positions
        self.encoder_decoder = encoder_decoder

    def around(self, forward: Callable[..., Any], host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the model with the logits that the prompts agree on.

        Raises:
            TuningError: it shall keep keys and values for later tokens, of which there would be one set a prompt.
        """
        names = structure.arguments_of(host)
        inputs = dict(zip(names, args, strict=False)) | kwargs
        if cache_in(inputs) is not None:
            raise TuningError("an ensemble votes on whole texts: call generate() with use_cache=False.")
        inputs.update({"use_cache": False} if "use_cache" in names else {})
        out = forward(**self._each(inputs))
        out.logits = self._count(self._text_only(out.logits, inputs["input_ids"]))
        return out

    def _each(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch once for each prompt, [N B, P + T]: all rows with prompt 0, all with prompt 1 ..."""
        prompts, longest = len(self.lengths), max(self.lengths)
        rows = inputs["input_ids"].shape[0]
        batch = {
            name: torch.cat([value] * prompts) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in inputs.items()
        }
        number = torch.arange(prompts, device=inputs["input_ids"].device).repeat_interleave(rows).unsqueeze(1)
        wide = insert(batch, longest, self.in_front, self.encoder_decoder, number * longest)
        ids, count = wide["input_ids"], torch.tensor(self.lengths, device=number.device)[number]
        place = (-1 - ids) % longest  # of a virtual token in its prompt, of which the last `count` are real
        unused = (ids < 0) & (place < longest - count)
        wide["attention_mask"] = wide["attention_mask"].masked_fill(unused, 0)
        if len(set(self.lengths)) > 1 and self.positions is not None:
            wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0) + self.positions
        return wide

    def _text_only(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Return logits [N B, ...] without those of virtual tokens."""
        longest = max(self.lengths)
        if logits.ndim < 3 or logits.shape[1] != ids.shape[1] + longest or self.encoder_decoder:
            return logits
        keep = insert({"input_ids": ids}, longest, self.in_front)["input_ids"] >= 0
        keep = keep.repeat(len(self.lengths), 1)
        return logits[keep].view(logits.shape[0], ids.shape[1], -1)

    def _count(self, logits: Tensor) -> Tensor:
        """Return what the prompts agree on, [B, ..., C], from what each says, [N B, ..., C]."""
        log_p = logits.float().log_softmax(-1).view(len(self.lengths), -1, *logits.shape[1:])
        if self.vote == "mean":
            return (log_p.exp().mean(0)).log().to(logits.dtype)
        votes = torch.zeros_like(log_p).scatter_(-1, log_p.argmax(-1, keepdim=True), 1.0).sum(0)
        tie = log_p.mean(0).softmax(-1)
        return ((votes + tie / 2) / (len(self.lengths) + 0.5)).log().to(logits.dtype)


@dataclass(eq=False, kw_only=True)
class PromptEnsemble(Method):
    """Let several trained prompts vote; nothing is trained.

    Args:
        prompts: the deltas of the prompts, all of this model.
        vote: 'majority', ties by the mean log-probability; or 'mean' of the probabilities.
    """

    prompts: list[str] = field(default_factory=list)
    vote: Literal["majority", "mean"] = choice("majority", "is no form of a vote")

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "nothing: trained prompts of one task vote"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach all prompts to the word table, and the vote to the model."""
        if not self.prompts:
            raise TuningError("an ensemble without prompts answers nothing: give prompts=, the deltas of one or more.")
        tables = structure.word_tables(backbone)
        table = next(iter(tables.values()))
        rows = [self._read(path, table.embedding_dim) for path in self.prompts]  # type: ignore[arg-type]
        lengths = [len(r) for r in rows]
        padded = torch.cat([torch.cat((torch.zeros(max(lengths) - len(r), r.shape[1]), r)) for r in rows])
        weight = nn.Parameter(padded.to(table.weight.device))  # type: ignore[arg-type]
        for host in tables.values():
            attach(host, VirtualTokens(weight), self.key)
        encoder_decoder = structure.is_encoder_decoder(backbone)
        positions = None
        if "position_ids" in structure.arguments_of(backbone):
            table_of = next(iter(text_structure.position_tables(backbone).values()), None)
            padding = table_of.padding_idx if table_of is not None else None
            positions = 0 if padding is None else padding + 1
        if len(set(lengths)) > 1 and positions is None and text_structure.position_tables(backbone):
            raise TuningError(
                f"{type(backbone).__name__} takes no position_ids, which prompts of lengths {sorted(set(lengths))} "
                "need: give prompts of one length."
            )
        after = 1 if structure.is_encoder(backbone) else 0
        attach(backbone, Ballot(lengths, self.vote, after, encoder_decoder, positions), self.key)
        return ()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to train.

        Raises:
            TuningError: always.
        """
        raise TuningError("an ensemble only answers: train each prompt by PromptTuning with a seed of its own.")

    def _read(self, path: str, width: int) -> Tensor:
        """Return the rows of a prompt from its delta, [P, d]."""
        tensors, _ = read_delta(Path(path))
        rows = [
            tensor for name, tensor in tensors.items() if name.endswith((".prompttuning.weight", ".ptuning.weight"))
        ]
        if len(rows) != 1:
            raise TuningError(
                f"{path} holds {len(rows)} prompts among {len(tensors)} tensors: give the delta of a PromptTuning, "
                "or of a PTuning after drop_network()."
            )
        if len(tensors) > 1:
            others = next(name for name in tensors if tensors[name] is not rows[0])
            raise TuningError(
                f"{path} trained {others} beside its prompt, and prompts of one model can share no such head: "
                "tune for a cloze or text-to-text task, whose head is the language model's."
            )
        if rows[0].shape[1] != width:
            raise TuningError(f"{path} has rows {rows[0].shape[1]} wide, the model's are {width} wide: take another.")
        return rows[0].float()


PromptEnsembleMixin = TunedBy[PromptEnsemble]
