"""CPU seconds (user and system) that commands take before they work, beside a bare interpreter and `import jax`.

    python scripts/bench_start.py [FOLDER]

With a FOLDER that holds a model also `jprune info FOLDER`. Each is run three times; the least counts.
"""

import resource
import subprocess
import sys


def cpu_seconds(*words: str) -> float:
    """CPU seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints a line for each."""
    jprune = ("-m", "jprune")
    calls = [("-c", "pass"), ("-c", "import jax"), ("-c", "import jprune"), (*jprune, "--help")]
    calls += [(*jprune, *words.split(), "--help") for words in ("prune", "info", "prune wanda", "tune lora")]
    calls += [(*jprune, "info", folder) for folder in sys.argv[1:]]
    for words in calls:
        print(f"{min(cpu_seconds(*words) for _ in range(3)):6.2f}  python {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
