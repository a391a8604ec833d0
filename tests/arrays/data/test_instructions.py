import gzip
import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from jprune import checkpoints, data
from jprune.checkpoints.huggingface.tokenizer import from_files
from jprune.data import chat
from jprune.data.instructions import ALPACA, ALPACA_WITH_INPUT
from jprune.errors import JpruneError
from jprune.models import families

# ChatML with a default system message, as the demo model has it.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def tokenizer_json(begins=True):
    """One token a byte, but for two line breaks, which merge; a BOS, unless told otherwise."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str().encode()


@dataclass
class Model:
    """What training data need of a checkpoint."""

    config: families.DecoderConfig
    hf_config: dict
    side_files: dict
    tokenizer: object = field(init=False)

    def __post_init__(self):
        self.tokenizer = from_files(self.side_files, self.hf_config)


@pytest.fixture
def model(tiny_config):
    def make(*, begins=True, context=512, vocab=300, files=(), template=CHATML, **options):
        hf_config = {**tiny_config, "vocab_size": vocab, "max_position_embeddings": context}
        named = {**TOKENIZER_CONFIG, **({"chat_template": template} if template else {}), **options}
        side_files = {"tokenizer.json": tokenizer_json(begins), "tokenizer_config.json": json.dumps(named).encode()}
        return Model(families.config(hf_config), hf_config, side_files | dict(files))

    return make


@pytest.fixture
def write(tmp_path):
    def write(*records, name="a.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    return write


def windows(model, path, **options):
    """All windows in the order of the file: tokens and weights of each."""
    got = data.evaluation_batches(path, model, batch_size=1, **options)
    return [(b["tokens"][0], b["weights"][0]) for b in got]


def learnt(model, tokens, weights):
    """The text of the tokens that carry loss, each stretch for itself."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
    decode = model.tokenizer.decode
    return [decode(tokens[a:b].tolist(), skip_special_tokens=False) for a, b in zip(edges[::2], edges[1::2])]


# --- Alpaca -----------------------------------------------------------------------------------------------------------


def test_layout_of_a_record_by_hand(model, write):
    model = model()
    path = write({"instruction": "Add.", "input": "1 {2}", "output": "3"}, {"instruction": "Hi", "output": "Ho"})
    first, second = windows(model, path, length=400)
    encode = model.tokenizer.encode
    for (tokens, weights), template, values, answer in (
        (first, ALPACA_WITH_INPUT, ("Add.", "1 {2}"), "3"),
        (second, ALPACA, ("Hi",), "Ho"),
    ):
        prompt = template.replace("{instruction}", values[0]).replace("{input}", values[-1])
        ids = [0, *encode(prompt, add_special_tokens=False), *encode(answer, add_special_tokens=False), 1]
        assert tokens.tolist() == ids + [0] * (400 - len(ids))  # no padding token is named: 0
        start = len(ids) - len(answer) - 1
        assert np.flatnonzero(weights).tolist() == list(range(start, len(ids)))
        assert set(weights.tolist()) == {0, 1}


def test_the_template_is_the_published_one():
    assert ALPACA_WITH_INPUT.format(instruction="I", input="J").endswith(
        "completes the request.\n\n### Instruction:\nI\n\n### Input:\nJ\n\n### Response:\n"
    )
    assert ALPACA.format(instruction="I").endswith("completes the request.\n\n### Instruction:\nI\n\n### Response:\n")
    start = "Below is an instruction that describes a task"
    assert ALPACA.startswith(f"{start}. Write a response")
    assert ALPACA_WITH_INPUT.startswith(f"{start}, paired with an input that provides further context. Write a")


def test_other_names_of_the_fields(model, write):
    model = model()
    usual = {"instruction": "a", "input": "b", "output": "c"}
    others = [
        {"instruction": "a", "context": "b", "response": "c"},
        {"instruction": "a", "input": "b", "context": None, "output": "c", "text": "everything"},
    ]
    expected, *got = windows(model, write(usual, *others))
    for window in got:
        np.testing.assert_array_equal(window, expected)
    plain, *got = windows(
        model, write({"instruction": "a", "output": "c"}, *({**usual, "input": i} for i in ("", "\n", None)))
    )
    for window in got:
        np.testing.assert_array_equal(window, plain)


