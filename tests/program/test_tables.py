"""The printed tables: what is in them, next to what, and what the summary of preferences counts."""
import re
import statistics
from types import SimpleNamespace

import numpy
import pytest
import torch

import data
import plots
import train
from plots import frontier, tables

TEXTS = ["This western:", " the plot was superb.", " the cast was dull.", " The"]
END = 4
OPTIMUM = {"beta": [1., .4], "kl": [0., 4.], "reward": [.2, 1.8], "ess": [900., 60.],
           "se": [.01, .02], "ref_reward": .15}
OPTIMA = {**OPTIMUM, "seeds": {"0": OPTIMUM}}    # as in optimum.json, of one seed


def row_of(method="dpo", setting=1., seed=0, kl=1., reward=.5, final=True, share=.6):
    """A row of results.jsonl."""
    return {"method": method, "setting": setting, "seed": seed, "step": 7, "kl": kl, "kl_se": .01,
            "reward": reward, "reward_se": .02, "final": final, "share": share, "share_se": .03,
            "optimal_reward": 1.2, "seconds": 11.}


def test_the_table_of_policies_has_finished_policies_and_best_of_4_16_and_64():
    """One line for each finished policy, with its numbers; of Best-of-N three sizes only."""
    rows = [row_of("sft", 0., kl=0., share=None), row_of(final=False), row_of(seed=5, share=.61)]
    for method in ("best_of_n", "best_of_n_gt"):
        rows += [row_of(method, float(2 ** i)) for i in range(1, 8)]
    lines = [line.split() for line in tables.table_of_policies(rows).splitlines()[1:]]
    assert lines[:2] == [["sft", "0", "0", "0.00", "0.01", "0.500", "0.020", "-", "-", "11"],
                         ["dpo", "1", "5", "1.00", "0.01", "0.500", "0.020", "61%", "3%", "11"]]
    sizes = [line[:2] for line in lines[2:]]
    assert sizes == [[method, n] for method in ("best_of_n", "best_of_n_gt")
                     for n in ("4", "16", "64")]


def test_the_table_of_shares_has_the_kls_of_ppos_targets():
    """The share at each KL stands below it; the KLs are PPO's targets in the paper's preset."""
    targets = train.PRESETS["paper"]["kl_targets"]
    shares = dict(zip(targets, (.91, .82, .73, .64)))
    rows = [row_of(kl=kl, setting=kl, share=share) for kl, share in shares.items()]
    title, line = tables.table_of_shares(rows).splitlines()
    assert [float(kl) for kl in re.findall(r" (\d+) ", title)] == list(shares)
    cells = [f"{share:.1%} +- 3.0%" for share in shares.values()]
    assert " ".join(line.split()) == " ".join(["DPO", *cells])


def test_two_seeds_are_enough_for_an_error_over_seeds():
    """In the table of shares and on the frontier, two seeds have the error of their mean.

    That holds for SFT, too: each seed has its own pi_ref.
    """
    rows = [row_of(seed=0, share=.6, reward=.5), row_of(seed=1, share=.7, reward=.8)]
    error = statistics.stdev([.6, .7]) / 2 ** .5
    assert f"65.0% +- {error:.1%}" in tables.table_of_shares(rows)
    [mean] = frontier.mean_over_seeds(rows)
    assert mean["reward_se"] == pytest.approx(statistics.stdev([.5, .8]) / 2 ** .5)
    sft = [row_of("sft", seed=seed, kl=0., reward=reward) for seed, reward in ((0, .5), (1, .54))]
    [mean] = frontier.mean_over_seeds(sft)
    assert (mean["kl"], mean["kl_se"]) == (0., 0.), "pi_ref is at KL 0, without an error"
    assert mean["reward_se"] == pytest.approx(statistics.stdev([.5, .54]) / 2 ** .5)


