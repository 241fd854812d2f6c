"""Outputs are whole or not there."""

import stat

import pytest

from sthisto._files import whole_file


def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("former")
    with pytest.raises(OSError, match="disk is full"):
        _fail_half_way(path)
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_share_a_draft(tmp_path):
    path = tmp_path / "out.txt"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer one is finished last
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions_are_kept(tmp_path):
    path, link = tmp_path / "out.txt", tmp_path / "link.txt"
    path.write_text("former")
    path.chmod(0o640)
    link.symlink_to(path)
    with whole_file(link) as draft:
        draft.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "out.txt") as draft:
        draft.touch(mode=0o600)
    assert (tmp_path / "out.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def _fail_half_way(path):
    with whole_file(path) as draft:
        draft.write_text("half")
        raise OSError("the disk is full")
