"""The optimal frontier: the highest reward at each KL that any policy can have (Eq. 4 over beta).

Letters: X prompts, N listed responses, S betas, F(k) the height of the frontier at a KL of k nats.
The frontier from samples of several policies is in test_optimum_of_a_mixture.py.
"""
import itertools
import math

import torch

import dpo
import world

TOTAL = 240    # samples of pi_ref for each prompt: a perfect sample of world.counted
BETAS = torch.logspace(2, -1.5, 61).double()
MANY_BETAS = torch.logspace(2, -1.5, 400).double()


def enumerable_task():
    """r (X, N), log pi_ref (X, N), and the rewards of a perfect sample of pi_ref (X, TOTAL)."""
    r = world.rewards(seed=1)
    ref, count = world.counted(2, TOTAL)
    samples = [row.repeat_interleave(n) for row, n in zip(r, count)]
    return r, ref, torch.stack(samples)


def many_policies(r, ref):
    """800 policies, log pi (800, X, N): random ones, and pi_ref tilted by r.

    The tilted ones have a price of their own at each prompt, or one price for both prompts.
    """
    scale = torch.linspace(.1, 6, 200)[:, None, None]
    random = world.tabular(world.normal(200, world.X, world.N, seed=3, scale=scale))
    price = world.normal(300, world.X, 1, seed=4).exp()
    tilted = dpo.optimal_policy(ref, r / price, .7)
    tilted_at_one_price = dpo.optimal_policy(ref, r / price[:, :1], .7)
    return torch.cat([random, tilted, tilted_at_one_price])


def mean_reward_and_kl(logp, r, ref):
    """E_pi[r] and KL(pi || pi_ref), nats, averaged over prompts: (X, N) each -> two numbers."""
    return world.expectation(logp, r).mean().item(), world.kl(logp, ref).mean().item()


def listed_optimum(r, ref, beta):
    """log pi* (X, N) of Eq. 4 by a loop over the listed responses."""
    rows = []
    for r_row, ref_row in zip(r.tolist(), ref.tolist()):
        weights = [math.exp(logp + reward / beta) for reward, logp in zip(r_row, ref_row)]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows, dtype=torch.float64).log()


def mean_log_z(samples, beta):
    """mean_x log Z_beta(x) by a loop over the samples of pi_ref, rewards (X, n)."""
    log_z = [math.log(sum(math.exp(reward / beta) for reward in row) / len(row))
             for row in samples.tolist()]
    return sum(log_z) / len(log_z)


def test_the_frontier_is_equation_4_at_each_beta_averaged_over_prompts():
    """Eq. 4: `kl` and `reward` are the mean KL(pi* || pi_ref) and E_pi*[r] of the listed pi*.

    `optimal_frontier` computes them from the rewards of samples alone.
    """
    r, ref, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, BETAS)
    expected = []
    for beta in BETAS.tolist():
        reward, kl = mean_reward_and_kl(listed_optimum(r, ref, beta), r, ref)
        expected.append([beta, kl, reward])
    world.agree(torch.tensor([curve["beta"], curve["kl"], curve["reward"]]).double().T,
                torch.tensor(expected).double(),
                "Eq. 4: (beta, kl, reward) of the frontier are those of pi* at one common beta, "
                "averaged over prompts", 1e-6)


def test_the_frontiers_height_is_the_least_of_its_tangents():
    """F(k) = min over beta of beta (k + mean_x log Z_beta(x)).

    It is returned with the beta that attains it. The expected values come from a loop over beta.
    """
    _, _, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, BETAS)
    for kl in (0., .31, 1.7, 4.4):
        height, slope, _ = dpo.optimal_reward(kl, curve)
        tangents = [(beta * (kl + mean_log_z(samples, beta)), beta) for beta in BETAS.tolist()]
        world.agree(torch.tensor([height, slope]).double(), torch.tensor(min(tangents)).double(),
                    f"F({kl}) = min over beta of beta (k + mean log Z): the mean is over prompts, "
                    "log Z over samples", 1e-6)


def test_on_the_curve_the_height_is_the_reward_of_the_optimal_policy():
    """At k = KL(pi*_beta || pi_ref), F(k) = E_pi*[r], attained at that beta, with its error."""
    _, _, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, BETAS)
    heights = [dpo.optimal_reward(kl, curve) for kl in curve["kl"]]
    expected = torch.tensor([curve["reward"], curve["beta"], curve["se"]]).double().T
    world.agree(torch.tensor(heights).double(), expected,
                "F(KL_beta) = E_pi*[r]: a tangent touches the curve at its own point, and is above "
                "it elsewhere")