def test_a_token_across_the_boundary_belongs_to_the_answer(model, write):
    model = model()
    [(tokens, weights)] = windows(model, write({"instruction": "a", "output": "\nb"}))
    assert learnt(model, tokens, weights) == ["\n\nb</s>"]  # the prompt ends with a line break


def test_train_on_prompt(model, write):
    model = model()
    path = write({"instruction": "a", "output": "b"})
    [(tokens, weights)] = windows(model, path, train_on_prompt=True)
    end = tokens.tolist().index(1) + 1
    assert weights.tolist() == [0] + [1] * (end - 1) + [0] * (256 - end)


def test_cut_at_the_length(model, write):
    model = model()
    prompt = 1 + len(model.tokenizer.encode(ALPACA.format(instruction="a"), add_special_tokens=False))
    path = write(
        {"instruction": "a", "output": "bcdef"},
        {"instruction": "a" * 9, "output": "b"},
        {"instruction": "a", "output": "b"},
    )
    got = data.evaluation_batches(path, model, batch_size=1, length=prompt + 2)
    (_, cut), (tokens, whole) = [(b["tokens"][0], b["weights"][0]) for b in got]
    assert cut.tolist() == [0] * prompt + [1, 1]
    assert tokens[-1] == 1
    assert whole.tolist() == [0] * prompt + [1, 1]
    assert got.notices == (
        f"{path}: 2 of 3 records longer than {prompt + 2} tokens, and cut there.",
        f"{path}: 1 of 3 records left out: no answer begins within {prompt + 2} tokens.",
    )
    with pytest.raises(JpruneError, match=r"none of its 3 records has an answer that begins within 20 tokens"):
        data.training_batches(path, model, batch_size=1, length=20)


def test_the_pad_token_and_an_unknown_end(model, write, tiny_config):
    path = write({"instruction": "a", "output": "b"})
    padded = model(pad_token={"content": "<|im_end|>", "special": True})
    [(tokens, _)] = windows(padded, path)
    assert tokens[-1] == 3
    endless = model(eos_token=None)
    endless.hf_config["eos_token_id"] = None
    [(tokens, weights)] = windows(endless, path)
    assert learnt(endless, tokens, weights) == ["b"]
    endless.hf_config["eos_token_id"] = [3, 1]
    [(tokens, weights)] = windows(endless, path)
    assert learnt(endless, tokens, weights) == ["b<|im_end|>"]


# --- conversations ----------------------------------------------------------------------------------------------------

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho\n"},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


@pytest.mark.parametrize("named", [False, True])
def test_messages_as_transformers_renders_them(model, write, tmp_path, named):
    transformers = pytest.importorskip("transformers")
    model = model(files={"chat_template.jinja": CHATML.encode()} if named else {}, template=None if named else CHATML)
    for name, content in model.side_files.items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talks = [TALK, [{"role": "system", "content": "No."}, *TALK[:2]], [*TALK[:2], TALK[2]]]
    got = windows(model, write(*({"messages": talk} for talk in talks)))
    for (tokens, weights), talk in zip(got, talks):
        ids = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert tokens.tolist() == ids + [0] * (256 - len(ids))
        assert learnt(model, tokens, weights) == [f"{m['content']}<|im_end|>" for m in talk if m["role"] == "assistant"]


