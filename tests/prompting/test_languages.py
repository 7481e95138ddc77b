"""Answers in other languages than English: phrases, digits, units, punctuation, and the languages of the table."""

from pathlib import Path

import pytest

from lightning_peft import TuningError
from lightning_peft.prompting import answer_trigger, extract_answer, majority, solved
from lightning_peft.prompting.languages import Language, language_of, languages
from lightning_peft.prompting.numerals import han_number, simple

CANTEEN = "食堂原来有 23 个苹果,用掉20个,所以还有23 - 20 = 3个。又买了6个,所以现在有6 + 3 = 9个。"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("答案是9", "9"),
        ("答案是 11。", "11"),
        (f"{CANTEEN} 答案是9", "9"),
        (CANTEEN, "9"),
        ("答案：１５", "15"),
        ("答案为：１，２３４元", "1234"),
        ("共3盒，每盒5个，答案是15个", "15"),
        ("The answer is 15个", "15"),
        ("答案是-3度", "-3"),
        ("答案是3.50元", "3.5"),
        ("答案是3万", "30000"),
        ("答案是1.2亿人", "120000000"),
        ("答案是5千克", "5"),
        ("答案是三百零五", "305"),
        ("答案是负十二", "-12"),
        ("一共有三个人", None),
        ("答案是不知道", None),
        ("١٢٣ تفاحة", "123"),
        ("정답은 9개입니다", "9"),
        ("Die Antwort ist 1.234,5 kg.", "1234.5"),
        ("La réponse est : 3,50 euros", "3.5"),
        ("La réponse est 12\u202f345", "12345"),
        ("La respuesta es 1.5", "1.5"),
        ("Ответ: 7 яблок", "7"),
        ("ステップ1: 3個、合わせて答えは９です。", "9"),
        ("答案是1/2", "0.5"),
        ("答案是三分之一，不是2", "1/3"),
        ("答案是百分之五十", "50"),
        ("答案是百分之12.5，而且是八分之一点五", "12.5"),
        ("答案是负5，不是6", "-5"),
        ("答案是零下5度", "-5"),
        ("答えはマイナス5です", "-5"),
        ("La réponse est moins 5 degrés", "-5"),
        ("La réponse est 1 234 567 habitants", "1234567"),
        ("Die Antwort ist 1'234", "1234"),
        ("La respuesta es 1.000.000", "1000000"),
        ("El precio: R$ 1.234,50", "1234.5"),
        ("答案是12，000元", "12000"),
        ("答案是1万2千", "12000"),
        ("答えは3億5000万2円です", "350000002"),
        ("答案是5千", "5000"),
        ("答案是十二点五公斤", "12.5"),
        ("答案是廿三", "23"),
        ("答案是叁拾伍元整", "35"),
        ("答案是三十五只，不是36只", "35"),
        ("答案是五个，不是6个", "5"),
        ("答案是一共12个", "12"),
        ("3 只和 8 只，所以一共有三十五只", "35"),
        ("万一十分千万", None),
        ("答案是12-5=7个，不是8个", "7"),
        ("答案是 6，3+9=12", "6"),
        ("答案是2½", "2.5"),
        ("Das Ergebnis ist 12, aber nicht 13", "12"),
    ],
)
def test_numbers(text: str, answer: str | None) -> None:
    assert extract_answer(text, "number") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("答案是A", "A"),
        ("答案是(A)", "A"),
        ("答案是（Ｂ）。", "B"),
        ("答案是 C", "C"),
        ("选B，不选A。答案选B", "B"),
        ("答案是苹果", None),
        ("答案是 b", "B"),
        ("Antwort: A und nicht B", "A"),
        ("La réponse est « B », pas C", "B"),
        ("La respuesta es la B", "B"),
    ],
)
def test_choices(text: str, answer: str | None) -> None:
    assert extract_answer(text, "choice") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("答案：是", "yes"),
        ("答案是是的。", "yes"),
        ("答案是否", "no"),
        ("答案是不对", "no"),
        ("是否正确要看情况", None),
        ("不，他没有。", "no"),
        ("答えははいです。", "yes"),
        ("答えはいいえ", "no"),
        ("Die Antwort lautet: Nein.", "no"),
        ("La respuesta es sí", "yes"),
        ("Je pense que oui", "yes"),
        ("a non-negative number", None),
        ("答案是：没有", "no"),
        ("答案是错的", "no"),
        ("答えはノーです", "no"),
    ],
)
def test_yes_or_no(text: str, answer: str | None) -> None:
    assert extract_answer(text, "yes_no") == answer


def test_texts_lose_their_stop_and_the_end_of_the_sentence() -> None:
    assert extract_answer("所以答案是餐厅。", "text") == "餐厅"
    assert extract_answer("答案是「餐厅」。\n问：", "text") == "餐厅"
    assert extract_answer("したがって、答えは東京です。", "text") == "東京"
    assert extract_answer("Die Antwort ist Köln.", "text") == "Köln"
    assert extract_answer("答えは「東京」です。", "text") == extract_answer("答えは**東京です**。", "text") == "東京"
    assert extract_answer("答えはまだです", "text") == "まだ", "one end of the sentence"
    assert extract_answer("答案是‘餐厅’！", "text") == "餐厅"
    assert extract_answer("答案是 Ａ座", "text") == "Ａ座", "the words of an answer stay as they are written"


