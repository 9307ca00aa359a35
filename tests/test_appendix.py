"""The appendix: Plackett-Luce (A.3), pairs as indices (B), the baselines (C.3); and what deterministic labels do to Eq. 7."""
import itertools
import math

import torch

import data
import dpo
import model
import world

BETA = .3


# ------------------------------------------------------------------------------------------------- A.3: Plackett-Luce
def test_the_optimal_policy_ranks_as_plackett_luce_does_on_the_true_reward():
    """Eq. 18-19: prod_k exp(r_k) / sum_{j >= k} exp(r_j) is exp(-loss) at pi*: Z cancels from each factor."""
    r, ref = world.rewards(seed=1)[0], world.table(world.gpt(seed=2), x=0).detach()
    ranked, loop = torch.randint(world.N, (7, 4), generator=world.generator(3)), []
    for row in r[ranked].tolist():
        loop.append(math.prod(math.exp(row[k]) / sum(math.exp(v) for v in row[k:]) for k in range(4)))
    loss = dpo.plackett_luce_loss(dpo.optimal_policy(ref, r, BETA)[ranked], ref[ranked], BETA)
    world.agree((-loss).exp(), torch.tensor(loop, dtype=torch.float64),
                "Eq. 18-19: a ranking's probability is a product of softmaxes over what is left, best first")


def test_the_probabilities_of_all_rankings_sum_to_1():
    """Eq. 18: a probability distribution over the 4! orders of K = 4 responses."""
    logp, ref = -world.normal(4, seed=4, scale=3.).abs(), -world.normal(4, seed=5, scale=3.).abs()
    orders = torch.tensor(list(itertools.permutations(range(4))))
    total = (-dpo.plackett_luce_loss(logp[orders], ref[orders], BETA)).exp().sum()
    world.agree(total, torch.tensor(1.).double(), "Eq. 18: the probabilities of all rankings sum to 1; is a factor wrong?")


def test_plackett_luce_of_two_is_dpo():
    """Eq. 20 with K = 2 is Eq. 7."""
    pair = world.random_pairs(7, seed=6)
    ranked = dpo.plackett_luce_loss(torch.stack(pair[:2], 1), torch.stack(pair[2:4], 1), BETA)
    world.agree(ranked, dpo.dpo_loss(pair, BETA), "Eq. 20 with K = 2 is Eq. 7: is the order best first in both?")


def test_who_is_ahead_of_whom_in_a_ranking_is_bradley_terry():
    """Eq. 18 -> Eq. 1: the rankings of K = 4 that put y_1 ahead of y_2 have a total probability of sigma(rhat_1 - rhat_2)."""
    logp, ref = -world.normal(4, seed=4, scale=3.).abs(), -world.normal(4, seed=5, scale=3.).abs()
    orders = torch.tensor([o for o in itertools.permutations(range(4)) if o.index(1) < o.index(2)])
    ahead = (-dpo.plackett_luce_loss(logp[orders], ref[orders], BETA)).exp().sum()
    rhat = BETA * (logp - ref)
    world.agree(ahead, data.bradley_terry(rhat[1], rhat[2]), "Eq. 18 -> Eq. 1: Plackett-Luce seen on a pair is Bradley-Terry")


def test_the_plackett_luce_gradient_is_the_chances_it_had_less_the_choice_it_got():
    """Eq. 20 by hand: dL/dlog pi(y_m) = beta (sum_{k <= m} exp(rhat_m) / sum_{j >= k} exp(rhat_j) - 1)."""
    logp, ref = (-world.normal(7, 4, seed=s, scale=3.).abs() for s in (7, 8))
    gradient, = torch.autograd.grad(dpo.plackett_luce_loss(logp.requires_grad_(), ref, BETA).sum(), logp)
    e = (BETA * (logp.detach() - ref)).exp().tolist()
    loop = [[BETA * (sum(row[m] / sum(row[k:]) for k in range(m + 1)) - 1) for m in range(4)] for row in e]
    world.agree(gradient, torch.tensor(loop, dtype=torch.float64),
                "Eq. 20: dL/dlog pi(y_m) = beta (sum of its chances at the choices k <= m, less 1)")


