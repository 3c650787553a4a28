"""What flows cost. Each measures a fresh store in a file, and makes sure that all went well.

    python -m tests.benchmarks.workloads NAME [ARGUMENT ...]

Steps are fresh processes by default; `warm` ones run in processes that are kept.
"""

import itertools
import multiprocessing
import resource
import statistics
import sys
import time

import eventor as evr
from tests import servers
from tests.benchmarks import child, floors
from tests.benchmarks.floors import nothing, piece

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
IN_FLIGHT = 16
"""How many steps an executor of two processes has at once, so that neither waits for the next."""

WORKERS = {"fresh": {}, "warm": {"max_tasks_per_child": None}}


def clock(milliseconds=0):
    """Be the function of a step that tells when it began and ended."""
    began = time.monotonic_ns()
    if milliseconds:
        time.sleep(milliseconds / 1e3)
    return began, time.monotonic_ns()


def flow(place, how="fresh", run_mode=evr.RunMode.restart, store=None, **config):
    config = {"logdir": place, **WORKERS[how], **config}
    return evr.Eventor(store=store or place / "flow.db", run_mode=run_mode, config=config)


def run(ev, tasks):
    """Run a flow to its end, and return the seconds that it took."""
    began = time.perf_counter()
    well = ev()
    seconds = time.perf_counter() - began
    assert well
    assert len(ev.tasks()) == len(ev.tasks(status=evr.TaskStatus.success)) == tasks
    return seconds


def add_chain(ev, size, func, *args):
    """Define steps of which each is started by the success of the one before; trigger the first."""
    events = [ev.add_event(f"event {number}") for number in range(size + 1)]
    for number, (event, done) in enumerate(itertools.pairwise(events)):
        triggers = {evr.StepTriggers.at_success: done}
        ev.add_assoc(event, ev.add_step(f"step {number}", func, args, triggers=triggers))
    ev.trigger_event(events[0])


def add_fan_out(ev, size):
    """Define steps that start together, and one that waits for them all; trigger the first."""
    go = ev.add_event("go")
    done = [ev.add_event(f"done {number}") for number in range(size)]
    for number, event in enumerate(done):
        triggers = {evr.StepTriggers.at_success: event}
        ev.add_assoc(go, ev.add_step(f"step {number}", nothing, triggers=triggers))
    ev.add_assoc(ev.add_event("all done", tuple(done)), ev.add_step("last", nothing))
    ev.trigger_event(go)


def add_one(ev, func, *args, **more):
    """Define one step, and return the event that starts it."""
    event = ev.add_event(f"start {func.__name__}")
    ev.add_assoc(event, ev.add_step(func.__name__, func, args, **more))
    return event


def trigger_all(ev, event, size):
    for number in range(size):
        ev.trigger_event(event, number)


def chain(place, size, how="fresh", store=None):
    with flow(place, how, store=store) as ev:
        add_chain(ev, size, nothing)
        return {"s": run(ev, size) / size}


def fan_out(place, size, how="fresh"):
    """The cost of a step of many that start together, and by how much each adds to the store."""
    with flow(place, how, max_concurrent=2) as ev:
        add_fan_out(ev, size)
        seconds = run(ev, size + 1)
    return {"s": seconds / (size + 1), "B": (place / "flow.db").stat().st_size / (size + 1)}


def fan_out_postgresql(place, size, how="fresh"):
    """The same with a store in PostgreSQL, and by how much each step adds to that."""
    with (
        servers.server() as server,
        flow(place, how, store=server.url(), max_concurrent=2) as ev,
    ):
        add_fan_out(ev, size)
        return {"s": run(ev, size + 1) / (size + 1), "B": ev._store.size() / (size + 1)}


