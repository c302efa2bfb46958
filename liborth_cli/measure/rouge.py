"""ROUGE-L recall: how much of a reference comes up, in order, in what a model wrote (Lin 2004).

Words are runs of a–z and 0–9 after lower-casing, and those of more than three letters are stemmed, as in the `rouge-score`
package and in the TOFU benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from liborth_cli.measure.stem import stem


def words(text: str) -> list[str]:
    """Cut a text into stemmed words."""
    return [stem(word) if len(word) > 3 else word for word in re.findall(r"[a-z0-9]+", text.lower())]


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        now = [0]
        for index, their in enumerate(other):
            now.append(before[index] + 1 if word == their else max(before[index + 1], now[-1]))
        before = now
    return before[-1]


def recall(reference: str, written: str) -> float:
    """Return the share of the reference's words that are in the longest common subsequence; 0 where it has no words."""
    wanted = words(reference)
    return common_length(wanted, words(written)) / len(wanted) if wanted else 0.0
