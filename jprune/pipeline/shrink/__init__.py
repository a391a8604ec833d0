"""Structured pruning of a whole model."""
