"""The appendix: Plackett-Luce (A.3), pairs as indices (B), the baselines (C.3, Section 6).

The last part shows what deterministic labels (Section 6) do to Eq. 7.

Letters: B rankings or pairs, K ranked responses, X prompts, N listed responses, T tokens.
"""
import itertools
import math

import torch

import data
import dpo
import model
import world

BETA = .3


# ------------------------------------------------------------------------------- A.3: Plackett-Luce
def plackett_luce_probability(rewards):
    """Eq. 18: the probability of a ranking, from its K rewards, best first; a loop."""
    probability = 1.
    for k, reward in enumerate(rewards):
        probability *= math.exp(reward) / sum(math.exp(r) for r in rewards[k:])
    return probability


def log_probabilities(*shape, seed):
    """Log-probabilities of unrelated responses: numbers below 0, float64."""
    return -world.normal(*shape, seed=seed, scale=3.).abs()


def test_the_optimal_policy_ranks_as_plackett_luce_does_on_the_true_reward():
    """Eq. 18-19: at pi*, exp(-loss) = prod_k exp(r_k) / sum_{j >= k} exp(r_j).

    Z cancels from each factor.
    """
    r = world.rewards(seed=1)[0]                                                # (N,)
    ref = world.table(world.gpt(seed=2), x=0).detach()                          # (N,)
    ranked = torch.randint(world.N, (7, 4), generator=world.generator(3))       # (B, K)
    expected = [plackett_luce_probability(row) for row in r[ranked].tolist()]
    loss = dpo.plackett_luce_loss(dpo.optimal_policy(ref, r, BETA)[ranked], ref[ranked], BETA)
    world.agree((-loss).exp(), torch.tensor(expected, dtype=torch.float64),
                "Eq. 18-19: the probability of a ranking is a product of softmaxes over the "
                "remaining responses, best first")


def test_the_probabilities_of_all_rankings_sum_to_1():
    """Eq. 18 is a probability distribution over the 4! orders of K = 4 responses."""
    logp, ref = log_probabilities(4, seed=4), log_probabilities(4, seed=5)
    orders = torch.tensor(list(itertools.permutations(range(4))))               # (4!, K)
    loss = dpo.plackett_luce_loss(logp[orders], ref[orders], BETA)
    world.agree((-loss).exp().sum(), torch.tensor(1.).double(),
                "Eq. 18: the probabilities of all rankings sum to 1; is a factor wrong?")


def test_plackett_luce_of_two_is_dpo():
    """Eq. 20 with K = 2 is Eq. 7."""
    pair = world.random_pairs(7, seed=6)
    logp = torch.stack([pair.logp_w, pair.logp_l], 1)
    ref = torch.stack([pair.ref_w, pair.ref_l], 1)
    world.agree(dpo.plackett_luce_loss(logp, ref, BETA), dpo.dpo_loss(pair, BETA),
                "Eq. 20 with K = 2 is Eq. 7: is the order best first in both?")


def test_who_is_ahead_of_whom_in_a_ranking_is_bradley_terry():
    """Eq. 18 -> Eq. 1: y_1 is ahead of y_2 in a ranking with probability sigma(rhat_1 - rhat_2).

    This is the sum over the rankings of K = 4 responses in which y_1 is ahead of y_2.
    """
    logp, ref = log_probabilities(4, seed=4), log_probabilities(4, seed=5)
    orders = [order for order in itertools.permutations(range(4))
              if order.index(1) < order.index(2)]
    orders = torch.tensor(orders)
    loss = dpo.plackett_luce_loss(logp[orders], ref[orders], BETA)
    rhat = BETA * (logp - ref)
    world.agree((-loss).exp().sum(), data.bradley_terry(rhat[1], rhat[2]),
                "Eq. 18 -> Eq. 1: Plackett-Luce restricted to a pair is Bradley-Terry")


