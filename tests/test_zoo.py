"""Each loss of the zoo has the optimum that its paper gives it."""
import math

import torch

import dpo
import world
import zoo


def at_margins(h):
    """Pairs whose log-ratio margin is h (B,), log-probabilities of unequal lengths."""
    zero = torch.zeros_like(h)
    return dpo.Pair(h - 20., zero - 30., zero - 20., zero - 30., zero + 7., zero + 9.)


def best_margin(loss):
    h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    world.minimise(lambda: loss(at_margins(h)).sum(), [h])
    return h.item()


def test_ipo_is_least_at_one_over_two_beta():
    assert abs(best_margin(lambda pair: zoo.ipo(pair, .3)) - 1 / .6) < 1e-6


def test_cdpo_is_least_at_the_log_odds_of_its_labels():
    """beta h = log((1 - e) / e)."""
    assert abs(best_margin(lambda pair: zoo.cdpo(pair, .3, e=.2)) - math.log(.8 / .2) / .3) < 1e-5


def test_robust_dpo_averages_to_dpo_over_flipped_labels():
    """(1 - e) L(h) + e L(-h) = -log sigma(beta h), for every h: the noise is gone in expectation."""
    h, e = torch.linspace(-9, 9, 31, dtype=torch.float64), .2
    mixed = (1 - e) * zoo.robust_dpo(at_margins(h), .3, e) + e * zoo.robust_dpo(at_margins(-h), .3, e)
    world.agree(mixed, dpo.dpo_loss(at_margins(h), .3), "robust DPO is unbiased for Eq. 7 when a share e of labels is flipped")


def test_hinge_is_flat_past_its_margin():
    """Zero, with zero gradient, beyond h = 1 / beta; slope -beta before it."""
    h = torch.tensor([1., 3., 4., 90.], dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(zoo.hinge(at_margins(h), .3).sum(), h)
    world.agree(slope, torch.tensor([-.3, -.3, 0., 0.], dtype=torch.float64), "hinge: slope -beta up to h = 1 / beta, then 0")


def test_simpo_is_log_2_where_mean_log_probabilities_differ_by_gamma():
    pair = at_margins(torch.zeros(1, dtype=torch.float64))._replace(logp_w=torch.tensor([-14.]), logp_l=torch.tensor([-18. - .9]))
    assert abs(zoo.simpo(pair, 2.5, gamma=.1).item() - math.log(2)) < 1e-5, "means over 7 and 9 tokens: -2 and -2.1"


def test_orpo_is_likelihood_plus_log_2_at_even_odds():
    """Where both responses have the same mean token probability the odds ratio is 1, and -log sigma(0) = log 2."""
    pair = at_margins(torch.zeros(1, dtype=torch.float64))._replace(logp_w=torch.tensor([-14.]), logp_l=torch.tensor([-18.]))
    assert abs(zoo.orpo(pair, .3).item() - (2 + .3 * math.log(2))) < 1e-5


def test_kto_is_one_at_the_reference_and_falls_for_each_response_by_itself():
    """sigma(0) twice; raising y_w alone and lowering y_l alone each gain beta / 4 per nat."""
    x = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    pair = dpo.Pair(x[0] - 20., x[1] - 30., x[0].detach() - 20., x[1].detach() - 30., torch.tensor([7]), torch.tensor([9]))
    loss = zoo.kto(pair, .3)
    slope, = torch.autograd.grad(loss.sum(), x)
    world.agree(torch.cat([loss.detach(), slope.flatten()]), torch.tensor([1., -.075, .075], dtype=torch.float64), "KTO at pi = pi_ref")