def test_minimising_plackett_luce_over_all_policies_gives_equation_4():
    """Eq. 20 -> Eq. 4: with rankings drawn by Eq. 18 at r / tau, the minimiser is pi_ref exp(r / (tau beta)) / Z."""
    tau, r, ref = .7, world.rewards(seed=1)[0, :7], world.tabular(world.normal(7, seed=9))
    orders = torch.tensor(list(itertools.permutations(range(7), 3)))
    e = (r / tau).exp()[orders]
    probability = e[:, 0] / e.sum(1) * e[:, 1] / e[:, 1:].sum(1)
    theta = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    world.minimise(lambda: (probability * dpo.plackett_luce_loss(world.tabular(theta)[orders], ref[orders], BETA)).sum(), [theta])
    distance = world.total_variation(world.tabular(theta), dpo.optimal_policy(ref, r, tau * BETA))
    assert distance < 1e-6, f"Eq. 20 -> Eq. 4: the minimiser of Eq. 20 is {distance:.2g} from pi* in total variation"


# --------------------------------------------------------------------------------------------------- B: pairs as indices
def four_completions():
    """Four responses of unequal lengths to one prompt, padded together: ids, mask (4, T), and their six pairs (6,), (6,)."""
    ids, mask = (rows[[0, 3, 12, 60]] for rows in world.listed(x=1))
    return ids, mask, torch.tensor([2, 0, 0, 1, 3, 3]), torch.tensor([0, 1, 3, 2, 1, 2])


def test_six_pairs_by_index_equal_twelve_separate_forwards():
    """App. B: `make_pairs` of four completions in one batch holds what each response gives alone, unpadded, in a batch of one."""
    ids, mask, winner, loser = four_completions()
    pi, pi_ref = world.gpt(seed=10), world.gpt(seed=11)
    together = [model.sequence_logp(gpt(ids), ids, mask).detach() for gpt in (pi, pi_ref)]
    pair, alone = dpo.make_pairs(*together, mask.sum(1), winner, loser), []
    for gpt, rows in ((pi, winner), (pi, loser), (pi_ref, winner), (pi_ref, loser)):
        for row in rows.tolist():
            text = ids[row, :int(mask[row].nonzero().max()) + 1]
            logp = torch.log_softmax(gpt(text[None])[0], -1)
            alone.append(sum(logp[t - 1, text[t]].item() for t in range(len(world.PROMPTS[1]), len(text))))
    world.agree(torch.cat(pair[:4]), torch.tensor(alone, dtype=torch.float64),
                "App. B: log pi(y|x) by index is not the response's own; are w and l, or pi and pi_ref, mixed up, filler scored?")


def test_pairs_by_index_carry_the_lengths_of_their_responses():
    """App. B: `len_w`, `len_l` count the response tokens of y_w and y_l, the end token included."""
    _, mask, winner, loser = four_completions()
    pair = dpo.make_pairs(torch.zeros(4), torch.zeros(4), mask.sum(1), winner, loser)
    lengths = [len(world.RESPONSES[i]) for i in (0, 3, 12, 60)]
    world.agree(torch.stack([pair.len_w, pair.len_l], 1), torch.tensor([[lengths[w], lengths[l]] for w, l in zip(winner, loser)]),
                "App. B: len_w and len_l are the lengths of the winner and the loser; swapped?")


def test_six_pairs_by_index_have_the_gradient_of_twelve_separate_forwards():
    """App. B: one forward for four completions gives the gradient of Eq. 7 in theta that six separate pairs add up to."""
    ids, mask, winner, loser = four_completions()
    policy, ref = world.gpt(seed=10), world.table(world.gpt(seed=11), x=1).detach()[[0, 3, 12, 60]]
    pair = dpo.make_pairs(model.sequence_logp(policy(ids), ids, mask), ref, mask.sum(1), winner, loser)
    together = torch.autograd.grad(dpo.dpo_loss(pair, BETA).sum(), list(policy.parameters()))
    alone = [torch.zeros_like(p) for p in policy.parameters()]
    for w, l in zip(winner.tolist(), loser.tolist()):
        logp_w, logp_l = (model.sequence_logp(policy(ids[[i]]), ids[[i]], mask[[i]]) for i in (w, l))
        loss = torch.log1p(torch.exp(-BETA * ((logp_w - ref[w]) - (logp_l - ref[l])))).sum()
        alone = [a + g for a, g in zip(alone, torch.autograd.grad(loss, list(policy.parameters())))]
    world.agree(torch.cat([g.flatten() for g in together]), torch.cat([g.flatten() for g in alone]),
                "App. B: the gradient through indexed pairs is not the sum over separate pairs of that of Eq. 7")


