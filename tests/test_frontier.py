"""The exact frontier: the most reward at each KL that any policy can have (Eq. 4 over beta), and that nothing lies above it."""
import itertools
import math

import torch

import dpo
import world

TOTAL = 240                                    # responses of pi_ref for each prompt: a perfect sample of world.counted
BETAS = torch.logspace(2, -1.5, 61).double()


def setting():
    """r (X, N), pi_ref (X, N), and the rewards of a perfect sample of pi_ref (X, TOTAL)."""
    r, (ref, count) = world.rewards(seed=1), world.counted(2, TOTAL)
    return r, ref, torch.stack([row.repeat_interleave(n) for row, n in zip(r, count)])


def policies(r, ref):
    """Policies of all kinds (many, X, N): random ones, and tilts of pi_ref by r at a price of their own for each prompt."""
    random = world.tabular(world.normal(200, world.X, world.N, seed=3, scale=torch.linspace(.1, 6, 200)[:, None, None]))
    price = world.normal(300, world.X, 1, seed=4).exp()
    return torch.cat([random, dpo.optimal_policy(ref, r / price, .7), dpo.optimal_policy(ref, r / price[:, :1], .7)])


def test_the_frontier_is_equation_4_at_each_beta_averaged_over_prompts():
    """Eq. 4: from rewards of samples alone, `kl` and `reward` are the mean KL(pi* || pi_ref) and E_pi*[r] of the listed pi*."""
    r, ref, samples = setting()
    curve, expected = dpo.optimal_frontier(samples, BETAS), []
    for beta in BETAS.tolist():
        weight = [[math.exp(q + s / beta) for q, s in zip(*rows)] for rows in zip(ref.tolist(), r.tolist())]
        star = torch.tensor([[w / sum(row) for w in row] for row in weight], dtype=torch.float64).log()
        expected.append([beta, world.kl(star, ref).mean(), world.expectation(star, r).mean()])
    world.agree(torch.tensor([curve["beta"], curve["kl"], curve["reward"]]).double().T, torch.tensor(expected).double(),
                "Eq. 4: (beta, kl, reward) of the frontier are those of pi* at one common beta, averaged over prompts", 1e-6)


def test_the_frontiers_height_is_the_least_of_its_tangents():
    """F(k) = min over beta of beta (k + mean_x log Z_beta(x)), by a loop over beta; returned with the beta that attains it."""
    _, _, samples = setting()
    curve = dpo.optimal_frontier(samples, BETAS)
    for k in (0., .31, 1.7, 4.4):
        tangent = [(b * (k + sum(math.log(sum(math.exp(s / b) for s in row) / TOTAL) for row in samples.tolist()) / world.X), b)
                   for b in BETAS.tolist()]
        world.agree(torch.tensor(dpo.optimal_reward(k, curve)[:2]).double(), torch.tensor(min(tangent)).double(),
                    f"F({k}) = min over beta of beta (k + mean log Z): the mean is over prompts, log Z over samples", 1e-6)


def test_on_the_curve_the_height_is_the_reward_of_the_optimal_policy():
    """At KL(pi*_beta || pi_ref) the frontier's height is E_pi*[r], attained at that beta, with its standard error."""
    _, _, samples = setting()
    curve = dpo.optimal_frontier(samples, BETAS)
    got = [dpo.optimal_reward(k, curve) for k in curve["kl"]]
    world.agree(torch.tensor(got).double(), torch.tensor([curve["reward"], curve["beta"], curve["se"]]).double().T,
                "F(KL_beta) = E_pi*[r]: a tangent touches the curve at its own point, and is beyond it elsewhere")


def test_no_policy_lies_above_the_frontier():
    """Eq. 14: E_pi[r] <= F(mean KL(pi || pi_ref)) for every policy, also those that pay another price at each prompt."""
    r, ref, samples = setting()
    curve = dpo.optimal_frontier(samples, BETAS)
    excess = [world.expectation(logp, r).mean().item() - dpo.optimal_reward(world.kl(logp, ref).mean().item(), curve)[0]
              for logp in policies(r, ref)]
    assert max(excess) < 1e-9, f"Eq. 14: a policy lies {max(excess):.3g} above F at its KL, which no policy can"


def test_the_frontier_is_attained():
    """At any KL k, with beta found by bisection so that KL(pi*_beta || pi_ref) = k, E_pi*[r] = F(k): F is no loose bound."""
    r, ref, samples = setting()
    curve = dpo.optimal_frontier(samples, torch.logspace(2, -1.5, 400).double())
    for k in (.1, .55, 1.3, 2.6):
        low, high = 1e-2, 1e2
        for _ in range(60):
            beta = math.sqrt(low * high)
            star = dpo.optimal_policy(ref, r, beta)
            low, high = (beta, high) if world.kl(star, ref).mean() > k else (low, beta)
        world.agree(torch.tensor(dpo.optimal_reward(k, curve)[0]).double(), world.expectation(star, r).mean(),
                    f"F({k}) is the reward of pi* at that KL; a height not from its tangents is too high or too low", 1e-4)


