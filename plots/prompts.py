"""Prompts matter: Z(x) differs from prompt to prompt, and policies generalise to new prompts.

Left: log Z(x) (Eq. 4) of each prompt against its length, at the price at which the optimum has
KL 2. A prompt that reaches into the first opinion decides a part of the reward. DPO never computes
Z(x): it cancels in Eq. 6, because both responses of a pair have the same prompt.

Right: the share of the optimal gain on prompts that are token for token among the training prompts
(of pairs and PPO), and on the others. SFT has read reviews that begin like some of the others. The
paper has no such comparison.
"""
import math

import torch
from torch import Tensor

import data
import dpo
from plots import (COMPARED_KL, STYLE, load_policy, mean_and_se, paired_bar_style, plt,
                   prompts_of_split, save, short_label)
from plots.frontier import optimum_from_samples, sample_mixture, sample_rewards
from plots.winrate import policies_to_compare

SAMPLES = 8             # responses of a policy to each prompt
MIXTURE_SAMPLES = 32    # responses of each policy to each prompt, for the optimum
GROUPS = {"seen": "training prompts", "unseen": "other prompts"}


def seen_in_training(setup, prompts: tuple[Tensor, Tensor]) -> Tensor:
    """Which prompts, ids (X, P) and lengths (X,), pi_ref completed for training, by tokens."""
    train_prompts = prompts_of_split(setup, "train", setup.cfg.prompts)
    train = {tuple(row[:n]) for row, n in zip(*(p.tolist() for p in train_prompts))}
    return torch.tensor([tuple(row[:n]) in train for row, n in zip(*(p.tolist() for p in prompts))])


def measure(setup, runs: list[dict]) -> list[dict]:
    """A row for each prompt (log Z), and one for each policy and group of prompts (share)."""
    texts = setup.corpus[setup.cfg.split][:4 * setup.cfg.eval_prompts]
    ids, lengths = data.make_prompts(setup.encoding, texts,
                                     data.named_rng("seen prompts", setup.cfg.seed))
    prompts = ids.to(setup.device), lengths.to(setup.device)
    seen = seen_in_training(setup, prompts)
    policies = policies_to_compare(runs)
    models = [load_policy(setup, policy["state"]) for policy in policies]
    generator = data.named_generator("seen prompts", setup.cfg.seed, device=setup.device)
    *_, reward, log_weight = sample_mixture(setup, models, prompts, MIXTURE_SAMPLES, generator)
    _, beta, _ = dpo.optimal_reward(COMPARED_KL, optimum_from_samples(reward, log_weight))
    log_z = dpo.log_partition(log_weight - math.log(reward.shape[1]), reward, beta)
    rows = [{"figure": "prompts", "panel": "log Z", "beta": beta, "length": int(n), "log_z": z,
             "seen": bool(s)} for n, z, s in zip(lengths, log_z.tolist(), seen)]
    groups = {"seen": seen, "unseen": ~seen}
    groups = {name: members for name, members in groups.items() if members.sum() > 1}
    optima = {name: optimum_from_samples(reward[members], log_weight[members])
              for name, members in groups.items()}
    for policy, model in zip(policies[1:], models[1:]):    # pi_ref has no share
        rows += share_rows(setup, policy, model, prompts, groups, optima)
    return rows


def share_rows(setup, policy: dict, model, prompts: tuple[Tensor, Tensor],
               groups: dict[str, Tensor], optima: dict[str, dict]) -> list[dict]:
    """A row for each group of prompts: reward, KL, share of the optimal gain of a policy."""
    generator = data.named_generator("seen prompts", setup.cfg.seed, policy["method"],
                                     device=setup.device)
    reward, kl, _ = sample_rewards(setup, model, prompts, SAMPLES, generator)
    rows = []
    for group, members in groups.items():
        row = {"figure": "prompts", "panel": "share", "group": group, "prompts": int(members.sum()),
               **{name: policy[name] for name in ("method", "setting", "step")}}
        row["reward"], row["reward_se"] = mean_and_se(reward[members])
        row["kl"], row["kl_se"] = mean_and_se(kl[members])
        _, row["share"], row["share_se"] = dpo.share_of_optimal_gain(
            row["reward"], row["reward_se"], row["kl"], row["kl_se"], optima[group])
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------- drawing
def draw_log_z(axis, rows: list[dict]) -> None:
    """log Z(x) against the length of the prompt; filled for training prompts."""
    shift = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for is_seen, label in ((True, GROUPS["seen"]), (False, GROUPS["unseen"])):
        points = [(row, x) for row, x in zip(rows, shift) if row["seen"] == is_seen]
        axis.plot([row["length"] + .6 * (x - .5) for row, x in points],
                  [row["log_z"] for row, _ in points], "o", ms=4, color="0.3",
                  mfc="0.3" if is_seen else "white", lw=0, label=label)
    axis.set_xlabel("length of the prompt, tokens", fontsize=12)
    axis.set_ylabel(f"log Z(x) at \u03b2 = {rows[0]['beta']:.2g}", fontsize=12)
    axis.legend(fontsize=11)
    axis.grid(alpha=.25)


def draw_shares(axis, rows: list[dict]) -> None:
    """The share on seen and on unseen prompts, a pair of bars for each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for i, method in enumerate(methods):
        pair = [row for row in rows if row["method"] == method]
        for row in pair:
            is_seen = row["group"] == "seen"
            axis.bar([i + (-.19 if is_seen else .19)], [row["share"]], .36,
                     yerr=[row["share_se"]], **paired_bar_style(is_seen, STYLE[method][1]),
                     lw=1.5, ecolor="0.25", capsize=3)
    for group, count in {row["group"]: row["prompts"] for row in rows}.items():
        axis.bar([0], [0], **paired_bar_style(group == "seen", "0.4"),
                 label=f"{count} {GROUPS[group]}")
    labels = []
    for method in methods:
        kls = [f"{row['kl']:.1f}" for row in rows if row["method"] == method]
        labels.append(f"{short_label(method)}\nKL {' and '.join(kls)}")
    axis.set_xticks(range(len(methods)), labels)
    axis.axhline(1, color="0.25", lw=2)
    axis.set(ylim=(0, 1.3))
    axis.set_ylabel("share of the optimal gain", fontsize=12)
    axis.legend(fontsize=11, loc="upper center", ncols=2)


def draw(rows: list[dict], path) -> None:
    """Left: log Z(x). Right: shares on seen and unseen prompts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1, 1.2))
    draw_log_z(left, [row for row in rows if row["panel"] == "log Z"])
    draw_shares(right, [row for row in rows if row["panel"] == "share"])
    save(figure, path)