def test_the_plackett_luce_gradient_is_the_chances_it_had_less_the_choice_it_got():
    """Eq. 20: dL/dlog pi(y_m) = beta (sum_{k <= m} exp(rhat_m) / sum_{j >= k} exp(rhat_j) - 1).

    The sum is over the choices at which y_m was available; it was chosen once.
    """
    logp, ref = log_probabilities(7, 4, seed=7), log_probabilities(7, 4, seed=8)
    weights = (BETA * (logp - ref)).exp().tolist()                              # exp(rhat)
    loss = dpo.plackett_luce_loss(logp.requires_grad_(), ref, BETA)
    gradient, = torch.autograd.grad(loss.sum(), logp)
    expected = torch.zeros(7, 4, dtype=torch.float64)
    for b, row in enumerate(weights):
        for m in range(4):
            chances = sum(row[m] / sum(row[k:]) for k in range(m + 1))
            expected[b, m] = BETA * (chances - 1)
    world.agree(gradient, expected,
                "Eq. 20: dL/dlog pi(y_m) = beta (sum of its chances at the choices k <= m, less 1)")


def test_minimising_plackett_luce_over_all_policies_gives_equation_4():
    """Eq. 20 -> Eq. 4: the minimiser is pi_ref exp(r / (tau beta)) / Z.

    The rankings of 3 of 7 responses have their probabilities by Eq. 18 at rewards r / tau.
    """
    tau = .7
    r = world.rewards(seed=1)[0, :7]
    ref = world.tabular(world.normal(7, seed=9))
    orders = torch.tensor(list(itertools.permutations(range(7), 3)))            # (210, 3)
    weights = (r / tau).exp()[orders]
    probability = weights[:, 0] / weights.sum(1) * weights[:, 1] / weights[:, 1:].sum(1)
    theta = torch.zeros(7, dtype=torch.float64, requires_grad=True)

    def expected_loss():
        loss = dpo.plackett_luce_loss(world.tabular(theta)[orders], ref[orders], BETA)
        return (probability * loss).sum()

    world.minimise(expected_loss, [theta])
    optimum = dpo.optimal_policy(ref, r, tau * BETA)
    distance = world.total_variation(world.tabular(theta), optimum)
    assert distance < 1e-6, \
        f"Eq. 20 -> Eq. 4: the minimiser of Eq. 20 is {distance:.2g} from pi* in total variation"


# ------------------------------------------------------------------------------ B: pairs as indices
COMPLETIONS = [0, 3, 12, 60]    # four listed responses of unequal lengths, all to prompt 1


def four_completions():
    """Four completions of one prompt and their six pairs: ids, mask (4, T); winner, loser (6,)."""
    ids, mask = world.listed(x=1)
    winner = torch.tensor([2, 0, 0, 1, 3, 3])
    loser = torch.tensor([0, 1, 3, 2, 1, 2])
    return ids[COMPLETIONS], mask[COMPLETIONS], winner, loser


def unpadded_logp(policy, ids, mask):
    """log pi(y|x), nats, of one row (T,) without its filler: a loop over the response tokens."""
    positions = mask.nonzero().flatten().tolist()
    ids = ids[:positions[-1] + 1]
    logp = torch.log_softmax(policy(ids[None])[0], -1)                          # (T, V)
    return sum(logp[t - 1, ids[t]].item() for t in positions)


def test_six_pairs_by_index_equal_twelve_separate_forwards():
    """App. B: pairs of four completions in one batch have the log-probabilities of each alone.

    The expected values come from batches of one response, without filler.
    """
    ids, mask, winner, loser = four_completions()
    pi, pi_ref = world.gpt(seed=10), world.gpt(seed=11)
    logp = model.sequence_logp(pi(ids), ids, mask).detach()
    ref = model.sequence_logp(pi_ref(ids), ids, mask).detach()
    pair = dpo.make_pairs(logp, ref, mask.sum(1), winner, loser)
    expected = []
    for policy, rows in ((pi, winner), (pi, loser), (pi_ref, winner), (pi_ref, loser)):
        expected += [unpadded_logp(policy, ids[row], mask[row]) for row in rows]
    world.agree(torch.cat([pair.logp_w, pair.logp_l, pair.ref_w, pair.ref_l]),
                torch.tensor(expected, dtype=torch.float64),
                "App. B: log pi(y|x) by index is not the response's own; are w and l, or pi and "
                "pi_ref, mixed up? Is filler scored?")


