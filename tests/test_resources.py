"""Resources and priorities: what may start, and in which order."""

import pytest

import eventor as evr
from tests.conftest import statuses, wait_until

RESOURCES = {"gpu": 2, "licence": 1}


def order(ev):
    return [task.step for task in sorted(ev.tasks(), key=lambda task: task.started_at)]


def test_a_step_starts_when_it_can_have_all_it_asks_for(make, tmp_path):
    """With four slots and two gpus, no more than two of these run at a time, and two do."""
    ev = make(config={"max_concurrent": 4, "resources": RESOURCES})
    go = ev.add_event("go")

    def use(name):
        here = tmp_path / f"here {name}"
        here.touch()
        wait_until(lambda: len(list(tmp_path.glob("* *"))) >= 2)
        count = len(list(tmp_path.glob("here *")))
        here.rename(tmp_path / f"gone {name}")
        return count

    for name in "abcdef":
        ev.add_assoc(go, ev.add_step(name, use, args=(name,), config={"resources": {"gpu": 1}}))
    ev.trigger_event(go)
    assert ev() is True
    counts = [task.result for task in ev.tasks()]
    assert max(counts) <= 2
    assert order(ev) == list("abcdef")


def test_none_starves_and_others_pass_by(make, tmp_path):
    """`both` waits for two gpus: what asks for one after it waits too, what asks for none does not.

    The one that runs first waits until `free` has run, so it has passed by.
    """
    ev = make(config={"max_concurrent": 2, "resources": RESOURCES})
    go, done = ev.add_event("go"), ev.add_event("done")
    seen = tmp_path / "seen"
    needs = {"first": {"gpu": 1}, "both": {"gpu": 2}, "after": {"gpu": 1}, "free": {}}
    funcs = {"first": lambda: wait_until(seen.exists), "free": seen.touch}
    for name, resources in needs.items():
        func = funcs.get(name, int)
        triggers = {"at_success": done} if name == "free" else {}
        ev.add_assoc(
            go, ev.add_step(name, func, triggers=triggers, config={"resources": resources})
        )
    ev.trigger_event(go)
    assert ev() is True
    assert order(ev) == ["first", "free", "both", "after"]


def test_resources_are_given_back_by_a_failure_and_while_a_retry_waits(make, tmp_path):
    ev = make(config={"resources": RESOURCES, "stop_on_exception": False, "max_concurrent": 2})
    go = ev.add_event("go")
    tried = tmp_path / "tried"

    def flaky():
        if not tried.exists():
            tried.touch()
            int("x")

    retry = {"max_attempts": 2, "retry_delay": 0.2, "resources": {"licence": 1}}
    ev.add_assoc(go, ev.add_step("flaky", flaky, config=retry))
    ev.add_assoc(go, ev.add_step("bad", int, args=("x",), config={"resources": {"licence": 1}}))
    ev.add_assoc(go, ev.add_step("last", int, config={"resources": {"licence": 1}}))
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev) == {"flaky[1]": "success", "bad[1]": "failure", "last[1]": "success"}
    assert order(ev) == ["bad", "last", "flaky"]


@pytest.mark.stores("either")
def test_resources_are_free_again_after_a_crash(start, place, tmp_path):
    code = """
        import os, sys, time
        import eventor as evr

        config = {"logdir": ".", "resources": {"gpu": 1}}
        ev = evr.Eventor(store=os.environ["STORE"], run_mode=sys.argv[1], config=config)
        go = ev.add_event("go")

        def hold():
            open("held", "w").close()
            time.sleep(60 if ev.recovery == 0 and sys.argv[1] == "restart" else 0)

        ev.add_assoc(go, ev.add_step("hold", hold, config={"resources": {"gpu": 1}}))
        ev.trigger_event(go, 1)
        print(ev())
    """
    owner = start(code, "restart", STORE=place.store)
    wait_until((tmp_path / "held").exists)
    owner.kill()
    owner.wait()
    assert start(code, "continue", STORE=place.store).communicate(timeout=60)[0] == "True\n"


def test_a_higher_priority_starts_first(make):
    ev = make()
    go = ev.add_event("go")
    for name, priority in {"a": -1, "b": 0, "c": 5, "d": 0, "e": 5}.items():
        ev.add_assoc(go, ev.add_step(name, int, config={"priority": priority}))
    ev.trigger_event(go)
    assert [task.step for task in ev.preview().runs] == list("cebda")
    assert ev() is True
    assert order(ev) == list("cebda")


@pytest.mark.stores("either")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"resources": {"gpu": 3}}, "asks for 3 of 'gpu'; expected at most 2, .*gpu: 2, licence"),
        (
            {"resources": {"cpu": 1}},
            r"and there is no such resource; .* \(gpu: 2, licence: 1\); did you mean 'gpu'\?$",
        ),
        (
            {"resources": {"memory": 1}},
            r"'memory', and there is no such resource; expected one of .* \(gpu: 2, licence: 1\)$",
        ),
        ({"resources": ["gpu"]}, r"resources .* is \['gpu'\]; expected a mapping of names"),
        ({"resources": {"gpu": -1}}, "expected a mapping of names to whole numbers, not below 0"),
        ({"resources": {"gpu": 0.5}}, "expected a mapping of names to whole numbers"),
        ({"priority": 0.5}, "priority .* is 0.5; expected a whole number"),
    ],
)
def test_what_cannot_be_had_is_an_error_when_the_step_is_added(make, config, words):
    ev = make(config={"resources": RESOURCES})
    with pytest.raises(evr.ConfigError, match=words):
        ev.add_step("s", int, config=config)
    ev.add_step("s", int)


@pytest.mark.stores("either")
def test_bad_resources_are_named(make):
    with pytest.raises(evr.ConfigError, match=r"resources in Eventor's config is \{'gpu': '2'\}"):
        make(config={"resources": {"gpu": "2"}})
    ev = make()
    with pytest.raises(evr.ConfigError, match=r"no such resource; .* config \(there are none\)$"):
        ev.add_step("s", int, config={"resources": {"gpu": 1}})
    ev.add_step("s", int, config={"resources": {"gpu": 0}})
