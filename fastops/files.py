"""Files that are written as a whole or not at all."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk and in the place of ``path`` when the block has ended; after an error the old one stays.

    A link stays one, permissions stay, and what is no regular file, as ``/dev/stdout``, is written to directly. Raises
    ``OSError``.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    if path.is_symlink():  # still: it leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            if path.exists():
                part.chmod(path.stat().st_mode)
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
