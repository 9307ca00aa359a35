"""The pipeline that DPO replaces, piece by piece: reward model, token rewards, advantages, clipping, and the controller.

`episodes()` makes B = 4 episodes of T = 7 positions. Their masks begin and end in different places and one has a hole; what is
masked out is NaN wherever a function must not read it.
"""
import copy
import math
from types import SimpleNamespace

import torch

import data
import model
import ppo
import world
from world import END, MAX_TOKENS, N, X, agree

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]]).bool()
B, T = MASK.shape
LAST = [5, 2, 6, 2]    # the last real position of each row


def episodes(seed):
    """Numbers (B, T), NaN where MASK is False."""
    return world.normal(B, T, seed=seed).masked_fill(~MASK, torch.nan)


def scalar_model(seed):
    """A ScalarModel with a head that is not 0."""
    critic = ppo.ScalarModel(world.gpt(seed)).double()
    with torch.no_grad():
        critic.head.weight.copy_(world.normal(1, 12, seed=seed + 1))
    return critic


def roll_out(policy, ref, critic, count, seed):
    """`count` episodes for each of the world's prompts; the score is a number that depends on the whole text."""
    prompts = tuple(p.repeat_interleave(count, 0) for p in world.prompts())
    weights = world.normal(world.T, seed=8)
    return ppo.roll_out(policy, ref, critic, prompts, MAX_TOKENS, END, lambda ids, mask: (ids * mask * weights).sum(1),
                        world.generator(seed))


def total(ids, mask):
    """A reward of whole texts that is easy to learn: the sum of the response's token ids, END counting nothing."""
    return (ids * mask * (ids != END)).sum(1) / 3.


def labelled(count, seed):
    """Preferences by `total` among 4 responses to each of `count` prompts."""
    prompts = torch.randint(0, END, (count, 3), generator=world.generator(seed)), torch.full((count,), 3)
    ids, mask = model.respond(world.gpt(seed=4), prompts, 4, MAX_TOKENS, END, world.generator(seed))
    winner, loser, _ = data.label_pairs(total(ids, mask).view(count, 4), "deterministic", 1., world.generator(seed))
    return data.Preferences(ids, mask, torch.zeros(len(ids)), winner, loser, 4)


# ----------------------------------------------------------------------------------------------------- the reward model
def test_a_scalar_model_starts_at_zero():
    """A new reward model or value function says 0 at every position of every text."""
    ids, _ = world.listed()
    agree(ppo.ScalarModel(world.gpt(seed=1)).double()(ids), torch.zeros(X * N, world.T),
          "a fresh ScalarModel must be 0 everywhere")


def test_a_scalar_model_has_weights_of_its_own():
    """Training a critic moves neither the policy nor the reference that it was made from."""
    ref, (ids, mask) = world.gpt(seed=2), world.listed()
    before, critic = model.response_logp(ref, ids, mask), ppo.ScalarModel(ref)
    with torch.no_grad():
        for p in critic.parameters():
            p.add_(world.normal(*p.shape, seed=3))
    agree(model.response_logp(ref, ids, mask), before, "training a ScalarModel moved pi_ref: do they share weights?")


def test_the_reward_is_read_at_the_last_response_token():
    """r_phi(x, y) is the model's output at the last response token, hole or not: not at the last column, not at the prompt's
    end."""
    reward_model = scalar_model(seed=3)
    ids = torch.randint(0, world.V, (B, T), generator=world.generator(4))
    slow = torch.stack([reward_model(ids)[b, LAST[b]] for b in range(B)])
    agree(ppo.reward_of(reward_model, ids, MASK), slow,
          "the reward must be read at the last response token: on filler, or one early?")


