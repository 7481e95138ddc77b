"""P-Tuning: virtual tokens anywhere in a template, their embeddings computed by an LSTM while they train.

``h_i = MLP([LSTM(h_0 .. h_i) : LSTM(h_m .. h_i)])``, where ``h`` [P, H] is a table of its own and H the width of the
word embeddings. The LSTM sees the virtual tokens as one sequence in the order of the template, without the text between
them, and runs once a step. After training `drop_network` keeps the rows that it gives, [P, H], and drops it; a
checkpoint of a run keeps it, so that training can go on.

Source: Liu et al. 2021, arXiv 2103.10385, section 3. The authors' code has two sizes: ``'lstm_half'`` (LAMA: a
bidirectional LSTM of H / 2, ``14 H² + 18 H + P H`` parameters) and ``'lstm'`` (few-shot SuperGLUE: of H,
``43 H² + 34 H + P H``); ``'mlp'`` is its form without the LSTM. For LAMA the language model is frozen, for SuperGLUE
it is tuned with a learning rate of its own: ``tune_backbone``.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.bases.prompt import PromptMethod, cut_to
from lightning_peft.core import structure
from lightning_peft.core.arguments import choice, positive, rate
from lightning_peft.core.errors import TuningError
from lightning_peft.core.graft import Graft, attach, detach
from lightning_peft.core.placement import device_of, has_values
from lightning_peft.core.rates import MEASURED, Rates
from lightning_peft.core.tracing import is_traced
from lightning_peft.prompting import Template
from lightning_peft.prompts.virtual_tokens import PromptRows, is_widened, word_rows
from lightning_peft.training.mixin import TunedBy


class LSTM(nn.Module):
    """A bidirectional LSTM of two layers over one sequence, with the parameters of ``nn.LSTM``.

    torch.compile knows neither ``nn.LSTM`` nor its kernel, so under a tracer each step is computed in plain operations.

    Args:
        width: of the input.
        hidden: of each direction.
        dropout: between the layers.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.dropout = hidden, dropout
        for name, parameter in nn.LSTM(width, hidden, num_layers=2, bidirectional=True).named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.data))
        self._names = [name for name, _ in self.named_parameters()]

    def forward(self, x: Tensor) -> Tensor:
        """Return the states of both directions, [P, width] to [P, 2 hidden]."""
        weights = [getattr(self, name) for name in self._names]
        if not is_traced():
            start = x.new_zeros(4, 1, self.hidden)
            # cuDNN goes back through an LSTM in training mode alone, and warns of weights that lie apart, as ours do.
            dropout, train = self.dropout if self.training else 0.0, self.training or torch.is_grad_enabled()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
                out = torch.lstm(x.unsqueeze(1), (start, start), weights, True, 2, dropout, train, True, False)
            return out[0].squeeze(1)
        both = torch.cat((_run(x, *weights[:4]), _run(x.flip(0), *weights[4:8]).flip(0)), 1)
        x = F.dropout(both, self.dropout, self.training)
        return torch.cat((_run(x, *weights[8:12]), _run(x.flip(0), *weights[12:]).flip(0)), 1)


def _run(x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor) -> Tensor:
    """Compute one direction of one layer, [P, width] to [P, hidden]."""
    state = cell = x.new_zeros(w_state.shape[1])
    states = []
    for row in F.linear(x, w_in, b_in + b_state):
        gate_in, forget, new, out = (row + w_state @ state).chunk(4)
        cell = forget.sigmoid() * cell + gate_in.sigmoid() * new.tanh()
        state = out.sigmoid() * cell.tanh()
        states.append(state)
    return torch.stack(states)


