"""Section 4, Direct Preference Optimization (and App. A.2, A.4): Eq. 6, Eq. 7, its minimiser, its gradient, its numerics."""
import decimal
import math

import torch

import data
import dpo
import model
import ppo
import world


# ---------------------------------------------------------------------------------------------------------- Eq. 6 and 7
def test_the_optimal_policy_prefers_as_bradley_terry_does_on_the_true_reward():
    """Eq. 6 (16-17): 1 / (1 + exp(beta log pi*_2/pi_ref_2 - beta log pi*_1/pi_ref_1)) = sigma(r_1 - r_2): Z cancels."""
    beta, r, ref = .3, world.rewards(seed=1)[1], world.table(world.gpt(seed=2), x=1).detach()
    i, j = torch.triu_indices(world.N, world.N, 1)
    pair = world.make_pair(dpo.optimal_policy(ref, r, beta), ref, i, j)
    world.agree((-dpo.dpo_loss(pair, beta)).exp(), data.bradley_terry(r[i], r[j]),
                "Eq. 6: at pi*, exp(-loss) of Eq. 7 = sigma(r_1 - r_2); is the reference left out, or beta on one side only?")


def test_dpo_is_the_reward_model_loss_of_the_implicit_reward():
    """Eq. 7 is Eq. 2 with rhat = beta log(pi / pi_ref) as the reward: your language model is secretly a reward model."""
    beta, pair = .3, world.random_pairs(7, seed=3)
    rhat_w = beta * (pair.logp_w - pair.ref_w)
    rhat_l = beta * (pair.logp_l - pair.ref_l)
    world.agree(dpo.dpo_loss(pair, beta), ppo.reward_model_loss(rhat_w, rhat_l),
                "Eq. 7 = Eq. 2 at rhat = beta log(pi / pi_ref): pair swapped, reference forgotten, or its sign flipped?")


def test_dpo_loss_agrees_with_extended_precision():
    """Eq. 7: L = log(1 + exp(-beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)])), to 1e-9 of itself."""
    beta, logps = .07, world.normal(4, 151, seed=4, scale=torch.logspace(-6, 3.4, 151, dtype=torch.float64))
    with decimal.localcontext(decimal.Context(prec=300)):
        w, l, ref_w, ref_l = ([decimal.Decimal(v) for v in row] for row in logps.tolist())
        u = [decimal.Decimal(beta) * ((a - c) - (b - d)) for a, b, c, d in zip(w, l, ref_w, ref_l)]
        exact = torch.tensor([float((1 + (-v).exp()).ln()) for v in u], dtype=torch.float64)
    loss = dpo.dpo_loss(dpo.Pair(*logps, world.LENGTHS[1], world.LENGTHS[2]), beta)
    error = ((loss - exact).abs() / exact).max()
    assert loss.dtype == torch.float64 and error < 1e-9, \
        f"Eq. 7: {error:.2g} off the formula in 300 digits; beta, a sign, log(sigmoid()) instead of logsigmoid, or float32?"


def test_minimising_dpo_over_all_policies_gives_equation_4():
    """Eq. 7 -> Eq. 4: with labels of Eq. 1 at r / tau, the minimiser over all policies is pi_ref exp(r / (tau beta)) / Z,

    whichever pairs are compared often: any distribution of pairs with full support gives the same policy.
    """
    beta, tau, r, ref = .4, .7, world.rewards(seed=1)[0], world.table(world.gpt(seed=2), x=0).detach()
    preference, distance = data.bradley_terry(r[:, None] / tau, r / tau), []
    for seed in (5, 6):
        theta, weight = torch.zeros(world.N, dtype=torch.float64, requires_grad=True), world.pair_weights(seed)
        world.minimise(lambda: world.population_loss(lambda pair: dpo.dpo_loss(pair, beta), world.tabular(theta), ref,
                                                     preference, weight), [theta])
        star = dpo.optimal_policy(ref, r, tau * beta)
        distance.append(world.total_variation(world.tabular(theta), star).item())
    assert max(distance) < 1e-6, f"Eq. 7 -> Eq. 4: minimisers of the DPO loss are {distance} from pi* in total variation " \
        "under two distributions of pairs; is the reference in the loss, is beta inside the sigmoid, is y_w the winner?"


