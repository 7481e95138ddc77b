"""A vote of several prompts of one task on one frozen model: each row is run once with each prompt, in one batch.

N prompts are trained apart (`PromptTuning` or `PTuning`, with other seeds) and only answer here; or they are trained
together, ``num_prompts`` of one task in one batch, in which each row is asked by each prompt and the loss is the mean
of theirs. The majority decides, and of equal counts the mean log-probability: ``argmax_c (votes_c + softmax(mean_n log
p_n(c)) / 2)``, of which the logarithm is returned as logits. The second form averages probabilities, ``log mean_n
p_n(c)``.

Source: Lester et al. 2021, arXiv 2104.08691, section 6, which leaves ties open. Prompts of unequal length are padded
and masked, and positions count what is not masked.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lightning_peft.core import structure, text_structure
from lightning_peft.core.arguments import choice, natural
from lightning_peft.core.delta_file import read_delta
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import attach
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import Rates
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.prompts.ballot import Ballot, asked_by_all
from lightning_peft.prompts.virtual_tokens import VirtualTokens
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


@dataclass(eq=False, kw_only=True)
class PromptEnsemble(Method):
    """Let several prompts vote: trained ones, or some that are trained together here.

    Args:
        prompts: the deltas of trained prompts, all of this model; with a template, all of the same.
        num_prompts: how many prompts are trained together; None: those of ``prompts`` answer.
        num_virtual_tokens: length P of each of these [tokens].
        init: what these start from: 'sampled_vocab' rows of frequent words, or 'random_uniform' U(-0.5, 0.5).
        tokenizer: folder or hub id of the tokenizer; None: that of the backbone.
        vote: 'majority', ties by the mean log-probability; or 'mean' of the probabilities.
    """

    prompts: list[str] = field(default_factory=list)
    num_prompts: int | None = natural(None, "is no number of prompts")
    num_virtual_tokens: int = natural(20, "is no prompt")
    init: Literal["sampled_vocab", "random_uniform"] = choice("sampled_vocab", "is no initial value of a prompt")
    tokenizer: str | None = None
    vote: Literal["majority", "mean"] = choice("majority", "is no form of a vote")

    kind: ClassVar[str] = "prompt"
    trains: ClassVar[str] = "several prompts of one task, which vote"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"
    advised: ClassVar[Rates] = Rates(9e-2, 3e-2, "as for PromptTuning; not measured")

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach all prompts to the word table, and the vote to the model."""
        if bool(self.prompts) == (self.num_prompts is not None):
            raise TuningError(
                "an ensemble has its prompts from files or trains them, and without prompts answers nothing: give "
                "prompts=, the deltas of one or more, or num_prompts=."
            )
        tables = structure.word_tables(backbone)
        table = next(iter(tables.values()))
        rows = self._new(backbone, table) if self.num_prompts is not None else self._read_all(table.embedding_dim)  # type: ignore[arg-type]
        lengths = [len(r) for r in rows]
        padded = torch.cat([torch.cat((torch.zeros(max(lengths) - len(r), r.shape[1]), r.cpu())) for r in rows])
        weight = nn.Parameter(padded.to(device_of(table)))
        for host in tables.values():
            attach(host, VirtualTokens(weight), self.key)
        self._length, self._after = max(lengths), 1 if structure.is_encoder(backbone) else 0
        self._targets = structure.is_encoder_decoder(backbone)
        positions = _first_position(backbone, lengths)
        trained = self.num_prompts is not None
        ballot = Ballot(lengths, self.vote, self._after, self._targets, positions, self._anywhere, trained)
        attach(backbone, ballot, self.key)
        return ()

    def asked_by_all(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch in which each row is asked by each prompt that is trained, [N B, ...].

        In a Trainer that is what a training step gets; the loss of its rows is the mean of the prompts' losses.
        """
        count = self.num_prompts or 1
        return asked_by_all(batch, count, self._length, self._after, self._targets, anywhere=False)

    def prepare(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a training batch with each row asked by each prompt; others as they are, the model repeats them."""
        return self.asked_by_all(batch) if vars(self).get("in_step") else batch

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Replace the batch by one that has each row with each prompt."""
        applied = self.applied(pl_module)
        vars(applied)["in_step"] = True
        try:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        finally:
            del vars(applied)["in_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to train prompts of files.

        Raises:
            TuningError: there are such.
        """
        if self.num_prompts is None:
            raise TuningError(
                "an ensemble only answers: train each prompt by PromptTuning with a seed of its own, or some together "
                "by num_prompts= instead of prompts=."
            )
        super().on_fit_start(trainer, pl_module)

    def _new(self, backbone: nn.Module, table: nn.Module) -> list[Tensor]:
        """Return the initial rows of the prompts that are trained here."""
        self._anywhere = False
        start = PromptTuning(num_virtual_tokens=self.num_virtual_tokens, init=self.init, tokenizer=self.tokenizer)
        return [start.initial_rows(backbone, table) for _ in range(self.num_prompts or 0)]

    def _read_all(self, width: int) -> list[Tensor]:
        """Return the rows of the prompts of all files."""
        rows: list[Tensor] = []
        templates: dict[str | None, str] = {}
        for path in self.prompts:
            found, template = _read(path, width)
            rows += found
            templates.setdefault(template, path)
        if len(templates) > 1:
            (one, first), (two, second) = list(templates.items())[:2]
            raise TuningError(
                f"{first} stands at {one or 'the front'!r} and {second} at {two or 'the front'!r}, and one batch has "
                "one place for a prompt: give prompts of one template."
            )
        self._anywhere = next(iter(templates)) is not None
        return rows


PromptEnsembleMixin = TunedBy[PromptEnsemble]


_PROMPT = re.compile(r"\.(prompttuning|ptuning|promptensemble)(_[^.]+)?\.weight$")
"""The name of the rows of a prompt, with that of its method if it has one."""


def _read(path: str, width: int) -> tuple[list[Tensor], str | None]:
    """Return the rows of each prompt of a delta, [P, d], and the template that they stand in, None for the front."""
    tensors, meta = read_delta(Path(path))
    rows = [tensor for name, tensor in tensors.items() if _PROMPT.search(f".{name}")]
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
    arguments: dict[str, Any] = {}
    for entry in meta["methods"]:
        arguments |= {name: entry["init_args"].get(name) for name in ("num_prompts", "template")}
    return list(rows[0].float().chunk(arguments.get("num_prompts") or 1)), arguments.get("template")


def _first_position(backbone: nn.Module, lengths: list[int]) -> int | None:
    """Return the first position of a model that takes position_ids.

    Raises:
        TuningError: it takes none, and has a table of positions that prompts of unlike lengths shift.
    """
    table = next(iter(text_structure.position_tables(backbone).values()), None)
    if "position_ids" in structure.arguments_of(backbone):
        padding = table.padding_idx if table is not None else None
        return 0 if padding is None else padding + 1
    if len(set(lengths)) > 1 and table is not None:
        raise TuningError(
            f"{type(backbone).__name__} takes no position_ids, which prompts of lengths {sorted(set(lengths))} "
            "need: give prompts of one length."
        )
    return None
