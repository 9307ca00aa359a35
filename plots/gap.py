"""What keeps DPO from the optimum? (`train.py --study`)

Left: the share of the optimal gain of PPO-GT, of DPO, and of three variants of DPO. In the first,
the network is twice as wide (with half the learning rate). In the second, the pairs come in 8
rounds from the policy itself. The third is the second with labels of Eq. 1; these are noisy, so it
has 64 completions of each prompt. Right: where the optimum and the policies at KL near 2 spend
their nats, by the role of the token (plots/nats.py); the wide network is left out there.
"""
from typing import Callable

import torch
from torch import Tensor

import data
import dpo
from harness import Stage, cached
from model import batched_sequence_logp, generate
from plots import (COMPARED_KL, STYLE, evaluation_prompts, frontier, load_finished_policy,
                   mean_and_se, nats, plt, save, short_label)

PAPER = "one round (the paper)"
ROUNDS = "8 rounds"
EQ_1_LABELS = "8 rounds, labels of Eq. 1"
WIDE = "twice as wide"
VARIANTS = {    # variant of DPO -> colour, marker, line style; no colour of another method
    PAPER: (STYLE["dpo"][1], "o", "-"),
    WIDE: ("#E7298A", "P", "-."),
    ROUNDS: ("#7F3FBF", "^", "-"),
    EQ_1_LABELS: ("#66A61E", "X", "-"),
}
NATS_COLOURS = {    # (method, variant) whose nats are drawn, beside those of the optimum
    ("ppo_gt", PAPER): STYLE["ppo_gt"][1],
    ("dpo", PAPER): STYLE["dpo"][1],
    ("dpo", ROUNDS): VARIANTS[ROUNDS][0],
    ("dpo", EQ_1_LABELS): VARIANTS[EQ_1_LABELS][0],
}
SAMPLES = 4       # responses to each prompt, whose pairs the implicit reward ranks


def changed_fields(cfg) -> dict[str, dict]:
    """variant -> the fields of the configuration that it changes."""
    # a wide network is slow: pi_ref and DPO sample for its optimum, without fits
    wide = dict(width=2 * cfg.width, lr=cfg.lr / 2, optimum_samples=min(cfg.optimum_samples, 512))
    return {PAPER: dict(rounds=1), WIDE: dict(rounds=1, **wide),
            ROUNDS: dict(rounds=8),
            # ppo_batch is not used here, but must be a multiple of completions
            EQ_1_LABELS: dict(rounds=8, labels="bt", completions=64, ppo_batch=64)}


def settings_of(variant: str, cfg, optimum: dict) -> dict[str, tuple]:
    """method -> the settings to train.

    With labels of Eq. 1 the minimiser of Eq. 7 is the optimum at the price tau * beta of a nat. So
    their betas are those whose KL should be the first three targets of PPO (each takes half an
    hour at the paper's size).
    """
    if variant == PAPER:
        return {"dpo": cfg.betas, "ppo_gt": cfg.kl_targets}
    if variant == EQ_1_LABELS:
        prices = [dpo.optimal_reward(kl, optimum)[1] for kl in cfg.kl_targets[:3]]
        return {"dpo": tuple(sorted({round(price / cfg.tau, 3) for price in prices}))}
    return {"dpo": tuple(sorted(cfg.betas))[1:]}    # the smallest goes beyond the figure


# -------------------------------------------------------------------------------------- measuring
def agreement(implied: Tensor, reward: Tensor) -> Tensor:
    """The share of pairs of each prompt that two rewards (X, n) rank alike -> (X', 1).

    Prompts whose responses all have the same reward are left out.
    """
    i, j = torch.triu_indices(reward.shape[1], reward.shape[1], 1)
    differs = reward[:, i] != reward[:, j]
    alike = (implied[:, i] > implied[:, j]) == (reward[:, i] > reward[:, j])
    pairs = differs.sum(1)
    return ((alike & differs).sum(1)[pairs > 0] / pairs[pairs > 0])[:, None]


