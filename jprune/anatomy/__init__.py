"""What a checkpoint is made of, from shapes alone: its parts, kernels and prunable units."""
