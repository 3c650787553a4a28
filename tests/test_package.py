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

PACKAGES = ["rules", "storage", "steps", "look", "cli"]

FLOORS = [
    "errors",
    "types",
    "words",
    "rules.queue",
    "rules.config",
    "rules.expr",
    "rules.data",
    "rules.flow",
    "rules.plan",
    "rules.check",
    "rules.drift",
    "rules.why",
    "storage.owner",
    "storage.schema",
    "storage.rows",
    "storage.lease",
    "storage.url",
    "storage.location",
    "storage.backend",
    "storage.sqlite",
    "storage.sqlite_backend",
    "storage.postgresql",
    "storage.store",
    "storage.history",
    "storage.prune",
    "storage.batch",
    "storage.ledger",
    "steps.fork",
    "steps.signals",
    "steps.keeper",
    "steps.inside",
    "steps.display",
    "steps.output",
    "steps.task",
    "steps.worker",
    "steps.zygote",
    "steps.launch",
    "steps.line",
    "steps.remote",
    "steps.submit",
    "look.diagram",
    "look.files",
    "look.picture",
    "look.draw",
    "look.timeline",
    "look.excerpt",
    "look.chart",
    "look.report",
    "look.progress",
    "look.bars",
    "look.cell",
    "look.live",
    "logs",
    "requests",
    "hooks",
    "loop",
    "eventor",
    "attached",
    "telemetry",
    "__init__",
    "cli.rehearse",
    "cli.named",
    "cli.plain",
    "cli.export",
    "cli.show",
    "cli.watch",
    "cli.command",
    "cli.commands",
    "__main__",
]


def file_of(module):
    return ROOT / "eventor" / f"{module.replace('.', '/')}.py"


def test_a_module_imports_only_from_floors_below_it():
    files = {path for path in (ROOT / "eventor").rglob("*.py") if path.name != "__init__.py"}
    assert files | {file_of("__init__")} == {file_of(module) for module in FLOORS}
    for height, module in enumerate(FLOORS):
        for node in ast.walk(ast.parse(file_of(module).read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("eventor"):
                continue
            place = node.module.removeprefix("eventor").lstrip(".")
            inside = place in {"", *PACKAGES} and not (module.startswith("cli.") and place == "")
            names = [".".join(filter(None, (place, one.name))) for one in node.names]
            for name in names if inside else [place or "__init__"]:
                assert FLOORS.index(name) < height, (module, name)


def test_a_package_has_a_word_of_its_own_and_nothing_else():
    for wing in PACKAGES:
        (said,) = ast.parse((ROOT / "eventor" / wing / "__init__.py").read_text()).body
        assert isinstance(said.value.value, str)


@pytest.mark.parametrize("module", [one for one in FLOORS if one.startswith("rules.")])
def test_the_rules_know_no_database_and_start_no_process(module):
    source = file_of(module).read_text()
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
def test_nothing_of_postgresql_is_loaded_for_a_file(script):
    ran = script("""
        import sys
        import eventor as evr

        with evr.Eventor(store="flow.db", config={"logdir": "."}) as ev:
            ev()
        print([name for name in sys.modules if "postgresql" in name or "psycopg" in name])
    """)
    assert ran.stdout == "[]\n"


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
@pytest.mark.timeout(600)
def test_wheel_and_sdist_hold_what_they_should(tmp_path):
    build = [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"eventor-{eventor.__version__}-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "eventor/py.typed" in names
    assert {f"eventor/look/page/report.{kind}" for kind in ("html", "css", "js")} <= set(names)
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
