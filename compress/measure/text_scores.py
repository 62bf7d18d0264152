"""Scores of a written answer against the wanted one, between 0 and 1."""

from __future__ import annotations

import re

_WORD = re.compile(r"[a-z0-9]+")


def exact(written: str, wanted: str) -> float:
    """1 where both are the same but for white space."""
    return float(written.split() == wanted.split())


def rouge_l(written: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries"
    (2004), section 3.1, with equal weights of precision and recall.

    Words are runs of the letters a to z and digits in lower case, as the package rouge-score has them, without stems.
    """
    a, b = _WORD.findall(written.lower()), _WORD.findall(wanted.lower())
    length = _common(a, b)
    return 2 * length / (len(a) + len(b)) if length else 0.0


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time."""
    row = [0] * (len(b) + 1)
    for word in a:
        corner = 0  # row[i - 1] of the word before
        for i, other in enumerate(b, 1):
            corner, row[i] = row[i], corner + 1 if word == other else max(row[i], row[i - 1])
    return row[-1]
