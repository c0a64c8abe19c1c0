"""How much a completion repeats itself, by counts alone: no judge, no second model.

Counted over the completion's own token ids, without the prompt, so that line ends and punctuation
that repeat are seen as well as words. Values of models with different tokenizers do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

REPEATED_LENGTH = 4
"""Length of the n-grams of `repeated_4gram_fraction`, tokens."""


@dataclass(frozen=True)
class TextQuality:
    """Repetition in one text; None where it has no n-gram of that length.

    Attributes:
        distinct_1: different tokens / tokens. Li et al. 2016 (arXiv 1510.03055).
        distinct_2: different pairs of neighbors / pairs. Li et al. divide by the number of
            tokens; by the number of pairs, a text that never repeats one has exactly 1.
        repeated_4gram_fraction: 1 - different 4-grams / 4-grams: the share of 4-grams that
            stood before in the text; seq-rep-4 of Welleck et al. 2019 (arXiv 1908.04319).
        longest_repeat_tokens: length of the longest stretch that stands at two places of the
            text, which may overlap; 0 where no token comes twice. A text of one token n times
            has n - 1.
    """

    distinct_1: float | None
    distinct_2: float | None
    repeated_4gram_fraction: float | None
    longest_repeat_tokens: int


def text_quality(token_ids: Sequence[int]) -> TextQuality:
    """Counts the repetition in a completion."""
    distinct_4 = _distinct_fraction(token_ids, REPEATED_LENGTH)
    return TextQuality(
        distinct_1=_distinct_fraction(token_ids, 1),
        distinct_2=_distinct_fraction(token_ids, 2),
        repeated_4gram_fraction=None if distinct_4 is None else 1 - distinct_4,
        longest_repeat_tokens=_longest_repeat(token_ids),
    )


def _num_distinct(token_ids: Sequence[int], length: int) -> int:
    grams = zip(*(token_ids[offset:] for offset in range(length)), strict=False)
    return len(set(grams))


def _distinct_fraction(token_ids: Sequence[int], length: int) -> float | None:
    count = len(token_ids) - length + 1
    return _num_distinct(token_ids, length) / count if count > 0 else None


def _longest_repeat(token_ids: Sequence[int]) -> int:
    """By bisection: where a stretch comes twice, so does every shorter one."""
    known, too_long = 0, len(token_ids)
    while too_long - known > 1:
        length = (known + too_long) // 2
        if _num_distinct(token_ids, length) < len(token_ids) - length + 1:
            known = length
        else:
            too_long = length
    return known
