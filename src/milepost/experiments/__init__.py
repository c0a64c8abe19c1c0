"""Whole roads: the demo."""