def test_a_gpt_trained_with_dpo_on_all_pairs_arrives_at_equation_4():
    """Eq. 7 -> Eq. 4 with a neural policy, started at pi_ref as DPO is."""
    beta, tau, r, start = 1.6, .7, world.rewards(seed=2)[0], dict(layers=2, heads=4, width=16)
    ref, policy, weight = world.table(world.gpt(1, **start), x=0).detach(), world.gpt(1, **start), world.pair_weights(seed=3)
    preference = data.bradley_terry(r[:, None] / tau, r / tau)
    world.minimise(lambda: world.population_loss(lambda pair: dpo.dpo_loss(pair, beta), world.table(policy, x=0), ref,
                                                 preference, weight), policy.parameters(), steps=150)
    distance = world.total_variation(world.table(policy, x=0), dpo.optimal_policy(ref, r, tau * beta))
    assert distance < 1e-2, f"Eq. 7 -> Eq. 4: the GPT trained with DPO is {distance:.3f} from pi* in total variation; " \
        "is log pi(y|x) the sum over exactly the response's tokens?"


def test_the_gradient_of_dpo_vanishes_at_equation_4():
    """Eq. 7 -> Eq. 4: at pi* the expected push on every response is 0: wins and losses balance, response by response."""
    beta, tau, r, ref = .4, .7, world.rewards(seed=1)[0], world.table(world.gpt(seed=2), x=0).detach()
    i, j = torch.ones(world.N, world.N).fill_diagonal_(0).nonzero().T
    often = world.pair_weights(seed=5)[i, j] * data.bradley_terry(r[i] / tau, r[j] / tau)    # of y_i beating y_j
    star = dpo.optimal_policy(ref, r, tau * beta)
    on_w, on_l = dpo.dpo_gradient(world.make_pair(star, ref, i, j), beta)
    push = torch.zeros(world.N, dtype=torch.float64).index_add(0, i, often * on_w).index_add(0, j, often * on_l)
    largest = (often * on_w).abs().max()
    assert largest > 0 and push.abs().max() < 1e-9 * largest, \
        f"Eq. 7: at pi* some response is pushed by {push.abs().max():.2g} on average; weight sigma(rhat_l - rhat_w) wrong?"


def test_at_the_reference_the_loss_is_log_2_but_the_gradient_is_not_0():
    """Eq. 7 at pi = pi_ref: rhat = 0, L = log 2, and yet dL/dlog pi(y_w) = -beta / 2: "stuck at .6931" is no fixed point."""
    beta, pair = .3, world.random_pairs(7, seed=3)
    pair = pair._replace(ref_w=pair.logp_w, ref_l=pair.logp_l)
    got = torch.stack([dpo.dpo_loss(pair, beta), *dpo.dpo_gradient(pair, beta)])
    world.agree(got, torch.tensor([[math.log(2)], [-beta / 2], [beta / 2]], dtype=torch.float64).expand(3, 7),
                "Eq. 7 at pi = pi_ref: loss log 2, gradient -+ beta / 2; is the reference subtracted?")


# ------------------------------------------------------------------------------------ the gradient: in log-probabilities
def test_the_gradient_in_log_probabilities_is_the_slope_of_the_loss():
    """Section 4: dL/dlog pi(y_w) and dL/dlog pi(y_l) of `dpo_gradient` are the finite differences of Eq. 7."""
    beta, pair = .3, world.random_pairs(7, seed=3)
    slopes = [world.slope(lambda: dpo.dpo_loss(pair, beta).sum(), x) for x in (pair.logp_w, pair.logp_l)]
    world.agree(torch.stack(dpo.dpo_gradient(pair, beta)), torch.stack(slopes),
                "Section 4: `dpo_gradient` is not the slope of Eq. 7, which pushes y_w up and y_l down by beta sigma(.)", 1e-8)


