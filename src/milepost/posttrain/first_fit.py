"""First fit: things of different lengths into as few rows of one length as is easily done."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Puts each thing, in order, into the first row that has room for it.

    At most 1.7 times as many rows as are needed (Johnson et al. 1974).

    Args:
        lengths: each 1 to `capacity`.
        capacity: of a row.

    Returns:
        For each row the places of its things in `lengths`, in order.
    """
    rows: list[list[int]] = []
    num_leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    # The room of row i lies at num_leaves + i, above it the most room of two: the first row with
    # enough is found in the tree's height. 52,000 things into 8,000 rows by looking at each row
    # would be 200 million looks.
    room = [capacity] * (2 * num_leaves)
    for number, length in enumerate(lengths):
        assert 1 <= length <= capacity
        node = 1
        while node < num_leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        row = node - num_leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
