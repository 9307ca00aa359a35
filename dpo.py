"""Direct Preference Optimization, Rafailov et al. 2023: the losses, their gradients by hand, and the optimum they aim at.

The paper's symbols: x prompt, y_w the preferred (winner) and y_l the other response (loser), pi the policy, pi_ref the
reference, r a reward, beta the price of one nat of KL(pi || pi_ref). Every log-probability is of a whole response (a sum over
its tokens, the end token included), in nats. B pairs, K ranked or N listed responses, T tokens, V vocabulary.

Losses are per example, (B,), never reduced: who trains takes the mean. This file needs nothing but torch.
"""
import math
import os
import runpy
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pair(NamedTuple):
    """All that a preference loss may see of B pairs; every field (B,)."""
    logp_w: Tensor    # log pi(y_w | x)
    logp_l: Tensor    # log pi(y_l | x)
    ref_w: Tensor     # log pi_ref(y_w | x), a constant
    ref_l: Tensor     # log pi_ref(y_l | x), a constant
    len_w: Tensor     # response tokens of y_w, the end token included
    len_l: Tensor     # response tokens of y_l


def make_pairs(logp: Tensor, ref: Tensor, length: Tensor, winner: Tensor, loser: Tensor) -> Pair:
    """App. B: log-probabilities of all completions of a prompt, (C,) each, and pairs as indices (B,) into them.

    Four completions give six pairs for four forward passes, not twelve.
    """
    return Pair(logp[winner], logp[loser], ref[winner], ref[loser], length[winner], length[loser])


# ------------------------------------------------------------------------------------- the optimum (Section 4, App. A.1)
def log_partition(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta)                      below Eq. 4;  (..., N), (..., N) -> (...)"""
    return torch.logsumexp(ref_logp + reward / beta, -1)


def optimal_policy(ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log pi*(y|x),   pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)                Eq. 4;  (..., N), (..., N) -> (..., N)

    Over N listed responses. For N samples of pi_ref instead of all responses, each one's reference weight is 1/N:
    pass ref_logp = -log N for each.
    """
    return ref_logp + reward / beta - log_partition(ref_logp, reward, beta)[..., None]


def objective(logp: Tensor, ref_logp: Tensor, reward: Tensor, beta: float) -> Tensor:
    """E_{y~pi}[r(x, y)] - beta KL(pi || pi_ref), maximised by Eq. 4                        Eq. 3;  (..., N) thrice -> (...)"""
    return (logp.exp() * (reward - beta * (logp - ref_logp))).sum(-1)


def implicit_reward(logp: Tensor, ref: Tensor, beta: float) -> Tensor:
    """rhat(x, y) = beta log(pi(y|x) / pi_ref(y|x)), which is r(x, y) - beta log Z(x) for the optimal pi      Eq. 5 without Z"""
    return beta * (logp - ref)


# ------------------------------------------------------------------------------------------------ DPO (Section 4, App. A)
def dpo_loss(pair: Pair, beta: float) -> Tensor:
    """-log sigma(rhat_w - rhat_l),   rhat = beta log(pi / pi_ref)                                               Eq. 7 -> (B,)

    Bradley-Terry (Eq. 1) on the implicit reward (Eq. 6): Z(x) is the same for both responses, and cancels.
    """
    rhat_w = implicit_reward(pair.logp_w, pair.ref_w, beta)
    rhat_l = implicit_reward(pair.logp_l, pair.ref_l, beta)
    return -F.logsigmoid(rhat_w - rhat_l)


def dpo_gradient(pair: Pair, beta: float) -> tuple[Tensor, Tensor]:
    """dL/dlog pi(y_w) = -beta sigma(rhat_l - rhat_w)   and   dL/dlog pi(y_l) = +beta sigma(rhat_l - rhat_w)

    Section 4, by hand: with u = rhat_w - rhat_l, d(-log sigma(u))/du = -sigma(-u). The weight sigma(-u) is near 1 where the
    implicit reward ranks the pair wrongly and near 0 where it is right: DPO stops pushing what is already apart.
    (Eq. 21-22 derive the same, printed with w and l exchanged in u and so in the weight.)
    """
    u = implicit_reward(pair.logp_w - pair.logp_l, pair.ref_w - pair.ref_l, beta)
    weight = torch.sigmoid(-u)
    return -beta * weight, beta * weight


