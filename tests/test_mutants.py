"""Every planted bug is caught by a theorem, and every theorem catches a planted bug. The table is printed at the end of the
run."""
import importlib
import inspect

import pytest

import mutants
import mutants_of_the_pipeline  # noqa: F401 (plants the rest)

MODULES = ("test_data", "test_model", "test_section3", "test_section4", "test_section5", "test_appendix", "test_frontier",
           "test_ppo", "test_fixed_point")
UNCOVERED = {    # theorems that no mutant is planted for, and why
    "the_reward_takes_linear_time": "a reward slow enough to fail it would take this suite's time too",
}


def theorems(module):
    """The test functions of a module that take no arguments, by name."""
    found = {name[5:]: f for name, f in vars(importlib.import_module(module)).items() if name.startswith("test_") and callable(f)}
    return {name: f for name, f in found.items() if not inspect.signature(f).parameters}


THEOREMS = {name: f for module in MODULES for name, f in theorems(module).items()}
KILLS = {}    # theorem -> the mutants that it caught
TABLE = []    # (mutant, the theorems that caught it)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant):
    """Some theorem fails on the code with the bug in it. Theorems that have caught one before are run until one catches this."""
    named = [name for word in mutant.theorems.split() for name in (theorems(word) if word in MODULES else [word])]
    unknown = [name for name in named if name not in THEOREMS]
    assert not unknown, f"there is no theorem {unknown}: was it renamed?"
    caught = []
    with mutants.planted(mutant):
        for name in dict.fromkeys(named):
            if name not in UNCOVERED and not (caught and name in KILLS) and mutants.fails(THEOREMS[name]):
                caught.append(name)
                KILLS.setdefault(name, []).append(mutant.name)
    TABLE.append((mutant, caught))
    assert caught, f"this bug survives: {mutant.bug} ({mutant.target}). A theorem is missing, or none of these is sharp: {named}"


def test_every_theorem_catches_a_planted_bug():
    """A theorem that no bug can make fail proves nothing; those without a mutant are listed, with the reason."""
    if len(TABLE) < len(mutants.MUTANTS):
        pytest.skip("not all mutants were run")
    idle = [name for name in THEOREMS if name not in KILLS and name not in UNCOVERED]
    assert not idle, f"{len(idle)} theorems caught none of {len(TABLE)} planted bugs: plant one for each, or say why not: {idle}"
