"""Which files a `--data` argument names, in which order, and what it says when there are none."""

import errno
import os

import pytest

from piperjax.training.data.corpus import find_corpus, standard_library


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.py", "a-.txt", "a/skip.png", "a/.hidden.txt", ".git/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "a" / "empty.txt").touch()
    return tmp_path


def names(tree, data):
    return [path.relative_to(tree).as_posix() for path in find_corpus(data).files]


def test_directories_are_searched_in_a_fixed_order(tree):
    assert names(tree, str(tree)) == ["a/b/c.py", "a/z.md", "a-.txt", "b.txt"]


def test_globs_match_files_and_directories(tree):
    assert names(tree, f"{tree}/*.txt") == ["a-.txt", "b.txt"]
    assert names(tree, f"{tree}/**/*.md") == ["a/z.md"]
    assert names(tree, f"{tree}/[ab]*") == ["a/b/c.py", "a/z.md", "a-.txt", "b.txt"]


def test_arguments_keep_their_order_and_files_come_once(tree):
    assert names(tree, f"{tree}/b.txt, {tree}/a,{tree}/*.txt") == ["b.txt", "a/b/c.py", "a/z.md", "a-.txt"]


def test_a_path_that_exists_is_taken_literally(tree):
    (tree / "x,[y].txt").write_text("text")
    assert names(tree, f"{tree}/x,[y].txt") == ["x,[y].txt"]


def test_relative_and_home_paths(tree, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    assert names(tree, "b.txt") == names(tree, "~/b.txt") == ["b.txt"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            "{}/none.txt",
            r"there is no file or directory .*none.txt; --data takes .txt, .md, .rst, .py, .jsonl and",
        ),
        ("{}/*.jsonl", r"nothing matches .*/\*.jsonl; --data takes"),
        ("{}/a/skip.png", "cannot tell what .*skip.png holds from its name; --data takes"),
        ("{}/a/*.png", "needs files with text in them, but none of the matches of .*png is one; it takes"),
        ("{}/a/empty.txt", "needs files with text in them, but .*empty.txt is empty"),
        ("{}/void", "needs files with text in them, but directory .*void holds none"),
        ("{}/b.txt,,", "has an empty path between its commas; remove the stray comma"),
        ("", "--data '' has an empty path"),
        ("~nobody-of-that-name/a.txt", "there is no file or directory"),
        ("x" * 5000, "there is no file or directory|cannot read"),
        ("a\0b", "there is no file or directory"),
    ],
)
def test_errors(tree, data, sentence):
    (tree / "void").mkdir()
    with pytest.raises(ValueError, match=sentence):
        find_corpus(data.format(tree))


def test_broken_links_are_not_passed_over(tree):
    (tree / "a" / "link.txt").symlink_to(tree / "gone.txt")
    with pytest.raises(ValueError, match="link.txt is a broken link or no regular file; mend or remove it"):
        find_corpus(str(tree))


def test_closed_directories_are_not_passed_over(tree, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if os.path.basename(path) == "a":
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match="cannot read .*/a: Permission denied"):
        find_corpus(str(tree))


def test_the_standard_library_is_real_text_without_tests():
    corpus = standard_library()
    stems = {path.name for path in corpus.files}
    assert {"argparse.py", "ast.py", "threading.py"} <= stems
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in corpus.files)
    assert corpus.num_bytes > 2_000_000
    assert corpus == find_corpus()
