"""Train state on disk: whole or absent; knows nothing of models."""
