"""Data for span corruption: T5's own objective, the baseline that language-model adaptation is compared with."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from datasets import Dataset

from lightning_peft.core.errors import TuningError
from lightning_peft.data.lm_adaptation import pieces
from lightning_peft.data.sources import SourcedData


class SpanCorruptionData(SourcedData):
    """Natural text with gaps: ``input_ids`` are the text with a sentinel for each gap, ``labels`` what fills the gaps.

    The texts are put end to end and cut into pieces, as in `LMAdaptationData`. Of a piece ``density`` of the tokens are
    left out, in spans of ``span`` tokens on average; ``the quick brown fox`` becomes ``the <extra_id_0> fox`` and
    ``<extra_id_0> quick brown``. Both end with the end-of-sequence token. A piece begins with a token that is kept and
    ends with a gap, as in the authors' code, whose targets have no last sentinel, unlike the figure of their paper.

    Args:
        text: column of the text.
        density: share of the tokens that are left out.
        span: mean length of a gap [tokens].
        **kwargs: as in `SourcedData` and `TokenData`.

    Source: Raffel et al. 2020, arXiv 1910.10683, section 3.1.4. Lester et al. 2021, arXiv 2104.08691, section 3.2,
    compare prompts of the models before and after adaptation, the former with a sentinel before each target, too
    (``Seq2SeqData(sentinel=True)``).
    """

    numbered = True

    def __init__(self, text: str = "text", density: float = 0.15, span: float = 3.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < density < 1:
            raise TuningError(f"density={density} is no share of tokens to leave out: take a number between 0 and 1.")
        if not span >= 1:
            raise TuningError(f"span={span} is no mean length of a gap: take 1 token or more.")
        self.text, self.density, self.span = text, density, span

    def columns(self, split: str) -> Sequence[str]:
        """Return the column of the text."""
        return [self.text]

    def encoding(self, rows: Dataset, split: str) -> tuple[Callable[..., dict[str, list[Any]]], dict[str, Any]]:
        """Tokenise, put end to end, and leave spans out.

        Raises:
            TuningError: the texts together are shorter than two tokens, or the tokenizer has too few sentinels.
        """
        arguments = {
            "tokenizer": self.tokenizer,
            "text": self.text,
            "max_length": self.max_length,
            "shape": (self.density, self.span),
            "sentinels": sentinels(self.tokenizer),
            "seed": self.seed,
        }
        most = counts(self.max_length - 1, self.density, self.span)[1]
        if most > len(arguments["sentinels"]):
            raise TuningError(
                f"{self.max_length} tokens have {most} gaps, and the tokenizer has {len(arguments['sentinels'])} "
                "sentinels <extra_id_0> ...: take a smaller max_length, a longer span, or the tokenizer of a T5."
            )
        if not any(_corrupt(rows[: min(len(rows), 1000)], [0], **arguments).values()):
            raise TuningError(f"the texts of the {split} split are shorter than 2 tokens together: give more text.")
        return _corrupt, arguments


def sentinels(tokenizer: Any) -> list[int]:
    """Return the ids of ``<extra_id_0>``, ``<extra_id_1>`` ..., as many as the tokenizer has."""
    found: list[int] = []
    while (token := tokenizer.convert_tokens_to_ids(f"<extra_id_{len(found)}>")) not in (None, tokenizer.unk_token_id):
        found.append(token)
    return found


def counts(length: int, density: float, span: float) -> tuple[int, int]:
    """Return how many of so many tokens are left out, and in how many gaps.

    >>> counts(512, 0.15, 3.0)
    (77, 26)
    """
    gone = min(max(round(length * density), 1), length - 1)
    return gone, min(max(round(gone / span), 1), gone, length - gone)


def parts(total: int, count: int, draw: random.Random) -> list[int]:
    """Return ``count`` lengths of 1 or more that add up to ``total``, each way to do so being as likely."""
    cuts = [0, *sorted(draw.sample(range(1, total), count - 1)), total]
    return [after - before for before, after in pairwise(cuts)]


def _corrupt(
    rows: Mapping[str, list[Any]],
    numbers: Sequence[int],
    tokenizer: Any,
    text: str,
    max_length: int,
    shape: tuple[float, float],
    sentinels: Sequence[int],
    seed: int,
) -> dict[str, list[Any]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    out: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "length": []}
    for number, piece in enumerate(pieces(rows[text], tokenizer, max_length - len(end))):
        if len(piece) < 2:
            continue
        draw = random.Random(f"{seed} {numbers[0]} {number}")
        source, target = ([*chain(*one), *end] for one in zip(*_spans(piece, shape, sentinels, draw), strict=True))
        out["input_ids"].append(source)
        out["attention_mask"].append([1] * len(source))
        out["labels"].append(target)
        out["length"].append(len(source))
    return out


def _spans(
    piece: list[int], shape: tuple[float, float], sentinels: Sequence[int], draw: random.Random
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, gap by gap, what goes into the source and what into the target."""
    gone, gaps = counts(len(piece), *shape)
    place = 0
    for kept, left_out, sentinel in zip(
        parts(len(piece) - gone, gaps, draw), parts(gone, gaps, draw), sentinels[:gaps], strict=True
    ):
        middle, after = place + kept, place + kept + left_out
        yield [*piece[place:middle], sentinel], [sentinel, *piece[middle:after]]
        place = after
