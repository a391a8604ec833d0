"""`python -m jprune` is the `jprune` command."""

import sys

from jprune.cli import main

sys.exit(main())