def test_filler_does_not_change_the_reward():
    """Other ids in the filler, or more of it, leave r_phi(x, y) as it is."""
    reward_model, (ids, mask) = scalar_model(seed=3), world.listed()
    after = (~mask).int().flip(1).cumprod(1).flip(1).bool()
    wide, wide_mask = torch.nn.functional.pad(ids.masked_fill(after, 1), (0, 1), value=2), torch.nn.functional.pad(mask, (0, 1))
    agree(ppo.reward_of(reward_model, wide, wide_mask), ppo.reward_of(reward_model, ids, mask), "the reward depends on filler")


def test_the_reward_model_learns_the_preferences_and_keeps_its_best_epoch():
    """App. C.1: it ranks held-out pairs, and the accuracy reported is that of the model returned. The last half of its training

    is on swapped labels, which spoils it, so that the best epoch is not the last one.
    """
    pairs, held_out, cfg = labelled(80, seed=2), labelled(25, seed=12), SimpleNamespace(rm_lr=5e-3)
    spoilt = pairs.winner // 4 >= 40
    winner, loser = pairs.loser.where(spoilt, pairs.winner), pairs.winner.where(spoilt, pairs.loser)
    epochs = [torch.arange(first, first + 40).split(4) for first in (0, 0, 0, 40, 40, 40)]
    pairs = pairs._replace(winner=winner, loser=loser)
    fitted, reward_model = ppo.train_reward_model(cfg, world.gpt(seed=1).float(), pairs, held_out, epochs, "cpu"), ppo.ScalarModel(world.gpt(seed=1).float())
    reward_model.load_state_dict(fitted["model"])
    r = ppo.reward_of(reward_model, held_out.ids, held_out.mask)
    right = (r[held_out.winner] > r[held_out.loser]).double().mean().item()
    assert abs(fitted["accuracy"] - right) < 1e-6 and right > .75, \
        f"accuracy {right:.3f}, reported {fitted['accuracy']:.3f}: winner and loser swapped, or not the best epoch?"
    agree(torch.tensor([fitted["mean"], fitted["deviation"]]), torch.stack([r.mean(), r.std()]), "the reward's scale is not that of the epoch kept")


# ---------------------------------------------------------------------------------------------------- rewards and values
def test_token_rewards_sum_to_score_minus_the_price_of_the_log_ratio():
    """sum_t r_t = r(x, y) - c log(pi(y|x) / pi_ref(y|x)): Section 3's reward, whatever masked entries hold."""
    score, logp, ref_logp, c = world.normal(B, seed=1), episodes(2), episodes(3), .37
    rewards = ppo.token_rewards(score, logp, ref_logp, MASK, c)
    agree(rewards.sum(1), score - c * (logp - ref_logp).nansum(1),
          "token rewards must sum to score - c log(pi/pi_ref): the penalty's sign, masked entries, or a score given twice?")


def test_the_score_is_paid_on_the_last_real_token():
    """With c = 0 the rewards are the score at the last response token and 0 everywhere else."""
    score, slow = world.normal(B, seed=1), torch.zeros(B, T, dtype=torch.float64)
    slow[range(B), LAST] = score
    agree(ppo.token_rewards(score, episodes(2), episodes(3), MASK, 0.), slow,
          "the score must be paid once, on the last real token")


def test_each_token_pays_for_its_own_log_ratio():
    """With no score, r_t = -c (log pi - log pi_ref)(y_t) on response tokens, 0 elsewhere: a loop over entries."""
    logp, ref_logp, c, slow = episodes(2), episodes(3), 1.7, torch.zeros(B, T, dtype=torch.float64)
    for b, t in MASK.nonzero().tolist():
        slow[b, t] = c * (ref_logp[b, t] - logp[b, t])
    agree(ppo.token_rewards(torch.zeros(B, dtype=torch.float64), logp, ref_logp, MASK, c), slow,
          "r_t must be -c log(pi/pi_ref)(y_t): dear where pi is above pi_ref")


