"""Seven preference losses of the field, each in the few lines that the interface allows.

    python train.py --loss tests/zoo.py:ipo --betas .1,.3,1

Each loss has a closed form that theorems/test_losses_of_the_field.py checks. In the docstrings h is
the log-ratio margin [log pi/pi_ref](y_w) - [log pi/pi_ref](y_l), nats, so beta h is the difference
of implicit rewards in Eq. 7. Every loss takes a Pair and returns (B,).
"""
import torch
import torch.nn.functional as F


def margin(pair):
    """h: how much more the policy has raised log pi(y_w) than log pi(y_l), nats -> (B,)."""
    return (pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)


def ipo(pair, beta):
    """(h - 1/(2 beta))^2                                                      Azar et al. 2023

    The minimum is at a finite margin, whatever the labels. The log-probabilities are sums over
    tokens.
    """
    return (margin(pair) - 1 / (2 * beta)) ** 2


def cdpo(pair, beta, e=.1):
    """-(1 - e) log sigma(beta h) - e log sigma(-beta h)                           Mitchell 2023

    Conservative DPO: a share e of the labels is flipped. The minimum is at
    beta h = log((1 - e) / e).
    """
    u = beta * margin(pair)
    return -(1 - e) * F.logsigmoid(u) - e * F.logsigmoid(-u)


def robust_dpo(pair, beta, e=.1):
    """[-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e)     Chowdhury et al. 2024

    If a share e of the labels is flipped, its expectation is the loss of DPO on the true labels.
    """
    u = beta * margin(pair)
    return (-(1 - e) * F.logsigmoid(u) + e * F.logsigmoid(-u)) / (1 - 2 * e)


def hinge(pair, beta):
    """max(0, 1 - beta h)                                          RSO's hinge, Liu et al. 2023

    The loss is flat beyond the margin 1 / beta.
    """
    return (1 - beta * margin(pair)).clamp(min=0)


def simpo(pair, beta, gamma=.1):
    """-log sigma(beta (mean log pi(y_w) - mean log pi(y_l) - gamma))          Meng et al. 2024

    The means are over tokens, and there is no reference. `gamma` is the paper's gamma / beta, which
    is .5 there, with beta 2 and more.
    """
    mean_w = pair.logp_w / pair.len_w
    mean_l = pair.logp_l / pair.len_l
    return -F.logsigmoid(beta * (mean_w - mean_l - gamma))


def log_odds(logp):
    """log(p / (1 - p)) from log p <= 0; the limit of -1e-6 keeps 1 - p above 0."""
    return logp - torch.log(-torch.expm1(logp.clamp(max=-1e-6)))


def orpo(pair, beta):
    """-mean log pi(y_w) - beta log sigma(log-odds of y_w - log-odds of y_l)   Hong et al. 2024

    The odds are p / (1 - p), with p the geometric mean of the token probabilities of a response.
    """
    mean_w = pair.logp_w / pair.len_w
    mean_l = pair.logp_l / pair.len_l
    return -mean_w - beta * F.logsigmoid(log_odds(mean_w) - log_odds(mean_l))


def kto(pair, beta):
    """2 - sigma(rhat_w) - sigma(-rhat_l),   rhat = beta log(pi / pi_ref)  Ethayarajh et al. 2024

    The reference point z of KTO is 0 here, so that the examples stay independent.
    """
    rhat_w = beta * (pair.logp_w - pair.ref_w)
    rhat_l = beta * (pair.logp_l - pair.ref_l)
    return 2 - torch.sigmoid(rhat_w) - torch.sigmoid(-rhat_l)
