"""Fig. 2, right, and Fig. 3: win rate against sampling temperature, and over the training of DPO.

The opponent of a response is the review whose beginning is the prompt. The higher true reward wins,
and a tie counts half. Each method is represented by its finished policy nearest to KL 2 nats at
temperature 1, or one during training if only that is within .2; Best-of-N by N = 16, whose KL is at
most 1.84. The paper (TL;DR, evaluated by GPT-4): DPO wins 61% at temperature 0; PPO wins 57% at its
best temperature, which is also 0. As the temperature rises, PPO falls to the level of the model
before SFT, and DPO does not.

A policy that writes nearly the same text for all prompts wins or loses by luck, and the standard
error over prompts does not contain this luck. `distinct` counts the different rewards of the
responses. Points with fewer than MIN_DISTINCT are hollow.
"""
import torch
from torch import Tensor

import data
from model import GPT, generate, map_batches
from plots import (REFERENCE, STYLE, checkpoint_near_kl, label_with_kl, load_policy, mean_and_se,
                   plt, runs_near_kl, save, verdict)
from plots.best_of_n import kl_bound

METHODS = "preferred_ft", "ppo", "ppo_gt", "dpo"    # beside pi_ref; the opponent is the review
TEMPERATURES = 0., .25, .5, .75, 1.
CHECKPOINT_LINES = {.25: "-", 1.: "--"}    # temperature -> line style, right panel
SAMPLES = 4         # responses to each prompt; one at temperature 0, where all are equal
BEST_OF = 16        # N of Best-of-N
MIN_DISTINCT = 10


def win_probability(reward: Tensor, opponent_reward: Tensor) -> Tensor:
    """P(win) + P(tie) / 2 at each of X prompts, over all pairs of a response and an opponent.

    reward (X, n) of n responses; opponent_reward (X, m) of m opponents, or (X,) of one
    -> (X,) float64.
    """
    assert reward.dtype == opponent_reward.dtype, "ties need the same precision on both sides"
    assert len(reward) == len(opponent_reward), "each prompt needs opponents"
    r = reward.cpu()[:, :, None]                                             # (X, n, 1)
    r_opponent = opponent_reward.cpu().reshape(len(reward), 1, -1)           # (X, 1, m)
    return verdict(r, r_opponent).mean((1, 2))


