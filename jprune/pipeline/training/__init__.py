"""Training runs over a checkpoint, whatever is trained."""
