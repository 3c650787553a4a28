"""What is measured, against what, and what it should come to.

What was measured is known by the command that did it and by its unit: `fork 300: s` is what
`python -m tests.benchmarks.floors fork 300` found, in seconds.
"""

import dataclasses
from dataclasses import dataclass

FORK, COMMIT, POOL = "fork 300: s", "commit 500: s", "pool 1000: s"
COMMIT_POSTGRESQL = "commit-postgresql 500: s"
IDEAL, IMPORT, PROGRAM = (
    "ideal {n} {iterations}: s",
    "sqlalchemy-import: s",
    "sqlalchemy-program: s",
)
SHAPES, WORKERS = ("fan-out", "sequences"), ("fresh", "warm")
SIZES = (5_000, 20_000, 50_000)
ONCE = "growth"
"""The workload that takes too long to be measured in each run."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table.

    Attributes:
        workload: by which it is chosen.
        title: what it is; in this and in the names, {n} is the size, and {few} that of 1,000.
        measured: the name of what is measured.
        size: how many steps, tasks or the like.
        floor: the names of what that is compared with, in sum; none for an absolute figure.
        target: what the ratio to the floor, or the absolute figure, should not exceed.
    """

    workload: str
    title: str
    measured: str
    size: int = 0
    floor: tuple[str, ...] = ()
    target: float | None = None

    def sized(self, scale, iterations):
        """Return it for flows smaller by `scale`; `iterations` make a piece of CPU work."""
        n = self.size // scale
        words = {"n": n, "tenth": n // 10, "few": 1_000 // scale, "iterations": iterations}
        return dataclasses.replace(
            self,
            title=self.title.format(**words),
            measured=self.measured.format(**words),
            floor=tuple(name.format(**words) for name in self.floor),
        )


FIGURES = (
    Figure("chain", "chain of {n:,} steps, each", "chain {n}: s", 500, (FORK, COMMIT), 1.0),
    Figure("fan-out", "fan-out of {n:,} steps, each", "fan-out {n}: s", 2_000, (FORK,), 1.0),
    Figure("cpu", "{n} pieces of CPU work", "cpu {n} {iterations}: s", 40, (IDEAL,), 1.05),
    *(
        Figure(
            "latency",
            f"{after} to its dependent, {title}{told}",
            f"latency {{n}} {milliseconds} {sleep}: {title} s",
            300,
            (FORK,),
            target,
        )
        for after, milliseconds, sleep, told in (
            ("step of 10 ms", 10, 1, ""),
            ("step of 10 ms", 10, 0, ", sleep_between_loops 0"),
            ("step of no time", 0, 1, ""),
        )
        for title, target in (("median", 0.3), ("99th percentile", 1.5))
    ),
    Figure("idle", "CPU of the owner while a step sleeps", "idle: cores", target=0.005),
    Figure("definitions", "{n:,} definitions", "definitions {n}: s", 50_000, (), 1.0),
    Figure(
        "definitions",
        "definition of {n:,} over one of {tenth:,}",
        "definitions {n}: each s",
        50_000,
        ("definitions {tenth}: each s",),
    ),
    Figure("triggers", "{n:,} triggers, each", "triggers {n}: s", 50_000, (COMMIT,), 2.0),
    Figure("bulk", "{n:,} triggers at once, each", "bulk-triggers {n}: s", 50_000, (), 20e-6),
    Figure("recovery", "recovery of {n:,} tasks", "recovery {n}: s", 2_000),
    Figure("recovery", "recovery of {n:,} tasks", "recovery {n}: s", 20_000, (), 2.0),
    Figure("import", "import of eventor", "eventor-import: s", 0, (IMPORT,), 1.3),
    Figure("example", "the simple example", "simple-example: s", 0, (PROGRAM,), 2.0),
    Figure("warm", "chain of {n:,}, each, warm", "chain {n} warm: s", 500, (POOL, COMMIT), 1.3),
    Figure("warm", "fan-out of {n:,}, each, warm", "fan-out {n} warm: s", 2_000, (FORK,), 0.14),
    *(
        Figure("outgrown", f"fan-out of {{n:,}}, each, {title}", f"{measured}: s", 10_000, floor)
        for title, measured, floor in (
            ("fresh", "fan-out {n}", (FORK,)),
            ("warm", "fan-out {n} warm", (COMMIT,)),
            ("fresh, PostgreSQL", "fan-out-postgresql {n}", (FORK, COMMIT_POSTGRESQL)),
            ("warm, PostgreSQL", "fan-out-postgresql {n} warm", (COMMIT_POSTGRESQL,)),
            *(
                (title, f"executors {{n}} {kind}", (f"executor {{n}} {kind}: s", COMMIT))
                for kind, title in (("processes", "a process pool"), ("dask", "Dask"))
            ),
        )
    ),
    *(
        Figure("outgrown", f"its store, of a step, {title}", f"{measured} {{n}} warm: B", 10_000)
        for title, measured in (("SQLite", "fan-out"), ("PostgreSQL", "fan-out-postgresql"))
    ),
    *(
        Figure(
            "outgrown",
            f"{programs} chains at once of {{n}}, warm, a step of all, PostgreSQL",
            f"programs {programs} {{n}}: s",
            200,
            (COMMIT_POSTGRESQL,),
        )
        for programs in (1, 4, 16)
    ),
    *(
        Figure(
            ONCE,
            f"step of {{n:,}} over one of {{few:,}}, {shape}, {how}",
            f"{shape} {{n}} {how}: s",
            size,
            (f"{shape} {{few}} {how}: s",),
            1.2 if size == SIZES[-1] else None,
        )
        for how in WORKERS
        for shape in SHAPES
        for size in SIZES
    ),
    Figure(ONCE, "peak memory per ended task", "sequences {n} fresh: B", SIZES[-1], (), 1_500),
)
