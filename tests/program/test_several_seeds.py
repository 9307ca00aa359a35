"""The experiment with two seeds, end to end: they share nothing, and the optimum is their mean."""
import math
import re
import shutil
import statistics

import pytest

import dpo
import harness
from tiny_run import modification_times, read_optimum, read_rows, run


@pytest.fixture(scope="module")
def two_seeds(tiny, tmp_path_factory):
    """The folder of a finished run of two seeds. The stages of the first were there already.

    Policies that are fitted to the optimum sample for it.
    """
    out = shutil.copytree(tiny[0], tmp_path_factory.mktemp("seeds") / "run")
    code, printed = run(out, "--seeds", 2, "--workers", 2, "--optimum-fits", 2)
    assert code == 0, printed
    return out


def test_each_seed_trains_every_policy(two_seeds):
    """results.jsonl has the same methods, settings and steps of both seeds, one `sft` row each."""
    rows = [row for row in read_rows(two_seeds) if not row["method"].startswith("best_of_n")]
    names = "method", "setting", "step", "final"
    of_seed = [sorted(tuple(row[name] for name in names) for row in rows if row["seed"] == seed)
               for seed in (0, 1)]
    assert of_seed[0] == of_seed[1], "the seeds have different rows"
    assert {row["seed"] for row in rows} == {0, 1}
    for seed in (0, 1):
        sft = [row for row in rows if row["method"] == "sft" and row["seed"] == seed]
        assert len(sft) == 1, f"seed {seed} has {len(sft)} rows of SFT, not one"


def test_each_seed_has_its_own_corpus_tokenizer_pi_ref_and_preferences(two_seeds):
    """The files of stages end in -seed0 and -seed1; these stages have other values for each."""
    names = [path.name for path in two_seeds.glob("*.pt")]
    unnamed = [name for name in names if not re.fullmatch(r".+-seed[01]\.\w+\.pt", name)]
    assert not unnamed, f"these files do not name their seed: {unnamed}"
    for stage in ("make-corpus-film", "make-corpus-restaurant", "learn-tokenizer",
                  "train-reference"):
        first, second = (two_seeds.glob(f"{stage}-seed{seed}.*.pt") for seed in (0, 1))
        [value_0], [value_1] = ([harness.load_stage(path)["value"] for path in paths]
                                for paths in (first, second))
        assert str(value_0) != str(value_1), f"{stage} has the same value for both seeds"
    pairs_0, pairs_1 = ((two_seeds / f"preferences-seed{seed}.jsonl").read_text("utf-8")
                        for seed in (0, 1))
    assert pairs_0 != pairs_1, "both seeds export the same preferences"


def test_the_curve_is_the_mean_over_seeds_and_holds_each_of_them(two_seeds):
    """At each beta, KL, reward and ESS are means of the seeds' own; errors add as squares."""
    optimum = read_optimum(two_seeds)
    assert set(optimum["seeds"]) == {"0", "1"}, f"the seeds are {list(optimum['seeds'])}"
    first, second = optimum["seeds"]["0"], optimum["seeds"]["1"]
    assert first["beta"] == second["beta"] == optimum["beta"], "the betas are not common"
    assert first["reward"] != second["reward"], "both seeds have one optimum: one set of prompts?"
    for name in ("kl", "reward", "ess"):
        means = [statistics.fmean(pair) for pair in zip(first[name], second[name])]
        assert optimum[name] == pytest.approx(means), f"`{name}` is not the mean over seeds"
    errors = [math.hypot(*pair) / 2 for pair in zip(first["se"], second["se"])]
    assert optimum["se"] == pytest.approx(errors), "`se` is not the error of a mean of two"
    assert optimum["ref_reward"] == pytest.approx((first["ref_reward"] + second["ref_reward"]) / 2)


def test_the_share_of_a_row_is_along_the_curve_of_its_own_seed(two_seeds):
    """optimal_reward and share are those of the formula at optimum.json's curve of the seed."""
    curves = read_optimum(two_seeds)["seeds"]
    rows = [row for row in read_rows(two_seeds) if row["share"] is not None]
    assert {row["seed"] for row in rows} == {0, 1}
    for row in rows:
        expected = dpo.share_of_optimal_gain(row["reward"], row["reward_se"], row["kl"],
                                             row["kl_se"], curves[str(row["seed"])])
        found = row["optimal_reward"], row["share"], row["share_se"]
        assert found == pytest.approx(expected), f"another curve for {row['method']}: {row}"


def test_a_seed_does_not_depend_on_the_seeds_beside_it(two_seeds, tmp_path):
    """`--seed 1` finds all policies of seed 1 in the folder of the run of two seeds.

    Its rows and its optimum are those of the run of two seeds.
    """
    out = shutil.copytree(two_seeds, tmp_path / "run")
    policies_before = modification_times(out, "train-*.pt")
    fits_before = modification_times(out, "fit-to-optimum-*.pt")
    assert len(fits_before) == 4, "two policies a seed must be fitted to the optimum"
    rows_before = [row for row in read_rows(out)
                   if row["seed"] == 1 and not row["method"].startswith("best_of_n")]
    code, printed = run(out, "--seed", 1, "--optimum-fits", 2)
    rows = [row for row in read_rows(out) if not row["method"].startswith("best_of_n")]
    for row in rows + rows_before:
        del row["config"]    # it has the first seed
    assert code == 0 and rows == rows_before, printed
    assert modification_times(out, "train-*.pt") == policies_before, "a policy was trained again"
    assert modification_times(out, "fit-to-optimum-*.pt") == fits_before, "a fit was made again"
    [curve] = read_optimum(out)["seeds"].values()
    assert curve == read_optimum(two_seeds)["seeds"]["1"]
