"""After pretraining: instructions, adapters, what changed, and how sensitive a model is."""
