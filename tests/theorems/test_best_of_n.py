"""Best-of-N: the exact distribution and KL of the best of N draws from one pool (Fig. 4).

The last test is about the repetition measure of plots/degeneration.py (Table 3).

Letters: M members of a pool, N draws from it, P the distribution of one draw, P_N that of the best
of N draws. In the world of these tests the pool is the list of all responses to a prompt.
"""
import math
import types

import pytest
import torch

import data
import dpo
import world
from plots import best_of_n, degeneration

TIED = torch.tensor([[.3, -1., .3, 2., .3],
                     [0., 0., 5., 1., 1.]], dtype=torch.float64)    # two pools of five, with ties
SIZES = 1, 2, 3, 7, 64, 256    # N


def reference_logp():
    """log pi_ref (X, N) of every listed response under a GPT."""
    return world.table(world.gpt(seed=1)).detach()


def tied_rewards():
    """Rewards (X, N) in steps of a half, so that many responses tie."""
    return (2 * world.rewards(seed=2)).round() / 2


# ---------------------------------------------------------- the distribution of the best of N draws
def enumerated_weights(score, n, probability):
    """P_N by listing all M^n draws; tied draws share a win: score (M,), probability (M,) -> (M,)"""
    members = [torch.arange(len(score))] * n
    draws = torch.cartesian_prod(*members).view(-1, n)                          # (M^n, n)
    chance = probability[draws].prod(1, keepdim=True)                           # (M^n, 1)
    is_best = (score[draws] == score[draws].amax(1, keepdim=True)).double()     # (M^n, n)
    part = chance * is_best / is_best.sum(1, keepdim=True)                      # (M^n, n)
    return torch.zeros_like(probability).index_add_(0, draws.flatten(), part.flatten())


def test_the_weights_of_best_of_n_sum_to_one():
    """The sum of P_N over the pool is 1, for uniform and other P, with and without ties."""
    for n in SIZES:
        uniform = best_of_n.best_of_n_weights(TIED, n)
        weighted = best_of_n.best_of_n_weights(tied_rewards(), n, reference_logp())
        for weights in (uniform, weighted):
            world.agree(weights.sum(-1), torch.ones(2).double(),
                        f"the probabilities that a response is the best of {n} sum to 1")


def test_the_best_of_one_is_any():
    """With N = 1, P_N = P and the KL is 0."""
    r, ref = tied_rewards(), reference_logp()
    world.agree(best_of_n.best_of_n_weights(TIED, 1), torch.full((2, 5), .2, dtype=torch.float64),
                "one draw from a pool is uniform")
    world.agree(best_of_n.best_of_n_weights(r, 1, ref), ref.exp(), "one draw of pi_ref is pi_ref")
    world.agree(best_of_n.best_of_n_kl(r, 1, ref), torch.zeros(2).double(),
                "the best of one has KL 0")


def test_best_of_n_is_what_listing_all_draws_gives():
    """P_N and the sum of P_N log(P_N / P) are exact: all 5^N draws are equally likely.

    Draws are with replacement, and ties share a win equally.
    """
    uniform = torch.full((5,), .2, dtype=torch.float64)
    for n in (2, 3, 5):
        expected = torch.stack([enumerated_weights(score, n, uniform) for score in TIED])
        expected_kl = (expected * (5 * expected).log()).sum(1)
        world.agree(best_of_n.best_of_n_weights(TIED, n), expected,
                    f"the best of {n} from a pool of 5, by all {5 ** n} draws")
        world.agree(best_of_n.best_of_n_kl(TIED, n), expected_kl,
                    f"KL(best of {n} || pool), by all {5 ** n} draws")


def test_best_of_n_of_a_language_model_is_what_listing_all_its_draws_gives():
    """P_N and KL(P_N || pi_ref) are exact for N = 2 and 3 responses of pi_ref.

    Each of the 85 listed responses has its own probability.
    """
    r, ref = tied_rewards(), reference_logp()
    for n in (2, 3):
        expected = [enumerated_weights(score, n, p) for score, p in zip(r, ref.exp())]
        expected = torch.stack(expected)
        expected_kl = world.kl(expected.clamp(min=1e-300).log(), ref)
        world.agree(best_of_n.best_of_n_weights(r, n, ref), expected,
                    f"the best of {n} responses of pi_ref, by all draws")
        world.agree(best_of_n.best_of_n_kl(r, n, ref), expected_kl,
                    f"KL(best of {n} || pi_ref), by all draws")