def dpo_gradient_logits(logits: Tensor, ids: Tensor, mask: Tensor, coefficient: Tensor) -> Tensor:
    """The gradient carried on to the logits: dL/dlogits = coefficient (onehot(ids[t]) - softmax(logits[t-1])) at t-1.

    logits (B, T, V), ids (B, T), mask (B, T), coefficient = dL/dlog pi(y|x) (B,) -> (B, T, V). By hand through log-softmax,
    d log p_i / d z_j = [i = j] - p_j, one term for each response token; 0 where no response token is predicted.
    """
    mask = mask.bool()
    scored = mask[:, 1:, None]
    probability = torch.softmax(logits[:, :-1], -1)                                               # (B, T-1, V)
    onehot = F.one_hot(ids.masked_fill(~mask, 0)[:, 1:], logits.shape[-1])
    gradient = coefficient[:, None, None] * (onehot - probability)
    return F.pad(gradient.masked_fill(~scored, 0.), (0, 0, 0, 1))                                # the last logits predict nothing


def plackett_luce_loss(logp: Tensor, ref: Tensor, beta: float) -> Tensor:
    """-log prod_k exp(rhat_k) / sum_{j >= k} exp(rhat_j), ranked best first                   Eq. 20;  (B, K), (B, K) -> (B,)

    A ranking is K - 1 choices, each of the best of what is left (Eq. 18-19). For K = 2 it is Eq. 7.
    """
    rhat = implicit_reward(logp, ref, beta)
    log_rest = rhat.flip(-1).logcumsumexp(-1).flip(-1)                                           # log sum_{j >= k} exp(rhat_j)
    return (log_rest - rhat).sum(-1)


# ----------------------------------------------------------------------------------------------- the baselines (Section 6)
def unlikelihood_loss(pair: Pair, alpha: float) -> Tensor:
    """-[log pi(y_w) - alpha log pi(y_l)]                                                                        App. C.3 -> (B,)

    alpha as in Section 6. Not bounded below: nothing stops it from pushing y_l down forever, so it is run for a number of steps.
    """
    return -(pair.logp_w - alpha * pair.logp_l)


def constant_weight_loss(pair: Pair, beta: float) -> Tensor:
    """-beta/2 [log pi(y_w|x) - log pi(y_l|x)]                                                                    Section 4 -> (B,)

    Eq. 7 with the weight of its gradient, sigma(rhat_l - rhat_w), held at 1/2, where it begins. It is `unlikelihood_loss` at alpha 1
    but for a factor, which Adam does not see: what becomes of that is what the weight is for.
    """
    return -beta / 2 * (pair.logp_w - pair.logp_l)


def preferred_ft_loss(pair: Pair, beta: float) -> Tensor:
    """-log pi(y_w): supervised fine-tuning on the preferred response; beta plays no part                        Section 6 -> (B,)"""
    return -pair.logp_w


# ------------------------------------------------------------------------- the exact frontier (Eq. 4 over sampled responses)
def optimal_frontier(reward: Tensor, betas: Tensor) -> dict[str, list[float]]:
    """The best mean reward at each mean KL, from the rewards of N samples of pi_ref for each of X prompts: (X, N), (S,).

    log Z, E_pi*[r] and KL(pi* || pi_ref) = E_pi*[r] / beta - log Z depend on nothing but the distribution of r under pi_ref.
    Returns lists over beta, one common beta for all prompts: `beta`, `kl` (nats), `reward`, `ess` (the 10th percentile over
    prompts of the effective sample size (sum w)^2 / sum w^2; distrust the curve below 50) and `se` (standard error of the
    curve's height from having N samples only, at fixed prompts). Means over samples: the curve is biased low.
    """
    reward, rows = reward.double(), []
    uniform = torch.full_like(reward, -math.log(reward.shape[1]))
    for beta in betas.tolist():
        w = optimal_policy(uniform, reward, beta).exp()                                          # (X, N), rows sum to 1
        log_z = log_partition(uniform, reward, beta)
        best, ess = (w * reward).sum(1), 1 / (w ** 2).sum(1)
        se = beta * ((1 / ess - 1 / reward.shape[1]).clamp(min=0).sum().sqrt() / len(reward))    # of beta mean log Z
        kl = (best / beta - log_z).mean()
        rows.append((beta, kl.item(), best.mean().item(), ess.quantile(.1).item(), se.item()))
    return {name: list(column) for name, column in zip(("beta", "kl", "reward", "ess", "se"), zip(*rows))}


