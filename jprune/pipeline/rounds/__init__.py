"""Prune-and-Tune: rounds of pruning with training between them."""
