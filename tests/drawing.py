"""Which bug a student gets, and private bugs that are in no repository.

A file of private bugs looks like the end of mutants.py:

    from planting import plant

    @plant("what is wrong", "dpo.dpo_loss", "a_theorem_that_should_fail")
    def name_of_the_bug(original, *arguments):
        return ...

`--bugs FILE` or the variable DPO_BUGS names it. It may be compiled (python -m py_compile FILE), so
that students can run it and not read it at a glance.
"""
import hashlib
import runpy
import sys
import unicodedata

import mutants


def load_bugs(path: str) -> range:
    """Add the bugs of a file to all bugs; returns their numbers. Exits if that fails."""
    before = len(mutants.MUTANTS)
    try:
        runpy.run_path(path)
    except Exception as error:
        sys.exit(f"cannot read the bugs in {path}: {type(error).__name__}: {error}")
    if len(mutants.MUTANTS) == before:
        sys.exit(f"there are no bugs in {path}: plant one with @plant, see tests/drawing.py")
    return range(before + 1, len(mutants.MUTANTS) + 1)


def normal(name: str) -> str:
    """A name without differences in case, spaces and punctuation."""
    letters = unicodedata.normalize("NFKC", name).casefold()
    return " ".join("".join(x if x.isalnum() else " " for x in letters).split())


def place(name: str, count: int) -> int:
    """A number below `count` that looks random and is the same for the same name."""
    return int.from_bytes(hashlib.sha256(normal(name).encode()).digest()) % count


def draw(name: str, numbers: list[int], roster: tuple[str, ...] = ()) -> int:
    """One of the numbers, the same for the same name.

    Two names rarely draw the same. No two names of a roster do, if there are enough numbers: who
    finds his place taken moves on to the next one.
    """
    if not normal(name):
        sys.exit(f"{name!r} is no name")
    names = sorted({normal(other) for other in roster})
    if normal(name) not in names:
        return numbers[place(name, len(numbers))]
    taken = {}
    for i, other in enumerate(names):
        index = place(other, len(numbers))
        while i < len(numbers) and index in taken.values():
            index = (index + 1) % len(numbers)
        taken[other] = index
    return numbers[taken[normal(name)]]


def visible_bugs(mutant) -> list[int]:
    """The numbers of the bugs that show in the default experiment, given the module mutant.py."""
    return [number for number, bug in enumerate(mutants.MUTANTS, 1)
            if bug.target not in mutant.UNUSED_TARGETS and bug.name not in mutant.WITHOUT_EFFECT
            and bug.name not in mutant.NEEDED_FLAG]