TEMPLATES = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must take turns') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
        [" Ho\n</s>", " So.</s>"],
    ),
    # What a model thought is dropped once more is said, so the first answer has no certain place.
    "thinking": (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'assistant' and loop.last %}\n"
        "        {{- '<|im_start|>assistant\\n<think></think>' + m.content | trim + '<|im_end|>\\n' }}\n"
        "    {%- else %}\n"
        "        {{- '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}\n"
        "    {%- endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        ["<think></think>So.<|im_end|>"],
    ),
    "date": (
        "{% set day = strftime_now('%Y') if strftime_now is defined else '26 Jul 2024' %}{{ day | tojson }}"
        "{% for m in messages %}{% if m.role == 'never' %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
        None,
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_templates(model, write, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    template, answers = TEMPLATES[name]
    model = model(template=template)
    rendered = chat.template(model.side_files).render(TALK)
    if answers is None:  # the date of the day is what we leave out
        assert rendered.startswith('"26 Jul 2024"{"role": "user"')
        return
    for file, content in model.side_files.items():
        (tmp_path / file).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert rendered == theirs.apply_chat_template(TALK, tokenize=False)
    batches = data.evaluation_batches(write({"messages": TALK}), model, batch_size=1)
    [batch] = batches
    assert learnt(model, batch["tokens"][0], batch["weights"][0]) == answers
    assert ["1 answers without loss" in n for n in batches.notices] == [True] * (len(answers) < 2)


def test_a_template_is_found_by_name_and_is_kept_in_a_sandbox(model):
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert chat.template(model(template=several).side_files).render(TALK) == "Hi"
    assert chat.template(model(template=None).side_files) is None
    escape = chat.ChatTemplate("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", {})
    with pytest.raises(JpruneError, match="does not take these messages"):
        escape.render(TALK)
    with pytest.raises(JpruneError, match="chat template cannot be read"):
        chat.ChatTemplate("{% for %}", {})


# --- every kind of file, by one call ----------------------------------------------------------------------------------


def test_every_kind_of_file(model, tmp_path):
    model = model()
    rows = [{"instruction": f"{i}", "input": "", "output": "a" * (i + 1)} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    names = ["a.jsonl", "a.jsonl.gz", "a.json"]
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": TALK}]), tmp_path / "talk.parquet")
    all_batches = [data.training_batches(tmp_path / n, model, batch_size=2, epochs=2) for n in [*names, "a.parquet"]]
    assert len({b.fingerprint for b in all_batches}) == 1
    assert (all_batches[0].windows, all_batches[0].length, all_batches[0].per_epoch) == (5, 256, 2)
    assert data.training_batches(tmp_path / "talk.parquet", model, batch_size=1).windows == 1
    few = data.training_batches(tmp_path / "a.jsonl", model, batch_size=2, windows_at_most=3)
    assert few.windows == 3
    assert few.sha256 != all_batches[0].sha256


def test_the_hash_knows_the_weights(model, write):
    path = write({"instruction": "a", "output": "b"})
    got = {
        data.training_batches(path, model(), batch_size=1, train_on_prompt=p, length=n).sha256
        for p in (False, True)
        for n in (255, 256)
    }
    assert len(got) == 4


def test_instruction_data_resume(model, write):
    path = write(*({"instruction": f"{i}", "output": "a" * i} for i in range(20)))
    stream = iter(data.training_batches(path, model(), batch_size=3, epochs=2, seed=4))
    for _ in range(7):
        next(stream)
    again = iter(data.training_batches(path, model(), batch_size=3, epochs=2, seed=4))
    again.set_state(json.loads(json.dumps(stream.get_state())))
    rest, expected = list(again), list(stream)
    assert len(rest) == len(expected) == 5
    for a, b in zip(rest, expected):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(a["weights"], b["weights"])


def test_text_and_ids_by_the_same_call(model, write, token_file):
    model = model()
    path = write({"text": "abc"}, {"text": "defg"})
    text = data.training_batches(path, model, batch_size=2, length=5)
    same = data.token_batches(path, model.tokenizer, batch_size=2, length=5, eos_id=1)
    assert text.sha256 == same.sha256
    assert data.training_batches(token_file(), model, batch_size=6).length == 24
    assert data.training_batches(np.zeros((3, 4), np.int32), model, batch_size=2).windows == 3
    assert data.training_batches("pydoc", model, batch_size=2, length=64).windows > 1000
    [batch] = data.evaluation_batches(path, model, batch_size=1, length=5)
    expected = data.evaluation(path, model.tokenizer, length=5)
    np.testing.assert_array_equal(batch["tokens"], expected.tokens)


def test_datasets_of_the_hub(model, monkeypatch, write):
    class Dataset(list):
        column_names = ("instruction", "output")

    model = model()
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    monkeypatch.setattr("jprune.data.sources.hugging_face_dataset", lambda spec, split: (spec, Dataset(rows)))
    got = data.training_batches("hf:someone/alpaca", model, batch_size=2)
    assert got.sha256 == data.training_batches(write(*rows), model, batch_size=2).sha256


def test_a_checkpoint_is_such_a_model(tiny_model, token_file):
    got = data.training_batches(token_file(), checkpoints.load(tiny_model()), batch_size=3)
    assert (got.windows, got.per_epoch) == (6, 2)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [{"instruction": "a", "answer": "b"}],
            r"line 1: .*found fields \['answer', 'instruction'\].*'output' or",
        ),
        ([{"question": "a"}], r"line 1: expected an object with 'messages'.* found fields \['question'\]"),
        ([["a"]], "line 1: expected an object .*found list"),
        (
            [{"instruction": "a", "output": "b"}, {"text": "c"}],
            "line 2: .*as in the first record; found fields",
        ),
        ([{"instruction": "a", "output": "b"}, {"input": "c"}], "line 2: expected an object with"),
        ([{"instruction": "a", "output": 3}], "line 1: expected a string in field 'output', found int"),
        ([{"instruction": "a", "output": None}], "the field 'output' or 'response' is missing"),
        ([{"messages": []}], "line 1: expected a list of objects in field 'messages', found list"),
        ([{"messages": [{"from": "a"}]}], r"line 1, message 1: .*'role' and 'content', found fields \['from'\]"),
        ([{"messages": TALK[:1]}], r"line 1: expected a message of role 'assistant'.*found roles \['user'\]"),
        ([{"text": "a"}, {"instruction": "b", "output": "c"}], "line 2: expected .* string in field 'text'"),
        ([], "holds no records"),
    ],
)
def test_bad_records(model, write, records, message):
    with pytest.raises(JpruneError, match=message):
        data.training_batches(write(*records), model(), batch_size=1)


