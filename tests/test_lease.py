"""The rule of a lease: until when an owner trusts it, tries to renew it, and lets its steps run."""

import pytest

from eventor.storage import lease


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that a test sets, as a list of its one time."""
    now = [1_000.0]
    monkeypatch.setattr(lease, "clock", lambda: now[0])
    return now


def test_an_owner_trusts_its_lease_for_two_thirds_of_it(clock):
    held = lease.Lease(30)
    clock[0] = 1_019.9
    assert held.is_trusted
    clock[0] = 1_020.1
    assert not held.is_trusted
    held.renew(1_015.0)
    assert held.is_trusted


def test_it_counts_from_when_it_was_asked_for_and_not_from_the_answer(clock):
    held = lease.Lease(30)
    asked_at = clock[0] = 1_010.0
    clock[0] = 1_018.0
    held.renew(asked_at)
    assert held.try_until == pytest.approx(1_030.0)
    assert held.steps_until == pytest.approx(1_035.0)


@pytest.mark.parametrize("seconds", [0.3, 3, 30, 86_400])
def test_whatever_its_length_steps_end_after_the_last_try_and_before_it_is_over(clock, seconds):
    held = lease.Lease(seconds)
    assert 1_000 < held.try_until < held.steps_until < 1_000 + seconds
    # Who was stopped for long has a last try, which is no longer than that.
    clock[0] = 2_000_000.0
    assert held.try_until - clock[0] == pytest.approx(min(1.0, seconds / 6))
    assert not held.is_trusted


def test_a_long_transaction_renews_it_again(clock):
    held = lease.Lease(30)
    assert not held.is_due(1_000.0)
    clock[0] = 1_005.1
    assert held.is_due(1_000.0)


def test_the_clock_goes_on():
    before = lease.clock()
    assert lease.clock() >= before > 0
