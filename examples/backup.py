"""Back up a directory: pack each of its parts, and check later that each archive can be read.

    python examples/backup.py --source ~/documents --out backup

The parts are found by a step, which triggers one sequence for each of them. A part is packed, and
some time later unpacked in memory and compared by its checksums. Packing is tried again if the disk
fails, and ended if it takes too long; no more than two archives are written or read at a time.

Kill it in the middle, run it again with `--recover`, and what was packed is not packed again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import sysconfig
import tarfile
from pathlib import Path

import eventor as evr

SINGLE = "(files)"
"""The name under which the files that stand alone are packed together."""


def files_of(source: Path, part: str) -> list[Path]:
    """Return the files of a part, in the order in which they are packed."""
    found = source.glob("*") if part == SINGLE else (source / part).rglob("*")
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def find(source: Path) -> list[str]:
    """Trigger the packing of each part; return their names."""
    parts = sorted(entry.name for entry in source.iterdir() if entry.is_dir())
    for part in (SINGLE, *parts):
        evr.current().trigger("part found", part)
    return [SINGLE, *parts]


def pack(source: Path, out: Path, part: str) -> dict[str, str]:
    """Write the archive of a part, at once; return the checksum of each of its files."""
    sums = {}
    draft = out / f".{part}.{evr.current().attempt}.tar.xz"
    with tarfile.open(draft, "w:xz", preset=1) as archive:
        for path in files_of(source, part):
            name = str(path.relative_to(source))
            archive.add(path, name)
            sums[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    draft.replace(out / f"{part}.tar.xz")
    with (out / "packed.log").open("a") as log:
        log.write(f"{part}\n")
    return sums


def check(out: Path, part: str, sums: dict[str, str]) -> str:
    """Compare what an archive holds with what was packed; return a line of the report."""
    archive = out / f"{part}.tar.xz"
    found, size = {}, 0
    with tarfile.open(archive) as opened:
        for member in opened:
            content = opened.extractfile(member)
            data = b"" if content is None else content.read()
            found[member.name] = hashlib.sha256(data).hexdigest()
            size += len(data)
    if found != sums:
        wrong = sorted(name for name in sums if found.get(name) != sums[name])
        raise ValueError(f"{archive.name} does not hold what was packed: {', '.join(wrong)}")
    ratio = archive.stat().st_size / size if size else 1
    return f"{part:20}{len(sums):>8,} files{size:>14,} bytes{ratio:>8.1%}"


def run(source: Path, out: Path, wait: float, mode: evr.RunMode) -> tuple[bool, list[str]]:
    """Define the flow and run it; return whether all went well, and the report."""
    config = {
        "logdir": out,
        "max_concurrent": os.cpu_count() or 1,
        "resources": {"disk": 2},
        "stop_on_exception": False,  # one bad archive says nothing of the others
    }
    disk = {"resources": {"disk": 1}, "timeout": 600}
    careful = {"max_attempts": 3, "retry_delay": 1, "retry_backoff": 2, "retry_on": OSError}
    with evr.Eventor("backup", out / "backup.db", run_mode=mode, config=config) as ev:
        begin, found = ev.add_event("begin"), ev.add_event("part found")
        ev.add_assoc(begin, ev.add_step("find", find, args=(source,)))
        packed = ev.add_step(
            "pack",
            pack,
            args=(source, out, evr.sequence),
            # What is read is not read again before all is packed that can be.
            config={**disk, **careful, "priority": 1},
        )
        checked = ev.add_step(
            "check", check, args=(out, evr.sequence, packed.result), config={**disk, **careful}
        )
        ev.add_assoc(found, packed)
        ev.add_assoc(packed.success, checked, delay=wait)
        if mode is evr.RunMode.restart:
            ev.trigger_event(begin, "backup")
        done = ev()
        lines = [task.result for task in ev.tasks("check", status=evr.TaskStatus.success)]
        failed = [
            f"{task.step} {task.sequence}: {task.error}"
            for task in ev.tasks(status=evr.TaskStatus.failure)
        ]
        return done, [*sorted(lines), *failed]


def main() -> int:
    """Read the command line, run the flow, and print the report."""
    parser = argparse.ArgumentParser(description="Back up a directory, and check the archives.")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")) / "json",
        help="what to back up; by default a package of this Python",
    )
    parser.add_argument("--out", type=Path, default=Path("backup"), help="where archives go")
    parser.add_argument("--wait", type=float, default=1, help="seconds before an archive is read")
    parser.add_argument("--recover", action="store_true", help="go on with the run that was cut")
    given = parser.parse_args()
    source, out = given.source.resolve(), given.out.resolve()
    if not source.is_dir():
        parser.error(f"--source {given.source} is not a directory")
    if out.is_relative_to(source):
        parser.error(f"--out {given.out} is inside what is backed up")
    out.mkdir(parents=True, exist_ok=True)
    try:
        mode = evr.RunMode.recover if given.recover else evr.RunMode.restart
        done, lines = run(source, out, given.wait, mode)
    except evr.EventorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