def review_prompts(setup, texts: list[str]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The beginnings of X reviews as prompts, and the true rewards of the reviews themselves.

    -> (ids (X, P), lengths (X,)), rewards (X,), all on the device.
    """
    ids, lengths = data.make_prompts(setup.encoding, texts,
                                     data.named_rng("winrate", setup.cfg.seed))
    reward = torch.tensor([data.sentiment(text) for text in texts], device=setup.device)
    return (ids.to(setup.device), lengths.to(setup.device)), reward


def policies_to_compare(runs: list[dict], methods: tuple[str, ...] = METHODS) -> list[dict]:
    """pi_ref, and the policy of each method that `checkpoint_near_kl` finds."""
    policies = [checkpoint_near_kl(runs, method) for method in methods]
    return [REFERENCE, *(policy for policy in policies if policy)]


def generate_responses(setup, policy: GPT, prompts: tuple[Tensor, Tensor], samples: int,
                       temperature: float) -> tuple[Tensor, Tensor]:
    """`samples` responses to each of X prompts, but one at temperature 0 -> ids and mask.

    All policies use the same random numbers. This makes the differences between policies less noisy
    than their win rates.
    """
    count = samples if temperature > 0 else 1
    generator = data.named_generator("winrate", setup.cfg.seed, temperature, device=setup.device)
    return generate(policy, prompts, count, setup.cfg.max_tokens, setup.encoding.eot_token,
                    generator, temperature)


def rewards_at(setup, policy: GPT, prompts: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """True rewards of a policy's responses: (X, SAMPLES), or (X, 1) at temperature 0."""
    ids, mask = generate_responses(setup, policy, prompts, SAMPLES, temperature)
    return data.true_reward(setup.encoding, ids, mask).view(len(prompts[0]), -1)


def best_rewards(setup, prompts: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """True rewards of Best-of-N's response to each prompt: (X, 1).

    Its response is the one of BEST_OF responses of pi_ref whose learned reward is highest. At
    temperature 0 it is the only response.
    """
    ids, mask = generate_responses(setup, setup.ref, prompts, BEST_OF, temperature)
    score = map_batches(setup.learned_reward, ids, mask).view(len(prompts[0]), -1)
    first_row = score.shape[1] * torch.arange(len(score), device=score.device)
    best = score.argmax(1) + first_row
    return data.true_reward(setup.encoding, ids[best], mask[best])[:, None]


def win_rate_row(policy: dict, panel: str, temperature: float, reward: Tensor,
                 review_reward: Tensor) -> dict:
    """The row of a policy, from the rewards of its responses (X, n) and of the reviews (X,)."""
    win_rate, win_rate_se = mean_and_se(win_probability(reward, review_reward)[:, None])
    return {"figure": "winrate", "panel": panel,
            **{name: policy[name] for name in ("method", "setting", "step", "kl")},
            "temperature": temperature, "win_rate": win_rate, "win_rate_se": win_rate_se,
            "distinct": len(reward.unique())}


def measure(setup, runs: list[dict]) -> list[dict]:
    """A row for each policy and temperature.

    `panel` is "temperature" for the policies that are compared, and "training" for all checkpoints
    of the DPO run that is among them.
    """
    texts = setup.corpus[setup.cfg.split][:4 * setup.cfg.eval_prompts]
    prompts, review_reward = review_prompts(setup, texts)
    rows = []
    for policy in policies_to_compare(runs):
        model = load_policy(setup, policy["state"])
        for temperature in TEMPERATURES:
            reward = rewards_at(setup, model, prompts, temperature)
            rows.append(win_rate_row(policy, "temperature", temperature, reward, review_reward))
    best_of_n = {"method": "best_of_n", "setting": float(BEST_OF), "step": 0,
                 "kl": kl_bound(BEST_OF)}
    for temperature in TEMPERATURES:
        reward = best_rewards(setup, prompts, temperature)
        rows.append(win_rate_row(best_of_n, "temperature", temperature, reward, review_reward))
    for run in runs_near_kl(runs, "dpo"):
        for row, state in zip(run["rows"], run["checkpoints"]):
            model = load_policy(setup, state)
            for temperature in CHECKPOINT_LINES:
                reward = rewards_at(setup, model, prompts, temperature)
                rows.append(win_rate_row(row, "training", temperature, reward, review_reward))
    return rows


def draw_points(axis, rows: list[dict], x: list[float], colour: str, marker: str,
                size: float) -> None:
    """Markers with error bars at x; hollow for rows with few different rewards."""
    for row, position in zip(rows, x):
        fill, edge = colour, "white"
        if row["distinct"] < MIN_DISTINCT:
            fill, edge = "white", colour
        axis.errorbar([position], [row["win_rate"]], [row["win_rate_se"]], fmt=marker,
                      color=colour, ms=size, mew=1.3, elinewidth=1.2, mfc=fill, mec=edge)


def draw_temperatures(axis, rows: list[dict]) -> None:
    """Win rate against temperature: a curve for each method."""
    measured = {row["method"] for row in rows}
    methods = [method for method in STYLE if method in measured]
    for i, method in enumerate(methods):
        _, colour, marker = STYLE[method]
        curve = [row for row in rows if row["method"] == method]
        label = label_with_kl(curve[0])
        x = [row["temperature"] + .012 * (i - 2.5) for row in curve]    # methods do not overlap
        axis.plot(x, [row["win_rate"] for row in curve], "-", color=colour, lw=1.6)
        draw_points(axis, curve, x, colour, marker, size=11 if method == "sft" else 8)
        axis.plot([], [], marker + "-", color=colour, ms=8, label=label)
    if any(row["distinct"] < MIN_DISTINCT for row in rows):
        axis.plot([], [], "o", color="0.4", mfc="white", ms=8,
                  label="hollow: nearly one text for all prompts")
    axis.set(xticks=TEMPERATURES, ylim=(-.02, 1.02))
    axis.set_xlabel("sampling temperature", fontsize=14)
    axis.set_ylabel("win rate against the review itself", fontsize=14)


def draw_training(axis, compared: list[dict], checkpoints: list[dict]) -> None:
    """Win rate over the steps of DPO: a curve from SFT on for each temperature."""
    _, colour, marker = STYLE["dpo"]
    for temperature, line in CHECKPOINT_LINES.items():
        curve = [row for row in checkpoints if row["temperature"] == temperature]
        if curve:
            sft = [row for row in compared
                   if row["method"] == "sft" and row["temperature"] == temperature]
            curve = sft + curve
        x = [row["step"] for row in curve]
        axis.plot(x, [row["win_rate"] for row in curve], line, color=colour, lw=1.6,
                  label=f"DPO, temperature {temperature:g}")
        axis.fill_between(x, [row["win_rate"] - row["win_rate_se"] for row in curve],
                          [row["win_rate"] + row["win_rate_se"] for row in curve], color=colour,
                          alpha=.15, lw=0)
        draw_points(axis, curve, x, colour, marker, size=8)
    axis.set_xlabel("steps of DPO (0: SFT)", fontsize=14)


def draw(rows: list[dict], path) -> None:
    """Left: the methods at all temperatures. Right: DPO's checkpoints at two of them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.4), sharey=True)
    compared = [row for row in rows if row["panel"] == "temperature"]
    checkpoints = [row for row in rows if row["panel"] == "training"]
    draw_temperatures(left, compared)
    draw_training(right, compared, checkpoints)
    for axis, columns in ((left, 2), (right, 1)):
        axis.axhline(.5, color="0.5", ls=":", lw=1.2, zorder=0)
        axis.grid(alpha=.25)
        axis.tick_params(labelsize=12)
        axis.legend(fontsize=12, loc="lower center", bbox_to_anchor=(.5, 1.), ncols=columns,
                    frameon=False)
    save(figure, path)
