"""Every planted bug is caught by a theorem, and every theorem catches a planted bug.

pytest prints the table of bugs and theorems at the end of the run (conftest.py).
"""
import importlib

import pytest

import mutants
from planting import collect_tests

MODULES = (
    "test_true_reward", "test_grammar", "test_preferences", "test_log_probabilities",
    "test_sampler", "test_objective_and_optimum", "test_dpo_loss", "test_dpo_gradient",
    "test_equivalent_rewards", "test_rankings_and_baselines", "test_frontier", "test_handing_over",
    "test_optimum_of_a_mixture", "test_reward_model_and_ppo", "test_ppo_update",
    "test_ppo_fixed_point", "test_loops_of_reward_and_values", "test_loops_of_ppo",
    "test_stages_before_training", "test_fits_to_the_optimum", "test_independent_random_numbers",
    "test_loops_of_training", "test_loops_of_rounds", "test_evaluation",
)
UNCOVERED = {    # theorem without a planted bug -> the reason
    "a_lone_gradient_moves_a_parameter_by_32_learning_rates_unless_beta2_is_smaller":
        "it is about Adam itself, which is PyTorch's",
    "the_reward_takes_linear_time": "a reward slow enough to fail it would slow down this suite",
}


THEOREMS_OF = {module: collect_tests(vars(importlib.import_module(module))) for module in MODULES}
THEOREMS = {name: theorem for theorems in THEOREMS_OF.values()
            for name, theorem in theorems.items()}
CAUGHT_BY = {}    # theorem -> names of the mutants that it caught
TABLE = []        # (mutant, names of the theorems that caught it)


def theorems_against(mutant):
    """Return the names of the theorems to run on a mutant, those of whole modules included."""
    names = []
    for name in mutant.theorems:
        names += THEOREMS_OF.get(name, [name])
    unknown = [name for name in names if name not in THEOREMS]
    assert not unknown, f"there are no theorems {unknown}: was one renamed?"
    return list(dict.fromkeys(names))


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant):
    """At least one of its theorems fails on the code with the bug in it.

    To save time, a theorem that caught a bug before is run only while this bug is not yet caught.
    """
    names = theorems_against(mutant)
    caught = []
    with mutants.planted(mutant):
        for name in names:
            is_needed = not caught or name not in CAUGHT_BY
            if name in UNCOVERED or not is_needed:
                continue
            if mutants.fails(THEOREMS[name]):
                caught.append(name)
                CAUGHT_BY.setdefault(name, []).append(mutant.name)
    TABLE.append((mutant, caught))
    assert caught, \
        f"no theorem finds this bug: {mutant.bug} ({mutant.target}). A theorem is missing, or " \
        f"all of these are too weak: {names}"


def test_every_theorem_catches_a_planted_bug():
    """A theorem that fails on no planted bug proves nothing. UNCOVERED lists the exceptions."""
    if len(TABLE) < len(mutants.MUTANTS):
        pytest.skip("not all mutants were run")
    idle = [name for name in THEOREMS if name not in CAUGHT_BY and name not in UNCOVERED]
    assert not idle, \
        f"{len(idle)} theorems caught none of the {len(TABLE)} planted bugs: plant a bug for " \
        f"each, or list it in UNCOVERED with the reason: {idle}"
