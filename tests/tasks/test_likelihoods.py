"""Scores of continuations: shared or computed in full they are the same, and they are those of the formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from lightning_peft.tasks.likelihoods import (
    calibrated,
    causal_scores,
    combined,
    content_free_prior,
    masked_scores,
    recomputed_scores,
    seq2seq_scores,
)
from lightning_peft.tasks.shared_text import prefill
from tests.models import HIDDEN, VOCABULARY, tiny

MASK = 6


def prompts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(8, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids * mask, mask


def opt() -> nn.Module:
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, num_hidden_layers=2, init_std=0.3,
        num_attention_heads=4, ffn_dim=64, max_position_embeddings=64, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    return hf.OPTForCausalLM(config).eval()


def bloom() -> nn.Module:
    torch.manual_seed(0)
    config = hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=4, initializer_range=0.3, pad_token_id=0
    )
    return hf.BloomForCausalLM(config).eval()


def mistral() -> nn.Module:
    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, initializer_range=0.3, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return hf.MistralForCausalLM(config).eval()


CAUSAL = {"gpt2": lambda: tiny("gpt2"), "llama": lambda: tiny("llama"), "opt": opt, "bloom": bloom, "mistral": mistral}
FRONT = [9, 20, 33, 41, 8, 77, 12, 50]


def by_hand(model: nn.Module, sequence: list[int], start: int) -> float:
    """Return log p of the tokens from ``start`` on, one sequence without padding."""
    logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[i - 1, sequence[i]].item() for i in range(start, len(sequence)))


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("front", [FRONT, []], ids=["demonstrations", "zero-shot"])
@pytest.mark.parametrize("longest", [1, 3])
@torch.no_grad()
def test_a_shared_prefix_is_exact(kind: str, front: list[int], longest: int) -> None:
    model = CAUSAL[kind]()
    ids, mask = prompts([3, 7, 1])
    words = [[[10], [11, 12, 13][:longest], [14, 15][:longest]]] * 2 + [[[20, 21][:longest], [22], [10]]]
    shared = prefill(model, front) if front else None
    assert (shared is None) == (kind == "mistral" or not front)  # a sliding window cannot be shared
    if front and shared is None:
        found = recomputed_scores(model, ids, mask, words, front)
    else:
        found = causal_scores(model, ids, mask, words, shared)
        assert torch.allclose(found, recomputed_scores(model, ids, mask, words, front), atol=1e-5)
    for row in range(3):
        prompt = [*front, *ids[row][mask[row].bool()].tolist()]
        for number, word in enumerate(words[row]):
            assert found[row, number].item() == pytest.approx(by_hand(model, prompt + word, len(prompt)), rel=1e-5)


@torch.no_grad()
def test_what_is_shared_stays_as_it_was() -> None:
    model = tiny("gpt2")
    shared = prefill(model, FRONT)
    assert shared is not None
    ids, mask = prompts([3, 4])
    words = [[[10, 11], [12]]] * 2
    first = causal_scores(model, ids, mask, words, shared)
    assert shared.cache.get_seq_length() == len(FRONT) == shared.length
    assert torch.equal(causal_scores(model, ids, mask, words, shared), first)


@pytest.mark.parametrize("opening", [(), (30,)])
@torch.no_grad()
def test_an_encoder_runs_once(opening: tuple[int, ...]) -> None:
    model: Any = tiny("t5")
    ids, mask = prompts([5, 3])
    ids, mask = ids.flip(1), mask.flip(1)  # padding on the right
    words = [[[10], [11, 12]], [[13, 14, 15], [10]]]
    runs = []
    model.get_encoder().register_forward_hook(lambda *_: runs.append(1))
    found = seq2seq_scores(model, ids, mask, words, opening)
    assert len(runs) == 1
    for row in range(2):
        source = ids[row][mask[row].bool()].unsqueeze(0)
        for number, word in enumerate(words[row]):
            labels = torch.tensor([[*opening, *word]])
            logits = model(input_ids=source, labels=labels).logits.log_softmax(-1)
            expected = logits[0].gather(1, labels.T)[len(opening) :].sum()
            assert found[row, number].item() == pytest.approx(expected.item(), rel=1e-5)


def masked_lm() -> nn.Module:
    torch.manual_seed(0)
    config = tiny("bert").config
    return hf.BertForMaskedLM(config).eval()


@pytest.mark.parametrize("decoding", ["confident", "left_to_right", "parallel"])
@torch.no_grad()
def test_one_mask(decoding: str) -> None:
    """Words of one token have one score, however several masks would be filled; word 0 counts as any other."""
    model = masked_lm()
    ids = torch.tensor([[3, 20, MASK, 4], [3, MASK, 21, 4]])
    found = masked_scores(model, {"input_ids": ids}, MASK, [[0], [15]], decoding)
    logits = model(input_ids=ids).logits
    expected = logits[[0, 1], [2, 1]].log_softmax(-1)[:, [0, 15]]
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found[:, 0], torch.zeros(2))


@torch.no_grad()
def test_the_surest_token_is_filled_in_first() -> None:
    model = masked_lm()
    ids = torch.tensor([[3, 20, MASK, MASK, 4], [3, MASK, MASK, 21, 4]])
    words, ways = [[30, 31], [32, 33]], ("confident", "left_to_right", "parallel")
    found = {how: masked_scores(model, {"input_ids": ids}, MASK, words, how) for how in ways}
    for row in range(2):
        places = (ids[row] == MASK).nonzero().flatten().tolist()
        for number, word in enumerate(words):

            def ask(tokens: list[int], place: int, token: int) -> float:
                return model(input_ids=torch.tensor([tokens])).logits[0, place].log_softmax(-1)[token].item()

            start = ids[row].tolist()
            each = [ask(start, place, token) for place, token in zip(places, word, strict=True)]
            for how, first in (("confident", each[1] > each[0]), ("left_to_right", False)):
                filled = list(start)
                filled[places[first]] = word[first]
                second = ask(filled, places[not first], word[not first])
                assert found[how][row, number].item() == pytest.approx(each[first] + second, rel=1e-5)
            assert found["parallel"][row, number].item() == pytest.approx(sum(each), rel=1e-5)


class Independent(nn.Module):
    """A masked model whose guess at a place depends on the place alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, VOCABULARY))

    def forward(self, input_ids: Tensor) -> Any:
        return hf.modeling_outputs.MaskedLMOutput(
            logits=self.table[: input_ids.shape[1]].expand(len(input_ids), -1, -1)
        )