def test_the_mean_penalty_is_the_kl():
    """E_{y~pi}[-sum_t r_t] = KL(pi || pi_ref) at c = 1 and score 0: "k1" is unbiased, and its wrong-signed twin is -KL."""
    policy, ref, (ids, mask) = world.gpt(seed=1), world.gpt(seed=2), world.listed()
    tokens, ref_tokens = (model.response_logp(m, ids, mask) for m in (policy, ref))
    rewards = ppo.token_rewards(torch.zeros(X * N), tokens, ref_tokens, mask, 1.)
    logp = world.table(policy)
    assert (world.kl(logp, world.table(ref)) > .1).all(), "KL must not be near 0 for this test to tell it from -KL"
    agree(world.expectation(logp, -rewards.sum(1).view(X, N)), world.kl(logp, world.table(ref)),
          "E_pi[k1] must be KL(pi || pi_ref): the log-ratio's sign, or the order of pi and pi_ref?")


def values_of(critic, ids, mask):
    return critic.head(ppo.states_of(critic, ids)).squeeze(-1).masked_fill(~mask, 0.)


def test_the_value_of_a_token_is_read_before_it():
    """V belongs to the state in which a token was chosen: the critic's output one position earlier, and 0 off the response."""
    critic, (ids, mask), slow = scalar_model(seed=5), world.listed(), torch.zeros(X * N, world.T, dtype=torch.float64)
    everywhere = critic(ids)
    for b, t in mask.nonzero().tolist():
        slow[b, t] = everywhere[b, t - 1]
    agree(values_of(critic, ids, mask), slow, "the value of a token must not know that token: read one position before it")


# ------------------------------------------------------------------------------------------------------------ advantages
def slow_gae(rewards, values, gamma, lam):
    """The definition: A_i = sum over k >= i of (gamma lam)^(k - i) delta_k over the real tokens of a row, V = 0 after the
    last."""
    slow = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        at = [t for t in range(T) if MASK[b, t]]
        V = [values[b, t] for t in at] + [0.]
        delta = [rewards[b, t] + gamma * V[k + 1] - V[k] for k, t in enumerate(at)]
        for i, t in enumerate(at):
            slow[b, t] = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(at)))
    return slow


def test_gae_is_the_discounted_sum_of_errors():
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, a double loop; holes are skipped, masked entries unread, nothing is whitened."""
    rewards, values = episodes(1), episodes(2)
    agree(ppo.gae(rewards, values, MASK, .9, .8)[0], slow_gae(rewards, values, .9, .8),
          "gae must be the sum of (gamma lam)^k delta: whitened, a masked value or reward used, gamma or lambda lost?")


def test_with_lambda_one_the_advantage_is_return_minus_value():
    """lambda = 1: A_t = sum_{s >= t} gamma^(s - t) r_s - V_t, the values between cancel."""
    rewards, values, gamma = episodes(3), episodes(4), .85
    slow = torch.zeros(B, T, dtype=torch.float64)
    for b, t in MASK.nonzero().tolist():
        later = [rewards[b, s] for s in range(t, T) if MASK[b, s]]
        slow[b, t] = sum(gamma ** k * r for k, r in enumerate(later)) - values[b, t]
    agree(ppo.gae(rewards, values, MASK, gamma, 1.)[0], slow, "with lambda 1 an advantage must be the return minus the value")


def test_the_value_after_the_last_token_is_zero():
    """The last response token's advantage is r - V and nothing more, even where a critic's value stands behind it."""
    rewards, values = world.normal(B, T, seed=1), world.normal(B, T, seed=2) + 100.
    rows = torch.arange(B), torch.tensor(LAST)
    agree(ppo.gae(rewards, values, MASK, .9, .8)[0][rows], (rewards - values)[rows],
          "an episode ends: the value after it must be 0")


def test_returns_are_advantages_plus_values():
    """The critic's target is A_t + V_t on response tokens and 0 elsewhere."""
    values = episodes(6)
    advantages, returns = ppo.gae(episodes(5), values, MASK, .9, .7)
    agree(returns, (slow_gae(episodes(5), values, .9, .7) + values).nan_to_num(0.), "returns must be advantages + values")


