"""Cached features: what training on them gives, when they are used, and what they refuse."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_peft import LinearProbe, LoRA, MLPHead, PartialK, TuningError, collect
from lightning_peft.core.graft import grafts
from lightning_peft.features.cached_rows import identify
from lightning_peft.features.frozen_part import FrozenPart
from tests.contract import assert_near, moments
from tests.models import batch, tiny
from tests.modules import Tuned, loader, trainer

METHODS = [
    LinearProbe(),
    LinearProbe(batch_norm=True),
    MLPHead(dropout=0.0),
    PartialK(k=1),
    PartialK(k=0.5),
    PartialK(k=0),
]
IDS = ["probe", "probe with norm", "mlp", "partial-1", "partial-half", "partial-0"]


class Rows(Dataset):
    """Rows of one kind; with noise they differ at every visit."""

    def __init__(self, kind: str, count: int = 12, noise: float = 0.0) -> None:
        self.columns, self.count, self.noise = batch(kind, size=count, seed=1), count, noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        row = {name: column[i] for name, column in self.columns.items()}
        if self.noise:
            row["pixel_values"] = row["pixel_values"] + self.noise * torch.randn(())
        return row


class Momentum(Tuned):
    """Trains by steps that are as large as the gradient; Adam's make much of a rounding where that is near zero."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def calls(module: nn.Module) -> list[int]:
    """Count the calls of the first linear layer of the backbone."""
    seen: list[int] = []
    first = next(m for m in module.modules() if isinstance(m, nn.Linear))
    first.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    return seen


def fit(folder: Path, method: Any, kind: str, epochs: int = 3, **options: Any) -> tuple[Tuned, L.Trainer, list[int]]:
    torch.manual_seed(0)
    module = Momentum(kind)
    seen = calls(module)
    run = trainer(folder, copy.deepcopy(method), max_epochs=epochs)
    shuffle = options.pop("shuffle", False)
    run.fit(module, loader(kind, shuffle=shuffle, **options), loader(kind))
    return module, run, seen


def cached(method: Any) -> Any:
    again = copy.deepcopy(method)
    again.cache_features = True
    return again


@pytest.mark.parametrize("kind", ["bert", "distilbert", "vit"])
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_training_on_the_cache_is_training_without_it(method: Any, kind: str, tmp_path: Path) -> None:
    """But for rounding, and the frozen part runs once for each row, of validation too."""
    if isinstance(method, PartialK) and kind == "distilbert" and method.k == 0.5:
        method = PartialK(k=1.5)
    plain, run, _ = fit(tmp_path, method, kind)
    fast, other, seen = fit(tmp_path, cached(method), kind)
    # Tensors move by 0.08 and more. A norm over four rows, of which ReLU leaves one, makes much of a rounding.
    assert_near(collect(plain), collect(fast), 1e-4)
    for mine, theirs in zip(moments(run).values(), moments(other).values(), strict=True):
        assert_near(mine, theirs, 1e-4)
    assert_near(run.callback_metrics, other.callback_metrics, 1e-4)
    assert run.callback_metrics["val_loss"].isfinite()
    if not (isinstance(method, PartialK) and method.k == 1.5):
        # Validation has the rows of training. What a head reads is known only after a pass with gradients.
        sanity = 0 if isinstance(method, PartialK) and method.k else 8
        assert sum(seen) == sanity + 12


@pytest.mark.parametrize("method", [LinearProbe(), PartialK()], ids=["probe", "partial"])
def test_shuffling_and_other_batches_find_the_same_rows(method: Any, tmp_path: Path) -> None:
    plain, _, _ = fit(tmp_path, method, "vit", shuffle=True)
    fast, _, seen = fit(tmp_path, cached(method), "vit", shuffle=True)
    assert_near(collect(plain), collect(fast), 1e-5)
    assert sum(seen) <= 8 + 12
    again, _, seen = fit(tmp_path, cached(method), "vit", size=5)
    assert sum(seen) <= 8 + 12
    assert collect(again).keys() == collect(plain).keys()