def test_no_policy_lies_above_the_frontier():
    """Eq. 14: E_pi[r] <= F(mean KL(pi || pi_ref)) for every policy.

    This includes policies that pay a different price at each prompt.
    """
    r, ref, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, BETAS)
    excess = []
    for logp in many_policies(r, ref):
        reward, kl = mean_reward_and_kl(logp, r, ref)
        excess.append(reward - dpo.optimal_reward(kl, curve)[0])
    assert max(excess) < 1e-9, \
        f"Eq. 14: a policy lies {max(excess):.3g} above F at its KL, which no policy can"


def beta_at_kl(r, ref, kl):
    """The beta with mean KL(pi*_beta || pi_ref) = kl nats, by bisection."""
    low, high = 1e-2, 1e2
    for _ in range(60):
        beta = math.sqrt(low * high)
        if world.kl(dpo.optimal_policy(ref, r, beta), ref).mean() > kl:
            low = beta
        else:
            high = beta
    return beta


def test_the_frontier_is_attained():
    """F(k) = E_pi*[r] with the beta at which KL(pi*_beta || pi_ref) = k: F is not a loose bound."""
    r, ref, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, MANY_BETAS)
    for kl in (.1, .55, 1.3, 2.6):
        star = dpo.optimal_policy(ref, r, beta_at_kl(r, ref, kl))
        height, *_ = dpo.optimal_reward(kl, curve)
        world.agree(torch.tensor(height).double(), world.expectation(star, r).mean(),
                    f"F({kl}) is the reward of pi* at that KL; is the height not from tangents?",
                    1e-4)


def test_the_gap_to_the_frontier_is_beta_times_the_kl_to_the_optimum():
    """Eq. 14: F(k) - E_pi[r] = beta(k) mean KL(pi || pi*_beta(k)).

    k is the policy's own KL and beta(k) the slope of F there.
    """
    r, ref, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, BETAS)
    gaps, expected = [], []
    for logp in many_policies(r, ref):
        reward, kl = mean_reward_and_kl(logp, r, ref)
        height, beta, _ = dpo.optimal_reward(kl, curve)
        gaps.append(height - reward)
        star = dpo.optimal_policy(ref, r, beta)
        expected.append(beta * world.kl(logp, star).mean())
    world.agree(torch.tensor(gaps, dtype=torch.float64), torch.stack(expected),
                "Eq. 14: the gap to the frontier is beta(k) KL(pi || pi*_beta(k))", 1e-8)


def test_the_gap_at_each_prompt_is_beta_times_its_kl_to_the_optimum():
    """Eq. 14 prompt by prompt: beta (log Z(x) + KL(pi || pi_ref)) - E_pi[r] = beta KL(pi || pi*).

    The listed responses are the samples; N pi_ref(y|x) is the weight of each. At the slope of the
    frontier at the mean KL, the mean gap is F(KL) - E_pi[r].
    """
    r, ref, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, BETAS)
    log_weight = ref + math.log(world.N)
    for logp in many_policies(r, ref)[::40]:
        reward, kl = world.expectation(logp, r), world.kl(logp, ref)
        height, beta, _ = dpo.optimal_reward(kl.mean().item(), curve)
        gap = dpo.gap_to_optimum(reward, kl, log_weight, r, beta)
        world.agree(gap, beta * world.kl(logp, listed_optimum(r, ref, beta)),
                    "Eq. 14: the gap of a prompt is beta KL(pi || pi*); does Z lack the weights?",
                    1e-8)
        world.agree(gap.mean(), torch.tensor(height).double() - reward.mean(),
                    "the mean gap is F(KL) - E_pi[r]", 1e-6)


def test_the_slope_of_the_frontier_is_beta():
    """dF/dk = beta: on the frontier one more nat buys beta of reward; this beta is returned."""
    _, _, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, torch.logspace(1, -1, 700).double())
    slopes, betas = [], []
    for kl in (.2, .9, 2.1):
        above, *_ = dpo.optimal_reward(kl + .02, curve)
        below, *_ = dpo.optimal_reward(kl - .02, curve)
        slopes.append((above - below) / .04)
        betas.append(dpo.optimal_reward(kl, curve)[1])
    world.agree(torch.tensor(slopes), torch.tensor(betas), "dF/dk = beta(k), the price of a nat",
                1e-2)


