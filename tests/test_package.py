"""The package as people install it, and the layers of its modules."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from coverage import CoverageData

import eventor

ROOT = Path(__file__).parent.parent

FLOORS = [
    "errors",
    "types",
    "words",
    "queue",
    "config",
    "expr",
    "data",
    "flow",
    "plan",
    "check",
    "drift",
    "why",
    "diagram",
    "files",
    "picture",
    "draw",
    "owner",
    "schema",
    "rows",
    "sqlite",
    "store",
    "history",
    "timeline",
    "excerpt",
    "chart",
    "report",
    "prune",
    "batch",
    "ledger",
    "fork",
    "signals",
    "keeper",
    "inside",
    "display",
    "output",
    "task",
    "worker",
    "zygote",
    "launch",
    "logs",
    "requests",
    "hooks",
    "progress",
    "bars",
    "cell",
    "live",
    "loop",
    "eventor",
    "attached",
    "rehearse",
    "named",
    "plain",
    "export",
    "show",
    "watch",
    "command",
    "cli",
    "telemetry",
    "__init__",
    "__main__",
]


def test_a_module_imports_only_from_floors_below_it():
    modules = {path.stem for path in (ROOT / "eventor").glob("*.py")}
    assert modules == set(FLOORS)
    for height, module in enumerate(FLOORS):
        tree = ast.parse((ROOT / f"eventor/{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eventor"):
                names = node.module.split(".")[1:] or [alias.name for alias in node.names]
                assert all(FLOORS.index(name) < height for name in names), (module, names)


@pytest.mark.parametrize("module", FLOORS[: FLOORS.index("diagram") + 1])
def test_the_rules_know_no_database_and_start_no_process(module):
    source = (ROOT / f"eventor/{module}.py").read_text()
    assert "sqlalchemy" not in source.replace("SQLAlchemy", "")
    assert ".start(" not in source


def test_public_names_are_those_that_are_promised():
    promised = {
        *("Eventor", "or_", "and_", "StepTriggers", "StepReplay", "RunMode", "TaskStatus"),
        *("EventorError", "Task", "RaisedEvent", "Cause"),
    }
    assert promised <= set(eventor.__all__)
    assert all(getattr(eventor, name) is not None for name in eventor.__all__)
    errors = [getattr(eventor, name) for name in eventor.__all__ if name.endswith("Error")]
    assert all(issubclass(error, eventor.EventorError) and error.__doc__ for error in errors)


@pytest.mark.slow
def test_what_a_forked_step_executes_is_measured(script, tmp_path):
    ran = script(
        """
        import sys, coverage, eventor
        measured = coverage.Coverage("measured", config_file=sys.argv[1])
        measured._warn_preimported_source = False
        measured.start()
        with eventor.Eventor(store=":memory:", config={"logdir": "."}) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("one", int))
            ev.trigger_event(go)
            ev()
        """,
        ROOT / "pyproject.toml",
    )
    assert ran.returncode == 0, ran.stderr
    # Of the owner nothing was saved, nor is it told by its steps what it has executed.
    (path,) = tmp_path.glob("measured.*")
    data = CoverageData(str(path))
    data.read()
    lines = {Path(file).name: len(data.lines(file)) for file in data.measured_files()}
    assert lines["task.py"] > 50
    assert "eventor.py" not in lines


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(tmp_path):
    build = [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"eventor-{eventor.__version__}-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "eventor/py.typed" in names
    assert {f"eventor/page/report.{kind}" for kind in ("html", "css", "js")} <= set(names)
    assert not [name for name in names if not name.startswith("eventor")]
    (sdist,) = tmp_path.glob(f"eventor-{eventor.__version__}.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/")[1] for name in archive.getnames()}
    assert {"eventor", "tests", "examples", "docs", "README.rst", "LICENSE"} <= inside

    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin/pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", wheel], check=True, capture_output=True)
    code = "import eventor; print(eventor.__version__, eventor.__file__)"
    ran = subprocess.run(
        [environment / "bin/python", "-c", code], cwd=tmp_path, capture_output=True, check=True
    )
    version, file = ran.stdout.decode().split()
    assert version == eventor.__version__
    assert Path(file).is_relative_to(environment)
