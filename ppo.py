"""The pipeline that DPO replaces: a reward model (Eq. 2), then PPO on Eq. 3 (Section 3).

One PPO step on a batch of episodes: 1. roll out; 2. token rewards; 3. advantages; 4. clipped
updates; 5. adapt the KL coefficient c. The score is the reward divided by its standard deviation
(b), so the beta of Eq. 3 is c times that standard deviation.

PPO here is not a straw man. These details are all present, and tested (Schulman et al. 2017, 2016;
Ziegler et al. 2019):
  (a) Reward of a token: -c (log pi_old - log pi_ref), the "k1" penalty, fixed while a batch is
      reused; the score once, on the last response token.                    -> `token_rewards`
  (b) The score is normalised by one affine map, fixed from samples of pi_ref. (Whitening the scores
      of each batch would change beta.)  -> `make_true_score`, `make_learned_score` in train.py
  (c) The coefficient c steers the *sequence* KL to a target; its horizon is in episodes.
                                                                             -> `adapt_kl_coef`
  (d) Generalised advantage estimation with gamma 1, lambda .95; masked whitening of advantages,
      which scales score and penalty alike.                                  -> `gae`, `whiten`
  (e) Clipped ratio and clipped values (.2), minibatches. The ratio is 1 on the first minibatch.
      (Several epochs over a batch gained nothing here.)          -> `policy_loss`, `value_loss`
  (f) A critic of its own, not a head on the policy, so their gradients do not compete. It is fitted
      to the scores of pi_ref's samples before PPO begins; then only its last layer learns.
                                                                             -> `pretrain_critic`
  (g) Adam with epsilon 1e-5 and beta2 .95 (.999 is usual; see `train_on_pairs` in train.py);
      learning rate warmed up, then annealed to 0; no dropout; temperature 1 throughout.
Left out: an entropy bonus (the KL penalty already contains one), a penalty for a missing end token
and reward clipping (either would change the true reward), gradient clipping and early stopping on
KL (neither was needed).

An *objective* is maximised, a *loss* is minimised.
Shapes: B episodes, C completions, X prompts, P tokens of the longest prompt, T positions, M
response tokens, W width; a mask (B, T) marks response tokens.
"""
import copy
from functools import partial
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Preferences, select_prompts
from model import (GPT, cpu_state_dict, last_response_token, lr_schedule, map_batches,
                   response_mask, response_token_logp, sample, trimmed_width)


# ------------------------------------------------------------------------------- the reward model
class ScalarModel(nn.Module):
    """A GPT with one number at every position, initially 0: ids (B, T) -> (B, T).

    It serves as reward model and as value function.
    """
    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = copy.deepcopy(gpt).requires_grad_(True)    # it starts from the frozen reference
        weight = gpt.token.weight
        self.head = nn.Linear(gpt.config.width, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gpt.hidden(ids)).squeeze(-1)


def predict_reward(model: ScalarModel, ids: Tensor, mask: Tensor) -> Tensor:
    """r_phi(x, y), read at the last response token, which has seen all of y: (B, T) -> (B,)."""
    return model(ids).gather(1, last_response_token(mask)[:, None]).squeeze(1)


def reward_model_loss(r_w: Tensor, r_l: Tensor) -> Tensor:
    """-log sigma(r_phi(x, y_w) - r_phi(x, y_l))                                   Eq. 2 -> (B,)"""
    return -F.logsigmoid(r_w - r_l)