def test_a_head_costs_no_backbone_and_no_graph() -> None:
    model = tiny("vit")
    LinearProbe(cache_features=True).apply(model)
    seen = calls(model)
    for _ in range(3):
        model(**batch("vit")).loss.backward()
    assert len(seen) == 1
    out = model.vit(batch("vit")["pixel_values"]).last_hidden_state
    assert not out.requires_grad
    assert out.untyped_storage().nbytes() == 4, "a stub takes no memory"


def test_a_backbone_without_a_head_gives_its_whole_output() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.head = tiny("bert").bert, nn.Linear(32, 2)

        def forward(self, **inputs: Tensor) -> Tensor:
            out = self.bert(**inputs)
            return self.head(out.last_hidden_state.mean(1) + out.pooler_output)

    torch.manual_seed(0)
    model = Own()
    inputs = {name: value for name, value in batch("bert").items() if name != "labels"}
    expected = model(**inputs)
    LinearProbe(cache_features=True).apply(model)
    seen = calls(model)
    assert_near({"": expected}, {"": model(**inputs)}, 1e-6)
    swapped = {name: value.flip(0) for name, value in inputs.items()}
    assert_near({"": expected.flip(0)}, {"": model(**swapped)}, 1e-6)
    assert len(seen) == 1


def test_more_padding_is_the_same_row_if_its_features_are() -> None:
    model = tiny("bert")
    LinearProbe(cache_features=True).apply(model)
    seen = calls(model)
    inputs = batch("bert")
    wide = {n: v if n == "labels" else torch.nn.functional.pad(v, (0, 3)) for n, v in inputs.items()}
    first = model(**inputs).logits
    for _ in range(3):
        again = model(**wide).logits
        assert torch.allclose(first, again, atol=1e-5)
    assert len(seen) == 2, "once to compare, then no more"
    assert torch.equal(first, again)


def test_features_that_hang_on_padding_are_refused() -> None:
    class Mean(hf.BertForSequenceClassification):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.classifier(hidden.mean(1))

    model = Mean(tiny("bert").config).eval()
    LinearProbe(cache_features=True).apply(model)
    inputs = batch("bert")
    model(**inputs)
    with pytest.raises(TuningError, match="depend on the padding beside it"):
        model(**{n: v if n == "labels" else torch.nn.functional.pad(v, (0, 3)) for n, v in inputs.items()})


def test_augmentation_is_refused(tmp_path: Path) -> None:
    module = Tuned("vit")
    run = trainer(tmp_path, LinearProbe(cache_features=True), max_epochs=2)
    with pytest.raises(TuningError, match=r"the 12 rows of the training data.*augmentation"):
        run.fit(module, DataLoader(Rows("vit", noise=0.1), 4), loader("vit"))


