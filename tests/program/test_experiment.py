"""The experiment, end to end, in its tiny preset: its files, its resuming, its failures.

test_several_seeds.py has the experiment with two seeds.
"""
import shutil
import subprocess
import sys

import pytest

import harness
from plots import cost
from tiny_run import RESTRICTED, modification_times, read_optimum, read_rows, run

COLUMNS = {"method", "setting", "seed", "step", "final", "reward", "reward_se", "kl", "kl_se",
           "optimal_reward", "share", "share_se", "seconds", "config"}
FIGURES = {"frontier", "inside", "best_of_n", "degeneration", "winrate", "domains", "judges",
           "prompts", "cost"}
STAGES_BEFORE_RUNS = ("make-corpus", "learn-tokenizer", "train-reference")
ON_PAIRS = ("dpo", "unlikelihood", "preferred_ft")


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of that folder, which a test may change."""
    return shutil.copytree(tiny[0], tmp_path / "run")


# ------------------------------------------------------------------------------ what a run writes
def test_a_run_writes_results_optimum_preferences_figure_and_table(tiny):
    """results.jsonl has one `sft` row and a final row of each run; figures and table are there."""
    out, printed = tiny
    rows = harness.read_jsonl(out / "results.jsonl")
    assert all(COLUMNS <= set(row) for row in rows), f"columns missing: {COLUMNS - set(rows[0])}"
    sft = [(row["step"], row["kl"], row["final"]) for row in rows if row["method"] == "sft"]
    assert sft == [(0, 0., True)]
    runs = {(row["method"], row["setting"]) for row in rows}
    assert runs == {(row["method"], row["setting"]) for row in rows if row["final"]}
    for method in {row["method"] for row in rows}:
        assert f"\n{method} " in printed, f"the printed table has no row of {method}"
    images = {path.stem for path in out.glob("*.png") if path.read_bytes()[1:4] == b"PNG"}
    assert images >= FIGURES
    preferences = harness.read_jsonl(out / "preferences-seed0.jsonl")
    assert {"prompt", "chosen", "rejected"} <= set(preferences[0])


def test_the_tiny_experiment_runs_without_modules_that_only_unix_has(tiny):
    """Two spawned workers complete the run under the hook (its control is in test_portability)."""
    assert (tiny[0] / "results.jsonl").exists()


def test_no_test_here_needs_a_network():
    """All runs of this file are under a hook that ends any process that opens a socket.

    This is the control: the hook does end such a process.
    """
    control = subprocess.run([sys.executable, "-c", "import socket; socket.socket()"],
                             env={"PYTHONPATH": str(RESTRICTED)}, capture_output=True)
    assert control.returncode == 99 and b"socket.__new__" in control.stderr


def test_the_optimum_reaches_far_and_its_lists_belong_together(tiny):
    """The lists of optimum.json have one length and reach KL 6."""
    optimum = read_optimum(tiny[0])
    lengths = {len(optimum[name]) for name in ("beta", "kl", "reward", "ess", "se")}
    assert len(lengths) == 1, f"the lists have different lengths: {lengths}"
    assert max(optimum["kl"]) >= 6, f"the curve ends at KL {max(optimum['kl']):.2f}, not at 6"


# ------------------------------------------------------------------------ resuming a run's folder
def test_a_finished_run_is_not_made_again(copy):
    """Every stage is loaded, the results are equal to the last digit, the costs are complete."""
    rows_before = read_rows(copy)
    times_before = modification_times(copy)
    code, printed = run(copy)
    assert code == 0 and read_rows(copy) == rows_before, printed
    assert modification_times(copy) == times_before, "a finished stage was written again"
    costs = [row for row in harness.read_jsonl(copy / "measured.jsonl")
             if row["figure"] == "cost" and row["method"] == "ppo"]
    assert costs, "measured.jsonl has no cost of PPO"
    for row in costs:
        for component in cost.COMPONENTS:
            assert row[f"{component}_seconds"] > 0, f"PPO's cost leaves out {component}: {row}"


def test_results_do_not_depend_on_the_number_of_workers(copy):
    """One worker computes all runs of two workers again, from the same pi_ref: equal results.

    The random numbers of a run depend only on the run's name.
    """
    rows_before = read_rows(copy)
    for path in copy.glob("*.pt"):
        if not path.name.startswith(STAGES_BEFORE_RUNS):
            path.unlink()
    code, printed = run(copy, "--workers", 1)
    assert code == 0 and read_rows(copy) == rows_before, printed


def test_an_unreadable_stage_is_named_and_made_again(copy):
    """A truncated file of a policy is reported by its name, and the results stay the same."""
    rows_before = read_rows(copy)
    [damaged] = copy.glob("train-policy-dpo-2.0-*.pt")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    code, printed = run(copy, "--workers", 1)
    assert code == 0 and damaged.name in printed and read_rows(copy) == rows_before, printed


# ------------------------------------------------------------------------------- pairs in rounds
def test_rounds_change_the_methods_on_pairs_alone_whatever_the_number_of_workers(copy):
    """With --rounds 2, one worker finds what two find; PPO and pi_ref are not trained again."""
    ppo_before = modification_times(copy, "train-policy-ppo*.pt")
    reference_before = modification_times(copy, "train-reference-*.pt")
    one_round = read_rows(copy)
    code, printed = run(copy, "--rounds", 2, "--workers", 2)
    two_rounds = read_rows(copy)
    assert code == 0, printed
    assert modification_times(copy, "train-policy-ppo*.pt") == ppo_before, "PPO has no rounds"
    assert modification_times(copy, "train-reference-*.pt") == reference_before
    for method in ON_PAIRS:
        one, two = ([row["reward"] for row in rows if row["method"] == method]
                    for rows in (one_round, two_rounds))
        assert one != two, f"--rounds changes nothing for {method}: is it read?"

    for method in ON_PAIRS:
        for path in copy.glob(f"train-policy-{method}-*.pt"):
            path.unlink()
    code, printed = run(copy, "--rounds", 2, "--workers", 1)
    assert code == 0 and read_rows(copy) == two_rounds, \
        f"the completions of a round depend on the workers?\n{printed}"


# ---------------------------------------------------------------------------- a loss of one's own
USER_LOSS = """
def mine(pair, beta):
    return (pair.logp_w - pair.logp_l - 1 / beta) ** 2
