"""Repetition of a text, held against counting by hand and by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost.evaluation.text_quality import TextQuality, text_quality


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], TextQuality(None, None, None, 0)),
        ([5], TextQuality(1.0, None, None, 0)),
        ([5, 5], TextQuality(0.5, 1.0, None, 1)),
        ([1, 2, 3, 4], TextQuality(1.0, 1.0, 0.0, 0)),
        ([7] * 10, TextQuality(0.1, 1 / 9, 1 - 1 / 7, 9)),
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], TextQuality(5 / 9, 5 / 8, 1 / 6, 4)),
        ([1, 2, 1, 2, 1, 2], TextQuality(2 / 6, 2 / 5, 1 / 3, 4)),
    ],
)
def test_counts_are_those_made_by_hand(ids: list[int], expected: TextQuality) -> None:
    found = text_quality(ids)
    assert found.longest_repeat_tokens == expected.longest_repeat_tokens
    for name in ("distinct_1", "distinct_2", "repeated_4gram_fraction"):
        value = getattr(expected, name)
        # Quotients of small counts: a subtraction from 1 costs at most the last bit.
        assert getattr(found, name) == (None if value is None else pytest.approx(value, abs=1e-15))


@given(st.lists(st.integers(0, 3), max_size=30))
def test_the_longest_repeat_is_that_of_looking_everywhere(ids: list[int]) -> None:
    lengths = [
        length
        for length in range(1, len(ids))
        for first in range(len(ids) - length + 1)
        for second in range(first + 1, len(ids) - length + 1)
        if ids[first : first + length] == ids[second : second + length]
    ]
    assert text_quality(ids).longest_repeat_tokens == max(lengths, default=0)


def test_a_loop_scores_worse_than_prose_of_the_same_words() -> None:
    loop = text_quality([1, 2, 3, 4, 5] * 12)
    prose = text_quality([n * n % 11 + n // 7 for n in range(60)])
    assert loop.distinct_2 is not None and prose.distinct_2 is not None
    assert loop.distinct_2 < prose.distinct_2
    assert loop.longest_repeat_tokens == 55 > prose.longest_repeat_tokens
