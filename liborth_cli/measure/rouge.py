"""ROUGE-L recall: how much of a reference comes up, in order, in what a model wrote (Lin 2004), by the rouge-score library."""

from __future__ import annotations

from functools import cache
from typing import Any

from liborth_cli.errors import UsageError


@cache
def scorer() -> Any:
    """Return rouge-score's own scorer, with Porter's stems, as TOFU's numbers are published.

    Raises:
        UsageError: when the library is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UsageError("ROUGE needs the rouge-score library: pip install 'liborth[rouge]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def recall(reference: str, written: str) -> float:
    """Return the share of the reference's words that are in the longest common subsequence; 0 where it has no words."""
    return float(scorer().score(reference, written)["rougeL"].recall)
