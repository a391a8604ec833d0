"""Ways to train a checkpoint, and the methods that prune while they train."""
