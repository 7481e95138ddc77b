"""One delta of several: sums, low ranks of sums, TIES and DARE; other scales, safe merging, and LoRAs of any change."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    IA3,
    Adapter,
    BitFit,
    DiffPruning,
    FullFineTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    TuningError,
    activate,
    combine,
    combine_deltas,
    from_delta,
    list_deltas,
    load_delta,
    merge,
    muted,
    remove_delta,
    rescale,
    save_delta,
    to_lora,
)
from lightning_peft.commands.tools import run_tool
from lightning_peft.deltas.merging_rules import Rule, factors_of_rank, of_rank
from tests.contract import at_work, shake
from tests.models import tiny


def made(kind: str, method: Method, seed: int = 0) -> nn.Module:
    model = tiny(kind)
    torch.manual_seed(seed)
    method.apply(model)
    shake(model)
    return model


def file_of(folder: Path, kind: str, method: Method, seed: int) -> Path:
    return save_delta(made(kind, method, seed), folder / f"{seed}.safetensors")


def merged(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in merge(copy.deepcopy(model)).named_parameters()}


def sum_of(kind: str, files: list[Path], weights: list[float]) -> dict[str, Tensor]:
    """Return the base and the weighted changes that the files make to it, one by one."""
    base = {name: p.detach() for name, p in tiny(kind).named_parameters()}
    parts = [merged(from_delta(file, tiny(kind))) for file in files]
    return {n: b + sum(w * (p[n] - b) for w, p in zip(weights, parts, strict=True)) for n, b in base.items()}


SUMS = {
    "cat": ([LoRA(r=2, use_rslora=True), LoRA(r=3, alpha=5.0, target_modules=["c_attn", "c_fc"])], "cat", None),
    "svd": ([LoRA(r=2, init="pissa"), LoRA(r=3, rank_pattern={"h.0.attn.c_attn": 1})], "svd", 7),
    "embedding": ([LoRA(r=2, target_modules=["wpe", "c_proj"]), LoRA(r=1, target_modules=["wpe"])], "cat", None),
    "bitfit": ([BitFit(), BitFit()], "linear", None),
    "all biases": ([LoRA(r=2, bias="all"), LoRA(r=2, bias="all")], "cat", None),
}


@pytest.mark.parametrize(("methods", "how", "r"), SUMS.values(), ids=SUMS)
def test_sums_are_exact(methods: list[Method], how, r: int | None, tmp_path: Path) -> None:
    files = [file_of(tmp_path, "gpt2", method, i) for i, method in enumerate(methods)]
    expected = sum_of("gpt2", files, [0.7, -0.4])
    out = combine(files, [0.7, -0.4], tmp_path / "out.safetensors", how, tiny("gpt2"), r)
    for name, weight in merged(from_delta(out, tiny("gpt2"))).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-5)


def test_ia3_moves_from_one(tmp_path: Path) -> None:
    model = tiny("gpt2")
    for i in range(2):
        load_delta(model, file_of(tmp_path, "gpt2", IA3(), i), f"d{i}")
    combine_deltas(model, {"d0": 0.5, "d1": 2.0}, "both")
    state = model.state_dict()
    for name in [name for name in state if ".ia3_both." in name]:
        parts = [state[name.replace("both", f"d{i}")] for i in range(2)]
        torch.testing.assert_close(state[name], 1 + 0.5 * (parts[0] - 1) + 2 * (parts[1] - 1))
    assert [(d.name, d.is_active) for d in list_deltas(model)] == [("d0", False), ("d1", False), ("both", True)]


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("method", [LoRA(r=2, use_rslora=True), LoRA(r=2, use_dora=True), LoRA(r=3, bias="all")])
def test_one_is_itself_by_every_rule(how, method: Method, tmp_path: Path) -> None:
    file = file_of(tmp_path, "bert", method, 0)
    expected = at_work(from_delta(file, tiny("bert")), "bert")
    out = combine([file], [1.0], tmp_path / "out.safetensors", how, tiny("bert"))
    torch.testing.assert_close(at_work(from_delta(out, tiny("bert")), "bert"), expected, atol=1e-5, rtol=1e-5)
    if how in ("linear", "svd", "ties"):
        two = combine([file, file], [0.4, 0.6], tmp_path / "out.safetensors", how, tiny("bert"))
        torch.testing.assert_close(at_work(from_delta(two, tiny("bert")), "bert"), expected, atol=1e-5, rtol=1e-5)


def test_prompts_and_prefixes_follow_one_another(tmp_path: Path) -> None:
    for method in (
        PromptTuning(num_virtual_tokens=2, init="random_uniform"),
        PrefixTuning(num_virtual_tokens=2, mid_dim=4),
    ):
        model = tiny("gpt2")
        for i in range(2):
            load_delta(model, file_of(tmp_path, "gpt2", method, i), f"d{i}")
        combine_deltas(model, {"d0": 1.0, "d1": 1.0}, "both", "cat")
        longer = at_work(model, "gpt2")
        combine_deltas(model, {"d0": 0.5, "d1": 0.5}, "mean")
        assert not torch.allclose(at_work(model, "gpt2"), longer)
        with pytest.raises(
            TuningError, match=r"follow one another have no weights, these are \[0\.5, 1\.0\]: give each 1"
        ):
            combine_deltas(model, {"d0": 0.5, "d1": 1.0}, "x", "cat")
        with pytest.raises(TuningError, match=r"weights add up to 1\.5: let them add up to 1"):
            combine_deltas(model, {"d0": 0.5, "d1": 1.0}, "x")
        assert [d.name for d in list_deltas(model)] == ["d0", "d1", "both", "mean"]
    (prompt,) = (t for n, t in model.state_dict().items() if n.endswith("h.0.attn.prefixtuning_both.keys"))
    assert prompt.shape[1] == 4


def test_bad_input(tmp_path: Path) -> None:
    one, other = file_of(tmp_path, "gpt2", LoRA(r=2), 0), file_of(tmp_path, "gpt2", LoRA(r=3), 1)
    foreign = tiny("gpt2", seed=5)
    LoRA().apply(foreign)
    stranger, out = save_delta(foreign, tmp_path / "2.safetensors"), tmp_path / "out.safetensors"
    model = tiny("gpt2")
    LoRA(name="own").apply(model)
    for files, weights, how, why in (
        ([one, stranger], [0.5, 0.5], "linear", "was trained on GPT2LMHeadModel"),
        ([one, other], [0.5, 0.5], "linear", r"ranks 2, 3 of .* have no mean: take how='cat'"),
        ([one], [0.5, 0.5], "linear", "1 files have 2 weights"),
        ([one, one], [1.0, -1.0], "linear", r"weights \[1\.0, -1\.0\] add up to 0, so there is no mean"),
        ([one, one], [1.0, -1.0], "mean", "how='mean' is no way to combine deltas: take one of linear, cat"),
        ([one, file_of(tmp_path, "gpt2", LoRA(use_dora=True), 3)], [1.0, 1.0], "cat", "use_dora is true for some"),
        ([file_of(tmp_path, "gpt2", Adapter(), 4)] * 2, [1.0, 1.0], "ties", "no value from which it changes"),
    ):
        with pytest.raises(TuningError, match=why):
            combine(files, weights, out, how, model)
        assert [(d.name, d.is_active) for d in list_deltas(model)] == [("own", True)]
        assert not out.exists()
    combine([one, other], [0.5, 0.5], out, "cat", model)
    with pytest.raises(TuningError, match="density=0 is no share"):
        Rule("ties", density=0)
    with pytest.raises(TuningError, match="r=0 is no rank"):
        Rule("svd", r=0)


def test_ties_trims_elects_and_averages() -> None:
    one, other = torch.tensor([4.0, -3.0, 0.1, 2.0]), torch.tensor([2.0, 1.0, 3.0, -0.2])
    result = Rule("ties", density=0.5).change([one, other], [1.0, 3.0])  # trimmed: [4, -3, 0, 0] and [2, 0, 3, 0]
    torch.testing.assert_close(result, torch.tensor([(4 + 3 * 2) / 4, -3.0, 3.0, 0.0]))


def test_dare_keeps_the_expectation() -> None:
    change = torch.ones(200_000)
    dropped = Rule("dare_linear", density=0.25, seed=1).change([change], [1.0])
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert abs(dropped.mean().item() - 1) < 0.02
    assert torch.equal(dropped, Rule("dare_linear", density=0.25, seed=1).change([change], [1.0]))


def test_low_ranks_are_the_nearest() -> None:
    a, b = torch.randn(3, 6, 8), torch.randn(3, 7, 6)
    for r in (2, 6):
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        best = (u[..., :r] * s[..., None, :r]) @ v[..., :r, :]
        for new_a, new_b in (of_rank(a, b, r), factors_of_rank(b @ a, r)):
            torch.testing.assert_close(new_b @ new_a, best, atol=1e-4, rtol=1e-4)


# Other scales.


@pytest.mark.parametrize(
    "method",
    [LoRA(r=2), LoRA(r=2, init="pissa"), BitFit(), BitFit(name="films"), IA3(feedforward_modules=[])],
    ids=["lora", "pissa", "in place", "copies", "ia3"],
)
def test_rescaled_it_goes_so_far(method: Method) -> None:
    model, base = made("gpt2", method), {n: p.detach() for n, p in tiny("gpt2").named_parameters()}
    full = merged(model)
    rescale(model, 0.5, method.delta)
    for name, weight in merged(model).items():
        torch.testing.assert_close(weight, base[name] + 0.5 * (full[name] - base[name]), atol=1e-6, rtol=1e-5)
    with muted(model):
        bare = at_work(model, "gpt2")
    rescale(model, 0.0)
    torch.testing.assert_close(at_work(model, "gpt2"), bare)


def test_without_a_scale_it_is_refused() -> None:
    model = made("gpt2", PromptTuning(init="random_uniform"))
    before = at_work(model, "gpt2")
    with pytest.raises(
        TuningError, match="SharedPrompt at transformer has no scale to multiply: rescale a delta such as"
    ):
        rescale(model, 0.5)
    with pytest.raises(TuningError, match="'films' is no delta of this"):
        rescale(model, 0.5, "films")
    assert torch.equal(at_work(model, "gpt2"), before)


def test_safe_merging_refuses_what_is_not_finite() -> None:
    model = tiny("gpt2").half()
    LoRA(r=2, name="films").apply(model)
    state = model.state_dict()
    for name in [n for n in state if n.endswith(("lora_films.A", "lora_films.B"))]:
        state[name].fill_(300.0)  # finite in fp32, and too large for fp16
    before = {n: t.clone() for n, t in state.items()}
    with pytest.raises(
        TuningError, match=r"h\.0\.attn\.c_attn\.weight would not be finite in torch\.float16: merge into"
    ):
        merge(model, safe=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert list_deltas(model)
    rescale(model, 1e-3)
    assert all(p.isfinite().all() for p in merge(model, safe=True).parameters())


def test_merging_takes_what_is_at_work() -> None:
    model = made("gpt2", LoRA(name="films"))
    expected = merged(model)
    activate(model)
    LoRA(name="books").apply(model)
    for name, tensor in model.state_dict().items():
        if "lora_books" in name:
            tensor.normal_()
    activate(model, "films")
    result = merged(model)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


# LoRAs of any change.


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("gpt2", LoRA(r=2, use_dora=True)),
        ("gpt2", LoRA(r=2, target_modules=["c_attn", "wpe"])),
        ("bert", IA3(target_modules=[])),
        ("vit", LoRA(r=2, target_modules=["projection", "q_proj"])),
        ("llama", DiffPruning(exclude=".*norm.*|.*embed_tokens.*|lm_head.*")),
        ("llama", FullFineTuning(name="all", exclude=".*norm.*|.*embed_tokens.*|lm_head.*")),
    ],
    ids=["dora", "embedding", "ia3", "convolution", "sparse", "full"],
)
def test_any_change_of_matrices_is_a_lora(kind: str, method: Method, tmp_path: Path) -> None:
    model = made(kind, method)
    expected = at_work(model, kind)
    low = copy.deepcopy(model)
    errors, lost = to_lora(model, 64, "same"), to_lora(low, 1)
    assert max(errors.values()) < 1e-5
    assert max(lost.values()) <= 1
    assert max(lost.values()) > 1e-3
    assert [(d.name, d.methods) for d in list_deltas(model)] == [("same", ("LoRA",))]
    torch.testing.assert_close(at_work(model, kind), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(at_work(low, kind), expected, atol=1e-4)
    file = save_delta(model, tmp_path / "same.safetensors")
    torch.testing.assert_close(at_work(from_delta(file, tiny(kind)), kind), expected, atol=1e-4, rtol=1e-4)
    remove_delta(model, "same")
    torch.testing.assert_close(at_work(model, kind), at_work(tiny(kind), kind))


def test_what_is_no_matrix_is_no_lora() -> None:
    for method, why in (
        (BitFit(), r"h\.0\.attn\.c_attn\.bias is no matrix of a layer, so no LoRA can take in its change"),
        (PromptTuning(init="random_uniform"), "computes what no weight can"),
    ):
        model = made("gpt2", method)
        before = at_work(model, "gpt2")
        with pytest.raises(TuningError, match=why):
            to_lora(model, 4)
        assert torch.equal(at_work(model, "gpt2"), before)
    with pytest.raises(TuningError, match="no delta is at work on this"):
        to_lora(tiny("gpt2"), 4)


def test_the_command_line_combines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "model")
    one, other = (file_of(tmp_path, "gpt2", LoRA(r=2), i) for i in range(2))
    out, base = tmp_path / "out.safetensors", ["--backbone", str(tmp_path / "model")]
    run_tool("combine", [f"{one}=0.7", f"{other}=0.3", str(out), "--how", "cat", *base])
    assert "2 deltas combined in" in capsys.readouterr().out
    expected = sum_of("gpt2", [one, other], [0.7, 0.3])
    for name, weight in merged(from_delta(out, tiny("gpt2"))).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-5)
    with pytest.raises(TuningError, match=r"'.*0\.safetensors' has no weight: write FILE=WEIGHT"):
        run_tool("combine", [str(one), str(out), *base])
    with pytest.raises(TuningError, match=r"out\.ckpt is to be a delta, the last of the files"):
        run_tool("combine", [f"{one}=1", "out.ckpt", *base])
