import pytest

from piperjax.planner.text_file import write_text


def test_what_is_written_is_there(tmp_path):
    write_text(str(tmp_path / "a.svg"), "\u00b5s")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == "\u00b5s"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot write .*nowhere.*; give a file in an existing folder"):
        write_text(str(tmp_path / "nowhere" / "a.svg"), "")