def test_whitening_counts_real_tokens_alone():
    """Over response tokens mean 0 and standard deviation 1, one affine map for all of them; 0 elsewhere; NaN there unread."""
    x = 5. + 3. * episodes(7)
    real = [v for v in x.flatten().tolist() if v == v]
    mean = sum(real) / len(real)
    spread = (sum((v - mean) ** 2 for v in real) / len(real)) ** .5
    agree(ppo.whiten(x, MASK), ((x - mean) / spread).nan_to_num(0.),
          "whiten must use the mean and the spread of real tokens alone",
          tolerance=1e-7)


# -------------------------------------------------------------------------------------------------------------- clipping
def ratios_and_advantages():
    """Every region of the clip: ratios from far below 1 - e to far above 1 + e, with advantages of both signs -> three (M,)."""
    ratios, advantages = torch.tensor([.3, .75, .95, 1.1, 1.27, 4.]).double(), torch.tensor([-2.3, -.4, .7, 3.]).double()
    rho, advantage = torch.cartesian_prod(ratios, advantages).T
    old = world.normal(len(rho), seed=1) - 2.
    return old + rho.log(), old, advantage


def test_policy_loss_is_the_pessimistic_bound():
    """A good token earns rho A, up to 1 + e; a bad one costs rho A, at least at 1 - e; the loss is the negative of that."""
    (logp, old, advantage), e = ratios_and_advantages(), .23
    slow = []
    for a, b, A in zip(logp.tolist(), old.tolist(), advantage.tolist()):
        rho = math.exp(a) / math.exp(b)
        slow.append(-A * (min(rho, 1 + e) if A > 0 else max(rho, 1 - e)))
    agree(ppo.policy_loss(logp, old, advantage, e), torch.tensor(slow, dtype=torch.float64),
          "the policy loss must be -min(rho A, clip(rho) A): sign, ratio upside down, max for min, or no clip?")


def test_the_policy_gradient_raises_good_tokens_until_the_clip():
    """d loss / d log pi = -rho A, and 0 once a good token is above 1 + e or a bad one below 1 - e."""
    (logp, old, advantage), e = ratios_and_advantages(), .23
    logp.requires_grad_()
    gradient, = torch.autograd.grad(ppo.policy_loss(logp, old, advantage, e).sum(), logp)
    rho = (logp - old).exp().detach()
    done = torch.where(advantage > 0, rho > 1 + e, rho < 1 - e)
    agree(gradient, (-rho * advantage).masked_fill(done, 0.), "descent must raise log pi where A > 0, and stop at the clip")


def test_value_loss_is_the_worse_of_plain_and_clipped():
    """Half the larger squared error of V and of V_old + clip(V - V_old, -e, e), a loop over all regions."""
    value, old, returns = torch.cartesian_prod(*torch.tensor(
        [[-1.5, -.1, .05, .6], [0., .1, -.2, .3], [-.7, .02, .2, 2.]]).double()).T
    slow = []
    for v, o, r in zip(value.tolist(), old.tolist(), returns.tolist()):
        near = min(max(v, o - .15), o + .15)
        slow.append(max(abs(v - r), abs(near - r)) ** 2 / 2)
    agree(ppo.value_loss(value, old, returns, .15), torch.tensor(slow, dtype=torch.float64),
          "the value loss must be half the larger squared error")


def test_the_value_gradient_points_at_the_return():
    """d loss / dV = V - R, or 0 where the clipped value is the worse one: never away from the return."""
    value, old, returns = world.normal(3, 50, seed=9)
    value.requires_grad_()
    gradient, = torch.autograd.grad(ppo.value_loss(value, old, returns, .3).sum(), value)
    near = torch.max(torch.min(value, old + .3), old - .3)
    stuck = ((near - returns).abs() > (value - returns).abs()).detach()
    agree(gradient, (value - returns).detach().masked_fill(stuck, 0.), "descent must move V towards its return")


