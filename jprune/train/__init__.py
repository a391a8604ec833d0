"""Training: Optax transformations, LoRA, and one loop. Knows functions, pytrees and iterators; no model and no file."""
