"""One-shot pruning of a whole model, block by block, stage by stage."""
