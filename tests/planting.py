"""The machinery of planted bugs: `plant` records a bug, `planted` puts it into the code.

A bug replaces one name of the code. It is a function that takes the original and its arguments,
and does what the buggy code would do. For a constant, it takes the original and returns another
constant. mutants.py has all bugs.
"""
import contextlib
import functools
import importlib
import inspect
import pathlib
import sys
import tempfile
from typing import Callable, NamedTuple

CORE = "data", "model", "dpo", "ppo", "train"    # modules whose names may be replaced
PROJECT = *CORE, "harness", "plots"              # modules that may have imported these names


class Mutant(NamedTuple):
    """A planted bug."""
    name: str
    bug: str                     # what is wrong, in words
    target: str                  # the name that is replaced: module.name or module.Class.name
    theorems: tuple[str, ...]    # test functions (without `test_`) and test modules to run on it
    body: Callable               # body(original, *arguments): what the buggy code does


MUTANTS = []    # number N of `python -m tests.mutant N` is MUTANTS[N - 1]


# ------------------------------------------------------------------------------ recording a bug
def plant(bug, target, *theorems):
    """Decorator that adds a bug to MUTANTS.

    `theorems` are names of tests that should fail: one or more in a string, separated by spaces.
    """
    names = tuple(" ".join(theorems).split())

    def add(body):
        MUTANTS.append(Mutant(body.__name__, bug, target, names, body))
        return body

    return add


# ------------------------------------------------------------------- putting a bug into the code
def owner_of(target):
    """Return the object that holds a target, and the name there: "model.GPT.forward" -> GPT, name.

    The module is imported here and not above, because `train` imports the figures, which is slow.
    """
    module, *classes, name = target.split(".")
    assert module in CORE, f"{target}: the module must be one of {', '.join(CORE)}"
    owner = functools.reduce(getattr, classes, importlib.import_module(module))
    return owner, name


def with_bug(mutant, original):
    """Return the replacement of the original, with the bug in it.

    functools.wraps lets inspect.unwrap find the original, so a stage (harness.py) still finds its
    code.
    """
    if not callable(original):
        return mutant.body(original)

    @functools.wraps(original)
    def buggy(*arguments, **options):
        return mutant.body(original, *arguments, **options)

    return buggy


def replace(owner, name, old, new):
    """Replace owner.name, and wherever else the project holds `old` under this name.

    `from model import sample` gives the importing module a name of its own. train.METHODS holds
    the losses of the methods.
    """
    setattr(owner, name, new)
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] in PROJECT and getattr(module, name, None) is old:
            setattr(module, name, new)
    methods = getattr(sys.modules.get("train"), "METHODS", {})
    for method, functions in methods.items():
        methods[method] = tuple(new if function is old else function for function in functions)


@contextlib.contextmanager
def planted(mutant):
    """Context in which the code has the bug."""
    owner, name = owner_of(mutant.target)
    original = getattr(owner, name)
    bug = with_bug(mutant, original)
    replace(owner, name, original, bug)
    try:
        yield
    finally:
        replace(owner, name, bug, original)


def do_the_same(original, *arguments, **options):
    """The body of a replacement that is no bug."""
    return original(*arguments, **options)


def harmless(target):
    """A mutant that replaces a function by one that does the same.

    A test that fails on it looks for the replacement and not for a bug.
    """
    return Mutant("harmless", "none", target, (), do_the_same)


def fails(test):
    """Return whether a test raises: a bug may make a theorem false, or make it crash."""
    try:
        test()
    except KeyboardInterrupt:
        raise
    except BaseException as error:    # pytest's own exceptions are not subclasses of Exception
        return type(error).__name__ != "Skipped"
    return False


# ------------------------------------------------------------------------ the tests to run on a bug
def in_new_folder(test):
    """Run a test that takes a new folder, as pytest does with `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        test(pathlib.Path(folder))


def collect_tests(names):
    """Return the test functions among names: name without `test_` -> a function without arguments.

    Tests that take a new folder get one; tests that take other arguments are left out.
    """
    tests = {}
    for name, test in names.items():
        if not name.startswith("test_") or not callable(test):
            continue
        arguments = list(inspect.signature(test).parameters)
        if arguments == ["tmp_path"]:
            test = functools.partial(in_new_folder, test)
        if arguments in ([], ["tmp_path"]):
            tests[name.removeprefix("test_")] = test
    return tests
