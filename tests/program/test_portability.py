"""Nothing in this repository needs what only Unix systems have (fcntl, resource, os.sysconf).

The experiment under the same hook is in test_experiment.py.
"""
import os
import pathlib
import subprocess
import sys

import dpo

ROOT = pathlib.Path(dpo.__file__).resolve().parent
RESTRICTED = ROOT / "tests" / "restricted"    # a hook that removes those modules and functions
FOLDERS = ["", "tests", "tests/theorems", "tests/program", "tests/classroom"]
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
"""


def modules():
    """The names of all modules: `plots` is a package, the other folders are on the path.

    plots/__main__.py is left out: importing it would draw the published figures.
    """
    names = [path.stem for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    figures = sorted(path.stem for path in (ROOT / "plots").glob("[!_]*.py"))
    return names + [f"plots.{figure}" for figure in figures]


def run_python(code, *arguments):
    """`python -c code` under the hook -> all that it printed."""
    paths = [RESTRICTED, *(ROOT / folder for folder in FOLDERS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    process = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment,
                             capture_output=True, text=True, timeout=120)
    return process.stdout + process.stderr


def test_the_hook_removes_what_only_unix_has():
    """The control: under the hook, these imports and this attribute fail."""
    for code in ("import fcntl", "import resource"):
        assert "ModuleNotFoundError" in run_python(code)
    assert "AttributeError" in run_python("import os; os.sysconf")


def test_every_module_imports_without_modules_that_only_unix_has():
    """Each module of the repository, tests included, can be imported under the hook."""
    names = modules()
    assert {"train", "harness", "plots.frontier", "benchmark", "kill"} <= set(names)
    failures = run_python(IMPORT_ALL, *names)
    assert not failures, f"modules that cannot be imported:\n{failures}"
