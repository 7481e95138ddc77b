"""Layers that compute their weight at each call: grafts beside it are exact, and what would be lost is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_peft import DiffPruning, LoRA, Method, MiSS, SHiRA, TuningError, merge
from lightning_peft.core.graft import grafts


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


def plain(layer: nn.Module) -> None:
    """Make the weight a parameter, as the refusals say."""
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    elif prune.is_pruned(layer):
        prune.remove(layer, "weight")
    else:
        nn.utils.remove_weight_norm(layer)


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm by a hook": nn.utils.weight_norm,
    "pruning": pruned,
}


@pytest.fixture(params=WAYS)
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    return nn.Sequential(WAYS[request.param](layer), nn.ReLU(), nn.Linear(5, 2)).eval()


def moved(model: nn.Module) -> None:
    for place in grafts(model):
        for parameter in place.graft.parameters():
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_an_update_beside_it_is_exact_and_not_merged(model: nn.Sequential) -> None:
    x = torch.randn(3, 6)
    LoRA(r=2, target_modules=["0"]).apply(model)
    moved(model)
    out = model(x)
    with pytest.raises(TuningError, match=r"0\.weight is no parameter, but a buffer or computed at each call"):
        merge(model)
    assert torch.equal(model(x), out)
    LoRA(r=2, target_modules=["0"]).remove(model)
    plain(model[0])
    LoRA(r=2, target_modules=["0"]).apply(model)
    moved(model)
    out = model(x)
    merge(model)
    torch.testing.assert_close(model(x), out)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_what_changes_the_weight_itself_is_refused(model: nn.Sequential) -> None:
    x = torch.randn(3, 6)
    with pytest.raises(TuningError, match="Entries would change nothing: make it one before a method is applied"):
        SHiRA(r=1, target_modules=["0"]).apply(model)
    assert not list(grafts(model))
    plain(model[0])
    before = model(x)
    SHiRA(r=1, target_modules=["0"]).apply(model)
    moved(model)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("way", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_diff_pruning_changes_what_it_is_computed_from(way: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(way(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2)).eval()
    x = torch.randn(3, 6)
    DiffPruning().apply(model)
    moved(model)
    out = model(x)
    merge(model)
    torch.testing.assert_close(model(x), out)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (LoRA(r=2, target_modules=["out_proj"]), r"0\.self_attn\.out_proj"),
        (MiSS(r=2, target_modules=["out_proj"]), "out_proj"),
    ],
)
def test_a_layer_that_is_read_without_a_call(method: Method, name: str) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), nn.Linear(8, 2)).eval()
    x, layer = torch.randn(2, 3, 8), model[0].self_attn.out_proj
    parametrizations.weight_norm(layer)
    with pytest.raises(TuningError, match=rf"{name}.* is no parameter"):
        method.apply(model)
    plain(layer)
    method.apply(model)
    moved(model)
    out = model(x)
    merge(model)
    torch.testing.assert_close(model(x), out)