def test_the_frontier_has_one_point_for_each_setting_in_order_of_kl():
    """A point has the mean KL of its seeds; methods and settings do not mix."""
    rows = [row_of(method, setting, seed, kl=kl + seed / 10, reward=.5 + seed / 10)
            for method, setting, kl in (("dpo", 1., 5.), ("dpo", 2., 3.), ("ppo", 1., 4.))
            for seed in (0, 1)]
    points = [(row["method"], row["setting"], row["kl"]) for row in frontier.mean_over_seeds(rows)]
    assert points == [("dpo", 2., 3.05), ("ppo", 1., 4.05), ("dpo", 1., 5.05)]


def test_a_policy_within_a_tenth_of_a_kl_has_its_share_there_whatever_lies_beyond():
    """The share at KL .95 and 1.05 is that of the policy at KL 1, not on a line to another one."""
    rows = [row_of(kl=kl, share=share) for kl, share in ((.5, .2), (1., .6), (3., .9))]
    for kl in (.95, 1., 1.05):
        assert tables.shares_at(rows, "dpo", kl) == [pytest.approx((.6, .03))], f"at KL {kl}"
    for kl, policy_kl in ((1., 1.1), (1.1, 1.)):
        assert tables.shares_at([row_of(kl=policy_kl)], "dpo", kl), "a tenth is near enough"


def test_neighbours_may_differ_by_a_factor_of_four():
    """A share between two policies needs that the farther has at most 4 times the KL."""
    for farther, count in ((4., 1), (4.01, 0), (4.9, 0)):
        rows = [row_of(kl=1.), row_of(kl=farther)]
        assert len(tables.shares_at(rows, "dpo", 2.)) == count, \
            f"between policies at KL 1 and {farther} there must be {count} shares at KL 2"


def test_an_optimum_from_too_few_samples_is_reliable_nowhere():
    """The reliable part ends at KL 0, and no row can be called impossible."""
    poor = {**OPTIMUM, "ess": [49., 3.]}
    assert plots.reliable_kl(poor) == 0.
    row = row_of(kl=.5, reward=9.)
    assert tables.above_optimum([row], {**OPTIMUM, "seeds": {"0": poor}}) == []
    assert tables.above_optimum([row], {**poor, "seeds": {"0": OPTIMUM}}) == [row], \
        "the curve of the row's seed counts, not the mean over seeds"


def test_the_solid_part_of_the_optimum_ends_where_50_effective_samples_end():
    """Between 70 effective samples at KL 2 and 30 at KL 3, 50 of them end at KL 2.5.

    The solid and the dashed line meet there, at the height of the curve.
    """
    curve = {"kl": [3., 2., 1.], "reward": [.9, .8, .6], "ess": [30., 70., 500.]}
    assert plots.reliable_kl(curve) == pytest.approx(2.5)
    figure, axis = plots.plt.subplots()
    frontier.draw_optimum(axis, curve)
    solid, dashed = (line.get_xydata() for line in axis.lines)
    plots.plt.close(figure)
    assert solid == pytest.approx(numpy.array([[1., .6], [2., .8], [2.5, .85]]))
    assert dashed == pytest.approx(numpy.array([[2.5, .85], [3., .9]]))


def test_the_report_names_failures_and_counts_impossible_rows():
    """A failed run is named with its step and reason, an impossible row with its numbers."""
    failure = {"method": "dpo", "setting": 2., "seed": 1, "step": 9, "reason": "loss not finite"}
    rows = [row_of(kl=.5, reward=.3), row_of(kl=.5, reward=9., setting=3.)]
    text = tables.report(rows, [failure], OPTIMA)
    assert tables.table_of_policies(rows) in text and tables.table_of_shares(rows) in text
    assert re.search(r"^FAILED: dpo 2 seed 1 at step 9.*loss not finite$", text, re.MULTILINE)
    assert re.findall(r"IMPOSSIBLE: (\S+) (\S+)", text) == [("dpo", "3")]
    assert re.search(r"1 evaluation\(s\) of 2 above the optimum.*to KL 4\.00", text)
    assert "no evaluation(s) of 1 above" in tables.report(rows[:1], [], OPTIMA)


