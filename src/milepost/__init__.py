"""Milepost: pretrain a LLaMA from scratch, exactly, and see every mile of the way."""

__version__ = "0.1.0"
