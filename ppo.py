"""The pipeline that DPO replaces: a reward model (Eq. 2), then PPO on Eq. 3 (Section 3; Schulman et al. 2017; Ziegler et al. 2019).

PPO here is no straw man. All of these are present (and tested):
  1. reward of a token: -c (log pi_old - log pi_ref), the "k1" penalty, fixed while a batch is reused; the score once, on the
     last real token                                                                        -> `token_rewards`
  2. the score normalised by one affine map, fixed from samples of pi_ref (per-batch whitening would change beta silently)
  3. an adaptive coefficient c that steers the *sequence* KL to a target, its horizon in episodes -> `adapt`
  4. generalised advantage estimation, gamma 1, lambda .95, masked whitening                 -> `gae`, `whiten`
  5. clipped ratio and clipped values (.2), minibatches (several epochs gained nothing here); ratio 1 on the first
                                                                                             -> `policy_loss`, `value_loss`
  6. a value function of its own (not a head on the policy: their gradients do not fight), fitted to the scores of pi_ref's
     samples before PPO begins; after that only its last layer learns                         -> `fit_values`
  7. Adam with eps 1e-5, a learning rate warmed up and annealed to 0; no dropout; sampling and scoring at temperature 1
Left out: an entropy bonus (the KL penalty has one in it), a penalty for a missing end token (it would not be the true reward),
reward clipping (it would be another reward).

*Objective* is what is maximised, *loss* what is minimised. B episodes, T positions; a mask (B, T) says which are response tokens.
"""
import copy
from functools import partial
from typing import Callable, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Preferences, UserError, prompt_batch
from model import GPT, longest, response_logp, response_mask, sample, schedule, score_batches, state_of


# ---------------------------------------------------------------------------------------------------- the reward model
class ScalarModel(nn.Module):
    """A GPT that gives a number at every position, 0 at the start: a reward model or a value function. ids (B, T) -> (B, T)"""
    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = copy.deepcopy(gpt).requires_grad_(True)    # the reference that it starts from is frozen
        self.head = nn.Linear(gpt.config.width, 1, device=gpt.token.weight.device, dtype=gpt.token.weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gpt.hidden(ids)).squeeze(-1)


def last_token(mask: Tensor) -> Tensor:
    """Where the last response token stands: mask (B, T) -> (B,)"""
    return mask.shape[1] - 1 - mask.int().flip(1).argmax(1)


def reward_of(model: ScalarModel, ids: Tensor, mask: Tensor) -> Tensor:
    """r_phi(x, y), read at the last response token: the only place that has seen all of y. (B, T), (B, T) -> (B,)"""
    return model(ids).gather(1, last_token(mask)[:, None]).squeeze(1)


def reward_model_loss(r_w: Tensor, r_l: Tensor) -> Tensor:
    """-log sigma(r_phi(x, y_w) - r_phi(x, y_l))                                                               Eq. 2 -> (B,)"""
    return -F.logsigmoid(r_w - r_l)


