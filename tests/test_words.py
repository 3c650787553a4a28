"""What is told in words: durations, numbers, and texts that harm nobody."""

import html
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventor.words import (
    clean,
    duration,
    exact_duration,
    number_of,
    one_line,
    shorten,
    size,
    stopwatch,
    visible,
)


@given(st.floats(1e-5, 1e9), st.floats(1e-5, 1e9))
def test_a_longer_duration_is_not_told_as_a_shorter_one(one, other):
    def value(seconds):
        units = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86_400}
        parts = duration(seconds).replace(",", "").split()
        return sum(
            float(number) * units[unit]
            for number, unit in zip(parts[::2], parts[1::2], strict=True)
        )

    assert value(one) == pytest.approx(one, rel=0.03)
    assert one > other or value(one) <= value(other) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0, "0 s"),
        (0.0004, "0.4 ms"),
        (0.412, "412 ms"),
        (0.9996, "1 s"),
        (2.314, "2.31 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (3_599.6, "1 h"),
        (86_399, "1 d"),
        (86_400 * 21 + 14_400, "21 d 4 h"),
    ],
)
def test_durations_are_told_in_the_units_that_suit_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0.0 s"), (59.94, "59.9 s"), (59.96, "0:59"), (60, "1:00"), (3599, "59:59")),
        *((3600, "1:00:00"), (100_000, "27:46:40")),
    ],
)
def test_a_time_that_goes_on_is_as_on_a_stopwatch(seconds, text):
    assert stopwatch(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((0.5, "0.5 s"), (30, "30 s"), (90, "90 s"), (120, "2 min"), (3600, "1 h")),
        *((129_600, "36 h"), (604800.0, "7 d")),
    ],
)
def test_a_delay_is_shown_in_the_largest_unit(seconds, shown):
    assert exact_duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (1, ["step"], "1 step"),
        (0, ["step"], "0 steps"),
        (1200, ["step"], "1,200 steps"),
        (1, ["task stays ready", "tasks stay ready"], "1 task stays ready"),
        (2, ["task stays ready", "tasks stay ready"], "2 tasks stay ready"),
    ],
)
def test_a_number_has_its_noun(number, words, text):
    assert number_of(number, *words) == text


@given(st.text())
def test_what_is_clean_does_nothing_to_a_terminal_and_is_markup_once_it_is_escaped(text):
    shown = clean(text)
    assert shown.isprintable()
    assert clean(shown) == shown
    assert ET.fromstring(f"<a>{html.escape(shown)}</a>").text in (shown, None)
    assert one_line(text).isprintable()


def test_what_cannot_be_printed_is_written_out():
    assert clean("a b\x1b[31m\n\u202e\ud800") == r"a b\x1b[31m\n\u202e\ud800"
    assert one_line(" a \n  b\x1b[31m\n") == r"a b\x1b[31m"


def test_on_a_page_a_text_keeps_its_lines_and_loses_its_colours():
    assert visible("a\x1b[1;31mred\x1b[0m\a\r\nb\tc\u202e\0") == "ared\u2407\nb\tc\ufffd\\x00"


@given(st.text(min_size=1, max_size=40), st.integers(4, 30))
def test_a_long_text_has_lost_its_middle(text, most):
    shown = shorten(text, most)
    assert len(shown) == min(len(text), most)
    if len(text) > most:
        assert text.startswith(shown[: most - most // 3 - 1])
        assert text.endswith(shown[-(most // 3) :])


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (2048, "2.0 KB"), (3_500_000, "3.5 MB"), (7e9, "7.0 GB")]
)
def test_sizes_are_told_in_words(count, words):
    assert size(count) == words