def test_the_gradient_is_weighed_by_how_wrongly_the_implicit_reward_ranks():
    """Section 4: dL/dlog pi(y_w) = -beta sigma(rhat_l - rhat_w), the opposite for y_l; both against a loop."""
    beta, pair, loop = .3, world.random_pairs(7, seed=3), []
    for w, l, ref_w, ref_l in zip(*(x.tolist() for x in pair[:4])):
        wrong = (math.exp(l) / math.exp(ref_l)) ** beta / ((math.exp(w) / math.exp(ref_w)) ** beta
                                                           + (math.exp(l) / math.exp(ref_l)) ** beta)
        loop.append([-beta * wrong, beta * wrong])
    world.agree(torch.stack(dpo.dpo_gradient(pair, beta), 1), torch.tensor(loop, dtype=torch.float64),
                "Section 4: weight beta sigma(rhat_l - rhat_w), large where y_l is ranked above y_w; sign of u, or beta?")


def test_the_derivative_of_minus_log_sigma_is_minus_sigma_of_the_opposite():
    """Eq. 21-22: with u = rhat_w - rhat_l, dL/du = -sigma'(u) / sigma(u) = -sigma(-u), so dL/dlog pi(y_w) = -beta sigma(-u)."""
    beta, pair = .3, world.random_pairs(7, seed=3)
    u = beta * (pair.logp_w - pair.logp_l - pair.ref_w + pair.ref_l)
    sigma = lambda z: 1 / (1 + torch.exp(-z))
    ratio = sigma(u) * (1 - sigma(u)) / sigma(u)
    world.agree(torch.stack(dpo.dpo_gradient(pair, beta)), beta * torch.stack([-ratio, ratio]),
                "Eq. 21-22: dL/dlog pi(y_w) = -beta sigma'(u) / sigma(u), u = rhat_w - rhat_l")


def test_autograd_agrees_with_the_gradient_by_hand_and_gives_the_lengths_none():
    """Section 4: backpropagation through Eq. 7 gives `dpo_gradient`; Eq. 7 has no lengths in it."""
    beta, pair = .3, world.random_pairs(7, seed=3)
    leaves = [x.clone().requires_grad_() for x in pair[:2]]
    loss = dpo.dpo_loss(dpo.Pair(*leaves, *pair[2:4], 3 * pair.len_w + 1, pair.len_l), beta)
    world.agree(torch.stack(torch.autograd.grad(loss.sum(), leaves)), torch.stack(dpo.dpo_gradient(pair, beta)),
                "Section 4: autograd through `dpo_loss` (Eq. 7) and `dpo_gradient` differ; or the loss was divided by lengths")


# ------------------------------------------------------------------------------------------------ the gradient: in logits
def test_with_constant_weight_every_pair_is_pushed_as_dpo_pushes_at_the_reference():
    """Section 4: the ablation's gradient is that of Eq. 7 where rhat_w = rhat_l, whatever the policy ranks by now."""
    beta, pair = .3, world.random_pairs(7, seed=3)
    start = pair._replace(logp_w=pair.ref_w, logp_l=pair.ref_l)
    slopes = [world.slope(lambda: dpo.constant_weight_loss(pair, beta).sum(), x) for x in (pair.logp_w, pair.logp_l)]
    world.agree(torch.stack(slopes), torch.stack(dpo.dpo_gradient(start, beta)),
                "Section 4, constant weight: -beta/2 for y_w and beta/2 for y_l, at every pair", 1e-8)
    world.agree(dpo.constant_weight_loss(pair, beta), beta / 2 * dpo.unlikelihood_loss(pair, 1.), "it is Unlikelihood at alpha 1, times beta / 2")


