"""TrainableTokens: rows of the word table are trained, and no more of it.

So a model learns a few new words, such as the marks of a chat template, beside any other method. Where the layer that
scores words is tied to the table, it scores these words by the same rows.

Source: as ``TrainableTokensConfig`` and ``trainable_token_indices`` of Hugging Face PEFT,
https://github.com/huggingface/peft/tree/main/src/peft/tuners/trainable_tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.core import structure
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.rates import Rates
from lightning_peft.training.method import Method
from lightning_peft.training.mixin import TunedBy


class TokenRows(Graft):
    """Gives some words other rows in the output of their table, its host.

    Args:
        rows: of the words, [n, d]; the grafts of tied tables share them.
        ids: of the words, ascending.
    """

    folds_ties = True
    ids: Tensor

    def __init__(self, rows: nn.Parameter, ids: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.register_buffer("ids", ids, persistent=False)

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the embeddings, [..., d]."""
        place = torch.searchsorted(self.ids, x.contiguous()).clamp(max=len(self.ids) - 1)
        rows = F.embedding(place, self.rows).to(out.dtype) * structure.row_scale_of(host)
        return torch.where((self.ids[place] == x).unsqueeze(-1), rows, out)

    def neutral(self, host: nn.Module, name: str) -> Tensor:
        """Return the rows of the table."""
        return host.get_parameter("weight").detach()[self.ids].to(self.rows.dtype)

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Write the rows into the table."""
        host.get_parameter("weight")[self.ids] = self.rows.to(host.get_parameter("weight").dtype)


class TokenScores(TokenRows):
    """Scores some words by other rows; the host is the layer that scores words, tied to their table."""

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return ``out + x (rows - W)ᵀ`` for these words, [..., vocabulary]."""
        change = (self.rows - self.neutral(host, "rows")).to(x.dtype)
        return out.index_add(-1, self.ids, F.linear(x, change).to(out.dtype))


@dataclass(eq=False, kw_only=True)
class TrainableTokens(Method):
    """Train the rows of some words in the word table.

    Args:
        tokens: the words, as tokens of the tokenizer or as their ids. New ones are added to the tokenizer before, and
            ``model.resize_token_embeddings(len(tokenizer))`` makes room for them.
        tokenizer: folder or hub id of the tokenizer that knows them; None: that of the backbone.
    """

    tokens: list[str | int] = field(default_factory=list)
    tokenizer: str | None = None

    kind: ClassVar[str] = "words"
    trains: ClassVar[str] = "rows of the word table"
    paper: ClassVar[str] = "as in Hugging Face PEFT"
    advised: ClassVar[Rates] = Rates(3e-3, 1e-2, "as for the prompt of P-Tuning; not measured")
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"tokenizer"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the rows to the word table, its tied twins, and the layer that is tied to it."""
        tables = structure.word_tables(backbone)
        table = next(iter(tables.values()))
        weight = table.get_parameter("weight")
        ids = self._ids(backbone, len(weight))
        self.tokens = list(ids)  # which a file has, so that nobody needs a tokenizer to load it
        numbers = torch.tensor(ids, device=weight.device)
        rows = nn.Parameter(weight.detach()[numbers].float())
        for each in tables.values():
            attach(each, TokenRows(rows, numbers), self.key)
        scores = structure.output_embeddings_of(backbone)
        if scores is not None and dict(scores.named_parameters()).get("weight") is weight:
            attach(scores, TokenScores(rows, numbers), self.key)
        return ()

    def _ids(self, backbone: nn.Module, size: int) -> list[int]:
        """Return the ids of the words, ascending."""
        if not self.tokens:
            raise TuningError("tokens=[] names no word to train: give tokens, or their ids.")
        ids = [token if isinstance(token, int) else self._id_of(backbone, token) for token in self.tokens]
        wrong = next((i for i in ids if not 0 <= i < size), None)
        if wrong is not None:
            raise TuningError(
                f"token {wrong} is not in the word table of {size} rows: call model.resize_token_embeddings first."
            )
        if len(set(ids)) < len(ids):
            raise TuningError(f"tokens={self.tokens} names a word twice: name each once.")
        return sorted(ids)

    def _id_of(self, backbone: nn.Module, token: str) -> int:
        tokenizer: Any = tokenizer_of(backbone, self.tokenizer, f"token {token!r}")
        known: dict[str, int] = tokenizer.get_vocab()
        if token not in known:
            raise TuningError(
                f"{token!r} is no token of the tokenizer: add it by tokenizer.add_tokens([{token!r}]), save the "
                "tokenizer, and name its folder by tokenizer=."
            )
        return known[token]


TrainableTokensMixin = TunedBy[TrainableTokens]
