"""Section 4, Direct Preference Optimization, and App. A.2, A.4: Eq. 6, Eq. 7 and its minimiser,
its gradient, its numerics.

Shapes: B pairs, N listed responses, T tokens, V vocabulary; see world.py.
"""
import decimal
import math

import torch

import data
import dpo
import model
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


def flatten(gradients):
    """Join the gradients of all parameters of a model in one vector."""
    return torch.cat([g.flatten() for g in gradients])


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


# -------------------------------------------------------------- the gradient in log-probabilities
def test_the_gradient_in_log_probabilities_is_the_slope_of_the_loss():
    """Section 4: `dpo_gradient` is the slope of Eq. 7 in log pi(y_w) and log pi(y_l).

    The slope is a finite difference.
    """
    pair = world.random_pairs(7, seed=3)

    def loss():
        return dpo.dpo_loss(pair, BETA).sum()

    slopes = [world.slope(loss, pair.logp_w), world.slope(loss, pair.logp_l)]
    world.agree(torch.stack(dpo.dpo_gradient(pair, BETA)), torch.stack(slopes),
                "Section 4: `dpo_gradient` is not the slope of Eq. 7, which raises log pi(y_w) and "
                "lowers log pi(y_l) by beta sigma(rhat_l - rhat_w)", 1e-8)


def test_the_gradient_is_weighed_by_how_wrongly_the_implicit_reward_ranks():
    """Section 4: dL/dlog pi(y_w) = -beta sigma(rhat_l - rhat_w) = -dL/dlog pi(y_l), by a loop."""
    pair = world.random_pairs(7, seed=3)
    expected = []
    for logp_w, logp_l, ref_w, ref_l in zip(*(field.tolist() for field in pair[:4])):
        strength_w = (math.exp(logp_w) / math.exp(ref_w)) ** BETA                     # exp(rhat_w)
        strength_l = (math.exp(logp_l) / math.exp(ref_l)) ** BETA                     # exp(rhat_l)
        wrong_order = strength_l / (strength_w + strength_l)           # sigma(rhat_l - rhat_w)
        expected.append([-BETA * wrong_order, BETA * wrong_order])
    world.agree(torch.stack(dpo.dpo_gradient(pair, BETA), 1),
                torch.tensor(expected, dtype=torch.float64),
                "Section 4: the weight is beta sigma(rhat_l - rhat_w), large where y_l is ranked "
                "above y_w; is the sign of u wrong, or beta missing?")


def test_the_derivative_of_minus_log_sigma_is_minus_sigma_of_the_opposite():
    """Eq. 21-22: with u = rhat_w - rhat_l, dL/du = -sigma'(u) / sigma(u) = -sigma(-u).

    So dL/dlog pi(y_w) = -beta sigma(-u).
    """
    pair = world.random_pairs(7, seed=3)
    u = BETA * (pair.logp_w - pair.logp_l - pair.ref_w + pair.ref_l)
    sigma = 1 / (1 + torch.exp(-u))
    sigma_derivative = sigma * (1 - sigma)
    ratio = sigma_derivative / sigma
    world.agree(torch.stack(dpo.dpo_gradient(pair, BETA)), BETA * torch.stack([-ratio, ratio]),
                "Eq. 21-22: dL/dlog pi(y_w) = -beta sigma'(u) / sigma(u), u = rhat_w - rhat_l")


def test_autograd_agrees_with_the_gradient_by_hand_and_gives_the_lengths_none():
    """Section 4: backpropagation through Eq. 7 gives `dpo_gradient`; Eq. 7 contains no lengths.

    The lengths passed to the loss differ from those passed to `dpo_gradient`.
    """
    pair = world.random_pairs(7, seed=3)
    logp_w = pair.logp_w.clone().requires_grad_()
    logp_l = pair.logp_l.clone().requires_grad_()
    longer_pair = pair._replace(logp_w=logp_w, logp_l=logp_l, len_w=3 * pair.len_w + 1)
    loss = dpo.dpo_loss(longer_pair, BETA).sum()
    autograd = torch.autograd.grad(loss, [logp_w, logp_l])
    world.agree(torch.stack(autograd), torch.stack(dpo.dpo_gradient(pair, BETA)),
                "Section 4: autograd through `dpo_loss` (Eq. 7) and `dpo_gradient` differ, "
                "or the loss is divided by lengths")