# ------------------------------------------------------------------------------------------------ C.3, and Section 6
def test_unlikelihood_raises_the_winner_and_lowers_the_loser_at_constant_rates():
    """App. C.3: L = -[log pi(y_w) - alpha log pi(y_l)], so dL/dlog pi(y_w) = -1 and dL/dlog pi(y_l) = +alpha, whatever pi is."""
    alpha, pair = .4, world.random_pairs(7, seed=6)
    slopes = [world.slope(lambda: dpo.unlikelihood_loss(pair, alpha).sum(), x) for x in pair[:4]]
    expected = torch.tensor([[-1.], [alpha], [0.], [0.]], dtype=torch.float64).expand(4, 7)
    world.agree(torch.stack(slopes), expected,
                "App. C.3: the slopes of -[log pi_w - alpha log pi_l] are -1, alpha and, for pi_ref, 0", 1e-8)


def test_unlikelihood_is_unbounded_below():
    """App. C.3: along log pi(y_l) -> -inf the loss falls without end, at the same rate: it has no minimum to converge to."""
    alpha, pair = .4, world.random_pairs(7, seed=6)
    losses = [dpo.unlikelihood_loss(pair._replace(logp_l=pair.logp_l - fall), alpha) for fall in (0., 10., 1e3, 1e6)]
    world.agree(torch.stack(losses), -pair.logp_w + alpha * (pair.logp_l - torch.tensor([[0.], [10.], [1e3], [1e6]])),
                "App. C.3: -[log pi_w - alpha log pi_l] falls by alpha for each nat that y_l loses, for ever")


def test_preferred_ft_sees_the_winner_alone():
    """Section 6: L = -log pi(y_w): slope -1 in log pi(y_w), 0 in all else, at any beta."""
    pair = world.random_pairs(7, seed=6)
    both = lambda: (dpo.preferred_ft_loss(pair, 5.) + dpo.preferred_ft_loss(pair, .1)).sum() / 2
    slopes = [world.slope(both, x) for x in pair[:4]]
    world.agree(torch.stack(slopes), torch.tensor([[-1.], [0.], [0.], [0.]], dtype=torch.float64).expand(4, 7),
                "Section 6, Preferred-FT: L = -log pi(y_w), supervised learning; y_l, pi_ref and beta play no part", 1e-8)


def test_preferred_ft_learns_the_distribution_of_winners():
    """Section 6: the minimiser over all policies is how often each response wins, and not Eq. 4: there is no beta to choose."""
    r, ref, weight = world.rewards(seed=1)[0], world.tabular(world.normal(world.N, seed=9)), world.pair_weights(seed=12)
    preference = data.bradley_terry(r[:, None], r)
    theta = torch.zeros(world.N, dtype=torch.float64, requires_grad=True)
    world.minimise(lambda: world.population_loss(lambda pair: dpo.preferred_ft_loss(pair, BETA), world.tabular(theta), ref,
                                                 preference, weight), [theta])
    winners = (weight * preference).sum(1)
    distance = world.total_variation(world.tabular(theta), (winners / winners.sum()).log())
    assert distance < 1e-6, f"Section 6: Preferred-FT ends {distance:.2g} from the distribution of winners in total variation"


# ----------------------------------------------------------------------------------------- Section 6's deterministic labels
def ordered(r):
    """Every pair of responses to each prompt, the higher reward winning, as data.py labels them: flat indices."""
    return data.label_pairs(r, "deterministic", .7, world.generator(0))[:2]


def test_with_deterministic_labels_the_loss_falls_for_ever_along_the_true_reward():
    """Eq. 7: at rhat = s r the loss has no minimum in s with deterministic labels, but the margin runs to infinity."""
    r, ref, scales = world.rewards(seed=1), world.table(world.gpt(seed=2)).detach(), (1., 4., 16., 64., 1e3, 1e5, 1e7)
    winner, loser = ordered(r)
    tilted = [dpo.optimal_policy(ref, s * r, BETA).flatten() for s in scales]
    loss = torch.stack([dpo.dpo_loss(world.make_pair(logp, ref.flatten(), winner, loser), BETA).mean() for logp in tilted])
    assert (loss.diff() < 0).all() and loss[-1] < 1e-6, f"Eq. 7 with deterministic labels falls to 0 as rhat = s r grows, " \
        f"s = {scales}, but it was {loss.tolist()}: is y_w the response of higher reward?"


