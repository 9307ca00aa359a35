"""The experiment with a planted bug, to be found from its table, its figure and the theorems.    python -m tests.mutant 7 [flags]

The flags are those of train.py; everything goes to runs/mutant-7 unless --out says otherwise. The bugs are in mutants.py: do not
look before you have a guess.
"""
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import mutants  # noqa: E402
import mutants_of_the_pipeline  # noqa: E402, F401 (plants the rest)
import train  # noqa: E402

UNSEEN = {    # functions that the tests alone call, and bugs that change nothing in the default experiment
    *("model.token_logp model.sequence_logp model.sequence_kl model.GPT.forward dpo.dpo_gradient dpo.dpo_gradient_logits dpo.plackett_luce_loss "
      "dpo.objective dpo.constant_weight_loss").split(),
    *"reference_not_frozen loss_reduced half_precision_kept float64_narrowed tau_forgotten roll_out_with_gradients".split()}

if __name__ == "__main__":
    count = len(mutants.MUTANTS)
    if len(sys.argv) < 2 or not sys.argv[1].isdigit() or not 1 <= int(sys.argv[1]) <= count:
        sys.exit(f"usage: python -m tests.mutant N [flags of train.py], N from 1 to {count}")
    number = sys.argv.pop(1)
    if not any(flag.split("=")[0] == "--out" for flag in sys.argv):
        sys.argv += ["--out", f"runs/mutant-{number}"]
    os.environ.update(RANK="0", WORLD_SIZE="1")    # the bug is in this process alone
    bug = mutants.MUTANTS[int(number) - 1]
    if {bug.target, bug.name} & UNSEEN:
        sys.exit(f"bug {number} shows in the tests alone; take another number")
    with mutants.planted(bug):
        train.LOSSES.update({name: getattr(train.dpo, loss.__name__) for name, loss in train.LOSSES.items()})
        sys.exit(train.data.answer(train.main, train.dpo.LossError))
