"""The jprune command."""

from jprune.cli.main import main as main
