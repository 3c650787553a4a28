"""Recover a run: a step fails on bad input, the input is mended, and the run goes on from there.

Run it as it is: `python examples/recovery.py`. It keeps its files in a temporary directory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import eventor as evr


def extract(source: Path) -> list[str]:
    """Return the names in the first column."""
    return [line.split(",")[0] for line in source.read_text().splitlines()]


def parse(source: Path) -> int:
    """Return the sum of the second column; what is no number is an error."""
    return sum(int(line.split(",")[1]) for line in source.read_text().splitlines())


def run(place: Path, mode: evr.RunMode) -> bool:
    """Define the flow, run it, and print where each task stands."""
    config = {"logdir": place}
    with evr.Eventor(store=place / "recovery.db", run_mode=mode, config=config) as ev:
        begin = ev.add_event("begin")
        extracted = ev.add_event("extracted")
        raw = (place / "raw.csv",)
        first = ev.add_step(
            "extract", extract, args=raw, triggers={evr.StepTriggers.at_success: extracted}
        )
        second = ev.add_step("parse", parse, args=raw)
        ev.add_assoc(begin, first)
        ev.add_assoc(extracted, second)
        if mode is evr.RunMode.restart:
            ev.trigger_event(begin)
        well = ev()
        print(f"\nRecovery {ev.recovery} of run {ev.run_id}:")
        for task in ev.tasks():
            told = task.error or f"result {task.result}"
            print(f"  {task.step:8} {task.status:8} {task.replay or 'first':6} {told}")
        print()
        return well


def main() -> None:
    """Run on bad input, mend it, and recover."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        raw = place / "raw.csv"
        raw.write_text("apples,3\npears,many\n")
        assert not run(place, evr.RunMode.restart)
        raw.write_text("apples,3\npears,4\n")
        assert run(place, evr.RunMode.recover)


if __name__ == "__main__":
    main()