class PromptEncoder(Graft):
    """Computes the rows of virtual tokens from a table, [P, H].

    It is a graft of the backbone that takes part in no joint.

    Args:
        rows: what the table starts from, [P, H].
        encoder: 'lstm_half', 'lstm' or 'mlp'.
        dropout: of the LSTM, between its layers.
    """

    def __init__(self, rows: Tensor, encoder: str, dropout: float) -> None:
        super().__init__()
        width = rows.shape[1]
        self.table = nn.Parameter(rows)
        hidden = width // 2 if encoder == "lstm_half" else width
        self.lstm = LSTM(width, hidden, dropout) if encoder != "mlp" else None
        inner = 2 * hidden if encoder != "mlp" else width
        self.mlp = nn.Sequential(nn.Linear(inner, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, joint: str = "rows") -> Tensor:
        """Return the rows, [P, H]."""
        return self.mlp(self.table if self.lstm is None else self.lstm(self.table))


@dataclass(eq=False, kw_only=True)
class PTuning(PromptMethod):
    """Train virtual tokens through an LSTM that is dropped afterwards.

    Args:
        template: where the virtual tokens are, e.g. ``"{v:3} {sub} {v:3} {mask}"``, as the template of the data; its
            slots say how many there are. None: ``num_virtual_tokens`` at the front.
        encoder: 'lstm_half' as the authors' LAMA code, 'lstm' as their few-shot code, 'mlp' without the LSTM, 'none'
            for the rows alone, which is what remains after `drop_network`.
        dropout: between the layers of the LSTM.
        init: what the table starts from: 'random' N(0, 1); or 'text', the embeddings of ``text``.
        text: the words of init='text'.
        tune_backbone: train the whole language model beside the prompt.
        backbone_lr: its learning rate; None: that of the prompt.
        before_cls: put the prompt of an encoder before [CLS], as HF PEFT does; a virtual token is then pooled.
    """

    num_virtual_tokens: int = 20
    template: str | None = None
    encoder: Literal["lstm_half", "lstm", "mlp", "none"] = choice("lstm_half", "is no prompt encoder")
    dropout: float = rate(0.0)
    init: Literal["random", "text"] = choice("random", "is no initial value of a prompt")
    text: str | None = None
    tune_backbone: bool = False
    backbone_lr: float | None = positive(1e-5)
    before_cls: bool = False
    backbone_mode: Literal["train", "eval"] = "train"

    trains: ClassVar[str] = "virtual tokens anywhere in a template, through an LSTM"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2103.10385"
    advised: ClassVar[Rates] = Rates(
        3e-3, 1e-2, "measured on made-up text, docs/results.md", headed=Rates(1e-1, 1e-1, MEASURED)
    )
    may_change: ClassVar[frozenset[str]] = PromptMethod.may_change | {"init", "text", "dropout", "backbone_lr"}

    def __post_init__(self) -> None:
        if self.tune_backbone:  # a copy of a whole model is more than an undo is worth
            vars(self)["keeps_originals"] = False

    def graft(self, backbone: nn.Module) -> Iterable[str]:
        """Attach the virtual tokens and the encoder that computes them."""
        self._check(backbone)
        table = next(iter(structure.word_tables(backbone).values()))
        rows = self._initial_rows(backbone, table).to(device_of(table))
        source: nn.Parameter | PromptEncoder = nn.Parameter(rows)
        if self.encoder != "none":
            source = PromptEncoder(rows, self.encoder, self.dropout).to(rows.device)
            attach(backbone, source, self.key)
        self.place(backbone, source, anywhere=self.template is not None, before_cls=self.before_cls)
        if not self.tune_backbone:
            return ()
        return [name for name, _ in backbone.named_parameters() if f".{self.key}." not in f".{name}"]

    def optimizer_options(self, name: str) -> dict[str, Any]:
        """Give the language model its own learning rate."""
        of_prompt = f".{self.key}." in f".{name}"
        return {} if of_prompt or not self.tune_backbone or self.backbone_lr is None else {"lr": self.backbone_lr}

    def insert(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the batch with the virtual tokens at the front of every row.

        Raises:
            TuningError: a template was to put them elsewhere.
        """
        if self.template is not None:
            is_widened(batch)  # what is no batch of a text model is refused first
            raise TuningError(
                f"the template {self.template!r} puts virtual tokens into the text, and the batch has none: give the "
                "data module the same template, or take none here for a prompt at the front."
            )
        return super().insert(batch)

    def drop_network(self, model: nn.Module) -> None:
        """Keep the rows that the encoder gives and drop it; what follows is a method with encoder='none'.

        Raises:
            TuningError: the method is not applied to ``model``.
        """
        applied = self.applied_to(model)
        for encoder in self.own_grafts(model, PromptEncoder):
            weight = nn.Parameter(self.rows(model).detach().clone())
            for prompt in self.own_grafts(model, PromptRows):
                prompt.graft.keep(weight)
            detach(encoder.host, encoder.name)
        self.encoder = applied.encoder = "none"

    def _check(self, backbone: nn.Module) -> None:
        if self.template is not None and self.before_cls:
            raise TuningError(
                f"the template {self.template!r} says where the virtual tokens are, and so does before_cls=True: leave "
                "one of the two out."
            )
        if self.template is not None:
            self.num_virtual_tokens = Template(self.template).num_virtual_tokens
            if not self.num_virtual_tokens:
                raise TuningError(
                    f"the template {self.template!r} has no virtual tokens: write a slot such as {{v:3}}."
                )
        width = next(iter(structure.word_tables(backbone).values())).embedding_dim
        if self.encoder == "lstm_half" and width % 2:  # type: ignore[operator]
            raise TuningError(f"encoder='lstm_half' halves the embeddings, which are {width} wide: take 'lstm'.")

    def _initial_rows(self, backbone: nn.Module, table: nn.Module) -> Tensor:
        weight: Tensor = table.weight  # type: ignore[assignment]
        if self.init == "text" and has_values(table):
            return word_rows(table, cut_to(self.ids_of(backbone, self.text), self.num_virtual_tokens))
        return torch.randn(self.num_virtual_tokens, weight.shape[1])


class PTuningMixin(TunedBy[PTuning]):
    """For a LightningModule that is tuned by P-Tuning: set ``self.method`` to change its arguments."""

    def drop_network(self) -> None:
        """Keep the rows that the encoder gives and drop it."""
        method, module = self._owned()
        method.drop_network(module)

    def nearest_words(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return, for each virtual token, the k words of highest cosine, with it."""
        method, module = self._owned()
        return method.nearest_words(module, k)
