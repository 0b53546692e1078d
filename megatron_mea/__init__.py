"""Distributed pre-training of language models with Multi-head Explicit Attention (arXiv 2601.19611)."""

__version__ = "0.1.0"
