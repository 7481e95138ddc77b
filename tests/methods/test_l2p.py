"""L2P: two passes written out by hand, the choice of prompts, the pull, cached queries, tasks."""

import copy
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft import L2P, TuningError, collect
from lightning_peft.towers.prompt_pool import PromptPool
from lightning_peft.towers.vision import tower
from tests.contract import MethodContract, assert_near, gradients, output, shake
from tests.models import HEADS, HIDDEN, batch, meta, tiny
from tests.modules import Tuned, loader, trainer

M, LENGTH, N = 6, 2, 3
SIZES = {"pool_size": M, "prompt_length": LENGTH, "top_n": N}


class TestL2P(MethodContract):
    method = L2P(**SIZES)
    backbones = ("vit", "dinov2_registers")
    compiled = ("vit",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """M prompts of L_p tokens, and M keys."""
        return M * (LENGTH + 1) * HIDDEN


class TestL2PAfterCls(MethodContract):
    method = L2P(**SIZES, layout="after_cls", diversify=True)
    backbones = ("deit", "clip_image")
    compiled = ("deit",)
    identity_at_start = False

    def count(self, kind: str) -> int:
        """The same."""
        return M * (LENGTH + 1) * HIDDEN


def applied(kind: str = "vit", **arguments: object) -> tuple[nn.Module, L2P, PromptPool]:
    model, method = tiny(kind), L2P(**SIZES | arguments)
    method.apply(model)
    return model, method, method.pool(model)


def by_hand(model: nn.Module, pool: PromptPool, pixels: Tensor, after_cls: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, chosen prompts and pull, from a plain model."""
    vit = model.vit

    def run(x: Tensor) -> Tensor:
        for layer in vit.layers:
            x = layer(x, None)
        return vit.layernorm(x)

    with torch.no_grad():
        embedded = vit.embeddings(pixels)
        query = run(embedded)[:, 0]
    cosine = F.cosine_similarity(query[:, None], pool.keys[None], dim=-1)
    chosen = cosine.argsort(dim=1, descending=True, stable=True)[:, :N]
    rows = pool.prompts[chosen].reshape(len(pixels), N * LENGTH, -1)
    n = 1 if after_cls else 0
    if after_cls:
        rows = rows + vit.embeddings.position_embeddings[:, 0]
    x = run(torch.cat((embedded[:, :n], rows, embedded[:, n:]), dim=1))
    pull = (1 - cosine.gather(1, chosen)).sum(1).mean()
    return model.classifier(x[:, n : n + N * LENGTH].mean(1)), chosen, pull


@pytest.mark.parametrize("layout", ["prepend", "after_cls"])
def test_it_is_two_passes_by_hand(layout: str) -> None:
    model, method, pool = applied(layout=layout)
    plain, pixels = tiny("vit"), batch("vit")["pixel_values"]
    expected, chosen, pull = by_hand(plain, pool, pixels, layout == "after_cls")
    assert_near({"": expected}, {"": model(pixels).logits}, 1e-5)
    assert torch.allclose(method.penalty(model), method.pull * pull, atol=1e-5)
    assert len({tuple(row.tolist()) for row in chosen}) > 1


def test_the_pull_counts_once() -> None:
    model, method, _ = applied()
    assert method.penalty(model) is None
    model(**batch("vit"))
    assert method.penalty(model) is not None
    assert method.penalty(model) is None


def test_the_gradient_of_the_pull_is_that_of_the_code() -> None:
    """The code subtracts the cosine, the paper adds the distance."""
    model, method, pool = applied(pull=0.7)
    pixels = batch("vit")["pixel_values"]
    model(pixels)
    (ours,) = torch.autograd.grad(method.penalty(model), pool.keys)
    with torch.no_grad():
        query = tiny("vit").vit(pixels).last_hidden_state[:, 0]
    keys = pool.keys.detach().requires_grad_()
    cosine = F.cosine_similarity(query[:, None], keys[None], dim=-1)
    (theirs,) = torch.autograd.grad(-0.7 * cosine.topk(N, dim=1).values.sum() / len(pixels), keys)
    assert_near({"": theirs}, {"": ours}, 1e-5)


@pytest.mark.parametrize(("size", "count"), [(10, 46_080), (20, 92_160)])
def test_counts_of_the_paper(size: int, count: int) -> None:
    model = meta(hf.ViTConfig(num_labels=100), hf.AutoModelForImageClassification)
    L2P(pool_size=size).apply(model)
    pool = L2P.pool(L2P(), model)
    assert pool.prompts.numel() + pool.keys.numel() == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count + 100 * 769


def test_gradients_are_on_the_chosen_rows_alone() -> None:
    model, method, pool = applied(pool_size=20, top_n=2)
    model(**batch("vit"))
    chosen, _ = pool.choose(tiny("vit").vit(batch("vit")["pixel_values"]).last_hidden_state[:, 0])
    found = gradients(model, "vit", method)
    rows = sorted(set(chosen.flatten().tolist()))
    assert len(rows) < 20
    for name in ("prompts", "keys"):
        grad = found[f"vit.l2p.{name}"].flatten(1)
        assert grad.any(dim=1).nonzero().flatten().tolist() == rows


def test_an_image_chooses_for_itself() -> None:
    model, _, _ = applied()
    pixels = batch("vit", size=8)["pixel_values"]
    with torch.no_grad():
        assert_near({"": model(pixels).logits[:1]}, {"": model(pixels[:1]).logits}, 1e-5)


def test_a_batch_that_votes_chooses_for_all() -> None:
    with pytest.warns(UserWarning, match="give the task away"):
        _, _, pool = applied(batchwise="always")
    query = torch.randn(16, HIDDEN)
    chosen, _ = pool.choose(query)
    assert len({tuple(row) for row in chosen.tolist()}) == 1
    pool.batchwise = "never"
    alone, _ = pool.choose(query)
    votes = torch.bincount(alone.flatten(), minlength=M)
    assert votes[chosen[0]].min() >= votes[[i for i in range(M) if i not in chosen[0].tolist()]].max()
    pool.batchwise = "train"
    assert torch.equal(pool.choose(query)[0], alone), "in the test an image chooses for itself"
    pool.train()
    assert torch.equal(pool.choose(query)[0], chosen)


def test_of_equal_keys_the_first_ones_are_chosen() -> None:
    _, _, pool = applied()
    with torch.no_grad():
        pool.keys.fill_(1.0)
    assert pool.choose(torch.randn(2, HIDDEN))[0].tolist() == [[0, 1, 2]] * 2


def test_what_was_chosen_often_is_penalised_in_training() -> None:
    _, _, pool = applied(pool_size=10, top_n=5, diversify=True)
    pool.counts.copy_(torch.tensor([100] * 5 + [0] * 5))
    pool.begin_task()
    query = torch.randn(3, HIDDEN)
    plain, _ = pool.choose(query)
    pool.train()
    chosen, _ = pool.choose(query)
    assert [sorted(row) for row in chosen.tolist()] == [[5, 6, 7, 8, 9]] * 3
    assert not torch.equal(plain.sort().values, chosen.sort().values)
    pool.diversify = False
    assert torch.equal(pool.choose(query)[0], plain)


def test_in_the_first_task_the_distance_decides() -> None:
    _, _, pool = applied(diversify=True)
    query = torch.randn(3, HIDDEN)
    plain, _ = pool.choose(query)
    pool.train()
    assert torch.equal(pool.choose(query)[0], plain)


def test_choices_are_counted_in_training() -> None:
    model, method, pool = applied()
    model(**batch("vit"))
    assert method.selection_counts(model).sum() == 0
    pool.train()
    model(**batch("vit"))
    counts = method.selection_counts(model)
    assert counts.sum() == 4 * N
    assert torch.equal(collect(model)["vit.l2p.counts"], counts)


def test_a_task_takes_the_frequencies_of_those_before() -> None:
    model, method, pool = applied()
    pool.counts.copy_(torch.tensor([3, 1, 0, 0, 0, 0]))
    module = L.LightningModule()
    module.model = model
    method.on_task_start(None, module, 1)
    assert pool.frequency.tolist() == [0.75, 0.25, 0, 0, 0, 0]


class Counting:
    """Counts the images that the last block of a model sees."""

    def __init__(self, model: nn.Module) -> None:
        self.images = 0
        tower(model).blocks[-1].register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, args: tuple) -> None:
        self.images += len(args[0])


def test_cached_queries_are_the_same_and_computed_once() -> None:
    model, _, _ = applied(cache_queries=True)
    plain, _, _ = applied()
    plain.load_state_dict(model.state_dict())
    seen = Counting(model)
    pixels = batch("vit", size=8)["pixel_values"]
    mixed = torch.cat((pixels[5:6], pixels[:3], torch.randn(1, 3, 16, 16)))
    with torch.no_grad():
        for images, runs in ((pixels[:6], 12), (pixels[:6], 6), (mixed, 6), (mixed.flip(0), 5)):
            seen.images = 0
            assert_near({"": plain(images).logits}, {"": model(images).logits}, 1e-5)
            assert seen.images == runs


def test_a_change_of_weights_empties_the_cache() -> None:
    model, _, pool = applied(cache_queries=True)
    plain, _, _ = applied()
    pixels = batch("vit")["pixel_values"]
    with torch.no_grad():
        model(pixels)
        for one in (model, plain):
            one.vit.layers[0].mlp.fc1.weight.mul_(2)
        plain.vit.l2p.load_state_dict(pool.state_dict())
        plain.classifier.load_state_dict(model.classifier.state_dict())
        assert_near({"": plain(pixels).logits}, {"": model(pixels).logits}, 1e-5)


def test_a_copy_has_no_cached_queries() -> None:
    model, _, pool = applied(cache_queries=True)
    model(**batch("vit"))
    assert len(pool.cache.queries) == 4
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.vit.l2p.cache.queries == {}
        assert other.vit.l2p.noted is None
        assert torch.equal(output(other, "vit"), output(model, "vit"))


def test_patches_are_embedded_once() -> None:
    model, _, _ = applied()
    calls: list[int] = []
    model.vit.embeddings.patch_embeddings.register_forward_hook(lambda *args: calls.append(1))
    model(**batch("vit"))
    assert len(calls) == 1
    model.vit.embeddings.cls_token.requires_grad_(True)  # as another method may: the query must not cut its gradient
    model(**batch("vit")).loss.backward()
    assert len(calls) == 3
    assert model.vit.embeddings.cls_token.grad.any()


def test_the_query_has_no_dropout() -> None:
    model = tiny("vit", dropout=0.5)
    L2P(**SIZES).apply(model)
    pool = model.vit.l2p
    seen: list[Tensor] = []
    choose = pool.choose
    pool.choose = lambda query: (seen.append(query), choose(query))[1]
    model(**batch("vit"))
    model.train()
    model(**batch("vit"))
    assert torch.equal(seen[0], seen[1])
    assert all(m.training for m in model.modules())


def test_a_fit_pulls_keys_to_queries(tmp_path) -> None:
    def distance(module: Tuned) -> float:
        pool = method.pool(module)
        module.eval()
        query = tiny("vit").vit(batch("vit", size=12, seed=1)["pixel_values"]).last_hidden_state[:, 0]
        return pool.choose(query)[1].item()

    method, module = L2P(**SIZES, cache_queries=True), Tuned("vit", lr=0.05)
    method.apply(module)
    before = distance(module)
    module.train()
    trainer(tmp_path, method, max_epochs=4, limit_val_batches=0).fit(module, loader("vit"), loader("vit"))
    assert distance(module) < before - 0.1
    assert method.pool(module).cache.hits == 3 * 12
    assert method.selection_counts(module).sum() == 4 * 12 * N


def test_a_useless_cache_is_told(tmp_path) -> None:
    module, method = Tuned("vit"), L2P(**SIZES, cache_queries=True)

    class Other(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Tuned, batch: dict, batch_idx: int) -> None:
            batch["pixel_values"] = torch.randn_like(batch["pixel_values"])

    with pytest.warns(UserWarning, match="found none again"):
        trainer(tmp_path, method, Other(), max_epochs=2, limit_val_batches=0).fit(module, loader("vit"), loader("vit"))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("vit", {"pool_size": 0}, "pool_size=0 is out of range"),
        ("vit", {"top_n": 7}, "top_n=7 is more than the 6 prompts"),
        ("vit", {"pull": 0.0}, "pull=0.0 leaves the keys without a gradient"),
        ("vit", {"layout": "end"}, "layout='end' is unknown"),
        ("vit", {"batchwise": "yes"}, "batchwise='yes' is unknown"),
        ("siglip_image", {}, r"L2P asks by the \[CLS\] token, which SiglipForImageClassification has not"),
        ("swin", {}, r"L2P asks by the \[CLS\] token, which SwinForImageClassification has not"),
        ("bert", {}, "has no vision transformer"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, arguments: dict, message: str) -> None:
    model = tiny(kind)
    keys = list(model.state_dict())
    with pytest.raises(TuningError, match=message):
        L2P(**SIZES | arguments).apply(model)
    assert list(model.state_dict()) == keys


def test_without_a_head_it_is_refused() -> None:
    with pytest.raises(TuningError, match="a task head the mean of the prompts, and ViTModel has none"):
        L2P().apply(tiny("vit").vit)


def test_it_shows_in_the_output() -> None:
    model, _, _ = applied()
    shake(model)
    assert not torch.allclose(output(model, "vit"), output(tiny("vit"), "vit"), atol=1e-2)
    assert sum(p.numel() for p in collect(model).values()) == M * (LENGTH + 1) * HIDDEN + HEADS["vit"] + 2 * M
