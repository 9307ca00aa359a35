"""Run the experiment with a planted bug in it.

    python -m tests.mutant N [flags of train.py]
    python -m tests.mutant --student NAME [flags of train.py]      a bug drawn by a name
    python -m tests.mutant --bugs FILE ...                         private bugs, see drawing.py

The assignment is to find the bug from the results, the figures and the theorems. Results go to
runs/mutant-N, unless --out names another folder. A healthy run in runs/PRESET is shown beside
them. The bugs are in mutants_of_*.py: do not read them before you have a guess.
"""
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import beside  # noqa: E402
import drawing  # noqa: E402
import mutants  # noqa: E402
import points  # noqa: E402
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
    "default_eps", "proposals_that_failed", "end_does_not_stop", "one_round_sampled",
    "planned_steps_reported",
}
NEEDED_FLAG = {    # bug -> the flag of train.py without which it has no effect
    "reference_of_the_round": "--rounds",
    "rounds_of_the_reference": "--rounds",
    "rounds_of_the_same_prompts": "--rounds",
    "rounds_of_equal_random_numbers": "--rounds",
    "schedule_of_one_round": "--rounds",
    "steps_of_one_epoch": "--epochs",
    "seeds_share_their_setup": "--seeds",
    "reference_of_the_first_seed": "--seeds",
    "proposals_of_all_seeds": "--seeds",
    "errors_of_seeds_averaged": "--seeds",
    "optimum_of_another_seed": "--seeds",
}


def take_option(name):
    """Take `name VALUE` out of the command line; returns the value, or empty text."""
    if name not in sys.argv[:-1]:
        return ""
    place = sys.argv.index(name)
    value = sys.argv[place + 1]
    del sys.argv[place:place + 2]
    return value


def choose_bug():
    """Take the number of the bug out of the command line, or draw one by the student's name."""
    student = take_option("--student")
    file = take_option("--bugs") or os.environ.get("DPO_BUGS") or points.BUGS
    private = drawing.load_bugs(file) if file else []
    if student:
        numbers = list(private) or drawing.visible_bugs(sys.modules[__name__])
        number = drawing.draw(student, numbers, points.ROSTER)
        print(f"{student} has bug {number}", flush=True)
        return number
    count = len(mutants.MUTANTS)
    number = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if not number.isdigit() or not 1 <= int(number) <= count:
        sys.exit(f"usage: python -m tests.mutant N [flags of train.py], N from 1 to {count}; or "
                 "--student NAME instead of N")
    return int(number)


def check_bug(number, flags):
    """Exit with a sentence if the bug does not change the results of this command."""
    mutant = mutants.MUTANTS[number - 1]
    if mutant.target in UNUSED_TARGETS or mutant.name in WITHOUT_EFFECT:
        sys.exit(f"only tests can find bug {number}: choose another number")
    needed = NEEDED_FLAG.get(mutant.name)
    if needed and needed not in flags:
        sys.exit(f"bug {number} shows only with several {needed[2:]}: add {needed} 4")


def show_beside_healthy():
    """Print what to look at first; the healthy run has the same flags, but for --out."""
    _, args = harness.read_flags(sys.argv[1:], train.Config, train.PRESETS, "")
    take_option("--out")
    words = [word for word in sys.argv[1:] if not word.startswith("--out=")]
    command = " ".join(["python train.py", *words])
    print(beside.compare(pathlib.Path("runs", args.preset), pathlib.Path(args.out), command))


def main():
    """Plant the bug that the command line names and run train.py; returns the exit code."""
    number = choose_bug()
    flags = {flag.split("=")[0] for flag in sys.argv}
    check_bug(number, flags)
    if "--out" not in flags:
        sys.argv += ["--out", f"runs/mutant-{number}"]
    os.environ.update(RANK="0", WORLD_SIZE="1")    # one process, because the bug is in this one
    with mutants.planted(mutants.MUTANTS[number - 1]):
        code = harness.run_program(train.main)
    if code in (0, 1) and not {"-h", "--help"} & flags:
        show_beside_healthy()
    return code


if __name__ == "__main__":
    sys.exit(main())
