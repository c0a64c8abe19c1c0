"""Validation loss and samples of a model."""
