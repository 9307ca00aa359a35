"""The optimal frontier: the highest reward at each KL that any policy can have (Eq. 4 over beta).

Letters: X prompts, N listed responses, S betas, F(k) the height of the frontier at a KL of k nats.
In the second half M policies, pi_ref among them, sample n responses each (a mixture).
"""
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import torch

import data
import dpo
import train
import world
from plots import frontier
from test_best_of_n import listed_index

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


# ------------------------------------------------- samples of several policies (sample_mixture)
def numbers(values):
    """A number, or lists of numbers, as a tensor in float64."""
    return torch.tensor(values, dtype=torch.float64)


def mixture_of_policies():
    """log pi (M, X, N) of pi_ref, of a policy near pi*, and of one that has nothing to do with r.

    With them, how often each response occurs in their perfect samples, (M, X, N).
    """
    r, ref, _ = enumerable_task()
    star = dpo.optimal_policy(ref, r, .4)
    policies = [world.counted(2, TOTAL), world.counted_near(star, 3, TOTAL),
                world.counted(4, TOTAL)]
    logps, counts = zip(*policies)
    return torch.stack(logps), torch.stack(counts)


def sample_of_mixture(r, log_weight, counts):
    """Rewards and log weights (X, M * TOTAL) of the perfect samples of M policies.

    r (X, N), log_weight (X, N), counts (M, X, N).
    """
    rewards, log_weights = [], []
    for x in range(world.X):
        total = counts[:, x].sum(0)                               # (N,) by all policies together
        rewards.append(r[x].repeat_interleave(total))
        log_weights.append(log_weight[x].repeat_interleave(total))
    return torch.stack(rewards), torch.stack(log_weights)


