"""Porter's stemmer with the extensions of NLTK, which is what ROUGE numbers are published with.

M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980. With V a run of vowels and C one of consonants a word is
[C](VC)^m[V], and m is its measure. The extensions: irregular forms, "ies" and "ied" after one letter, y after a consonant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

IRREGULAR = {
    "sky": "sky", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
    "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip

STEP_2 = [
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"), ("ator", "ate"),
    ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"), ("iviti", "ive"),
    ("biliti", "ble"), ("fulli", "ful"), ("logi", "log"),
]  # fmt: skip
STEP_3 = [
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
]  # fmt: skip
STEP_4 = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti", "ous",
    "ive", "ize",
]  # fmt: skip


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Return the stem of one lower-case word; words of one or two letters stay as they are."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _step_1c(_step_1b(_step_1a(word)))
    return _step_5(_step_4(_step_3(_step_2(word))))


def _consonant(word: str, index: int) -> bool:
    letter = word[index]
    if letter == "y":
        return index == 0 or not _consonant(word, index - 1)
    return letter not in "aeiou"


def _measure(word: str) -> int:
    kinds = [_consonant(word, i) for i in range(len(word))]
    return sum(now and not before for before, now in pairwise(kinds))


def _has_vowel(word: str) -> bool:
    return not all(_consonant(word, i) for i in range(len(word)))


def _doubled(word: str) -> bool:
    return len(word) >= 2 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _short(word: str) -> bool:
    """Tell whether a word ends consonant, vowel, consonant other than w, x, y; or is a vowel and a consonant."""
    last = len(word) - 1
    if len(word) == 2:
        return not _consonant(word, 0) and _consonant(word, 1)
    return (
        len(word) >= 3
        and _consonant(word, last - 2)
        and not _consonant(word, last - 1)
        and _consonant(word, last)
        and word[-1] not in "wxy"
    )


def _replace(word: str, rules: list[tuple[str, str]], allowed: Callable[[str], bool]) -> str:
    """Apply the first rule whose ending the word has, when what is left is allowed; otherwise nothing."""
    for ending, other in rules:
        if word.endswith(ending):
            left = word.removesuffix(ending)
            return left + other if allowed(left) else word
    return word


def _step_1a(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for ending, other in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending):
            return word.removesuffix(ending) + other
    return word


def _step_1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        left = word.removesuffix(ending)
        if left != word and _has_vowel(left):
            break
    else:
        return word
    if left.endswith(("at", "bl", "iz")):
        return left + "e"
    if _doubled(left):
        return left if left[-1] in "lsz" else left[:-1]
    return left + "e" if _measure(left) == 1 and _short(left) else left


def _step_1c(word: str) -> str:
    left = word[:-1]
    return left + "i" if word.endswith("y") and len(left) > 1 and _consonant(left, len(left) - 1) else word


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step_2(word[:-2])
    if word.endswith("logi"):
        # The measure is taken with the l, so that "logi" itself can go.
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, STEP_2, lambda left: _measure(left) > 0)


def _step_3(word: str) -> str:
    return _replace(word, STEP_3, lambda left: _measure(left) > 0)


def _step_4(word: str) -> str:
    ending = max((e for e in STEP_4 if word.endswith(e)), key=len, default="")
    left = word.removesuffix(ending)
    if not ending or _measure(left) <= 1 or (ending == "ion" and left[-1] not in "st"):
        return word
    return left


def _step_5(word: str) -> str:
    if word.endswith("e"):
        left = word[:-1]
        if _measure(left) > 1 or (_measure(left) == 1 and not _short(left)):
            word = left
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
