"""What happens to a run from outside, by the numbers of docs/faults.md: real processes, signals."""
