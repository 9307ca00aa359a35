"""The optimal frontier from samples of a mixture of policies, its mean over seeds, and who samples.

M policies, pi_ref among them, sample n responses each. Letters: X prompts, N listed responses.
"""
import itertools
import math
from types import SimpleNamespace
from unittest import mock

import torch

import data
import dpo
import world
from fake_setup import SEED, FakePolicy, numbers
from plots import frontier
from test_best_of_n import listed_index
from test_frontier import BETAS, TOTAL, enumerable_task, listed_optimum, mean_reward_and_kl
from test_handing_over import hand_over_table
from test_stages_before_training import setup_of


# ------------------------------------------------- samples of several policies (sample_mixture)
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
    optimum = frontier.optimum_from_samples(*sample_of_mixture(r, log_weight, counts))
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

    Rewards and log weights are those of all listed responses. Policies but pi_ref, the first, are
    ended by pi_ref. The mean reward of the n responses of a policy is that of all listed ones,
    within 4 standard errors.
    """
    n, r = 400, enumerable_task()[0]
    policies = [world.gpt(seed=seed) for seed in (1, 5, 6)]
    ref = policies[0]
    tables = torch.stack([world.table(ref).detach(),
                          *(hand_over_table(policy, ref) for policy in policies[1:])])
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


# ---------------------------------------------------------------------------- the mean over seeds
def test_the_mean_over_seeds_is_the_frontier_of_the_prompts_of_all_seeds():
    """At common betas, kl, reward, se and ref_reward are those of all seeds' prompts together.

    So the errors of seeds are independent. `ess` is the mean over seeds. Each seed's own frontier
    is in `seeds`, under its name.
    """
    rewards = world.normal(3, 7, 50, seed=5)                                  # (seeds, X, n)
    log_weights = world.normal(3, 7, 50, seed=6, scale=.5)
    optima = dict(zip((4, 5, 6), map(frontier.optimum_from_samples, rewards, log_weights)))
    mean = frontier.mean_optimum(optima)
    together = frontier.optimum_from_samples(rewards.flatten(0, 1), log_weights.flatten(0, 1))
    for name in ("beta", "kl", "reward", "se", "ref_reward"):
        world.agree(numbers(mean[name]), numbers(together[name]),
                    f"{name} of the mean over seeds is that of the prompts of all seeds")
    ess = numbers([optimum["ess"] for optimum in optima.values()])
    world.agree(numbers(mean["ess"]), ess.mean(0), "ess is the mean over seeds")
    assert mean["seeds"] == {"4": optima[4], "5": optima[5], "6": optima[6]}, \
        "`seeds` must hold the frontier of each seed, under its name"


# ------------------------------------------------------- the policies that sample beside pi_ref
def test_the_proposals_are_ppo_gt_and_dpo_at_its_two_smallest_betas():
    """Of a seed's finished runs, all of PPO-GT and the two of DPO that are farthest from pi_ref.

    pi_ref is no run and is always among the policies that sample. Runs of other methods, of other
    seeds, and failed ones are left out.
    """
    failure = {"step": 3, "reason": "loss not finite"}
    policies = [FakePolicy("dpo", 2.), FakePolicy("ppo", 1.), FakePolicy("ppo_gt", 4.),
                FakePolicy("dpo", .1, failure=failure), FakePolicy("dpo", .5, seed=SEED + 1),
                FakePolicy("ppo_gt", 1.), FakePolicy("ppo_gt", 2., failure=failure),
                FakePolicy("dpo", .7), FakePolicy("unlikelihood", .1), FakePolicy("dpo", 1.),
                FakePolicy("preferred_ft", 0.), FakePolicy("my_loss", .2)]
    setup = setup_of(2)

    def chosen(policies):
        proposals = frontier.choose_proposals(setup, policies)
        return sorted((policy.value["method"], policy.value["setting"]) for policy in proposals)

    found = chosen(policies)
    assert found == [("dpo", .7), ("dpo", 1.), ("ppo_gt", 1.), ("ppo_gt", 4.)], \
        f"the proposals are {found}"
    assert chosen([]) == [], "without runs, pi_ref alone samples"
    assert chosen([FakePolicy("dpo", 3.)]) == [("dpo", 3.)], "one run of DPO is a proposal, too"