def test_pairs_by_index_carry_the_lengths_of_their_responses():
    """App. B: len_w and len_l count the response tokens of y_w and y_l, the end token included."""
    _, mask, winner, loser = four_completions()
    pair = dpo.make_pairs(torch.zeros(4), torch.zeros(4), mask.sum(1), winner, loser)
    lengths = torch.tensor([len(world.RESPONSES[i]) for i in COMPLETIONS])
    world.agree(torch.stack([pair.len_w, pair.len_l]),
                torch.stack([lengths[winner], lengths[loser]]),
                "App. B: len_w and len_l are the lengths of the winner and the loser; swapped?")


def test_six_pairs_by_index_have_the_gradient_of_twelve_separate_forwards():
    """App. B: the gradient of Eq. 7 by one forward is the sum of those of six separate pairs."""
    ids, mask, winner, loser = four_completions()
    policy = world.gpt(seed=10)
    parameters = list(policy.parameters())
    ref = world.table(world.gpt(seed=11), x=1).detach()[COMPLETIONS]
    logp = model.sequence_logp(policy(ids), ids, mask)
    pair = dpo.make_pairs(logp, ref, mask.sum(1), winner, loser)
    gradient = torch.autograd.grad(dpo.dpo_loss(pair, BETA).sum(), parameters)
    expected = [torch.zeros_like(p) for p in parameters]
    for w, l in zip(winner.tolist(), loser.tolist()):
        logp_w = model.sequence_logp(policy(ids[[w]]), ids[[w]], mask[[w]])
        logp_l = model.sequence_logp(policy(ids[[l]]), ids[[l]], mask[[l]])
        u = BETA * ((logp_w - ref[w]) - (logp_l - ref[l]))
        loss = torch.log1p(torch.exp(-u)).sum()
        for total, g in zip(expected, torch.autograd.grad(loss, parameters)):
            total += g
    world.agree(torch.cat([g.flatten() for g in gradient]),
                torch.cat([g.flatten() for g in expected]),
                "App. B: the gradient through indexed pairs is not the sum of the gradients of "
                "Eq. 7 over separate pairs")


# ----------------------------------------------------------------- C.3 and Section 6: the baselines
def test_unlikelihood_raises_the_winner_and_lowers_the_loser_at_constant_rates():
    """App. C.3: L = -[log pi(y_w) - alpha log pi(y_l)] has constant slopes.

    dL/dlog pi(y_w) = -1 and dL/dlog pi(y_l) = alpha for every pi.
    """
    alpha = .4
    pair = world.random_pairs(7, seed=6)

    def total_loss():
        return dpo.unlikelihood_loss(pair, alpha).sum()

    slopes = [world.slope(total_loss, x) for x in pair[:4]]
    expected = torch.tensor([[-1.], [alpha], [0.], [0.]], dtype=torch.float64).expand(4, 7)
    world.agree(torch.stack(slopes), expected,
                "App. C.3: the slopes of -[log pi_w - alpha log pi_l] are -1, alpha and, for "
                "pi_ref, 0", 1e-8)


def test_unlikelihood_is_unbounded_below():
    """App. C.3: as log pi(y_l) -> -inf, the loss falls without end at a constant rate.

    So there is no minimum to converge to.
    """
    alpha = .4
    falls = torch.tensor([[0.], [10.], [1e3], [1e6]])                           # nats
    pair = world.random_pairs(7, seed=6)
    losses = [dpo.unlikelihood_loss(pair._replace(logp_l=pair.logp_l - fall), alpha)
              for fall in falls]
    world.agree(torch.stack(losses), -pair.logp_w + alpha * (pair.logp_l - falls),
                "App. C.3: -[log pi_w - alpha log pi_l] falls by alpha for each nat that y_l "
                "loses, without end")


