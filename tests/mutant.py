"""Run the experiment with a planted bug in it:    python -m tests.mutant N [flags of train.py]

The assignment is to find the bug from the results, the figures and the theorems. Results go to
runs/mutant-N, unless --out names another folder. The bugs are in mutants_of_*.py: do not read
them before you have a guess.
"""
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import mutants  # noqa: E402
import harness  # noqa: E402
import train  # noqa: E402

# The default experiment does not call these functions, and these bugs do not change its results.
UNUSED_TARGETS = {
    "model.token_logp", "model.sequence_logp", "model.sequence_kl", "model.GPT.forward",
    "dpo.dpo_gradient", "dpo.dpo_gradient_logits", "dpo.plackett_luce_loss", "dpo.objective",
    "dpo.constant_weight_loss",
}
WITHOUT_EFFECT = {
    "reference_not_frozen", "loss_reduced", "half_precision_kept", "float64_narrowed",
    "tau_forgotten", "roll_out_with_gradients", "user_pairs_ignored", "nan_ignored",
    "noise_of_the_kl_forgotten", "rate_above_its_peak", "values_decay", "policy_loss_summed",
    "default_eps",
}


def main():
    """Plant the bug that the command line names and run train.py; returns the exit code."""
    count = len(mutants.MUTANTS)
    number = sys.argv[1] if len(sys.argv) > 1 else ""
    if not number.isdigit() or not 1 <= int(number) <= count:
        sys.exit(f"usage: python -m tests.mutant N [flags of train.py], N from 1 to {count}")
    mutant = mutants.MUTANTS[int(number) - 1]
    if mutant.target in UNUSED_TARGETS or mutant.name in WITHOUT_EFFECT:
        sys.exit(f"only tests can find bug {number}: choose another number")
    del sys.argv[1]
    if not any(flag.split("=")[0] == "--out" for flag in sys.argv):
        sys.argv += ["--out", f"runs/mutant-{number}"]
    os.environ.update(RANK="0", WORLD_SIZE="1")    # one process, because the bug is in this one
    with mutants.planted(mutant):
        return harness.run_program(train.main)


if __name__ == "__main__":
    sys.exit(main())
