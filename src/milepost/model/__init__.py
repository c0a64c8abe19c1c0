"""The LLaMA network and its loss; knows nothing of distribution."""
