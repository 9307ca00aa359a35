"""Over-optimisation: the learned reward rises, the true one does not (Gao et al. 2023, Fig. 1).

The two rewards have no common unit: the true reward is at most 1, the learned one is not bounded.
So the learned reward of a response is converted to the true reward that has the same rank among
responses of pi_ref. If the learned reward ranks all responses as the true reward does, the two
agree at every KL.
"""
import numpy
import torch
from torch import Tensor

import data
from model import generate, map_batches
from plots import STYLE, evaluation_prompts, load_policy, mean_and_se, plt, save

SAMPLES = 8            # responses to each prompt
REF_SAMPLES = 64       # responses of pi_ref to each prompt, for the ranks
MARKERS = "osD^v<>"    # one for each target KL


def matched_true_reward(learned: Tensor, ref_learned: Tensor, ref_true: Tensor) -> Tensor:
    """The true reward with the same rank among samples of pi_ref as each learned reward.

    learned (B,), ref_learned (M,) and ref_true (M,) of M samples -> (B,) float64, linear between
    ranks.
    """
    sorted_learned = ref_learned.cpu().sort().values
    sorted_true = ref_true.cpu().sort().values
    return torch.from_numpy(numpy.interp(learned.cpu(), sorted_learned, sorted_true))


def policy_rewards(setup, state: dict, samples: int, *names) -> tuple[Tensor, Tensor]:
    """True and learned reward of a policy's responses to the evaluation prompts, (B,) each.

    `state` holds its parameters, {} for pi_ref; B = prompts * samples; `names` name the random
    generator.
    """
    generator = data.named_generator("overoptimisation", setup.cfg.seed, *names,
                                     device=setup.device)
    ids, mask = generate(load_policy(setup, state), evaluation_prompts(setup), samples,
                         setup.cfg.max_tokens, setup.encoding.eot_token, generator)
    true = data.true_reward(setup.encoding, ids, mask)
    return true, map_batches(setup.learned_reward, ids, mask)


def measure(setup, runs: list[dict]) -> list[dict]:
    """True reward and matched true reward of all checkpoints of PPO."""
    ref_true, ref_learned = policy_rewards(setup, {}, REF_SAMPLES, "sft")
    rows = []
    for run in runs:
        if run["method"] != "ppo":
            continue
        for evaluation, state in zip(run["rows"], run["checkpoints"]):
            step = evaluation["step"]
            true, learned = policy_rewards(setup, state, SAMPLES, run["setting"], step)
            matched = matched_true_reward(learned, ref_learned, ref_true)
            row = {"figure": "overoptimisation", "setting": run["setting"], "step": step,
                   "kl": evaluation["kl"]}
            row["true"], row["true_se"] = mean_and_se(true.view(-1, SAMPLES))
            row["learned"], row["learned_se"] = mean_and_se(matched.view(-1, SAMPLES))
            rows.append(row)
    return rows


def draw(rows: list[dict], path) -> None:
    """Draw both rewards of each checkpoint against its KL; a grey line joins the two."""
    figure, axis = plt.subplots(figsize=(8, 5))
    colour = STYLE["ppo"][1]
    fills = {"learned": "white", "true": colour}
    settings = sorted({row["setting"] for row in rows})
    markers = {setting: MARKERS[i % len(MARKERS)] for i, setting in enumerate(settings)}
    for setting, marker in markers.items():
        run = [row for row in rows if row["setting"] == setting]
        run.sort(key=lambda row: row["step"])
        kl = [row["kl"] for row in run]
        axis.vlines(kl, [row["true"] for row in run], [row["learned"] for row in run], color="0.8",
                    lw=1, zorder=0)
        for name, fill in fills.items():
            axis.errorbar(kl, [row[name] for row in run], yerr=[row[f"{name}_se"] for row in run],
                          fmt=marker, ms=7, mfc=fill, color=colour, elinewidth=.8)
    labels = {"learned": "promised by the learned reward, on which PPO is trained",
              "true": "true reward"}
    for name, fill in fills.items():
        axis.plot([], [], "o", mfc=fill, color=colour, label=labels[name])
    for setting, marker in markers.items():
        axis.plot([], [], marker, color="0.4", label=f"target KL {setting:g}")
    axis.set_xlabel("sequence KL(\u03c0 \u2016 \u03c0_ref), nats, during training", fontsize=12)
    axis.set_ylabel("true reward (probability of positive sentiment)", fontsize=12)
    axis.grid(alpha=.25)
    axis.legend(fontsize=11, loc="lower right")
    save(figure, path)
