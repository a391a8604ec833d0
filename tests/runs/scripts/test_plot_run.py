"""The plot of a run shows what its metrics say, where they say it."""

import json
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET

SCRIPT = pathlib.Path(__file__).parents[3] / "scripts" / "plot_run.py"
SVG = "{http://www.w3.org/2000/svg}"


def plot(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


def test_panels_and_points(tmp_path):
    lines = [
        {"step": 1, "loss": 4.0, "tokens_per_second": 5.0, "domain_weight/a": 0.25, "domain_weight/b<c": 0.75},
        {"step": 2, "loss": 3.0, "domain_weight/a": 0.25, "domain_weight/b<c": 0.75, "note": "no number"},
        {"step": 4, "loss": 2.0, "evaluation_loss": 3.5, "learning_rate": 0.0, "expected/heads": float("nan")},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = plot(tmp_path, "--out", tmp_path / "run.svg")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "losses": ["loss", "evaluation_loss"], "domain_weight": ["a", "b<c"], "learning_rate": ["learning_rate"],
    }  # fmt: skip
    image = ET.parse(tmp_path / "run.svg").getroot()
    losses, weights, rate = image.findall(f"{SVG}g")
    assert [g.find(f"{SVG}text").text for g in (losses, weights, rate)] == ["losses", "domain weight", "learning rate"]
    assert weights.findall(f"{SVG}text")[-1].text == "b<c"

    def points(line):
        return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]

    loss, evaluation = map(points, losses.findall(f"{SVG}polyline"))
    # Steps 1, 2, 4 and values 4, 3, 2 lie in these proportions; the highest is at the top, which has the smallest y.
    (x1, y1), (x2, y2), (x4, y4) = loss
    assert abs((x4 - x1) - 3 * (x2 - x1)) < 0.5
    assert abs((y2 - y1) - (y4 - y2)) < 0.5
    assert y1 < y2 < y4
    [(x, y)] = evaluation  # 3.5, between the first two
    assert x == x4
    assert abs(y - (y1 + y2) / 2) < 0.1
    assert len(losses.findall(f"{SVG}circle")) == 1


def test_no_metrics(tmp_path):
    done = plot(tmp_path)
    assert done.returncode == 2
    assert "metrics.jsonl is no file with metrics" in done.stderr