def rank_accuracy(setup, policy, sampler, *names) -> tuple[float, float]:
    """How often log pi/pi_ref ranks two responses of `sampler` as the true reward does.

    log pi/pi_ref is the reward that DPO implies (Section 5). Ties are left out. -> accuracy, its
    standard error over prompts.
    """
    generator = data.named_generator("rank accuracy", setup.cfg.seed, *names, device=setup.device)
    ids, mask = generate(sampler, evaluation_prompts(setup), SAMPLES, setup.cfg.max_tokens,
                         setup.encoding.eot_token, generator)
    implied = (batched_sequence_logp(policy, ids, mask, setup.device)
               - batched_sequence_logp(setup.ref, ids, mask, setup.device)).view(-1, SAMPLES)
    reward = data.true_reward(setup.encoding, ids, mask).cpu().view(-1, SAMPLES)
    return mean_and_se(agreement(implied, reward))


@cached
def measure_share(setup, variant: str, method: str, setting: float, stage: Stage,
                  proposals: tuple[Stage, ...]) -> dict:
    """The row of a finished policy, with its share of the optimal gain.

    Policy and optimum are compared prompt by prompt: the error is that of their difference, which
    varies less over prompts than the reward does. The responses are those of train.evaluate.
    """
    final = stage.value["rows"][-1]
    generator = data.named_generator("evaluation", method, setting, final["step"], setup.cfg.seed,
                                     device=setup.device)
    reward, kl, _ = frontier.sample_rewards(setup, load_finished_policy(setup, stage),
                                            evaluation_prompts(setup), setup.cfg.eval_samples,
                                            generator)
    sampled_reward, log_weight = frontier.samples_of_optimum(setup, proposals)
    optimum = frontier.optimum_from_samples(sampled_reward, log_weight)
    optimal, beta, _ = dpo.optimal_reward(final["kl"], optimum)    # the slope of the frontier
    gap = dpo.gap_to_optimum(reward.mean(1), kl.mean(1), log_weight, sampled_reward, beta)
    mean_gap, gap_se = mean_and_se(gap[:, None])
    gain = optimal - optimum["ref_reward"]
    return {**final, "figure": "gap", "panel": "share", "variant": variant,
            "optimal_reward": optimal, "share": 1 - mean_gap / gain, "share_se": gap_se / gain}


@cached
def measure_policy(setup, variant: str, method: str, stage: Stage) -> dict:
    """The row of a finished policy: its nats by role, and the accuracy of the reward it implies."""
    policy = load_finished_policy(setup, stage)
    final = stage.value["rows"][-1]
    row = {"figure": "gap", "panel": "nats", "variant": variant, "method": method,
           "setting": final["setting"], "step": final["step"]}
    row.update(nats.policy_nats(setup, policy, evaluation_prompts(setup), method, variant))
    for name, sampler in (("ref", setup.ref), ("own", policy)):
        accuracy, error = rank_accuracy(setup, policy, sampler, name, method, variant)
        row.update({f"accuracy_{name}": accuracy, f"accuracy_{name}_se": error})
    return row


@cached
def measure_optimum(setup, beta: float, proposals: tuple[Stage, ...]) -> dict:
    """The row of the optimum at a price beta.

    It is measured on the first 64 prompts, because rollouts from every prefix are slow.
    """
    prompts = tuple(p[:64] for p in evaluation_prompts(setup))
    policies = frontier.sampling_policies(setup, proposals)
    return {"figure": "gap", "panel": "nats", "variant": "", "method": "optimum", "setting": beta,
            "step": 0, **nats.optimum_nats(setup, policies, prompts, beta)}


def nearest_to_compared_kl(finished: list[Stage]) -> list[Stage]:
    """Of each method the stage whose finished policy has the KL nearest to COMPARED_KL."""
    groups = {}    # method -> stages
    for stage in finished:
        groups.setdefault(stage.value["method"], []).append(stage)
    return [min(group, key=lambda stage: abs(stage.value["rows"][-1]["kl"] - COMPARED_KL))
            for group in groups.values()]


