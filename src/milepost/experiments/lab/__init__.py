"""The resume laboratory: what a restart costs, and which part of it costs what."""
