"""All that a store tells of runs, written as JSON or CSV."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

from eventor.cli.plain import TASK_COLUMNS, event_data, run_data, task_data, task_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from eventor.storage.history import History
    from eventor.storage.owner import Owner
    from eventor.types import Recovery, Run

Chosen = tuple["Run", tuple["Recovery", ...]]
"""A run, and those of its recoveries that are written."""


def export_csv(
    history: History, chosen: Iterable[Chosen], _owners: Mapping[int, Owner], file: TextIO
) -> None:
    """Write a row for each task, below a row of names. The lines end as RFC 4180 has it."""
    writer = csv.writer(file)
    writer.writerow(TASK_COLUMNS)
    for run, recoveries in chosen:
        for each in recoveries:
            tasks = history.tasks(run.run_id, each.recovery)
            writer.writerows(task_row(run, task) for task in tasks)


def export_json(
    history: History, chosen: Iterable[Chosen], owners: Mapping[int, Owner], file: TextIO
) -> None:
    """Write one document: runs with recoveries, these with tasks and events.

    Args:
        history: of the store.
        chosen: what is written.
        owners: by the numbers of runs, the owners of their latest recoveries that have not ended.
        file: where.
    """
    now = datetime.now(UTC)
    runs = []
    for run, recoveries in chosen:
        data = run_data(run, owners.get(run.run_id), now)
        wanted = {each.recovery for each in recoveries}
        data["recoveries"] = [one for one in data["recoveries"] if one["recovery"] in wanted]
        for each in data["recoveries"]:
            place = (run.run_id, each["recovery"])
            each["tasks"] = [task_data(task) for task in history.tasks(*place)]
            each["events"] = [event_data(event) for event in history.events(*place)]
        runs.append(data)
    json.dump({"runs": runs}, file, indent=2, ensure_ascii=False)
    file.write("\n")


FORMATS: dict[str, Callable[..., None]] = {"csv": export_csv, "json": export_json}
"""What writes in a format."""
