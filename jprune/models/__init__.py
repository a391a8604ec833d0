"""The decoder, its families and generation."""
