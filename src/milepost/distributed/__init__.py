"""Processes: starting them, their world, and sums across them."""
