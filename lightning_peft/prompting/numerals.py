"""Numbers in a text, in the digits and marks of any language; the values are decimal numbers with a point.

Digits of any script count as such, full-width ones too. ``1,234.5`` and ``1.234,5`` are read by the mark before
decimals of the language, and by their own marks where both stand in one number. A number may touch letters of a script
without blanks ("9个苹果") and no other ("x2"). Fractions are divided, and stay ``1/3`` where they have no end; a
percentage is the number before its sign. 百, 千, 万 and 亿 behind digits multiply them ("1万2千"), but not where they
begin a unit ("5千克"). Numbers in Han numerals count where they have a unit of ten ("三十五"); one of a single numeral
counts where the whole text is an answer (`han_number`), since 一 is a part of many words.
"""

import re
import unicodedata
from fractions import Fraction
from functools import cache

from lightning_peft.prompting.languages import LETTER

_BETWEEN_WIDE = re.compile(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))|(?<=\d)，(?=0\d\d(?!\d))")
_MARKS = str.maketrans("（）［］：；？！，．％＋－−﹣＊∗⋅／＝٫٬", "()[]:;?!\uff0c.%+---***/=.,")
"""Marks and what they are read as; the full-width comma stays: in Chinese it ends a clause."""
VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
"""Fractions of one character."""
_HAN_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_HAN_DIGITS |= {character: value for value, character in enumerate("壹贰叁肆伍陆柒捌玖", 1)} | {
    "貳": 2,
    "參": 3,
    "陸": 6,
}
_HAN_UNITS = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_DIGIT, _UNIT, _MYRIAD = ("".join(table) for table in (_HAN_DIGITS, _HAN_UNITS, _MYRIADS))
_NUMERAL = f"[{_DIGIT}{_UNIT}{_MYRIAD}廿卅]"
_SIGN = r"(?:-(?:[$€£¥]\s?)?|[负負]|零下)?"
# 零 of 零下 is a sign; 一 of 一共, 一样 and so on is no number, nor is 三点 of 三点十分.
_HAN_TEXT = rf"(?!零下|一[共起定直样樣些般切点旦致番緒])(?:{_NUMERAL}+(?:点[{_DIGIT}]+(?![{_UNIT}分]))?)"
_SHARED = rf"{_NUMERAL}+(?:点[{_DIGIT}]+)?|\d+(?:\.\d+)?"
_HAN = re.compile(rf"\s*({_SIGN})(?:({_NUMERAL}+|\d+)分之({_SHARED})|({_HAN_TEXT}))")
_BIG = rf"(?:[百千](?![克米瓦卡焦赫伏安帕字分货合位])[{_MYRIAD}]?|[{_MYRIAD}]{{1,2}})"
SCALED = rf"{_BIG}(?:\d{{1,4}}{_BIG})*(?:\d{{1,4}}(?![\d.,]))?"
"""What multiplies digits, with the digits that follow: 万2千 of 1万2千."""
_PART = re.compile(rf"([\d.]+)({_BIG})?")
_LONGEST = 300
"""What a number has at most [characters]; a longer one is nonsense that a model has repeated."""


def simple(text: str) -> str:
    """Return a text of the same length with ASCII digits, Latin letters, brackets and points for full-width ones.

    >>> simple("答案是（Ａ）：１，２３４")
    '答案是(A):1,234'
    """
    text = _BETWEEN_WIDE.sub(",", text)
    return "".join(_plain_letter(character) for character in text).translate(_MARKS)


def numbers(text: str, decimal: str = ".") -> list[str]:
    """Return the numbers in a text that is `simple`, without thousands separators and trailing zeros.

    >>> numbers("共3盒，每盒5个，$1,234.50"), numbers("1.234,5 kg", decimal=",")
    (['3', '5', '1234.5'], ['1234.5'])
    >>> numbers("1/2, 1/3, 1万2千, 三十五只")
    ['0.5', '1/3', '12000', '35']
    """
    return [_value(match, decimal) for match in _pattern(decimal).finditer(text) if len(match[0]) <= _LONGEST]


def han_number(text: str) -> str | None:
    """Return the number in Han numerals that a text begins with, or None.

    >>> han_number("三百零五个"), han_number("十二"), han_number("二〇二四年"), han_number("苹果")
    ('305', '12', '2024', None)
    >>> han_number("百分之五十"), han_number("四分之三"), han_number("三点一四"), han_number("一共")
    ('50', '0.75', '3.14', None)
    """
    match = _HAN.match(text)
    if match is None:
        return None
    sign, below, above, numerals = match.groups()
    value = _share(below, above) if below else _decimal(numerals)
    return _written(-value if sign else value)


