"""`jprune` as one process of several, with two CPU devices; it can be made to die on the way.

    python one_of_many.py BLOCK WORDS...

BLOCK: how many blocks are pruned when it kills itself, as `kill -9` does; "never" to live.
"""

import contextlib
import importlib
import os
import signal
import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)

main = importlib.import_module("jprune.cli.main")  # the package has a function of this name
display = importlib.import_module("jprune.cli.display")


@contextlib.contextmanager
def progress():
    def show(step):
        if sys.argv[1] != "never" and step.phase == "prune" and step.done >= float(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

    yield show


if __name__ == "__main__":
    display.progress = progress
    sys.exit(main.main(sys.argv[2:]))