def test_with_bradley_terry_labels_the_loss_is_least_at_the_reward_over_tau():
    """Eq. 7 with labels of Eq. 1 at r / tau: at rhat = s r the loss is least at s = 1 / tau, a finite margin."""
    tau, r, ref = .7, world.rewards(seed=1)[0], world.table(world.gpt(seed=2), x=0).detach()
    preference, weight = data.bradley_terry(r[:, None] / tau, r / tau), world.pair_weights(seed=12)
    loss = lambda pair: dpo.dpo_loss(pair, BETA)
    at = lambda s: world.population_loss(loss, dpo.optimal_policy(ref, s * r, BETA), ref, preference, weight).item()
    s = torch.tensor(1 / tau, dtype=torch.float64)
    slope, curvature = (at(s + 1e-4) - at(s - 1e-4)) / 2e-4, (at(s + .1) + at(s - .1) - 2 * at(s)) / .01
    assert abs(slope) < 1e-7 and curvature > 1e-3, \
        f"Eq. 7 with Bradley-Terry labels is least at rhat = r / tau, but its slope is {slope:.2g}, its curvature {curvature:.2g}"


def test_with_deterministic_labels_training_on_raises_the_margin_and_the_kl():
    """Eq. 7: margin and KL(pi || pi_ref) grow with every doubling of the training: its length sets the KL, not beta."""
    r, ref = world.rewards(seed=1), world.table(world.gpt(seed=2)).detach()
    (winner, loser), theta, rows, step = ordered(r), ref.clone().requires_grad_(), [], 0
    for stop in (50, 100, 200, 400):
        for _ in range(step, stop):
            pair = world.make_pair(world.tabular(theta).flatten(), ref.flatten(), winner, loser)
            theta.data -= 60 * torch.autograd.grad(dpo.dpo_loss(pair, BETA).mean(), theta)[0]
        step, logp = stop, world.tabular(theta.detach())
        margin = BETA * (pair.logp_w - pair.ref_w - pair.logp_l + pair.ref_l)
        rows.append([margin.mean().item(), world.kl(logp, ref).mean().item()])
    growth = torch.tensor(rows).diff(dim=0)
    assert (growth > .05).all(), \
        f"Eq. 7 with deterministic labels: (margin, KL) after 50, 100, 200, 400 steps must grow on and on, but are {rows}"


def test_with_deterministic_labels_beta_no_longer_selects_the_optimum():
    """Eq. 7: minimised at two betas, deterministic labels end at one and the same policy, where Eq. 4 has two far apart."""
    r, ref, betas = world.rewards(seed=1), world.tabular(world.normal(world.X, world.N, seed=9)), (.3, 1.7)
    (winner, loser), ends = ordered(r), []
    for beta in betas:
        theta = ref.clone().requires_grad_()
        pair = lambda: world.make_pair(world.tabular(theta).flatten(), ref.flatten(), winner, loser)
        world.minimise(lambda: dpo.dpo_loss(pair(), beta).mean(), [theta], steps=150)
        ends.append(world.tabular(theta.detach()))
    apart = world.total_variation(*ends).max()
    optima = world.total_variation(*(dpo.optimal_policy(ref, r, beta) for beta in betas)).min()
    assert apart < .01 and optima > .2, f"Eq. 7 with deterministic labels at beta {betas}: the ends are {apart:.3f} apart " \
        f"(should be one policy, all on the best response) and the optima of Eq. 4 {optima:.3f} (should be two)"


# --------------------------------------------------------------------------------------------------------------- numerics
def test_plackett_luce_is_right_at_enormous_log_ratios_in_float32():
    """Eq. 20 at log-ratios of -+1e4, float32: finite, and equal to the gaps of what is ranked wrongly."""
    logp = torch.tensor([[1e4, 0., -1e4], [-1e4, 0., 1e4]])
    loss = dpo.plackett_luce_loss(logp.requires_grad_(), torch.zeros(2, 3), BETA)
    gradient, = torch.autograd.grad(loss.sum(), logp)
    assert loss.dtype == torch.float32
    expected = torch.tensor([[0., 0, 0, 0], [3e4 * BETA, -BETA, -BETA, 2 * BETA]])
    world.agree(torch.cat([loss.detach()[:, None], gradient], 1), expected,
                "Eq. 20 in float32 at log-ratios -+1e4: sum in logarithms (logcumsumexp), never exp first", 1e-4)