def test_messages_without_a_template_or_against_it(model, write):
    path = write({"messages": TALK}, {"messages": TALK[1:]})
    with pytest.raises(JpruneError, match=r"line 1: 'messages' need a chat template, .*chat_template.jinja"):
        data.training_batches(path, model(template=None), batch_size=1)
    with pytest.raises(JpruneError, match=r"line 2: the model's chat template does not take .*roles must take turns"):
        data.training_batches(path, model(template=TEMPLATES["mistral"][0]), batch_size=1)


def test_bad_files_and_numbers(model, write, tmp_path):
    path = write({"instruction": "a", "output": "b"})
    with pytest.raises(JpruneError, match=r"has 1 windows of 256 tokens .*, and one batch needs 2"):
        data.training_batches(path, model(), batch_size=2)
    with pytest.raises(JpruneError, match="more than the model's context of 64"):
        data.training_batches(path, model(context=64), batch_size=1, length=65)
    with pytest.raises(JpruneError, match=r"line 1: the tokenizer gives token id \d+, outside the model's \[0, 9\)"):
        data.training_batches(path, model(vocab=9), batch_size=1)
    (tmp_path / "a.json").write_text('{"instruction": "a"}')
    with pytest.raises(JpruneError, match=r"a.json: expected a JSON list of objects, found fields \['instruction'\]"):
        data.training_batches(tmp_path / "a.json", model(), batch_size=1)
    (tmp_path / "a.json").write_text("[1,")
    with pytest.raises(JpruneError, match=r"a.json: not JSON .*named .jsonl"):
        data.training_batches(tmp_path / "a.json", model(), batch_size=1)
    without = model()
    without.tokenizer = None
    with pytest.raises(JpruneError, match="comes without a tokenizer"):
        data.training_batches(path, without, batch_size=1)
    with pytest.raises(JpruneError, match=r"tokenizer_config.json beside the model is not JSON"):
        chat.special_tokens({"tokenizer_config.json": b"{"})
