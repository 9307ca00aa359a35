"""The mark of a file of tests: planted bugs that it finds, minus false alarms.        python -m tests.score my_tests.py

Your tests are functions test_* without arguments that import dpo, model, data or ppo. Each is run on the code as it is, where
failing is a false alarm, and then on each of DESIGN's thirteen bugs of public DPO code: a bug is found if a test fails on it.
"""
import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import mutants  # noqa: E402

BUGS = mutants.MUTANTS[:13]    # mutants.py begins with those of public code


def tests_of(path) -> dict:
    """The tests of a file, by name."""
    return {name: f for name, f in runpy.run_path(str(path)).items() if name.startswith("test_") and callable(f)}


def score(path) -> tuple[list[str], list[str]]:
    """The bugs that a file of tests finds, and its false alarms, by name."""
    tests = tests_of(path)
    alarms, found = [name for name, test in tests.items() if mutants.fails(test)], []
    for bug in BUGS:
        with mutants.planted(bug):    # the file is read anew: `from dpo import dpo_loss` has to meet the bug
            found += [bug.name] if mutants.fails(lambda: [test() for name, test in tests_of(path).items() if name not in alarms]) else []
    return found, alarms


if __name__ == "__main__":
    if len(sys.argv) != 2 or not pathlib.Path(sys.argv[1]).is_file():
        sys.exit("usage: python -m tests.score my_tests.py")
    try:
        found, alarms = score(sys.argv[1])
    except (Exception, SystemExit) as error:
        sys.exit(f"{sys.argv[1]} cannot be read: {type(error).__name__}: {error}")
    for bug in BUGS:
        print(f"{'found ' if bug.name in found else 'missed'}  {bug.bug}")
    for name in alarms:
        print(f"false alarm: {name} fails on the code as it is")
    print(f"score {len(found) - len(alarms)} of {len(BUGS)}")