def train_reward_model(cfg, ref: GPT, pairs: Preferences, held_out: Preferences, batches: list, device: str) -> dict:
    """Eq. 2 on the pairs, from the SFT model; the epoch with the best accuracy on held-out pairs is kept (App. C.1).

    `batches` are epochs of batches of prompts; cfg.rm_lr is the peak learning rate. Returns the model's parameters, its
    accuracy, and mean and standard deviation of its rewards of the held-out completions.
    """
    if not len(held_out.winner):
        raise UserError("no two held-out completions differ in reward, so the reward model cannot be judged: take more --prompts")
    model = ScalarModel(ref)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.rm_lr, weight_decay=0., fused=True)
    decay, best, kept = schedule(optimizer, sum(map(len, batches))), -1., None
    for epoch in batches:
        for prompts in epoch:
            batch = prompt_batch(pairs, prompts)
            r = reward_of(model, batch.ids.to(device), batch.mask.to(device))
            loss = reward_model_loss(r[batch.winner], r[batch.loser]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            r = score_batches(partial(reward_of, model), held_out.ids.to(device), held_out.mask.to(device)).cpu()
        accuracy = (r[held_out.winner] > r[held_out.loser]).float().mean().item()
        print(f"reward model: loss {loss.item():.3f}, accuracy on held-out pairs {accuracy:.3f}", flush=True)
        if accuracy > best:
            best, kept, rewards = accuracy, state_of(model), r
    return {"model": kept, "accuracy": best, "mean": rewards.mean().item(), "deviation": rewards.std().item()}


# ------------------------------------------------------------------------------------------------------- PPO, in pieces
def token_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """r_t = -c (log pi - log pi_ref)(y_t), plus the score on the last response token. (B,), (B, T) thrice -> (B, T)

    Their sum is r(x, y) - c log(pi / pi_ref): the reward of Eq. 3, one sample of the KL.
    """
    reward = -coefficient * (logp - ref_logp).masked_fill(~mask, 0.)
    return reward.scatter_add(1, last_token(mask)[:, None], score[:, None].to(reward.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V_{t+1} - V_t;   V = A = 0 after the last response token.

    Schulman et al. 2016, Eq. 16. All (B, T); returns (advantages, advantages + values), both 0 where masked out.
    """
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        real = mask[:, t].bool()
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(real, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = next_advantage.masked_fill(~real, 0.)
        returns[:, t] = (next_advantage + next_value).masked_fill(~real, 0.)
    return advantages, returns


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the real tokens, 0 elsewhere. (B, T) -> (B, T)"""
    real = x[mask]
    return ((x - real.mean()) / (real.std(correction=0) + 1e-8)).masked_fill(~mask, 0.)


def policy_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float = .2) -> Tensor:
    """-min(rho A, clip(rho, 1 - e, 1 + e) A),   rho = pi / pi_old              Schulman et al. 2017, Eq. 7, negated; (M,) -> (M,)"""
    rho = (logp - old_logp).exp()
    return -torch.min(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float = .2) -> Tensor:
    """max((V - R)^2, (V_clip - R)^2) / 2,   V_clip = V_old + clip(V - V_old, -e, e)                                  (M,) -> (M,)"""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return .5 * torch.max((value - returns) ** 2, (clipped - returns) ** 2)


def adapt(coefficient: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """c <- c (1 + clip(KL / target - 1, -.2, .2) episodes / horizon): dearer above the target, cheaper below.

    Ziegler et al. 2019, Section 2.2. `kl` is per sequence (nats, a sum over tokens); the horizon is in episodes.
    """
    return coefficient * (1 + min(max(kl / target - 1, -.2), .2) * episodes / horizon)


# --------------------------------------------------------------------------------------------------------- PPO, as a recipe
def states_of(critic: ScalarModel, ids: Tensor) -> Tensor:
    """The critic's hidden state in which each token was chosen, one position before it: (B, T) -> (B, T, W), 0 for the first."""
    return F.pad(critic.gpt.hidden(ids[:, :-1]), (0, 0, 1, 0))


def fit_values(ref: GPT, ids: Tensor, mask: Tensor, score: Callable[[Tensor, Tensor], Tensor], batch: int, lr: float,
               generator: torch.Generator) -> dict[str, Tensor]:
    """V(x, y_<t) = E[score | x, y_<t] under pi_ref, by regression on its own samples, once over: ids (C, T), mask (C, T).

    PPO's advantages are as good as its values, and PPO's own episodes are too few to learn them from nothing.
    Returns the parameters of a ScalarModel.
    """
    critic, device = ScalarModel(ref), ref.token.weight.device
    with torch.no_grad():
        scores = score_batches(score, ids.to(device), mask.to(device))                      # (C,)
    order = torch.randperm(len(ids), generator=generator).split(batch)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=lr, weight_decay=0., fused=True)
    decay = schedule(optimizer, len(order))
    for rows in order:
        width = longest(mask[rows])
        a, b = ids[rows, :width].to(device), mask[rows, :width].to(device)
        value = critic.head(states_of(critic, a)[b]).squeeze(-1)                            # (M,) for M response tokens
        loss = ((value - scores[rows.to(device), None].expand(b.shape)[b]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    print(f"values of pi_ref: squared error {loss.item():.2f} (1 if they knew nothing)", flush=True)
    return state_of(critic)


class Batch(NamedTuple):
    """Episodes as they were sampled; all (B, T) but the score, (B,), and the state, (B, T, W)."""
    ids: Tensor
    mask: Tensor
    logp: Tensor         # under the policy that wrote them
    ref_logp: Tensor
    state: Tensor        # what the critic saw before each token
    value: Tensor        # its value
    score: Tensor


@torch.no_grad()
def roll_out(policy: GPT, ref: GPT, critic: ScalarModel, prompts: tuple[Tensor, Tensor], max_tokens: int, end: int,
             score: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator) -> Batch:
    """One episode for each prompt: sampled by the policy, judged by `score(ids, mask) -> (B,)`."""
    logp = policy.token.weight.new_zeros(len(prompts[0]), prompts[0].shape[1] + max_tokens)
    ids = sample(policy, *prompts, max_tokens, end, generator=generator, logp=logp)
    mask = response_mask(ids, prompts[1], max_tokens, end)
    in_parts = partial(score_batches, ids=ids, mask=mask, batch=64)    # like lengths together: a third less filler
    state = in_parts(lambda a, b: states_of(critic, a))
    return Batch(ids, mask, logp[:, :ids.shape[1]], in_parts(partial(response_logp, ref)), state,
                 critic.head(state).squeeze(-1).masked_fill(~mask, 0.), in_parts(score))


def update(policy: GPT, critic: ScalarModel, optimizer: torch.optim.Optimizer, batch: Batch, coefficient: float, epochs: int,
           minibatch: int, generator: torch.Generator, gamma: float = 1., lam: float = .95, value_weight: float = .1) -> float:
    """One PPO step on a batch of episodes, steps 2-4 of the recipe; returns the last minibatch's loss."""
    # 2. reward = score - c KL, a token at a time.
    rewards = token_rewards(batch.score, batch.logp, batch.ref_logp, batch.mask, coefficient)
    # 3. advantages.
    advantages, returns = gae(rewards, batch.value, batch.mask, gamma, lam)
    advantages = whiten(advantages, batch.mask)
    # 4. clipped updates, each epoch in a new order.
    for _ in range(epochs):
        for rows in torch.randperm(len(batch.ids), generator=generator, device=batch.ids.device).split(minibatch):
            mask = batch.mask[rows]
            width = longest(mask)
            value = critic.head(batch.state[rows][mask]).squeeze(-1)
            logp = response_logp(policy, batch.ids[rows, :width], mask[:, :width])[mask[:, :width]]
            loss = policy_loss(logp, batch.logp[rows][mask], advantages[rows][mask]).mean() \
                + value_weight * value_loss(value, batch.value[rows][mask], returns[rows][mask]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


def train_ppo(cfg, policy: GPT, ref: GPT, prompts: tuple[Tensor, Tensor], score: Callable[[Tensor, Tensor], Tensor], target: float,
              end: int, generator: torch.Generator, values: dict[str, Tensor] | None = None) -> Iterator[dict]:
    """PPO to a target KL (nats a sequence): yields what is worth printing after every step. `cfg` has the fields ppo_*.

    `score(ids, mask) -> (B,)` is the reward of whole texts: learned (PPO) or true (PPO-GT). prompts (N, P), lengths (N,).
    `values` are those of `fit_values`; without them the critic starts from pi_ref's states and at 0.
    """
    critic = ScalarModel(ref)
    critic.load_state_dict(values or critic.state_dict())
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.head.parameters()], lr=cfg.ppo_lr, eps=1e-5, fused=True)
    decay = schedule(optimizer, cfg.ppo_steps)
    device, coefficient = prompts[0].device, cfg.ppo_coefficient / target    # near the optimum a nat is worth less, the more there are
    for _ in range(cfg.ppo_steps):
        # 1. roll out: several episodes for each of some prompts.
        drawn = torch.randint(len(prompts[0]), (cfg.ppo_batch // cfg.completions,), generator=generator, device=device)
        drawn = drawn.repeat_interleave(cfg.completions)
        batch = roll_out(policy, ref, critic, (prompts[0][drawn], prompts[1][drawn]), cfg.max_tokens, end, score, generator)
        # 2.-4.
        loss = update(policy, critic, optimizer, batch, coefficient, cfg.ppo_epochs, cfg.ppo_minibatch, generator)
        decay.step()
        # 5. steer the price of KL.
        kl = (batch.logp - batch.ref_logp).sum(1).mean().item()
        tokens = batch.mask.sum().item()
        yield {"loss": loss, "score": batch.score.mean().item(), "rollout_kl": kl, "coefficient": coefficient,
               "sampled_tokens": tokens, "trained_tokens": tokens * cfg.ppo_epochs}
        coefficient = adapt(coefficient, kl, target, len(batch.ids), cfg.ppo_horizon)