def test_the_gap_to_the_frontier_is_beta_times_the_kl_to_the_optimum():
    """Eq. 14: F(k) - E_pi[r] = beta(k) mean KL(pi || pi*_beta(k)), k the policy's own KL and beta(k) the slope of F there."""
    r, ref, samples = setting()
    curve, gap, expected = dpo.optimal_frontier(samples, BETAS), [], []
    for logp in policies(r, ref):
        height, beta, _ = dpo.optimal_reward(world.kl(logp, ref).mean().item(), curve)
        gap.append(height - world.expectation(logp, r).mean())
        expected.append(beta * world.kl(logp, dpo.optimal_policy(ref, r, beta)).mean())
    world.agree(torch.stack(gap), torch.stack(expected), "Eq. 14: the gap to the frontier is beta(k) KL(pi || pi*_beta(k))", 1e-8)


def test_the_slope_of_the_frontier_is_beta():
    """dF/dk = beta: on the frontier one more nat buys beta of reward, so the returned beta is the price there."""
    curve = dpo.optimal_frontier(setting()[2], torch.logspace(1, -1, 700).double())
    at = lambda k: dpo.optimal_reward(k, curve)
    k = torch.tensor([.2, .9, 2.1]).double()
    slope = torch.tensor([(at(x + .02)[0] - at(x - .02)[0]) / .04 for x in k.tolist()])
    world.agree(slope, torch.tensor([at(x)[1] for x in k.tolist()]), "dF/dk = beta(k), the price of a nat", 1e-2)


def test_one_common_price_beats_a_price_for_each_prompt():
    """The best mean reward at a mean KL needs one beta for all prompts: unequal prices at the same mean KL earn strictly less."""
    r, ref, samples = setting()
    curve = dpo.optimal_frontier(samples, torch.logspace(2, -1.5, 400).double())
    lost = []
    for betas in ((.2, 2.), (.4, .8), (3., .3)):
        star = dpo.optimal_policy(ref, r, torch.tensor(betas).double()[:, None])
        lost.append(dpo.optimal_reward(world.kl(star, ref).mean().item(), curve)[0] - world.expectation(star, r).mean().item())
    assert min(lost) > 1e-3, f"unequal prices lose {lost} to the frontier, not more than 0: are prompts averaged at one beta?"


def test_the_frontier_of_a_few_samples_is_biased_low():
    """E[F_N(k)] < E[F_N+1(k)] < F(k), by enumeration of all samples of N = 2 and 3 from three responses: shares err high."""
    reward, p, k, heights = [0., .4, 1.], [.5, .3, .2], .25, []
    for n in (2, 3):
        height = lambda rows: dpo.optimal_reward(k, dpo.optimal_frontier(torch.tensor([rows]), BETAS[::3]))[0]
        heights.append(sum(math.prod(p[i] for i in draw) * height([reward[i] for i in draw])
                           for draw in itertools.product(range(3), repeat=n)))
    perfect = torch.tensor([[0.] * 5 + [.4] * 3 + [1.] * 2])
    heights.append(dpo.optimal_reward(k, dpo.optimal_frontier(perfect, BETAS[::3]))[0])
    assert heights[0] + .01 < heights[1] < heights[2] - .01, \
        f"E[F_2], E[F_3], F at KL {k} are {heights}: an estimate from few samples is low, and rises with N"


def test_ess_is_the_tenth_percentile_over_prompts_of_the_effective_sample_size():
    """ess = (sum w)^2 / sum w^2 with w = exp(r / beta); of 11 prompts the 10th percentile is the second smallest."""
    reward, expected = world.normal(11, 37, seed=5, scale=torch.linspace(.2, 2, 11)[:, None]), []
    for beta in (3., .9, .4):
        w = [[math.exp(s / beta) for s in row] for row in reward.tolist()]
        expected.append(sorted(sum(row) ** 2 / sum(v * v for v in row) for row in w)[1])
    got = dpo.optimal_frontier(reward, torch.tensor([3., .9, .4]))["ess"]
    world.agree(torch.tensor(got).double(), torch.tensor(expected).double(),
                "ess = (sum w)^2 / sum w^2, its 10th percentile over prompts: few samples carry the curve where it is low", 1e-6)


def test_the_standard_error_is_the_scatter_of_the_height_over_fresh_samples():
    """se = the standard deviation, over fresh samples of pi_ref for the same prompts (400 sets here), of beta mean log Z_beta."""
    r, beta = world.rewards(seed=6, scale=.25), torch.tensor([.3])
    ref = world.tabular(world.normal(world.X, world.N, seed=7)).exp()
    drawn = torch.multinomial(ref, 400 * 60, replacement=True, generator=world.generator(8))
    sets = [dpo.optimal_frontier(rows, beta) for rows in r.gather(1, drawn).view(world.X, 400, 60).unbind(1)]
    height = torch.tensor([s["reward"][0] - s["beta"][0] * s["kl"][0] for s in sets])
    se = torch.tensor([s["se"][0] for s in sets]).mean()
    assert abs(se / height.std() - 1) < .15, f"the curve's standard error {se:.4f} is not the scatter {height.std():.4f} of " \
        "its height over fresh samples; beta, 1 / X or 1 / ess - 1 / N left out?"