def test_one_common_price_beats_a_price_for_each_prompt():
    """The highest mean reward at a mean KL needs one beta for all prompts.

    Unequal prices at the same mean KL earn strictly less.
    """
    r, ref, samples = enumerable_task()
    curve = dpo.optimal_frontier(samples, MANY_BETAS)
    losses = []
    for betas in ((.2, 2.), (.4, .8), (3., .3)):
        star = dpo.optimal_policy(ref, r, torch.tensor(betas).double()[:, None])
        reward, kl = mean_reward_and_kl(star, r, ref)
        losses.append(dpo.optimal_reward(kl, curve)[0] - reward)
    assert min(losses) > 1e-3, (f"unequal prices lose {losses} to the frontier, not more than 0: "
                                "is the mean over prompts at one beta?")


def test_the_frontier_of_a_few_samples_is_biased_low():
    """E[F_N(k)] < E[F_N+1(k)] < F(k), so shares of the optimal gain err on the high side.

    By enumeration of all samples of N = 2 and 3 responses, from three responses.
    """
    rewards, probability, kl = [0., .4, 1.], [.5, .3, .2], .25

    def height(sample):
        curve = dpo.optimal_frontier(torch.tensor([sample]), BETAS[::3])
        return dpo.optimal_reward(kl, curve)[0]

    heights = []
    for n in (2, 3):
        mean = 0.
        for indices in itertools.product(range(3), repeat=n):
            chance = math.prod(probability[i] for i in indices)
            mean += chance * height([rewards[i] for i in indices])
        heights.append(mean)
    heights.append(height([0.] * 5 + [.4] * 3 + [1.] * 2))    # a perfect sample
    assert heights[0] + .01 < heights[1] < heights[2] - .01, (
        f"E[F_2], E[F_3], F at KL {kl} are {heights}: an estimate from few samples is low and "
        "rises with N")


def effective_sample_size(rewards, beta):
    """(sum w)^2 / sum w^2 with w = exp(r / beta), by a loop over the rewards of one prompt."""
    weights = [math.exp(reward / beta) for reward in rewards]
    return sum(weights) ** 2 / sum(weight * weight for weight in weights)


def test_ess_is_the_tenth_percentile_over_prompts_of_the_effective_sample_size():
    """ess is the 10th percentile over prompts: of 11 prompts, the second smallest."""
    betas = [3., .9, .4]
    scale = torch.linspace(.2, 2, 11)[:, None]
    reward = world.normal(11, 37, seed=5, scale=scale)                          # (X, n)
    expected = []
    for beta in betas:
        sizes = sorted(effective_sample_size(row, beta) for row in reward.tolist())
        expected.append(sizes[1])
    ess = dpo.optimal_frontier(reward, torch.tensor(betas))["ess"]
    world.agree(torch.tensor(ess).double(), torch.tensor(expected).double(),
                "ess = (sum w)^2 / sum w^2, its 10th percentile over prompts: the curve rests on "
                "few samples where it is low", 1e-6)


def test_the_standard_error_is_the_scatter_of_the_height_over_fresh_samples():
    """se is the standard deviation of beta mean log Z_beta over fresh samples of pi_ref.

    The prompts stay the same; 400 sets of 60 samples a prompt are drawn.
    """
    sets, n = 400, 60
    r, beta = world.rewards(seed=6, scale=.25), torch.tensor([.3])
    probability = world.tabular(world.normal(world.X, world.N, seed=7)).exp()
    indices = torch.multinomial(probability, sets * n, replacement=True,
                                generator=world.generator(8))
    samples = r.gather(1, indices).view(world.X, sets, n)
    curves = [dpo.optimal_frontier(reward, beta) for reward in samples.unbind(1)]
    heights = [curve["reward"][0] - curve["beta"][0] * curve["kl"][0] for curve in curves]
    scatter = torch.tensor(heights).std()
    se = torch.tensor([curve["se"][0] for curve in curves]).mean()
    assert abs(se / scatter - 1) < .15, (
        f"the curve's standard error {se:.4f} is not the scatter {scatter:.4f} of its height over "
        "fresh samples: is beta, 1 / X or 1 / ess - 1 / N left out?")
