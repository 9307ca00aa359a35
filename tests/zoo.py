"""Losses of the field in the five lines that the interface allows; each has a closed form to check (test_zoo.py).

    python train.py --loss tests/zoo.py:ipo --betas .1,.3,1

h is the log-ratio margin [log pi/pi_ref](y_w) - [log pi/pi_ref](y_l): beta h is the difference of implicit rewards in Eq. 7.
"""
import torch
import torch.nn.functional as F


def margin(pair):
    return (pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l)


def ipo(pair, beta):
    """(h - 1/(2 beta))^2: least at a finite margin, whatever the labels        (Azar et al. 2023, with summed log-probabilities)"""
    return (margin(pair) - 1 / (2 * beta)) ** 2


def cdpo(pair, beta, e=.1):
    """-(1-e) log sigma(beta h) - e log sigma(-beta h): a share e of labels is flipped; least at beta h = log((1-e)/e)   (Mitchell 2023)"""
    h = beta * margin(pair)
    return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)


def robust_dpo(pair, beta, e=.1):
    """[-(1-e) log sigma(beta h) + e log sigma(-beta h)] / (1-2e): unbiased when a share e is flipped  (Chowdhury et al. 2024)"""
    h = beta * margin(pair)
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


def hinge(pair, beta):
    """max(0, 1 - beta h): flat beyond its margin                                       (hinge-norm of RSO, Liu et al. 2023)"""
    return (1 - beta * margin(pair)).clamp(min=0)


def simpo(pair, beta, gamma=.1):
    """-log sigma(beta (mean log pi(y_w) - mean log pi(y_l) - gamma)): means over tokens, no reference      (Meng et al. 2024)

    gamma is their gamma / beta, .5 with a beta of 2 and more for their models.
    """
    return -F.logsigmoid(beta * (pair.logp_w / pair.len_w - pair.logp_l / pair.len_l - gamma))


def orpo(pair, beta):
    """-mean log pi(y_w) - beta log sigma(log-odds ratio), odds p/(1-p) of the geometric mean of token probabilities       (Hong et al. 2024)"""
    w, l = pair.logp_w / pair.len_w, pair.logp_l / pair.len_l
    odds = (w - torch.log(-torch.expm1(w.clamp(max=-1e-6)))) - (l - torch.log(-torch.expm1(l.clamp(max=-1e-6))))
    return -w - beta * F.logsigmoid(odds)


def kto(pair, beta):
    """2 - sigma(rhat_w) - sigma(-rhat_l): KTO with its reference point z = 0, so that examples stay independent (Ethayarajh 2024)"""
    return 2 - torch.sigmoid(beta * (pair.logp_w - pair.ref_w)) - torch.sigmoid(-beta * (pair.logp_l - pair.ref_l))
