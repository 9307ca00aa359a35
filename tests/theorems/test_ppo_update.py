"""PPO as a recipe: what a roll-out records, what an update changes, what a short training run does.

test_reward_model_and_ppo.py proves the pieces, test_ppo_fixed_point.py the fixed point.
"""
import copy
from types import SimpleNamespace

import torch

import model
import ppo
import world
from test_reward_model_and_ppo import scalar_model, token_id_reward, values_of
from world import END, MAX_TOKENS, N, X, agree


def roll_out(policy, ref, critic, count, seed):
    """Return `count` episodes for each of the world's prompts, as a ppo.Rollout.

    The score is a number that depends on the whole response.
    """
    prompts = tuple(p.repeat_interleave(count, 0) for p in world.prompts())
    weights = world.normal(world.T, seed=8)

    def score(ids, mask):
        return (ids * mask * weights).sum(1)

    return ppo.roll_out(policy, ref, critic, prompts, MAX_TOKENS, END, score,
                        world.generator(seed))


def sgd(policy, critic, lr):
    """Return an optimizer of all parameters of policy and critic."""
    return torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=lr)


# ------------------------------------------------------------------------------------ the roll-out
def test_a_roll_out_records_what_its_names_say():
    """Rollout.logp sums to log pi(y|x), ref_logp to log pi_ref(y|x), and value is the critic's.

    All are those of the sampled rows.
    """
    policy, ref, critic = world.gpt(seed=1), world.gpt(seed=2), scalar_model(seed=3)
    rollout = roll_out(policy, ref, critic, count=5, seed=6)
    lengths = world.prompts()[1].repeat_interleave(5)
    mask = model.response_mask(rollout.ids, lengths, MAX_TOKENS, END)
    recorded = torch.stack([rollout.logp.sum(1), rollout.ref_logp.sum(1), rollout.value.sum(1),
                            rollout.mask.sum(1)])
    expected = torch.stack([model.sequence_logp(policy(rollout.ids), rollout.ids, mask),
                            model.sequence_logp(ref(rollout.ids), rollout.ids, mask),
                            values_of(critic, rollout.ids, mask).sum(1),
                            mask.sum(1)])
    agree(recorded, expected,
          "the roll-out must record log pi, log pi_ref and V of its own rows: are policy and "
          "reference mixed up?")


def test_a_roll_out_is_a_constant():
    """No gradient flows through a roll-out: not to pi_old, the value targets or pi_ref."""
    rollout = roll_out(world.gpt(seed=1), world.gpt(seed=2), scalar_model(seed=3), count=2, seed=6)
    with_gradient = [name for name, x in rollout._asdict().items() if x.requires_grad]
    assert not with_gradient, \
        f"{with_gradient} of a roll-out carry gradients: the reference is not frozen, or pi_old " \
        "moves with pi"


# -------------------------------------------------------------------------------------- the update
def test_the_ratio_is_one_on_the_first_minibatch():
    """Before the first step, pi = pi_old on every response token.

    The learning rate is 0, so every minibatch is like the first. The test records the ratios that
    `ppo_update` passes to `policy_loss`.
    """
    policy, critic = world.gpt(seed=1), scalar_model(seed=3)
    rollout = roll_out(policy, world.gpt(seed=2), scalar_model(seed=3), count=5, seed=6)
    original_loss = ppo.policy_loss
    ratios = []

    def recording_loss(logp, old_logp, *arguments):
        ratios.append((logp - old_logp).exp())
        return original_loss(logp, old_logp, *arguments)

    ppo.policy_loss = recording_loss
    try:
        ppo.ppo_update(policy, critic, sgd(policy, critic, lr=0.), rollout, .3, 2, 3,
                       world.generator(1))
    finally:
        ppo.policy_loss = original_loss
    agree(torch.cat(ratios), torch.ones(2 * int(rollout.mask.sum())),
          "before the first step the ratio must be 1 on every response token, once an epoch: does "
          "the update compute log pi of other tokens than the roll-out, or in another way?")


