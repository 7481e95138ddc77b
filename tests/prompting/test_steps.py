"""Sums in chains of thought: what is a step, which are wrong, which are unused, and what they come to."""

from fractions import Fraction

import pytest

from lightning_peft.prompting.steps import check_steps


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5 + 6 = 11", [("5 + 6 = 11", True)]),
        (
            "2 cans of 3 tennis balls: 2 * 3 = 6 tennis balls. 5 + 6 = 12.",
            [("2 * 3 = 6 tennis balls", True), ("5 + 6 = 12", False)],
        ),
        (
            "所以还有23 - 20 = 3个。他们又买了6个,所以现在有6 + 3 = 9个。",
            [("23 - 20 = 3个", True), ("6 + 3 = 9个", True)],
        ),
        ("３×４＝１２个", [("3×4=12个", True)]),
        ("$1,200 / 2 = $600", [("1,200 / 2 = $600", True)]),
        ("15% * 200 = 30", [("15% * 200 = 30", True)]),
        ("(2 + 3) x 4 = 20 and 2 + 3 x 4 = 14", [("(2 + 3) x 4 = 20 and", True), ("2 + 3 x 4 = 14", True)]),
        ("10 / 3 = 3.33", [("10 / 3 = 3.33", True)]),
        ("10 / 3 = 3.4", [("10 / 3 = 3.4", False)]),
        ("10 / 3 = 3", [("10 / 3 = 3", False)]),
        ("1 / 0 = 5", [("1 / 0 = 5", False)]),
        ("48 / 2 = <<48/2=24>>24", [("48/2=24", True)]),
        ("2 + 3 = 5 + 4 = 9", [("2 + 3 = 5 + 4 = 9", True)]),
        ("3 balls + 4 balls = 7 balls", [("3 balls + 4 balls = 7 balls", True)]),
        ("-3 + 5 = 2", [("-3 + 5 = 2", True)]),
        ("x = 5, 7 = 7, f(x) = 3, __import__('os') = 1", []),
        ("(2 + 3 = 5", []),
        ("x + 1 = 3, y - 1 = 4, 3 * x = 12, 2x + 3 = 7, 2y + 3 = 7", []),
        ("so -3 + 5 = 2, 5-3=2", [("-3 + 5 = 2", True), ("5-3=2", True)]),
        ("2 + = 3", []),
        ("-3 - 4 = -7", [("-3 - 4 = -7", True)]),
        ("1/2 + 1/4 = 3/4, 8 / 3 = 2 2/3", [("1/2 + 1/4 = 3/4", True), ("8 / 3 = 2 2/3", True)]),
        ("12 * 2 = 24 / 2 = 12", [("12 * 2 = 24 / 2 = 12", True)]),
        ("3(4 + 1) = 15, so 3 (2 + 1 = 3)", [("3(4 + 1) = 15", True), ("2 + 1 = 3", True)]),
        ("2^3 + 1 = 9, 3² = 9, 2**3 = 9", [("2^3 + 1 = 9", True), ("3² = 9", True), ("2**3 = 9", False)]),
        ("1.5万 + 5千 = 2万", [("1.5万 + 5千 = 2万", True)]),
        ("2 × 1½ = 3", [("2 × 1½ = 3", True)]),
        ("1) 3 + 4 = 7\n- 3 + 5 = 8\n* **3 + 6 = 9**", [("3 + 4 = 7", True), ("3 + 5 = 8", True), ("3 + 6 = 9", True)]),
        (r"$3 \times 4 + 1 = 13$", [(r"3 \times 4 + 1 = 13", True)]),
        ("7 / 2 = 3 R 1, 6÷4=1余2, 7 ÷ 2 = 3……1", []),
        ("√16 + 1 = 5, sin(30) = 0.5, 9^999 = 1, Step 12:3 + 1 = 4", [("3 + 1 = 4", True)]),
        ("no numbers", []),
    ],
)
def test_steps(text: str, found: list[tuple[str, bool]]) -> None:
    assert [(step.text, step.right) for step in check_steps(text).steps] == found


def test_what_is_wrong_unused_and_consistent() -> None:
    good = check_steps("9 - 7 = 2. 2 + 8 = 10. 10 - 1 = 9.", "9")
    assert (len(good.wrong), len(good.unused), good.consistent, good.holds) == (0, 0, True, True)
    idle = check_steps("9 - 7 = 2. 4 + 4 = 8. 2 + 8 = 10. 3 * 3 = 9.", "10")
    assert [step.said for step in idle.unused] == [9]
    assert (idle.consistent, idle.holds) == (False, False)
    wrong = check_steps("9 - 7 = 3. 3 + 8 = 11.", "11")
    assert [step.value for step in wrong.wrong] == [Fraction(2)]
    assert (wrong.consistent, wrong.holds) == (True, False)
    assert check_steps("It is 9.", "9").consistent is None
    assert check_steps("4 + 5 = 9").holds
    assert [step.said for step in check_steps("4 + 5 = 9. 1 + 1 = 2.").unused] == [9]


def test_decimals_of_other_languages() -> None:
    assert check_steps("1,5 + 1,5 = 3", decimal=",").steps[0].right
    assert check_steps("1.000 + 1 = 1.001", decimal=",").steps[0].value == 1001
    assert [step.right for step in check_steps("Schritt 1: 12 : 4 = 3. 1 234 + 1 = 1 235", decimal=",").steps] == [
        True
    ] * 2


def test_long_nonsense_is_quick() -> None:
    assert check_steps("(" * 400 + "1 + 1 = 2").steps == ()
    assert check_steps("9" * 5000 + " + 1 = 3").steps == ()
    assert check_steps("1" + "^1" * 3000 + " = 1").steps == ()
    assert check_steps("5 " + "-" * 3001 + "3 = 2").steps[0].value == 2
    assert check_steps("-2^2 + 5 = 1").holds, "a power binds more than a sign"
