"""The score of a file of tests: planted bugs that it finds, minus false alarms.

    python -m tests.score my_tests.py

The tests are functions test_* without arguments that import dpo, model, data or ppo. Each one runs
on the code as it is, where a failure is a false alarm, and then on thirteen bugs of public DPO
code. A bug is found if a test fails on it. A test that also fails where a function is replaced by
one that does the same looks for the replacement and not for a bug: that is a false alarm, too.
"""
import pathlib
import runpy
import sys

TESTS = pathlib.Path(__file__).resolve().parent
for folder in (TESTS, TESTS / "theorems"):    # so that my_tests.py can import the theorems
    sys.path.insert(0, str(folder))

import mutants  # noqa: E402

BUGS = mutants.MUTANTS[:13]    # mutants.py begins with the bugs of public code


def read_tests(path) -> dict:
    """The test functions of a file, by name."""
    names = runpy.run_path(str(path))
    return {name: x for name, x in names.items() if name.startswith("test_") and callable(x)}


def find_false_alarms(path) -> list[str]:
    """The tests that fail on the code as it is, or on a function that is replaced by itself."""
    alarms = [name for name, test in read_tests(path).items() if mutants.fails(test)]
    for target in sorted({bug.target for bug in BUGS}):
        with mutants.planted(mutants.harmless(target)):
            alarms += [name for name, test in read_tests(path).items()
                       if name not in alarms and mutants.fails(test)]
    return alarms


def finds(path, bug: mutants.Mutant, false_alarms: list[str]) -> bool:
    """Whether a test of the file fails on the code with the bug in it.

    The file is read again with the bug planted, so that `from dpo import dpo_loss` imports the bug.
    """
    def run_tests() -> None:
        for name, test in read_tests(path).items():
            if name not in false_alarms:
                test()

    with mutants.planted(bug):
        return mutants.fails(run_tests)


def score(path) -> tuple[list[str], list[str]]:
    """The names of the bugs that a file of tests finds, and of its false alarms."""
    false_alarms = find_false_alarms(path)
    found = [bug.name for bug in BUGS if finds(path, bug, false_alarms)]
    return found, false_alarms


def main(path: str) -> None:
    """Print what a file of tests finds, and its score."""
    try:
        found, false_alarms = score(path)
    except (Exception, SystemExit) as error:
        sys.exit(f"{path} cannot be read: {type(error).__name__}: {error}")
    for bug in BUGS:
        print(f"{'found ' if bug.name in found else 'missed'}  {bug.bug}")
    for name in false_alarms:
        print(f"false alarm: {name} fails on the code as it is")
    print(f"score {len(found) - len(false_alarms)} of {len(BUGS)}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not pathlib.Path(sys.argv[1]).is_file():
        sys.exit("usage: python -m tests.score my_tests.py")
    main(sys.argv[1])
