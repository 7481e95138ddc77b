"""Token ids of templates: words, masks, virtual tokens and answers in their places, and what is cut."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_peft import TuningError
from lightning_peft.prompting import Template, Verbalizer
from lightning_peft.prompting.encoding import encode, special_ids, text_ids, verbalizer_ids, word_ids

WORDS = ["good", "bad", "film", "music", "Review", "It", "was", "great", "the"]


@pytest.fixture
def words(tokenizer: Path) -> Any:
    """Words as BERT has them: [CLS] ... [SEP]."""
    return AutoTokenizer.from_pretrained(tokenizer)


def pieces(kind: str) -> Any:
    """Return a tokenizer of `WORDS` as GPT-2 and RoBERTa have it (``bytes``), or T5 and Llama (``metaspace``)."""
    blank = "Ġ" if kind == "bytes" else "▁"
    letters = sorted({letter for word in WORDS for letter in word} | set("[]mask.:?\n"))
    letters = [blank, *letters]
    letters = ["Ċ" if letter == "\n" and kind == "bytes" else letter for letter in letters]
    special = ["<pad>", "<unk>", "<mask>", "<extra_id_0>", "</s>", "<s>"]
    merges, vocabulary = [], [*special, *letters]
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary.append(word[:end])
    merges += [(blank, word) for word in WORDS]
    vocabulary += [blank + word for word in WORDS]
    bpe = models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        end = vocabulary.index("</s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=["<extra_id_0>"], **names)


def shown(tokenizer: Any, ids: list[int]) -> list[str | int]:
    return [i if i < 0 else tokenizer.convert_ids_to_tokens(i) for i in ids]


def test_a_cloze_is_the_tokenised_text(words: Any) -> None:
    template = Template("{text} was {mask} . the {title}")
    row = {"text": "good film", "title": "music"}
    encoded = encode(template, words, row)
    assert encoded.input_ids == words("good film was [MASK] . the music")["input_ids"]
    assert encoded.input_ids[encoded.slot] == words.mask_token_id
    two = encode(template, words, row, masks=2)
    assert two.input_ids == words("good film was [MASK] [MASK] . the music")["input_ids"]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_pieces_are_those_of_the_whole_text(kind: str) -> None:
    tokenizer = pieces(kind)
    template = Template("Review: {text} It was {answer}")
    encoded = encode(template, tokenizer, {"text": "the good film."}, style="causal")
    assert encoded.input_ids == text_ids(tokenizer, "Review: the good film. It was")
    assert encoded.slot == len(encoded.input_ids)
    whole = text_ids(tokenizer, "Review: the good film. It was great")
    assert encoded.input_ids + word_ids(tokenizer, "great", template.lead) == whole
    assert len(word_ids(tokenizer, "great", " ")) == 1


def test_a_mask_of_bytes_has_no_blank_of_its_own() -> None:
    tokenizer = pieces("bytes")
    ids = encode(Template("{text} It was {mask}. the {text}"), tokenizer, {"text": "film"}).input_ids
    assert shown(tokenizer, ids) == ["film", "ĠIt", "Ġwas", "<mask>", ".", "Ġthe", "Ġfilm"]


def test_virtual_tokens(words: Any) -> None:
    ids = encode(Template("{v:3} {sub} {v:2} {obj} {mask}{v:1}"), words, {"sub": "good film", "obj": "music"}).input_ids
    tokens = ["[CLS]", -1, -2, -3, "good", "film", -4, -5, "music", "[MASK]", -6, "[SEP]"]
    assert shown(words, ids) == tokens
    tokenizer = pieces("bytes")
    ids = encode(Template("{v:2} {sub} {v:1} {mask}"), tokenizer, {"sub": "film"}, style="causal").input_ids
    assert shown(tokenizer, ids) == [-1, -2, "Ġfilm", -3]


def test_a_gap_of_t5() -> None:
    tokenizer = pieces("metaspace")
    ids = encode(Template("{text} was {mask} film"), tokenizer, {"text": "It"}, style="seq2seq").input_ids
    assert shown(tokenizer, ids) == ["▁It", "▁was", "<extra_id_0>", "▁film", "</s>"]
    ids = encode(Template("{text} was {answer}"), tokenizer, {"text": "It"}, style="seq2seq").input_ids
    assert shown(tokenizer, ids) == ["▁It", "▁was", "</s>"]
    with pytest.raises(TuningError, match=r"words behind \{answer\}: for an encoder-decoder write \{mask\}"):
        encode(Template("{text} was {answer} film"), tokenizer, {"text": "It"}, style="seq2seq")


def test_what_follows_the_answer_of_a_causal_model(words: Any) -> None:
    encoded = encode(Template("{text} was {mask} . the {text}"), words, {"text": "film"}, style="causal")
    assert shown(words, encoded.input_ids) == ["[CLS]", "film", "[UNK]"]
    assert shown(words, encoded.tail) == ["[UNK]", "the", "film"]


def test_a_mask_in_the_data_is_no_mask(words: Any) -> None:
    encoded = encode(Template("{text} was {mask}"), words, {"text": "[MASK] [SEP] film"})
    assert encoded.input_ids.count(words.mask_token_id) == 1
    assert encoded.input_ids.count(words.sep_token_id) == 1
    assert words.cls_token_id == encoded.input_ids[0]


@pytest.mark.parametrize("limit", range(6, 14))
def test_truncation_cuts_the_data_alone(words: Any, limit: int) -> None:
    template = Template("the {a} and {b} is {mask} of {v:1}")  # [CLS] the and is? [MASK] of v [SEP]: 8 tokens
    row = {"a": "good film music", "b": "people time water"}
    if limit < 8:
        with pytest.raises(TuningError, match=r"alone has \d tokens, beyond the limit of \d"):
            encode(template, words, row, max_length=limit)
        return
    encoded = encode(template, words, row, max_length=limit)
    texts = row["a"].split(), row["b"].split()
    kept = limit - 8
    a, b = texts[0][: min(kept, 3)], texts[1][: max(0, kept - 3)]
    tokens = ["[CLS]", "the", *a, "and", *b, "[UNK]", "[MASK]", "of", -1, "[SEP]"]
    assert shown(words, encoded.input_ids) == tokens
    assert encoded.dropped == 14 - limit
    assert encoded.input_ids[encoded.slot] == words.mask_token_id


def test_truncation_of_pieces_keeps_the_template() -> None:
    tokenizer = pieces("bytes")
    template = Template("Review: {text}. It was {mask}")
    full = encode(template, tokenizer, {"text": "the good film"})
    assert shown(tokenizer, full.input_ids) == ["Review", ":", "Ġthe", "Ġgood", "Ġfilm", ".", "ĠIt", "Ġwas", "<mask>"]
    cut = encode(template, tokenizer, {"text": "the good film"}, max_length=6)
    assert shown(tokenizer, cut.input_ids) == ["Review", ":", ".", "ĠIt", "Ġwas", "<mask>"]


def test_a_field_that_is_never_shortened(words: Any) -> None:
    template = Template("{a} {b!} {mask}")
    ids = encode(template, words, {"a": "good film", "b": "music people"}, max_length=6).input_ids
    assert shown(words, ids) == ["[CLS]", "good", "music", "people", "[MASK]", "[SEP]"]
    with pytest.raises(TuningError, match="alone has"):
        encode(template, words, {"a": "good film", "b": "music people"}, max_length=4)


def test_text_in_front_is_not_cut(words: Any) -> None:
    ids = encode(Template("{a} {mask}"), words, {"a": "good film"}, front="music\n\n", max_length=5).input_ids
    assert shown(words, ids) == ["[CLS]", "music", "good", "[MASK]", "[SEP]"]


def test_words_of_labels(words: Any) -> None:
    verbalizer = Verbalizer({"a": ["good", "film"], "b": "bad"})
    assert verbalizer_ids(verbalizer, words) == [[words.convert_tokens_to_ids(w)] for w in ("good", "film", "bad")]
    with pytest.raises(TuningError, match=r"'good film' is 2 tokens \(good, film\): give a word of one token"):
        verbalizer_ids(Verbalizer({"a": "good film", "b": "bad"}), words)
    assert len(verbalizer_ids(Verbalizer({"a": "good film", "b": "bad"}), words, multi_token=True)[0]) == 2
    with pytest.raises(TuningError, match="the word 'zzz' is unknown to the tokenizer"):
        verbalizer_ids(Verbalizer({"a": "zzz", "b": "bad"}), words)
    with pytest.raises(TuningError, match="the words 'Good' and 'good' are the same tokens"):
        verbalizer_ids(Verbalizer({"a": "Good", "b": "good"}), words)


def test_no_mask_token(words: Any) -> None:
    words.mask_token = None
    with pytest.raises(TuningError, match="no mask token, which a cloze needs: take a masked language model"):
        encode(Template("{a} {mask}"), words, {"a": "good"})
    with pytest.raises(TuningError, match="has no <extra_id_0> for a gap"):
        encode(Template("{a} {mask} b"), words, {"a": "good"}, style="seq2seq")
    with pytest.raises(TuningError, match="has 0 masks"):
        encode(Template("{a} {answer}"), words, {"a": "good"})


def test_special_ids(words: Any) -> None:
    assert special_ids(words) == ([words.cls_token_id], [words.sep_token_id])
    assert special_ids(pieces("bytes")) == ([], [])