def test_preferred_ft_sees_the_winner_alone():
    """Section 6: L = -log pi(y_w) has slope -1 in log pi(y_w) and 0 in all else, at any beta."""
    pair = world.random_pairs(7, seed=6)

    def mean_loss():
        return (dpo.preferred_ft_loss(pair, 5.) + dpo.preferred_ft_loss(pair, .1)).sum() / 2

    slopes = [world.slope(mean_loss, x) for x in pair[:4]]
    expected = torch.tensor([[-1.], [0.], [0.], [0.]], dtype=torch.float64).expand(4, 7)
    world.agree(torch.stack(slopes), expected,
                "Section 6, Preferred-FT: L = -log pi(y_w) is supervised learning; y_l, pi_ref and "
                "beta have no effect", 1e-8)


def test_preferred_ft_learns_the_distribution_of_winners():
    """Section 6: the minimiser over all policies is the frequency with which each response wins.

    It is not the optimum of Eq. 4, and it does not depend on beta.
    """
    r = world.rewards(seed=1)[0]
    ref = world.tabular(world.normal(world.N, seed=9))
    weight = world.pair_weights(seed=12)                                        # (N, N)
    preference = data.bradley_terry(r[:, None], r)                              # (N, N)
    theta = torch.zeros(world.N, dtype=torch.float64, requires_grad=True)

    def loss(pair):
        return dpo.preferred_ft_loss(pair, BETA)

    def expected_loss():
        return world.population_loss(loss, world.tabular(theta), ref, preference, weight)

    world.minimise(expected_loss, [theta])
    wins = (weight * preference).sum(1)
    distance = world.total_variation(world.tabular(theta), (wins / wins.sum()).log())
    assert distance < 1e-6, (f"Section 6: Preferred-FT ends {distance:.2g} from the distribution "
                             "of winners in total variation")


# ------------------------------------------------------------------ Section 6: deterministic labels
def deterministic_pairs(r):
    """All pairs of responses to each prompt; the higher reward wins, as in data.py.

    r (X, N) -> winner and loser, indices into the flat table (X * N,).
    """
    winner, loser = data.label_pairs(r, "deterministic", .7, world.generator(0))
    return winner, loser


def test_with_deterministic_labels_the_loss_falls_for_ever_along_the_true_reward():
    """Eq. 7 with deterministic labels has no minimum in s at rhat = s r: the margin diverges."""
    r, ref = world.rewards(seed=1), world.table(world.gpt(seed=2)).detach()
    winner, loser = deterministic_pairs(r)
    scales = 1., 4., 16., 64., 1e3, 1e5, 1e7
    losses = []
    for scale in scales:
        logp = dpo.optimal_policy(ref, scale * r, BETA).flatten()
        pair = world.make_pair(logp, ref.flatten(), winner, loser)
        losses.append(dpo.dpo_loss(pair, BETA).mean())
    losses = torch.stack(losses)
    assert (losses.diff() < 0).all() and losses[-1] < 1e-6, (
        f"Eq. 7 with deterministic labels falls to 0 as rhat = s r grows, s = {scales}, but it is "
        f"{losses.tolist()}: is y_w the response of higher reward?")


def test_with_bradley_terry_labels_the_loss_is_least_at_the_reward_over_tau():
    """Eq. 7 with labels of Eq. 1 at rewards r / tau: the minimum over rhat = s r is at s = 1 / tau.

    So the margin is finite.
    """
    tau = .7
    r, ref = world.rewards(seed=1)[0], world.table(world.gpt(seed=2), x=0).detach()
    preference = data.bradley_terry(r[:, None] / tau, r / tau)
    weight = world.pair_weights(seed=12)

    def loss(pair):
        return dpo.dpo_loss(pair, BETA)

    def expected_loss(scale):
        logp = dpo.optimal_policy(ref, scale * r, BETA)
        return world.population_loss(loss, logp, ref, preference, weight).item()

    s = 1 / tau
    slope = (expected_loss(s + 1e-4) - expected_loss(s - 1e-4)) / 2e-4
    curvature = (expected_loss(s + .1) + expected_loss(s - .1) - 2 * expected_loss(s)) / .01
    assert abs(slope) < 1e-7 and curvature > 1e-3, (
        "Eq. 7 with Bradley-Terry labels is least at rhat = r / tau, but its slope is "
        f"{slope:.2g} and its curvature {curvature:.2g}")