def test_the_summary_of_preferences_counts_grammar_reward_ties_and_seen_prompts():
    """Of two prompts with K = 3 completions: the counts are made by hand.

    Each completion begins with its prompt, "This western:" or "This western: The".
    """
    responses = [[1, END], [2, END], [3, END], [1, 2, END], [1, END], [END]]
    prompts = [[0]] * 3 + [[0, 3]] * 3
    ids, end = data.pad([x + y for x, y in zip(prompts, responses)], END)
    start = torch.tensor([1, 1, 1, 2, 2, 2])
    columns = torch.arange(ids.shape[1])
    mask = (columns >= start[:, None]) & (columns < end[:, None])
    pairs = data.Preferences(ids, mask, torch.zeros(6), torch.tensor([0, 0, 2, 4]),
                             torch.tensor([1, 2, 1, 3]), 3)
    encoding = SimpleNamespace(eot_token=END, decode=lambda ids: "".join(TEXTS[i] for i in ids))
    evaluated = data.pad([[0], [0, 3], [0, 1], [3]], END)
    summary = tables.summary_of_preferences(encoding, pairs, evaluated)
    reward = [data.sentiment("".join(TEXTS[i] for i in x + y if i != END))
              for x, y in zip(prompts, responses)]
    assert "33.3% of 6 are grammatical" in summary    # the first two
    assert f"reward {statistics.fmean(reward):.3f} +- {statistics.stdev(reward):.3f}" in summary
    assert "4 pairs, 2 ties" in summary and "50% of the evaluation prompts" in summary


def run_of(method, *kls, setting=1., failure=None):
    """A run with an evaluation and a checkpoint at each of these KLs; `state` tells which it is."""
    rows = [{"method": method, "setting": setting, "step": step, "kl": kl, "reward": .5,
             "final": step == len(kls) and not failure} for step, kl in enumerate(kls, 1)]
    return {"method": method, "setting": setting, "failure": failure, "rows": rows,
            "checkpoints": [f"{method} {setting:g} at KL {kl:g}" for kl in kls]}


def test_the_policy_that_a_figure_shows_is_nearest_in_kl_finished_or_on_the_way():
    """Within a tenth it may be on the way, else it is the nearest finished one; None without runs.

    It comes with the parameters of its own checkpoint, with its run and with its step.
    """
    runs = [run_of("ppo", 2.), run_of("dpo", .2, .5), run_of("dpo", .4, 1.9, 4.1, setting=.7),
            run_of("dpo", 1., 2.9, 5., setting=.5), run_of("dpo", 3.2, setting=.1, failure="NaN")]
    for kl, step, setting, nearest in ((2., 2, .7, 1.9), (3., 2, .5, 2.9), (9., 3, .5, 5.),
                                       (3.3, 1, .1, 3.2), (0., 2, 1., .5), (2.4, 3, .7, 4.1)):
        policy = plots.checkpoint_near_kl(runs, "dpo", kl)
        assert policy == {"method": "dpo", "setting": setting, "step": step, "kl": nearest,
                          "state": f"dpo {setting:g} at KL {nearest:g}"}, \
            f"{nearest} nats are nearest to {kl}, not those of {policy}"
    assert plots.checkpoint_near_kl(runs, "dpo") == plots.checkpoint_near_kl(runs, "dpo", 2.)
    assert plots.checkpoint_near_kl(runs, "unlikelihood") is None
    failed = [run_of("dpo", .4, 3.2, failure="NaN")]
    assert plots.checkpoint_near_kl(failed, "dpo")["kl"] == 3.2, "a failed run is not finished"


def test_a_finished_policy_within_a_tenth_is_preferred_to_one_on_the_way():
    """A policy on the way is less trained. It is shown only if no finished one is near."""
    runs = [run_of("dpo", 2.0, 2.15)]
    assert plots.checkpoint_near_kl(runs, "dpo", 2.)["kl"] == 2.15
    runs = [run_of("dpo", 2.0, 2.25)]
    assert plots.checkpoint_near_kl(runs, "dpo", 2.)["kl"] == 2.0
