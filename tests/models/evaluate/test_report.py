"""The page of a comparison: its numbers are those of the object, it is whole HTML, and names cannot break out of it."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest

from jprune.evaluate.report import page, thinned
from jprune.evaluate.report.drawing import heat_map

VOID = {"meta", "br", "wbr"}


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def kernels(share):
    names = ("attn/q", "attn/o", "mlp/down")
    return [
        {"path": f"blocks/{i}/{n}/kernel", "zeros": int(100 * share) + i, "size": 100} for i in range(3) for n in names
    ]


LAYERS = [{"d_model": 8, "heads": 2, "kv_heads": 1, "d_ff": 16}] * 3
DENSE = {
    "model": "dense",
    "sparsity": {"zeros": 0, "prunable_parameters": 900, "total_parameters": 1234},
    "kernels": kernels(0),
    "layers": LAYERS,
    "nbytes": 4_936_000,
    "perplexity": interval(12.125, 11.25, 13.5),
    "change": interval(0, 0, 0),
    "divergence": interval(0, 0, 0),
    "tail": 0.0,
    "agreement": interval(1, 1, 1),
}
NAME = "/out/<script>alert('x')</script>&a-very-long-name-without-any-place-to-break-it-" + "x" * 90
PRUNED = {
    **DENSE,
    "model": NAME,
    "sparsity": {"zeros": 450, "prunable_parameters": 900, "total_parameters": 1234},
    "kernels": kernels(0.5),
    "layers": [*LAYERS[:2], {**LAYERS[2], "d_ff": 12}],
    "perplexity": interval(19.0625, 18.5, 20.75),
    "change": interval(0.5, 0.25, 0.75),
    "divergence": interval(0.4375, 0.4, 0.46),
    "tail": 3.25,
    "agreement": interval(0.625, 0.6, 0.65),
}
UNKNOWN = {
    **PRUNED,
    "model": "one-window",
    "perplexity": interval(19.5, None, None),
    "change": interval(0.01, None, None),
}
RECORD = {
    "recipe": {"method": "sparsegpt", "damping": 0.01, "keep_zeros": False},
    "kernels": [{**k, "loss": 0.5 + i} for i, k in enumerate(PRUNED["kernels"])],
    "seconds": {"total": 12.5},
    "peak_memory_bytes": 950_000_000,
}
LOSSES = {"loss": [[1, 4.5, ""], [2, 2.25, "mean of 3"]], "evaluation_loss": [[2, 3.125, ""]]}
ANSWERS = [
    {"accuracy": interval(0.75, 0.7, 0.8), "change": interval(0, 0, 0), "lost": 0, "gained": 0},
    {"accuracy": interval(0.625, 0.5, 0.7), "change": interval(-0.125, -0.25, -0.0625), "lost": 31, "gained": 6},
    {"accuracy": interval(0.745, 0.7, 0.8), "change": interval(-0.005, -0.03, 0.02), "lost": 9, "gained": 8},
]
COMPARISON = {
    "models": [DENSE, PRUNED, UNKNOWN],
    "text": "pydoc",
    "windows": 16,
    "sequence_length": 512,
    "sha256": "0123456789abcdef",
    "continuations": [
        {"prompt": "<b>Once", "texts": [{"model": m["model"], "text": "</div> upon"} for m in (DENSE, PRUNED, UNKNOWN)]}
    ],
    "tasks": [{"task": "sums", "metric": "acc", "filter": "none", "items": 200, "models": ANSWERS}],
    "records": [None, RECORD, None],
    "curves": [{}, {"losses": LOSSES}, {}],
    "notices": ["9 % of <the windows>"],
    "command": "jprune compare dense 'a b' --out report.html",
}


class Reader(html.parser.HTMLParser):
    """Which tags are open at each place, and what text there is."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.scripts, self.titles, self.cells, self.drawn = [], [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        given = dict(attrs)
        self.titles += [given["title"]] if "title" in given else []
        self.drawn += [given] if tag in ("circle", "polyline") else []
        self.cells += [given["data-value"]] if "data-value" in given else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        places = {"script": self.scripts, "style": self.scripts, "title": self.titles}
        places.get(inside, self.text).append(data)


@pytest.fixture(scope="module")
def read():
    reader = Reader()
    reader.feed(page(COMPARISON))
    reader.close()
    assert not reader.open
    return reader


