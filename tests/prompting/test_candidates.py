"""Candidates for templates: from files, mined, paraphrased, edited."""

from pathlib import Path

import pytest

from lightning_peft import TuningError
from lightning_peft.prompting.candidates import Editor, listed, mined, paraphrased, synonyms_of
from lightning_peft.prompting.template import Template

START = "{text} all in all it was {mask} ."


def test_edits_leave_slots_alone_and_are_new() -> None:
    editor = Editor(0, {"was": ["seemed"]})
    found = editor.edits(START, 30, ["{text} all in all it {mask} ."])
    assert len(found) > 15
    assert {"delete", "swap", "add", "paraphrase"} == set(found.values())
    for text in found:
        assert [type(part).__name__ for part in Template(text).parts if type(part).__name__ != "Text"] == [
            "Field",
            "Mask",
        ]
    assert START not in found
    assert "{text} all in all it {mask} ." not in found
    assert Editor(0, {}).edits(START, 30, []) == Editor(0, {}).edits(START, 30, [])
    assert Editor(0, {}).edits("{text} {mask}", 5, []) == {}


def test_chinese_words_are_edited_character_by_character() -> None:
    found = Editor(0, {}).edits("{text}总的来说{mask}。", 10, [])
    assert any(len(text) == len("{text}总的来说{mask}。") - 1 for text in found)
    assert all(" " not in text for text in found)


def test_mining_finds_the_sentences_that_tell_a_pair() -> None:
    lines = [
        "ana lives in lund .",
        "bea lives in berg .",
        "lund is where ana works .",
        "ana and bea in lund and berg",
        "{ana} in lund",
    ]
    pairs = [("ana", "lund"), ("bea", "berg"), ("an", "lun"), ("", "x")]
    assert mined(lines, pairs, "sub", "mask", 2) == ["{sub} lives in {mask} .", "{mask} is where {sub} works ."]
    assert mined(["王安住在河村。"], [("王安", "河村")], "sub", "answer", 5) == ["{sub}住在{answer}。"]
    assert "{{{sub}}} in {mask}" in mined(lines, pairs, "sub", "mask", 9)


def test_files(tmp_path: Path) -> None:
    templates, words = tmp_path / "t.txt", tmp_path / "s.txt"
    templates.write_text("{text} {mask}\n\nQ: {text}\\nA: {mask}\n")
    assert listed(str(templates)) == ["{text} {mask}", "Q: {text}\nA: {mask}"]
    words.write_text("was: seemed, felt\n\nall: everything\n")
    assert synonyms_of(str(words)) == {"was": ["seemed", "felt"], "all": ["everything"]}
    assert len(paraphrased(START, synonyms_of(str(words)))) == 4
    words.write_text("was seemed\n")
    with pytest.raises(TuningError, match="has the line 'was seemed': write a word, a colon"):
        synonyms_of(str(words))
    templates.write_text("\n")
    with pytest.raises(TuningError, match="holds no templates: write one a line"):
        listed(str(templates))
    with pytest.raises(TuningError, match="is no file: give the path of a text file"):
        listed(str(tmp_path / "none"))
