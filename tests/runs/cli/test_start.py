"""What a command imports before it works, recipe files that are not right, and errors in the command line's words."""

import importlib
import io
import json
import os
import subprocess
import sys

import pytest

from jprune import texts
from jprune.cli import command, main
from jprune.errors import JpruneError, UsageError

parse = importlib.import_module("jprune.cli.main").parse
form_of = importlib.import_module("jprune.cli.main")._form


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        ("--help", ("jax", "numpy", "tyro", "jprune.methods", "jprune.checkpoints")),
        ("prune --help", ("jax", "numpy", "tyro", "jprune.methods", "jprune.checkpoints")),
        ("tune nonsense", ("jax", "numpy", "tyro", "jprune.tuning")),
        ("info --help", ("jax", "flax", "jprune.checkpoints", "jprune.models")),
        ("generate --help", ("jax", "flax", "jprune.checkpoints", "jprune.models")),
        ("prune wanda --help", ("jprune.tuning", "jprune.pipeline.oneshot.run", "transformers", "torch")),
    ],
)
def test_what_is_not_needed_is_not_imported(words, absent):
    program = (
        f"import sys\nfrom jprune.cli import main\ntry: main({words.split()!r})\nexcept SystemExit: pass\n"
        f"print([m for m in {absent!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("sparsty = 0.5", "unknown key 'sparsty'; did you mean 'sparsity'?"),
        ("nsamples = 4", "unknown key 'nsamples'; did you mean 'samples'?"),
        ("damping = 0.1", "key 'damping' is an option of `jprune prune sparsegpt`, and not of `jprune prune wanda`"),
        ('model = "x"', "key 'model' stands on the command line only"),
        ('sparsity = "half"', "key 'sparsity' must be a number; got 'half'"),
        ("samples = 4.0", "key 'samples' must be a whole number; got 4.0"),
        ("skip = 3", "key 'skip' must be a list; got 3"),
        ("plan = 1", "key 'plan' must be true or false; got 1"),
        ('format = "zip"', "key 'format' must be one of hf, jprune, decilm, orbax, packed; got 'zip'"),
        ('memory = "much"', "'much' is not an amount of memory"),
        ("memory = 1e400", "'inf' is not an amount of memory"),
        ('memory = "1e400"', "'1e400' is not an amount of memory"),
        (f"sparsity = {10**400}", "key 'sparsity' must be a number"),
        ("sparsity = 1979-05-27", "key 'sparsity' must be a number; got datetime"),
        ("seed = true", "key 'seed' must be a whole number; got True"),
        ("calibration = {a = 1}", "key 'calibration': is text; got 1"),
        ("overrides = 3", "is text; got 3"),
        ("overrides = {mlp = {sparsty = 1}}", "is no pattern"),
        ("[[sparsity]]\na = 1", "key 'sparsity' must be a number"),
        ('[overrides]\n"mlp" = "two"', "pattern 'two' is neither"),
    ],
)
def test_wrong_recipes(tmp_path, recipe, said):
    path = tmp_path / "r.toml"
    path.write_text(recipe)
    with pytest.raises(JpruneError) as error:
        parse("prune wanda", ["model", "--recipe", str(path)])
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "key" not in said or isinstance(error.value, UsageError)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_recipes_as_editors_save_them(tmp_path, encoding):
    for name, text in (("r.toml", 'sparsity = 0.5\nskip = "é"\n'), ("r.json", '{"sparsity": 0.5,\n "skip": "é"}')):
        (tmp_path / name).write_text(text, encoding=encoding, newline="\r\n")
        command = parse("prune wanda", ["model", "--recipe", str(tmp_path / name)])
        assert (command.pattern.made().sparsity, command.choice.skip) == (0.5, ("é",))


@pytest.mark.parametrize("content", [b'x = "\xff"', b"sparsity = 0.5\0", b"a = " + b"[" * 10**5, b"a = " + b"1" * 5000])
def test_recipes_that_cannot_be_read(tmp_path, content):
    for name, text in (("r.toml", content), ("r.json", content.partition(b"= ")[2])):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(JpruneError, match=name):
            parse("prune wanda", ["model", "--recipe", str(tmp_path / name)])


def test_words_as_their_user_meant_them():
    assert texts.argument("ü\n", "--prompt") == "ü\n"
    assert texts.argument("\udcc3\udcbc", "--prompt") == "ü"  # as the C locale has it
    for word in ("a\udcff", "\ud83d"):
        with pytest.raises(UsageError, match="--prompt is not UTF-8"):
            texts.argument(word, "--prompt")


