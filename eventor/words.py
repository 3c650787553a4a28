"""What is told in words, one way for each meaning: durations, numbers, and texts made harmless.

Where there are two ways, what they are for differs; the docstrings say how.
"""

from __future__ import annotations

import re

from eventor.types import storable

_MINUTE, _HOUR, _DAY = 60.0, 3_600.0, 86_400.0


def duration(seconds: float | None) -> str:
    """Return how long something took, in the units that suit it; nothing if that is not known.

    `412 ms`, `2.31 s`, `3 min 20 s`, `3 d 4 h`: three digits, or the largest two units.
    """
    if seconds is None:
        return ""
    if seconds < 0.9995:  # noqa: PLR2004 (from here on it is 1 s)
        return "0 s" if seconds <= 0 else f"{float(f'{seconds * 1000:.3g}'):g} ms"
    if seconds < _MINUTE - 0.05:  # from here on it is 1 min
        return f"{seconds:.3g} s"
    if (whole := round(seconds)) < _HOUR:
        return _parts(*divmod(whole, 60), "min", "s")
    if (whole := round(seconds / _MINUTE)) < _DAY / _MINUTE:
        return _parts(*divmod(whole, 60), "h", "min")
    return _parts(*divmod(round(seconds / _HOUR), 24), "d", "h")


def _parts(large: int, small: int, larger: str, smaller: str) -> str:
    return f"{large:,} {larger}" + (f" {small} {smaller}" if small else "")


def stopwatch(seconds: float) -> str:
    """Return a time that goes on: `3.4 s`, `2:05`, `1:02:05`.

    Unlike a `duration`, it is nearly as wide as it was a moment ago, so that what stands beside it
    does not jump.
    """
    if seconds < _MINUTE - 0.05:  # else it would say 60.0
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_UNITS = (("d", _DAY), ("h", _HOUR), ("min", _MINUTE))


def exact_duration(seconds: float) -> str:
    """Return a duration that somebody has set: in the largest unit of which it is a multiple.

    Unlike a `duration`, it is not rounded: `90 s`, `2 min`, `36 h`.
    """
    for unit, size in _UNITS:
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.12g} {unit}"
    return f"{seconds:.12g} s"


def number_of(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun: `1 step`, `1,200 steps`.

    Args:
        number: how many.
        one: what one of them is called.
        many: what several are called; by default that with an *s*.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def size(count: int) -> str:
    """Return a number of bytes: `512 bytes`, `2.0 KB`, `3.5 MB`, in powers of 1,000."""
    number = float(count)
    for unit in ("bytes", "KB", "MB"):
        if number < 1000:  # noqa: PLR2004
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def clean(text: str) -> str:
    r"""Return a text for one line, with all that would do something to a terminal written out.

    What cannot be printed is told as in a literal of Python: `\x1b`, `\n`, `\u202e`.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def one_line(text: str) -> str:
    """Return a text that may have several lines as one, which is clean; its spaces are single."""
    return clean(" ".join(text.split()))


_ORDER = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""What a terminal takes as a colour, or as another order."""

_SIGNS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
    | dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
    | {0x7F: 0x2421}
)
"""Signs for control characters, and for those that turn the direction of what follows."""


def visible(text: str) -> str:
    """Return a text of any number of lines with what cannot be seen made visible, for a page.

    Unlike what is `clean`, it keeps its lines, and has lost the colours that a step has written
    for a terminal: a page has no terminal to protect, and they would be noise there. What is left
    has one sign for each character, as tables of output need it.
    """
    plain = _ORDER.sub("", storable(text)).replace("\r\n", "\n")
    return plain.translate(_SIGNS)


def shorten(text: str, most: int) -> str:
    """Return a text of at most so many characters: without its middle, if it is longer.

    Names often begin alike, and end in what tells them apart.
    """
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[-end:]}"