def train_reward_model(ref: GPT, preferences: Preferences, held_out: Preferences,
                       batches_of_epochs: list[list[Tensor]], lr: float, device: str) -> dict:
    """Minimise Eq. 2, starting from the SFT model; keep the epoch with the best held-out accuracy.

    App. C.1 chooses the epoch in the same way, but starts from the model before SFT.
    `batches_of_epochs` has a list of batches for each epoch; a batch is the indices of some
    prompts. Returns the parameters of a ScalarModel (`state_dict`), its `accuracy` on held-out
    pairs, and `mean` and `std` of its rewards of the held-out completions.
    """
    model = ScalarModel(ref)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0., fused=True)
    scheduler = lr_schedule(optimizer, sum(map(len, batches_of_epochs)))
    best = {"accuracy": -1.}
    for batches in batches_of_epochs:
        for indices in batches:
            batch = select_prompts(preferences, indices)
            r = predict_reward(model, batch.ids.to(device), batch.mask.to(device))
            loss = reward_model_loss(r[batch.winner], r[batch.loser]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        predict = partial(predict_reward, model)
        r = map_batches(predict, held_out.ids.to(device), held_out.mask.to(device)).cpu()
        accuracy = (r[held_out.winner] > r[held_out.loser]).float().mean().item()
        print(f"reward model: last loss {loss.item():.3f}, held-out accuracy {accuracy:.3f}",
              flush=True)
        if accuracy > best["accuracy"]:
            best = {"state_dict": cpu_state_dict(model), "accuracy": accuracy,
                    "mean": r.mean().item(), "std": r.std().item()}
    return best


# --------------------------------------------------------------------------------- PPO, in pieces
def token_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor,
                  kl_coef: float) -> Tensor:
    """r_t = -c (log pi - log pi_ref)(y_t), plus the score on the last response token.

    score (B,), the rest (B, T) -> (B, T). The sum over t is score - c log(pi / pi_ref):
    Eq. 3 in units of the score, with a one-sample estimate of the KL.
    """
    reward = -kl_coef * (logp - ref_logp).masked_fill(~mask, 0.)
    last = last_response_token(mask)[:, None]
    return reward.scatter_add(1, last, score[:, None].to(reward.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V_{t+1} - V_t

    The estimator is Eq. 16 of Schulman et al. 2016. V and A are 0 after the last response token.
    All (B, T). Entries outside the mask are skipped, even NaN, and even between response tokens.
    Returns the advantages and the returns A + V, both 0 outside the mask.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    value = advantage = torch.zeros_like(values[:, 0])    # of the next response token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        value = torch.where(mask[:, t], values[:, t], value)
        advantages[:, t] = advantage
    returns = advantages + values
    return advantages.masked_fill(~mask, 0.), returns.masked_fill(~mask, 0.)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0, standard deviation 1 over response tokens; 0 elsewhere. (B, T)"""
    tokens = x[mask]
    return ((x - tokens.mean()) / (tokens.std(correction=0) + 1e-8)).masked_fill(~mask, 0.)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_coef: float = .2) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - e, 1 + e) A),   ratio = pi / pi_old            (M,) -> (M,)

    Schulman et al. 2017, Eq. 7, negated; e is `clip_coef`.
    """
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip_coef: float = .2) -> Tensor:
    """max((V - R)^2, (V_clip - R)^2) / 2,   V_clip = V_old + clip(V - V_old, -e, e)       (M,)"""
    clipped = old_value + (value - old_value).clamp(-clip_coef, clip_coef)
    return .5 * torch.max((value - returns) ** 2, (clipped - returns) ** 2)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int,
                  horizon: float) -> float:
    """c <- c (1 + clip(KL / target - 1, -.2, .2) episodes / horizon)

    A KL above the target raises the price of KL, one below lowers it (Ziegler et al. 2019, Section
    2.2). `kl` is the mean over sequences of a sum over tokens, nats; the horizon is in episodes.
    """
    error = min(max(kl / target - 1, -.2), .2)
    return kl_coef * (1 + error * episodes / horizon)


# ------------------------------------------------------------------------------- PPO, as a recipe
def states_before_tokens(critic: ScalarModel, ids: Tensor) -> Tensor:
    """The critic's hidden state one position before each token, where that token is chosen.

    ids (B, T) -> (B, T, W), 0 for the first token.
    """
    return F.pad(critic.gpt.hidden(ids[:, :-1]), (0, 0, 1, 0))


