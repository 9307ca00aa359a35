"""Best-of-N: the winner's exact distribution and KL, from one pool; and how repetition is measured (plots/degeneration.py)."""
import itertools
import math
import types

import torch

import dpo
import world
from plots import best_of_n, degeneration

TIED = torch.tensor([[.3, -1., .3, 2., .3], [0., 0., 5., 1., 1.]], dtype=torch.float64)    # two pools of five, with ties
SIZES = (1, 2, 3, 7, 64, 256)


def enumerated(score, n, p):
    """The best of n draws by listing all M^n of them, ties shared: score (M,), P (M,) -> weights (M,)"""
    draws = torch.cartesian_prod(*[torch.arange(len(score))] * n).view(-1, n)              # (M^n, n)
    chance, drawn = p[draws].prod(1), score[draws]
    best = (drawn == drawn.amax(1, keepdim=True)).double()                                 # each winning draw gets its part
    return torch.zeros_like(p).index_add_(0, draws.flatten(), (chance[:, None] * best / best.sum(1, keepdim=True)).flatten())


def reference():
    """A GPT's log pi_ref of every listed response, (X, N)."""
    return world.table(world.gpt(seed=1)).detach()


def coarse():
    """r (X, N) in steps of a half: many responses of a world tie."""
    return (2 * world.rewards(seed=2)).round() / 2


def test_the_weights_of_best_of_n_sum_to_one():
    """sum over the pool of P_N = 1, uniform or weighted, ties or not."""
    for n in SIZES:
        for weight in (best_of_n.best_of_n_weights(TIED, n), best_of_n.best_of_n_weights(coarse(), n, reference())):
            world.agree(weight.sum(-1), torch.ones(2).double(), f"the best of {n} is some response: its probabilities sum to 1")


def test_the_best_of_one_is_any():
    """N = 1: the distribution drawn from itself, KL 0."""
    world.agree(best_of_n.best_of_n_weights(TIED, 1), torch.full((2, 5), .2, dtype=torch.float64), "one draw from a pool is uniform")
    world.agree(best_of_n.best_of_n_weights(coarse(), 1, reference()), reference().exp(), "one draw from pi_ref is pi_ref")
    world.agree(best_of_n.best_of_n_kl(coarse(), 1, reference()), torch.zeros(2).double(), "the best of one costs no KL")


def test_best_of_n_is_what_listing_all_draws_gives():
    """M^N equally likely draws with replacement, ties shared equally: the weights, and the sum of P_N log(P_N / P), exactly."""
    for n in (2, 3, 5):
        weight = torch.stack([enumerated(score, n, torch.full((5,), .2, dtype=torch.float64)) for score in TIED])
        world.agree(best_of_n.best_of_n_weights(TIED, n), weight, f"the best of {n} from a pool of 5, by all {5 ** n} draws")
        world.agree(best_of_n.best_of_n_kl(TIED, n), (weight * (5 * weight).log()).sum(1), f"KL(best of {n} || pool), by all draws")


def test_best_of_n_of_a_language_model_is_what_listing_all_its_draws_gives():
    """N = 2, 3 responses of pi_ref, each of the 85 listed ones with its probability: P_N and KL(P_N || pi_ref), exactly."""
    r, ref = coarse(), reference()
    for n in (2, 3):
        weight = torch.stack([enumerated(*row) for row in zip(r, [n] * world.X, ref.exp())])
        world.agree(best_of_n.best_of_n_weights(r, n, ref), weight, f"the best of {n} responses of pi_ref, by all draws")
        world.agree(best_of_n.best_of_n_kl(r, n, ref), world.kl(weight.clamp(min=1e-300).log(), ref), f"KL(best of {n} || pi_ref)")


def test_the_best_response_of_vanishing_probability_is_n_times_as_likely():
    """P_N / P = (1 - (1 - q)^N) / q -> N as q -> 0, where 1 - q is 1 in floating point."""
    logp = torch.tensor([0., -70., -800.], dtype=torch.float64)
    for n in SIZES:
        world.agree(best_of_n.best_of_n_log_ratio(torch.tensor([0., 1., 2.]), n, logp)[1:], torch.full((2,), n).double().log(),
                    f"the rarest is the best of {n} {n} times as often as it is drawn")


def test_the_kl_of_best_of_n_is_at_most_its_bound_and_attains_it_without_ties():
    """KL <= log N - (N-1)/N for every score; equal in the limit of many different scores, and lower where they tie."""
    distinct = world.normal(3, 20_000, seed=5)
    assert abs(best_of_n.kl_bound(4) - (math.log(4) - 3 / 4)) < 1e-12
    for n in SIZES:
        for kl in (best_of_n.best_of_n_kl(TIED, n), best_of_n.best_of_n_kl(coarse(), n, reference())):
            assert (kl <= best_of_n.kl_bound(n) + 1e-12).all() and (n == 1 or (kl < best_of_n.kl_bound(n) - .005).all()), \
                f"the best of {n} with ties: KL {kl.tolist()}, not below log N - (N-1)/N = {best_of_n.kl_bound(n):.4f}"
        kl = best_of_n.best_of_n_kl(distinct, n)
        assert (kl <= best_of_n.kl_bound(n) + 1e-12).all(), f"the best of {n}: KL {kl.tolist()} is above its bound"
        world.agree(kl, torch.full((3,), best_of_n.kl_bound(n), dtype=torch.float64), f"the best of {n} from a large pool attains the bound", 1e-4)


