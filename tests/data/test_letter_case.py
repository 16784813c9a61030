"""Letter case, one letter at a time: letters of several characters, of Turkish and Greek, and without a counterpart."""

from __future__ import annotations

import string

import pytest

from w2vscale.data.letter_case import LetterCase, change_case

TURKISH = "abcçdefgğhıijklmnoöprsştuüvyz"
GREEK = "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ"


@pytest.mark.parametrize(
    ("characters", "text", "expected"),
    [
        (string.ascii_lowercase, "GRÖSSE", "grÖsse"),
        (string.ascii_lowercase + "öß", "GRÖẞE Straße", "größe straße"),
        (string.ascii_uppercase + "ÖẞÄ", "größe", "GRÖẞE"),
        (string.ascii_uppercase, "straße ẞ", "STRASSE SS"),
        (string.ascii_lowercase, "straße ẞ", "strasse ss"),
        (string.ascii_letters, "Straße", "Strasse"),
        ("abc", "ß", "ß"),  # it has no s
        (string.ascii_uppercase + "äöüß", "Äpfel süß", "äPFEL Süß"),  # each letter by itself
        (TURKISH, "IĞDIR İZMİR", "ığdır izmir"),
        (TURKISH, "İzmir".lower(), "izmir"),  # i and a dot
        (string.ascii_uppercase + "İĞ", "ığdır izmir", "IĞDIR İZMİR"),
        (string.ascii_uppercase + "İ\u0307", "i\u0307", "İ\u0307"),
        (string.ascii_lowercase, "İ ı", "İ ı"),  # another letter than i
        (string.ascii_uppercase, "i ı İ", "I I İ"),  # I is the capital of ı everywhere
        (GREEK, "ΟΔΟΣ ΣΟΦΟΣ Σ", "οδος σοφος σ"),
        (GREEK.replace("ς", ""), "οδος ΣΑΣ", "οδοσ σασ"),
        (GREEK.upper(), "οδός", "ΟΔΌΣ"),
        ("ǆ", "Ǆǅǆ", "ǆǆǆ"),
        ("Ǆ", "Ǆǅǆ", "ǄǄǄ"),
        ("dž", "ǆ", "ǆ"),  # the same only in compatibility forms
        ("ʼn", "ŉ", "ʼn"),
        ("ʼN", "ŉ", "ʼN"),
        ("n", "ŉ", "ŉ"),
        ("fil", "ﬁl", "fil"),
        ("ªº", "ªº", "ªº"),
        ("ab", "中5'-", "中5'-"),
        ("o\u0301", "ó Ó", "o\u0301 o\u0301"),  # only as a base and a mark
        ("abAB", "Ab", "Ab"),
    ],
)
def test_a_letter_becomes_its_counterpart_or_stays(characters: str, text: str, expected: str) -> None:
    assert LetterCase({*characters, " "})(text) == expected


def test_changing_all_letters() -> None:
    assert change_case("Ab ßİıǅ", "upper", turkish=False) == "AB ßİIǄ"
    assert change_case("ABİI", "lower", turkish=False) == "abİi"
    assert change_case("Iİıi", "lower", turkish=True) == "ıiıi"
    assert change_case("Iİıi", "upper", turkish=True) == "IİIİ"
    assert change_case("Iİıi", "keep", turkish=True) == "Iİıi"