def test_the_numbers_are_those_of_the_object(read):
    text = " ".join(read.text)
    for number in (
        "12.125",
        "[11.250, 13.500]",
        "+64.87",
        "0.4375",
        "3.250",
        "62.50",
        "[60.00, 65.00]",
        "1,234",
        "50.00",
    ):
        assert number in text, number
    (data,) = [s for s in read.scripts if s.lstrip().startswith("{")]
    assert json.loads(data) == COMPARISON
    assert {"12.125", "19.0625", "0.625", "50.0"} <= set(read.cells)
    assert f"{NAME}: 19.06 [18.5, 20.75]" in read.titles
    assert "layer 2, mlp/down: 52.0" in read.titles  # zeros
    assert "19.06 [18.5, 20.75]" in read.text, "beside its name: a small screen shows no more of the table"
    assert "layer 2, mlp/down: 0.085" in read.titles  # loss / size
    assert text.count("is not distinguishable from") == 1, "the one whose interval is not known"
    assert "method sparsegpt, damping 0.01" in text
    assert "keep_zeros" not in text


def test_a_map_says_what_its_colours_are():
    """From the least to the most; and where all are the same there is none."""
    drawn = heat_map({"blocks/0/attn/q/kernel": 0.25, "blocks/1/attn/q/kernel": 4.0}, ".3g", logarithmic=True)
    assert re.findall(r'"key soft">(.*?)<i .*?</i>(.*?)<', drawn) == [("0.25", "4")]
    assert heat_map({f"blocks/{i}/attn/q/kernel": 50.0 + i / 1000 for i in range(3)}, ".1f") == (
        "<p>50.0 in each of 3 kernels</p>"
    )


def test_plots(read):
    """Losses and sizes by layer: where the points lie, what each says, and all of it as a table too."""
    assert {"loss, step 1: 4.5", "loss, step 2: 2.25 (mean of 3)", "evaluation_loss, step 2: 3.125"} <= set(read.titles)
    assert "d_ff, layer 2: 75 (12 of 16)" in read.titles
    assert not [t for t in read.titles if t.startswith("d_model")], "it is what it was"
    high, low, between = ((float(own["cx"]), float(own["cy"])) for own in read.drawn[1:5] if "cx" in own)
    assert high[0] < low[0] == between[0]
    # 4.5, 2.25 and 3.125, upwards.
    assert (low[1] - between[1]) / (low[1] - high[1]) == pytest.approx((3.125 - 2.25) / (4.5 - 2.25), abs=0.01)
    assert len([own for own in read.drawn if "points" in own]) == 4, "two losses, and d_ff of two models"
    text = " ".join(read.text)
    assert "losses: all values" in text
    assert "9 % of <the windows>" in text


def test_a_long_line_is_thinned():
    points = [(step, float(step)) for step in range(1, 1002)]
    found = thinned(points, most=100)
    assert len(found) == 91
    assert (found[0].x, found[0].y, found[0].said) == (11, 6.0, "mean of 11")
    assert sum(p.y * (11 if p.said else 1) for p in found[:-1]) + found[-1].y * 11 == pytest.approx(sum(range(1, 1002)))


def test_answers(read):
    text = " ".join(read.text)
    for number in ("62.50", "-12.50", "[-25.00, -6.25]", "31", "74.50"):
        assert number in text, number
    assert text.count("not distinguishable") == 2, "of a perplexity, and of the answers of the last"


def test_what_is_of_others_is_text(read):
    assert len(re.findall("<script", page(COMPARISON))) == 2, "the data and the sorting"
    assert "</div> upon" in read.text
    assert NAME in " ".join(read.text)


def test_it_needs_nothing_else():
    whole = page(COMPARISON)
    assert not re.findall(r"https?://|src=|@import|url\(", whole)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const names = () => [...document.querySelector("table").tBodies[0].rows].map(r => r.cells[0].textContent);
  const heading = document.querySelectorAll("th button")[1];
  heading.click(); heading.click();
  const found = {wide, inner: innerWidth, names: names(), errors: window.errors ?? []};
  parent.document.body.dataset.found = JSON.stringify(found);
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_in_a_browser(tmp_path, width):
    """No error, nothing beyond the edge, and tables sort, from the most to the least at the second press."""
    first = "<script>window.errors = []; addEventListener('error', e => errors.push(e.message));</script>"
    whole = page(COMPARISON).replace("<head>", f"<head>{first}").replace("</body>", f"{PROBE}</body>")
    file = tmp_path / "report.html"
    # In a frame: the windows of a headless browser are at least 500 wide.
    file.write_text(f'<body><iframe width={width} height=900 frameborder=0 srcdoc="{html.escape(whole)}"></iframe>')
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--window-size=1500,1000", "--dump-dom", file.as_uri()]
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    wide = found.pop("wide")
    assert wide <= 0  # less by a scrollbar
    assert found == {"inner": width, "names": ["one-window", NAME, "dense"], "errors": []}