def listed_weights(ref, logps):
    """pi_ref(y|x) / (1/M sum_m pi_m(y|x)) by a loop: log pi_ref (X, N), (M, X, N) -> (X, N)."""
    rows = []
    for x in range(world.X):
        row = []
        for y in range(world.N):
            chances = [math.exp(logp[x, y]) for logp in logps]
            row.append(math.exp(ref[x, y]) / (sum(chances) / len(chances)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def test_the_weights_of_a_mixture_are_those_of_the_balance_heuristic():
    """w(y) = pi_ref(y|x) / (1/M sum_m pi_m(y|x)), also if pi_ref is none of the M policies."""
    _, ref, _ = enumerable_task()
    logps, _ = mixture_of_policies()
    for policies in (logps, logps[1:], logps[[0, 0, 1]]):
        world.agree(dpo.balance_heuristic(ref, policies), listed_weights(ref, policies).log(),
                    "the weight of a response is pi_ref over the mean probability of the policies "
                    "that sampled; is log M missing, or one of the policies?")


def test_a_mixture_never_biases_z():
    """Over the mixture, the expected weight is 1 and that of weight times exp(r / beta) is Z.

    It is exact for all policies that give each response some probability, by enumeration.
    """
    r, ref, _ = enumerable_task()
    gpts = torch.stack([world.table(world.gpt(seed=seed)).detach() for seed in (5, 6)])
    logps, _ = mixture_of_policies()
    for policies in (logps, gpts, torch.cat([gpts, ref[None]])):
        mixture = policies.exp().mean(0)                                        # (X, N)
        weight = dpo.balance_heuristic(ref, policies).exp()
        world.agree((mixture * weight).sum(1), torch.ones(world.X, dtype=torch.float64),
                    "the expected weight must be 1: has another number of policies sampled?")
        for beta in (3., .4, .1):
            z = (ref.exp() * torch.exp(r / beta)).sum(1)
            world.agree((mixture * weight * torch.exp(r / beta)).sum(1), z,
                        f"the expected weight times exp(r / {beta}) must be Z")


def test_the_estimate_of_z_has_the_right_mean_and_that_of_log_z_is_low():
    """E[Z_hat] = Z and E[log Z_hat] < log Z, where log Z = reward / beta - kl of the frontier.

    By enumeration of all samples of one response of pi_ref and two of another policy, from three
    responses.
    """
    reward, beta = numbers([[0., .4, 1.]]), .3
    ref, other = numbers([.7, .2, .1]), numbers([.1, .3, .6])
    samplers = torch.stack([ref, other, other])
    log_weight = dpo.balance_heuristic(ref.log(), samplers.log())[None]
    mean_z, mean_log_z = 0., 0.
    for sample in itertools.product(range(3), repeat=3):
        chance = math.prod(p[y].item() for p, y in zip(samplers, sample))
        curve = dpo.optimal_frontier(reward[:, sample], torch.tensor([beta]).double(),
                                     log_weight[:, sample])
        log_z = curve["reward"][0] / beta - curve["kl"][0]
        mean_z += chance * math.exp(log_z)
        mean_log_z += chance * log_z
    z = (ref * torch.exp(reward[0] / beta)).sum().item()
    assert abs(mean_z / z - 1) < 1e-9, \
        f"E[Z_hat] = {mean_z:.6f}, but Z = {z:.6f}: a mixture must not bias Z"
    assert mean_log_z < math.log(z) - .01, \
        f"E[log Z_hat] = {mean_log_z:.4f} must be below log Z = {math.log(z):.4f} (Jensen)"


def test_samples_of_pi_ref_alone_have_weight_1():
    """The weights are 1 if only pi_ref sampled, once or M times.

    The frontier with these weights is the frontier without weights.
    """
    r, ref, samples = enumerable_task()
    for copies in (1, 3):
        world.agree(dpo.balance_heuristic(ref, ref.expand(copies, world.X, world.N)),
                    torch.zeros_like(ref), f"pi_ref alone, {copies} times: each weight must be 1")
    weighted = dpo.optimal_frontier(samples, BETAS, torch.zeros_like(samples))
    assert weighted == dpo.optimal_frontier(samples, BETAS), \
        "weights of 1 must not change the frontier"


def test_a_mixture_with_pi_ref_has_weights_of_at_most_the_number_of_its_policies():
    """w <= M, however far the other policies are; a response that only pi_ref writes has w = M."""
    _, ref, _ = enumerable_task()
    far = world.tabular(world.normal(3, world.X, world.N, seed=8, scale=40.))
    weight = dpo.balance_heuristic(ref, torch.cat([far, ref[None]])).exp()
    assert (weight <= 4 + 1e-12).all(), f"a weight is {weight.max():.6f}, above M = 4"
    world.agree(weight.max(), torch.tensor(4.), "a response of pi_ref alone must have weight M")


def effective_size(counts, weights):
    """(sum w)^2 / sum w^2 by a loop over listed responses that occur `counts` times: (N,), (N,)."""
    total, squares = 0., 0.
    for count, weight in zip(counts.tolist(), weights.tolist()):
        total += count * weight
        squares += count * weight * weight
    return total ** 2 / squares


def test_the_frontier_of_a_mixture_is_that_of_all_responses():
    """Eq. 4: from perfect samples of M policies, (beta, kl, reward) are those of the listed pi*.

    `ref_reward` is E_pi_ref[r]. `ess` is (sum u)^2 / sum u^2 with u = w exp(r / beta), its 10th
    percentile over the two prompts.
    """
    r, ref, _ = enumerable_task()
    logps, counts = mixture_of_policies()
    log_weight = dpo.balance_heuristic(ref, logps)
    optimum = frontier.estimate(*sample_of_mixture(r, log_weight, counts))
    expected, points = [], []
    columns = (optimum[name] for name in ("beta", "kl", "reward", "ess"))
    for beta, *point in zip(*columns):
        if beta < .03:                                        # math.exp cannot hold the weights
            continue
        reward, kl = mean_reward_and_kl(listed_optimum(r, ref, beta), r, ref)
        weights = listed_weights(ref, logps) * torch.exp(r / beta)
        low, high = sorted(map(effective_size, counts.sum(0), weights))
        expected.append([kl, reward, low + .1 * (high - low)])
        points.append(point)
    world.agree(numbers(points), numbers(expected),
                "Eq. 4: (kl, reward, ess) of the frontier of a mixture; are the weights missing?")
    world.agree(numbers(optimum["ref_reward"]), world.expectation(ref, r).mean(),
                "ref_reward must be the mean reward of pi_ref, not of the mixture")


def test_policies_near_the_optimum_give_more_effective_samples():
    """At beta .4, a mixture with a policy near pi* has a larger `ess` than as many of pi_ref."""
    r, ref, samples = enumerable_task()
    logps, counts = mixture_of_policies()
    mixture = sample_of_mixture(r, dpo.balance_heuristic(ref, logps), counts)
    beta = torch.tensor([.4]).double()
    ess = dpo.optimal_frontier(mixture[0], beta, mixture[1])["ess"][0]
    ess_of_ref = dpo.optimal_frontier(samples.repeat(1, 3), beta)["ess"][0]
    assert ess > 2 * ess_of_ref, \
        f"the mixture has {ess:.0f} effective samples, as many of pi_ref {ess_of_ref:.0f}"


def test_the_standard_error_covers_the_scatter_of_a_mixture():
    """se is the standard deviation of beta mean log Z_beta over fresh samples of the mixture.

    Equal numbers from each policy scatter no more. 400 sets of 3 times 40 samples a prompt.
    """
    sets, n, beta = 400, 40, torch.tensor([.8]).double()
    r, ref, _ = enumerable_task()
    logps, _ = mixture_of_policies()
    log_weight = dpo.balance_heuristic(ref, logps)
    mixture = logps.exp().mean(0)
    rows = [*logps.exp(), mixture, mixture, mixture]             # (X, N) each
    indices = torch.cat([torch.multinomial(p, sets * n, replacement=True,
                                           generator=world.generator(seed)).view(world.X, sets, n)
                         for seed, p in enumerate(rows)], 2)     # (X, sets, 6 n)
    scatters, errors = [], []
    for part in indices.split(3 * n, 2):
        heights = []
        for index in part.unbind(1):
            curve = dpo.optimal_frontier(r.gather(1, index), beta, log_weight.gather(1, index))
            heights.append(curve["reward"][0] - curve["beta"][0] * curve["kl"][0])
            errors.append(curve["se"][0])
        scatters.append(torch.tensor(heights).std().item())
    se = sum(errors) / len(errors)
    assert abs(se / scatters[1] - 1) < .15 and scatters[0] < 1.1 * se, (
        f"se is {se:.4f}; fresh samples of the mixture scatter by {scatters[1]:.4f}, and equal "
        f"numbers from each policy by {scatters[0]:.4f}")


def sampled_mixture(policies, samples):
    """ids, mask, rewards and log weights of `samples` responses of each GPT to each prompt.

    pi_ref is the first policy. The true reward is the table of `enumerable_task`.
    """
    r, *_ = enumerable_task()

    def true_reward(encoding, ids, mask):
        return r.flatten()[listed_index(ids, mask)]

    setup = SimpleNamespace(cfg=SimpleNamespace(max_tokens=world.MAX_TOKENS), device="cpu",
                            encoding=SimpleNamespace(eot_token=world.END), ref=policies[0])
    with mock.patch.object(data, "true_reward", true_reward):
        return frontier.sample_mixture(setup, policies, world.prompts(), samples,
                                       world.generator(9))


def test_samples_of_a_mixture_carry_the_reward_and_the_weight_of_their_response():
    """Row x holds the responses to prompt x alone, n of each policy, in the policies' order.

    Rewards and log weights are those of all listed responses. The mean reward of the n responses of
    a policy is that of the policy, within 4 standard errors.
    """
    n, r = 400, enumerable_task()[0]
    policies = [world.gpt(seed=seed) for seed in (1, 5, 6)]
    tables = torch.stack([world.table(policy).detach() for policy in policies])
    ids, mask, reward, log_weight = sampled_mixture(policies, n)
    index = listed_index(ids.flatten(0, 1), mask.flatten(0, 1)).view(world.X, 3 * n)
    prompt = torch.arange(world.X)[:, None].expand_as(index)
    assert torch.equal(index // world.N, prompt), "a row holds responses to another prompt"
    world.agree(reward, r.flatten()[index], "a sample has the reward of another response")
    world.agree(log_weight, listed_weights(tables[0], tables).log().flatten()[index],
                "a sample has the weight of another response, or of another mixture")
    mean = reward.view(world.X, 3, n).mean(2).T                                   # (M, X)
    exact = world.expectation(tables, r)
    variance = world.expectation(tables, (r - exact[..., None]) ** 2)
    assert ((mean - exact).abs() < 4 * (variance / n).sqrt()).all(), \
        f"the responses of each policy have mean reward {mean.tolist()}, not {exact.tolist()}"


# -------------------------------------------------------------------- several seeds, and proposals
def test_the_mean_over_seeds_is_the_frontier_of_the_prompts_of_all_seeds():
    """At common betas, kl, reward, se and ref_reward are those of all seeds' prompts together.

    So the errors of seeds are independent. `ess` is the mean over seeds. Each seed's own frontier
    is in `seeds`, under its name.
    """
    rewards = world.normal(3, 7, 50, seed=5)                                  # (seeds, X, n)
    log_weights = world.normal(3, 7, 50, seed=6, scale=.5)
    optima = dict(zip((4, 5, 6), map(frontier.estimate, rewards, log_weights)))
    mean = frontier.mean_optimum(optima)
    together = frontier.estimate(rewards.flatten(0, 1), log_weights.flatten(0, 1))
    for name in ("beta", "kl", "reward", "se", "ref_reward"):
        world.agree(numbers(mean[name]), numbers(together[name]),
                    f"{name} of the mean over seeds is that of the prompts of all seeds")
    ess = numbers([optimum["ess"] for optimum in optima.values()])
    world.agree(numbers(mean["ess"]), ess.mean(0), "ess is the mean over seeds")
    assert mean["seeds"] == {"4": optima[4], "5": optima[5], "6": optima[6]}, \
        "`seeds` must hold the frontier of each seed, under its name"


def test_pi_ref_is_joined_by_the_finished_policies_of_its_own_seed():
    """All PPO-GT policies of the seed, and DPO's two of the smallest beta, sample for its optimum.

    Failed runs and those of other seeds do not.
    """
    runs = []
    for seed in (1, 2):
        for method, settings in {"dpo": (4., .5, 1., 2., .1), "ppo": (1.,), "ppo_gt": (1., 3., 2.),
                                 "unlikelihood": (.1,)}.items():
            runs += [{"method": method, "setting": setting + seed / 8, "seed": seed,
                      "failure": None} for setting in settings]
    failed = [("dpo", .35), ("ppo_gt", 3.25)]
    for run in runs:
        if (run["method"], run["setting"]) in failed:
            run["failure"] = {"reason": "loss not finite"}
    proposals = train.proposals(SimpleNamespace(seed=2), runs)
    assert set(proposals) == {("ppo_gt", 1.25), ("ppo_gt", 2.25), ("dpo", .75), ("dpo", 1.25)}, \
        f"these policies must not sample for the optimum of seed 2: {proposals}"