"""
LATE_FAILURES = """
calls = []

def late(pair, beta):
    calls.append(0)
    is_late = len(calls) > 3
    if beta > 1 and is_late:
        raise ValueError("tired")
    if beta == .5 and is_late:
        return pair.logp_w * float("nan")
    return pair.logp_w * -1.
"""


def cost_lines(out):
    """The lines of measured.jsonl that hold the costs."""
    lines = (out / "measured.jsonl").read_text("utf-8").splitlines()
    return [line for line in lines if '"figure": "cost"' in line]


def baseline_rows(out):
    """The rows of results.jsonl without those of the user's loss, sorted, without `config`."""
    rows = [{name: x for name, x in row.items() if name != "config"}
            for row in read_rows(out) if row["method"] != "mine"]
    return sorted(map(str, rows))


def test_a_loss_of_ones_own_gets_its_curve_beside_the_baselines(copy, tmp_path):
    """A loss adds its rows to results.jsonl; the baselines and their costs stay the same."""
    (tmp_path / "mine.py").write_text(USER_LOSS)
    baselines_before = baseline_rows(copy)
    costs_before = cost_lines(copy)
    code, printed = run(copy, "--loss", f"{tmp_path}/mine.py:mine", "--betas", ".3")
    assert code == 0 and baseline_rows(copy) == baselines_before, printed
    finished = [row for row in read_rows(copy) if row["method"] == "mine" and row["final"]]
    assert {row["setting"] for row in finished} == {.3}
    assert costs_before and cost_lines(copy) == costs_before, \
        "the costs of the baselines changed: do they leave out stages that this command skips?"


USER_PAIR = {"prompt": "This western", "chosen": ": the plot was superb.",
             "rejected": ": the plot was not really dull."}


def test_a_loss_on_pairs_of_ones_own_trains_that_loss_alone(copy, tmp_path):
    """With --pairs, baselines, optimum and costs stay those of pi_ref's own pairs.

    The only new stages are the policies of the loss.
    """
    (tmp_path / "mine.py").write_text(USER_LOSS)
    harness.write_jsonl(tmp_path / "pairs.jsonl", [USER_PAIR])
    before = set(copy.glob("*.pt"))
    optimum_before, baselines_before = read_optimum(copy), baseline_rows(copy)
    costs_before = cost_lines(copy)
    code, printed = run(copy, "--loss", f"{tmp_path}/mine.py:mine", "--betas", ".3",
                        "--pairs", tmp_path / "pairs.jsonl")
    assert code == 0, printed
    names = [path.name for path in set(copy.glob("*.pt")) - before]
    assert all(name.startswith("train-policy-mine-") for name in names) and len(names) == 1, \
        f"these stages depend on --pairs, but need not: {names}"
    assert read_optimum(copy) == optimum_before, "the optimum depends on the user's pairs"
    assert baseline_rows(copy) == baselines_before and cost_lines(copy) == costs_before


def test_a_loss_that_fails_late_ends_its_own_run_alone(copy, tmp_path):
    """NaN at beta .5 and an exception at beta 2 end their own runs; beta 1 finishes.

    The failures are in failures.jsonl, and the exit code is 1.
    """
    (tmp_path / "late.py").write_text(LATE_FAILURES)
    code, printed = run(copy, "--loss", f"{tmp_path}/late.py:late", "--betas", ".5,1,2",
                        "--workers", 2)
    failures = harness.read_jsonl(copy / "failures.jsonl")
    settings = sorted(failure["setting"] for failure in failures)
    assert code == 1 and settings == [.5, 2.] and "tired" in printed, printed
    assert any(row["method"] == "late" and row["setting"] == 1. and row["final"]
               for row in read_rows(copy))
