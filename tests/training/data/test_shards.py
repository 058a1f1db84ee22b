"""The token cache: what it holds, when it is reused, and that damage and races do no harm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from piperjax.training.data import shards
from piperjax.training.data.corpus import Corpus
from piperjax.training.data.shards import default_cache_dir, open_token_store
from piperjax.training.data.tokenizer import ByteTokenizer

TEXTS = ["one", "Grüße", "a longer third document", "4"]
END = ByteTokenizer.end_of_document


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Corpus(name="texts", files=(path,))


def open_store(corpus, tmp_path, **settings):
    reports = []
    store = open_token_store(
        corpus, ByteTokenizer(), cache_dir=tmp_path / "cache", report=reports.append, **settings
    )
    return store, reports


def documents(store):
    """Returns the texts in a store, checking that each ends in the end-of-document token."""
    stops = np.cumsum(store.document_tokens)
    parts = [store.tokens(np.arange(a, b)) for a, b in zip([0, *stops[:-1]], stops, strict=True)]
    assert all(part[-1] == END for part in parts)
    return [ByteTokenizer().decode(part) for part in parts]


@pytest.mark.parametrize(("shard_tokens", "num_shards"), [(1 << 20, 1), (12, 3), (1, 4)])
def test_all_documents_are_kept_in_order(corpus, tmp_path, shard_tokens, num_shards):
    store, reports = open_store(corpus, tmp_path, shard_tokens=shard_tokens)
    assert documents(store) == TEXTS
    assert len(store.shards) == num_shards
    assert store.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert store.token_counts.sum() == store.num_tokens == sum(len(text.encode()) + 1 for text in TEXTS)
    assert store.token_counts[END] == store.num_documents == 4
    assert store.shards[0].dtype == np.uint16
    assert not reports


def test_offsets_may_come_in_any_order_and_from_any_shard(corpus, tmp_path):
    whole, _ = open_store(corpus, tmp_path / "whole")
    cut, _ = open_store(corpus, tmp_path / "cut", shard_tokens=8)
    offsets = np.random.default_rng(0).integers(0, whole.num_tokens, 200)
    np.testing.assert_array_equal(whole.tokens(offsets), cut.tokens(offsets))


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
    class WideTokenizer(ByteTokenizer):
        vocab_size = 70_000
        end_of_document = 69_999
        fingerprint = "wide"

    store = open_token_store(corpus, WideTokenizer(), cache_dir=tmp_path)
    assert store.shards[0].dtype == np.uint32
    assert store.tokens(np.array([3])) == 69_999


def test_a_second_opening_reads_nothing(corpus, tmp_path, monkeypatch):
    first, _ = open_store(corpus, tmp_path)
    monkeypatch.setattr(shards, "read_documents", lambda path: pytest.fail("the data were read again"))
    second, reports = open_store(corpus, tmp_path)
    assert documents(second) == TEXTS
    assert second.content == first.content
    assert not reports


def test_changed_data_or_tokenizer_is_another_cache(corpus, tmp_path):
    class OtherTokenizer(ByteTokenizer):
        fingerprint = "other"

    first, _ = open_store(corpus, tmp_path)
    other = open_token_store(corpus, OtherTokenizer(), cache_dir=tmp_path / "cache")
    corpus.files[0].write_text('{"text": "new"}')
    changed, _ = open_store(corpus, tmp_path)
    assert len({first.path, other.path, changed.path}) == 3
    assert len({first.content, other.content, changed.content}) == 3
    assert documents(changed) == ["new"]


def test_content_does_not_depend_on_place_and_time(corpus, tmp_path):
    first, _ = open_store(corpus, tmp_path)
    moved = corpus.files[0].rename(tmp_path / "b.jsonl")
    os.utime(moved, (1, 1))
    second, _ = open_store(Corpus(name="moved", files=(moved,)), tmp_path)
    assert first.path != second.path
    assert first.content == second.content


def _cut_shard(path):
    file = path / "tokens-00000.bin"
    file.write_bytes(file.read_bytes()[:-2])


def _lose_shard(path):
    (path / "tokens-00000.bin").unlink()


def _cut_documents(path):
    file = path / "documents.npy"
    file.write_bytes(file.read_bytes()[:-8])


def _other_documents(path):
    np.save(path / "documents.npy", np.ones((3, 4), np.uint64))


def _empty_counts(path):
    (path / "counts.npy").write_bytes(b"")


def _cut_index(path):
    (path / "index.json").write_text('{"key": ')


def _foreign_index(path):
    index = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(index | {"key": "of other data"}))


def _list_index(path):
    (path / "index.json").write_text("[]")


def _not_a_directory(path):
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.write_text("something else")


@pytest.mark.parametrize(
    "damage",
    [
        _cut_shard,
        _lose_shard,
        _cut_documents,
        _other_documents,
        _empty_counts,
        _cut_index,
        _foreign_index,
        _list_index,
        _not_a_directory,
    ],
)
def test_a_damaged_cache_is_built_again_with_a_message(corpus, tmp_path, damage):
    first, _ = open_store(corpus, tmp_path)
    damage(first.path)
    second, reports = open_store(corpus, tmp_path)
    assert documents(second) == TEXTS
    assert second.path == first.path
    assert len(reports) == 1
    assert reports[0].startswith(f"token cache {first.path} is damaged or of another kind (")
    assert reports[0].endswith("); building it again")
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_a_failed_build_leaves_nothing(corpus, tmp_path):
    with corpus.files[0].open("a") as file:
        file.write("{")
    with pytest.raises(ValueError, match="a.jsonl line 5 is not valid JSON"):
        open_store(corpus, tmp_path)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_leftovers_of_killed_processes_are_removed(corpus, tmp_path):
    store, _ = open_store(corpus, tmp_path)
    leftover = store.path.rename(store.path.with_name(f"{store.path.name}.tmp-0123"))
    open_store(corpus, tmp_path)
    assert not leftover.exists()


def test_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": ""}\n')
    with pytest.raises(
        ValueError, match="texts holds no documents, only empty ones; give data with text in it"
    ):
        open_store(Corpus(name="texts", files=(path,)), tmp_path)


def test_a_cache_directory_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cannot write the token cache .*: .*; name another cache directory"):
        open_store(corpus, tmp_path)


def test_file_systems_without_locks(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    store, _ = open_store(corpus, tmp_path)
    assert documents(store) == TEXTS


def test_a_slower_process_keeps_the_cache_of_a_faster_one(corpus, tmp_path, monkeypatch):
    """Without locks both build; the second finds the first's files in place and discards its own."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    read = shards.read_documents

    def overtaken(path):
        monkeypatch.setattr(shards, "read_documents", read)
        faster, _ = open_store(corpus, tmp_path)
        inodes.append((faster.path / "index.json").stat().st_ino)
        yield from read(path)

    inodes: list[int] = []
    monkeypatch.setattr(shards, "read_documents", overtaken)
    slower, _ = open_store(corpus, tmp_path)
    assert documents(slower) == TEXTS
    assert inodes == [(slower.path / "index.json").stat().st_ino]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


RACER = """
import sys
from pathlib import Path
from piperjax.training.data.corpus import Corpus
from piperjax.training.data.shards import open_token_store
from piperjax.training.data.tokenizer import ByteTokenizer
files = tuple(sorted(Path(sys.argv[1]).glob("*.txt")))
store = open_token_store(Corpus(name="race", files=files), ByteTokenizer(), cache_dir=Path(sys.argv[2]))
print(store.content, int(store.shards[0].sum(dtype="int64")), (store.path / "index.json").stat().st_ino)
"""


def test_processes_that_race_end_with_the_same_files(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(300):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number} " * 1000)
    command = [sys.executable, "-c", RACER, str(tmp_path / "texts"), str(tmp_path / "cache")]
    root = Path(shards.__file__).parents[3]
    racers = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [racer.communicate(timeout=120)[0].splitlines()[-1] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(set(lines)) == 1


def test_the_default_cache_directory_follows_the_desktop_standard(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "piperjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "piperjax"
