"""Draw the Mandelbrot set, strip by strip: on this machine, or on a cluster of Dask.

    python examples/cluster.py                                # processes of this machine
    python examples/cluster.py --dask                         # a cluster of Dask on this machine
    python examples/cluster.py --dask tcp://scheduler:8786    # one that is there
    python examples/cluster.py --store postgresql+psycopg://host/runs

Dask is `pip install distributed`. Each strip is a step, and so is the picture that is made of them.
Where the steps run is one option, and where their run is kept is another; the flow is the same.

Stop it by a Ctrl-C, or kill it in the middle; run it again with `--recover`, and no strip is drawn
twice that was done, on this machine or elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eventor as evr

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPTH = 255
"""After how many turns a point is taken to belong to the set."""

CONNECT_SECONDS = 5
"""For how long a scheduler is looked for."""

DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""What a worker runs first: a Ctrl-C in a terminal goes to all, and is for this program alone."""

log = logging.getLogger("cluster")


def brightness(x: float, y: float) -> int:
    """Return how soon a point leaves the set: 0 for never, up to `DEPTH` for at once."""
    point, z = complex(x, y), 0j
    for turn in range(DEPTH):
        if abs(z) > 2:  # noqa: PLR2004 (the set has no point outside of that circle)
            return DEPTH - turn
        z = z * z + point
    return 0


def strip(number: int, rows: int, size: int) -> bytes:
    """Draw some rows of a square picture."""
    log.info("drawing strip %d in process %d", number, os.getpid())
    step = 2.5 / size
    return bytes(
        brightness(-2 + column * step, -1.25 + row * step)
        for row in range(number * rows, min(size, (number + 1) * rows))
        for column in range(size)
    )


def picture(size: int, strips: list[bytes]) -> bytes:
    """Return a picture, in the format PGM, that is made of strips."""
    return b"P5 %d %d %d\n" % (size, size, DEPTH) + b"".join(strips)


class NoClusterError(Exception):
    """There is no cluster on which steps could run."""


def at_least_one(text: str) -> int:
    """Read a number of things, of which there must be one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few; expected 1 or more")
    return number


@contextlib.contextmanager
def construct(dask: str | None, workers: int) -> Iterator[dict[str, Any]]:
    """Give the config by which steps run on this machine, or on a cluster.

    Raises:
        NoClusterError: it cannot be had.
    """
    if dask is None:
        yield {}
        return
    try:
        from distributed import Client, LocalCluster  # noqa: PLC0415 (it need not be installed)
    except ImportError as error:
        raise NoClusterError(f"Dask cannot be imported, {error}: pip install distributed") from None

    logging.getLogger("distributed").setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        address: Any = dask or stack.enter_context(
            LocalCluster(
                n_workers=workers, threads_per_worker=1, dashboard_address=":0", preload=[DEAF]
            )
        )
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS))
        except (OSError, ValueError) as error:  # ValueError: no such scheme
            raise NoClusterError(f"no scheduler of Dask at {dask!r}: {error}") from None
        yield {"task_construct": client.get_executor()}


def run(given: argparse.Namespace, where: dict[str, Any]) -> bool:
    """Define the flow and run it; write the picture, and print what was done."""
    config = {"logdir": given.out, "max_concurrent": 2 * given.workers, **where}
    mode = evr.RunMode.recover if given.recover else evr.RunMode.restart
    store = given.store or given.out / "cluster.db"
    with evr.Eventor("cluster", store, run_mode=mode, config=config) as ev:
        begin = ev.add_event("begin")
        count = -(-given.size // given.rows)
        strips = [
            ev.add_step(
                f"strip {number}",
                strip,
                args=(number, given.rows, given.size),
                config={"max_attempts": 3},  # a worker may be lost
            )
            for number in range(count)
        ]
        ev.add_assoc(begin, *strips)
        drawn = ev.add_event("drawn", tuple(one.success for one in strips))
        whole = ev.add_step("picture", picture, args=(given.size, [one.result for one in strips]))
        ev.add_assoc(drawn, whole)
        if mode is evr.RunMode.restart:
            ev.trigger_event(begin, 1)
        if not ev():
            return False
        made = ev.result(whole, 1)
        (given.out / "mandelbrot.pgm").write_bytes(made)
        tasks = [task for task in ev.tasks() if task.step != "picture"]
        kept = sum(task.replay is evr.StepReplay.skip for task in tasks)
        processes = {task.pid for task in tasks if task.replay is not evr.StepReplay.skip}
        print(f"{count - kept} strips drawn by {len(processes)} processes, {kept} known before")
        print(f"{given.out / 'mandelbrot.pgm'}: sha256 {hashlib.sha256(made).hexdigest()}")
        return True


def main() -> int:
    """Read the command line, and run the flow."""
    parser = argparse.ArgumentParser(description="Draw the Mandelbrot set, on a cluster or not.")
    parser.add_argument(
        "--dask",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run the steps on the cluster of that scheduler, or on one made for this run",
    )
    parser.add_argument("--store", help="where the run is kept: a path or a URL")
    parser.add_argument("--out", type=Path, default=Path("cluster"), help="for all that is written")
    parser.add_argument("--workers", type=at_least_one, default=os.cpu_count() or 1)
    parser.add_argument("--size", type=at_least_one, default=240, help="rows and columns in all")
    parser.add_argument("--rows", type=at_least_one, default=20, help="rows of a strip")
    parser.add_argument("--recover", action="store_true", help="go on with the run that was cut")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        with construct(given.dask, given.workers) as where:
            return 0 if run(given, where) else 1
    except (evr.EventorError, NoClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