def test_with_constant_weight_every_pair_is_pushed_as_dpo_pushes_at_the_reference():
    """Section 4: the ablation's gradient is that of Eq. 7 at rhat_w = rhat_l, for every policy."""
    pair = world.random_pairs(7, seed=3)
    at_reference = pair._replace(logp_w=pair.ref_w, logp_l=pair.ref_l)

    def loss():
        return dpo.constant_weight_loss(pair, BETA).sum()

    slopes = [world.slope(loss, pair.logp_w), world.slope(loss, pair.logp_l)]
    world.agree(torch.stack(slopes), torch.stack(dpo.dpo_gradient(at_reference, BETA)),
                "Section 4, constant weight: the gradient is -beta/2 for y_w and beta/2 for y_l, "
                "at every pair", 1e-8)
    world.agree(dpo.constant_weight_loss(pair, BETA), BETA / 2 * dpo.unlikelihood_loss(pair, 1.),
                "Section 4: the constant-weight loss is Unlikelihood at alpha 1, times beta / 2")


# ------------------------------------------------------------------------- the gradient in logits
def test_the_gradient_in_logits_is_one_hot_minus_softmax_at_the_position_before():
    """Section 4: d log pi(y|x) / d logits[t-1, v] = [v = ids[t]] - pi(v | ids[<t]), by a loop.

    This holds for response tokens t; the gradient is 0 elsewhere.
    """
    ids, mask, _ = world.three_pairs()
    coefficient = world.normal(6, seed=8)
    logits = world.normal(6, world.T, world.V, seed=9, scale=2.)
    expected = torch.zeros(6, world.T, world.V, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        weights = [math.exp(logit) for logit in logits[b, t - 1].tolist()]
        for v in range(world.V):
            onehot = float(v == ids[b, t])
            expected[b, t - 1, v] = coefficient[b] * (onehot - weights[v] / sum(weights))
    world.agree(dpo.dpo_gradient_logits(logits, ids, mask, coefficient), expected,
                "Section 4, in logits: coefficient ([v = ids[t]] - softmax(logits[t-1])[v]) at "
                "t-1; is the shift, the sign or the mask wrong?")


def test_the_gradient_in_logits_is_the_slope_of_the_loss():
    """Section 4: `dpo_gradient`, carried on by `dpo_gradient_logits`, is the finite difference of
    Eq. 7 in every logit.
    """
    ids, mask, ref = world.three_pairs()
    logits = world.normal(6, world.T, world.V, seed=9, scale=2.)

    def pair():
        return world.halves(model.sequence_logp(logits, ids, mask), ref, mask)

    def loss():
        return dpo.dpo_loss(pair(), BETA).sum()

    coefficient = torch.cat(dpo.dpo_gradient(pair(), BETA))
    by_hand = dpo.dpo_gradient_logits(logits, ids, mask, coefficient)
    world.agree(by_hand, world.slope(loss, logits),
                "Section 4, in logits: the gradient by hand and the finite differences of Eq. 7 "
                "differ; are the labels shifted wrongly, does the mask count prompt or filler, or "
                "is the softmax over the wrong axis?", 1e-8)


def test_masked_out_logits_and_ids_are_never_read():
    """Section 4: the gradient is 0 where no response token is predicted.

    NaN logits or an impossible id there change nothing.
    """
    ids, mask, _ = world.three_pairs()
    coefficient = world.normal(6, seed=8)
    logits = world.normal(6, world.T, world.V, seed=9, scale=2.)
    clean = dpo.dpo_gradient_logits(logits, ids, mask, coefficient)

    predicts_response = torch.zeros_like(mask)
    predicts_response[:, :-1] = mask[:, 1:]
    unread = ~predicts_response
    bad_logits = logits.masked_fill(unread[..., None], torch.nan)
    bad_ids = ids.masked_fill(~mask, -10**6)
    dirty = dpo.dpo_gradient_logits(bad_logits, bad_ids, mask, coefficient)
    assert torch.equal(clean, dirty) and (dirty[unread] == 0).all(), \
        "Section 4, in logits: entries outside the mask are read, or get a gradient " \
        "(NaN times 0 is NaN, not 0)"


# -------------------------------------------------------------------------- the gradient in theta
def test_section_4s_gradient_is_the_slope_of_the_loss_in_theta():
    """Section 4: grad L = -beta sigma(rhat_l - rhat_w) [grad log pi(y_w) - grad log pi(y_l)].

    grad L is the finite difference of Eq. 7 in every parameter of a GPT.
    """
    ids, mask, ref = world.three_pairs()
    policy = world.gpt(seed=11, layers=1, heads=2, width=4)
    theta = list(policy.parameters())

    def loss():
        logp = model.sequence_logp(policy(ids), ids, mask)
        return dpo.dpo_loss(world.halves(logp, ref, mask), BETA).sum()

    with torch.no_grad():
        slopes = [world.slope(loss, p) for p in theta]
    logp_w, logp_l = model.sequence_logp(policy(ids), ids, mask).chunk(2)
    ref_w, ref_l = ref.chunk(2)
    rhat_w = BETA * (logp_w - ref_w).detach()
    rhat_l = BETA * (logp_l - ref_l).detach()
    weight = BETA / (1 + torch.exp(rhat_w - rhat_l))
    formula = torch.autograd.grad(-(weight * (logp_w - logp_l)).sum(), theta)
    world.agree(flatten(slopes), flatten(formula),
                "Section 4: the slope of Eq. 7 is not -beta sigma(rhat_l - rhat_w) "
                "[grad log pi(y_w) - grad log pi(y_l)]", 1e-6)


def test_the_gradient_by_hand_reaches_theta_through_the_logits():
    """Eq. 22: the gradient by hand in the logits, backpropagated through the GPT, is that of Eq. 7.

    The steps are `dpo_gradient`, then `dpo_gradient_logits`, then the GPT alone.
    """
    ids, mask, ref = world.three_pairs()
    policy = world.gpt(seed=10)
    theta = list(policy.parameters())
    logits = policy(ids)
    pair = world.halves(model.sequence_logp(logits, ids, mask), ref, mask)
    autograd = torch.autograd.grad(dpo.dpo_loss(pair, BETA).sum(), theta, retain_graph=True)

    coefficient = torch.cat(dpo.dpo_gradient(pair, BETA)).detach()
    gradient_logits = dpo.dpo_gradient_logits(logits.detach(), ids, mask, coefficient)
    by_hand = torch.autograd.grad(logits, theta, gradient_logits)
    world.agree(flatten(by_hand), flatten(autograd),
                "Eq. 22: the gradient by hand, carried into theta, is not that of Eq. 7")


def test_the_reference_receives_no_gradient():
    """Eq. 7: pi_ref is a constant, even where it is the same network as pi.

    Then only the two terms log pi(y_w) and log pi(y_l) have a gradient, times -+ beta / 2. With a
    gradient through pi_ref the sum would be 0.
    """
    ids, mask, _ = world.three_pairs()
    policy = world.gpt(seed=10)
    theta = list(policy.parameters())

    def response_logp(ids, mask):
        return model.response_token_logp(policy, ids, mask).sum(1)

    ref = model.map_batches(response_logp, ids, mask, batch=4)
    logp = model.sequence_logp(policy(ids), ids, mask)
    loss = dpo.dpo_loss(world.halves(logp, ref, mask), BETA).sum()
    actual = torch.autograd.grad(loss, theta, retain_graph=True)
    logp_w, logp_l = logp.chunk(2)
    expected = torch.autograd.grad(BETA / 2 * (logp_l - logp_w).sum(), theta)
    world.agree(flatten(actual), flatten(expected),
                "Eq. 7: pi_ref received a gradient; is the reference computed without no_grad?")


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
