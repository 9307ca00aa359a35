"""Fig. 4: Best-of-N, the best of N responses of pi_ref by the learned reward and by the true one: win rate and KL against N.

Nothing is trained and nothing is drawn N times: from one pool of responses to a prompt, the winner's distribution is exact. A pool's
best is below pi_ref's own where N is not small beside the pool: by .1% of the gain at N = 64, .3% at 128.
Letters: X prompts, M responses in the pool of each, N draws from it.
"""
import math

import torch
from torch import Tensor

import data
from model import respond, score_batches
from plots import plt, save, style
from plots.frontier import clustered

POOL = 512    # responses of pi_ref to each prompt
NS = [2 ** i for i in range(8)]    # 1 to 128, as in the paper


def best_of_n_log_ratio(score: Tensor, n: int, logp: Tensor | None = None) -> Tensor:
    """log P_N(y) / P(y) of each pool member: score (..., M), log P (..., M), uniform if None -> (..., M), float64.

    The best of N draws scores at most s with probability C(s)^N, C the distribution function of one draw. So the members of
    score s share C(s)^N - (C(s) - q)^N, q their probability in one draw, as they share q: by C^(N-1) (1 - (1 - q/C)^N) / (q/C).
    """
    score = score.double().contiguous()
    p = torch.full_like(score, 1 / score.shape[-1]) if logp is None else logp.double().exp()
    ranked, order = score.sort(-1)
    mass = torch.nn.functional.pad(p.gather(-1, order).cumsum(-1), (1, 0))               # (..., M + 1) of the k lowest
    c = mass.gather(-1, torch.searchsorted(ranked, score, right=True))                   # C(s), ties included
    part = (1 - mass.gather(-1, torch.searchsorted(ranked, score)) / c).clamp(0, 1)      # q / C; tiny q round to 0, where ...
    return (n - 1) * c.log() + torch.where(part > 0, -torch.expm1(n * torch.log1p(-part)) / part, n).log()    # ... the limit is N


def best_of_n_weights(score: Tensor, n: int, logp: Tensor | None = None) -> Tensor:
    """The probability of each pool member to be the best of N draws with replacement, ties shared: (..., M) -> (..., M)"""
    p = 1 / score.shape[-1] if logp is None else logp.double().exp()
    return p * best_of_n_log_ratio(score, n, logp).exp()


def best_of_n_kl(score: Tensor, n: int, logp: Tensor | None = None) -> Tensor:
    """KL(best of N || one draw), nats: (..., M) -> (...). At most `kl_bound`, and that much where M >> N and scores differ."""
    return (best_of_n_weights(score, n, logp) * best_of_n_log_ratio(score, n, logp)).sum(-1).clamp(min=0)    # rounding at N = 1


def kl_bound(n: int) -> float:
    """log N - (N - 1) / N, whatever the score"""
    return math.log(n) - (n - 1) / n


def measure(lab, _) -> list[dict]:
    """Rows as in results.jsonl, `setting` being N, with the win rate against the review that each prompt begins."""
    cfg, prompts = lab.cfg, len(lab.prompts[0])
    generator = data.torch_rng("best of n", cfg.seed, device=lab.device)
    ids, mask = respond(lab.ref, lab.prompts, POOL, cfg.max_tokens, lab.encoding.eot_token, generator)
    scores = score_batches(lab.learned, ids, mask), lab.reward(ids, mask), mask.sum(1)
    learned, true, length = (x.cpu().view(prompts, -1) for x in scores)
    review = torch.tensor([data.sentiment(text) for text in lab.corpus[cfg.split][:prompts]])[:, None]    # (X, 1)
    means = {"reward": true, "win_rate": (true > review) + .5 * (true == review), "length": length}    # of each response, (X, M)
    rows = []
    for method, score in (("best_of_n", learned), ("best_of_n_gt", true)):
        for n in NS:
            weight = best_of_n_weights(score, n)                                         # (X, M), rows sum to 1
            at = {name: clustered((weight * x).sum(1, keepdim=True)) for name, x in means.items()}
            at["kl"] = clustered(best_of_n_kl(score, n)[:, None])
            row = {"figure": "best_of_n", "method": method, "setting": float(n), "seed": cfg.seed, "step": 0, "final": True}
            for name, (mean, se) in at.items():
                row.update({name: mean} if name == "length" else {name: mean, name + "_se": se})
            rows.append({**row, "kl_bound": kl_bound(n), "seconds": 0.})
    return rows


def draw(rows: list[dict], path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    bound = sorted({(row["setting"], row["kl_bound"]) for row in rows})
    right.plot(*zip(*bound), color="0.25", lw=1.5, label="bound: log N \u2212 (N \u2212 1)/N")
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):    # side by side, or one inside the other where equal
        label, colour, marker = style([method])[method]
        mine = [row for row in rows if row["method"] == method]
        for axis, name, shift, line, size in ((left, "win_rate", 1.03 ** (2 * i - 1), "-", 8), (right, "kl", 1., "", 12 - 5 * i)):
            axis.errorbar([row["setting"] * shift for row in mine], [row[name] for row in mine], [row[name + "_se"] for row in mine],
                          fmt=marker + line, color=colour, ms=size, mec="white", mew=.7, elinewidth=1, capsize=3, label=label)
    left.axhline(.5, color="0.6", lw=1)
    for axis, name in ((left, "win rate against the review itself"), (right, "KL(Best-of-N \u2016 \u03c0_ref), nats")):
        axis.set_xscale("log", base=2)
        axis.set_xticks([n for n, _ in bound], [f"{n:g}" for n, _ in bound])
        axis.set_xlabel("N, responses to choose from", fontsize=12)
        axis.set_ylabel(name, fontsize=12)
        axis.grid(alpha=.25)
    right.legend(loc="upper left", fontsize=11)
    save(figure, path)