def test_augmentation_of_rows_without_a_number_is_refused(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __init__(self, noise: float) -> None:
            self.rows = Rows("vit", noise=noise)

        def __iter__(self) -> Any:
            return (self.rows[i] for i in range(12))

    for noise in (0.0, 0.1):
        run = trainer(tmp_path, LinearProbe(cache_features=True), max_epochs=2)
        if noise:
            with pytest.raises(TuningError, match=r"those of the first epoch"):
                run.fit(Tuned("vit"), DataLoader(Stream(noise), 4), loader("vit"))
        else:
            run.fit(Tuned("vit"), DataLoader(Stream(noise), 4), loader("vit"))


def test_a_last_batch_that_is_dropped_is_no_augmentation(tmp_path: Path) -> None:
    run = trainer(tmp_path, LinearProbe(cache_features=True), max_epochs=5)
    run.fit(Tuned("vit"), DataLoader(Rows("vit", count=14), 4, shuffle=True, drop_last=True), loader("vit"))


def test_memory_has_a_limit() -> None:
    model = tiny("vit")
    LinearProbe(cache_features=True, cache_limit=4 * 32 * 4 / 2**30).apply(model)
    model(**batch("vit"))
    with pytest.raises(TuningError, match=r"more than .* GiB after 8 rows: raise cache_limit"):
        model(**batch("vit", seed=1))


def test_a_frozen_part_in_training_mode_is_refused() -> None:
    model = tiny("vit", dropout=0.1)
    LinearProbe(cache_features=True).apply(model)
    with pytest.raises(TuningError, match="needs the frozen part in eval mode"):
        model.train()(**batch("vit"))


@pytest.mark.parametrize("method", [LinearProbe(cache_features=True), PartialK(cache_features=True)])
def test_something_trained_below_is_refused(method: Any) -> None:
    model = tiny("vit")
    method.apply(model)
    LoRA(r=2).apply(model)
    with pytest.raises(TuningError, match=r"trained below the features|so they change"):
        model(**batch("vit"))


def test_hidden_states_are_not_kept() -> None:
    model = tiny("vit")
    LinearProbe(cache_features=True).apply(model)
    with pytest.raises(TuningError, match="keeps no output_hidden_states"):
        model(**batch("vit"), output_hidden_states=True)


def test_blocks_that_hand_on_more_are_refused() -> None:
    model = tiny("t5")
    PartialK(cache_features=True).apply(model)
    with pytest.raises(TuningError, match="hands on more than hidden states"):
        model(**batch("t5"))


def test_features_that_nobody_reads_at_the_head_are_refused() -> None:
    model = tiny("vit")
    LinearProbe(cache_features=True).apply(model)
    pixels = batch("vit")["pixel_values"]
    model.vit(pixels)
    with pytest.raises(TuningError, match="nothing has read the features"):
        model.vit(pixels)


def test_two_heads_on_one_backbone_are_both_fed() -> None:
    torch.manual_seed(0)
    config = hf.DeiTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64
    )
    model = hf.DeiTForImageClassificationWithTeacher(config).eval()
    pixels = batch("vit")["pixel_values"]
    expected = model(pixels).logits
    LinearProbe(cache_features=True).apply(model)
    seen = calls(model)
    for _ in range(3):
        assert_near({"": expected}, {"": model(pixels).logits}, 1e-6)
    assert len(seen) == 1


def test_copies_start_without_rows() -> None:
    model = tiny("vit")
    LinearProbe(cache_features=True).apply(model)
    model(**batch("vit"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        rows = {id(place.graft.rows): place.graft.rows for place in grafts(other)}
        assert len(rows) == 1, "all grafts of a copy share one cache"
        assert not next(iter(rows.values())).kept
        assert_near({"": other(**batch("vit")).logits}, {"": model(**batch("vit")).logits}, 1e-6)


def test_removing_takes_the_cache_away() -> None:
    model = tiny("vit")
    method = PartialK(cache_features=True)
    method.apply(model)
    assert any(isinstance(place.graft, FrozenPart) for place in grafts(model))
    method.remove(model)
    assert not list(grafts(model))


def test_a_row_is_known_by_all_of_its_inputs() -> None:
    inputs = {name: value for name, value in batch("bert").items() if name != "labels"}
    keys, _ = identify(inputs)
    assert len({digest for digest, _ in keys}) == 4
    changed = {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}
    changed["token_type_ids"][0, 1] = 1
    assert identify(changed)[0][0] != keys[0]
    padded = {
        name: torch.nn.functional.pad(value, (0, 2), value=7 * (name == "input_ids")) for name, value in inputs.items()
    }
    assert [d for d, _ in identify(padded)[0]] == [d for d, _ in keys], "what padding holds does not matter"
    left = {name: torch.nn.functional.pad(value, (2, 0)) for name, value in inputs.items()}
    assert not {d for d, _ in identify(left)[0]} & {d for d, _ in keys}, "padding on the left moves positions"
    half = {"pixel_values": torch.zeros(2, 3, dtype=torch.bfloat16)}
    assert identify(half)[0][0] == identify(half)[0][1]
    with pytest.raises(TuningError, match="given no tensor"):
        identify({"flag": True})
