"""What is marked as new in a completion against the one before it."""

from __future__ import annotations

import pytest

from milepost.trajectory.samples import MAX_WORDS_COMPARED, Piece, marked, sample_groups


def new_words(text: str, before: str) -> list[str]:
    pieces, _ = marked(text, before=before)
    assert "".join(piece.text for piece in pieces) == text
    return [piece.text for piece in pieces if piece.is_new]


def test_only_words_that_the_completion_before_lacks_are_marked() -> None:
    before = "The cat sat on the mat. It slept."
    assert new_words("The cat lay on the red mat. It slept.", before) == ["lay", "red"]


def test_shared_first_sentence_is_not_marked_and_its_end_is() -> None:
    before = "The year was one of peace. And so."
    pieces, words = marked("The year was one of peace. The harvest was good.", before=before)
    assert pieces == (
        Piece("The year was one of peace. ", is_new=False),
        Piece("The harvest was good.", is_new=True),
    )
    assert words == "4 of 10 words new"


@pytest.mark.parametrize(
    ("text", "before", "words"),
    [
        ("same words", "same words", "the same as before"),
        ("all other", "nothing shared here", "written anew"),
        ("one of four shared", "one", "3 of 4 words new"),
        ("one of the five shared", "one", "written anew"),
        ("words", "", "written anew"),
        (" \n", "words", ""),
        ("", "words", ""),
    ],
)
def test_change_in_words(text: str, before: str, words: str) -> None:
    pieces, change = marked(text, before=before)
    assert change == words
    if change != "3 of 4 words new":
        assert [piece.is_new for piece in pieces] in ([], [False])


def test_white_space_is_kept_and_never_underlined() -> None:
    assert new_words("a b\n\n  c d  e\n", "a b d") == ["c", "e"]


def test_words_beyond_the_bound_are_neither_compared_nor_marked() -> None:
    shared = "word " * MAX_WORDS_COMPARED
    pieces, change = marked(shared + "another end", before=shared + "end")
    assert not any(piece.is_new for piece in pieces)
    assert change == f"0 of the first {MAX_WORDS_COMPARED} words new"


def test_each_completion_is_compared_with_the_one_shown_before() -> None:
    records = [
        {"step": step, "prompt": "Once", "completion": text}
        for step, text in ((200, "upon a time there was"), (0, "the the"), (100, "upon a time"))
    ]
    [group], _ = sample_groups(records, prompts=[])
    assert [c.change for c in group.completions] == ["", "written anew", "2 of 5 words new"]
    assert group.completions[2].pieces[-1] == Piece("there was", is_new=True)
