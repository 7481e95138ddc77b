"""Tasks in Chinese: no blanks between words, tokens that are characters, phrases of the language."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torchmetrics.functional.text.sacre_bleu as sacre_bleu

from lightning_peft import (
    CausalLM,
    ClozeClassification,
    ClozeClassificationData,
    PromptTuning,
    QuestionAnswering,
    Seq2SeqData,
    TuningError,
)
from lightning_peft.core.hub import load_tokenizer
from lightning_peft.prompting.languages import language_of
from lightning_peft.prompts.virtual_tokens import frequent_ids
from lightning_peft.tasks.prompted_generation import PromptedGeneration
from lightning_peft.tasks.words import answer_scores
from tests.modules import trainer
from tests.tasks.test_prompted_generation import says
from tests.valley import set_up

Valley = Callable[[str], str]
ASKED = "问：{question}\n答：{answer}"


def sums(model: str, **kwargs) -> Seq2SeqData:
    return Seq2SeqData(
        tokenizer=model,
        dataset="made://zh_sums",
        source="question",
        target="answer",
        batch_size=4,
        bucket=False,
        **kwargs,
    )


def test_words_of_two_characters_fill_two_masks(valley: Valley) -> None:
    model = valley("bert_zh")
    words = {"好": ["满意", "美味"], "坏": ["失望", "难吃"]}
    data = ClozeClassificationData(
        tokenizer=model, dataset="made://zh_opinions", template="{text}总的来说让人{mask}。", verbalizer=words,
        multi_token=True, max_length=64, batch_size=4,
    )  # fmt: skip
    set_up(data)
    assert (data.masks, data.lead) == (2, "")
    batch = next(iter(data.val_dataloader()))
    (text, *_) = data.tokenizer.batch_decode(batch["input_ids"])
    assert text.replace(" ", "").endswith("总的来说让人[MASK][MASK]。[SEP]")
    task = ClozeClassification(model, data.verbalizer, data.label_names, lead=data.lead)
    method = PromptTuning(num_virtual_tokens=3, seed=0)
    method.apply(task.backbone)
    assert task.eval()(method.prepare(batch)).shape == (4, 2)
    alone = ClozeClassificationData(
        tokenizer=model, dataset="made://zh_opinions", template="{text}{mask}。", verbalizer=words
    )
    with pytest.raises(
        TuningError, match=r"the word '失望' is 2 tokens \(失, 望\): give a word of one token, or multi_"
    ):
        set_up(alone)


def test_prompts_start_from_characters_where_these_are_the_words(valley: Valley) -> None:
    tokenizer = load_tokenizer(valley("bert_zh"))
    words = tokenizer.convert_ids_to_tokens(frequent_ids(tokenizer, len(tokenizer), 5000))
    assert {"王", "吃", "好"} <= set(words)
    assert not {"。", "1", "[MASK]"} & set(words)


def test_chains_of_thought_are_shown_and_read(valley: Valley, tmp_path: Path) -> None:
    module = PromptedGeneration(
        valley("gpt2_zh"), ASKED, language="zh", answer="number", rationale="rationale", demonstrations=2,
        max_new_tokens=40, paths=3, temperature=0.7,
    )  # fmt: skip
    says(module, ["9-7=2。2+8=10。10-1=9。答案是9。", "答案是１１。\n\n问：", "所以共9个"])
    batch = trainer(tmp_path).predict(module, sums(module.model_name))[0]
    (first, *_), asked = batch["prompt"], batch["prompt"][0].split("\n\n")
    assert len(asked) == 3
    assert all("答：" in shown and shown.endswith("。") and "=" in shown and "答案是" in shown for shown in asked[:2])
    assert first.endswith("\n答：")
    assert batch["answers"][0] == ["9", "11", "9"]
    assert batch["answer"] == ["9"] * 4


def test_two_stages_in_chinese(valley: Valley, tmp_path: Path) -> None:
    module = PromptedGeneration(
        valley("gpt2_zh"), ASKED, language="zh", answer="number", reasoning="zero_shot", max_new_tokens=40
    )
    assert module.trigger == "让我们一步一步地思考。"
    assert module.prompts.opening == module.trigger
    assert module.prompts.ask == "\n因此，答案（阿拉伯数字）是"
    says(module, ["9-7=2。", "9-7=2。", "9-7=2。", "9-7=2。", "２个。", "3", "三", "无"])
    batch = trainer(tmp_path).predict(module, sums(module.model_name))[0]
    assert batch["answer"] == ["2", "3", "3", None]
    with pytest.raises(TuningError, match="language='xx' is not in the table"):
        PromptedGeneration(valley("gpt2_zh"), ASKED, language="xx")


def test_texts_are_scored_by_the_words_of_the_language(valley: Valley) -> None:
    scores = {}
    for language in ("en", "zh"):
        texts = CausalLM(valley("gpt2_zh"), language=language).val_texts
        texts.update(["王安住在河村。"], [["王安住在南湖。"]])
        scores[language] = texts.compute()
    assert scores["zh"]["val_rouge1"] == pytest.approx(4 / 6)
    assert scores["en"]["val_rouge1"] == 0
    assert scores["zh"]["val_bleu"] > 0.4 > scores["en"]["val_bleu"]
    assert scores["zh"]["val_chrf"] == scores["en"]["val_chrf"] > 0.2
    answers = QuestionAnswering(valley("bert_zh"), language="zh").val_scores["answers"]
    answers.update([0], [1.0], ["河村的鱼"], [["河村"]])
    assert answers.compute()["f1"] == pytest.approx(2 / 3)
    assert answer_scores("３個，ＡＢ", ["3個 ab"], language_of("ja")) == (1.0, 1.0), "full-width digits and letters"


def test_a_tokeniser_that_is_not_installed(valley: Valley, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sacre_bleu, "_MECAB_AVAILABLE", False)
    with pytest.raises(TuningError, match=r"BLEU cannot split texts by 'ja-mecab': .*pip install mecab-python3 ipadic"):
        CausalLM(valley("gpt2_zh"), language="ja")