def number_pattern(decimal: str) -> str:
    """Return the pattern of a number in digits, without a sign, for a language with this mark before decimals."""
    # What code writes as 1.5 is no thousand in a language that writes 1,5.
    point, comma = (r"\.", ",") if decimal == "." else (",", r"\.")
    mark = point if decimal == "." else r"(?:,|\.(?!\d{3}(?!\d)))"
    blank = "\u00a0\u202f'’" + (" " if decimal == "," else "")
    group, three = rf"[{comma}{blank}]", r"\d{3}(?!\d)"
    mixed = r"(?<!/)(?:\d+(?:[ ]|又))?\d+\s?/\s?[1-9]\d*(?![\d/])"
    foreign = rf"\d{{1,3}}(?:(?:{point}{three})+{comma}\d{{1,2}}|(?:{point}{three}){{2,}})(?!\d)"
    own = rf"(?:\d{{1,3}}(?:{group}{three})+|\d+)(?:{mark}\d+)?(?:{SCALED}|[eE][+-]?\d{{1,2}}(?!\w)|\s?[{VULGAR}])?"
    return rf"{mixed}|{foreign}|{own}|{mark}\d+|[{VULGAR}]"


def _plain_letter(character: str) -> str:
    if "\uff10" <= character <= "\uff5a" and character.isalnum():  # full-width digits and Latin letters
        return chr(ord(character) - 0xFEE0)
    if character.isdecimal() and not character.isascii():
        return str(unicodedata.decimal(character))
    return character


@cache
def _pattern(decimal: str) -> re.Pattern[str]:
    share = rf"(?P<below>{_NUMERAL}+|\d+)分之(?P<above>{_SHARED})"
    # Of Han numerals alone those with a unit, and with a digit before it: no 万一, no 十分.
    han = rf"(?<!{_NUMERAL})(?=[{_DIGIT}廿卅]+[{_UNIT}{_MYRIAD}]|[十拾][{_DIGIT}]|[廿卅])(?P<han>{_HAN_TEXT})"
    alone = rf"(?<!{LETTER})(?<!\.)"
    return re.compile(rf"{alone}(?P<sign>{_SIGN})(?:{share}|{han}|(?P<digits>{number_pattern(decimal)}))")


def _value(match: re.Match[str], decimal: str) -> str:
    if match["below"]:
        value = _share(match["below"], match["above"])
    elif match["han"]:
        value = _decimal(match["han"])
    else:
        value = _of_digits(match["digits"], decimal)
    return _written(-value if match["sign"] else value)


def _of_digits(said: str, decimal: str) -> Fraction:
    """Return the value of a number in digits, as `number_pattern` finds it."""
    if "/" in said:
        whole, above, below = re.findall(r"\d+", f"0 {said}")[-3:]
        return int(whole) + Fraction(int(above), int(below))
    if said[-1] in VULGAR:
        share = Fraction(unicodedata.numeric(said[-1])).limit_denominator(10)
        return (_of_digits(said[:-1].strip(), decimal) if said[:-1] else 0) + share
    said = re.sub(r"[\u00a0\u202f '’]", "", said)
    point = _point(said, decimal)
    said = said.replace("," if point == "." else ".", "").replace(point, ".")
    parts = _PART.findall(said) if re.search(f"[百千{_MYRIAD}]", said) else []
    return sum((Fraction(digits) * _size(unit) for digits, unit in parts), Fraction(0)) if parts else Fraction(said)


def _point(said: str, decimal: str) -> str:
    """Return the mark before the decimals of a number, which may be that of the other languages."""
    other = "," if decimal == "." else "."
    own = re.escape(decimal)
    if re.fullmatch(rf"\d{{1,3}}({own}\d{{3}})+{re.escape(other)}\d+|\d{{1,3}}({own}\d{{3}}){{2,}}", said):
        return other
    is_code = decimal == "," and "," not in said and not re.fullmatch(r"\d{1,3}(\.\d{3})+", said)
    return other if is_code else decimal


def _size(units: str) -> int:
    size = 1
    for unit in units:
        size *= _HAN_UNITS.get(unit) or _MYRIADS[unit]
    return size


def _share(below: str, above: str) -> Fraction:
    """Return what 二分之一 says; of a hundred, 百分之五, it is the number, as before a sign of percent."""
    whole, part = (Fraction(said) if said[0].isdecimal() else _decimal(said) for said in (below, above))
    return part if below == "百" else part / (whole or 1)


def _decimal(numerals: str) -> Fraction:
    """Return the value of Han numerals, perhaps with 点 before decimals."""
    whole, _, behind = numerals.replace("廿", "二十").replace("卅", "三十").partition("点")
    value = Fraction(_whole(whole))
    return value + Fraction(int(_digits(behind)), 10 ** len(behind)) if behind else value


def _digits(numerals: str) -> str:
    return "".join(str(_HAN_DIGITS[character]) for character in numerals)


def _whole(numerals: str) -> int:
    if all(character in _HAN_DIGITS for character in numerals):
        return int(_digits(numerals))
    total = section = digit = 0
    for character in numerals:
        if character in _HAN_DIGITS:
            digit = _HAN_DIGITS[character]
        elif character in _HAN_UNITS:
            section += (digit or 1) * _HAN_UNITS[character]
            digit = 0
        else:
            unit, part = _MYRIADS[character], section + digit
            total = (total + part or 1) * unit if total < unit else total + part * unit
            section = digit = 0
    return total + section + digit


def _written(value: Fraction) -> str:
    """Return a number as decimals where these end, else as a fraction."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    if below != 1:
        return str(value)
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = f"{abs(value.numerator) * 10**places // value.denominator:0{places + 1}d}"
    behind = f".{digits[-places:]}" if places else ""
    return f"{'-' if value < 0 else ''}{digits[: len(digits) - places]}{behind}"
