"""Any long run: its folder, lock, activations on disk, output, interruption and report. Knows no method."""
