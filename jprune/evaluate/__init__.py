"""What a model is worth after pruning."""
