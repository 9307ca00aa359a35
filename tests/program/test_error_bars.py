"""Error bars and tables: over seeds if there are several, else over the prompts or batches of one.

Each number is compared with a formula that is written out here.
"""
import math

import pytest
import torch

import dpo
from plots import cost, frontier, inside, mean_over_steps, overoptimisation, tables


def standard_error(values):
    """The standard error of the mean of independent values."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def result_row(seed, step, **columns):
    """A row of results.jsonl of one DPO run, with the columns that the figures read."""
    return {"method": "dpo", "setting": 1., "seed": seed, "step": step, "kl": 1., "kl_se": .1,
            "reward_se": .02, **columns}


def final_row(kl, share, method="dpo", seed=0, share_se=.01):
    """A row of a finished policy, with the columns that the tables of shares read."""
    return {"method": method, "setting": kl, "seed": seed, "final": True, "kl": kl, "share": share,
            "share_se": share_se}


def test_a_row_says_of_the_steps_before_it_their_mean_and_its_standard_error():
    """`mean_over_steps` returns the mean and the standard error of each statistic.

    A single step has no known error. A NaN stays a NaN, because it ends the run by its name.
    """
    means = mean_over_steps([{"loss": loss, "weight": 3.} for loss in (1., 2., 4.)])
    assert means["loss"] == pytest.approx(7 / 3), "the mean over three steps"
    assert means["loss_se"] == pytest.approx(standard_error([1., 2., 4.])), "its standard error"
    assert (means["weight"], means["weight_se"]) == (3., 0.), "a constant has the error 0"
    assert mean_over_steps([{"loss": 5.}]) == {"loss": 5., "loss_se": 0.}, \
        "one step has a mean, but no error that could be known"
    with_nan = mean_over_steps([{"loss": math.nan}, {"loss": 1.}])
    assert math.isnan(with_nan["loss"]), "a NaN must stay one: it ends the run by name"


def test_bands_inside_training_are_over_batches_for_one_seed_and_over_seeds_for_several():
    """One seed has the errors of its rows; several seeds have the error of their mean."""
    rows = [result_row(seed, step, loss=seed + step, loss_se=.25)
            for seed in (0, 2, 7) for step in (10, 30)]
    steps, mean, se = inside.curve([row for row in rows if row["seed"] == 2], "loss")
    assert (list(steps), list(mean), list(se)) == ([5, 20], [12, 32], [.25, .25]), \
        "one seed has the errors of its rows, at the middle of their steps"
    _, mean, se = inside.curve(rows, "loss")
    assert mean == pytest.approx([13, 33]), "several seeds have their mean"
    assert se == pytest.approx([standard_error([0, 2, 7])] * 2), \
        "several seeds have the standard error of their mean"


def test_points_of_the_frontier_are_means_over_seeds_with_their_standard_errors():
    """One seed keeps its errors over prompts; several seeds have the error of their mean."""
    mean = frontier.mean_over_seeds([result_row(0, 10, reward=.7)])[0]
    assert (mean["reward"], mean["reward_se"], mean["kl_se"]) == (.7, .02, .1), \
        "one seed has the errors over prompts"
    rewards = [.6, .7, .74]
    rows = [result_row(seed, 10, reward=reward) for seed, reward in enumerate(rewards)]
    rows = [{**row, "kl": row["reward"]} for row in rows]
    means = frontier.mean_over_seeds(rows)
    assert len(means) == 1, "the seeds of one setting are one point"
    assert means[0]["reward"] == pytest.approx(sum(rewards) / 3), "the mean over seeds"
    assert means[0]["reward_se"] == means[0]["kl_se"] == pytest.approx(standard_error(rewards)), \
        "several seeds have the standard error of their mean, for reward and KL"


def test_the_optimum_of_several_seeds_is_the_mean_of_their_curves():
    """At each beta: mean KL, height, ESS and pi_ref's reward, and the standard error of a mean.

    The curve of each seed is kept under its number, as text, as JSON has it.
    """
    optima = {4: {"beta": [.4, .1], "kl": [1., 3.], "reward": [.7, .9], "ess": [90., 60.],
                  "se": [.03, .06], "ref_reward": .5},
              9: {"beta": [.4, .1], "kl": [2., 5.], "reward": [.6, .8], "ess": [70., 20.],
                  "se": [.04, .08], "ref_reward": .4}}
    mean = frontier.mean_optimum(optima)
    expected = {"beta": [.4, .1], "kl": [1.5, 4.], "reward": [.65, .85], "ess": [80., 40.],
                "se": [.025, .05]}
    for name, values in expected.items():
        assert mean[name] == pytest.approx(values), f"{name} must be that of the mean over seeds"
    assert mean["ref_reward"] == pytest.approx(.45), "pi_ref's mean reward, over seeds"
    assert mean["seeds"] == {"4": optima[4], "9": optima[9]}, "each seed must keep its own curve"
    assert tables.optimum_of(mean, 9) == optima[9], "a seed is found by its number"


def test_shares_between_two_policies_are_on_the_line_between_them_and_nowhere_else():
    """The share at a KL is along a method's own frontier: linear between two neighbours.

    The neighbours are finished policies of one seed. There is no share at a KL without policies
    near it.
    """
    rows = [final_row(3., .9, share_se=.03), final_row(1., .5), final_row(20., .1),
            final_row(2., .99, method="ppo"), {**final_row(1.5, 0.), "final": False}]
    assert tables.shares_at(rows, "dpo", 2.) == [pytest.approx((.7, .02))], \
        "KL 2 is in the middle between the policies at 1 and 3"
    assert tables.shares_at(rows, "dpo", .5) == [], "there is no share below the lowest KL"
    assert tables.shares_at(rows, "dpo", 5.) == [], "there is no share between distant policies"
    near = tables.shares_at(rows, "dpo", .95)
    assert near == tables.shares_at(rows, "dpo", 1.) == [pytest.approx((.5, .01))], \
        "a policy within a tenth of the KL is near enough"
    rows += [final_row(kl, share, seed=1) for kl, share in ((1., .6), (3., .8), (2., None))]
    shares = [share for share, _ in tables.shares_at(rows, "dpo", 2.5)]
    assert shares == pytest.approx([.8, .75]), "seeds must not mix"


def test_the_table_of_shares_is_over_seeds():
    """Several seeds have the standard error of their mean; one seed has its policy's own error."""
    shares = [.6, .7, .74]
    rows = [final_row(2., share, seed=seed) for seed, share in enumerate(shares)]
    assert f"68.0% +- {standard_error(shares):.1%}" in tables.table_of_shares(rows), \
        "several seeds have the standard error of their mean"
    assert "60.0% +- 1.0%" in tables.table_of_shares(rows[:1]), \
        "one seed has its policy's own error"
    with_sft = rows + [final_row(0., None, method="sft")]
    assert "SFT" not in tables.table_of_shares(with_sft), "SFT has no gain, and so no share"