def test_with_deterministic_labels_training_on_raises_the_margin_and_the_kl():
    """Eq. 7: margin and KL(pi || pi_ref) grow each time that the training is doubled.

    So the length of the training sets the KL, not beta.
    """
    r, ref = world.rewards(seed=1), world.table(world.gpt(seed=2)).detach()
    winner, loser = deterministic_pairs(r)
    theta = ref.clone().requires_grad_()
    rows = []                                                                   # (margin, KL)
    for steps in (50, 50, 100, 200):                                # 50, 100, 200, 400 in all
        for _ in range(steps):
            logp = world.tabular(theta)
            pair = world.make_pair(logp.flatten(), ref.flatten(), winner, loser)
            gradient, = torch.autograd.grad(dpo.dpo_loss(pair, BETA).mean(), theta)
            theta.data -= 60 * gradient
        margin = BETA * ((pair.logp_w - pair.ref_w) - (pair.logp_l - pair.ref_l))
        kl = world.kl(world.tabular(theta.detach()), ref)
        rows.append([margin.mean().item(), kl.mean().item()])
    growth = torch.tensor(rows).diff(dim=0)
    assert (growth > .05).all(), (
        "Eq. 7 with deterministic labels: (margin, KL) must grow from 50 to 100, 200 and 400 "
        f"steps, but they are {rows}")


def minimise_dpo_loss(ref, winner, loser, beta):
    """Minimise Eq. 7 over tabular policies, from pi_ref: ref (X, N) -> log pi (X, N)."""
    theta = ref.clone().requires_grad_()

    def loss():
        logp = world.tabular(theta).flatten()
        pair = world.make_pair(logp, ref.flatten(), winner, loser)
        return dpo.dpo_loss(pair, beta).mean()

    world.minimise(loss, [theta], steps=150)
    return world.tabular(theta.detach())


def test_with_deterministic_labels_beta_no_longer_selects_the_optimum():
    """Eq. 7 with deterministic labels ends at one policy for two betas.

    The optima of Eq. 4 at these betas are far apart.
    """
    betas = .3, 1.7
    r, ref = world.rewards(seed=1), world.tabular(world.normal(world.X, world.N, seed=9))
    winner, loser = deterministic_pairs(r)
    policies = [minimise_dpo_loss(ref, winner, loser, beta) for beta in betas]
    optima = [dpo.optimal_policy(ref, r, beta) for beta in betas]
    trained_distance = world.total_variation(*policies).max()
    optimal_distance = world.total_variation(*optima).min()
    assert trained_distance < .01 and optimal_distance > .2, (
        f"Eq. 7 with deterministic labels at beta {betas}: the trained policies are "
        f"{trained_distance:.3f} apart (they should be one, all on the best response) and the "
        f"optima of Eq. 4 {optimal_distance:.3f} (they should be two)")


# ----------------------------------------------------------------------------------------- numerics
def test_plackett_luce_is_right_at_enormous_log_ratios_in_float32():
    """Eq. 20 in float32 at log-ratios of -+1e4 is finite.

    It equals the gaps between responses that are ranked wrongly.
    """
    logp = torch.tensor([[1e4, 0., -1e4], [-1e4, 0., 1e4]])
    loss = dpo.plackett_luce_loss(logp.requires_grad_(), torch.zeros(2, 3), BETA)
    gradient, = torch.autograd.grad(loss.sum(), logp)
    assert loss.dtype == torch.float32, f"the loss of float32 inputs has type {loss.dtype}"
    expected = torch.tensor([[0., 0, 0, 0], [3e4 * BETA, -BETA, -BETA, 2 * BETA]])
    world.agree(torch.cat([loss.detach()[:, None], gradient], 1), expected,
                "Eq. 20 in float32 at log-ratios -+1e4: sum in logarithms (logcumsumexp), never "
                "take exp before", 1e-4)