def test_the_gradient_in_logits_is_one_hot_minus_softmax_at_the_position_before():
    """Section 4: d log pi(y|x) / d logits[t-1, v] = [v = ids[t]] - pi(v | ids[<t]) for response tokens t, 0 elsewhere: a loop."""
    (ids, mask, _), c = world.three_pairs(), world.normal(6, seed=8)
    logits, loop = world.normal(6, world.T, world.V, seed=9, scale=2.), torch.zeros(6, world.T, world.V, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        z = [math.exp(v) for v in logits[b, t - 1].tolist()]
        for v in range(world.V):
            loop[b, t - 1, v] = c[b] * (float(v == ids[b, t]) - z[v] / sum(z))
    world.agree(dpo.dpo_gradient_logits(logits, ids, mask, c), loop,
                "Section 4, in logits: coefficient ([v = ids[t]] - softmax(logits[t-1])[v]) at t-1; shift, sign or mask?")


def test_the_gradient_in_logits_is_the_slope_of_the_loss():
    """Section 4: `dpo_gradient` carried by `dpo_gradient_logits` is the finite difference of Eq. 7 in every logit."""
    (ids, mask, ref), beta = world.three_pairs(), .3
    logits = world.normal(6, world.T, world.V, seed=9, scale=2.)
    pair = lambda: world.halves(model.sequence_logp(logits, ids, mask), ref, mask)
    slope = world.slope(lambda: dpo.dpo_loss(pair(), beta).sum(), logits)
    by_hand = dpo.dpo_gradient_logits(logits, ids, mask, torch.cat(dpo.dpo_gradient(pair(), beta)))
    world.agree(by_hand, slope, "Section 4, in logits: by hand and by finite differences of Eq. 7 differ; a label shift, "
                "a mask that counts prompt or filler, or a softmax over the wrong axis", 1e-8)


def test_masked_out_logits_and_ids_are_never_read():
    """Section 4: the gradient is 0 where no response token is predicted; NaN or an impossible id there changes nothing."""
    (ids, mask, _), c = world.three_pairs(), world.normal(6, seed=8)
    logits = world.normal(6, world.T, world.V, seed=9, scale=2.)
    clean = dpo.dpo_gradient_logits(logits, ids, mask, c)
    unread = ~torch.cat([mask[:, 1:], torch.zeros(6, 1, dtype=torch.bool)], 1)
    filled = logits.masked_fill(unread[..., None], torch.nan)
    dirty = dpo.dpo_gradient_logits(filled, ids.masked_fill(~mask, -10**6), mask, c)
    assert torch.equal(clean, dirty) and (dirty[unread] == 0).all(), \
        "Section 4, in logits: what stands outside the mask was read, or got a gradient (NaN times 0 is NaN, not 0)"


# ------------------------------------------------------------------------------------------------- the gradient: in theta
def test_section_4s_gradient_is_the_slope_of_the_loss_in_theta():
    """Section 4: grad L = -beta sigma(rhat_l - rhat_w) [grad log pi(y_w) - grad log pi(y_l)], by finite differences in theta."""
    (ids, mask, ref), beta, policy = world.three_pairs(), .3, world.gpt(seed=11, layers=1, heads=2, width=4)
    logp = lambda: model.sequence_logp(policy(ids), ids, mask)
    with torch.no_grad():
        slopes = [world.slope(lambda: dpo.dpo_loss(world.halves(logp(), ref, mask), beta).sum(), p) for p in policy.parameters()]
    now = logp()
    rhat = beta * (now.detach() - ref)
    weight = beta / (1 + torch.exp(rhat[:3] - rhat[3:]))
    formula = torch.autograd.grad(-(weight * (now[:3] - now[3:])).sum(), list(policy.parameters()))
    world.agree(torch.cat([g.flatten() for g in slopes]), torch.cat([g.flatten() for g in formula]),
                "Section 4: the slope of Eq. 7 is not -beta sigma(rhat_l - rhat_w) [grad log pi_w - grad log pi_l]", 1e-6)


def test_the_gradient_by_hand_reaches_theta_through_the_logits():
    """Eq. 22: `dpo_gradient`, then `dpo_gradient_logits`, then the network alone gives the gradient of Eq. 7 in theta."""
    (ids, mask, ref), beta, policy = world.three_pairs(), .3, world.gpt(seed=10)
    logits, theta = policy(ids), list(policy.parameters())
    pair = world.halves(model.sequence_logp(logits, ids, mask), ref, mask)
    autograd = torch.autograd.grad(dpo.dpo_loss(pair, beta).sum(), theta, retain_graph=True)
    coefficient = torch.cat(dpo.dpo_gradient(pair, beta)).detach()
    by_hand = torch.autograd.grad(logits, theta, dpo.dpo_gradient_logits(logits.detach(), ids, mask, coefficient))
    world.agree(torch.cat([g.flatten() for g in by_hand]), torch.cat([g.flatten() for g in autograd]),
                "Eq. 22: the gradient by hand, carried into theta, is not that of Eq. 7")


def test_the_reference_receives_no_gradient():
    """Eq. 7: pi_ref is a constant. Where it is the same network as pi, only the log pi terms move that: by -+ beta / 2, not 0."""
    (ids, mask, _), beta, policy = world.three_pairs(), .3, world.gpt(seed=10)
    ref = model.score_batches(lambda a, b: model.response_logp(policy, a, b).sum(1), ids, mask, batch=4)
    logp, theta = model.sequence_logp(policy(ids), ids, mask), list(policy.parameters())
    loss = dpo.dpo_loss(world.halves(logp, ref, mask), beta).sum()
    got = torch.autograd.grad(loss, theta, retain_graph=True)
    expected = torch.autograd.grad(beta / 2 * (logp[3:] - logp[:3]).sum(), theta)
    world.agree(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in expected]),
                "Eq. 7: pi_ref received a gradient: is the reference computed without no_grad, and so trained away from pi_ref?")


