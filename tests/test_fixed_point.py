"""PPO's fixed point is Eq. 4: where it rests, that it gets there, and where a fitted reward model sends it; and what feeds it."""
import math

import torch

import data
import dpo
import model
import ppo
import world
from test_ppo import total, values_of
from world import MAX_TOKENS, N, RESPONSES, V, agree

STATES = {s: i for i, s in enumerate(sorted({y[:t] for y in RESPONSES for t in range(len(y))}))}    # what was written so far
MASK = torch.tensor([[t < len(y) for t in range(MAX_TOKENS)] for y in RESPONSES])                   # (N, 3)
STATE = torch.tensor([[STATES[y[:t]] if t < len(y) else 0 for t in range(MAX_TOKENS)] for y in RESPONSES])
TOKEN = torch.tensor([[y[t] if t < len(y) else 0 for t in range(MAX_TOKENS)] for y in RESPONSES])


def mass(weight):
    """{prefix: the sum of a weight (N,) over the responses that begin with it}, whole responses included."""
    total = {}
    for y, w in zip(RESPONSES, weight.tolist()):
        for t in range(len(y) + 1):
            total[y[:t]] = total.get(y[:t], 0.) + w
    return total


def at_tokens(f):
    """f(prefix, token) at each response token -> (N, 3), 0 elsewhere."""
    rows = [[f(y[:t], y[t:t + 1]) if t < len(y) else 0. for t in range(MAX_TOKENS)] for y in RESPONSES]
    return torch.tensor(rows, dtype=torch.float64)


def by_token(logp):
    """log pi(token | prefix) of a policy given by its (N,) log-probabilities of responses -> (N, 3)."""
    p = mass(logp.detach().exp())
    return at_tokens(lambda s, a: math.log(p[s + a] / p[s]))


def exact_values(p, rewards):
    """V of each state on the way: the mean of the rewards still to come, over responses weighed by p (N,) -> (N, 3)."""
    to_go = rewards.flip(1).cumsum(1).flip(1)
    weight = p[:, None].expand(N, MAX_TOKENS)
    sums = [torch.zeros(len(STATES), dtype=torch.float64).index_add(0, STATE[MASK], w[MASK]) for w in (weight * to_go, weight)]
    return (sums[0] / sums[1])[STATE] * MASK


def ppo_to_the_end(ref, r, beta, rounds=150):
    """PPO on Eq. 3 with every response in the batch at its probability, exact values, and one free number a state and token."""
    theta, ref_tokens = torch.zeros(len(STATES), V, dtype=torch.float64, requires_grad=True), by_token(ref)
    optimizer = torch.optim.Adam([theta], lr=.1, betas=(.8, .99))
    for step in range(rounds):
        optimizer.param_groups[0]["lr"] = .2 * (1 - step / rounds) ** 2
        old = theta.detach().log_softmax(1)[STATE, TOKEN] * MASK
        p = old.sum(1).exp()
        rewards = ppo.token_rewards(r, old, ref_tokens, MASK, beta)
        advantages, _ = ppo.gae(rewards, exact_values(p, rewards), MASK, 1., .9)
        for _ in range(3):
            logp = theta.log_softmax(1)[STATE, TOKEN] * MASK
            loss = (p[:, None] * ppo.policy_loss(logp, old, advantages))[MASK].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (theta.detach().log_softmax(1)[STATE, TOKEN] * MASK).sum(1)


def test_at_the_optimum_every_advantage_is_zero():
    """Eq. 10: with the soft values beta log E_ref[exp(r / beta) | prefix], no token of pi* is better or worse than expected."""
    ref, r, beta = world.table(world.gpt(seed=1))[0].detach(), world.rewards(seed=2)[0], .6
    logp = dpo.optimal_policy(ref, r, beta)
    p, good = mass(ref.exp()), mass((ref + r / beta).exp())
    values = at_tokens(lambda s, a: beta * math.log(good[s] / p[s]))
    rewards = ppo.token_rewards(r, by_token(logp), by_token(ref), MASK, beta)
    agree(ppo.gae(rewards, values, MASK, 1., .95)[0], torch.zeros(N, MAX_TOKENS),
          "Eq. 10: pi* must be at rest: the penalty's sign, the score's place, or the value after the end?")


def test_clipped_ppo_arrives_at_the_optimum():
    """PPO's clipped update, started at the uniform policy, ends at pi* = pi_ref exp(r / beta) / Z, Eq. 4, of its own beta."""
    ref, r, beta = world.table(world.gpt(seed=3))[1].detach(), world.rewards(seed=4)[1], .7
    distance = world.total_variation(ppo_to_the_end(ref, r, beta), dpo.optimal_policy(ref, r, beta))
    assert distance < 2e-4, \
        f"PPO ended {distance:.4f} (total variation) from Eq. 4's optimum: a sign in its rewards, or its clip?"


def test_ppo_on_a_fitted_reward_arrives_at_the_optimum_of_r_over_tau():
    """A reward fitted by Eq. 2 to all Bradley-Terry preferences at tau is r / tau + f(x); PPO takes it to pi_ref exp(r / (tau
    beta)) / Z."""
    ref, r, beta, tau = world.table(world.gpt(seed=5))[0].detach(), world.rewards(seed=6)[0], .9, .6
    preference = data.bradley_terry(r[:, None] / tau, r / tau)
    fitted, weight = torch.zeros(N, dtype=torch.float64, requires_grad=True), world.pair_weights(seed=7)
    world.minimise(lambda: (weight * preference * ppo.reward_model_loss(fitted[:, None], fitted)).sum(), [fitted], steps=300)
    policy = ppo_to_the_end(ref, fitted.detach(), beta)
    distance = world.total_variation(policy, dpo.optimal_policy(ref, r, tau * beta))
    assert distance < 2e-4, f"PPO on the fitted reward ended {distance:.4f} from pi_ref exp(r / (tau beta)) / Z: is tau counted?"


def test_fitted_values_are_expected_scores():
    """V(x, y_<t) = E[score | x, y_<t] under pi_ref: by enumeration, before the first token."""
    ref, (ids, mask) = world.gpt(seed=1).float(), world.listed()
    drawn = torch.cat([x * world.N + torch.multinomial(p, 4000, True, generator=world.generator(x)) for x, p in enumerate(world.table(ref).detach().exp())])
    fitted = ppo.fit_values(ref, ids[drawn], mask[drawn], total, 40, 1e-2, world.generator(5))
    critic = ppo.ScalarModel(ref)
    critic.load_state_dict(fitted)
    value = values_of(critic, ids, mask)[torch.arange(0, world.X * world.N, world.N)].gather(1, mask[::world.N].int().argmax(1, keepdim=True)).squeeze(1)
    expected = world.expectation(world.table(ref).detach(), total(ids, mask).view(world.X, world.N).double())
    assert expected.diff().abs() > .3, "the two prompts must differ for this test to tell them apart"
    world.agree(value.double(), expected, "values before the first token are not the expected scores", tolerance=.15)
