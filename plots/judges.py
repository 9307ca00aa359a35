"""Table 2: how often four judges agree about the same comparisons of two responses.

The judges are the true reward, two simulated annotators and the learned reward. An annotator
prefers response 1 with the probability of Eq. 1 at rewards r / tau, independently each time. So two
annotators agree only as often as chance and tau allow, like two people.

DPO, SFT and PPO are compared with one fixed opponent, as in the paper. The paper's opponent is PPO
at temperature 0. Here it is Preferred-FT (pi_ref if there is none), and all policies are at
temperature 1. Preferred-FT stands between SFT and the others, so that no policy always wins. At
temperature 0 an opponent would write the same text at nearly every prompt, good or bad by luck.

The paper: DPO, SFT and PPO (at temperature 1) win 58, 43, 17% by humans, 54, 32, 12% by GPT-4 (C).
Humans agree with each other in 65% (DPO) and 87% (PPO) of comparisons, and GPT-4 (C) agrees with
humans in 67% (DPO), 79% (SFT) and 85% (PPO).
"""
import itertools

import torch
from torch import Tensor

import data
from model import generate, map_batches
from plots import (REFERENCE, STYLE, checkpoint_near_kl, evaluation_prompts, label_with_kl,
                   load_policy, mean_and_se, plt, save, verdict)

JUDGES = {"true": "true reward", "annotator_1": "annotator 1", "annotator_2": "annotator 2",
          "learned": "learned reward"}
MARKERS = "D", "<", ">", "s"    # one for each judge


