"""PPO's fixed point is Eq. 4: pi* is at rest, PPO arrives at it, and a fitted reward model leads to
the pi* of its own beta. Fitted values are expected scores.

A state is a prefix of a response: the tokens before the one that is chosen. Tables (N, 3) have one
row for each listed response and one column for each of its tokens, 0 after the end.
"""
import math

import torch

import data
import dpo
import ppo
import world
from test_reward_model_and_ppo import token_id_reward, values_of
from world import MAX_TOKENS, N, RESPONSES, V, X, agree

PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})
STATES = {prefix: i for i, prefix in enumerate(PREFIXES)}    # prefix -> its number


def number_states_and_tokens():
    """Return the number of the state before each response token, and the token: (N, 3) each."""
    state = torch.zeros(N, MAX_TOKENS, dtype=torch.long)
    token = torch.zeros(N, MAX_TOKENS, dtype=torch.long)
    for row, y in enumerate(RESPONSES):
        for t in range(len(y)):
            state[row, t] = STATES[y[:t]]
            token[row, t] = y[t]
    return state, token


MASK = torch.arange(MAX_TOKENS) < world.LENGTHS[:, None]     # (N, 3)
STATE, TOKEN = number_states_and_tokens()


def mass(weight):
    """Return for each prefix the sum of the weights (N,) of the responses that begin with it.

    Whole responses are prefixes too.
    """
    sums = {}
    for y, w in zip(RESPONSES, weight.tolist()):
        for t in range(len(y) + 1):
            sums[y[:t]] = sums.get(y[:t], 0.) + w
    return sums


def token_logps(logp):
    """Return log pi(token | prefix) of the policy with these log-probabilities (N,): (N, 3)."""
    p = mass(logp.detach().exp())
    table = torch.zeros(N, MAX_TOKENS, dtype=torch.float64)
    for row, y in enumerate(RESPONSES):
        for t in range(len(y)):
            table[row, t] = math.log(p[y[:t + 1]] / p[y[:t]])
    return table


def exact_values(p, rewards):
    """Return V of the state before each token: the mean of the rewards still to come, (N, 3).

    p (N,) are the probabilities of the responses, rewards (N, 3) those of their tokens.
    """
    to_come = rewards.flip(1).cumsum(1).flip(1)
    weight = p[:, None].expand(N, MAX_TOKENS)
    zeros = torch.zeros(len(STATES), dtype=torch.float64)
    weighted_sum = zeros.index_add(0, STATE[MASK], (weight * to_come)[MASK])
    total_weight = zeros.index_add(0, STATE[MASK], weight[MASK])
    return (weighted_sum / total_weight)[STATE] * MASK


def ppo_to_the_end(ref, r, beta, rounds=150):
    """Run PPO on Eq. 3 until it converges, starting at the uniform policy -> log pi (N,).

    ref (N,) is log pi_ref, r (N,) the reward. Each batch holds every response, weighted by its
    probability; values are exact; the policy has one free number for each state and token.
    """
    theta = torch.zeros(len(STATES), V, dtype=torch.float64, requires_grad=True)
    ref_tokens = token_logps(ref)
    optimizer = torch.optim.Adam([theta], lr=.1, betas=(.8, .99))

    def policy_tokens():
        return theta.log_softmax(1)[STATE, TOKEN] * MASK               # (N, 3)

    for step in range(rounds):
        optimizer.param_groups[0]["lr"] = .2 * (1 - step / rounds) ** 2
        old = policy_tokens().detach()
        p = old.sum(1).exp()
        rewards = ppo.token_rewards(r, old, ref_tokens, MASK, beta)
        advantages, _ = ppo.gae(rewards, exact_values(p, rewards), MASK, 1., .9)
        for _ in range(3):
            loss = (p[:, None] * ppo.policy_loss(policy_tokens(), old, advantages))[MASK].sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return policy_tokens().detach().sum(1)


