"""The `eventor` command, and `python -m eventor`."""

import io
import os
import signal
import sys
from pathlib import Path

_EXTRA = ("click", "rich")
_USAGE, _INTERRUPTED, _BY_SIGNAL = 2, 130, 128


def main() -> int:
    """Run the command of the program's arguments; return its exit code."""
    try:
        # Who has read enough closes the pipe, and that ends this as it ends other commands.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        # What was begun, as a process or a file, is ended and removed on the way out.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(_BY_SIGNAL + number))
        _open_what_is_closed()
        _buffer_output()
        from eventor.cli.commands import run  # noqa: PLC0415 (what it imports may be missing)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        told = f"eventor: the command needs {missing}: pip install 'eventor[cli]'"
        print(told, file=sys.stderr)  # noqa: T201
        return _USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    return run()


def _open_what_is_closed() -> None:
    """Let what is written to a stream that the shell has closed (`>&-`) go nowhere."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 (until the end)


def _buffer_output() -> None:
    """Let all that is printed be written, or fail: unbuffered, Python drops what a write leaves."""
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED, or python -u
        stream, buffered = sys.stdout, io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True)


if __name__ == "__main__":
    sys.exit(main())
