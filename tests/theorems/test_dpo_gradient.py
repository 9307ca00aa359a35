"""Section 4 and App. A.4: the gradient of Eq. 7 in log-probabilities, in logits, and in theta.

Shapes: B pairs, N listed responses, T tokens, V vocabulary; see world.py.
"""
import math

import torch

import dpo
import model
import world

BETA = .3


def flatten(gradients):
    """Join the gradients of all parameters of a model in one vector."""
    return torch.cat([g.flatten() for g in gradients])


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
