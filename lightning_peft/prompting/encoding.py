"""Turns a template and a row into token ids, for cloze tasks, soft prompts and prompting alike.

The words between two slots are tokenised together, as the model saw text in pretraining; only then it is asked which
tokens come from which field, so that a prompt that is too long loses tokens of the data, the last field first,
and never one of the template, the mask or the soft prompt. What a row says is text: a ``[MASK]`` in it is four letters
in brackets, not a second mask. The blank in front of an answer belongs to the answer's first word.

After a mask or a virtual token, tokenizers that put a word boundary in front of every text (SentencePiece) have it
there too: a point right behind a mask becomes a word of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lightning_peft.core.errors import TuningError
from lightning_peft.prompting.template import Template
from lightning_peft.prompting.template_parts import Answer, Field, Lettered, Mask, Options, Part, Soft, Text
from lightning_peft.prompting.verbalizer import Verbalizer

Style: TypeAlias = Literal["masked", "causal", "seq2seq"]
SENTINEL = "<extra_id_0>"
"""What stands for a gap in the input of T5, and in front of what fills it in the output."""
_Tokens: TypeAlias = list[tuple[int, int | None]]
"""Token ids, each with the number of the part that may lose it."""


@dataclass
class Encoded:
    """The ids of one prompt.

    Args:
        input_ids: with special tokens; virtual token k is ``-1 - k``.
        slot: where the first mask (or sentinel) is, or where the answer begins: the length, then.
        tail: the ids behind the answer, which a causal model sees only after it.
        dropped: how many tokens of the data were cut.
    """

    input_ids: list[int]
    slot: int
    tail: list[int] = field(default_factory=list)
    dropped: int = 0


def encode(
    template: Template,
    tokenizer: Any,
    fields: Mapping[str, Any],
    *,
    style: Style = "masked",
    max_length: int | None = None,
    masks: int = 1,
    options: Sequence[str] | None = None,
    front: str = "",
    specials: bool = True,
) -> Encoded:
    """Return the ids of a prompt for a row.

    Args:
        template: for ``masked`` a cloze.
        tokenizer: of transformers.
        fields: the row.
        style: ``masked``: masks stand in the slot; ``causal``: the ids end where the answer begins; ``seq2seq``: a gap
            in the middle is T5's first sentinel, an answer at the end is left to the decoder.
        max_length: the most ids, those of ``tail`` included; fields are cut to it.
        masks: how many masks stand in the slot.
        options: what ``{options}`` lists.
        front: text before the template, such as demonstrations; it is not cut.
        specials: whether the ids have the tokenizer's special tokens around them.

    Raises:
        TuningError: the template does not fit the style or the row, or is too long itself.
    """
    causal = style == "causal"
    before, gap, after = _around(template, tokenizer, style, masks)
    opening, closing = special_ids(tokenizer) if specials else ([], [])
    texts = [Text(front), *before] if front else before
    head = _encode_parts(template, tokenizer, texts, fields, options, -bool(front))
    # Behind the answer of a causal model an empty field ends the text, which ends with no blank.
    tail = _encode_parts(template, tokenizer, after, fields, options, len(before), joins=bool(texts), ends=causal)
    total = len(opening) + len(head) + len(gap) + len(tail) + (0 if causal else len(closing))
    if dropped := max(0, total - (max_length or total)):
        head, tail = _cut(template, head, tail, dropped, max_length or total)
    ids, rest = [*opening, *_ids(head)], _ids(tail)
    return Encoded(ids if causal else [*ids, *gap, *rest, *closing], len(ids), rest if causal else [], dropped)


def _ids(tokens: _Tokens) -> list[int]:
    return [token for token, _ in tokens]


def word_ids(tokenizer: Any, word: str, lead: str = " ") -> list[int]:
    """Return the ids of an answer, with the blank in front of it that the template has.

    Raises:
        TuningError: the tokenizer does not know it.
    """
    ids = text_ids(tokenizer, lead + word.strip(), joins=bool(lead))
    if not ids or tokenizer.unk_token_id in ids:
        raise TuningError(f"the word {word!r} is unknown to the tokenizer: give one that it has.")
    return ids


def verbalizer_ids(
    verbalizer: Verbalizer, tokenizer: Any, lead: str = " ", multi_token: bool = False
) -> list[list[int]]:
    """Return the ids of each of the verbalizer's words.

    Raises:
        TuningError: a word is unknown, has several tokens (without ``multi_token``), or has the ids of another label's.
    """
    ids = [word_ids(tokenizer, word, lead) for word in verbalizer.words]
    owners: dict[tuple[int, ...], int] = {}
    for i, (word, own) in enumerate(zip(verbalizer.words, ids, strict=True)):
        if len(own) > 1 and not multi_token:
            tokens = ", ".join(tokenizer.convert_ids_to_tokens(own))
            raise TuningError(
                f"the word {word!r} is {len(own)} tokens ({tokens}): give a word of one token, or multi_token=True."
            )
        first = owners.setdefault(tuple(own), i)
        if first != i:
            raise TuningError(
                f"the words {verbalizer.words[first]!r} and {word!r} are the same tokens: give each label its own."
            )
    return ids


def text_ids(tokenizer: Any, text: str, joins: bool = False) -> list[int]:
    """Return the ids of a text without special tokens; ``joins``: it goes on from something in front of it."""
    return [token for token, _ in _tokenise(tokenizer, [(text, None)], joins)]


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def mask_id(tokenizer: Any) -> int:
    """Return the id of the mask.

    Raises:
        TuningError: there is none.
    """
    if tokenizer.mask_token_id is None:
        raise TuningError("the tokenizer has no mask token, which a cloze needs: take a masked language model.")
    found: int = tokenizer.mask_token_id
    return found


def sentinel_id(tokenizer: Any) -> int:
    """Return the id of T5's first sentinel.

    Raises:
        TuningError: there is none.
    """
    found = tokenizer.convert_tokens_to_ids(SENTINEL)
    if found is None or found == tokenizer.unk_token_id:
        raise TuningError(
            f"the tokenizer has no {SENTINEL} for a gap inside a text: put {{answer}} at the end of the template."
        )
    return int(found)


def _around(template: Template, tokenizer: Any, style: Style, masks: int) -> tuple[list[Part], list[int], list[Part]]:
    """Return the parts before the answer, the ids in its place, and the parts behind it."""
    if style == "masked":
        template.cloze()
        return list(template.before), [mask_id(tokenizer)] * masks, list(template.after)
    before, after, slot = list(template.before), list(template.after), template.slot
    if style == "causal" or slot is None:
        return before, [], after
    if isinstance(template.parts[slot], Mask):
        return before, [sentinel_id(tokenizer)], after
    if after:
        raise TuningError(f"{template} has words behind {{answer}}: for an encoder-decoder write {{mask}} there.")
    return before, [], after


def _encode_parts(
    template: Template,
    tokenizer: Any,
    parts: Sequence[Part],
    fields: Mapping[str, Any],
    options: Sequence[str] | None,
    number: int,
    joins: bool = False,
    ends: bool = False,
) -> _Tokens:
    """Return the tokens of parts; the numbers of the parts begin at ``number``."""
    tokens: _Tokens = []
    chunk: list[tuple[str, int | None]] = []
    for i, part in enumerate(parts, number):
        if isinstance(part, Soft):
            tokens += _tokenise(tokenizer, chunk, joins, ends=True)
            tokens += [(-1 - part.first - k, None) for k in range(part.count)]
            chunk, joins = [], True
        elif isinstance(part, (Text, Field, Options, Lettered)):
            shortens = isinstance(part, Field) and part.shortens
            chunk.append((template.words(part, fields, options), i if shortens else None))
        else:
            assert isinstance(part, (Mask, Answer))
    return tokens + _tokenise(tokenizer, chunk, joins, ends)


def _tokenise(tokenizer: Any, chunk: Sequence[tuple[str, int | None]], joins: bool, ends: bool = False) -> _Tokens:
    """Return the tokens of neighbouring parts, each with the part that may lose it.

    ``joins``: something stands in front of them; ``ends``: no blank is needed at the end, as before a virtual token.
    """
    text = "".join(words for words, _ in chunk)
    if ends and text.endswith(" "):
        text, end, cut = text.rstrip(" "), 0, []
        for words, part in chunk:  # the last part may be empty
            cut.append((text[end : end + len(words)], part))
            end += len(words)
        chunk = cut
    skipped = int(joins and text.startswith(" ") and _adds_blank(tokenizer))
    if not text[skipped:]:
        return []
    if not tokenizer.is_fast:  # it does not say where its tokens come from: each part is tokenised alone
        found = []
        for words, part in chunk:
            words = words[skipped:]
            skipped = 0
            ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"] if words else []
            found += [(token, part) for token in ids]
        return found
    encoded = tokenizer(
        text[skipped:], add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    places, end = [], 0
    for words, part in chunk:
        end += len(words)
        places.append((end - len(words), end, part))
    return [
        (token, _owner(text, start + skipped, stop + skipped, places))
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _owner(text: str, start: int, stop: int, places: Sequence[tuple[int, int, int | None]]) -> int | None:
    """Return the part that all letters of a token come from, if that may lose it."""
    for first, end, part in places:
        if first < stop <= end:
            return part if start >= first or not text[start:first].strip() else None
    return None


def _adds_blank(tokenizer: Any) -> bool:
    return bool(tokenizer.tokenize("a")[0].startswith("▁"))


def _cut(template: Template, head: _Tokens, tail: _Tokens, count: int, limit: int) -> tuple[_Tokens, _Tokens]:
    """Return the tokens without ``count`` of the data: from the last field's end first."""
    tokens = [*head, *tail]
    order = sorted(
        (i for i, (_, part) in enumerate(tokens) if part is not None),
        key=lambda i: (tokens[i][1] or 0, i),
        reverse=True,
    )
    if len(order) < count:
        need = len(tokens) - len(order)
        raise TuningError(
            f"{template} alone has {need} tokens, beyond the limit of {limit} with special tokens: shorten it, or "
            "raise max_length."
        )
    lost = set(order[:count])
    split = len(head)
    kept = [i for i in range(len(tokens)) if i not in lost]
    return [tokens[i] for i in kept if i < split], [tokens[i] for i in kept if i >= split]