# -------------------------------------------------------------------------------------------------------- the controller
def test_the_price_of_kl_moves_by_a_clipped_proportion():
    """c <- c (1 + clip(KL / target - 1, -.2, .2) episodes / horizon): dearer above the target, cheaper below, unmoved at it."""
    kls, moves = [40., 5.5, 5., 4.5, 0.], [.2, .1, 0., -.1, -.2]
    result = [ppo.adapt(.3, kl, 5., 64, 800.) for kl in kls]
    agree(torch.tensor(result, dtype=torch.float64), torch.tensor([.3 * (1 + m * 64 / 800) for m in moves], dtype=torch.float64),
          "the controller must raise c above the target and lower it below, by at most 20% of episodes / horizon")


def test_the_controller_converges_to_its_target():
    """A policy that answers the price c with KL(c) = 2 / (c + .1) ends at the target KL, from a price far too high or too low."""
    ends = []
    for c in (30., .01):
        for _ in range(400):
            c = ppo.adapt(c, 2 / (c + .1), 3., 48, 200.)
        ends.append(2 / (c + .1))
    agree(torch.tensor(ends), torch.tensor([3., 3.]), "the controller must steer the sequence KL to its target", tolerance=1e-5)


# ------------------------------------------------------------------------------------------------------------ the recipe
def test_a_roll_out_records_what_its_names_say():
    """Batch.ref_logp sums to log pi_ref(y|x), .logp to log pi(y|x), .value is the critic's, on the rows that were sampled."""
    policy, ref, critic = world.gpt(seed=1), world.gpt(seed=2), scalar_model(seed=3)
    batch = roll_out(policy, ref, critic, count=5, seed=6)
    lengths = world.prompts()[1].repeat_interleave(5)
    mask = model.response_mask(batch.ids, lengths, MAX_TOKENS, END)
    recorded = torch.stack([batch.logp.sum(1), batch.ref_logp.sum(1), batch.value.sum(1), batch.mask.sum(1)])
    slow = torch.stack([*(model.sequence_logp(m(batch.ids), batch.ids, mask) for m in (policy, ref)),
                        values_of(critic, batch.ids, mask).sum(1), mask.sum(1)])
    agree(recorded, slow, "the roll-out must record log pi, log pi_ref and V of its own rows: policy and reference mixed up?")


def test_a_roll_out_is_a_constant():
    """No gradient flows through what was recorded: not to pi_old, not to the value targets, and least of all to pi_ref."""
    batch = roll_out(world.gpt(seed=1), world.gpt(seed=2), scalar_model(seed=3), count=2, seed=6)
    tracked = [name for name, tensor in zip(batch._fields, batch) if tensor.requires_grad]
    assert not tracked, f"{tracked} of a roll-out carry gradients: the reference is not frozen, or pi_old moves with pi"


def test_the_ratio_is_one_on_the_first_minibatch():
    """Until the first step pi = pi_old on every token; `update` is watched while it takes no step at all (learning rate 0)."""
    policy, seen, plain = world.gpt(seed=1), [], ppo.policy_loss
    batch, critic = roll_out(policy, world.gpt(seed=2), scalar_model(seed=3), count=5, seed=6), scalar_model(seed=3)
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=0.)
    ppo.policy_loss = lambda logp, old_logp, *rest: seen.append((logp - old_logp).exp()) or plain(logp, old_logp, *rest)
    try:
        ppo.update(policy, critic, optimizer, batch, .3, 2, 3, world.generator(1))
    finally:
        ppo.policy_loss = plain
    agree(torch.cat(seen), torch.ones(2 * int(batch.mask.sum())),
          "the ratio must be 1 before the first step, on every response token "
          "once an epoch: does the update score other tokens than the roll-out did, or otherwise?")