# --------------------------------------------------------------------------------------------------------------- numerics
def test_loss_and_gradient_are_right_at_enormous_log_ratios_in_float32():
    """Eq. 7 at log-ratios of -+ 1e4, float32: the loss is beta times the margin where wrong, 0 where right; never inf or nan."""
    beta, far = .3, torch.tensor([1e4, -1e4, 1e4, 0.])
    pair = dpo.Pair(far.clone().requires_grad_(), -far.requires_grad_(), *torch.zeros(2, 4), *torch.ones(2, 4))
    loss = dpo.dpo_loss(pair, beta)
    auto = torch.autograd.grad(loss.sum(), [pair.logp_w, far])
    got = torch.stack([loss, auto[0], -auto[1], *dpo.dpo_gradient(pair, beta)]).detach()
    expected = [[0, 2e4 * beta, 0, math.log(2)]] + 2 * [[0, -beta, 0, -beta / 2], [0, beta, 0, beta / 2]]
    assert got.dtype == torch.float32
    world.agree(got, torch.tensor(expected), "Eq. 7 in float32 at log-ratios -+1e4: use logsigmoid, never log(sigmoid())", 1e-6)


def test_losses_are_one_number_per_pair_and_keep_float64():
    """Each entry of a (B,) loss is the loss of that pair alone: no mean, no sum, no whitening over the batch."""
    pair, beta = world.random_pairs(7, seed=3), .3
    for loss in (dpo.dpo_loss, dpo.unlikelihood_loss, dpo.preferred_ft_loss,
                 lambda pair, beta: dpo.dpo_gradient(pair, beta)[0], lambda pair, beta: dpo.dpo_gradient(pair, beta)[1]):
        alone = torch.cat([loss(dpo.Pair(*(x[b:b + 1] for x in pair)), beta).flatten() for b in range(7)])
        assert alone.dtype == torch.float64, f"{loss.__name__} turned float64 into {alone.dtype}"
        world.agree(loss(pair, beta), alone, f"{loss.__name__} is not (B,), one number for each pair alone", 1e-15)
