"""The block pipeline: whole models, one block at a time."""