def test_a_language_may_be_given() -> None:
    assert extract_answer("3,5", language="de") == "3.5"
    assert extract_answer("3,500", language="en") == "3500"
    assert extract_answer("3,500", language="de") == "3.5"
    assert extract_answer("oui", "yes_no", language="fr") == "yes"
    assert extract_answer("oui", "yes_no", language="en") is None
    assert extract_answer("答案是2，共3", language="en") == "3", "the phrase is not English"


def test_letters_to_choose_from_may_be_kana_or_han() -> None:
    assert extract_answer("正解は（ウ）です", "choice", "アイウエ") == "ウ"
    assert extract_answer("アイスは違う。答えはイ", "choice", "アイウエ") == "イ"
    assert extract_answer("アイスを食べる", "choice", "アイウエ") is None
    assert extract_answer("答案是甲", "choice", "甲乙丙丁") == "甲"


def test_an_answer_alone_may_be_one_numeral_or_a_sum() -> None:
    assert extract_answer("五个", pick="first") == "5"
    assert extract_answer("五个") is None
    assert extract_answer(" 3 + 4 = 7", pick="first") == "7"


def test_self_consistency_over_chinese_chains() -> None:
    paths = ["所以现在有9个。答案是9", "答案是11。", "共9个", "不知道"]
    assert majority([extract_answer(path) for path in paths]) == "9"


@pytest.mark.parametrize("code", list(languages()))
def test_a_solved_example_can_be_read_back(code: str) -> None:
    for kind, answer in (("number", "1234"), ("choice", "B"), ("text", "X Y")):
        text = solved("3 + 4 = 7.", answer, code)
        assert extract_answer(text, kind) == extract_answer(text, kind, language=code) == answer
    own = language_of(code)
    for words, meant in ((own.affirms, "yes"), (own.denies, "no")):
        for word in words:
            assert extract_answer(solved("", word, code), "yes_no") == meant, word
    for kind in own.asks:
        asked = answer_trigger(kind, language=code)
        assert asked.startswith(own.therefore)
        assert "{" not in asked


def test_no_word_says_yes_in_one_language_and_no_in_another() -> None:
    affirm = {word for own in languages().values() for word in own.affirms}
    assert not affirm & {word for own in languages().values() for word in own.denies}


def test_phrases_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "nl.yaml"
    path.write_text(
        "says: [antwoord is]\nsolved: Het antwoord is {answer}.\nsteps: Laten we nadenken.\ntherefore: 'Dus, '\n"
        "asks: {number: het getal, choice: 'van {first} tot {last}', yes_no: ja of nee, text: het antwoord}\n"
        "affirms: [ja]\ndenies: [nee]\ndecimal: ','\n"
    )
    assert solved("2 + 3 = 5.", "5", str(path)) == "2 + 3 = 5. Het antwoord is 5."
    assert extract_answer("2 en 3, het antwoord is 5,5 van 9", language=str(path)) == "5.5"
    assert extract_answer("Nee.", "yes_no", language=str(path)) == "no"
    assert solved("2 + 3 = 5.", "5", phrase="Dus {answer}!") == "2 + 3 = 5. Dus 5!"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="language='xx' is not in the table: take one of en, zh"):
        extract_answer("1", language="xx")
    with pytest.raises(TuningError, match="is no file: give a YAML file"):
        language_of(str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(TuningError, match="holds no mapping: give it says, solved"):
        language_of(str(tmp_path / "list.yaml"))
    (tmp_path / "other.yaml").write_text("says: [antwoord is]\nsolve: x\n")
    with pytest.raises(TuningError, match="'solve' is no entry of a language: take says, solved"):
        language_of(str(tmp_path / "other.yaml"))
    (tmp_path / "broken.yaml").write_text("says: {a: {b\n")
    with pytest.raises(TuningError, match="is no YAML file"):
        language_of(str(tmp_path / "broken.yaml"))
    (tmp_path / "short.yaml").write_text("says: [a]\n")
    with pytest.raises(TuningError, match="lacks 'solved': a language needs says, solved"):
        language_of(str(tmp_path / "short.yaml"))
    with pytest.raises(TuningError, match=r"phrase='So.' has no place for the answer: write \{answer\}"):
        solved("", "1", phrase="So.")
    asks = dict.fromkeys(("number", "choice", "yes_no", "text"), "?")
    for wrong, message in (
        ({"solved": "x"}, "solved='x' has no place"),
        ({"asks": {"number": "?"}}, "asks lacks 'choice'"),
        ({"decimal": ";"}, "decimal=';' is no mark"),
        ({"says": ()}, "says is empty"),
    ):
        parts = {"says": ("a",), "solved": "{answer}", "steps": "", "therefore": "", "asks": asks}
        with pytest.raises(TuningError, match=message):
            Language(**{**parts, "affirms": ("a",), "denies": ("b",)} | wrong)


def test_han_numerals() -> None:
    words = {
        "十": 10,
        "二十": 20,
        "一百零五": 105,
        "三千二百": 3200,
        "两万零三": 20003,
        "一亿二千万": 120000000,
        "二〇二四": 2024,
    }
    assert {word: int(han_number(word) or -1) for word in words} == words
    assert han_number("苹果") is None
    assert simple("１２（ａ）。") == "12(a)。"
