"""Section 3, Preliminaries, and App. A.1: Bradley-Terry, the reward model, the KL-constrained
objective, and its optimum (Eq. 1-5, 11-15).

Shapes: X prompts, N listed responses; see world.py.
"""
import math

import torch

import data
import dpo
import ppo
import world

BETA = .3


def rewards_and_reference():
    """Return r (X, N) and log pi_ref (X, N), where pi_ref is a GPT."""
    r = world.rewards(seed=8)
    ref = world.table(world.gpt(seed=10)).detach()
    return r, ref


def tilted_reference(ref, r):
    """pi_ref(y|x) exp(r(x, y) / beta) by a loop: (X, N), (X, N) -> X lists of N numbers."""
    rows = []
    for ref_row, r_row in zip(ref.tolist(), r.tolist()):
        rows.append([math.exp(ref_y) * math.exp(r_y / BETA) for ref_y, r_y in zip(ref_row, r_row)])
    return rows


# ------------------------------------------------------------------------------------ Eq. 1 and 2
def test_bradley_terry_is_the_winners_share_of_exponentiated_reward():
    """Eq. 1: p(y_1 beats y_2 | x) = exp(r_1) / (exp(r_1) + exp(r_2)), against a loop."""
    r_1 = world.normal(7, seed=1, scale=3.)
    r_2 = world.normal(7, seed=2, scale=3.)
    expected = [math.exp(a) / (math.exp(a) + math.exp(b))
                for a, b in zip(r_1.tolist(), r_2.tolist())]
    world.agree(data.bradley_terry(r_1, r_2), torch.tensor(expected, dtype=torch.float64),
                "Eq. 1: p(y_1 beats y_2) = exp(r_1) / (exp(r_1) + exp(r_2)); "
                "are the two rewards swapped?")


def test_labels_drawn_by_the_code_follow_bradley_terry_at_reward_over_tau():
    """Eq. 1: in the mode `bt`, y_1 wins with probability sigma((r_1 - r_2) / tau).

    40,000 prompts have the same three completions. The share of wins of each pair may be 4.5
    standard errors off.
    """
    tau = .4
    prompts = 40_000
    reward = torch.tensor([.15, .8, .5], dtype=torch.float64)
    winner, loser = data.label_pairs(reward.expand(prompts, 3), "bt", tau, world.generator(3))
    wins = torch.bincount(3 * (winner % 3) + loser % 3, minlength=9).view(3, 3).double()

    i, j = torch.triu_indices(3, 3, 1)
    strength = torch.exp(reward / tau)
    p = strength[i] / (strength[i] + strength[j])
    standard_error = (p * (1 - p) / prompts).sqrt()
    z = (wins[i, j] / prompts - p) / standard_error
    assert (z.abs() < 4.5).all(), \
        f"Eq. 1: the labels are {z.tolist()} standard errors off sigma((r_1 - r_2) / tau): " \
        "is tau left out or multiplied, or are winner and loser swapped?"


def test_reward_model_loss_is_the_negative_log_of_equation_1():
    """Eq. 2: L = -log sigma(r_w - r_l), one number for each pair, against a loop."""
    r_w = world.normal(7, seed=4, scale=2.)
    r_l = world.normal(7, seed=5, scale=2.)
    expected = [math.log(1 + math.exp(loser - winner))
                for winner, loser in zip(r_w.tolist(), r_l.tolist())]
    world.agree(ppo.reward_model_loss(r_w, r_l), torch.tensor(expected, dtype=torch.float64),
                "Eq. 2: L = -log sigma(r_w - r_l), (B,), not reduced; "
                "are winner and loser swapped, or is the log missing?")


def test_reward_model_gradient_is_the_probability_of_the_wrong_order():
    """Eq. 2 by hand: dL/dr_w = -sigma(r_l - r_w) and dL/dr_l = +sigma(r_l - r_w)."""
    r_w = world.normal(7, seed=4, scale=2.).requires_grad_()
    r_l = world.normal(7, seed=5, scale=2.).requires_grad_()
    gradient = torch.autograd.grad(ppo.reward_model_loss(r_w, r_l).sum(), (r_w, r_l))
    wrong_order = 1 / (1 + torch.exp(r_w - r_l)).detach()
    world.agree(torch.stack(gradient), torch.stack([-wrong_order, wrong_order]),
                "Eq. 2: dL/dr_w = -sigma(r_l - r_w), dL/dr_l = sigma(r_l - r_w); "
                "a wrong sign teaches the opposite preference")


