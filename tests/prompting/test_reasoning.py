"""Answers in what a model wrote, votes, and the two stages of zero-shot chain of thought."""

import pytest

from lightning_peft import TuningError
from lightning_peft.prompting import answer_trigger, extract_answer, first_stage, majority, second_stage, solved


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1,234.", "1234"),
        ("-3 apples", "-3"),
        ("none", None),
        ("", None),
        ("The answer is 5. The answer is 7 or 8.", "7"),
        ("First 3, then 4, so 12", "12"),
        ("3-4", "4"),
        ("$1,234.50", "1234.5"),
        ("The answer is: 18.00", "18"),
        ("the ANSWER is −2", "-2"),
        ("it costs .5", "0.5"),
        ("x2 has no number", None),
        ("The answer is unknown", None),
        ("12,3456", "3456"),
        ("100", "100"),
        ("The answer is 3/4, not 5", "0.75"),
        ("The answer is 2 1/2", "2.5"),
        (r"The answer is \boxed{\frac{3}{4}}.", "0.75"),
        ("on 10/10/2024", "2024"),
        ("The answer is minus 5", "-5"),
        ("-$5", "-5"),
        ("1.5e6", "1500000"),
        ("The answer is 3 + 4 = 7, not 8", "7"),
        ("The answer is 5 since 5+1=6", "5"),
        ("8" * 400, None),
    ],
)
def test_numbers(text: str, answer: str | None) -> None:
    assert extract_answer(text, "number") == answer


def test_first_or_last() -> None:
    assert extract_answer("3-4", "number", pick="first") == "3"
    assert extract_answer("8, as 3 + 5 is 8", "number", pick="first") == "8"
    assert extract_answer("There is no way out, so yes", "yes_no") == "yes"
    assert extract_answer("No. Yes would be odd", "yes_no", pick="first") == "no"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("An answer is (C)", "C"),
        ("An answer is C.", "C"),
        ("A dog ate (b), so the answer is (b).", "B"),
        ("The answer is A", "A"),
        ("A man walks. Among A through E, the answer is D", "D"),
        ("I think A bird", None),
        ("A bird in the hand", None),
        ("B", "B"),
        ("It's E's", None),
        ("The answer is A because B is wrong", "A"),
        ("The answer is **b**.", "B"),
        ("The answer is a dog (C)", "C"),
        ("The answer is I think C", "C"),
        ("nothing here", None),
        ("(F)", None),
    ],
)
def test_choices(text: str, answer: str | None) -> None:
    assert extract_answer(text, "choice") == answer


def test_choices_of_the_data() -> None:
    assert extract_answer("(F)", "choice", choices="ABCDEF") == "F"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("The answer is yes.", "yes"), ("YES", "yes"), ("Nobody knows", None), ("So the answer is no, not yes", "no")],
)
def test_yes_or_no(text: str, answer: str | None) -> None:
    assert extract_answer(text, "yes_no") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('The last letters are "n" and "e". The answer is "ne".', "ne"),
        ("Paris.", "Paris"),
        ("I thought.\n\nIt is Paris", "It is Paris"),
        (" \n ", None),
        ("The answer is Paris.\nQ: what", "Paris"),
        ("The answer is", None),
    ],
)
def test_texts(text: str, answer: str | None) -> None:
    assert extract_answer(text, "text") == answer


def test_no_such_kind() -> None:
    with pytest.raises(TuningError, match="kind='date' is no kind of answer: take number, choice, yes_no, text"):
        extract_answer("1", "date")


def test_majority() -> None:
    assert majority(["a", "b", "a"]) == "a"
    assert majority([None, None, None, "b"]) == "b"
    assert majority([None, None]) is None
    assert majority([]) is None
    assert majority(["b", "a", "a", "b"]) == "b"
    assert majority(["b", "a", "a", "b"], [-3.0, -1.0, -2.0, -1.0]) == "a"
    assert majority(["b", "a", "a", "b"], [-1.0, -2.0, -2.0, -3.0]) == "b"
    assert majority(["b", "a", "a"], [0.0, -9.0, -9.0]) == "a"
    with pytest.raises(TuningError, match="2 answers have 1 scores"):
        majority(["a", "b"], [1.0])


@pytest.mark.parametrize(
    ("kind", "trigger"),
    [
        ("number", "Therefore, the answer (arabic numerals) is"),
        ("choice", "Therefore, among A through E, the answer is"),
        ("yes_no", "Therefore, the answer (Yes or No) is"),
        ("text", "Therefore, the answer is"),
    ],
)
def test_the_second_stage_ends_with_the_trigger(kind: str, trigger: str) -> None:
    assert answer_trigger(kind) == trigger
    first = first_stage("How many?")
    assert first == "Q: How many?\nA: Let's think step by step."
    assert second_stage(first, " 1 and 1 make 2.", trigger) == f"{first} 1 and 1 make 2. \n{trigger}"
    assert answer_trigger("choice", "ABC") == "Therefore, among A through C, the answer is"
    assert answer_trigger("number", after_rationale=False) == "The answer (arabic numerals) is"


def test_a_solved_demonstration_can_be_read_back() -> None:
    text = solved("There are 3 and 4 more, so 7 in all.", "7")
    assert text == "There are 3 and 4 more, so 7 in all. The answer is 7."
    assert extract_answer(text) == "7"
    assert solved("", "7") == "The answer is 7."
