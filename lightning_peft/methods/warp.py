"""WARP: prompt tokens around a text with a [MASK], and a row for each class that scores what the mask says.

``P(y | x) = softmax_y(Θ_y · f(T_P(x)) + b_y)``, where ``T_P`` puts K virtual tokens into the input and ``f`` is what
the head of the language model has before its decoder, at the mask. The rows Θ [C, d] take the place of those of the
words of the classes in the decoder, so whatever reads the logits of the words (a verbalizer) reads the classes. They
start as the words' own rows: with prompts that are real tokens the model is at first a plain cloze.

Source: Hambardzumyan et al. 2021, arXiv 2101.00121, and the authors' ``arp/pretrained_mlm.py``. Prompts start from a
normal distribution with the one mean and deviation of all numbers of the word table (theirs with
``prompt_better_init``), as copies of [MASK], or as given words. The model is in eval mode, K d + C d + C parameters are
trained.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.prompt import PromptMethod, cut_to
from lightning_peft.core import arguments, placement, structure
from lightning_peft.core.arguments import choice
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach
from lightning_peft.core.hub import tokenizer_of
from lightning_peft.core.placement import device_of
from lightning_peft.core.rates import Rates
from lightning_peft.prompting import Template
from lightning_peft.prompts.virtual_tokens import word_rows
from lightning_peft.training.mixin import TunedBy


class ClassRows(Graft):
    """Scores the words of the classes by rows of their own.

    Args:
        weight: the rows, [C, d].
        bias: what is added, [C].
        ids: the words' tokens, [C].
    """

    def __init__(self, weight: Tensor, bias: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("ids", ids, persistent=False)
        self.ids: Tensor

    def after(self, out: Tensor, host: nn.Module, x: Tensor) -> Tensor:
        """Return the logits with those of the classes' words in the place of the words' own, [B, T, V]."""
        scores = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return out.index_copy(-1, self.ids, scores.to(out.dtype))


@dataclass(eq=False, kw_only=True)
class WARP(PromptMethod):
    """Train prompt tokens and a row for each class, for a masked language model.

    Args:
        num_virtual_tokens: number K of prompt tokens [tokens].
        words: the word of each class, one token each, as in the verbalizer of the data.
        template: where the prompt tokens are, as the template of the data; its slots say how many there are. None: at
            the front.
        init: of the prompt tokens: 'normal' with the mean and deviation of the word table's numbers, 'mask' copies of
            [MASK], 'text' the tokens of ``text``, repeated or cut to K.
        text: the words of init='text'.
    """

    words: list[str] = field(default_factory=list)
    template: str | None = None
    init: Literal["normal", "mask", "text"] = choice("normal", "is no initial value of a prompt")
    text: str | None = None

    trains: ClassVar[str] = "prompt tokens in the input and a row for each class"
    paper: ClassVar[str] = "Hambardzumyan et al. 2021, arXiv 2101.00121"
    advised: ClassVar[Rates] = Rates(3e-2, 1e-2, "measured on made-up text, docs/results.md")
    may_change: ClassVar[frozenset[str]] = PromptMethod.may_change | {"init", "text"}

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the prompt tokens and the rows of the classes."""
        if self.template is not None:
            self.num_virtual_tokens = Template(self.template).num_virtual_tokens
            arguments.check_arguments(self)
        decoder = structure.output_embeddings_of(backbone)
        if not isinstance(decoder, nn.Linear) or not structure.is_encoder(backbone):
            raise TuningError(
                f"{type(backbone).__name__} is no masked language model, whose decoder WARP scores the classes by: "
                "load it with its masked language modelling head."
            )
        placement.check_readable(decoder, "WARP")
        ids = self._word_ids(backbone)
        table = next(iter(structure.word_tables(backbone).values()))
        rows = self._initial_rows(backbone, table)
        self.place(backbone, nn.Parameter(rows.to(device_of(table))), anywhere=True)
        weight = decoder.weight.detach()[ids].float()
        bias = decoder.bias.detach()[ids].float() if decoder.bias is not None else weight.new_zeros(len(ids))
        attach(decoder, ClassRows(weight, bias, ids), self.key)
        return ()

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Ask for no weight decay, as in the authors' code."""
        return {"weight_decay": 0.0} if f".{self.key}." in f".{name}" else {}

    def _word_ids(self, backbone: nn.Module) -> Tensor:
        if len(self.words) < 2:
            raise TuningError(f"words={self.words} leaves no choice: give a word for each of two classes or more.")
        tokenizer = tokenizer_of(backbone, self.tokenizer, "the words of the classes")
        found: list[int] = []
        for word in self.words:
            # As the verbalizer does: BPE vocabularies know a word by the blank before it.
            choices = [tokenizer(f"{lead}{word}", add_special_tokens=False)["input_ids"] for lead in (" ", "")]
            ids = next((c for c in choices if len(c) == 1 and c[0] != tokenizer.unk_token_id), None)
            if ids is None:
                raise TuningError(f"the class word {word!r} is no single token of the model: take a shorter word.")
            found += ids
        if len(set(found)) < len(found):
            raise TuningError(f"words={self.words} gives two classes one token: take a word of its own for each class.")
        return torch.tensor(found, device=device_of(backbone))

    def _initial_rows(self, backbone: nn.Module, table: nn.Module) -> Tensor:
        weight: Tensor = table.weight  # type: ignore[assignment]
        count = self.num_virtual_tokens
        if self.init == "normal" or weight.is_meta:
            values = torch.zeros(1) if weight.is_meta else weight.detach().float()
            spread = values.std() if values.numel() > 1 else torch.ones(1)
            return values.mean().cpu() + spread.cpu() * torch.randn(count, weight.shape[1])
        if self.init == "text":
            return word_rows(table, cut_to(self.ids_of(backbone, self.text), count))
        tokenizer = tokenizer_of(backbone, self.tokenizer, "init='mask'")
        if tokenizer.mask_token_id is None:
            raise TuningError("init='mask' needs a mask token, which this tokenizer has not: take init='normal'.")
        return word_rows(table, [tokenizer.mask_token_id] * count)


class WARPMixin(TunedBy[WARP]):
    """For a LightningModule that is tuned by WARP: set ``self.method`` to change its arguments."""

    def nearest_words(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each prompt token, the k words of highest cosine, with it."""
        method, module = self._owned()
        return method.nearest_words(module, k)
