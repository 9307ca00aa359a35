"""Direct Preference Optimization (Rafailov et al., 2023): the losses, the gradient of DPO by
hand, and the optimum that the losses aim at.

The paper's symbols: x is a prompt, y_w the preferred response (winner), y_l the other one (loser),
pi the policy, pi_ref the reference policy, r a reward, and beta the price of one nat of
KL(pi || pi_ref). The log-probability of a response is the sum over its tokens in nats, the end
token included if there is one.

Shapes: B pairs, C completions, K ranked responses, N listed responses, X prompts, M sampling
policies, S betas, T tokens, V vocabulary. In this file `ref` is short for log pi_ref; in the other
files it is the model pi_ref.
Losses are per example, (B,), never reduced: the training loop takes the mean.

train.py trains with `dpo_loss`, `unlikelihood_loss` and `preferred_ft_loss`. `dpo_gradient`,
`dpo_gradient_logits`, `objective`, `plackett_luce_loss` and `constant_weight_loss` are for the
reader and the tests; the frontier and the gap to it are for the figures.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pair(NamedTuple):
    """All that a preference loss may see of B pairs; every field is (B,)."""
    logp_w: Tensor    # log pi(y_w | x), nats
    logp_l: Tensor    # log pi(y_l | x), nats
    ref_w: Tensor     # log pi_ref(y_w | x), nats, a constant
    ref_l: Tensor     # log pi_ref(y_l | x), nats, a constant
    len_w: Tensor     # response tokens of y_w, the end token included
    len_l: Tensor     # response tokens of y_l, the end token included


def make_pairs(logp: Tensor, ref_logp: Tensor, length: Tensor, winner: Tensor,
               loser: Tensor) -> Pair:
    """Pairs from the log-probabilities of all completions of a batch, (C,) each (App. B).

    `winner` and `loser` (B,) index the completions. Four completions of a prompt give six pairs
    for four forward passes, not twelve.
    """
    return Pair(logp[winner], logp[loser], ref_logp[winner], ref_logp[loser], length[winner],
                length[loser])


# ------------------------------------------------------------ the optimum (Section 4, App. A.1)
def log_partition(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log Z(x),   Z(x) = sum_y pi_ref(y|x) exp(r(x, y) / beta)                     below Eq. 4

    ref_logp (..., N), reward (..., N) -> (...)
    """
    return torch.logsumexp(ref_logp + reward / beta, -1)


