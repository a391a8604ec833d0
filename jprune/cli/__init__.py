"""The jprune command."""
