"""Files that a person has named to be written."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path

_DRAFT_NAME = 40
"""Characters of a file's name that its draft bears; a name has at most 255 bytes."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and leave to it what it is.

    What is replaced keeps its mode and its owner, and a link goes on leading to it. What is no
    regular file, has a second name, or belongs to somebody else is written as it stands.

    Args:
        path: where; the directory has to be there.
        content: all of it.

    Raises:
        OSError: it cannot be written. What was there is as it was, unless it had to be written as
            it stands.
        ValueError: the path is none, such as one with a NUL in it.
    """
    target = Path(os.path.realpath(path))
    try:
        there = target.stat()
    except FileNotFoundError:
        there = None
    if not (_is_plain(target, there) and _replace(target, there, content)):
        with target.open("wb") as file:
            file.write(content)


def _is_plain(target: Path, there: os.stat_result | None) -> bool:
    if there is None:
        return True
    only = stat.S_ISREG(there.st_mode) and there.st_nlink == 1
    return only and os.access(target, os.W_OK)


def _replace(target: Path, there: os.stat_result | None, content: bytes) -> bool:
    """Put a new file in the place of what is there; tell whether that could be done."""
    draft = target.with_name(f".{target.name[:_DRAFT_NAME]}.{uuid.uuid4().hex}.draft")
    try:
        try:
            file = draft.open("xb")  # never through a link that somebody has put there
        except PermissionError:
            if there is None:
                raise
            return False
        with file:
            made = os.fstat(file.fileno())
            if there is not None:
                if (made.st_uid, made.st_gid) != (there.st_uid, there.st_gid):
                    return False
                os.fchmod(file.fileno(), stat.S_IMODE(there.st_mode))
            file.write(content)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return True
