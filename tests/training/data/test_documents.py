"""Every kind and compression of input file, and the sentence for everything that can be wrong with one."""

import bz2
import gzip
import json
import lzma
import sys

import pytest

from piperjax.training.data.documents import COMPRESSIONS, is_readable, read_documents

arrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["first Grüße\r\n", "second\n\nparagraph", "3"]

COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(column, name="text"):
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table({name: column}), sink)
    return sink.getvalue().to_pybytes()


def read(path):
    return list(read_documents(path))


def written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".md", ".rst", ".py", ".TXT"])
def test_a_text_file_is_one_document(tmp_path, kind, compression):
    path = written(tmp_path / f"a{kind}{compression}", COMPRESS[compression](TEXTS[0].encode()))
    assert is_readable(path)
    assert read(path) == TEXTS[:1]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_json_line_is_a_document(tmp_path, compression):
    content = jsonl({"id": number, "text": text} for number, text in enumerate(TEXTS))
    path = written(tmp_path / f"a.b.jsonl{compression}", COMPRESS[compression](content))
    assert read(path) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_parquet_row_is_a_document(tmp_path, compression, kind):
    column = arrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(arrow, kind)())
    path = written(tmp_path / f"a.parquet{compression}", COMPRESS[compression](table(column)))
    assert read(path) == TEXTS


def test_empty_documents_blank_lines_and_byte_order_marks_are_passed_over(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\n\n{"text": ""}\n  \n{"text": "b"}'
    assert read(written(tmp_path / "a.jsonl", content)) == ["a", "b"]
    assert read(written(tmp_path / "a.txt", b"\xef\xbb\xbfa")) == ["a"]
    assert read(written(tmp_path / "b.txt", b"")) == []
    assert read(written(tmp_path / "a.parquet", table(["", "a"]))) == ["a"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_files_of_several_streams_are_read_whole(tmp_path, compression):
    parts = [COMPRESS[compression](part) for part in (b"one ", b"two ", b"three" * 100_000)]
    assert read(written(tmp_path / f"a.txt{compression}", b"".join(parts))) == [
        "one two " + "three" * 100_000
    ]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_cut_compressed_files_are_noticed(tmp_path, compression, kept):
    content = COMPRESS[compression](jsonl({"text": str(number)} for number in range(50_000)))
    path = written(tmp_path / f"a.jsonl{compression}", content[: int(len(content) * kept)])
    with pytest.raises(
        ValueError, match=rf"a.jsonl{compression} is not a whole .* file \(.*; fetch or compress"
    ):
        read(path)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_files_that_only_claim_to_be_compressed(tmp_path, compression):
    path = written(tmp_path / f"a.txt{compression}", b"plain text, not compressed at all")
    with pytest.raises(ValueError, match=rf"a.txt{compression} is not a whole .* file"):
        read(path)


JSON_ERRORS = {
    b"{": r"line 2 is not valid JSON \(Expecting property name.*\); each line must be one object",
    b"text": r"line 2 is not valid JSON \(Expecting value\)",
    b"[" * 100_000: "line 2 is not valid JSON",
    b"[]": "line 2 must be a JSON object with a field 'text', but is a list",
    b'"text"': "line 2 must be a JSON object with a field 'text', but is a string",
    b"1": "line 2 must be a JSON object with a field 'text', but is a number",
    b"{}": r"line 2 has no field 'text' \(its fields: none\)",
    b'{"content": "a", "id": 1}': r"line 2 has no field 'text' \(its fields: content, id\); rename the field",
    b'{"text": 1}': "line 2: field 'text' must be a string, but is a number",
    b'{"text": true}': "line 2: field 'text' must be a string, but is a boolean",
    b'{"text": null}': "line 2: field 'text' must be a string, but is null",
    b'{"text": ["a"]}': "line 2: field 'text' must be a string, but is a list",
    b'{"text": {}}': "line 2: field 'text' must be a string, but is an object",
    b'{"text": "\\ud800"}': "line 2: field 'text' holds half a surrogate pair, which is no text",
    b'{"text": "\0"}': "line 2 holds a NUL byte, so it is binary or not UTF-8",
    b'{"text": "\xe9"}': r"line 2 is not UTF-8 \(byte 0xe9\); convert the file or leave it out",
}


@pytest.mark.parametrize("line", JSON_ERRORS, ids=lambda line: line[:12].decode("latin-1"))
def test_json_errors_name_file_and_line(tmp_path, line):
    path = written(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="a.jsonl " + JSON_ERRORS[line]):
        read(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"one\ntwo\nth\0ree",
            "a.txt line 3 holds a NUL byte, so it is binary or not UTF-8; give text in UTF-8",
        ),
        (b"one\nGr\xfc\xdfe", r"a.txt line 2 is not UTF-8 \(byte 0xfc\); convert the file or leave it out"),
        ("one\ntwo".encode("utf-16"), "a.txt line 1 holds a NUL byte"),
    ],
)
def test_binary_text_errors_name_file_and_line(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(written(tmp_path / "a.txt", content))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"a.parquet is not a whole parquet file, reading stopped after 0 rows \("),
        (b"PAR1 no", "a.parquet is not a whole parquet file"),
        (table(TEXTS)[:-20], "a.parquet is not a whole parquet file"),
        (table([1, 2]), "a.parquet: column 'text' must hold strings, but holds int64"),
        (table([["a"]]), "a.parquet: column 'text' must hold strings, but holds list<"),
        (
            table(TEXTS, name="body"),
            r"a.parquet has no column 'text' \(its columns: body\); rename the column",
        ),
        (table(["a", None]), "a.parquet row 2: column 'text' is null; drop such rows"),
    ],
)
def test_parquet_errors(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(written(tmp_path / "a.parquet", content))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*a.txt: No such file or directory"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.parquet", "pyarrow", "pyarrow"),
        ("a.txt.zst", "zstandard", "zstandard"),
        ("a.txt.xz", "lzma", "lzma"),
        ("a.txt.bz2", "bz2", "bz2"),
    ],
)
def test_absent_packages(tmp_path, monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{name} needs the package {package}.*, which is not installed"):
        read(written(tmp_path / name, b"anything"))


@pytest.mark.parametrize("name", ["a", "a.gz", "a.json", "a.txt.zip", "a.tar.gz", "txt"])
def test_unknown_kinds_are_not_readable(tmp_path, name):
    assert not is_readable(tmp_path / name)