def optimal_reward(kl: float, frontier: dict[str, list[float]]) -> tuple[float, float, float]:
    """F(kl) = min over beta of beta (kl + mean log Z_beta): the most reward that any policy can have at this KL.

    For each beta it is the tangent of the frontier at pi*_beta, reward + beta (kl - KL_beta), of which F is the lower envelope.
    Returns F, the beta attained (the slope dF/dkl: the price of a nat there) and the curve's standard error.
    """
    height, beta, se = min((r + b * (kl - k), b, s) for b, k, r, s in
                           zip(*(frontier[name] for name in ("beta", "kl", "reward", "se"))))
    return height, beta, se


# --------------------------------------------------------------------------------------------------- a loss of your own
class LossError(Exception):
    """A loss that cannot be used; the text names the file, the function, the line and the reason."""


def line_of(error: BaseException, path: str):
    """The last line of a file that an exception passed through."""
    lines = [getattr(error, "lineno", None) or "?"]
    trace = error.__traceback__
    while trace:
        if os.path.realpath(trace.tb_frame.f_code.co_filename) == os.path.realpath(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[-1]


def load_loss(name: str) -> Callable[[Pair, float], Tensor]:
    """'my_loss.py:my_loss' -> that function, tried on a few pairs and checked at every call. Raises LossError."""
    path, _, function = name.rpartition(":")
    if not path or not os.path.isfile(path):
        raise LossError(f"--loss {name}: there is no file {path or name!r}; write FILE.py:FUNCTION")

    def guarded(call: Callable, what: str):
        try:
            return call()
        except (KeyboardInterrupt, LossError):
            raise
        except BaseException as error:    # whatever a student's file may raise, sys.exit() included
            raise LossError(f"--loss {name}: {what} raised {type(error).__name__} in {path}, line {line_of(error, path)}: {error}") from None

    written = guarded(lambda: runpy.run_path(path), "the file").get(function)
    if not callable(written):
        raise LossError(f"--loss {name}: {path} has no function {function}")
    line = written.__code__.co_firstlineno if hasattr(written, "__code__") else "?"
    where = f"--loss {name}: {function} ({path}, line {line})"

    def loss(pair: Pair, beta: float) -> Tensor:
        value = guarded(lambda: written(pair, beta), function)
        if not isinstance(value, Tensor) or value.shape != pair.logp_w.shape or value.is_complex():
            got = f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"{where} must return one real loss for each of the B pairs, of shape (B,), here {tuple(pair.logp_w.shape)}, "
                            f"but gave {got}; the mean is taken by train.py")
        if pair.logp_w.requires_grad and not value.requires_grad:
            raise LossError(f"{where} has no gradient at some pairs: it does not depend on logp_w or logp_l there, or detaches them")
        return value

    guarded(lambda: try_loss(loss, where), function)
    return loss


def try_loss(loss: Callable, where: str, beta: float = .5) -> None:
    """One call on ordinary pairs before anything is trained: a finite loss with a finite gradient. Raises LossError."""
    logp_w = torch.tensor([-20., -31., -25., -44., -28.], requires_grad=True)
    logp_l = torch.tensor([-22., -29., -40., -43., -26.], requires_grad=True)
    pair = Pair(logp_w, logp_l, logp_w.detach() - 1., logp_l.detach() + .5, torch.arange(20, 25), torch.arange(24, 29))
    value = loss(pair, beta)
    if not value.isfinite().all():
        raise LossError(f"{where} is not finite on ordinary log-probabilities: {value.tolist()}")
    slopes = torch.autograd.grad(value.sum(), (logp_w, logp_l), allow_unused=True) if value.requires_grad else ()
    if not any(slope is not None for slope in slopes):
        raise LossError(f"{where} has no gradient: it does not depend on logp_w or logp_l, or detaches them")
    if not all(slope.isfinite().all() for slope in slopes if slope is not None):
        raise LossError(f"{where} has a gradient that is not finite on ordinary log-probabilities")
