"""Each loss of zoo.py has the optimum, or the special value, that its paper gives it."""
import math

import torch

import dpo
import world
import zoo


def pairs_with_margin(h):
    """Pairs with log-ratio margins h (B,) and responses of 7 and 9 tokens."""
    zero = torch.zeros_like(h)
    return dpo.Pair(logp_w=h - 20., logp_l=zero - 30., ref_w=zero - 20., ref_l=zero - 30.,
                    len_w=zero + 7., len_l=zero + 9.)


def one_pair(logp_w, logp_l):
    """One pair with these log-probabilities under the policy; responses of 7 and 9 tokens."""
    pair = pairs_with_margin(torch.zeros(1, dtype=torch.float64))
    return pair._replace(logp_w=torch.tensor([logp_w]), logp_l=torch.tensor([logp_l]))


def optimal_margin(loss):
    """The margin h, nats, that minimises loss(pair)."""
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    world.minimise(lambda: loss(pairs_with_margin(h)).sum(), [h])
    return h.item()


def test_ipo_is_least_at_one_over_two_beta():
    """The minimum of IPO is at h = 1 / (2 beta)."""
    h = optimal_margin(lambda pair: zoo.ipo(pair, .3))
    assert abs(h - 1 / .6) < 1e-6, f"IPO: the minimum is at h = {h}, not at 1 / (2 beta)"


def test_cdpo_is_least_at_the_log_odds_of_its_labels():
    """The minimum of cDPO is at beta h = log((1 - e) / e)."""
    h = optimal_margin(lambda pair: zoo.cdpo(pair, .3, e=.2))
    assert abs(h - math.log(.8 / .2) / .3) < 1e-5, \
        f"cDPO: the minimum is at h = {h}, not at log((1 - e) / e) / beta"


def test_robust_dpo_averages_to_dpo_over_flipped_labels():
    """(1 - e) L(h) + e L(-h) = -log sigma(beta h) for every h: flipped labels cancel on average."""
    h = torch.linspace(-9, 9, 31, dtype=torch.float64)
    e = .2
    kept = zoo.robust_dpo(pairs_with_margin(h), .3, e)
    flipped = zoo.robust_dpo(pairs_with_margin(-h), .3, e)
    world.agree((1 - e) * kept + e * flipped, dpo.dpo_loss(pairs_with_margin(h), .3),
                "robust DPO is an unbiased estimate of Eq. 7 if a share e of the labels is flipped")


def test_hinge_is_flat_past_its_margin():
    """The slope of the hinge in h is -beta up to h = 1 / beta and 0 beyond it."""
    h = torch.tensor([1., 3., 4., 90.], dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(zoo.hinge(pairs_with_margin(h), .3).sum(), h)
    world.agree(slope, torch.tensor([-.3, -.3, 0., 0.], dtype=torch.float64),
                "hinge: the slope is -beta up to h = 1 / beta, then 0")


def test_simpo_is_log_2_where_mean_log_probabilities_differ_by_gamma():
    """-14 nats over 7 tokens and -18.9 over 9 have means -2 and -2.1, which differ by gamma."""
    loss = zoo.simpo(one_pair(-14., -18.9), 2.5, gamma=.1).item()
    assert abs(loss - math.log(2)) < 1e-5, \
        f"SimPO: -log sigma(0) is log 2, not {loss}; the means are over 7 and 9 tokens"


def test_orpo_is_likelihood_plus_log_2_at_even_odds():
    """If both responses have the same mean token probability, the odds ratio is 1.

    Then the loss is -mean log pi(y_w) - beta log sigma(0).
    """
    loss = zoo.orpo(one_pair(-14., -18.), .3).item()
    assert abs(loss - (2 + .3 * math.log(2))) < 1e-5, \
        f"ORPO: at odds ratio 1 the loss is 2 + beta log 2, not {loss}"


def test_kto_is_one_at_the_reference_and_falls_for_each_response_by_itself():
    """At pi = pi_ref the loss is 2 - 2 sigma(0) = 1.

    A nat more for y_w and a nat less for y_l each lower it by beta / 4, independently.
    """
    change = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    ref_w, ref_l = torch.tensor([[-20.], [-30.]], dtype=torch.float64)
    pair = dpo.Pair(change[0] + ref_w, change[1] + ref_l, ref_w, ref_l, torch.tensor([7]),
                    torch.tensor([9]))
    loss = zoo.kto(pair, .3)
    slope, = torch.autograd.grad(loss.sum(), change)
    world.agree(torch.cat([loss.detach(), slope.flatten()]),
                torch.tensor([1., -.075, .075], dtype=torch.float64),
                "KTO at pi = pi_ref: the loss is 1, its slopes are -beta / 4 and beta / 4")
