"""Convert text to the letter case of a vocabulary, letter by letter."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator

# In Turkish and Azeri the dot makes another letter: i is not the small form of I.
TURKISH = {"I": "ı", "ı": "I", "İ": "i", "i": "İ"}
DOTTED_SMALL_I = "i\u0307"  # what Unicode's default rules, and `str.lower`, make of İ
FINAL_SIGMA = re.compile(r"(?<=[^\W\d_])Σ(?![^\W\d_])")


class LetterCase:
    """Replaces letters that are not in `characters` by their counterparts of the other case that are.

    Other characters stay as they are: nothing is replaced by another letter. If the characters contain ı or İ, the
    pairs are those of Turkish. Where the counterpart of a letter is several letters (ß and SS), all of them must be
    in `characters`. A letter that is there only as a base and combining marks is decomposed.
    """

    def __init__(self, characters: Collection[str]) -> None:
        self._table = _Table(characters)
        self._dotted = self._table.turkish and "\u0307" not in characters
        self._final_sigma = "ς" in characters and "Σ" not in characters

    def __call__(self, text: str) -> str:
        """Convert a text, which is in the form NFC. The result need not be."""
        if self._dotted:
            text = text.replace(DOTTED_SMALL_I, "İ")
        if self._final_sigma:  # the one letter whose small form depends on its place
            text = FINAL_SIGMA.sub("ς", text)
        return text.translate(self._table)


class _Table(dict[int, str]):
    """Code points and what they become, filled as they occur."""

    def __init__(self, characters: Collection[str]) -> None:
        super().__init__()
        self.characters = frozenset(characters)
        self.turkish = "ı" in self.characters or "İ" in self.characters

    def __missing__(self, code: int) -> str:
        self[code] = self._convert(chr(code))
        return self[code]

    def _convert(self, character: str) -> str:
        if character in self.characters:
            return character
        if self.turkish and character in TURKISH:
            return TURKISH[character] if TURKISH[character] in self.characters else character
        return next((form for form in _forms(character) if self.characters.issuperset(form)), character)


def _forms(character: str) -> Iterator[str]:
    """The counterparts of a character, single letters first, and then their decompositions."""
    folded = character.casefold()
    forms = [folded, character.upper()] if character.islower() else [folded.upper(), character.lower(), folded]
    forms += [character.title(), folded.upper()]
    if character == "ß":
        forms.append("ẞ")  # upper() makes SS of it
    composed = sorted((unicodedata.normalize("NFC", form) for form in forms), key=len)
    yield from composed
    yield from (unicodedata.normalize("NFD", form) for form in (character, *composed))


def change_case(text: str, case: str, *, turkish: bool) -> str:
    """Convert letters to `lower` or `upper` case, or `keep` them. Those without one counterpart stay as they are."""
    return "".join(_changed(character, case, turkish) for character in text)


def _changed(character: str, case: str, turkish: bool) -> str:
    if turkish and character in TURKISH and case != "keep":
        return TURKISH[character] if (character in "Iİ") == (case == "lower") else character
    found = character.lower() if case == "lower" else character.upper() if case == "upper" else character
    return found if len(found) == 1 else character
