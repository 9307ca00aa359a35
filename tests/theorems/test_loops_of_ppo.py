"""The loops of PPO: one update, and the whole training with its controller.

Each loop has a trace, as in test_loops_of_reward_and_values.py. The fixed point of the training is
Eq. 4 at the target KL.
"""
import copy
from statistics import fmean, pstdev
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import dpo
import model
import ppo
import world
from test_loops_of_reward_and_values import (RATES, Adam, flat, rewards_by_token, score,
                                             table_score, text)
from test_ppo_update import roll_out
from test_reward_model_and_ppo import scalar_model
from world import END, MAX_TOKENS, agree


# --------------------------------------------------------------------------------------- one update
class Episode(NamedTuple):
    """A prompt with a response; the lists have an entry for each response token."""
    tokens: Tensor
    positions: list[int]
    old: list[float]      # log pi when it was sampled
    ref: list[float]      # log pi_ref
    value: list[float]    # the critic's value before the token
    score: float


def token_logps(policy, tokens, positions):
    """Return log pi of the response tokens, nats: a list of scalar tensors."""
    logits = policy(tokens[None])[0]
    return [logits[t - 1].log_softmax(0)[tokens[t]] for t in positions]


def token_values(critic, tokens, positions):
    """Return the critic's value before each response token: a list of scalar tensors."""
    output = critic(tokens[None])[0]
    return [output[t - 1] for t in positions]


def advantages_and_returns(episode, price):
    """Return A and R of the response tokens by their definition, for gamma 1 and lambda .95.

    delta_i = r_i + V_{i+1} - V_i,  A_i = sum over k >= i of .95^(k - i) delta_k,  R_i = A_i + V_i.
    """
    count = len(episode.positions)
    rewards = [-price * (old - ref) for old, ref in zip(episode.old, episode.ref)]
    rewards[-1] += episode.score
    values = [*episode.value, 0.]
    deltas = [rewards[i] + values[i + 1] - values[i] for i in range(count)]
    advantages = []
    for i in range(count):
        advantages.append(sum(.95 ** (k - i) * deltas[k] for k in range(i, count)))
    returns = [advantage + value for advantage, value in zip(advantages, values)]
    return advantages, returns


def episode_terms(policy, critic, episode, advantages, returns):
    """Return the terms of both clipped losses, one for each response token: two lists.

    The ratio is at most 1.2 for a good token, at least .8 for a bad one. The value's term is the
    larger error of V and of the V that is at most .2 from the old one.
    """
    new_logps = token_logps(policy, episode.tokens, episode.positions)
    new_values = token_values(critic, episode.tokens, episode.positions)
    policy_terms, value_terms = [], []
    for i, advantage in enumerate(advantages):
        ratio = (new_logps[i] - episode.old[i]).exp()
        bounded = ratio.clamp(max=1.2) if advantage > 0 else ratio.clamp(min=.8)
        policy_terms.append(-advantage * bounded)
        near = episode.value[i] + (new_values[i] - episode.value[i]).clamp(-.2, .2)
        error = max((new_values[i] - returns[i]) ** 2, (near - returns[i]) ** 2)
        value_terms.append(error / 2)
    return policy_terms, value_terms


def trace_of_update(policy, critic, adam, episodes, price, epochs, minibatch, generator):
    """Make a step of Adam for each minibatch; return the last loss.

    Advantages are whitened over all response tokens of the batch. Returns are not.
    """
    advantages, returns = [], []
    for episode in episodes:
        A, R = advantages_and_returns(episode, price)
        advantages.append(A)
        returns.append(R)
    entries = [advantage for row in advantages for advantage in row]
    mean, deviation = fmean(entries), pstdev(entries) + 1e-8
    for _ in range(epochs):
        order = torch.randperm(len(episodes), generator=generator)
        for rows in order.split(minibatch):
            policy_terms, value_terms = [], []
            for row in rows.tolist():
                white = [(advantage - mean) / deviation for advantage in advantages[row]]
                terms = episode_terms(policy, critic, episodes[row], white, returns[row])
                policy_terms += terms[0]
                value_terms += terms[1]
            loss = sum(policy_terms) / len(policy_terms)
            loss = loss + .1 * sum(value_terms) / len(value_terms)
            adam.step(loss)
    return loss.item()


def episodes_of(rollout):
    """Return the episodes of a ppo.Rollout."""
    episodes = []
    for row in range(len(rollout.ids)):
        tokens, positions = text(rollout.ids[row], rollout.mask[row])
        episodes.append(Episode(tokens, positions,
                                rollout.logp[row, positions].tolist(),
                                rollout.ref_logp[row, positions].tolist(),
                                rollout.value[row, positions].tolist(),
                                rollout.score[row].item()))
    return episodes