def test_the_best_response_of_vanishing_probability_is_n_times_as_likely():
    """P_N / P = (1 - (1 - q)^N) / q -> N as q -> 0, where 1 - q is 1 in floating point."""
    score = torch.tensor([0., 1., 2.])
    logp = torch.tensor([0., -70., -800.], dtype=torch.float64)
    for n in SIZES:
        log_ratio = best_of_n.best_of_n_log_ratio(score, n, logp)
        world.agree(log_ratio[1:], torch.full((2,), n).double().log(),
                    f"a rare best response is {n} times as likely as the best of {n} draws")


def test_the_kl_of_best_of_n_is_at_most_its_bound_and_attains_it_without_ties():
    """KL <= log N - (N-1)/N for every score.

    It is equal in the limit of many different scores, and lower where scores tie.
    """
    r, ref = tied_rewards(), reference_logp()
    distinct = world.normal(3, 20_000, seed=5)
    assert abs(best_of_n.kl_bound(4) - (math.log(4) - 3 / 4)) < 1e-12, \
        "the bound of the KL is log N - (N-1)/N"
    for n in SIZES:
        bound = best_of_n.kl_bound(n)
        for kl in (best_of_n.best_of_n_kl(TIED, n), best_of_n.best_of_n_kl(r, n, ref)):
            is_lower = (kl <= bound + 1e-12).all() and (n == 1 or (kl < bound - .005).all())
            assert is_lower, (f"the best of {n} with ties: KL {kl.tolist()} is not below "
                              f"log N - (N-1)/N = {bound:.4f}")
        kl = best_of_n.best_of_n_kl(distinct, n)
        assert (kl <= bound + 1e-12).all(), \
            f"the best of {n}: KL {kl.tolist()} is above its bound {bound:.4f}"
        world.agree(kl, torch.full((3,), bound, dtype=torch.float64),
                    f"the best of {n} from a large pool attains the bound", 1e-4)


def test_best_of_n_by_the_true_reward_is_below_the_optimum_at_its_kl_and_near_it():
    """Eq. 4: at each KL the tilted distribution has the highest reward of all on a pool.

    Best-of-N has over 80% of its gain.
    """
    pool = world.normal(16, 500, seed=6)
    frontier = dpo.optimal_frontier(pool, torch.logspace(-2.5, 2, 200).double())
    for n in (2, 4, 16, 64):
        reward = (best_of_n.best_of_n_weights(pool, n) * pool).sum(1).mean().item()
        kl = best_of_n.best_of_n_kl(pool, n).mean().item()
        optimal, *_ = dpo.optimal_reward(kl, frontier)
        assert reward <= optimal + 1e-9, (
            f"Best-of-{n} by the true reward, {reward:.4f}, is above the optimum at its KL, "
            f"{optimal:.4f}")
        assert reward - pool.mean() > .8 * (optimal - pool.mean()), \
            f"Best-of-{n} has reward {reward:.4f}, far below the optimum {optimal:.4f}"


# --------------------------------------------------------------------------- the rows of the figure
def response_keys(ids, mask):
    """Prompt and response of each row as a tuple of token ids, without filler."""
    keys = []
    for row, row_mask in zip(ids, mask):
        last = int(row_mask.nonzero().max())
        keys.append(tuple(row[:last + 1].tolist()))
    return keys


def listed_index(ids, mask):
    """The index of each row's response in the flat list (X * N,) of all: (B, T), (B, T) -> (B,)."""
    listed_keys = response_keys(*world.listed())
    index = {key: i for i, key in enumerate(listed_keys)}
    return torch.tensor([index[key] for key in response_keys(ids, mask)])


