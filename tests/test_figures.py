"""Error bars: over seeds where there are several, else over what one seed has; each against a formula written out here."""
import math

import pytest

from plots import frontier, inside


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
