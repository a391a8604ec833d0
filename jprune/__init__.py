"""Prune language models in JAX."""