@pytest.fixture
def new_setup(monkeypatch):
    """A function of a seed that returns the fields of a Setup that the figure reads.

    The true reward is the table r of `tied_rewards`, and the learned reward is -r.
    """
    table = tied_rewards().float().flatten()

    def true_reward(encoding, ids, mask):
        return table[listed_index(ids, mask)]

    def learned_reward(ids, mask):
        return -table[listed_index(ids, mask)]

    def setup(seed):
        cfg = types.SimpleNamespace(seed=seed, split="test", max_tokens=world.MAX_TOKENS)
        return types.SimpleNamespace(
            cfg=cfg, device="cpu", encoding=types.SimpleNamespace(eot_token=world.END),
            corpus={"test": ["", "", "."]}, ref=world.gpt(seed=1),
            learned_reward=learned_reward)

    monkeypatch.setattr(data, "true_reward", true_reward)
    monkeypatch.setattr(best_of_n, "evaluation_prompts", lambda setup: world.prompts())
    return setup


def exact_columns(score, n):
    """The exact columns of the row of Best-of-N by a score (X, N), over all listed responses.

    The reviews of this world hold no opinion, so the opponent's reward is .5.
    """
    r, ref = tied_rewards(), reference_logp()
    weights = best_of_n.best_of_n_weights(score, n, ref)                        # (X, N)
    wins = (r > .5).double() + .5 * (r == .5)                                   # (X, N)
    by_prompt = {"reward": (weights * r).sum(1), "win_rate": (weights * wins).sum(1),
                 "kl": best_of_n.best_of_n_kl(score, n, ref),
                 "length": (weights * world.LENGTHS).sum(1)}
    return {name: x.mean().item() for name, x in by_prompt.items()}


def test_the_measured_rows_are_best_of_n_of_the_policy(new_setup):
    """Rewards, KLs, win rates and lengths from pools agree with those of all listed responses.

    They agree within 4 standard errors of the mean of 12 pools. N above 8 is left out: there the
    tail of a pool makes it biased.
    """
    r = tied_rewards()
    measured = [best_of_n.measure(new_setup(seed), []) for seed in range(12)]
    for rows in zip(*measured):                                       # one row from each pool
        method, n = rows[0]["method"], int(rows[0]["setting"])
        if n > 8:
            continue
        score = r if method == "best_of_n_gt" else -r
        for name, exact in exact_columns(score, n).items():
            values = torch.tensor([row[name] for row in rows]).double()
            standard_error = values.std() / len(rows) ** .5
            assert abs(values.mean() - exact) <= 4 * standard_error + 1e-9, (
                f"{method}, N = {n}: {name} is {values.mean():.4f} from pools, not {exact:.4f} "
                "as from all responses")


def test_the_rows_of_best_of_n_are_rows_of_the_results(new_setup):
    """There is one final row for each score and each N = 1, 2, ..., 128.

    It has the columns of results.jsonl, and its KL is at most its bound.
    """
    rows = best_of_n.measure(new_setup(0), [])
    expected = [(method, 2. ** i) for method in ("best_of_n", "best_of_n_gt") for i in range(8)]
    assert [(row["method"], row["setting"]) for row in rows] == expected, \
        "there is one row for each score and each N = 1, 2, ..., 128"
    columns = {"method", "setting", "seed", "step", "final", "reward", "reward_se", "kl", "kl_se",
               "seconds", "kl_bound", "win_rate", "win_rate_se"}
    for row in rows:
        assert columns <= set(row), f"a row lacks the columns {columns - set(row)}"
        assert row["final"], "Best-of-N needs no training, so each of its rows is final"
        assert row["kl"] <= row["kl_bound"] + 1e-12, \
            f"N = {row['setting']:g}: the KL {row['kl']} is above its bound {row['kl_bound']}"


# --------------------------------------------------------------------------------------- repetition
def test_distinct_bigrams_tell_a_loop_from_a_text():
    """Distinct bigrams / bigrams is 1 if no bigram is repeated, and 1 / n for a loop of n bigrams.

    The responses to one prompt count together.
    """
    assert degeneration.distinct_2([[1, 2, 3, 1, 4]]) == 1., \
        "no bigram is repeated, although a token is"
    assert degeneration.distinct_2([[7] * 65]) == 1 / 64, "a repeated token has one bigram"
    assert degeneration.distinct_2([[1, 2, 3], [1, 2, 4]]) == 3 / 4, \
        "a bigram of another response to the prompt is a repetition"
    assert degeneration.distinct_2([[1], [2]]) == 0., \
        "no bigram reaches from one response into the next"
