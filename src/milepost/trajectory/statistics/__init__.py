"""What the numbers of a trajectory show, and what they do not; held to SciPy in the tests."""