def test_at_the_optimum_every_advantage_is_zero():
    """Eq. 10: with soft values beta log E_ref[exp(r / beta) | prefix], all advantages of pi* are 0.

    No token of pi* is better or worse than expected.
    """
    beta = .6
    ref = world.table(world.gpt(seed=1))[0].detach()
    r = world.rewards(seed=2)[0]
    logp = dpo.optimal_policy(ref, r, beta)
    p = mass(ref.exp())
    tilted = mass((ref + r / beta).exp())
    soft_values = [beta * math.log(tilted[prefix] / p[prefix]) for prefix in PREFIXES]
    values = torch.tensor(soft_values, dtype=torch.float64)[STATE] * MASK
    rewards = ppo.token_rewards(r, token_logps(logp), token_logps(ref), MASK, beta)
    advantages, _ = ppo.gae(rewards, values, MASK, 1., .95)
    agree(advantages, torch.zeros(N, MAX_TOKENS),
          "Eq. 10: pi* must be at rest: is the sign of the penalty wrong, the score at another "
          "token, or the value after the end not 0?")


def test_clipped_ppo_arrives_at_the_optimum():
    """PPO's clipped update ends at pi* = pi_ref exp(r / beta) / Z, Eq. 4, of its own beta.

    It starts at the uniform policy.
    """
    beta = .7
    ref = world.table(world.gpt(seed=3))[1].detach()
    r = world.rewards(seed=4)[1]
    logp = ppo_to_the_end(ref, r, beta)
    distance = world.total_variation(logp, dpo.optimal_policy(ref, r, beta))
    assert distance < 2e-4, \
        f"PPO ended at total variation {distance:.4f} from the optimum of Eq. 4: is a sign in " \
        "its rewards wrong, or its clip?"


def test_ppo_on_a_fitted_reward_arrives_at_the_optimum_of_r_over_tau():
    """PPO on a reward fitted to labels at temperature tau ends at pi_ref exp(r / (tau beta)) / Z.

    The reward is fitted by Eq. 2 to all Bradley-Terry preferences at tau, so it is r / tau + f(x).
    """
    beta, tau = .9, .6
    ref = world.table(world.gpt(seed=5))[0].detach()
    r = world.rewards(seed=6)[0]
    preference = data.bradley_terry(r[:, None] / tau, r / tau)
    weight = world.pair_weights(seed=7)
    fitted = torch.zeros(N, dtype=torch.float64, requires_grad=True)

    def expected_loss():
        return (weight * preference * ppo.reward_model_loss(fitted[:, None], fitted)).sum()

    world.minimise(expected_loss, [fitted], steps=300)
    logp = ppo_to_the_end(ref, fitted.detach(), beta)
    distance = world.total_variation(logp, dpo.optimal_policy(ref, r, tau * beta))
    assert distance < 2e-4, \
        f"PPO on the fitted reward ended at total variation {distance:.4f} from " \
        "pi_ref exp(r / (tau beta)) / Z: is tau forgotten?"


def test_fitted_values_are_expected_scores():
    """V(x, y_<t) = E[score | x, y_<t] under pi_ref: by enumeration, before the first token."""
    ref = world.gpt(seed=1).float()
    ids, mask = world.listed()
    ref_logp = world.table(ref).detach()
    samples = []
    for x, p in enumerate(ref_logp.exp()):
        sampled = torch.multinomial(p, 4000, True, generator=world.generator(x))
        samples.append(x * N + sampled)
    rows = torch.cat(samples)
    critic = ppo.ScalarModel(ref)
    state = ppo.pretrain_critic(ref, ids[rows], mask[rows], token_id_reward, 40, 1e-2,
                                world.generator(5))
    critic.load_state_dict(state)
    first_rows = torch.arange(0, X * N, N)                             # one response to each prompt
    first_tokens = mask[first_rows].int().argmax(1)
    value = values_of(critic, ids, mask)[first_rows, first_tokens]
    expected = world.expectation(ref_logp, token_id_reward(ids, mask).view(X, N).double())
    assert expected.diff().abs() > .3, \
        "the two prompts must differ for this test to tell them apart"
    agree(value.double(), expected, "values before the first token are not the expected scores",
          tolerance=.15)
