"""One short table a family."""
