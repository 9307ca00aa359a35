"""All planted bugs: import this file to have them in MUTANTS. Some theorem fails on each of them.

classroom/test_planted_bugs.py checks that no bug survives, and says which theorem finds it. To
plant a bug of your own, write it at the end of this file:

    @plant("what is wrong", "module.name", "a_theorem_that_should_fail", "or_a_test_module")
    def name_of_the_bug(original, *arguments):
        return ...

planting.py has the machinery.
"""
from planting import MUTANTS, Mutant, fails, harmless, plant, planted  # noqa: F401 (re-exported)

# Each file plants its bugs when it is imported. Their order gives the numbers of the bugs;
# mutants_of_dpo.py comes first, because the first thirteen are those of public DPO code.
import mutants_of_dpo  # noqa: E402, F401
import mutants_of_the_optimum  # noqa: E402, F401
import mutants_of_the_model  # noqa: E402, F401
import mutants_of_the_task  # noqa: E402, F401
import mutants_of_ppo  # noqa: E402, F401
import mutants_of_the_experiment  # noqa: E402, F401
