"""Section 3, Preliminaries (and App. A.1): Bradley-Terry, the reward model, the KL-constrained objective and its optimum."""
import math

import torch

import data
import dpo
import ppo
import world


# ------------------------------------------------------------------------------------------------------ Eq. 1 and 2
def test_bradley_terry_is_the_winners_share_of_exponentiated_reward():
    """Eq. 1: p(y_1 beats y_2 | x) = exp(r_1) / (exp(r_1) + exp(r_2))."""
    r_1, r_2 = world.normal(7, seed=1, scale=3.), world.normal(7, seed=2, scale=3.)
    loop = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in zip(r_1.tolist(), r_2.tolist())]
    world.agree(data.bradley_terry(r_1, r_2), torch.tensor(loop, dtype=torch.float64),
                "Eq. 1: p(y_1 beats y_2) = exp(r_1) / (exp(r_1) + exp(r_2)); are the two rewards swapped?")


def test_labels_drawn_by_the_code_follow_bradley_terry_at_reward_over_tau():
    """Eq. 1: in the mode `bt`, y_1 wins with probability exp(r_1 / tau) / (exp(r_1 / tau) + exp(r_2 / tau))."""
    tau, prompts, reward = .4, 40_000, torch.tensor([.15, .8, .5], dtype=torch.float64)
    winner, loser, _ = data.label_pairs(reward.expand(prompts, 3), "bt", tau, world.generator(3))
    wins = torch.zeros(3, 3, dtype=torch.float64).index_put((winner % 3, loser % 3), torch.tensor(1.).double(), accumulate=True)
    share = torch.exp(reward / tau)
    p = share[:, None] / (share[:, None] + share)
    z = ((wins / prompts - p) / (p * (1 - p) / prompts).sqrt())[[0, 0, 1], [1, 2, 2]]    # standard errors from Eq. 1
    assert (z.abs() < 4.5).all(), f"Eq. 1: labels are {z.tolist()} standard errors off sigma((r_1 - r_2) / tau): " \
        "is tau left out or multiplied, or the winner taken for the loser?"


def test_reward_model_loss_is_the_negative_log_of_equation_1():
    """Eq. 2: L = -log sigma(r_w - r_l), one number for each pair."""
    r_w, r_l = world.normal(7, seed=4, scale=2.), world.normal(7, seed=5, scale=2.)
    loop = [math.log(1 + math.exp(b - a)) for a, b in zip(r_w.tolist(), r_l.tolist())]
    world.agree(ppo.reward_model_loss(r_w, r_l), torch.tensor(loop, dtype=torch.float64),
                "Eq. 2: L = -log sigma(r_w - r_l), (B,), not reduced; winner and loser swapped, or sigma for log sigma?")


def test_reward_model_gradient_is_the_probability_of_the_wrong_order():
    """Eq. 2 by hand: dL/dr_w = -sigma(r_l - r_w) and dL/dr_l = +sigma(r_l - r_w)."""
    r_w, r_l = (world.normal(7, seed=s, scale=2.).requires_grad_() for s in (4, 5))
    gradient = torch.autograd.grad(ppo.reward_model_loss(r_w, r_l).sum(), (r_w, r_l))
    wrong = 1 / (1 + torch.exp(r_w - r_l)).detach()
    world.agree(torch.stack(gradient), torch.stack([-wrong, wrong]),
                "Eq. 2: dL/dr_w = -sigma(r_l - r_w), dL/dr_l = sigma(r_l - r_w); a wrong sign teaches the opposite preference")


def test_minimising_equation_2_recovers_reward_over_tau_up_to_a_constant():
    """Eq. 2 on unlimited pairs labelled by Eq. 1 at r / tau: the fitted reward is r / tau + f(x)."""
    tau, r = .6, world.rewards(seed=6)[0]
    phi = torch.zeros(world.N, dtype=torch.float64, requires_grad=True)
    preference, weight = data.bradley_terry(r[:, None] / tau, r / tau), world.pair_weights(seed=7)
    fit = lambda pair: ppo.reward_model_loss(pair.logp_w, pair.logp_l)    # phi stands where log pi would
    world.minimise(lambda: world.population_loss(fit, phi, phi, preference, weight), [phi])
    world.agree((phi - phi.mean()).detach(), (r - r.mean()) / tau,
                "Eq. 2: the population minimiser is r / tau + f(x); is the loss -log sigma of the difference?", 1e-6)


