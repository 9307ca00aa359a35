"""A program that grade.py starts: it runs one part, and prints the result as its last line.

    python tests/grade_child.py < REQUEST

The request is a line of JSON with a nonce; the result is a line that starts with the nonce. What
the student's code prints, or an exit in the middle, can not pass for a result.
"""
import contextlib
import importlib
import json
import os
import pathlib
import runpy
import sys

TESTS = pathlib.Path(__file__).resolve().parent
for folder in (TESTS / "classroom", TESTS / "theorems", TESTS, TESTS.parent):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

import drawing  # noqa: E402
import mutants  # noqa: E402
from planting import collect_tests  # noqa: E402


def error_of(test) -> str:
    """The exception of a test in one line; empty text if it passes."""
    try:
        test()
    except KeyboardInterrupt:
        raise
    except BaseException as error:    # SystemExit, and pytest's own exceptions
        return " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return ""


def load_tests(theorems: list) -> dict:
    """The tests [module, name] by name; all of a module if the name is null.

    A module that ends in .py is a file, and is read anew.
    """
    tests = {}
    for module, name in theorems:
        is_file = module.endswith(".py")
        names = runpy.run_path(module) if is_file else vars(importlib.import_module(module))
        found = collect_tests(names)
        if name and name not in found:
            raise LookupError(f"the test {name} takes arguments: name another one")
        tests.update({name: found[name]} if name else found)
    return tests


def empty(original, *arguments, **options):
    raise NotImplementedError("the function is empty")


def run_theorems(theorems: list, hole: str = "", bug: int = 0, bugs: str = "") -> dict:
    """The error of each theorem [module, name] on the code as it is; empty text if it holds.

    With a hole or a bug, also the theorems that fail with the function empty, or with the bug.
    """
    if bugs:
        drawing.load_bugs(bugs)
    errors = {name: error_of(test) for name, test in load_tests(theorems).items()}
    if bug:    # a test that looks for a replaced function is no test of the code
        with mutants.planted(mutants.harmless(mutants.MUTANTS[bug - 1].target)):
            for name, test in load_tests(theorems).items():
                errors[name] = errors[name] or error_of(test)
    planted = mutants.MUTANTS[bug - 1] if bug else mutants.Mutant("empty", "", hole, (), empty)
    with mutants.planted(planted):    # before a file is read: its imports must find the bug
        failing = [name for name, test in load_tests(theorems).items() if error_of(test)]
    return {"errors": errors, "failing": failing}


def run_contract(loss: str) -> dict:
    """The outcome of each test of the contract of a loss: its error, or empty text."""
    import pytest

    import harness
    errors, stopped = {}, []
    harness.UserLoss(loss)    # raises LossError for one that cannot be used at all

    class Recorder:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.failed:
                name = report.nodeid.split("::test_")[-1].split("[")[0]
                crash = getattr(report.longrepr, "reprcrash", None)
                errors[name] = crash.message if crash else str(report.longrepr or "")

        def pytest_collectreport(self, report):
            if report.failed:
                stopped.append(str(report.longrepr).splitlines()[-1].rpartition("Exit: ")[2])

        def pytest_keyboard_interrupt(self, excinfo):    # pytest.exit, too
            stopped.append(str(excinfo.value))

    path = TESTS / "classroom" / "test_contract.py"
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", "--loss", loss, str(path)],
                       plugins=[Recorder()])
    if not errors:
        reason = stopped[0] if stopped else f"the contract was not run (pytest: {code})"
        raise harness.LossError(reason)
    return {"errors": errors}


def run_score(path: str) -> dict:
    """What tests/score.py finds: names of bugs, and of false alarms."""
    import score
    found, false_alarms = score.score(path)
    return {"found": found, "false_alarms": false_alarms, "bugs": len(score.BUGS)}


PARTS = {"theorems": run_theorems, "contract": run_contract, "score": run_score}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    nonce, part = request.pop("nonce"), request.pop("part")
    torch.set_num_threads(1)
    try:
        result = PARTS[part](**request)
    except KeyboardInterrupt:
        raise
    except BaseException as error:    # SystemExit too
        result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(1, f"\n{nonce} {json.dumps(result)}\n".encode())


if __name__ == "__main__":
    main()