def test_minimising_equation_2_recovers_reward_over_tau_up_to_a_constant():
    """Eq. 2 on infinitely many pairs, labelled by Eq. 1 at r / tau: the fit is r / tau + f(x)."""
    tau = .6
    r = world.rewards(seed=6)[0]
    preference = data.bradley_terry(r[:, None] / tau, r / tau)
    weight = world.pair_weights(seed=7)
    fitted = torch.zeros(world.N, dtype=torch.float64, requires_grad=True)

    def pair_loss(pair):
        return ppo.reward_model_loss(pair.logp_w, pair.logp_l)

    def loss():                          # the fitted rewards take the place of log pi in the pairs
        return world.population_loss(pair_loss, fitted, fitted, preference, weight)

    world.minimise(loss, [fitted])
    world.agree((fitted - fitted.mean()).detach(), (r - r.mean()) / tau,
                "Eq. 2: the population minimiser is r / tau + f(x); "
                "is the loss -log sigma of the difference?", 1e-6)


# ------------------------------------------------------------------------- Eq. 3, Eq. 4, App. A.1
def test_objective_is_expected_reward_minus_beta_times_kl():
    """Eq. 3: J(pi) = E_pi[r] - beta KL(pi || pi_ref), against a loop over all responses."""
    r, ref = rewards_and_reference()
    logp = world.table(world.gpt(seed=9)).detach()
    expected = []
    for logp_row, ref_row, r_row in zip(logp.tolist(), ref.tolist(), r.tolist()):
        terms = [math.exp(logp_y) * (r_y - BETA * (logp_y - ref_y))
                 for logp_y, ref_y, r_y in zip(logp_row, ref_row, r_row)]
        expected.append(sum(terms))
    world.agree(dpo.objective(logp, ref, r, BETA), torch.tensor(expected, dtype=torch.float64),
                "Eq. 3: J = E_pi[r] - beta E_pi[log pi - log pi_ref]; is the sign or the direction "
                "of the KL wrong, or beta missing?")


def test_optimal_policy_is_the_reference_tilted_by_exponentiated_reward():
    """Eq. 4: pi*(y|x) = pi_ref(y|x) exp(r / beta) / Z(x), against a loop."""
    r, ref = rewards_and_reference()
    expected = []
    for row in tilted_reference(ref, r):
        z = sum(row)
        expected.append([tilted / z for tilted in row])
    world.agree(dpo.optimal_policy(ref, r, BETA).exp(), torch.tensor(expected, dtype=torch.float64),
                "Eq. 4: pi* = pi_ref exp(r / beta) / Z; is r multiplied by beta, pi_ref missing, "
                "or Z shared by all prompts?")


def test_log_partition_is_the_log_of_the_sum_over_responses():
    """Below Eq. 4: Z(x) = sum_y pi_ref(y|x) exp(r(x, y) / beta), one number for each prompt."""
    r, ref = rewards_and_reference()
    expected = [math.log(sum(row)) for row in tilted_reference(ref, r)]
    world.agree(dpo.log_partition(ref, r, BETA), torch.tensor(expected, dtype=torch.float64),
                "Eq. 4: Z(x) = sum_y pi_ref(y|x) exp(r / beta); is the sum over prompts, or pi_ref "
                "missing?")


def test_objective_is_log_partition_minus_kl_to_the_optimum_for_every_policy():
    """Eq. 11-14: E_pi[r] - beta KL(pi || pi_ref) = beta log Z(x) - beta KL(pi || pi*) for all pi.

    One pi is a GPT, one is tabular.
    """
    r, ref = rewards_and_reference()
    neural = world.table(world.gpt(seed=9)).detach()
    tabular = world.tabular(world.normal(world.X, world.N, seed=11, scale=4.))
    star = dpo.optimal_policy(ref, r, BETA)
    log_z = dpo.log_partition(ref, r, BETA)
    for logp in (neural, tabular):
        world.agree(dpo.objective(logp, ref, r, BETA), BETA * log_z - BETA * world.kl(logp, star),
                    "Eq. 11-14: E_pi[r] - beta KL(pi || pi_ref) = beta log Z - beta KL(pi || pi*) "
                    "for every pi")


def test_the_optimal_policy_attains_beta_log_z():
    """Eq. 14: KL(pi* || pi*) = 0, so J(pi*) = beta log Z(x)."""
    r, ref = rewards_and_reference()
    attained = dpo.objective(dpo.optimal_policy(ref, r, BETA), ref, r, BETA)
    world.agree(attained, BETA * dpo.log_partition(ref, r, BETA),
                "Eq. 14: J(pi*) = beta log Z(x), the maximum of Eq. 3")


def test_no_other_policy_attains_as_much():
    """Eq. 15: J(pi) < J(pi*) for every pi but pi*, near or far, because KL(pi || pi*) > 0."""
    r, ref = rewards_and_reference()
    star = dpo.optimal_policy(ref, r, BETA)
    near = world.tabular(star + world.normal(500, world.X, world.N, seed=12, scale=.02))
    far = world.tabular(world.normal(500, world.X, world.N, seed=13, scale=3.))
    policies = torch.cat([near, far])
    excess = dpo.objective(policies, ref, r, BETA) - dpo.objective(star, ref, r, BETA)
    assert (excess < 0).all(), \
        f"Eq. 15: a policy exceeds J(pi*) by {excess.max():.3g}: " \
        "`optimal_policy` does not maximise Eq. 3"