# -------------------------------------------------------------------------------------------------- Eq. 3, Eq. 4, A.1
def test_objective_is_expected_reward_minus_beta_times_kl():
    """Eq. 3: J(pi) = E_pi[r] - beta KL(pi || pi_ref), against a loop over all responses."""
    beta, r = .3, world.rewards(seed=8)
    logp, ref = (world.table(world.gpt(seed=s)).detach() for s in (9, 10))
    loop = [sum(math.exp(p) * (s - beta * (p - q)) for p, q, s in zip(*rows))
            for rows in zip(logp.tolist(), ref.tolist(), r.tolist())]
    world.agree(dpo.objective(logp, ref, r, beta), torch.tensor(loop, dtype=torch.float64),
                "Eq. 3: J = E_pi[r] - beta E_pi[log pi - log pi_ref]: sign of the KL, its direction, or beta forgotten?")


def test_optimal_policy_is_the_reference_tilted_by_exponentiated_reward():
    """Eq. 4: pi*(y|x) = pi_ref(y|x) exp(r / beta) / Z(x), Z(x) = sum_y pi_ref(y|x) exp(r / beta), against a loop."""
    beta, r, ref = .3, world.rewards(seed=8), world.table(world.gpt(seed=10)).detach()
    loop = [[math.exp(q) * math.exp(s / beta) for q, s in zip(*rows)] for rows in zip(ref.tolist(), r.tolist())]
    expected = torch.tensor([[w / sum(row) for w in row] for row in loop], dtype=torch.float64)
    world.agree(dpo.optimal_policy(ref, r, beta).exp(), expected,
                "Eq. 4: pi* = pi_ref exp(r / beta) / Z: is r multiplied by beta, pi_ref forgotten, or Z shared by prompts?")


def test_log_partition_is_the_log_of_the_sum_over_responses():
    """Below Eq. 4: Z(x) = sum_y pi_ref(y|x) exp(r(x, y) / beta), one number for each prompt."""
    beta, r, ref = .3, world.rewards(seed=8), world.table(world.gpt(seed=10)).detach()
    loop = [math.log(sum(math.exp(q) * math.exp(s / beta) for q, s in zip(*rows))) for rows in zip(ref.tolist(), r.tolist())]
    world.agree(dpo.log_partition(ref, r, beta), torch.tensor(loop, dtype=torch.float64),
                "Eq. 4: Z(x) = sum_y pi_ref(y|x) exp(r / beta): a sum over y, not over prompts, and with pi_ref in it")


def test_objective_is_log_partition_minus_kl_to_the_optimum_for_every_policy():
    """Eq. 11-14: E_pi[r] - beta KL(pi || pi_ref) = beta log Z(x) - beta KL(pi || pi*), whatever pi is."""
    beta, r, ref = .3, world.rewards(seed=8), world.table(world.gpt(seed=10)).detach()
    policies = [world.table(world.gpt(seed=9)).detach(), world.tabular(world.normal(world.X, world.N, seed=11, scale=4.))]
    star, log_z = dpo.optimal_policy(ref, r, beta), dpo.log_partition(ref, r, beta)
    left = torch.stack([dpo.objective(logp, ref, r, beta) for logp in policies])
    right = torch.stack([beta * log_z - beta * world.kl(logp, star) for logp in policies])
    world.agree(left, right, "Eq. 11-14: E_pi[r] - beta KL(pi || pi_ref) = beta log Z - beta KL(pi || pi*) for every pi")


def test_the_optimal_policy_attains_beta_log_z():
    """Eq. 14: KL(pi* || pi*) = 0, so J(pi*) = beta log Z(x)."""
    beta, r, ref = .3, world.rewards(seed=8), world.table(world.gpt(seed=10)).detach()
    attained = dpo.objective(dpo.optimal_policy(ref, r, beta), ref, r, beta)
    world.agree(attained, beta * dpo.log_partition(ref, r, beta), "Eq. 14: J(pi*) = beta log Z(x), the maximum of Eq. 3")


def test_no_other_policy_attains_as_much():
    """Eq. 15: J(pi) < J(pi*) for every pi but pi*, near or far, because KL(pi || pi*) > 0."""
    beta, r, ref = .3, world.rewards(seed=8), world.table(world.gpt(seed=10)).detach()
    star = dpo.optimal_policy(ref, r, beta)
    near = world.tabular(star + world.normal(500, world.X, world.N, seed=12, scale=.02))
    far = world.tabular(world.normal(500, world.X, world.N, seed=13, scale=3.))
    excess = dpo.objective(torch.cat([near, far]), ref, r, beta) - dpo.objective(star, ref, r, beta)
    assert (excess < 0).all(), f"Eq. 15: a policy exceeds J(pi*) by {excess.max():.3g}: `optimal_policy` is not the maximiser"


