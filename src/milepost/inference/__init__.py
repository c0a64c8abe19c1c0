"""A checkpoint that writes: load, cache, sample."""
