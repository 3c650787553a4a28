"""When tasks go on, as places on a scale."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from eventor.look.timeline import concurrency, distance, lanes

SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 10)).map(lambda span: (span[0], sum(span))),
    max_size=30,
)


@given(SPANS)
def test_how_many_go_on_at_once_is_what_counting_says(spans):
    steps = concurrency(spans)
    for moment in range(45):
        number = next((number for at_, number in reversed(steps) if at_ <= moment), 0)
        assert number == sum(began <= moment < ended for began, ended in spans)
    assert all(a[1] != b[1] and a[0] < b[0] for a, b in itertools.pairwise(steps))
    assert not steps or steps[-1][1] == 0


@given(SPANS)
def test_lanes_are_as_few_as_can_be_and_nothing_overlaps_in_one(spans):
    found = lanes(spans)
    for (one, lane), (other, of_other) in itertools.combinations(zip(spans, found, strict=True), 2):
        assert lane != of_other or one[1] <= other[0] or other[1] <= one[0]
    most = max((number for _, number in concurrency(spans)), default=0)
    assert len(set(found)) == most
    assert not found or max(found) == most - 1


def test_what_takes_no_time_is_in_a_lane_and_goes_on_with_nothing():
    assert lanes([(1, 1), (1, 1), (0, 2)]) == [1, 1, 0]
    assert concurrency([(1, 1)]) == []


@given(st.floats(0, 1e10), st.integers(1, 30))
def test_ticks_are_as_many_as_asked_for_at_most(seconds, most):
    step = distance(seconds, most)
    assert step > 0
    assert step * most >= seconds
    finer = distance(seconds, most * 4, step)
    assert finer <= step
    assert abs(step / finer - round(step / finer)) < 1e-6