def study(setup, sweep: list[Stage], proposals: tuple[Stage, ...],
          train_variant: Callable) -> tuple[list[dict], list[dict]]:
    """The rows of the figure, and the failed runs.

    `sweep` are the stages of the policies, `proposals` those that sample for the optimum.
    train_variant(setup, fields, settings) -> the setup and the stages of a configuration with some
    fields changed.
    """
    failures, measurements = [], []
    in_sweep = {stage.path for stage in sweep}    # the caller has their failures
    optimum = frontier.estimate_optimum(setup, proposals)
    for variant, fields in changed_fields(setup.cfg).items():
        settings = settings_of(variant, setup.cfg, optimum)
        changed, trained = train_variant(setup, fields, settings)
        failed = [stage.value["failure"] for stage in trained
                  if stage.value["failure"] and stage.path not in in_sweep]
        failures += [{**failure, "reason": f"{variant}: {failure['reason']}"} for failure in failed]
        finished = [stage for stage in trained if not stage.value["failure"]]
        samplers = proposals
        if changed.key != setup.key:    # a wider network: another pi_ref, another optimum, no fits
            samplers = frontier.choose_proposals(changed, trained)
        measurements += [Stage(measure_share, changed, variant, stage.value["method"],
                               stage.value["setting"], stage, samplers) for stage in finished]
        measurements += [Stage(measure_policy, changed, variant, stage.value["method"], stage)
                         for stage in nearest_to_compared_kl(finished)]
    _, beta, _ = dpo.optimal_reward(COMPARED_KL, optimum)    # the slope of the frontier is its beta
    measurements.append(Stage(measure_optimum, setup, beta, proposals))
    return setup.stages.get_all(measurements), failures


# ---------------------------------------------------------------------------------------- drawing
def draw_variants(axis, rows: list[dict]) -> None:
    """The share of the optimal gain against KL, one line for each variant."""
    lines = [("dpo", variant, f"DPO, {variant}", style) for variant, style in VARIANTS.items()]
    _, colour, marker = STYLE["ppo_gt"]
    lines.append(("ppo_gt", PAPER, "PPO-GT", (colour, marker, ":")))
    for method, variant, label, (colour, marker, line) in lines:
        points = [row for row in rows if row["method"] == method and row["variant"] == variant]
        points.sort(key=lambda row: row["kl"])
        axis.errorbar([row["kl"] for row in points], [row["share"] for row in points],
                      yerr=[row["share_se"] for row in points], label=label, color=colour,
                      marker=marker, ls=line, lw=1.4, ms=7, mec="white", elinewidth=.8)
    axis.axhline(1, color="0.25", lw=2)
    axis.set(ylim=(.7, 1.02))
    axis.set_xlabel("sequence KL(\u03c0 \u2016 \u03c0_ref), nats", fontsize=12)
    axis.set_ylabel("share of the optimal gain", fontsize=12)
    axis.legend(fontsize=10, loc="lower right")
    axis.grid(alpha=.25)


def draw_nats(axis, rows: list[dict]) -> None:
    """KL by the role of the token: a bar for the optimum and for each policy."""
    bars = [(row, "0.25", f"optimum, KL {row['kl']:.1f}") for row in rows
            if row["method"] == "optimum"]
    for row in rows:
        colour = NATS_COLOURS.get((row["method"], row["variant"]))
        if colour:
            label = short_label(row["method"])
            variant = f", {row['variant']}" if row["method"] == "dpo" else ""
            bars.append((row, colour, f"{label}{variant}, KL {row['kl']:.1f}"))
    height = .8 / max(len(bars), 1)
    for i, (row, colour, label) in enumerate(bars):
        y = [k - .4 + (i + .5) * height for k in range(len(nats.ROLES))]
        axis.barh(y, [row[role] for role in nats.ROLES], height, color=colour, label=label,
                  xerr=[row[f"{role}_se"] for role in nats.ROLES], ecolor="0.5")
    axis.set_yticks(range(len(nats.ROLES)), nats.ROLES, fontsize=11)
    axis.invert_yaxis()
    axis.set_xlabel("nats of a response, by the role of the token", fontsize=12)
    axis.legend(fontsize=10, loc="lower right")
    axis.grid(alpha=.25, axis="x")


def draw(rows: list[dict], path) -> None:
    """Left: the variants. Right: the nats by role."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4))
    draw_variants(left, [row for row in rows if row["panel"] == "share"])
    draw_nats(right, [row for row in rows if row["panel"] == "nats"])
    save(figure, path)
