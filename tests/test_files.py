"""Files that somebody named to be written."""

import os
import stat
import threading
from pathlib import Path

import pytest

from eventor.look.files import write_file


@pytest.fixture(autouse=True)
def usual_mask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_new_file_has_the_mode_that_others_have(tmp_path):
    write_file(tmp_path / "new", b"all")
    assert (tmp_path / "new").read_bytes() == b"all"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644


def test_a_link_goes_on_to_lead_where_it_leads(tmp_path):
    (tmp_path / "link").symlink_to("target")
    for content in (b"first", b"second"):
        write_file(tmp_path / "link", content)
        assert (tmp_path / "target").read_bytes() == content
        assert (tmp_path / "link").readlink().name == "target"


def test_a_file_with_two_names_stays_one(tmp_path):
    (tmp_path / "one").write_bytes(b"before, and longer")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    write_file(tmp_path / "one", b"after")
    assert (tmp_path / "two").read_bytes() == b"after"


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_file(tmp_path / "pipe", b"all")
    reader.join()
    assert found == [b"all"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_a_file_of_another_group_keeps_it(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    others = [group for group in os.getgroups() if group != os.getegid()]
    if os.geteuid() == 0:
        others.append(12345)
    if not others:
        pytest.skip("this user has one group alone")
    os.chown(tmp_path / "file", -1, others[-1])
    write_file(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"after"
    assert (tmp_path / "file").stat().st_gid == others[-1]


def test_where_nothing_can_be_put_beside_it_a_file_is_written_as_it_stands(tmp_path, monkeypatch):
    opened = Path.open

    def refusing(path, mode="r", **options):
        if path.parent == tmp_path and "x" in mode:
            raise PermissionError(f"Permission denied: {path}")
        return opened(path, mode, **options)

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(Path, "open", refusing)
    write_file(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"after"
    with pytest.raises(PermissionError):
        write_file(tmp_path / "new", b"after")
