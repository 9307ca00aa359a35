"""Section 4, Direct Preference Optimization, and App. A.2: Eq. 6, Eq. 7, its minimiser, numerics.

Shapes: B pairs, N listed responses, T tokens, V vocabulary; see world.py.
"""
import decimal
import math

import torch

import data
import dpo
import ppo
import world

BETA = .3
TAU = .7     # of the Bradley-Terry labels, p(y_1 beats y_2) = sigma((r_1 - r_2) / tau)


def train_by_dpo(policy_logp, parameters, ref, r, weight, beta, steps=1000):
    """Train a policy in place on all pairs of responses to one prompt, by the expected DPO loss.

    policy_logp() returns log pi (N,), a function of `parameters`. The labels follow Eq. 1 at
    r / tau; ref (N,), r (N,). weight (N, N) says how often each pair is compared.
    """
    preference = data.bradley_terry(r[:, None] / TAU, r / TAU)

    def pair_loss(pair):
        return dpo.dpo_loss(pair, beta)

    def loss():
        return world.population_loss(pair_loss, policy_logp(), ref, preference, weight)

    world.minimise(loss, parameters, steps)


# ------------------------------------------------------------------------------------ Eq. 6 and 7
def test_the_optimal_policy_prefers_as_bradley_terry_does_on_the_true_reward():
    """Eq. 6 (16-17): at pi*, p(y_1 beats y_2) = sigma(rhat_1 - rhat_2) = sigma(r_1 - r_2).

    Here rhat = beta log(pi* / pi_ref); Z(x) cancels. exp(-loss) of Eq. 7 is this probability.
    """
    r = world.rewards(seed=1)[1]
    ref = world.table(world.gpt(seed=2), x=1).detach()
    star = dpo.optimal_policy(ref, r, BETA)
    i, j = torch.triu_indices(world.N, world.N, 1)
    pair = world.make_pair(star, ref, i, j)
    world.agree((-dpo.dpo_loss(pair, BETA)).exp(), data.bradley_terry(r[i], r[j]),
                "Eq. 6: at pi*, exp(-loss) of Eq. 7 = sigma(r_1 - r_2); is the reference missing, "
                "or beta on one side only?")


def test_dpo_is_the_reward_model_loss_of_the_implicit_reward():
    """Eq. 7 is Eq. 2 with the implicit reward rhat = beta log(pi / pi_ref) as the reward."""
    pair = world.random_pairs(7, seed=3)
    rhat_w = BETA * (pair.logp_w - pair.ref_w)
    rhat_l = BETA * (pair.logp_l - pair.ref_l)
    world.agree(dpo.dpo_loss(pair, BETA), ppo.reward_model_loss(rhat_w, rhat_l),
                "Eq. 7 = Eq. 2 at rhat = beta log(pi / pi_ref); are winner and loser swapped, or "
                "the reference missing, or its sign flipped?")


def dpo_loss_in_300_digits(logps, beta):
    """Eq. 7 in decimal arithmetic of 300 digits: logps (4, B), in the order of dpo.Pair -> (B,)."""
    losses = []
    with decimal.localcontext(decimal.Context(prec=300)):
        for pair in logps.T.tolist():
            logp_w, logp_l, ref_w, ref_l = [decimal.Decimal(value) for value in pair]
            u = decimal.Decimal(beta) * ((logp_w - ref_w) - (logp_l - ref_l))
            losses.append(float((1 + (-u).exp()).ln()))
    return torch.tensor(losses, dtype=torch.float64)


def test_dpo_loss_agrees_with_extended_precision():
    """Eq. 7: L = log(1 + exp(-beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)])).

    The relative error is below 1e-9 for log-probabilities of size 1e-6 to 2500.
    """
    beta = .07
    scale = torch.logspace(-6, 3.4, 151, dtype=torch.float64)
    logps = world.normal(4, 151, seed=4, scale=scale)
    loss = dpo.dpo_loss(dpo.Pair(*logps, world.LENGTHS[1], world.LENGTHS[2]), beta)
    exact = dpo_loss_in_300_digits(logps, beta)
    error = ((loss - exact).abs() / exact).max()
    assert loss.dtype == torch.float64 and error < 1e-9, \
        f"Eq. 7: relative error {error:.2g} to the formula in 300 digits, dtype {loss.dtype}; is " \
        "beta or a sign wrong, is it log(sigmoid()) and not logsigmoid, or float32?"


def test_minimising_dpo_over_all_policies_gives_equation_4():
    """Eq. 7 -> Eq. 4: with labels of Eq. 1 at r / tau, the minimiser over all policies is
    pi_ref exp(r / (tau beta)) / Z.

    Any distribution of pairs with full support gives the same policy; two are tried.
    """
    beta = .4
    r = world.rewards(seed=1)[0]
    ref = world.table(world.gpt(seed=2), x=0).detach()
    star = dpo.optimal_policy(ref, r, TAU * beta)
    distances = []
    for seed in (5, 6):
        theta = torch.zeros(world.N, dtype=torch.float64, requires_grad=True)
        weight = world.pair_weights(seed)
        train_by_dpo(lambda: world.tabular(theta), [theta], ref, r, weight, beta)
        distances.append(world.total_variation(world.tabular(theta), star).item())
    assert max(distances) < 1e-6, \
        f"Eq. 7 -> Eq. 4: the minimisers of the DPO loss under two distributions of pairs are " \
        f"{distances} from pi* in total variation; is the reference in the loss, is beta inside " \
        "the sigmoid, is y_w the winner?"


