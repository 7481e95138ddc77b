"""Learning from preferences without a reward model: DPO, IPO and ORPO."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from transformers import AutoModelForCausalLM

from lightning_peft.core.errors import TuningError
from lightning_peft.core.labels import IGNORED
from lightning_peft.tasks.base import Split, Task
from lightning_peft.tasks.references import without_deltas

PreferenceLoss = Literal["dpo", "ipo", "orpo"]


class Preference(Task):
    """Make the chosen answer likelier than the rejected one.

    With l the log-likelihood of an answer, l' that of the reference, d = (l - l')_chosen - (l - l')_rejected:

    * dpo: ``-(1 - e) log s(beta d) - e log s(-beta d)``, s the sigmoid, e ``label_smoothing``;
    * ipo: ``(d - 1 / (2 beta))^2``, where l are means over the tokens of an answer;
    * orpo, without a reference: the mean cross-entropy of the prompt and the chosen answer, minus
      ``beta log s(log odds_chosen - log odds_rejected)``, where log odds are ``l - log(1 - e^l)``, l means over tokens.

    The reference is the backbone with its deltas muted, in the same step: there is no second model.

    Logs ``train_loss``, ``val_loss``, ``val_accuracy`` (how often the chosen answer has the higher reward,
    ``beta (l - l')``, of orpo ``beta l``) and ``val_margin`` (by how much, on average); the same for the test.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; label smoothing: Mitchell 2023; Azar et al. 2023, arXiv
    2310.12036, equation 17, with means over tokens as its authors use it; Hong et al. 2024, arXiv 2403.07691.

    Args:
        model: folder or hub id of the pretrained model, or ``package://NAME/FOLDER`` in an installed package.
        objective: dpo, ipo or orpo.
        beta: how much the reference holds, or what the odds weigh in orpo.
        label_smoothing: how many of the preferences are wrong, in dpo; from 0 to below 0.5.
        precompute_reference: compute the reference's likelihoods of an answer once, when it is first met, and keep
            them: from the second epoch on a step costs no pass of the reference.
        **kwargs: as in `Task`.
    """

    auto = AutoModelForCausalLM
    what = "causal language model"
    monitor = "val_accuracy"
    lean = True

    def __init__(
        self,
        model: str,
        objective: PreferenceLoss = "dpo",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        precompute_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if not 0 < beta < float("inf"):
            raise TuningError(f"beta={beta} is out of range: take a number above 0.")
        if not 0 <= label_smoothing < 0.5:
            raise TuningError(f"label_smoothing={label_smoothing} is out of range: take 0 to below 0.5.")
        if label_smoothing and objective != "dpo":
            raise TuningError(f"label_smoothing={label_smoothing} is for objective=dpo: leave it out of {objective}.")
        if precompute_reference and objective == "orpo":
            raise TuningError("precompute_reference=True is for a reference, which orpo has not: leave it out.")
        self.objective, self.beta, self.label_smoothing = objective, beta, label_smoothing
        self.precompute_reference = precompute_reference
        self._kept: dict[bytes, float] = {}
        self.backbone = self.load()
        self.score_by({"scores": PreferenceScores()})

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return what each pair costs and by how much the reward of the chosen answer is the higher one, [B] each."""
        batch = self.prepared(batch)
        logits = self.backbone(**self.inputs(batch), use_cache=False).logits
        likelihoods, counts = _likelihoods(logits, batch["labels"])
        if self.objective == "orpo":
            likelihoods = likelihoods / counts
            return self._orpo(logits, likelihoods, batch), self.beta * _difference(likelihoods).detach()
        ratios = likelihoods - self._reference(batch)
        margins = self.beta * _difference(ratios)
        if self.objective == "ipo":
            return (_difference(ratios / counts) - 1 / (2 * self.beta)).square(), margins.detach()
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(margins) - smooth * F.logsigmoid(-margins), margins.detach()

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean over the pairs."""
        costs, _ = self(batch)
        return costs.mean()

    def counted(self, batch: Mapping[str, Any]) -> Tensor:
        """Return how many pairs a batch has."""
        return batch["labels"].new_tensor(self.rows_in(batch))

    def rows_in(self, batch: Mapping[str, Any]) -> int:
        """Return how many pairs a batch has."""
        return len(batch["labels"]) // 2

    def score(self, batch: Mapping[str, Any], split: Split) -> None:
        """Add the pairs of a batch to the metrics."""
        for scores in self.metrics(split):
            scores.update(*self(batch))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Return ``margin``, by how much the reward of the chosen answer is the higher one, for each pair."""
        return {"margin": self(batch)[1].tolist()}

    def _reference(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the log-likelihoods of the answers without the deltas, [2 B]; virtual tokens are left out."""
        rows = [self.text_columns(batch[name], batch) for name in ("input_ids", "attention_mask", "labels")]
        if not self.precompute_reference:
            return self._computed_reference(*rows)
        keys = [_key(*row) for row in zip(*(values.cpu() for values in rows), strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._kept]
        if new:
            found = self._computed_reference(*(values[new] for values in rows)).tolist()
            self._kept.update(zip((keys[i] for i in new), found, strict=True))
        return torch.tensor([self._kept[key] for key in keys], device=rows[0].device)

    def _computed_reference(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        with without_deltas(self.backbone):
            logits = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return _likelihoods(logits, labels)[0]

    def _orpo(self, logits: Tensor, likelihoods: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the cost of each pair; the cross-entropy is one mean over the tokens of all of them."""
        half = len(logits) // 2
        seen = (batch["input_ids"] >= 0) & (batch["attention_mask"] == 1)
        targets = batch["input_ids"].masked_fill(~seen, IGNORED)[:half, 1:]
        sums, counts = _token_sums(logits[:half, :-1], targets)
        odds = likelihoods - torch.log1p(-likelihoods.clamp(max=-1e-6).exp())
        return sums.sum() / counts.sum() - self.beta * F.logsigmoid(_difference(odds))


class PreferenceScores(Metric):
    """Means over the pairs of all processes: the cost, how often the chosen answer wins, and by how much."""

    full_state_update = False
    higher_is_better = True
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4), "sum")

    def update(self, costs: Tensor, margins: Tensor) -> None:
        """Add costs and margins, [B] each."""
        columns = torch.stack([costs.float(), (margins > 0).float(), margins.float(), torch.ones_like(margins).float()])
        self.sums = self.sums + columns.sum(1).to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """Return the means."""
        return dict(zip(("loss", "accuracy", "margin"), self.sums[:3] / self.sums[3], strict=True))


def _key(ids: Tensor, mask: Tensor, labels: Tensor) -> bytes:
    """Return what tells one row [T] of a batch from others, whatever it is padded to."""
    inside = mask == 1
    return torch.stack([ids[inside], labels[inside]]).numpy().tobytes()


def _difference(values: Tensor) -> Tensor:
    """Return those of the chosen answers minus those of the rejected ones, [B] of [2 B]."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def _likelihoods(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-likelihoods of the tokens with labels [B, T], summed, and how many each row has, [B] each."""
    sums, counts = _token_sums(logits[:, :-1], labels[:, 1:])
    return -sums, counts


def _token_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies of targets [B, T] that are not -100, summed, and how many there are, [B] each."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).sum(1), (targets != IGNORED).sum(1)
