"""Solvers: new weights that make up for what was pruned."""
