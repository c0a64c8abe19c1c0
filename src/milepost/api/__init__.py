"""An OpenAI-compatible API to the checkpoints of a run: requests in, replies or a stream out."""
