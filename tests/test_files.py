"""Files are written as a whole or not at all, and only where a file belongs."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastops.files import replacing


def test_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert order == ["fsync", "replace"]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def test_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_threads_write_one_file_whole(tmp_path: Path) -> None:
    def write(content: bytes) -> None:
        for _ in range(20):
            with replacing(tmp_path / "file") as file:
                file.write(content)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, (bytes([number]) * 9999 for number in range(4))))
    assert len(set((tmp_path / "file").read_bytes())) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_link_to_itself_is_an_error_of_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"), replacing(tmp_path / "loop") as file:
        file.write(b"new")


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with replacing(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe") as file:
        file.write(b"new")
    assert os.read(reader, 9) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
