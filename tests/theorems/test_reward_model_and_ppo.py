"""The pipeline that DPO replaces, piece by piece: reward model, token rewards, values, advantages,
clipped losses, and the KL controller. test_ppo_update.py puts the pieces together.

`episodes` returns B = 4 episodes of T = 7 positions. Their responses begin and end at different
positions, and one of them has a hole. Entries outside the mask are NaN, so a function that uses
one returns NaN.
"""
import math

import torch
import torch.nn.functional as F

import data
import model
import ppo
import world
from world import END, MAX_TOKENS, N, X, agree

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0],
                     [0, 1, 1, 0, 0, 0, 0],
                     [0, 0, 0, 1, 1, 0, 1],
                     [0, 0, 1, 0, 0, 0, 0]]).bool()
B, T = MASK.shape
LAST = [5, 2, 6, 2]    # the position of the last response token of each row


def episodes(seed):
    """Return normal numbers (B, T), NaN where MASK is False."""
    return world.normal(B, T, seed=seed).masked_fill(~MASK, torch.nan)


def scalar_model(seed):
    """Return a ScalarModel in float64 whose head is not 0."""
    critic = ppo.ScalarModel(world.gpt(seed)).double()
    with torch.no_grad():
        critic.head.weight.copy_(world.normal(1, 12, seed=seed + 1))
    return critic


def token_id_reward(ids, mask):
    """Return a reward that is easy to learn: a third of the sum of the response's token ids.

    END does not count. (B, T), (B, T) -> (B,)
    """
    return (ids * mask * (ids != END)).sum(1) / 3.


def labelled(count, seed):
    """Return preferences by `token_id_reward` among 4 responses to each of `count` prompts."""
    prompts = torch.randint(0, END, (count, 3), generator=world.generator(seed))
    lengths = torch.full((count,), 3)
    ids, mask = model.generate(world.gpt(seed=4), (prompts, lengths), 4, MAX_TOKENS, END,
                               world.generator(seed))
    reward = token_id_reward(ids, mask).view(count, 4)
    winner, loser = data.label_pairs(reward, "deterministic", 1., world.generator(seed))
    return data.Preferences(ids, mask, torch.zeros(len(ids)), winner, loser, 4)


# ------------------------------------------------------------------------------- the reward model
def test_a_scalar_model_starts_at_zero():
    """A new reward model or value function is 0 at every position of every text."""
    ids, _ = world.listed()
    output = ppo.ScalarModel(world.gpt(seed=1)).double()(ids)
    agree(output, torch.zeros(X * N, world.T), "a new ScalarModel must be 0 everywhere")


def test_a_scalar_model_has_weights_of_its_own():
    """Training a critic does not change the model that it was made from."""
    ids, mask = world.listed()
    ref = world.gpt(seed=2)
    before = model.response_token_logp(ref, ids, mask)
    critic = ppo.ScalarModel(ref)
    with torch.no_grad():
        for p in critic.parameters():
            p.add_(world.normal(*p.shape, seed=3))
    agree(model.response_token_logp(ref, ids, mask), before,
          "training a ScalarModel changed pi_ref: do they share weights?")


def test_the_reward_is_read_at_the_last_response_token():
    """r_phi(x, y) is the model's output at the last response token, also if the mask has a hole.

    It is not read at the last column or at the end of the prompt.
    """
    reward_model = scalar_model(seed=3)
    ids = torch.randint(0, world.V, (B, T), generator=world.generator(4))
    output = reward_model(ids)
    expected = torch.stack([output[b, LAST[b]] for b in range(B)])
    agree(ppo.predict_reward(reward_model, ids, MASK), expected,
          "the reward must be read at the last response token: on filler, or one position early?")


def test_filler_does_not_change_the_reward():
    """r_phi(x, y) is the same with other ids in the filler, and with more filler."""
    reward_model = scalar_model(seed=3)
    ids, mask = world.listed()
    is_filler = (~mask).int().flip(1).cumprod(1).flip(1).bool()
    wider_ids = F.pad(ids.masked_fill(is_filler, 1), (0, 1), value=2)
    wider_mask = F.pad(mask, (0, 1))
    agree(ppo.predict_reward(reward_model, wider_ids, wider_mask),
          ppo.predict_reward(reward_model, ids, mask),
          "the reward depends on filler")


def swap_labels_of_second_half(pairs):
    """Return the preferences with winner and loser exchanged for prompts 40 and later."""
    is_spoilt = pairs.winner // 4 >= 40
    winner = torch.where(is_spoilt, pairs.loser, pairs.winner)
    loser = torch.where(is_spoilt, pairs.winner, pairs.loser)
    return pairs._replace(winner=winner, loser=loser)


