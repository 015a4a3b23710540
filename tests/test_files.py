"""What is written appears whole or not at all."""

import pytest

from cheaplunch.files import whole_folder


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    for _ in ("new", "there already, empty"):
        with whole_folder(out) as unfinished:
            (unfinished / "part").mkdir()
            (unfinished / "part" / "one.txt").write_text("1")
            assert not out.exists() or not any(out.iterdir())
        assert list(out.parent.iterdir()) == [out]
        assert (out / "part" / "one.txt").read_text() == "1"
        (out / "part" / "one.txt").unlink()
        (out / "part").rmdir()


def test_of_a_folder_with_an_error_nothing_stays(tmp_path):
    with pytest.raises(ValueError, match="half"), whole_folder(tmp_path / "new") as unfinished:
        (unfinished / "one.txt").write_text("1")
        raise ValueError("half of it")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_stays_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OSError), whole_folder(tmp_path / "out") as unfinished:
        (unfinished / "one.txt").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
