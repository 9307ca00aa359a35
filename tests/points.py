"""What a teacher edits: points, time limits and settings of `python -m tests.grade`.

A submission is graded on the parts that it holds. A part of REQUIRED that is missing costs all of
its points.
"""

# ------------------------------------------------------------------------------------- points
POINTS = {
    "contract": 3,       # my_loss.py: the propositions of classroom/test_contract.py
    "training": 7,       # my_loss.py: its share of the optimal gain, the same for each beta
    "holes": 5,          # a filled-in starter, the same for each hole
    "tests": 10,         # my_tests.py: bugs found minus false alarms
    "number": 2,         # diagnosis.json: the number of the student's own bug
    "where": 5,          # the function with the bug in it; half of it for its module alone
    "named test": 3,     # a test that passes on the code as it is, and fails on the bug
}
REQUIRED = ()            # of "my_loss.py", "starter", "my_tests.py", "diagnosis.json"
PARTIAL = .5             # of a hole's points, in proportion, if some of its theorems fail

# --------------------------------------------------------------------------------- assignments
HOLES = ("dpo.dpo_loss", "ppo.gae")    # what tests/starter.py blanked
ALLOWED_IMPORTS = ("dpo", "model", "data", "ppo", "torch", "math", "random", "itertools", "numpy",
                   "world", "pytest")    # of my_tests.py; the theorems are its solution
BUGS = ""                # a file of private bugs, see COURSE.md; or the variable DPO_BUGS
ROSTER = ()              # names of a class: with it, no two of them draw the same bug

# ------------------------------------------------------------------- the training of a loss
PRESET = "default"       # of the baselines, if --baseline names no folder with them
FLAGS = ()               # further flags of train.py, the same for the baselines
BETAS = (1., 2.)         # unless my_loss.py has a line BETAS = (.1, .3) of its own, at most as many
WORKERS = 2
MIN_KL = .3              # nats; the share of a policy that moved less is noise, and gets no points
SHARE_OF_NO_POINTS = .3  # of the optimal gain; one standard error is added to a student's share
SHARE_OF_ALL_POINTS = .85
LEADERBOARD_KL = 2.

# ----------------------------------------------------------------------- time limits, seconds
SECONDS = {
    "contract": 60,
    "training": 600,
    "holes": 180,
    "tests": 300,
    "diagnosis": 120,
}