@pytest.mark.parametrize("option", ["pruner", "tuning"])
@pytest.mark.parametrize("value", [["sparsegpt"], {"a": 1}, 3, "sparsgpt"])
def test_recipes_that_name_no_method(tmp_path, option, value):
    (tmp_path / "r.json").write_text(json.dumps({"sparsity": 0.5, option: value}))
    with pytest.raises(UsageError, match=f"key '{option}' must be one of .*; got"):
        parse("prune prune-and-tune", ["model", "--recipe", str(tmp_path / "r.json")])


def test_the_command_line_counts_more_than_the_recipe(tmp_path):
    path = tmp_path / "r.json"
    options = {"sparsity": 0.5, "per": "kernel", "skip": "one", "overrides": {"mlp/down": 0.3}, "memory": "6GB"}
    path.write_text(json.dumps({"recipe": {"method": "wanda", **options, "seed": None, "where": []}}))
    command = parse("prune wanda", ["model", "--recipe", str(path)])
    assert (command.pattern.made().sparsity, command.pattern.made().per) == (0.5, "kernel")
    assert command.choice.skip == ("one",)
    assert command.choice.overrides["mlp/down"].sparsity == 0.3
    assert command.machine.memory == 6 * 10**9
    command = parse(
        "prune wanda", ["model", "--recipe", str(path), "--pattern", "2:4", "--skip", "x", "--override", "a=1:2"]
    )
    assert str(command.pattern.made()) == "2:4"
    assert command.choice.skip == ("x",)
    assert list(command.choice.overrides) == ["a"]


def test_a_recipe_gives_what_is_required(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('pruner = "wanda"\ntuning = "lora"\nsparsity = 1e-1\nrounds = [0, 0.1]\nrank = 2\nwindows = 3\n')
    command = parse("prune prune-and-tune", ["model", "--recipe", str(path)])
    assert (command.sparsity, command.rounds) == (0.1, (0.0, 0.1))
    assert command.tuning_options.rank == 2
    assert command.data.windows_at_most == 3
    path.write_text("drop = 2\n")
    assert parse("prune layers", ["model", "--recipe", str(path)]).method.drop == 2


@pytest.mark.parametrize(("encoding", "read"), [("utf-8", "你ü"), ("cp1252", "?ü"), ("ascii", "??"), ("cp932", "??")])
def test_consoles_replace_the_characters_they_lack(monkeypatch, encoding, read):
    told = command.Told({"a": "你ü"}, ("notice 你ü",), lambda: print("你ü", flush=True))
    monkeypatch.setattr("jprune.cli.evaluate.EvalPerplexity.run", lambda self: told)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["eval", "perplexity", "m"]) == 0
    assert main(["info", "gibt es nicht 你ü"]) == 1
    assert out.buffer.getvalue().decode(encoding).split() == [read]
    assert err.buffer.getvalue().decode(encoding).startswith(f"notice {read}\njprune: gibt es nicht {read}")


@pytest.mark.parametrize("words", ["--help", "info --help", "prune nonsense", "eval perplexity m", "generate m"])
def test_nobody_reads_any_more(monkeypatch, words):
    """Nothing is said, and the status is that of a program that SIGPIPE ends."""
    told = command.Told({}, (), lambda: print("done"))
    monkeypatch.setattr("jprune.cli.evaluate.EvalPerplexity.run", lambda self: told)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "stderr", closed)
        assert main(words.split()) == 141


def test_a_full_disk_behind_stdout_and_no_stdout_at_all(monkeypatch, capsys):
    monkeypatch.setattr("jprune.cli.evaluate.EvalPerplexity.run", lambda self: command.Told({"a": 1}))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["eval", "perplexity", "m", "--json"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["eval", "perplexity", "m", "--json"]) == 0


@pytest.mark.parametrize(
    ("command", "text", "spelled"),
    [
        ("prune wanda", "lower `sequence_length` or `overrides`", "lower --sequence-length or --override"),
        ("tune full", "`windows_at_most` and `reference_losses`", "--windows and --reference-loss"),
        ("prune llm-pruner", "`units`, `share`, `round_to`", "--ratio, --parameter-ratio, --round-to"),
        ("prune shearing", "`clip`", "--clip"),
        ("info", "go on with `resume`; see `jprune prune x`", "go on with --resume; see `jprune prune x`"),
    ],
)
def test_options_in_texts_of_the_library_become_flags(command, text, spelled):
    assert form_of(command).spelled(text) == spelled


def test_errors_are_told_in_flags(tmp_path, capsys):
    assert main(["prune", "loraprune", "model", "--data", "x", "--ratio", "2", "--out", str(tmp_path / "out")]) == 1
    assert "jprune: --ratio lies between 0 and 1" in capsys.readouterr().err
