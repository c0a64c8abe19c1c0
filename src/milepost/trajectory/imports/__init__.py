"""Readers of trajectories that other programs wrote, one file a format; see `formats`."""