def optimal_policy(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log pi*(y|x),   pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)                  Eq. 4

    ref_logp (..., N), reward (..., N) -> (..., N), over N listed responses. If the N responses are
    samples of pi_ref, each one's reference weight is 1/N: pass ref_logp = -log N for each.
    """
    return ref_logp + reward / beta - log_partition(ref_logp, reward, beta)[..., None]


def objective(logp: Tensor, ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """E_{y~pi}[r(x, y)] - beta KL(pi || pi_ref), which Eq. 4 maximises                   Eq. 3

    logp (..., N), ref_logp (..., N), reward (..., N) -> (...)
    """
    return (logp.exp() * (reward - beta * (logp - ref_logp))).sum(-1)


def implicit_reward(logp: Tensor, ref: Tensor, beta: float) -> Tensor:
    """rhat(x, y) = beta log(pi(y|x) / pi_ref(y|x))                             Eq. 5 without Z

    For the optimal policy this is r(x, y) - beta log Z(x). Any shape, the same for both inputs.
    """
    return beta * (logp - ref)


# ------------------------------------------------------------------------ DPO (Section 4, App. A)
def dpo_loss(pair: Pair, beta: float) -> Tensor:
    """-log sigma(rhat_w - rhat_l),   rhat = beta log(pi / pi_ref)                Eq. 7 -> (B,)

    Bradley-Terry (Eq. 1) on the implicit reward (Eq. 6): Z(x) is the same for both responses and
    cancels.
    """
    rhat_w = implicit_reward(pair.logp_w, pair.ref_w, beta)
    rhat_l = implicit_reward(pair.logp_l, pair.ref_l, beta)
    return -F.logsigmoid(rhat_w - rhat_l)


def dpo_gradient(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """(dL/dlog pi(y_w), dL/dlog pi(y_l)) = (-beta, beta) sigma(rhat_l - rhat_w)    -> (B,), (B,)

    Section 4, by hand: with u = rhat_w - rhat_l, d(-log sigma(u))/du = -sigma(-u). The weight
    sigma(-u) is near 1 where the implicit reward ranks a pair wrongly and near 0 where it ranks it
    right, so DPO stops pushing pairs that are already apart.
    (Eq. 21-22 derive this too, with a misprint: w and l are exchanged in u and in the weight.)
    """
    rhat_w = implicit_reward(pair.logp_w, pair.ref_w, beta)
    rhat_l = implicit_reward(pair.logp_l, pair.ref_l, beta)
    weight = torch.sigmoid(rhat_l - rhat_w)
    return -beta * weight, beta * weight


def dpo_gradient_logits(logits: Tensor, ids: Tensor, mask: Tensor, coefficient: Tensor) -> Tensor:
    """dL/dlogits[t-1] = coefficient (onehot(ids[t]) - softmax(logits[t-1]))   for response tokens t

    Section 4's gradient, carried by hand through log-softmax: d log p_i / d z_j = [i = j] - p_j.
    logits (B, T, V), ids (B, T), mask (B, T) of response tokens, coefficient = dL/dlog pi(y|x) (B,)
    -> (B, T, V), which is 0 where no response token is predicted.
    """
    mask = mask.bool()
    onehot = F.one_hot(ids.masked_fill(~mask, 0)[:, 1:], logits.shape[-1])     # (B, T-1, V)
    gradient = coefficient[:, None, None] * (onehot - torch.softmax(logits[:, :-1], -1))
    gradient = gradient.masked_fill(~mask[:, 1:, None], 0.)
    return F.pad(gradient, (0, 0, 0, 1))                   # the last logits predict nothing


def plackett_luce_loss(logp: Tensor, ref: Tensor, beta: float) -> Tensor:
    """-log prod_k exp(rhat_k) / sum_{j >= k} exp(rhat_j)                          Eq. 20 -> (B,)

    logp (B, K) and ref (B, K) are ranked best first. A ranking is K - 1 choices, each of the best
    of the remaining responses (Eq. 18-19). For K = 2 this is Eq. 7.
    """
    rhat = implicit_reward(logp, ref, beta)
    log_remaining = rhat.flip(-1).logcumsumexp(-1).flip(-1)        # log sum_{j >= k} exp(rhat_j)
    return (log_remaining - rhat).sum(-1)


# -------------------------------------------------------------------- the baselines (Section 6)
def unlikelihood_loss(pair: Pair, alpha: float) -> Tensor:
    """-[log pi(y_w|x) - alpha log pi(y_l|x)]                      Section 6, App. C.3 -> (B,)

    Not bounded below: log pi(y_l|x) can fall forever, so training stops after a fixed number of
    steps, not at convergence.
    """
    return -(pair.logp_w - alpha * pair.logp_l)


def constant_weight_loss(pair: Pair, beta: float) -> Tensor:
    """-beta/2 [log pi(y_w|x) - log pi(y_l|x)]                                Section 4 -> (B,)

    Eq. 7 with the weight of its gradient, sigma(rhat_l - rhat_w), fixed at its initial value 1/2.
    Up to a factor, which Adam sees only through its epsilon, this is `unlikelihood_loss` at alpha
    1: comparing it with DPO shows what the weight is for.
    """
    return -beta / 2 * (pair.logp_w - pair.logp_l)


def preferred_ft_loss(pair: Pair, beta: float) -> Tensor:
    """-log pi(y_w|x)                                                         Section 6 -> (B,)

    Preferred-FT: supervised fine-tuning on the preferred responses. beta is not used.
    """
    return -pair.logp_w


# ------------------------------------------- the optimal frontier (Eq. 4 over sampled responses)
def balance_heuristic(ref_logp: Tensor, proposal_logp: Tensor) -> Tensor:
    """log w(y),   w(y) = pi_ref(y|x) / (1/M sum_m pi_m(y|x))                   Veach & Guibas 1995

    Importance weights of sampled responses. M policies sample equally many responses each. The mean
    of w(y) f(y) over all samples is an unbiased estimate of E_{y~pi_ref}[f(y)]; Z(x) in Eq. 4 is
    such a mean. If pi_ref is one of the M policies, no weight exceeds M.
    ref_logp (..., N), proposal_logp (M, ..., N) -> (..., N)
    """
    return ref_logp - (torch.logsumexp(proposal_logp, 0) - math.log(len(proposal_logp)))


def optimal_frontier(reward: Tensor, betas: Tensor,
                     log_weight: Tensor | None = None) -> dict[str, list[float]]:
    """The optimal (mean KL, mean reward) curve, estimated from samples.

    log Z, E_pi*[r] and KL(pi* || pi_ref) = E_pi*[r] / beta - log Z depend only on the distribution
    of r under pi_ref. reward (X, N) holds the rewards of N responses to each of X prompts, and
    log_weight (X, N) their weights (`balance_heuristic`); without weights they are samples of
    pi_ref. betas (S,): one common beta for all prompts at each point. Returns lists of length S:

    beta     the price of one nat
    kl       mean over prompts of KL(pi* || pi_ref), nats
    reward   mean over prompts of E_pi*[r]
    ess      effective sample size (sum u)^2 / sum u^2, u = w exp(r / beta), its 10th percentile
             over prompts; the curve is not reliable where it is below `plots.MIN_ESS`
    se       standard error of the height of the curve, from the finite N, for these prompts

    The estimate of Z is unbiased. That of log Z is biased low (Jensen's inequality). So the curve
    is too low, and `share_of_optimal_gain` is too high.
    """
    reward = reward.double()
    log_weight = torch.zeros_like(reward) if log_weight is None else log_weight.double()
    log_weight = log_weight - math.log(reward.shape[1])    # (X, N), in the place of log pi_ref
    frontier = {"beta": [], "kl": [], "reward": [], "ess": [], "se": []}
    for beta in betas.tolist():
        p = optimal_policy(log_weight, reward, beta).exp()                # (X, N), rows sum to 1
        log_z = log_partition(log_weight, reward, beta)                   # (X,)
        expected_reward = (p * reward).sum(1)                             # (X,) E_pi*[r]
        ess = 1 / (p ** 2).sum(1)                                         # (X,)
        relative_variance = (1 / ess - 1 / reward.shape[1]).clamp(min=0)  # (X,) Var(Z) / Z^2
        frontier["beta"].append(beta)
        frontier["kl"].append((expected_reward / beta - log_z).mean().item())
        frontier["reward"].append(expected_reward.mean().item())
        frontier["ess"].append(ess.quantile(.1).item())
        # Var(log Z) = Var(Z) / Z^2 (delta method); at a fixed KL the curve is beta (log Z + KL)
        frontier["se"].append((beta * (relative_variance.sum().sqrt() / len(reward))).item())
    return frontier


def optimal_reward(kl: float, frontier: dict[str, list[float]]) -> tuple[float, float, float]:
    """F(kl), the highest mean reward of any policy at this KL: min over beta of the tangents.

    The frontier is concave, and beta is its slope at pi*_beta. So the line reward_beta +
    beta (kl - kl_beta) touches it there and lies above it elsewhere, and F is the lowest of these
    lines. Returns F, its slope dF/dkl (the beta of the lowest line: the price of one nat) and the
    standard error of the curve at that beta.
    """
    columns = (frontier[name] for name in ("beta", "kl", "reward", "se"))
    tangents = [(reward + beta * (kl - kl_beta), beta, se)
                for beta, kl_beta, reward, se in zip(*columns)]
    return min(tangents)


def gap_to_optimum(reward: Tensor, kl: Tensor, log_weight: Tensor, sampled_reward: Tensor,
                   beta: float) -> Tensor:
    """beta KL(pi || pi*) = beta (log Z(x) + KL(pi || pi_ref)) - E_pi[r]          Eq. 14 -> (X,)

    What a policy lacks of the maximum of Eq. 3 at each prompt. The true gap is never negative; this
    estimate can be, because log Z is biased low (see `optimal_frontier`). reward (X,) and kl (X,)
    are those of the policy. Z is estimated from N samples: log_weight (X, N), sampled_reward
    (X, N). If beta is the slope of the frontier at the mean KL, the mean gap is F(KL) - E_pi[r].
    """
    log_weight = log_weight.double() - math.log(log_weight.shape[1])
    return beta * (log_partition(log_weight, sampled_reward.double(), beta) + kl) - reward


def share_of_optimal_gain(reward: float, reward_se: float, kl: float, kl_se: float,
                          frontier: dict) -> tuple[float, float, float]:
    """The share of the optimal gain: (E_pi[r] - E_ref[r]) / (F(KL) - E_ref[r]).

    F(KL) is the highest reward at the KL of the policy (`optimal_reward`). `frontier` also holds
    `ref_reward`, the mean reward of pi_ref. Returns F(KL), the share, and its standard error by the
    delta method: an error of the KL moves F by the slope of the frontier. The errors of reward and
    KL are treated as independent; they usually rise together, and then the true error is smaller.
    The errors of the frontier and of `ref_reward` are left out.
    """
    optimal, slope, _ = optimal_reward(kl, frontier)
    optimal_gain = optimal - frontier["ref_reward"]
    share = (reward - frontier["ref_reward"]) / optimal_gain
    share_se = math.hypot(reward_se, share * slope * kl_se) / optimal_gain
    return optimal, share, share_se
