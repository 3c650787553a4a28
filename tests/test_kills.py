"""Real processes, killed for real at random times, and recovered until the flow is done.

Each step appends to a file what it does, and the file must be what the model allows. `--proofs 20`
makes it hundreds of rounds.
"""

import contextlib
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest

from eventor.storage import owner
from tests.conftest import wait_until

FLOWS = 3
KILLS_PER_FLOW = 6
LANES, STEPS_PER_LANE = 3, 40
STEPS = LANES * STEPS_PER_LANE

PROGRAM = """
import os, sys, time
import eventor as evr

def step(name):
    for word in ("begin", "end"):
        descriptor = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{word} {name}\\n".encode())
        os.close(descriptor)
        time.sleep(0.02)

config = {"logdir": ".", "max_concurrent": 3, "strict_recovery": True}
try:
    store = os.environ["STORE"]
    ev = evr.Eventor(store=store, run_mode=sys.argv[1], config=config, logging_level=100)
except evr.OwnershipError:
    sys.exit(7)
with ev:
    go = ev.add_event("go")
    for lane in range(3):
        before = go
        for number in range(40):
            after = ev.add_event(f"{lane}.{number}")
            once = {"active": "skip", "failure": "skip"} if lane == 0 else {}
            name = f"s{lane}.{number}"
            ev.add_assoc(before, ev.add_step(
                name, step, args=(name,), triggers={"at_success": after}, recovery=once))
            before = after
    ev.trigger_event(go, 1)
    sys.exit(not ev())
"""


def successes(place):
    query = "SELECT DISTINCT step FROM eventor_task WHERE status = 'success'"
    return {step for (step,) in place.sql(query)}


def active(place, tmp_path):
    """Return the pids of the steps that run, and of nothing else that may have such a pid now."""
    query = "SELECT pid FROM eventor_task WHERE status = 'active' AND pid IS NOT NULL"
    with contextlib.suppress(place.errors):
        for (pid,) in place.sql(query):
            with contextlib.suppress(OSError):
                if str(tmp_path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield pid


def kill(dice, place, tmp_path, process):
    """Kill the owner, a step, or the owner's whole group; return how many of them were there."""
    what = dice.choice(["owner", "step", "group"])
    if what == "step":
        pids = itertools.islice(active(place, tmp_path), 1)
    else:
        pids = [process.pid] if process.poll() is None else []
    hits = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if what == "group" else os.kill)(pid, signal.SIGKILL)
            hits += 1
    return hits


def steps_are_gone(place):
    query = "SELECT keeper_pid, keeper_began, owner_host FROM eventor_recovery"
    return all(
        keeper is None or owner.is_running(owner.Owner(host or "", keeper, began)) is False
        for keeper, began, host in place.sql(query)
    )


def live(start, place, tmp_path, seed):
    """Run the flow to its end; return how often it was killed."""
    dice = random.Random(seed)
    log = tmp_path / "log"
    log.touch()
    mode, kills, done = "restart", 0, set()
    while True:
        if not place.exists():
            mode = "restart"
        seen = len(log.read_text())
        racers = [
            start(PROGRAM, mode, STORE=place.store) for _ in range(1 if mode == "restart" else 2)
        ]
        if kills < KILLS_PER_FLOW:
            # The time of the kill is random, and no condition: that is the point of it.
            time.sleep(dice.uniform(0.2, 0.8))
            kills += sum(kill(dice, place, tmp_path, process) for process in racers)
        codes = [process.wait(60) for process in racers]
        if not place.exists():
            continue
        wait_until(lambda: steps_are_gone(place))
        again = {line.split()[1] for line in log.read_text()[seen:].splitlines()}
        assert not again & done, "what was recorded as a success ran again"
        done = successes(place)
        runs = place.sql("SELECT count(*) FROM eventor_run")[0][0]
        mode = "recover" if runs else "restart"
        assert runs <= 1
        if len(done) == STEPS:
            return kills
        # Who ends well has let go of the run, and has left nothing to do.
        query = "SELECT owner_pid FROM eventor_recovery ORDER BY recovery DESC LIMIT 1"
        assert 0 not in codes or place.sql(query) != [(None,)]


def check(place, tmp_path):
    lines = (tmp_path / "log").read_text().splitlines()
    for lane in range(LANES):
        for number in range(STEPS_PER_LANE):
            begun = lines.count(f"begin s{lane}.{number}")
            ended = lines.count(f"end s{lane}.{number}")
            if lane == 0:
                assert ended <= begun <= 1, "at most once"
            else:
                assert 1 <= ended <= begun, "at least once"
    assert len(successes(place)) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_whatever_is_killed_the_file_is_what_the_model_allows(start, place, tmp_path, request):
    kills = 0
    for seed in range(FLOWS * request.config.getoption("--proofs")):
        (tmp_path / "log").unlink(missing_ok=True)
        place.clear()
        kills += live(start, place, tmp_path, seed)
        check(place, tmp_path)
    print(f"\n{kills} real kills")
    assert kills
