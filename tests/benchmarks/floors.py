"""What the parts of a step cost without eventor, measured in the same run as the steps.

python -m tests.benchmarks.floors NAME [ARGUMENT ...]
"""

import contextlib
import multiprocessing
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests import servers
from tests.benchmarks import child

FORK = multiprocessing.get_context("fork")


def nothing():
    """Be the function of a step that does nothing."""


def piece(iterations):
    """Keep a core busy."""
    value = 0
    for number in range(iterations):
        value = (value + number) & 0xFFFF
    return value


def pieces(count, iterations):
    for _ in range(count):
        piece(iterations)


def iterations_of(seconds):
    """Return how many iterations make a piece last that long on this machine."""
    sample, took = 300_000, []
    for _ in range(10):
        began = time.perf_counter()
        piece(sample)
        took.append(time.perf_counter() - began)
    return round(sample * seconds / min(took))


def fork(place, count):
    """A process that does nothing, forked by one that is as big as the owner of a flow."""
    import sqlalchemy  # noqa: F401 (for its size)

    began = time.perf_counter()
    for _ in range(count):
        process = FORK.Process(target=nothing)
        process.start()
        process.join()
    return {"s": (time.perf_counter() - began) / count}


def commit(place, count):
    """A durable commit of one inserted and one updated row."""
    connection = sqlite3.connect(place / "floor.db", isolation_level=None)
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    assert mode == "wal"
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE task (id INTEGER PRIMARY KEY, status TEXT NOT NULL)")
    began = time.perf_counter()
    for number in range(count):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO task VALUES (?, 'ready')", (number,))
        connection.execute("UPDATE task SET status = 'success' WHERE id = ?", (number - 1,))
        connection.execute("COMMIT")
    seconds = (time.perf_counter() - began) / count
    connection.close()
    return {"s": seconds}


def commit_postgresql(place, count):
    """The same in PostgreSQL, with the settings that it has by default, by a socket."""
    with servers.server() as server, servers.connect(server.url()) as connection:
        connection.autocommit = True
        connection.execute("CREATE TABLE task (id bigint PRIMARY KEY, status text NOT NULL)")
        began = time.perf_counter()
        for number in range(count):
            connection.execute("BEGIN")
            connection.execute("INSERT INTO task VALUES (%s, 'ready')", (number,))
            connection.execute("UPDATE task SET status = 'success' WHERE id = %s", (number - 1,))
            connection.execute("COMMIT")
        return {"s": (time.perf_counter() - began) / count}


def pool(place, count):
    """A call of a process that is there already."""
    with ProcessPoolExecutor(2, mp_context=FORK) as executor:
        for _ in range(20):
            executor.submit(nothing).result()
        began = time.perf_counter()
        for _ in range(count):
            executor.submit(nothing).result()
        return {"s": (time.perf_counter() - began) / count}


@contextlib.contextmanager
def executor_of(kind):
    """Give an executor of two processes, which have begun."""
    with contextlib.ExitStack() as stack:
        if kind == "dask":
            import distributed

            two = {"n_workers": 2, "threads_per_worker": 1}
            cluster = distributed.LocalCluster(**two, dashboard_address=":0", silence_logs="ERROR")
            client = distributed.Client(stack.enter_context(cluster))
            made = stack.enter_context(client).get_executor()
        else:
            made = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
        stack.enter_context(made)
        for future in [made.submit(time.sleep, number / 100) for number in range(10)]:
            future.result()
        yield made


def executor(place, count, kind):
    """A call of an executor, of many that were submitted together."""
    with executor_of(kind) as made:
        began = time.perf_counter()
        # Each of its own: Dask calls one of several that are equal.
        for future in [made.submit(int, number) for number in range(count)]:
            future.result()
        return {"s": (time.perf_counter() - began) / count}


def ideal(place, count, iterations):
    """Pieces of work, half of them in each of two processes side by side."""
    began = time.perf_counter()
    processes = [FORK.Process(target=pieces, args=(count // 2, iterations)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return {"s": time.perf_counter() - began}


def sqlalchemy_import(place):
    """The import of the one thing that eventor depends on."""
    return imported("sqlalchemy")


def sqlalchemy_program(place):
    """A program that imports it, from its start to its end."""
    return program(place, "-c", "import sqlalchemy")


def imported(module):
    clock = "time.perf_counter()"
    code = f"import time; began = {clock}; import {module}; print({clock} - began)"
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return {"s": float(ran.stdout)}


def program(place, *arguments):
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=place, stdout=subprocess.DEVNULL, check=True)
    return {"s": time.perf_counter() - began}


KNOWN = child.by_name(
    *(fork, commit, commit_postgresql, pool, executor, ideal),
    *(sqlalchemy_import, sqlalchemy_program),
)

if __name__ == "__main__":
    child.main(KNOWN)