def test_direct_ascent_on_equation_3_finds_equation_4():
    """Eq. 3 -> Eq. 4: maximising J over all tabular policies gives pi_ref exp(r / beta) / Z."""
    beta = .9
    r = world.rewards(seed=8)
    ref = world.tabular(world.normal(world.X, world.N, seed=11))
    theta = torch.zeros(world.X, world.N, dtype=torch.float64, requires_grad=True)

    def loss():
        return -dpo.objective(world.tabular(theta), ref, r, beta).sum()

    world.minimise(loss, [theta], steps=250)
    star = dpo.optimal_policy(ref, r, beta)
    distance = world.total_variation(world.tabular(theta), star).max()
    assert distance < 1e-6, \
        f"Eq. 4: the maximiser of Eq. 3 is {distance:.2g} from `optimal_policy` in total " \
        "variation: one of the two has beta or pi_ref in the wrong place"


def test_a_gpt_trained_on_equation_3_arrives_at_equation_4():
    """Eq. 3 -> Eq. 4 with a neural policy: a GPT that can express pi* is led there by Eq. 3."""
    beta = 1.1
    r = world.rewards(seed=2)[0]
    ref = world.table(world.gpt(1, layers=1, heads=4, width=16), x=0).detach()
    policy = world.gpt(1, layers=1, heads=4, width=16)                     # it starts at pi_ref

    def loss():
        return -dpo.objective(world.table(policy, x=0), ref, r, beta)

    world.minimise(loss, policy.parameters(), steps=200)
    star = dpo.optimal_policy(ref, r, beta)
    distance = world.total_variation(world.table(policy, x=0), star)
    assert distance < 1e-2, \
        f"Eq. 4: the GPT that maximises Eq. 3 is {distance:.3f} from pi* in total variation: " \
        "is the KL of `objective`, or `sequence_logp`, not that of whole responses?"


def test_a_smaller_beta_moves_further_from_the_reference_for_more_reward():
    """Eq. 3-4, the direction of beta: as beta falls, KL(pi* || pi_ref) and E_pi*[r] rise.

    At beta 10,000 the optimum is pi_ref; at .001 it always gives the best response.
    """
    r, ref = rewards_and_reference()
    stars = [dpo.optimal_policy(ref, r, beta) for beta in (1e4, 5., 1., .3, .1, 1e-3)]
    kl = torch.stack([world.kl(star, ref) for star in stars])                       # (6, X)
    reward = torch.stack([world.expectation(star, r) for star in stars])            # (6, X)
    starts_at_reference = kl[0].max() < 1e-6
    ends_at_best_response = (reward[-1] - r.max(1).values).abs().max() < 1e-6
    both_rise = (kl.diff(dim=0) > 0).all() and (reward.diff(dim=0) > 0).all()
    assert starts_at_reference and ends_at_best_response and both_rise, \
        f"Eq. 4: at beta 10000, 5, 1, .3, .1, .001 KL is {kl[:, 0].tolist()} and reward is " \
        f"{reward[:, 0].tolist()}: both must rise as beta falls; is it exp(beta r)?"


# ------------------------------------------------------------------------------------------ Eq. 5
def test_the_reward_is_the_implicit_reward_of_its_optimum_plus_beta_log_z():
    """Eq. 5: r(x, y) = beta log(pi*(y|x) / pi_ref(y|x)) + beta log Z(x)."""
    r, ref = rewards_and_reference()
    star = dpo.optimal_policy(ref, r, BETA)
    log_z = dpo.log_partition(ref, r, BETA)[:, None]
    world.agree(dpo.implicit_reward(star, ref, BETA) + BETA * log_z, r,
                "Eq. 5: r = beta log(pi* / pi_ref) + beta log Z; is beta missing, or the ratio "
                "upside down?")


def test_implicit_reward_is_beta_times_the_log_ratio():
    """Eq. 5 without Z: rhat(x, y) = beta log(pi(y|x) / pi_ref(y|x)), against a loop.

    It is positive where pi gives a response more probability than pi_ref.
    """
    pair = world.random_pairs(7, seed=14)
    expected = [BETA * math.log(math.exp(logp) / math.exp(ref))
                for logp, ref in zip(pair.logp_w.tolist(), pair.ref_w.tolist())]
    world.agree(dpo.implicit_reward(pair.logp_w, pair.ref_w, BETA),
                torch.tensor(expected, dtype=torch.float64),
                "Eq. 5: rhat = beta log(pi / pi_ref); is the reference missing, its sign flipped, "
                "or beta missing?")