def test_the_reward_model_learns_the_preferences_and_keeps_its_best_epoch():
    """App. C.1: it ranks held-out pairs, and the reported accuracy is that of the returned model.

    The labels of the last three epochs are swapped. They spoil the model, so its best epoch is not
    its last.
    """
    pairs = swap_labels_of_second_half(labelled(80, seed=2))
    held_out = labelled(25, seed=12)
    right_epoch = torch.arange(0, 40).split(4)
    swapped_epoch = torch.arange(40, 80).split(4)
    epochs = [right_epoch] * 3 + [swapped_epoch] * 3
    ref = world.gpt(seed=1).float()
    fitted = ppo.train_reward_model(ref, pairs, held_out, epochs, lr=5e-3, device="cpu")
    reward_model = ppo.ScalarModel(ref)
    reward_model.load_state_dict(fitted["state_dict"])
    r = ppo.predict_reward(reward_model, held_out.ids, held_out.mask)
    accuracy = (r[held_out.winner] > r[held_out.loser]).double().mean().item()
    assert abs(fitted["accuracy"] - accuracy) < 1e-6 and accuracy > .75, \
        f"the accuracy is {accuracy:.3f}, the reported one {fitted['accuracy']:.3f}: are winner " \
        "and loser swapped, or is it not the best epoch?"
    scale = torch.tensor([fitted["mean"], fitted["std"]])
    agree(scale, torch.stack([r.mean(), r.std()]),
          "mean and deviation of the reward are not those of the epoch that was kept")


# ----------------------------------------------------------------------------- rewards and values
def test_token_rewards_sum_to_score_minus_the_price_of_the_log_ratio():
    """sum_t r_t = r(x, y) - c log(pi(y|x) / pi_ref(y|x)), the reward of Section 3.

    Masked entries are ignored.
    """
    c = .37
    score, logp, ref_logp = world.normal(B, seed=1), episodes(2), episodes(3)
    rewards = ppo.token_rewards(score, logp, ref_logp, MASK, c)
    agree(rewards.sum(1), score - c * (logp - ref_logp).nansum(1),
          "token rewards must sum to score - c log(pi/pi_ref): is the sign of the penalty wrong, "
          "are masked entries used, or is the score given twice?")


def test_the_score_is_paid_on_the_last_real_token():
    """With c = 0, the rewards are the score at the last response token and 0 everywhere else."""
    score = world.normal(B, seed=1)
    expected = torch.zeros(B, T, dtype=torch.float64)
    expected[range(B), LAST] = score
    agree(ppo.token_rewards(score, episodes(2), episodes(3), MASK, 0.), expected,
          "the score must occur once, on the last response token")


def test_each_token_pays_for_its_own_log_ratio():
    """Without a score, r_t = -c (log pi - log pi_ref)(y_t) on response tokens and 0 elsewhere.

    The specification is a loop over entries.
    """
    c = 1.7
    logp, ref_logp = episodes(2), episodes(3)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b, t in MASK.nonzero().tolist():
        expected[b, t] = c * (ref_logp[b, t] - logp[b, t])
    no_score = torch.zeros(B, dtype=torch.float64)
    agree(ppo.token_rewards(no_score, logp, ref_logp, MASK, c), expected,
          "r_t must be -c log(pi/pi_ref)(y_t), negative where pi is above pi_ref")


def test_the_mean_penalty_is_the_kl():
    """E_{y~pi}[-sum_t r_t] = KL(pi || pi_ref) at c = 1 and score 0: "k1" is unbiased.

    With the wrong sign, the mean would be -KL.
    """
    policy, ref = world.gpt(seed=1), world.gpt(seed=2)
    ids, mask = world.listed()
    token_logp = model.response_token_logp(policy, ids, mask)
    ref_token_logp = model.response_token_logp(ref, ids, mask)
    rewards = ppo.token_rewards(torch.zeros(X * N), token_logp, ref_token_logp, mask, 1.)
    logp = world.table(policy)
    kl = world.kl(logp, world.table(ref))
    assert (kl > .1).all(), "this test needs a KL far from 0, to tell it from -KL"
    agree(world.expectation(logp, -rewards.sum(1).view(X, N)), kl,
          "E_pi[k1] must be KL(pi || pi_ref): is the sign of the log-ratio wrong, or the order of "
          "pi and pi_ref?")