def test_an_update_follows_the_trace_of_clipped_minibatches():
    """2 epochs over 10 episodes in minibatches of 4, 4 and 2, as in steps 2-4 of the recipe.

    pi_old and V_old are far from pi and V, so every region of both clips occurs.
    """
    policy, critic = world.gpt(seed=1), scalar_model(seed=3)
    rollout = roll_out(policy, world.gpt(seed=2), critic, count=5, seed=6)
    shape = rollout.mask.shape
    old = rollout.logp + world.normal(*shape, seed=4, scale=.4) * rollout.mask
    value = rollout.value + world.normal(*shape, seed=5, scale=.4) * rollout.mask
    rollout = rollout._replace(logp=old, value=value)
    traced_policy, traced_critic = copy.deepcopy(policy), copy.deepcopy(critic)
    adam = Adam([*traced_policy.parameters(), *traced_critic.head.parameters()], eps=1e-5)
    adam.lr = .02
    expected = trace_of_update(traced_policy, traced_critic, adam, episodes_of(rollout), .3, 2, 4,
                               world.generator(7))
    parameters = [*policy.parameters(), *critic.head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=.02, eps=1e-5)
    loss = ppo.ppo_update(policy, critic, optimizer, rollout, .3, 2, 4, world.generator(7))
    agree(loss, expected,
          "the loss of the last minibatch must be mean policy loss + .1 mean value loss, each over "
          "the response tokens of the minibatch", tolerance=1e-9)
    agree(flat({**policy.state_dict(), **critic.state_dict()}),
          flat({**traced_policy.state_dict(), **traced_critic.state_dict()}),
          "the update left the trace of its recipe: a sum for a mean, gradients of an earlier "
          "minibatch, another clip, lambda or weight of the value loss?", tolerance=1e-9)


# ------------------------------------------------------------------------------------- the training
STATISTICS = {    # what train_ppo yields -> what is likely wrong
    "loss": "the loss must be that of the step's last minibatch: is it no mean, has Adam another "
            "eps or decay, or does the learning rate leave its schedule?",
    "score": "the score must be the mean over the episodes of the step",
    "rollout_kl": "the controller must see the mean over episodes, not a sum over the batch, of "
                  "the sum over tokens of log pi/pi_ref",
    "kl_coef": "it starts at ppo_init_kl_coef / target and changes after each step",
    "sampled_tokens": "sampled tokens must be the response tokens of the step",
    "trained_tokens": "trained tokens must be the sampled tokens times the epochs",
}
PROMPTS = torch.tensor([[2, 0, END], [0, 3, 1], [1, END, END]]), torch.tensor([2, 3, 1])


def sampled_episodes(policy, ref, critic, count, completions, generator):
    """Sample `completions` responses to each of `count` random prompts; return them as episodes."""
    chosen = torch.randint(3, (count,), generator=generator).tolist()
    rows = [number for number in chosen for _ in range(completions)]
    lengths = PROMPTS[1][rows].tolist()
    ids = model.sample(policy, PROMPTS[0][rows], PROMPTS[1][rows], MAX_TOKENS, END,
                       generator=generator)
    episodes = []
    for tokens, start in zip(ids, lengths):
        positions = [start]
        while tokens[positions[-1]] != END and len(positions) < MAX_TOKENS:
            positions.append(positions[-1] + 1)
        tokens = tokens[:positions[-1] + 1]
        mask = torch.tensor([[t in positions for t in range(len(tokens))]])
        episodes.append(Episode(tokens, positions,
                                [x.item() for x in token_logps(policy, tokens, positions)],
                                [x.item() for x in token_logps(ref, tokens, positions)],
                                [x.item() for x in token_values(critic, tokens, positions)],
                                score(tokens[None], mask).item()))
    return episodes


def trace_of_ppo(cfg, policy, ref, critic, target, generator):
    """Train the policy in place by the recipe; return the statistics of each step."""
    adam = Adam([*policy.parameters(), *critic.head.parameters()], 1e-5, cfg.adam_beta2)
    price = cfg.ppo_init_kl_coef / target
    count = cfg.ppo_batch // cfg.completions
    statistics = []
    for rate in RATES[cfg.ppo_steps]:
        adam.lr = cfg.ppo_lr * rate
        episodes = sampled_episodes(policy, ref, critic, count, cfg.completions, generator)
        loss = trace_of_update(policy, critic, adam, episodes, price, cfg.ppo_epochs,
                               cfg.ppo_minibatch, generator)
        kl = fmean(sum(episode.old) - sum(episode.ref) for episode in episodes)
        tokens = sum(len(episode.positions) for episode in episodes)
        statistics.append({"loss": loss, "score": fmean(episode.score for episode in episodes),
                           "rollout_kl": kl, "kl_coef": price, "sampled_tokens": tokens,
                           "trained_tokens": cfg.ppo_epochs * tokens})
        price *= 1 + min(max(kl / target - 1, -.2), .2) * cfg.ppo_batch / cfg.ppo_horizon
    return statistics