def test_direct_ascent_on_equation_3_finds_equation_4():
    """Eq. 3 -> Eq. 4: maximising E_pi[r] - beta KL(pi || pi_ref) over all policies gives pi_ref exp(r / beta) / Z."""
    beta, r, ref = .9, world.rewards(seed=8), world.tabular(world.normal(world.X, world.N, seed=11))
    theta = torch.zeros(world.X, world.N, dtype=torch.float64, requires_grad=True)
    world.minimise(lambda: -dpo.objective(world.tabular(theta), ref, r, beta).sum(), [theta], steps=250)
    distance = world.total_variation(world.tabular(theta), dpo.optimal_policy(ref, r, beta)).max()
    assert distance < 1e-6, f"Eq. 4: the maximiser of Eq. 3 is {distance:.2g} from `optimal_policy` in total variation; " \
        "one of the two has beta or pi_ref in the wrong place"


def test_a_gpt_trained_on_equation_3_arrives_at_equation_4():
    """Eq. 3 -> Eq. 4 with a neural policy: a GPT that can express pi* is led there by the objective."""
    beta, r, start = 1.1, world.rewards(seed=2)[0], dict(layers=1, heads=4, width=16)
    ref, policy = world.table(world.gpt(1, **start), x=0).detach(), world.gpt(1, **start)
    world.minimise(lambda: -dpo.objective(world.table(policy, x=0), ref, r, beta), policy.parameters(), steps=200)
    distance = world.total_variation(world.table(policy, x=0), dpo.optimal_policy(ref, r, beta))
    assert distance < 1e-2, f"Eq. 4: the GPT that maximises Eq. 3 is {distance:.3f} from pi* in total variation; " \
        "either the objective's KL or `sequence_logp` is not that of whole responses"


def test_a_smaller_beta_moves_further_from_the_reference_for_more_reward():
    """Eq. 3-4, the direction of beta: as beta falls, KL(pi* || pi_ref) and E_pi*[r] rise, from pi_ref to the best response."""
    r, ref = world.rewards(seed=8), world.table(world.gpt(seed=10)).detach()
    stars = [dpo.optimal_policy(ref, r, beta) for beta in (1e4, 5., 1., .3, .1, 1e-3)]
    kl = torch.stack([world.kl(star, ref) for star in stars])
    reward = torch.stack([world.expectation(star, r) for star in stars])
    ends = kl[0].max() < 1e-6 and (reward[-1] - r.max(1).values).abs().max() < 1e-6
    assert ends and (kl.diff(dim=0) > 0).all() and (reward.diff(dim=0) > 0).all(), \
        f"Eq. 4: at beta 10000, 5, 1, .3, .1, .001 KL is {kl[:, 0].tolist()} and reward {reward[:, 0].tolist()}: " \
        "both must rise as beta falls; is exp(r / beta) written exp(beta r)?"


# --------------------------------------------------------------------------------------------------------------- Eq. 5
def test_the_reward_is_the_implicit_reward_of_its_optimum_plus_beta_log_z():
    """Eq. 5: r(x, y) = beta log(pi*(y|x) / pi_ref(y|x)) + beta log Z(x)."""
    beta, r, ref = .3, world.rewards(seed=8), world.table(world.gpt(seed=10)).detach()
    star = dpo.optimal_policy(ref, r, beta)
    recovered = dpo.implicit_reward(star, ref, beta) + beta * dpo.log_partition(ref, r, beta)[:, None]
    world.agree(recovered, r, "Eq. 5: r = beta log(pi* / pi_ref) + beta log Z: beta forgotten, or the ratio upside down?")


def test_implicit_reward_is_beta_times_the_log_ratio():
    """Eq. 5 without Z: rhat(x, y) = beta log(pi(y|x) / pi_ref(y|x)), positive where pi has raised a response."""
    beta, pair = .3, world.random_pairs(7, seed=14)
    loop = [beta * math.log(math.exp(p) / math.exp(q)) for p, q in zip(pair.logp_w.tolist(), pair.ref_w.tolist())]
    world.agree(dpo.implicit_reward(pair.logp_w, pair.ref_w, beta), torch.tensor(loop, dtype=torch.float64),
                "Eq. 5: rhat = beta log(pi / pi_ref): reference forgotten, its sign flipped, or beta left out?")
