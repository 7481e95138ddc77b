"""The syntax of templates: what each slot is, what it renders to, and what is refused."""

import pytest

from lightning_peft import TuningError
from lightning_peft.prompting import Template
from lightning_peft.prompting.template_parts import Answer, Field, Mask, Options, Soft, Text, options_text

SST2 = "Review: {text}\nSentiment: {answer}"


def test_parts() -> None:
    template = Template("{{x}} {title!}, {body} {v:3}{mask} {v:2} {options}\n{answer}")
    assert template.parts == (
        Text("{x} "),
        Field("title", shortens=False),
        Text(", "),
        Field("body"),
        Text(" "),
        Soft(3, first=0),
        Mask(),
        Text(" "),
        Soft(2, first=3),
        Text(" "),
        Options(),
        Text("\n"),
        Answer(),
    )
    assert template.fields == ("title", "body")
    assert (template.num_virtual_tokens, template.has_options, template.is_cloze) == (5, True, True)


def test_a_prompt_ends_in_no_blank_and_the_answer_brings_it() -> None:
    template = Template(SST2)
    assert template.prompt({"text": "good"}) == "Review: good\nSentiment:"
    assert template.render({"text": "good"}) == "Review: good\nSentiment:"
    assert template.render({"text": "good"}, answer="Positive") == "Review: good\nSentiment: Positive"
    assert template.render({"text": "good", "answer": "Positive"}) == "Review: good\nSentiment: Positive"
    assert template.prompt({"text": "good", "answer": "Positive"}) == "Review: good\nSentiment:"
    assert template.prompt({"text": ""}) == "Review: \nSentiment:"
    assert template.lead == " "


@pytest.mark.parametrize(
    ("text", "before", "lead"),
    [
        ("Q: {q}\nA: {answer}", "Q: x\nA:", " "),
        ("Q: {q}\nA:", "Q: x\nA:", " "),
        ("Q: {q}\n", "Q: x\n", ""),
        ("Q: {q}\n{answer}", "Q: x\n", ""),
        ("{q} {answer}", "x", " "),
        ("{q}", "x", " "),
    ],
)
def test_where_the_answer_begins(text: str, before: str, lead: str) -> None:
    assert Template(text).prompt({"q": "x"}) == before
    assert Template(text).lead == lead
    assert Template(text).render({"q": "x"}, answer="y") == f"{before}{lead}y"


def test_a_template_without_a_slot_is_rendered_as_it_is() -> None:
    assert Template("Hello, {name}! ").render({"name": "Ann", "answer": "no"}) == "Hello, Ann! "


def test_a_cloze_shows_its_mask() -> None:
    template = Template("{text} It was {mask}.")
    assert template.cloze() is template
    assert template.render({"text": "Good."}) == "Good. It was [MASK]."
    assert template.render({"text": "Good."}, mask="<mask>") == "Good. It was <mask>."
    assert template.render({"text": "Good."}, answer="great") == "Good. It was great."


def test_options_are_those_of_flan() -> None:
    assert options_text(["a", "b"]) == "OPTIONS:\n- a\n- b"
    template = Template("{text}\n{options}\n{answer}")
    assert template.render({"text": "x", "options": ["a", "b"]}) == "x\nOPTIONS:\n- a\n- b\n"
    assert template.render({"text": "x"}, options=["a", "b"], answer="b") == "x\nOPTIONS:\n- a\n- b\nb"
    with pytest.raises(TuningError, match="there are none: give options="):
        template.render({"text": "x"})


def test_what_a_row_says_is_never_parsed() -> None:
    assert Template("{text} is {mask}").render({"text": "{mask} {other} {{v:3}}"}) == "{mask} {other} {{v:3}} is [MASK]"


def test_values_of_fields() -> None:
    assert Template("{a}|{b}|{c}").render({"a": None, "b": 3, "c": 0.5}) == "|3|0.5"
    with pytest.raises(TuningError, match="field 'a' holds a dict: templates take texts and numbers"):
        Template("{a}").render({"a": {}})


def test_an_unknown_field() -> None:
    with pytest.raises(TuningError, match=r"asks for 'txt', rows have text, label: did you mean 'text'"):
        Template("{txt} {mask}").check_columns(["text", "label"])
    with pytest.raises(TuningError, match="template 'q' asks for 'zzz', rows have text: write braces of the text as"):
        Template("{zzz}", name="q").render({"text": "a"})


@pytest.mark.parametrize("text", ["{mask} {mask}", "{mask} {answer}", "{answer}{answer}"])
def test_two_slots_where_one_is_allowed(text: str) -> None:
    with pytest.raises(TuningError, match=r"has 2 slots for an answer: keep one|has [02] masks: a cloze needs"):
        Template(text).cloze()
    with pytest.raises(TuningError, match="has 2 slots for an answer: keep one"):
        Template(text).render({})


def test_no_mask_for_a_cloze() -> None:
    with pytest.raises(TuningError, match=r"has 0 masks: a cloze needs one \{mask\}"):
        Template(SST2).cloze()


@pytest.mark.parametrize(
    "slot",
    ["{}", "{text", "text}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{v:x}", "{0}", "{__import__('os')}", "{a b}"],
)
def test_no_slot(slot: str) -> None:
    with pytest.raises(TuningError, match=r"is no slot: write \{name\}"):
        Template(f"a {slot} b")


def test_no_template() -> None:
    for text in ("", "  ", None):
        with pytest.raises(TuningError, match="is no template: give a text with a slot"):
            Template(text)
    with pytest.raises(TuningError, match=r"\{v:0\} in .* has no virtual tokens: give 1 or more"):
        Template("{v:0} {text}")
