"""Errors, files, seeds, units, console and environment: what every layer may use."""