def test_best_of_n_by_the_true_reward_is_below_the_optimum_at_its_kl_and_near_it():
    """Eq. 4: of all distributions at this KL from a pool the tilted one has the most reward; Best-of-N has over 80% of its gain."""
    pool = world.normal(16, 500, seed=6)
    frontier = dpo.optimal_frontier(pool, torch.logspace(-2.5, 2, 200).double())
    for n in (2, 4, 16, 64):
        reward = (best_of_n.best_of_n_weights(pool, n) * pool).sum(1).mean().item()
        best = dpo.optimal_reward(best_of_n.best_of_n_kl(pool, n).mean().item(), frontier)[0]
        assert reward <= best + 1e-9, f"Best-of-{n} by the true reward, {reward:.4f}, is above the optimum at its KL, {best:.4f}"
        assert reward - pool.mean() > .8 * (best - pool.mean()), f"Best-of-{n} has reward {reward:.4f}, far below the optimum {best:.4f}"


def laboratory(seed):
    """A world as plots see it: pi_ref, two prompts, r of every listed response as true reward, -r as the learned one."""
    policy, r = world.gpt(seed=1), coarse().float()
    place = {(*x, *y): r[i, j].item() for i, x in enumerate(world.PROMPTS) for j, y in enumerate(world.RESPONSES)}

    def reward(ids, mask):
        start = mask.int().argmax(1).tolist()
        return torch.tensor([place[(*row[:s], *row[s:s + n])] for row, s, n in zip(ids.tolist(), start, mask.sum(1).tolist())])

    cfg = types.SimpleNamespace(seed=seed, split="test", max_tokens=world.MAX_TOKENS)
    return types.SimpleNamespace(cfg=cfg, ref=policy, prompts=world.prompts(), device="cpu", reward=reward, corpus={"test": ["", "", "."]},
                                 encoding=types.SimpleNamespace(eot_token=world.END), learned=lambda ids, mask: -reward(ids, mask))


def test_the_measured_rows_are_best_of_n_of_the_policy():
    """Rewards, KLs and win rates of pools of samples are, within 4 standard errors of 12 pools, those of listing all responses."""
    r, ref = coarse(), reference()
    pools = [best_of_n.measure(laboratory(seed), []) for seed in range(12)]
    for rows in zip(*pools):
        n, score = int(rows[0]["setting"]), r if rows[0]["method"] == "best_of_n_gt" else -r
        if n > 8:    # the tail of a pool: biased
            continue
        weight = best_of_n.best_of_n_weights(score, n, ref)
        wins = (r > .5).double() + .5 * (r == .5)    # the reviews of this world hold no opinion: .5
        for name, exact in (("reward", (weight * r).sum(1)), ("win_rate", (weight * wins).sum(1)), ("kl", best_of_n.best_of_n_kl(score, n, ref)),
                            ("length", (weight * world.LENGTHS).sum(1))):
            found, exact = torch.tensor([row[name] for row in rows]).double(), exact.mean().item()
            assert abs(found.mean() - exact) <= 4 * found.std() / len(rows) ** .5 + 1e-9, \
                f"{rows[0]['method']}, N = {n}: {name} {found.mean():.4f} of pools, not {exact:.4f} of all responses"


def test_the_rows_of_best_of_n_are_rows_of_the_results():
    """One final row for each N = 1, 2, ..., 128 and score, with the columns of results.jsonl, KL at most its bound."""
    rows = best_of_n.measure(laboratory(0), [])
    assert [(row["method"], row["setting"]) for row in rows] == [(m, 2. ** i) for m in ("best_of_n", "best_of_n_gt") for i in range(8)]
    columns = {"method", "setting", "seed", "step", "final", "reward", "reward_se", "kl", "kl_se", "seconds", "kl_bound", "win_rate",
               "win_rate_se"}
    assert all(columns <= set(row) and row["final"] and row["kl"] <= row["kl_bound"] + 1e-12 for row in rows)


def test_distinct_bigrams_tell_a_loop_from_a_text():
    """Distinct bigrams / bigrams: 1 for a text that never repeats one, 1/n for a loop of n, whichever response it is in."""
    assert degeneration.distinct_2([[1, 2, 3, 1, 4]]) == 1., "no bigram comes twice: 1, though a token does"
    assert degeneration.distinct_2([[7] * 65]) == 1 / 64, "one token forever has one bigram"
    assert degeneration.distinct_2([[1, 2, 3], [1, 2, 4]]) == 3 / 4, "a bigram of another response of the prompt is a repetition"
    assert degeneration.distinct_2([[1], [2]]) == 0., "bigrams do not reach from one response into the next"
