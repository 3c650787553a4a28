"""The `eventor` command, and `python -m eventor`."""

import signal
import sys

_EXTRA = ("click", "rich")
_USAGE, _INTERRUPTED = 2, 130


def main() -> int:
    """Run the command of the program's arguments; return its exit code."""
    try:
        # Who has read enough closes the pipe, and that ends this as it ends other commands.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        from eventor import cli  # noqa: PLC0415 (what it imports may be missing)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        told = f"eventor: the command needs {error.name}: pip install 'eventor[cli]'"
        print(told, file=sys.stderr)  # noqa: T201
        return _USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
