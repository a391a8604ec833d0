"""What a run will take: memory, time, and the layout that fits."""