def test_a_gpt_trained_with_dpo_on_all_pairs_arrives_at_equation_4():
    """Eq. 7 -> Eq. 4 with a neural policy that starts at pi_ref, as in the paper."""
    beta = 1.6
    r = world.rewards(seed=2)[0]
    ref = world.table(world.gpt(1, layers=2, heads=4, width=16), x=0).detach()
    policy = world.gpt(1, layers=2, heads=4, width=16)
    weight = world.pair_weights(seed=3)
    train_by_dpo(lambda: world.table(policy, x=0), policy.parameters(), ref, r, weight, beta,
                 steps=150)
    star = dpo.optimal_policy(ref, r, TAU * beta)
    distance = world.total_variation(world.table(policy, x=0), star)
    assert distance < 1e-2, \
        f"Eq. 7 -> Eq. 4: the GPT trained with DPO is {distance:.3f} from pi* in total " \
        "variation; is log pi(y|x) the sum over exactly the response's tokens?"


def test_the_gradient_of_dpo_vanishes_at_equation_4():
    """Eq. 7 -> Eq. 4: at pi*, the expected gradient in the log-probability of each response is 0.

    The gradients of the pairs that a response wins and of those that it loses cancel.
    """
    beta = .4
    r = world.rewards(seed=1)[0]
    ref = world.table(world.gpt(seed=2), x=0).detach()
    star = dpo.optimal_policy(ref, r, TAU * beta)
    i, j = world.ordered_pairs()
    frequency = world.pair_weights(seed=5)[i, j] * data.bradley_terry(r[i] / TAU, r[j] / TAU)
    gradient_w, gradient_l = dpo.dpo_gradient(world.make_pair(star, ref, i, j), beta)
    total = torch.zeros(world.N, dtype=torch.float64)
    total.index_add_(0, i, frequency * gradient_w)
    total.index_add_(0, j, frequency * gradient_l)
    largest_term = (frequency * gradient_w).abs().max()
    largest_total = total.abs().max()
    assert largest_term > 0 and largest_total < 1e-9 * largest_term, \
        f"Eq. 7: at pi* the expected gradient of a response is {largest_total:.2g}, not 0; " \
        "is the weight sigma(rhat_l - rhat_w) wrong?"


def test_at_the_reference_the_loss_is_log_2_but_the_gradient_is_not_0():
    """Eq. 7 at pi = pi_ref: rhat = 0 and L = log 2, but dL/dlog pi(y_w) = -beta / 2.

    So .6931 is not a fixed point of DPO: a loss that stays there is a bug.
    """
    pair = world.random_pairs(7, seed=3)
    pair = pair._replace(ref_w=pair.logp_w, ref_l=pair.logp_l)
    actual = torch.stack([dpo.dpo_loss(pair, BETA), *dpo.dpo_gradient(pair, BETA)])       # (3, B)
    expected = torch.tensor([[math.log(2)], [-BETA / 2], [BETA / 2]], dtype=torch.float64)
    world.agree(actual, expected.expand(3, 7),
                "Eq. 7 at pi = pi_ref: loss log 2, gradient -+ beta / 2; "
                "is the reference subtracted?")


# --------------------------------------------------------------------------------------- numerics
def test_loss_and_gradient_are_right_at_enormous_log_ratios_in_float32():
    """Eq. 7 in float32 at log-ratios of -+ 1e4: never inf or NaN.

    The loss is 0 where the ranking is right and beta times the margin where it is wrong.
    """
    logp_w = torch.tensor([1e4, -1e4, 1e4, 0.]).requires_grad_()
    logp_l = torch.tensor([-1e4, 1e4, -1e4, 0.]).requires_grad_()
    pair = dpo.Pair(logp_w, logp_l, *torch.zeros(2, 4), *torch.ones(2, 4))
    loss = dpo.dpo_loss(pair, BETA)
    autograd = torch.autograd.grad(loss.sum(), [logp_w, logp_l])
    by_hand = dpo.dpo_gradient(pair, BETA)
    actual = torch.stack([loss, *autograd, *by_hand]).detach()                            # (5, B)

    loss_expected = [0, 2e4 * BETA, 0, math.log(2)]
    gradient_expected = [[0, -BETA, 0, -BETA / 2], [0, BETA, 0, BETA / 2]]
    expected = torch.tensor([loss_expected, *gradient_expected, *gradient_expected])
    assert actual.dtype == torch.float32, f"float32 pairs gave {actual.dtype}"
    world.agree(actual, expected,
                "Eq. 7 in float32 at log-ratios -+ 1e4: use logsigmoid, never log(sigmoid())", 1e-6)


def test_losses_are_one_number_per_pair_and_keep_float64():
    """Each entry of a (B,) loss is the loss of that pair alone.

    There is no mean, no sum and no whitening over the batch.
    """
    pair = world.random_pairs(7, seed=3)

    def gradient_w(pair, beta):
        return dpo.dpo_gradient(pair, beta)[0]

    def gradient_l(pair, beta):
        return dpo.dpo_gradient(pair, beta)[1]

    losses = [dpo.dpo_loss, dpo.unlikelihood_loss, dpo.preferred_ft_loss, gradient_w, gradient_l]
    for loss in losses:
        name = loss.__name__
        singles = [dpo.Pair(*(field[b:b + 1] for field in pair)) for b in range(7)]
        one_by_one = torch.cat([loss(single, BETA).flatten() for single in singles])
        assert one_by_one.dtype == torch.float64, f"{name} turned float64 into {one_by_one.dtype}"
        world.agree(loss(pair, BETA), one_by_one,
                    f"{name} is not (B,), one number for each pair alone", 1e-15)