def assert_train_ppo_follows_its_trace(cfg, values, critic, target):
    """Compare statistics and final policy of train_ppo with those of the trace.

    `values` are passed to train_ppo, and `critic` is what the trace starts from.
    """
    policy, ref = world.gpt(seed=1), world.gpt(seed=2)
    traced_policy = copy.deepcopy(policy)
    expected = trace_of_ppo(cfg, traced_policy, ref, critic, target, world.generator(9))
    statistics = list(ppo.train_ppo(cfg, policy, ref, PROMPTS, score, target, END,
                                    world.generator(9), values))
    assert set(statistics[0]) == set(STATISTICS), "train_ppo yields other statistics"
    for name in ("rollout_kl", "kl_coef"):    # of the first step, which no update precedes
        agree(torch.tensor(statistics[0][name]).double(), torch.tensor(expected[0][name]).double(),
              f"{name} of the first step: {STATISTICS[name]}", tolerance=1e-6)
    for name, claim in STATISTICS.items():
        agree(torch.tensor([step[name] for step in statistics], dtype=torch.float64),
              torch.tensor([step[name] for step in expected], dtype=torch.float64),
              f"{name}: {claim}", tolerance=1e-9)
    agree(flat(policy.state_dict()), flat(traced_policy.state_dict()),
          "PPO left the trace of its recipe: another eps of Adam, weight decay, or learning rates "
          "that do not change once a step?", tolerance=1e-9)


def test_ppo_follows_the_trace_of_its_recipe():
    """4 steps of 15 episodes, 3 to a prompt, each reused for 2 epochs in minibatches of 4.

    Adam has the beta2 of the configuration. The critic starts from the fitted values.
    """
    cfg = SimpleNamespace(ppo_lr=.01, ppo_steps=4, ppo_init_kl_coef=.6, ppo_batch=15, completions=3,
                          max_tokens=MAX_TOKENS, ppo_epochs=2, ppo_minibatch=4, ppo_horizon=70.,
                          adam_beta2=.95)
    critic = scalar_model(seed=3)
    assert_train_ppo_follows_its_trace(cfg, critic.state_dict(), copy.deepcopy(critic), target=.35)


def test_without_fitted_values_ppo_follows_the_trace_from_zero():
    """If there are no fitted values, the critic's network is that of pi_ref, and its head is 0.

    Here a step has 2 episodes: fewer than tokens in a prompt, and less than a minibatch.
    """
    cfg = SimpleNamespace(ppo_lr=.02, ppo_steps=5, ppo_init_kl_coef=.3, ppo_batch=2, completions=2,
                          max_tokens=MAX_TOKENS, ppo_epochs=3, ppo_minibatch=5, ppo_horizon=9.,
                          adam_beta2=.95)
    critic = ppo.ScalarModel(world.gpt(seed=2))
    assert_train_ppo_follows_its_trace(cfg, None, critic, target=.5)


def test_ppo_arrives_at_the_target_kl_and_at_equation_4_of_its_own_price():
    """PPO with its controller ends at the target KL, near Eq. 4 with beta = c, its last price.

    KL and pi* are enumerated. For both targets the initial price is far above the last one.
    """
    r = rewards_by_token(seed=11)
    ref = world.gpt(seed=2, layers=1)
    ref_logp = world.table(ref).detach()
    cfg = SimpleNamespace(ppo_lr=.01, ppo_steps=80, ppo_init_kl_coef=1.2, ppo_batch=128,
                          completions=4, max_tokens=MAX_TOKENS, ppo_epochs=2, ppo_minibatch=32,
                          ppo_horizon=600., adam_beta2=.999)
    for target in (.5, 1.):
        policy = copy.deepcopy(ref)
        statistics = list(ppo.train_ppo(cfg, policy, ref, world.prompts(), table_score(r), target,
                                        END, world.generator(3)))
        logp = world.table(policy).detach()
        kl = world.kl(logp, ref_logp).mean().item()
        assert abs(kl / target - 1) < .15, \
            f"PPO ended at a KL of {kl:.3f} nats, its target is {target}: the controller must " \
            "see the mean KL of a sequence, not a sum over the batch"
        price = statistics[-1]["kl_coef"]
        assert statistics[0]["kl_coef"] > 1.5 * price, "the initial price must be far off"
        optimum = dpo.optimal_policy(ref_logp, r, price)
        distance = world.total_variation(logp, optimum)
        assert (world.total_variation(ref_logp, optimum) > .3).all(), "pi* must be far from pi_ref"
        assert (distance < .15).all(), \
            f"PPO ended at total variation {distance.tolist()} from Eq. 4 at its price " \
            f"{price:.3f}: does a token pay another price, or is the score given elsewhere?"
