"""Log-likelihoods of continuations under a language model; what is common to them is computed once.

A causal model reads the demonstrations once, for as long as they stay the same, each query once, and then the tokens of
each label; keys and values are handed on (transformers' public ``DynamicCache``), so that the scores are, up to
rounding, those of the whole sequences. Demonstrations on the left, padding between them and the query hidden by the
mask, positions given explicitly. An encoder is run once a query for all labels. A masked model sees the masks and their
surroundings at once, and only the masks of one label at a time if a label has several tokens.

Models whose cache is more than keys and values of all tokens (sliding windows, recurrent states) are run in full.

Sources: Zhao et al. 2021 (2102.09690), section 4; Schick and Schütze 2020 (2009.07118), section 3 for several masks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.prompts.source_mask import source_argument
from lightning_peft.tasks.shared_text import Shared, arguments, keep, past, shareable

Words: TypeAlias = Sequence[Sequence[Sequence[int]]]
"""The ids of the words that are scored in each row."""
Decoding: TypeAlias = Literal["confident", "left_to_right", "parallel"]
"""In which order several masks are filled: the surest first, each seeing those before it; or all at once."""

ContentFreeMean: TypeAlias = Literal["raw", "normalised"]
"""How the probabilities of labels after inputs without content are averaged."""


def causal_scores(model: nn.Module, ids: Tensor, mask: Tensor, words: Words, shared: Shared | None = None) -> Tensor:
    """Return log p(word | row) [B, W], summed over the tokens of each word.

    Args:
        model: a causal language model.
        ids: the prompts, padded on the left [B, T]; each has one token or more.
        mask: 0 where there is padding [B, T].
        words: the ids of the W continuations of each row.
        shared: what all rows begin with.
    """
    size = len(ids)
    before = torch.ones(size, shared.length if shared else 0, dtype=mask.dtype, device=mask.device)
    whole = torch.cat([before, mask], 1)
    longest = max(len(word) for row in words for word in row)
    place = whole.cumsum(1) - 1
    before_rows = past(model, shared.copies(size)) if shared else {}
    out = model(
        input_ids=ids,
        attention_mask=whole,
        **_positions(model, place[:, before.shape[1] :].clamp(min=0)),
        **before_rows,
        use_cache=longest > 1,
        **keep(model, 1),
    )
    first = torch.tensor([[word[0] for word in row] for row in words], device=ids.device)
    total = _log_softmax(out.logits[:, -1]).gather(1, first)
    if longest == 1:
        return total
    cache = shareable(model, out)
    if cache is None:
        return recomputed_scores(model, ids, mask, words)
    return total + _rest_scores(model, whole, words, cache)


def _rest_scores(model: nn.Module, whole: Tensor, words: Words, cache: Any) -> Tensor:
    """Return the summed log p of the second and further tokens of the words [B, W], after the prompts in a cache."""
    size, count = len(words), len(words[0])
    flat, filled, inside = _pad([list(word) for row in words for word in row], whole.device)
    cache.batch_repeat_interleave(count)
    whole = torch.cat([whole.repeat_interleave(count, 0), filled[:, :-1].to(whole.dtype)], 1)
    place = (whole.cumsum(1) - 1)[:, 1 - flat.shape[1] :]
    logits = model(
        input_ids=flat[:, :-1], attention_mask=whole, **_positions(model, place), **past(model, cache), use_cache=True
    ).logits
    rest = _of_tokens(logits, flat[:, 1:]) * inside[:, 1:]
    return rest.sum(1).unflatten(0, (size, count))


def recomputed_scores(model: nn.Module, ids: Tensor, mask: Tensor, words: Words, front: Sequence[int] = ()) -> Tensor:
    """Return the same as `causal_scores`, each sequence computed in full; ``front``: what all rows begin with."""
    prompts = [[*front, *row[kept.bool()].tolist()] for row, kept in zip(ids, mask, strict=True)]
    sequences = [prompt + list(word) for prompt, own in zip(prompts, words, strict=True) for word in own]
    lengths = torch.tensor([len(word) for own in words for word in own], device=ids.device)
    longest = int(lengths.max())
    flat, filled, _ = _pad(sequences, ids.device, left=True)
    places = (filled.cumsum(1) - 1).clamp(min=0)
    kept: dict[str, Any] = {name: value + longest for name, value in keep(model, 1).items()}
    source = torch.arange(flat.shape[1], device=ids.device) < flat.shape[1] - lengths.unsqueeze(1)
    kept |= source_argument(model, source)
    out = model(input_ids=flat, attention_mask=filled, **_positions(model, places), use_cache=False, **kept)
    found = _of_tokens(out.logits[:, -longest - 1 : -1], flat[:, -longest:])
    counts = torch.arange(longest, device=ids.device) >= longest - lengths.unsqueeze(1)
    return (found * counts).sum(1).unflatten(0, (len(ids), -1))


def seq2seq_scores(model: nn.Module, ids: Tensor, mask: Tensor, words: Words, opening: Sequence[int] = ()) -> Tensor:
    """Return log p(word | source) [B, W], summed over the tokens of each word; the encoder runs once a row.

    Args:
        model: an encoder-decoder language model.
        ids: the sources [B, T].
        mask: 0 where there is padding [B, T].
        words: the ids of the W targets of each row.
        opening: what the decoder writes before the target, such as T5's sentinel.
    """
    size, count = len(ids), len(words[0])
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
    encoded["last_hidden_state"] = encoded["last_hidden_state"].repeat_interleave(count, 0)
    flat, _, inside = _pad([[*opening, *word] for row in words for word in row], ids.device)
    start: int = model.config.decoder_start_token_id  # type: ignore[union-attr,assignment]
    inputs = torch.cat([torch.full_like(flat[:, :1], start), flat[:, :-1]], 1)
    logits = model(
        encoder_outputs=encoded,
        attention_mask=mask.repeat_interleave(count, 0),
        decoder_input_ids=inputs,
        use_cache=False,
    ).logits
    found = _of_tokens(logits, flat) * inside
    return found[:, len(opening) :].sum(1).unflatten(0, (size, count))


def masked_scores(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    mask_id: int,
    words: Sequence[Sequence[int]],
    decoding: Decoding = "confident",
) -> Tensor:
    """Return log p(word | row) [B, W] of words that have as many tokens as each row has masks.

    Args:
        model: a masked language model.
        batch: its inputs; ``input_ids`` [B, T] are rows with equally many masks.
        mask_id: the id of a mask.
        words: the ids of the W words, the same for all rows.
        decoding: how several masks are filled.
    """
    ids = batch["input_ids"]
    targets = torch.tensor([list(word) for word in words], device=ids.device)
    size, (count, length) = len(ids), targets.shape
    at_mask = ids == mask_id
    found = _log_softmax(model(**batch).logits[at_mask].unflatten(0, (size, length)))
    if length == 1 or decoding == "parallel":
        return torch.stack([found[:, range(length), target].sum(1) for target in targets], 1)
    total = torch.zeros(size, count, device=ids.device)
    for number, target in enumerate(targets):
        total[:, number] = _filled_one_by_one(model, batch, at_mask, target, found, decoding)
    return total


def _filled_one_by_one(
    model: nn.Module, batch: Mapping[str, Tensor], at_mask: Tensor, target: Tensor, found: Tensor, decoding: Decoding
) -> Tensor:
    """Return the summed log-likelihood of one word [B], its tokens put in place one after the other."""
    ids = batch["input_ids"].clone()
    size, length = len(ids), len(target)
    rows = torch.arange(size, device=ids.device)
    columns = at_mask.nonzero()[:, 1].unflatten(0, (size, length))
    filled = torch.zeros(size, length, dtype=torch.bool, device=ids.device)
    total = torch.zeros(size, device=ids.device)
    for step in range(length):
        if step:
            logits = model(**{**batch, "input_ids": ids}).logits
            found = _log_softmax(logits[rows.unsqueeze(1), columns])
        own = found[:, range(length), target].masked_fill(filled, -torch.inf)
        chosen = own.argmax(1) if decoding == "confident" else torch.full_like(rows, step)
        total = total + own[rows, chosen]
        filled[rows, chosen] = True
        ids[rows, columns[rows, chosen]] = target[chosen]
    return total


def combined(words: Tensor, owners: Sequence[int], how: str) -> Tensor:
    """Return the scores of labels [..., C] from those of their words [..., W]: their mean, max, or log of the sum."""
    of = [words[..., [i for i, owner in enumerate(owners) if owner == label]] for label in range(max(owners) + 1)]
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda own: own.mean(-1),
        "max": lambda own: own.amax(-1),
        "sum": lambda own: own.logsumexp(-1),
    }
    return torch.stack([reduce[how](own) for own in of], -1)


def content_free_prior(scores: Tensor, mean: ContentFreeMean = "raw") -> Tensor:
    """Return the logarithm of p_cf, made of log p of the labels after content-free inputs, [N, C] -> [C].

    ``raw``: ``p_cf = mean_n p_n / sum_c mean_n p_n(c)``, so that an input after which the labels are likely counts
    more; ``normalised``: ``p_cf = mean_n (p_n / sum_c p_n(c))``, in which all inputs count alike.

    Source: Zhao et al. 2021 (2102.09690), section 5, which says that probabilities are averaged; ``raw`` is
    ``get_p_content_free`` of their code.
    """
    if mean == "raw":
        return scores.logsumexp(0).log_softmax(-1).clamp(min=math.log(torch.finfo(scores.dtype).tiny))
    return scores.softmax(-1).mean(0).clamp(min=torch.finfo(scores.dtype).tiny).log()


def calibrated(scores: Tensor, prior: Tensor) -> Tensor:
    """Return the logarithm of p / p_cf, normalised: a label that the prompt alone suggests must be surer, [..., C]."""
    return (scores.log_softmax(-1) - prior).log_softmax(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


def _of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log p of the tokens [B, T] from logits [B, T, V]."""
    return _log_softmax(logits).gather(2, tokens.unsqueeze(2)).squeeze(2)


def _pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows padded to one width [N, T], their mask of integers, and the same as floats."""
    width = max(map(len, rows))
    padding = [[0] * (width - len(row)) for row in rows]
    ids = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, padding, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[*pad, *one] if left else [*one, *pad] for one, pad in zip(ones, padding, strict=True)]
    found = torch.tensor(mask, device=device)
    return torch.tensor(ids, device=device), found, found.float()


def _positions(model: nn.Module, places: Tensor) -> dict[str, Tensor]:
    return {"position_ids": places} if "position_ids" in arguments(model) else {}