def pretrain_critic(ref: GPT, ids: Tensor, mask: Tensor, score: Callable[[Tensor, Tensor], Tensor],
                    batch: int, lr: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Fit a critic V(x, y_<t) = E[score | x, y_<t], y ~ pi_ref, to samples of pi_ref.

    PPO's own episodes are too few to learn values from nothing. ids (C, T), mask (C, T) are samples
    of pi_ref, used for one epoch; score(ids, mask) -> (B,). Returns the parameters of the critic, a
    ScalarModel.
    """
    critic = ScalarModel(ref)
    device = ref.token.weight.device
    scores = map_batches(score, ids.to(device), mask.to(device))                     # (C,)
    batches = torch.randperm(len(ids), generator=generator).split(batch)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=lr, weight_decay=0., fused=True)
    scheduler = lr_schedule(optimizer, len(batches))
    for rows in batches:
        width = trimmed_width(mask[rows])
        response = mask[rows, :width].to(device)                                     # (B, T)
        states = states_before_tokens(critic, ids[rows, :width].to(device))[response]    # (M, W)
        values = critic.head(states).squeeze(-1)                                     # (M,)
        targets = scores[rows.to(device), None].expand(response.shape)[response]     # (M,)
        loss = ((values - targets) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"values of pi_ref: last squared error {loss.item():.2f} (the scores have variance 1)",
          flush=True)
    return cpu_state_dict(critic)


class Rollout(NamedTuple):
    """A batch of episodes; (B, T) unless said otherwise."""
    ids: Tensor
    mask: Tensor         # response tokens
    logp: Tensor         # log pi of each token, under the policy that sampled it
    ref_logp: Tensor     # log pi_ref of each token
    state: Tensor        # (B, T, W) the critic's hidden state before each token
    value: Tensor        # the critic's value before each token
    score: Tensor        # (B,) normalised reward of the whole text


@torch.no_grad()
def roll_out(policy: GPT, ref: GPT, critic: ScalarModel, prompts: tuple[Tensor, Tensor],
             max_tokens: int, end: int, score: Callable[[Tensor, Tensor], Tensor],
             generator: torch.Generator) -> Rollout:
    """Sample one episode for each prompt, ids (B, P) and lengths (B,), and score it."""
    width = prompts[0].shape[1] + max_tokens
    logp = policy.token.weight.new_zeros(len(prompts[0]), width)
    ids = sample(policy, *prompts, max_tokens, end, generator=generator, logp_out=logp)
    mask = response_mask(ids, prompts[1], max_tokens, end)
    ref_logp = map_batches(partial(response_token_logp, ref), ids, mask)
    state = map_batches(lambda ids, mask: states_before_tokens(critic, ids), ids, mask)
    value = critic.head(state).squeeze(-1).masked_fill(~mask, 0.)
    return Rollout(ids, mask, logp[:, :ids.shape[1]], ref_logp, state, value,
                   map_batches(score, ids, mask))


def ppo_update(policy: GPT, critic: ScalarModel, optimizer: torch.optim.Optimizer,
               rollout: Rollout, kl_coef: float, epochs: int, minibatch: int,
               generator: torch.Generator, gamma: float = 1., lam: float = .95,
               vf_coef: float = .1) -> float:
    """Steps 2-4 on one batch of episodes; returns the loss of the last minibatch."""
    # 2. Reward = score - c KL, token by token.
    rewards = token_rewards(rollout.score, rollout.logp, rollout.ref_logp, rollout.mask, kl_coef)
    # 3. Advantages.
    advantages, returns = gae(rewards, rollout.value, rollout.mask, gamma, lam)
    advantages = whiten(advantages, rollout.mask)
    # 4. Clipped updates, in a new order each epoch.
    device = rollout.ids.device
    for _ in range(epochs):
        order = torch.randperm(len(rollout.ids), generator=generator, device=device)
        for rows in order.split(minibatch):
            mask = rollout.mask[rows]
            width = trimmed_width(mask)    # cuts off filler alone: the same M tokens remain
            logp = response_token_logp(policy, rollout.ids[rows, :width], mask[:, :width])
            logp = logp[mask[:, :width]]                                             # (M,)
            value = critic.head(rollout.state[rows][mask]).squeeze(-1)               # (M,)
            pg_loss = policy_loss(logp, rollout.logp[rows][mask], advantages[rows][mask])
            v_loss = value_loss(value, rollout.value[rows][mask], returns[rows][mask])
            # without shared parameters, Adam sees vf_coef only through its epsilon
            loss = pg_loss.mean() + vf_coef * v_loss.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


def train_ppo(cfg, policy: GPT, ref: GPT, prompts: tuple[Tensor, Tensor],
              score: Callable[[Tensor, Tensor], Tensor], target: float, end: int,
              generator: torch.Generator,
              critic_state: dict[str, Tensor] | None = None) -> Iterator[dict[str, float]]:
    """Train a policy with PPO to a target KL (nats per sequence); yields its statistics each step.

    score(ids, mask) -> (B,) is the normalised reward of a text: learned (PPO) or true (PPO-GT).
    prompts: ids (X, P) and lengths (X,). `critic_state` comes from `pretrain_critic`; without it
    the critic has pi_ref's states, and its values start at 0. `cfg` has the fields ppo_*,
    adam_beta2, completions and max_tokens.
    """
    critic = ScalarModel(ref)
    if critic_state:
        critic.load_state_dict(critic_state)
    # Of the critic only the last layer learns: its states are computed once for each rollout.
    parameters = [*policy.parameters(), *critic.head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=cfg.ppo_lr, betas=(.9, cfg.adam_beta2), eps=1e-5,
                                 fused=True)
    scheduler = lr_schedule(optimizer, cfg.ppo_steps)
    # ppo_init_kl_coef is c times the target: the optimal price of a nat falls with KL.
    kl_coef = cfg.ppo_init_kl_coef / target
    for _ in range(cfg.ppo_steps):
        # 1. Roll out several episodes for each of some prompts.
        picked = torch.randint(len(prompts[0]), (cfg.ppo_batch // cfg.completions,),
                               generator=generator, device=prompts[0].device)
        picked = picked.repeat_interleave(cfg.completions)
        rollout = roll_out(policy, ref, critic, (prompts[0][picked], prompts[1][picked]),
                           cfg.max_tokens, end, score, generator)
        # 2.-4. Rewards of tokens, advantages, clipped updates.
        loss = ppo_update(policy, critic, optimizer, rollout, kl_coef, cfg.ppo_epochs,
                          cfg.ppo_minibatch, generator)
        scheduler.step()
        # 5. Steer the price of KL by the mean KL of whole responses.
        kl = (rollout.logp - rollout.ref_logp).sum(1).mean().item()
        tokens = rollout.mask.sum().item()
        yield {"loss": loss, "score": rollout.score.mean().item(), "rollout_kl": kl,
               "kl_coef": kl_coef, "sampled_tokens": tokens,
               "trained_tokens": tokens * cfg.ppo_epochs}
        kl_coef = adapt_kl_coef(kl_coef, kl, target, len(rollout.ids), cfg.ppo_horizon)