def values_of(critic, ids, mask):
    """Return the critic's value before each response token, 0 elsewhere: (B, T)."""
    states = ppo.states_before_tokens(critic, ids)
    return critic.head(states).squeeze(-1).masked_fill(~mask, 0.)


def test_the_value_of_a_token_is_read_before_it():
    """V belongs to the state in which a token is chosen: the critic's output one position before.

    It is 0 outside the response.
    """
    critic = scalar_model(seed=5)
    ids, mask = world.listed()
    output = critic(ids)
    expected = torch.zeros(X * N, world.T, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        expected[b, t] = output[b, t - 1]
    agree(values_of(critic, ids, mask), expected,
          "the value of a token must not depend on that token: read it one position before")


# ------------------------------------------------------------------------------------- advantages
def slow_gae(rewards, values, gamma, lam):
    """Return the advantages by their definition: (B, T), 0 outside MASK.

    A_i = sum over k >= i of (gamma lam)^(k - i) delta_k over the response tokens of a row, where
    the value after the last response token is 0.
    """
    advantages = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        positions = [t for t in range(T) if MASK[b, t]]
        V = [values[b, t] for t in positions] + [0.]
        delta = [rewards[b, t] + gamma * V[k + 1] - V[k] for k, t in enumerate(positions)]
        for i, t in enumerate(positions):
            terms = [(gamma * lam) ** (k - i) * delta[k] for k in range(i, len(positions))]
            advantages[b, t] = sum(terms)
    return advantages


def test_gae_is_the_discounted_sum_of_errors():
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, computed by a double loop.

    Holes are skipped, masked entries are ignored, and nothing is whitened.
    """
    rewards, values = episodes(1), episodes(2)
    advantages, _ = ppo.gae(rewards, values, MASK, .9, .8)
    agree(advantages, slow_gae(rewards, values, .9, .8),
          "gae must be the sum of (gamma lam)^k delta: is it whitened, is a masked value or "
          "reward used, or is gamma or lambda forgotten?")


def test_with_lambda_one_the_advantage_is_return_minus_value():
    """lambda = 1: A_t = sum_{s >= t} gamma^(s - t) r_s - V_t, because the values between cancel."""
    gamma = .85
    rewards, values = episodes(3), episodes(4)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b, t in MASK.nonzero().tolist():
        future = [rewards[b, s] for s in range(t, T) if MASK[b, s]]
        expected[b, t] = sum(gamma ** k * r for k, r in enumerate(future)) - values[b, t]
    advantages, _ = ppo.gae(rewards, values, MASK, gamma, 1.)
    agree(advantages, expected, "with lambda 1, an advantage must be the return minus the value")


def test_the_value_after_the_last_token_is_zero():
    """The last advantage is r - V, even if the critic has a value after the last response token."""
    rewards = world.normal(B, T, seed=1)
    values = world.normal(B, T, seed=2) + 100.
    advantages, _ = ppo.gae(rewards, values, MASK, .9, .8)
    last = torch.arange(B), torch.tensor(LAST)
    agree(advantages[last], (rewards - values)[last],
          "an episode ends with its response: the value after it must be 0")


def test_returns_are_advantages_plus_values():
    """The critic's target is A_t + V_t on response tokens and 0 elsewhere."""
    rewards, values = episodes(5), episodes(6)
    _, returns = ppo.gae(rewards, values, MASK, .9, .7)
    expected = slow_gae(rewards, values, .9, .7) + values
    agree(returns, expected.nan_to_num(0.), "returns must be advantages + values")


def test_whitening_counts_real_tokens_alone():
    """Over response tokens, mean 0 and standard deviation 1 by one affine map; 0 elsewhere.

    Entries outside the mask are NaN here, and must be ignored.
    """
    x = 5. + 3. * episodes(7)
    entries = x[MASK].tolist()
    mean = sum(entries) / len(entries)
    deviation = (sum((entry - mean) ** 2 for entry in entries) / len(entries)) ** .5
    expected = (x - mean) / deviation
    agree(ppo.whiten(x, MASK), expected.nan_to_num(0.),
          "whiten must use mean and standard deviation of response tokens alone", tolerance=1e-7)


# --------------------------------------------------------------------------------- clipped losses
def ratios_and_advantages():
    """Return log pi, log pi_old and advantages, (M,) each, that cover every region of the clip.

    Ratios are from far below 1 - e to far above 1 + e, and advantages have both signs.
    """
    ratios = torch.tensor([.3, .75, .95, 1.1, 1.27, 4.]).double()
    advantages = torch.tensor([-2.3, -.4, .7, 3.]).double()
    rho, advantage = torch.cartesian_prod(ratios, advantages).T
    old_logp = world.normal(len(rho), seed=1) - 2.
    return old_logp + rho.log(), old_logp, advantage


def test_policy_loss_is_the_pessimistic_bound():
    """The loss is -rho A, with rho at most 1 + e if A > 0, and at least 1 - e if A < 0."""
    e = .23
    logp, old_logp, advantage = ratios_and_advantages()
    expected = []
    for new, old, A in zip(logp.tolist(), old_logp.tolist(), advantage.tolist()):
        rho = math.exp(new) / math.exp(old)
        bounded = min(rho, 1 + e) if A > 0 else max(rho, 1 - e)
        expected.append(-A * bounded)
    agree(ppo.policy_loss(logp, old_logp, advantage, e),
          torch.tensor(expected, dtype=torch.float64),
          "the policy loss must be -min(rho A, clip(rho) A): is the sign wrong, the ratio "
          "inverted, max used for min, or the clip missing?")


def test_the_policy_gradient_raises_good_tokens_until_the_clip():
    """d loss / d log pi = -rho A, and 0 for a good token above 1 + e or a bad one below 1 - e."""
    e = .23
    logp, old_logp, advantage = ratios_and_advantages()
    logp.requires_grad_()
    loss = ppo.policy_loss(logp, old_logp, advantage, e).sum()
    gradient, = torch.autograd.grad(loss, logp)
    rho = (logp - old_logp).exp().detach()
    is_clipped = torch.where(advantage > 0, rho > 1 + e, rho < 1 - e)
    agree(gradient, (-rho * advantage).masked_fill(is_clipped, 0.),
          "descent must raise log pi where A > 0, and stop at the clip")


def test_value_loss_is_the_worse_of_plain_and_clipped():
    """Half the larger squared error of V and of V_old + clip(V - V_old, -e, e).

    The specification is a loop over points in all regions of the clip.
    """
    e = .15
    grid = torch.tensor([[-1.5, -.1, .05, .6],
                         [0., .1, -.2, .3],
                         [-.7, .02, .2, 2.]]).double()
    value, old_value, returns = torch.cartesian_prod(*grid).T
    expected = []
    for v, old, R in zip(value.tolist(), old_value.tolist(), returns.tolist()):
        clipped = min(max(v, old - e), old + e)
        expected.append(max(abs(v - R), abs(clipped - R)) ** 2 / 2)
    agree(ppo.value_loss(value, old_value, returns, e),
          torch.tensor(expected, dtype=torch.float64),
          "the value loss must be half the larger squared error")


def test_the_value_gradient_points_at_the_return():
    """d loss / dV = V - R, or 0 where the clipped value has the larger error."""
    e = .3
    value, old_value, returns = world.normal(3, 50, seed=9)
    value.requires_grad_()
    gradient, = torch.autograd.grad(ppo.value_loss(value, old_value, returns, e).sum(), value)
    clipped = torch.max(torch.min(value, old_value + e), old_value - e)
    is_flat = ((clipped - returns).abs() > (value - returns).abs()).detach()
    agree(gradient, (value - returns).detach().masked_fill(is_flat, 0.),
          "descent must move V towards its return, never away from it")


# --------------------------------------------------------------------------------- the controller
def test_the_price_of_kl_moves_by_a_clipped_proportion():
    """c <- c (1 + clip(KL / target - 1, -.2, .2) episodes / horizon).

    The price rises above the target, falls below it, and stays the same at the target.
    """
    c, target, episode_count, horizon = .3, 5., 64, 800.
    kls = [40., 5.5, 5., 4.5, 0.]
    errors = [.2, .1, 0., -.1, -.2]    # clip(KL / target - 1, -.2, .2)
    prices = [ppo.adapt_kl_coef(c, kl, target, episode_count, horizon) for kl in kls]
    expected = [c * (1 + error * episode_count / horizon) for error in errors]
    agree(torch.tensor(prices, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64),
          "the controller must raise c above the target and lower it below, by at most 20% of "
          "episodes / horizon")


def test_the_controller_converges_to_its_target():
    """A policy whose KL at price c is 2 / (c + .1) ends at the target KL.

    The initial price is far too high in one case and far too low in the other.
    """
    final_kls = []
    for c in (30., .01):
        for _ in range(400):
            c = ppo.adapt_kl_coef(c, 2 / (c + .1), 3., 48, 200.)
        final_kls.append(2 / (c + .1))
    agree(torch.tensor(final_kls), torch.tensor([3., 3.]),
          "the controller must steer the sequence KL to its target", tolerance=1e-5)