def test_the_first_loss_of_an_update_is_the_critics():
    """If one minibatch holds all episodes, the first loss is .1 mean (V - R)^2 / 2.

    The ratio is 1 and whitened advantages have mean 0, so the policy's loss is 0.
    """
    policy, ref, critic = world.gpt(seed=1), world.gpt(seed=2), scalar_model(seed=3)
    rollout = roll_out(policy, ref, critic, count=9, seed=6)
    rewards = ppo.token_rewards(rollout.score, rollout.logp, rollout.ref_logp, rollout.mask, .3)
    _, returns = ppo.gae(rewards, rollout.value, rollout.mask, 1., .95)
    loss = ppo.ppo_update(policy, critic, sgd(policy, critic, lr=0.), rollout, .3, 1,
                          len(rollout.ids), world.generator(1))
    errors = (rollout.value - returns)[rollout.mask]
    agree(torch.tensor(loss, dtype=torch.float64), .1 * (errors ** 2).mean() / 2,
          "the first loss must be vf_coef (V - R)^2 / 2: are the advantages not whitened, is "
          "the price of KL lost, or has the critic's loss another weight?", tolerance=1e-7)


def test_updates_move_the_policy_and_the_critics_head_and_nothing_else():
    """A PPO step does not change pi_ref or the network under the critic.

    Policy and critic both start as copies of pi_ref.
    """
    ref = world.gpt(seed=2)
    policy, critic = copy.deepcopy(ref), scalar_model(seed=2)
    before = copy.deepcopy(ref.state_dict())
    rollout = roll_out(policy, ref, critic, count=3, seed=5)
    ppo.ppo_update(policy, critic, sgd(policy, critic, lr=.1), rollout, .3, 1, 99,
                   world.generator(1))

    def is_unchanged(gpt):
        return all(torch.equal(before[name], p) for name, p in gpt.state_dict().items())

    assert not is_unchanged(policy), "the update did not change the policy"
    assert is_unchanged(ref), "a PPO step changed pi_ref: it must stay frozen"
    assert is_unchanged(critic.gpt), "a PPO step changed the network under the critic's head"


# ------------------------------------------------------------------------------------ the training
def run_ppo(ref, steps, target, horizon):
    """Train a copy of pi_ref with PPO on `token_id_reward`.

    Returns the policy, and the statistics of each step. The price of KL starts at .4 / target; it
    hardly changes if the horizon is large.
    """
    cfg = SimpleNamespace(ppo_lr=1e-2, ppo_steps=steps, ppo_init_kl_coef=.4, ppo_batch=64,
                          completions=4, max_tokens=MAX_TOKENS, ppo_epochs=3, ppo_minibatch=32,
                          ppo_horizon=horizon, adam_beta2=.999)
    policy = copy.deepcopy(ref)
    statistics = ppo.train_ppo(cfg, policy, ref, world.prompts(), token_id_reward, target, END,
                               world.generator(3))
    return policy, list(statistics)


def test_ppo_raises_the_objective():
    """Eq. 3 by enumeration: PPO raises E_pi[r] - c KL(pi || pi_ref) by most of what is possible."""
    c = .4
    ref = world.gpt(seed=2).float()
    r = token_id_reward(*world.listed()).view(X, N).double()
    policy, _ = run_ppo(ref, steps=12, target=1., horizon=1e9)
    ref_logp = world.table(ref.double()).detach()
    logp = world.table(policy.double()).detach()
    start = world.expectation(ref_logp, r)
    gain = world.expectation(logp, r) - c * world.kl(logp, ref_logp) - start
    possible_gain = c * torch.logsumexp(ref_logp + r / c, 1) - start
    assert (gain > .5 * possible_gain).all(), \
        f"PPO gained {gain.tolist()} of {possible_gain.tolist()} on the two prompts: is the sign " \
        "of the advantage or of c wrong?"


def test_ppo_starts_at_the_reference_and_prices_kl_by_its_controller():
    """The first roll-out is that of pi_ref, so its KL is exactly 0.

    Each later price of KL is the controller's answer to the KL of the step before.
    """
    _, steps = run_ppo(world.gpt(seed=2).float(), steps=5, target=.02, horizon=300.)
    expected = [.4 / .02]
    for step in steps[:-1]:
        error = min(max(step["rollout_kl"] / .02 - 1, -.2), .2)
        expected.append(expected[-1] * (1 + error * 64 / 300))
    first_kl = steps[0]["rollout_kl"]
    assert first_kl == 0., f"the policy starts at pi_ref, so its first KL is 0, not {first_kl}"
    agree(torch.tensor([step["kl_coef"] for step in steps]), torch.tensor(expected),
          "the price of KL must follow the controller")
