"""Bad data, tokenizers and models: every mistake is one sentence that says what to do, and nothing is begun."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from piperjax.training import cli


def write_jsonl(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))


def write_gzip_half(path):
    content = gzip.compress(b"to be or not to be " * 500)
    path.write_bytes(content[: len(content) // 2])


def write_parquet(path, column):
    pyarrow.parquet.write_table(pyarrow.table({column: ["a", "b"]}), path)


DATA_FILES = [
    ("missing", "missing.txt", None, ["missing.txt", "no file"]),
    ("empty", "a.txt", lambda path: path.write_text(""), ["a.txt", "empty"]),
    ("binary", "a.txt", lambda path: path.write_bytes(b"ab\0cd" * 100), ["a.txt", "binary"]),
    ("not unicode", "a.txt", lambda path: path.write_bytes(b"caf\xe9 " * 100), ["a.txt", "UTF-8"]),
    (
        "broken json",
        "a.jsonl",
        lambda path: write_jsonl(path, '{"text": "a"}', '{"text": '),
        ["a.jsonl", "line 2"],
    ),
    ("no field text", "a.jsonl", lambda path: write_jsonl(path, '{"body": "a"}'), ["a.jsonl", "text"]),
    ("text is a number", "a.jsonl", lambda path: write_jsonl(path, '{"text": 3}'), ["a.jsonl", "line 1"]),
    ("broken parquet", "a.parquet", lambda path: path.write_bytes(b"PAR1 nothing"), ["a.parquet"]),
    ("no column text", "a.parquet", lambda path: write_parquet(path, "body"), ["a.parquet", "text"]),
    ("unknown kind", "a.exe", lambda path: path.write_text("hello"), ["a.exe", ".txt"]),
    ("empty directory", "nothing", lambda path: path.mkdir(), ["nothing"]),
    ("glob of nothing", "nothing/*.txt", None, ["nothing/*.txt"]),
    ("cut off gzip", "a.txt.gz", write_gzip_half, ["a.txt.gz"]),
    ("not gzip", "a.txt.gz", lambda path: path.write_text("plain text"), ["a.txt.gz"]),
    ("too little text", "a.txt", lambda path: path.write_text("short"), ["a.txt", "too few", "32"]),
    ("stray comma", "text,,text", None, ["text,,text", "comma"]),
]


@pytest.mark.parametrize(
    ("path", "write", "words"), [row[1:] for row in DATA_FILES], ids=[row[0] for row in DATA_FILES]
)
def test_data_files(bad_input, here, capfd, path, write, words):
    if write is not None:
        write(here / path)
    before = bad_input.contents(here)
    code = cli.main([*bad_input.RUN.split(), "--data", path, "--out", "runs/new"])
    bad_input.assert_one_sentence(capfd, code, words)
    assert bad_input.contents(here) == before and not (here / "runs/new").exists()


def write_tokenizer(path, vocabulary):
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")).save(str(path))


def large_vocabulary():
    return {"<unk>": 0, "<|endoftext|>": 1} | {f"word{number}": number for number in range(2, 400)}


TOKENIZERS = [
    ("missing", "none.json", None, ["none.json"]),
    ("a directory without", "text", None, ["text", "tokenizer.json"]),
    ("not json", "t.json", lambda path: path.write_text("hello"), ["t.json"]),
    ("another json", "t.json", lambda path: path.write_text('{"a": 1}'), ["t.json"]),
    ("binary", "t.json", lambda path: path.write_bytes(bytes(range(256))), ["t.json"]),
    ("no end of document", "t.json", lambda path: write_tokenizer(path, {"<unk>": 0, "b": 1}), ["end"]),
    (
        "too many tokens",
        "t.json",
        lambda path: write_tokenizer(path, large_vocabulary()),
        ["'t.json' has 400 tokens", "vocab_size 257", "--set model.vocab_size=400"],
    ),
]


@pytest.mark.parametrize(
    ("path", "write", "words"), [row[1:] for row in TOKENIZERS], ids=[row[0] for row in TOKENIZERS]
)
def test_tokenizers(bad_input, here, capfd, path, write, words):
    if write is not None:
        write(here / path)
    before = bad_input.contents(here)
    code = cli.main([*bad_input.RUN.split(), "--tokenizer", path, "--out", "runs/new"])
    bad_input.assert_one_sentence(capfd, code, words)
    assert bad_input.contents(here) == before


def write_model(path, change):
    values = json.loads(path.with_name("bigram.json").read_text())
    change(values)
    path.write_text(json.dumps(values))


MODELS = [
    ("not json", lambda path: path.write_text("model"), ["m.json is not valid JSON"]),
    ("a list", lambda path: path.write_text("[]"), ["m.json", "must be an object"]),
    ("unknown field", lambda path: write_model(path, lambda v: v.update(width=3)), ["no field 'width'"]),
    (
        "missing field",
        lambda path: write_model(path, lambda v: v.pop("d_model")),
        ["needs the field 'd_model'"],
    ),
    ("no layers", lambda path: write_model(path, lambda v: v.update(layers=[])), ["layers"]),
    (
        "odd heads",
        lambda path: write_model(path, lambda v: v["layers"][0]["attention"].update(num_kv_heads=3)),
        ["num_kv_heads must divide num_heads"],
    ),
]


@pytest.mark.parametrize(("write", "words"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_model_files(bad_input, here, capfd, write, words):
    write(here / "m.json")
    code = cli.main([*bad_input.RUN.split(), "--model", "m.json", "--out", "runs/new"])
    bad_input.assert_one_sentence(capfd, code, words)
    assert not (here / "runs/new").exists()
