"""Models of other libraries: what becomes of their parameters, each library in an environment of its own.

    python scripts/foreign_models.py [LIBRARY ...] [--environments FOLDER] [--json FILE]

A library gets a virtual environment with jprune's core (`pip install --no-deps`), kept in FOLDER if one is given. There
its model (scripts/foreign) is traced as it is; jprune.report accounts for its parameters, and half of what is prunable
is pruned by SparseGPT. Two things are checked that the trace does not know of:

    read     a leaf is never read if, and only if, the output stays the same where the leaf is changed
    error    SparseGPT changes the output less than the same share of the smallest weights does

Where a library reads Hugging Face folders, a small Llama goes there, is pruned there to 2:4, and comes back as such a
folder. jprune's own decoder, which knows nothing of the library, reads both folders: its logits are the library's,
before and after, and the zeros lie in the folder as the pattern wants them.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIBRARIES = {
    "flax": ("flax_nnx", "flax_linen", "flax_scan"),
    "equinox": ("equinox_transformer",),
    "dm-haiku": ("haiku_transformer",),
    "keras": ("keras_model",),
    "transformers<5": ("transformers_gpt2", "transformers_llama", "transformers_vit"),
    "torchax==0.0.13": ("torchax_llama",),
    "penzai": ("penzai_llama",),
    "qwix": ("qwix_lora", "qwix_int8"),
    "google-tunix": ("tunix_llama",),
    "gemma": ("gemma_decoder",),
    "maxtext": ("maxtext_decoder",),
}
"""What is installed, and the models that are made of it."""
ROUND_TRIPS = {"google-tunix": "tunix_round_trip", "maxtext": "maxtext_round_trip"}
"""Of those the ones that a Hugging Face folder goes to and comes back from."""
NEEDS = {
    "transformers<5": ("flax",),
    "torchax==0.0.13": ("torch==2.13.0", "transformers"),
    "qwix": ("flax",),
    "gemma": ("sentencepiece<0.2.2",),
    "maxtext": (
        "flax",
        "aqtp",
        "datasets",
        "drjax",
        "etils",
        "google-cloud-storage",
        "grain",
        "jinja2",
        "ml_collections",
        "omegaconf",
        "orbax-checkpoint",
        "pathwaysutils",
        "pillow",
        "psutil",
        "pydantic",
        "pyyaml",
        "qwix",
        "requests",
        "sentencepiece",
        "sympy",
        "tabulate",
        "tensorboardx",
        "tiktoken",
        "tokamax",
        "transformers",
    ),
}
"""What is installed beside: of MaxText's requirements, which all lie in extras, those that its model imports."""
NEWER = {"maxtext": (3, 12)}
"""The Python that a library needs, where it is newer than ours."""


def main() -> None:
    """Makes the environments, and prints a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"of {', '.join(LIBRARIES)}; all if none")
    parser.add_argument("--environments", type=Path, help="where they stay, for the next time")
    parser.add_argument("--json", type=Path, help="write the accounts here too")
    options = parser.parse_args()
    if unknown := set(options.libraries) - set(LIBRARIES):
        parser.error(f"unknown library {', '.join(sorted(unknown))}; there are {', '.join(LIBRARIES)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.environments or Path(temporary)
        found = []
        print(ROW.format("model", "of", "parameters", "prunable", "other", "skipped", "never read", "error", "misses"))
        for library in options.libraries or LIBRARIES:
            if sys.version_info < (version := NEWER.get(library, ())):
                print(f"{library}: left out; run this script with Python {'.'.join(map(str, version))}")
                continue
            python = environment(folder, library)
            for model in LIBRARIES[library]:
                found.append(said(python, "account", library, model))
                tell(found[-1])
            if library in ROUND_TRIPS:
                found.append(said(python, "round_trip", library, ROUND_TRIPS[library]))
                tell_trip(found[-1])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if any(a["misses"] for a in found):
        raise SystemExit("parameters without an account, or a round trip that loses something; see misses")


ROW = "{:20} {:22} {:>10} {:>9} {:>7} {:>8} {:>11} {:>14}  {}"


def tell(a: dict[str, Any]) -> None:
    """A line, and one more for each reason why something is skipped."""
    shares = [f"{100 * a['shares'][state]:.1f} %" for state in ("prunable", "other", "skipped", "never read")]
    errors = "{:.3f} < {:.3f}".format(*a["errors"])
    print(ROW.format(a["model"], a["version"], a["parameters"], *shares, errors, ", ".join(a["misses"]) or "none"))
    for reason in a["reasons"]:
        print(f"    skipped: {reason}")
    sys.stdout.flush()


def tell_trip(a: dict[str, Any]) -> None:
    """A line about a way to a library and back: the largest differences, and the zeros that came back."""
    differences = f"values {a['values']:.1e}, logits {a['dense']:.1e}, pruned {a['pruned']:.1e}"
    zeros = f"zeros {a['zeros']} of {a['masked']}"
    print(
        f"{a['round_trip']:20} {a['version']:22} {differences}; {zeros}  {', '.join(a['misses']) or 'none'}", flush=True
    )


def environment(folder: Path, library: str) -> Path:
    """The Python of a library's environment, which is made if it is not there."""
    place = folder.resolve() / package(library)
    python = place / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, library, *NEEDS.get(library, ()), "jax", "optax", "numpy"], check=True)
        subprocess.run([*install, "--no-deps", ROOT], check=True)
    return python


def package(library: str) -> str:
    """Its name, without the versions."""
    return re.split("[<=]", library)[0]


def said(python: Path, program: str, library: str, model: str) -> dict[str, Any]:
    """What one of the programs in scripts/foreign says of a model, in the model's own environment."""
    command = [python, ROOT / f"scripts/foreign/{program}.py", model, package(library)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
