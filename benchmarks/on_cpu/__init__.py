"""Contenders of `benchmarks/step.py`, each in a process of its own."""