@torch.no_grad()
def test_in_parallel_or_one_by_one_is_the_same_for_independent_places() -> None:
    ids = torch.tensor([[3, 20, MASK, MASK, 4]])
    model, words = Independent(), [[30, 31], [32, 33]]
    parallel = masked_scores(model, {"input_ids": ids}, MASK, words, "parallel")
    assert torch.allclose(masked_scores(model, {"input_ids": ids}, MASK, words, "confident"), parallel)


def test_scores_of_labels() -> None:
    words = torch.tensor([[1.0, 3.0, 5.0]])
    assert combined(words, [0, 0, 1], "mean").tolist() == [[2.0, 5.0]]
    assert combined(words, [0, 0, 1], "max").tolist() == [[3.0, 5.0]]
    probabilities = torch.tensor([[0.2, 0.3, 0.1]])
    assert combined(probabilities.log(), [0, 0, 1], "sum").exp().tolist() == [pytest.approx([0.5, 0.1])]


def test_calibration_moves_the_threshold() -> None:
    prior = torch.tensor([0.618, 0.382]).log()
    guess = [calibrated(torch.tensor([p, 1 - p]).log(), prior).argmax().item() for p in (0.679, 0.619, 0.617, 0.5)]
    assert guess == [0, 0, 1, 1]
    assert calibrated(prior, prior).exp().tolist() == pytest.approx([0.5, 0.5])


def test_a_uniform_prior_changes_nothing() -> None:
    scores = torch.randn(4, 3)
    prior = content_free_prior(torch.zeros(2, 3))
    assert torch.allclose(calibrated(scores, prior), F.log_softmax(scores, -1), atol=1e-6)


def test_the_prior_is_the_mean_of_probabilities() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]]).log()
    assert content_free_prior(scores).exp().tolist() == pytest.approx([0.5, 0.5])
    certain = torch.tensor([[0.0, -1e9]])
    for mean in ("raw", "normalised"):
        assert torch.isfinite(calibrated(torch.zeros(1, 2), content_free_prior(certain, mean))).all()


def test_inputs_after_which_labels_are_likely_count_more_or_all_alike() -> None:
    raw = torch.tensor([[0.020, 0.010], [0.0001, 0.0009]])
    authors, alike = raw.mean(0) / raw.mean(0).sum(), torch.tensor([(2 / 3 + 0.1) / 2, (1 / 3 + 0.9) / 2])
    assert torch.allclose(content_free_prior(raw.log()).exp(), authors)
    assert torch.allclose(content_free_prior(raw.log(), "normalised").exp(), alike)
    even = torch.tensor([0.5, 0.5]).log()
    guesses = [calibrated(even, content_free_prior(raw.log(), mean)).argmax().item() for mean in ("raw", "normalised")]
    assert guesses == [1, 0]