def test_a_run_has_arrived_where_two_evaluations_in_a_row_are_good_enough():
    """The goal is 80% of the optimal gain of its seed at KL 2, and at the policy's own KL.

    One lucky evaluation is not enough, except that of the finished policy.
    """
    curve = {"kl": [0., 2., 4.], "reward": [.5, .8, .9], "beta": [.2, .1, .05],
             "se": [0., 0., 0.], "ref_reward": .5}
    lower = {**curve, "reward": [.4, .7, .8], "ref_reward": .4}
    optimum = {**lower, "seeds": {"0": curve, "1": lower}}
    optimal, *_ = dpo.optimal_reward(2., curve)
    goal = .5 + .8 * (optimal - .5)
    poor = {"reward": goal - .01, "share": .79}
    lucky = {"reward": goal + .05, "share": .9}
    costly = {"reward": goal + .1, "share": .7}    # the reward is bought with too much KL
    good = {"reward": goal + .01, "share": .85}
    evaluations = [poor, lucky, poor, costly, good, lucky]
    rows = [result_row(0, step, **evaluation, final=step == 6)
            for step, evaluation in enumerate(evaluations, 1)]
    without_share = result_row(0, 5, reward=good["reward"], share=None, final=True)

    def success_steps(rows):
        return [row["step"] for row in cost.first_success(rows, optimum)]

    assert success_steps(rows[::-1]) == [5], \
        "neither at the lucky evaluation, nor where the reward is bought with too much KL"
    assert success_steps(rows[:4] + rows[5:]) == [6], "the last evaluation has no next one"
    assert success_steps(rows[:5]) == [], "a run that failed has no finished policy"
    assert success_steps(rows[:4] + [without_share]) == [], \
        "beyond the end of the optimum no share is known"
    easier = [{**row, "reward": row["reward"] - .1} for row in rows]
    assert success_steps(easier) == [], "the goal of a seed is that of its own optimum"
    assert success_steps([{**row, "seed": 1} for row in easier]) == [5], \
        "another seed has another optimum, and another goal"


def test_what_a_learned_reward_promises_is_the_truth_if_it_ranks_as_the_truth_does():
    """Every increasing function of the true reward is matched to the true reward.

    A learned reward that ranks at random is matched to pi_ref's mean on samples of pi_ref.
    """
    generator = torch.Generator().manual_seed(0)
    ref_true = torch.rand(4000, generator=generator)
    policy_true = .9 * torch.rand(50, generator=generator) + .05
    matched = overoptimisation.matched_true_reward(5 * policy_true.logit() - 3,
                                                   5 * ref_true.logit() - 3, ref_true)
    assert (matched - policy_true).abs().max() < .005, \
        "a learned reward without errors has no gap, also near its bounds"
    noise = torch.randn(4000, generator=generator)
    matched = overoptimisation.matched_true_reward(noise, noise, ref_true)
    assert abs(matched.mean() - ref_true.mean()) < 1e-6, \
        "a reward that ranks at random promises pi_ref its own mean"
