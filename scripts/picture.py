"""Makes a PNG of a page that jprune has written, as a browser of some width shows it; needs Chromium.

    jprune prune sparsegpt demo --sparsity 0.5 --samples 16 --sequence-length 512 --evaluate pydoc --report --out pruned
    python scripts/picture.py pruned/report.html report.png --width 1000 --height 1060

Without --height the whole page is in it. The page stands in a frame, because the windows of a headless browser are at
least 500 wide.
"""

import argparse
import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
TALL = """<script>addEventListener("load", () => {
  parent.document.body.dataset.tall = document.documentElement.scrollHeight;
});</script></body>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1400, help="pixels of the page")
    parser.add_argument("--height", type=int, help="pixels from its top; by default all")
    parser.add_argument("--scale", type=float, default=1.0, help="pixels of the picture for each of them")
    args = parser.parse_args()
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"expected one of {', '.join(NAMES)} on the PATH; install Chromium")
    text = args.page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        height = args.height or tall(browser, text, args.width, Path(scratch))
        file = framed(text, args.width, height, Path(scratch))
        words = [f"--window-size={args.width},{height}", f"--force-device-scale-factor={args.scale}"]
        shown(browser, file, *words, f"--screenshot={args.out.resolve()}")
    print(f"{args.out}: {args.width} x {height}, {args.out.stat().st_size / 1e3:.0f} kB")


def tall(browser: str, text: str, width: int, scratch: Path) -> int:
    """How many pixels high the page is at a width."""
    file = framed(text.replace("</body>", TALL), width, 100, scratch)
    found = re.search(r'data-tall="(\d+)"', shown(browser, file, "--dump-dom"))
    if found is None:
        raise SystemExit("the browser did not say how high the page is")
    return int(found[1])


def framed(text: str, width: int, height: int, scratch: Path) -> Path:
    """A file with the page in a frame."""
    file = scratch / "framed.html"
    style = "<style>body { margin: 0 } iframe { border: 0; display: block }</style>"
    frame = f'<iframe width={width} height={height} srcdoc="{html.escape(text)}"></iframe>'
    file.write_text(f'<!doctype html><meta charset="utf-8">{style}<body>{frame}</body>', encoding="utf-8")
    return file


def shown(browser: str, file: Path, *words: str) -> str:
    """What a headless browser says of a file."""
    always = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = f"--user-data-dir={file.parent / 'profile'}"
    done = subprocess.run(
        [browser, *always, profile, *words, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
