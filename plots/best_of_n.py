"""Fig. 4: Best-of-N by the learned reward and by the true one: win rate and KL against N.

Best-of-N samples N responses of pi_ref and keeps the one with the highest reward. It needs no
training. It needs no repeated draws of N responses either: for draws from one pool of responses to
a prompt, the distribution of the best is known exactly. The best of a pool is worse than the best
of pi_ref's own draws if N is not small compared with the pool: by .1% of the gain at N = 64, and by
.3% at N = 128.

Letters: X prompts, M responses in the pool of each prompt, N draws from a pool.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from model import generate, map_batches
from plots import STYLE, evaluation_prompts, mean_and_se, plt, save, verdict

POOL = 512    # M, responses of pi_ref to each prompt
NS = [2 ** i for i in range(8)]    # 1 to 128, as in the paper


# ---------------------------------------------------------------------------------------- Best-of-N
def draw_probability(score: Tensor, logp: Tensor | None) -> Tensor:
    """The probability of each pool member in one draw, float64: exp(logp), or uniform if None."""
    if logp is None:
        return score.new_full(score.shape, 1 / score.shape[-1], dtype=torch.float64)
    return logp.double().exp()


def best_of_n_log_ratio(score: Tensor, n: int, logp: Tensor | None = None) -> Tensor:
    """log P_N(y) / P(y) of each pool member y: P in one draw, P_N as the best of N draws.

    score (..., M), logp = log P (..., M), uniform if None -> (..., M) float64.

    C(s) is the probability that one draw scores at most s, and q that it scores exactly s. The best
    of N draws scores at most s with probability C^N, so it scores exactly s with probability
    C^N - (C - q)^N. Members of equal score share this probability in proportion to their P.
    Hence P_N(y) / P(y) = (C^N - (C - q)^N) / q = C^(N-1) (1 - (1 - q/C)^N) / (q/C).
    """
    score = score.double().contiguous()
    ranked, order = score.sort(-1)
    p = draw_probability(score, logp).gather(-1, order)
    mass = F.pad(p.cumsum(-1), (1, 0))                                       # (..., M + 1)
    c = mass.gather(-1, torch.searchsorted(ranked, score, right=True))       # C(s), ties included
    below = mass.gather(-1, torch.searchsorted(ranked, score))               # C(s) - q
    part = (1 - below / c).clamp(0, 1)                                       # q / C
    factor = -torch.expm1(n * torch.log1p(-part)) / part
    factor = torch.where(part > 0, factor, n)    # the limit is N; a tiny q / C is rounded to 0
    return (n - 1) * c.log() + factor.log()


def best_of_n_weights(score: Tensor, n: int, logp: Tensor | None = None) -> Tensor:
    """The probability that each pool member is the best of N draws with replacement.

    Equal scores share it. score (..., M), logp (..., M) as above -> (..., M) float64, with sum 1.
    """
    return draw_probability(score, logp) * best_of_n_log_ratio(score, n, logp).exp()


def best_of_n_kl(score: Tensor, n: int, logp: Tensor | None = None) -> Tensor:
    """KL(best of N draws || one draw), nats: score (..., M), logp (..., M) -> (...).

    It is at most `kl_bound`. It is equal to the bound in the limit M >> N if no scores are equal.
    """
    log_ratio = best_of_n_log_ratio(score, n, logp)
    kl = (best_of_n_weights(score, n, logp) * log_ratio).sum(-1)
    return kl.clamp(min=0)    # rounding can make it negative at N = 1


def kl_bound(n: int) -> float:
    """The bound log N - (N - 1) / N on the KL of Best-of-N, nats, for every score."""
    return math.log(n) - (n - 1) / n


# ------------------------------------------------------------------------------------------ measure
def sample_pools(setup) -> dict[str, Tensor]:
    """Sample a pool of responses to each evaluation prompt; values of each, (X, M) on the CPU.

    `reward` is the true reward and `learned_reward` the learned one. `win_rate` is 1 for a win
    against the review that the prompt begins, .5 for a tie, 0 for a loss. `length` is in tokens.
    """
    cfg, prompts = setup.cfg, evaluation_prompts(setup)
    X = len(prompts[0])
    generator = data.named_generator("best of n", cfg.seed, device=setup.device)
    ids, mask = generate(setup.ref, prompts, POOL, cfg.max_tokens, setup.encoding.eot_token,
                         generator)
    learned_reward = map_batches(setup.learned_reward, ids, mask).cpu().view(X, -1)
    reward = data.true_reward(setup.encoding, ids, mask).cpu().view(X, -1)
    reviews = setup.corpus[cfg.split][:X]
    review_reward = torch.tensor([data.sentiment(text) for text in reviews])[:, None]    # (X, 1)
    return {"learned_reward": learned_reward, "reward": reward,
            "win_rate": verdict(reward, review_reward),
            "length": mask.sum(1).cpu().view(X, -1)}


def best_of_n_row(pools: dict[str, Tensor], method: str, score: Tensor, n: int, seed: int) -> dict:
    """The row of Best-of-N by a score (X, M); means and errors are over the prompts."""
    weights = best_of_n_weights(score, n)    # (X, M)

    def expectation(values: Tensor) -> tuple[float, float]:
        return mean_and_se((weights * values).sum(1, keepdim=True))

    reward, reward_se = expectation(pools["reward"])
    win_rate, win_rate_se = expectation(pools["win_rate"])
    length, _ = expectation(pools["length"])
    kl, kl_se = mean_and_se(best_of_n_kl(score, n)[:, None])
    return {"figure": "best_of_n", "method": method, "setting": float(n), "seed": seed, "step": 0,
            "final": True, "reward": reward, "reward_se": reward_se, "win_rate": win_rate,
            "win_rate_se": win_rate_se, "length": length, "kl": kl, "kl_se": kl_se,
            "kl_bound": kl_bound(n), "seconds": 0.}


def measure(setup, _) -> list[dict]:
    """A row for each reward and N, with the columns of results.jsonl; `setting` is N.

    The trained runs are not needed.
    """
    pools = sample_pools(setup)
    scores = {"best_of_n": pools["learned_reward"], "best_of_n_gt": pools["reward"]}
    rows = []
    for method, score in scores.items():
        rows += [best_of_n_row(pools, method, score, n, setup.cfg.seed) for n in NS]
    return rows


# --------------------------------------------------------------------------------------------- draw
def draw_curve(axis, rows: list[dict], name: str, shift: float, line: str, size: float) -> None:
    """One column of a method's rows against N, with error bars; x is multiplied by `shift`."""
    label, colour, marker = STYLE[rows[0]["method"]]
    axis.errorbar([row["setting"] * shift for row in rows], [row[name] for row in rows],
                  [row[name + "_se"] for row in rows], fmt=marker + line, color=colour, ms=size,
                  mec="white", mew=.7, elinewidth=1, capsize=3, label=label)


def draw(rows: list[dict], path) -> None:
    """Left: win rate against N. Right: KL against N, and its bound."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    bound = sorted({(row["setting"], row["kl_bound"]) for row in rows})
    ns = [n for n, _ in bound]
    right.plot(ns, [kl for _, kl in bound], color="0.25", lw=1.5,
               label="bound: log N \u2212 (N \u2212 1)/N")
    methods = dict.fromkeys(row["method"] for row in rows)    # in the order of the rows
    for i, method in enumerate(methods):
        curve = [row for row in rows if row["method"] == method]
        draw_curve(left, curve, "win_rate", shift=1.03 ** (2 * i - 1), line="-", size=8)
        draw_curve(right, curve, "kl", shift=1., line="", size=12 - 5 * i)    # nested if equal
    left.axhline(.5, color="0.6", lw=1)
    left.set_ylabel("win rate against the review itself", fontsize=12)
    right.set_ylabel("KL(Best-of-N \u2016 \u03c0_ref), nats", fontsize=12)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ns, [f"{n:g}" for n in ns])
        axis.set_xlabel("N, responses to choose from", fontsize=12)
        axis.grid(alpha=.25)
    right.legend(loc="upper left", fontsize=11)
    save(figure, path)