def test_the_first_loss_of_an_update_is_the_critics():
    """With ratio 1 on one minibatch of all, whitened advantages have mean 0, so the loss is .1 mean (V - R)^2 / 2."""
    policy, ref, critic = world.gpt(seed=1), world.gpt(seed=2), scalar_model(seed=3)
    batch = roll_out(policy, ref, critic, count=9, seed=6)
    rewards = ppo.token_rewards(batch.score, batch.logp, batch.ref_logp, batch.mask, .3)
    _, returns = ppo.gae(rewards, batch.value, batch.mask, 1., .95)
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=0.)
    loss = ppo.update(policy, critic, optimizer, batch, .3, 1, len(batch.ids), world.generator(1))
    slow = .1 * ((batch.value - returns)[batch.mask] ** 2).mean() / 2
    agree(torch.tensor(loss, dtype=torch.float64), slow,
          "the first loss must be value_weight (V - R)^2 / 2: advantages not whitened, "
          "the price of KL lost, or the critic's loss weighed otherwise?", tolerance=1e-7)


def test_updates_move_the_policy_and_the_critics_head_and_nothing_else():
    """A PPO step leaves pi_ref and the network under the critic exactly where they were, also when both were made from pi_ref."""
    ref = world.gpt(seed=2)
    policy, critic, before = copy.deepcopy(ref), scalar_model(seed=2), copy.deepcopy(ref.state_dict())
    batch = roll_out(policy, ref, critic, count=3, seed=5)
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=.1)
    ppo.update(policy, critic, optimizer, batch, .3, 1, 99, world.generator(1))
    moved = [torch.equal(a, b) for a, b in zip(before.values(), policy.state_dict().values())]
    assert not all(moved), "the update did not move the policy"
    assert all(torch.equal(before[name], p) for name, p in ref.state_dict().items()), \
        "a PPO step moved pi_ref: it must stay frozen"
    assert all(torch.equal(before[name], p) for name, p in critic.gpt.state_dict().items()), "a PPO step moved the critic's frozen states"


def train(ref, steps, target, horizon):
    """PPO from pi_ref on `total`: the policy, and what train_ppo yielded."""
    cfg = SimpleNamespace(ppo_lr=1e-2, ppo_steps=steps, ppo_coefficient=.4, ppo_batch=64, completions=4, max_tokens=MAX_TOKENS,
                          ppo_epochs=3, ppo_minibatch=32, ppo_horizon=horizon)
    policy = copy.deepcopy(ref)
    return policy, list(ppo.train_ppo(cfg, policy, ref, world.prompts(), total, target, END, world.generator(3)))


def test_ppo_raises_the_objective():
    """Eq. 3 by enumeration: E_pi[r] - c KL(pi || pi_ref) is higher after PPO than at pi_ref, by most of what is to be had."""
    ref, r, c = world.gpt(seed=2).float(), total(*world.listed()).view(X, N).double(), .4
    policy, _ = train(ref, steps=12, target=1., horizon=1e9)
    ref_logp, logp = (world.table(p.double()).detach() for p in (ref, policy))
    start = world.expectation(ref_logp, r)
    gain = world.expectation(logp, r) - c * world.kl(logp, ref_logp) - start
    most = c * torch.logsumexp(ref_logp + r / c, 1) - start
    assert (gain > .5 * most).all(), \
        f"PPO gained {gain.tolist()} of {most.tolist()} on the two prompts: sign of the advantage or of c?"


def test_ppo_starts_at_the_reference_and_prices_kl_by_its_controller():
    """The first roll-out is pi_ref's, so its KL is exactly 0; every later price of KL is the controller's answer to the last
    KL."""
    _, steps = train(world.gpt(seed=2).float(), steps=5, target=.02, horizon=300.)
    slow = [.4 / .02]
    for step in steps[:-1]:
        slow.append(slow[-1] * (1 + min(max(step["rollout_kl"] / .02 - 1, -.2), .2) * 64 / 300))
    assert steps[0]["rollout_kl"] == 0., f"the policy starts at pi_ref, so its first KL is 0, not {steps[0]['rollout_kl']}"
    agree(torch.tensor([s["coefficient"] for s in steps]), torch.tensor(slow), "the price of KL must follow the controller")
