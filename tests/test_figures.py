"""Error bars: over seeds where there are several, else over what one seed has; each against a formula written out here."""
import math

import pytest
import torch

import dpo
from plots import cost, frontier, inside, overoptimisation, results


def standard_error(x: list[float]) -> float:
    mean = sum(x) / len(x)
    return math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1) / len(x))


def row(seed, step, **columns):
    return {"method": "dpo", "setting": 1., "seed": seed, "step": step, "kl": 1., "kl_se": .1, "reward_se": .02, **columns}


def test_a_row_says_of_the_steps_before_it_their_mean_and_its_standard_error():
    found = frontier.averages([{"loss": x, "weight": 3.} for x in (1., 2., 4.)])
    assert found["loss"] == pytest.approx(7 / 3) and found["loss_se"] == pytest.approx(standard_error([1., 2., 4.]))
    assert (found["weight"], found["weight_se"]) == (3., 0.)
    assert frontier.averages([{"loss": 5.}]) == {"loss": 5., "loss_se": 0.}, "one step has a mean and no error that could be known"
    assert math.isnan(frontier.averages([{"loss": math.nan}, {"loss": 1.}])["loss"]), "a NaN must stay one: it ends the run by name"


def test_bands_inside_training_are_over_batches_for_one_seed_and_over_seeds_for_several():
    rows = [row(seed, step, loss=seed + step, loss_se=.25) for seed in (0, 2, 7) for step in (10, 30)]
    steps, mean, se = inside.curve([r for r in rows if r["seed"] == 2], "loss")
    assert (list(steps), list(mean), list(se)) == ([5, 20], [12, 32], [.25, .25]), "one seed has the rows' own errors, at the middle of their steps"
    _, mean, se = inside.curve(rows, "loss")
    assert mean == pytest.approx([13, 33]) and se == pytest.approx([standard_error([0, 2, 7])] * 2)


def test_points_of_the_frontier_are_means_over_seeds_with_their_standard_errors():
    one = frontier.over_seeds([row(0, 10, reward=.7)])
    assert (one[0]["reward"], one[0]["reward_se"], one[0]["kl_se"]) == (.7, .02, .1), "one seed has the errors over prompts"
    rewards = [.6, .7, .74]
    several = frontier.over_seeds([row(seed, 10, reward=r) | {"kl": r} for seed, r in enumerate(rewards)])
    assert len(several) == 1 and several[0]["reward"] == pytest.approx(sum(rewards) / 3)
    assert several[0]["reward_se"] == several[0]["kl_se"] == pytest.approx(standard_error(rewards))


def finished(kl, share, method="dpo", seed=0, share_se=.01):
    return {"method": method, "setting": kl, "seed": seed, "final": True, "kl": kl, "share": share, "share_se": share_se}


def test_shares_between_two_policies_are_on_the_line_between_them_and_nowhere_else():
    """Along a method's own frontier: between neighbours, of one seed at a time, and not where there is no policy near."""
    rows = [finished(3., .9, share_se=.03), finished(1., .5), finished(20., .1), finished(2., .99, "ppo"), finished(1.5, 0.) | {"final": False}]
    assert results.shares_at(rows, "dpo", 2.) == [pytest.approx((.7, .02))]
    assert results.shares_at(rows, "dpo", .5) == [] and results.shares_at(rows, "dpo", 5.) == [], "before the first, or between far ones"
    assert results.shares_at(rows, "dpo", .95) == results.shares_at(rows, "dpo", 1.) == [pytest.approx((.5, .01))], "a policy within a tenth is near enough"
    rows += [finished(kl, share, seed=1) for kl, share in ((1., .6), (3., .8), (2., None))]
    assert [share for share, _ in results.shares_at(rows, "dpo", 2.5)] == pytest.approx([.8, .75]), "seeds must not mix"


def test_the_table_of_shares_is_over_seeds():
    several = [finished(2., share, seed=seed) for seed, share in enumerate((.6, .7, .74))]
    assert f"68.0% +- {standard_error([.6, .7, .74]):.1%}" in results.table_of_shares(several)
    assert "60.0% +- 1.0%" in results.table_of_shares(several[:1]), "one seed has its policy's own error"
    assert "SFT" not in results.table_of_shares(several + [finished(0., None, "sft")])


def test_a_run_has_arrived_where_two_evaluations_in_a_row_are_good_enough():
    """80% of the gain at KL 2 and at its own KL; one lucky evaluation is none, the finished policy's own is enough."""
    optimum = {"kl": [0., 2., 4.], "reward": [.5, .8, .9], "beta": [.2, .1, .05], "se": [0., 0., 0.], "ref_reward": .5}
    enough = .5 + .8 * (dpo.optimal_reward(2., optimum)[0] - .5)
    lucky, good, poor, dear = ({"reward": enough + x, "share": share} for x, share in ((.05, .9), (.01, .85), (-.01, .79), (.1, .7)))
    way = [row(0, step, **what, final=step == 6) for step, what in enumerate((poor, lucky, poor, dear, good, lucky), 1)]
    assert [r["step"] for r in cost.arrivals(way[::-1], optimum)] == [5], "not at the lucky one, nor where KL buys the reward"
    assert [r["step"] for r in cost.arrivals(way[:4] + way[5:], optimum)] == [6], "the last has no next"
    assert cost.arrivals(way[:5], optimum) == [], "a run that failed has no finished policy"
    assert cost.arrivals(way[:4] + [row(0, 5, **good | {"share": None}, final=True)], optimum) == []


def test_what_a_learned_reward_promises_is_the_truth_if_it_ranks_as_the_truth_does():
    """Whatever its unit: any rising function of the true reward promises it; one that ranks at random promises pi_ref's mean to pi_ref."""
    generator = torch.Generator().manual_seed(0)
    true, of_policy = torch.rand(4000, generator=generator), .9 * torch.rand(50, generator=generator) + .05
    promised = overoptimisation.promise(5 * of_policy.logit() - 3, 5 * true.logit() - 3, true)
    assert (promised - of_policy).abs().max() < .005, "a proxy without errors has no gap, near the bound neither"
    noise = torch.randn(4000, generator=generator)
    assert abs(overoptimisation.promise(noise, noise, true).mean() - true.mean()) < 1e-6
