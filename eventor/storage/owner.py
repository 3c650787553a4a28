"""Who owns a run, and whether that owner still lives.

A pid alone does not tell: it is given again to other processes, it counts inside its pid namespace
only, and it begins anew with each boot. So a process is also known by where and when it began.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import subprocess
import time
import weakref
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

PROC = Path("/proc")
_STAT_BYTES = 4096
_LOOK_SECONDS = 0.005


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Owner:
    """A process, or one Eventor in it.

    Attributes:
        host: the name of its host.
        pid: its process id there.
        began: words apart by a space: where pids are as they are there, when the process began
            by the clock of that place, and for an Eventor its number in the process.
    """

    host: str
    pid: int
    began: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host!r}"


_numbers = itertools.count(1)
_claims: weakref.WeakSet[Owner] = weakref.WeakSet()
"""The Eventors of this process that live; one that was never made whole is forgotten."""


def claim() -> Owner:
    """Return a new owner in this process, which lives until `disclaim`."""
    process = process_of(os.getpid())
    owner = Owner(process.host, process.pid, f"{process.began} {next(_numbers)}")
    _claims.add(owner)
    return owner


def disclaim(owner: Owner) -> None:
    """End an owner in this process."""
    _claims.discard(owner)


def process_of(pid: int) -> Owner:
    """Return the running process of that pid on this host."""
    return Owner(socket.gethostname(), pid, f"{_place()} {_start_of(pid) or '?'}")


def is_running(owner: Owner) -> bool | None:
    """Tell whether a process, or the Eventor in it, still lives; None if no one can tell here."""
    place, start, *number = [*owner.began.split(" "), "", ""][:3]
    if place != _place():
        return None
    found = _start_of(owner.pid)
    if found is None or "?" in (found, start):
        return None if found else False
    if found == start and owner.pid == os.getpid() and any(number):
        return owner in _claims
    return found == start


def stat_of(pid: int) -> list[str]:
    """Return what Linux tells of a process, from its state on (man 5 proc).

    Raises:
        OSError: there is no such process, or no such place to look.
    """
    # Not by pathlib: each process of a step does this before it begins.
    descriptor = os.open(f"{PROC}/{pid}/stat", os.O_RDONLY)
    try:
        told = os.read(descriptor, _STAT_BYTES)
    finally:
        os.close(descriptor)
    # The name of the program stands in brackets before it, and may hold anything.
    return told.rpartition(b")")[2].decode().split()


def has_ended(process: Owner, seconds: float) -> bool:
    """Wait for a process to end, `seconds` at most; one that cannot be seen is not waited for."""
    deadline = time.monotonic() + seconds
    while is_running(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def holds(
    running: bool | None, heartbeat_at: datetime | None, lease_seconds: float, now: datetime
) -> bool:
    """Tell whether an owner still holds its run (the rule, apart from looking at processes).

    Args:
        running: what `is_running` found.
        heartbeat_at: when the owner was last heard of.
        lease_seconds: for how long that counts where nobody can look at its process.
        now: the time.
    """
    if running is not None:
        return running
    return heartbeat_at is not None and now - heartbeat_at < timedelta(seconds=lease_seconds)


@functools.cache
def _place() -> str:
    """Return the name of that within which a pid means one process: a boot, a pid namespace."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = (PROC / "self/ns/pid").readlink().name
    except OSError:
        return socket.gethostname().replace(" ", "_")
    return f"{boot}/{namespace}"


def _start_of(pid: int) -> str | None:
    """Return when a process began, '?' if that cannot be seen, None if there is none any more."""
    if _is_gone(pid):
        return None
    if not os.path.exists(f"{PROC}/self/stat"):  # noqa: PTH110 (as in stat_of)
        return _start_by_ps(pid)
    try:
        words = stat_of(pid)
    except OSError:
        # It has ended since, or is hidden.
        return None if _is_gone(pid) else "?"
    return None if words[0] in "ZX" else words[19]


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def _start_by_ps(pid: int) -> str | None:
    ps = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    ran = subprocess.run(ps, capture_output=True, text=True, check=False)  # noqa: S603
    state, *start = ran.stdout.split() or [""]
    return None if not start or state[0] == "Z" else "-".join(start)