# ----------------------------------------------------------------------------------------- verdicts
def annotate(r_1: Tensor, r_2: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """Verdicts of an annotator: 1 with probability sigma((r_1 - r_2) / tau), else 0     (Eq. 1).

    r_1 (X, n), r_2 (X, n) -> (X, n) float64.
    """
    p = data.bradley_terry(r_1 / tau, r_2 / tau)
    return (torch.rand(r_1.shape, generator=generator) < p).double()


def agreement(verdicts_1: Tensor, verdicts_2: Tensor) -> Tensor:
    """1 where two judges give the same verdict, 0 where the opposite, .5 where only one sees a tie.

    verdicts_1 (X, n), verdicts_2 (X, n) -> (X, n).
    """
    return 1 - (verdicts_1 - verdicts_2).abs()


# ------------------------------------------------------------------------------------------ measure
def generate_responses(setup, name: str, state: dict) -> tuple[Tensor, Tensor]:
    """Responses of the policy with parameters `state` to the evaluation prompts: ids, mask.

    `name` names the random generator.
    """
    cfg = setup.cfg
    generator = data.named_generator("judges", cfg.seed, name, device=setup.device)
    return generate(load_policy(setup, state), evaluation_prompts(setup), cfg.eval_samples,
                    cfg.max_tokens, setup.encoding.eot_token, generator)


def compare(setup, method: str, responses: tuple[Tensor, Tensor],
            opponent_responses: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The verdicts of each judge on a method's responses against those of the opponent: (X, n).

    Both sides are (ids, mask) of n responses to each of X prompts.
    """
    shape = setup.cfg.eval_prompts, -1
    true_rewards, learned_rewards = [], []    # (X, n) of each side
    for ids, mask in (responses, opponent_responses):
        true_rewards.append(data.true_reward(setup.encoding, ids, mask).cpu().view(shape))
        learned_rewards.append(map_batches(setup.learned_reward, ids, mask).cpu().view(shape))
    verdicts = {"true": verdict(*true_rewards)}
    for i in (1, 2):
        generator = data.named_generator("annotator", setup.cfg.seed, i, method)
        verdicts[f"annotator_{i}"] = annotate(*true_rewards, setup.cfg.tau, generator)
    verdicts["learned"] = verdict(*learned_rewards)
    return verdicts


def measure(setup, runs: list[dict]) -> list[dict]:
    """Rows of win rates and rows of agreements.

    There is a win rate for each method and judge, and an agreement, over the comparisons of all
    methods, for each pair of judges.
    """
    opponent = checkpoint_near_kl(runs, "preferred_ft") or REFERENCE
    opponent_responses = generate_responses(setup, "fixed", opponent["state"])
    candidates = [checkpoint_near_kl(runs, "dpo"), REFERENCE, checkpoint_near_kl(runs, "ppo")]
    rows, verdicts_by_method = [], []
    for policy in [policy for policy in candidates if policy]:
        responses = generate_responses(setup, policy["method"], policy["state"])
        verdicts = compare(setup, policy["method"], responses, opponent_responses)
        verdicts_by_method.append(verdicts)
        for judge in JUDGES:
            win_rate, win_rate_se = mean_and_se(verdicts[judge])
            rows.append({"figure": "judges",
                         **{name: policy[name] for name in ("method", "setting", "step", "kl")},
                         "against": opponent["method"], "judge": judge, "win_rate": win_rate,
                         "win_rate_se": win_rate_se})
    for judge, other in itertools.combinations(JUDGES, 2):
        agreements = [agreement(verdicts[judge], verdicts[other])
                      for verdicts in verdicts_by_method]
        mean, se = mean_and_se(torch.cat(agreements, 1))
        rows.append({"figure": "judges", "judge": judge, "other": other, "agreement": mean,
                     "agreement_se": se})
    return rows


# --------------------------------------------------------------------------------------------- draw
def draw_win_rates(axis, rows: list[dict]) -> None:
    """A group of points for each method, one point for each judge."""
    methods = list(dict.fromkeys(row["method"] for row in rows))    # in the order of the rows
    row_of = {(row["method"], row["judge"]): row for row in rows}
    for i, method in enumerate(methods):
        for j, judge in enumerate(JUDGES):
            row = row_of[method, judge]
            axis.errorbar([i + .16 * (j - 1.5)], [row["win_rate"]], [row["win_rate_se"]],
                          fmt=MARKERS[j], color=STYLE[method][1], ms=6, elinewidth=1.5, capsize=5)
    for marker, label in zip(MARKERS, JUDGES.values()):
        axis.plot([], [], marker, color="0.4", ms=9, label=label)
    axis.axhline(.5, color="0.5", ls=":", lw=1.2, zorder=0)
    labels = [label_with_kl(row_of[method, "true"]).replace(", ", ",\n") for method in methods]
    axis.set_xticks(range(len(methods)), labels)
    axis.set(xlim=(-.5, len(methods) - .5))
    axis.set_ylabel(f"win rate against {STYLE[rows[0]['against']][0]}", fontsize=14)
    axis.tick_params(labelsize=13)
    axis.grid(axis="y", alpha=.25)
    axis.legend(fontsize=12, loc="lower center", bbox_to_anchor=(.5, 1.), ncols=2, frameon=False)


def draw_agreements(axis, rows: list[dict]) -> None:
    """A symmetric matrix of the agreements of two judges, with standard errors."""
    judges = list(JUDGES)
    matrix = torch.full((len(judges), len(judges)), torch.nan)
    for row in rows:
        i = judges.index(row["judge"])
        j = judges.index(row["other"])
        text = f"{row['agreement']:.0%}\n\u00b1 {row['agreement_se']:.1%}"
        for x, y in ((i, j), (j, i)):
            matrix[y, x] = row["agreement"]
            axis.text(x, y, text, ha="center", va="center", fontsize=13)
    axis.imshow(matrix.numpy(), cmap="Blues", vmin=.4, vmax=1.3)    # pale, so that text is legible
    names = [label.replace(" ", "\n") for label in JUDGES.values()]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(labelsize=12, length=0)
    axis.set_title("agreement between two judges", fontsize=14)


def draw(rows: list[dict], path) -> None:
    """Left: win rates by each judge. Right: agreements between judges."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), width_ratios=(1.15, 1))
    draw_win_rates(left, [row for row in rows if "method" in row])
    draw_agreements(right, [row for row in rows if "other" in row])
    save(figure, path)