def programs(place, number, size):
    """What a step costs of all that many programs run at the same time on one PostgreSQL."""
    with servers.server() as server:
        fork = multiprocessing.get_context("fork")
        began = time.perf_counter()
        processes = [
            fork.Process(target=chain, args=(place, size, "warm", server.url()))
            for _ in range(number)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert {process.exitcode for process in processes} == {0}
        return {"s": (time.perf_counter() - began) / (number * size)}


def executors(place, size, kind):
    """A fan-out on an executor; `fan_out` is the same on processes of eventor's own."""
    with (
        floors.executor_of(kind) as construct,
        flow(place, task_construct=construct, max_concurrent=IN_FLIGHT) as ev,
    ):
        add_fan_out(ev, size)
        return {"s": run(ev, size + 1) / (size + 1)}


def sequences(place, size, how="fresh"):
    """The cost of a step, and by how much each adds to the peak memory of the owner."""
    with flow(place, how, max_concurrent=2) as ev:
        trigger_all(ev, add_one(ev, nothing), size)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        well = ev()
        seconds = time.perf_counter() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert well
        assert len(ev.tasks(status=evr.TaskStatus.success)) == size
    return {"s": seconds / size, "B": grown * MAXRSS_BYTES / size}


def cpu(place, count, iterations):
    """Pieces of work, two at a time."""
    with flow(place, max_concurrent=2) as ev:
        go = ev.add_event("go")
        steps = [ev.add_step(f"step {number}", piece, (iterations,)) for number in range(count)]
        ev.add_assoc(go, *steps)
        ev.trigger_event(go)
        return {"s": run(ev, count)}


def latency(place, size, milliseconds, sleep):
    """The time from the end of a step's function to the beginning of its dependent's."""
    with flow(place, sleep_between_loops=sleep) as ev:
        add_chain(ev, size, clock, milliseconds)
        run(ev, size)
        results = [task.result for task in ev.tasks()]
    waits = [after[0] - before[1] for before, after in itertools.pairwise(results)]
    assert min(waits) > 0
    last = statistics.quantiles(waits, n=100)[98]
    return {"median s": statistics.median(waits) / 1e9, "99th percentile s": last / 1e9}


def idle(place):
    """What of a core the owner uses while a step sleeps, without what a run costs in any case."""
    used = {}
    for seconds in (0, 1, 6):  # the first one is not counted: it imports, and fills caches
        with flow(place) as ev:
            ev.trigger_event(add_one(ev, time.sleep, seconds))
            before = time.process_time()
            well = ev()
            used[seconds] = time.process_time() - before
            assert well
    return {"cores": (used[6] - used[1]) / 5}


def definitions(place, size):
    """As many events, steps and associations."""
    with flow(place) as ev:
        began = time.perf_counter()
        for number in range(size):
            event = ev.add_event(f"event {number}")
            ev.add_assoc(event, ev.add_step(f"step {number}", nothing))
        seconds = time.perf_counter() - began
        ev.trigger_event(event)
        (planned,) = ev.preview().runs
        assert planned.step == f"step {size - 1}"
    return {"s": seconds, "each s": seconds / size}


def triggers(place, size):
    """Calls of `trigger_event`, and their being recorded, for which reading the tasks is enough."""
    with flow(place) as ev:
        go = ev.add_event("go")
        began = time.perf_counter()
        for number in range(size):
            ev.trigger_event(go, number)
        assert ev.tasks() == []
        seconds = time.perf_counter() - began
        assert len(ev.events()) == size
    return {"s": seconds / size}


def bulk_triggers(place, size):
    with flow(place) as ev:
        go = ev.add_event("go")
        began = time.perf_counter()
        triggered = ev.trigger_events(go, range(size))
        seconds = time.perf_counter() - began
        assert triggered == list(range(size))
        assert len(ev.events()) == size
    return {"s": seconds / size}


def recovery(place, size):
    """From the start of a recovery of that many tasks to that of the one step that it reruns."""

    def define(ev):
        policy = {evr.TaskStatus.success: evr.StepReplay.rerun}
        return add_one(ev, nothing), add_one(ev, clock, recovery=policy)

    def finish():
        with flow(place, "warm", max_concurrent=2) as ev:
            go, again = define(ev)
            trigger_all(ev, go, size)
            ev.trigger_event(again, 0)
            run(ev, size + 1)

    first = floors.FORK.Process(target=finish)
    first.start()
    first.join()
    assert first.exitcode == 0
    before = time.monotonic_ns()
    with flow(place, run_mode=evr.RunMode.recover) as ev:
        define(ev)
        run(ev, size + 1)
        (task,) = ev.tasks("clock")
        assert task.replay is evr.StepReplay.rerun
        return {"s": (task.result[0] - before) / 1e9}


def eventor_import(place):
    return floors.imported("eventor")


def simple_example(place):
    return floors.program(place, child.ROOT / "examples/simple_example.py")


KNOWN = child.by_name(
    *(chain, fan_out, fan_out_postgresql, programs, executors),
    *(sequences, cpu, latency, idle),
    *(definitions, triggers, bulk_triggers, recovery, eventor_import, simple_example),
)

if __name__ == "__main__":
    child.main(KNOWN)
