"""Table 2: do judges agree? The true reward, two simulated annotators and the learned reward model on the same comparisons.

An annotator prefers response 1 with the probability of Eq. 1 at rewards r / tau, a coin of its own each time: two of them agree
no more than chance and tau allow, as two people do. DPO, SFT and PPO each meet one fixed policy, as in the paper; there it is
PPO at temperature 0, here Preferred-FT (pi_ref if there is none), and all are at temperature 1: it stands between SFT and the
others, so that nobody wins always. An argmax would be one and the same text at nearly every prompt, brilliant or awful by luck.
The paper: DPO, SFT and PPO (at temperature 1) win 58, 43, 17% by humans, 54, 32, 12% by GPT-4 (C); humans agree with each other
in 65% (DPO) and 87% (PPO) of comparisons, GPT-4 (C) with humans in 67, 79 and 85%.
"""
import itertools

import torch
from torch import Tensor

import data
from model import respond, score_batches
from plots import nearest, plt, policy_of, save, style
from plots.frontier import clustered

JUDGES = {"true": "true reward", "annotator_1": "annotator 1", "annotator_2": "annotator 2", "learned": "learned reward"}
MARKERS = "D", "<", ">", "s"


def verdict(r_1: Tensor, r_2: Tensor) -> Tensor:
    """1 where the first wins, 0 where the second does, a half where they tie: (X, n), (X, n) -> (X, n) float64."""
    return (r_1 > r_2).double() + .5 * (r_1 == r_2).double()


def annotate(r_1: Tensor, r_2: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """Verdicts of an annotator: 1 with probability sigma((r_1 - r_2) / tau), else 0; (X, n), (X, n) -> (X, n) float64."""
    return (torch.rand(r_1.shape, generator=generator) < data.bradley_terry(r_1 / tau, r_2 / tau)).double()


def agreement(verdicts: Tensor, others: Tensor) -> Tensor:
    """1 where two judges say the same, 0 where the opposite, a half where only one sees a tie: (X, n), (X, n) -> (X, n)."""
    return 1 - (verdicts - others).abs()


def verdicts_of(lab, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], name: str) -> dict[str, Tensor]:
    """Each judge's verdicts on responses (ids, mask) against others to the same prompts, X prompts with n each: (X, n)."""
    shape = len(lab.prompts[0]), -1
    true = [lab.reward(*rows).cpu().view(shape) for rows in (first, second)]
    learned = [score_batches(lab.learned, *rows).cpu().view(shape) for rows in (first, second)]
    people = [annotate(*true, lab.cfg.tau, data.torch_rng("annotator", lab.cfg.seed, i, name)) for i in (1, 2)]
    return dict(zip(JUDGES, (verdict(*true), *people, verdict(*learned))))


def measure(lab, runs: list[dict]) -> list[dict]:
    """Rows of win rates, one a judge and method, and rows of agreements over all comparisons, one a pair of judges."""
    cfg = lab.cfg

    def responses(name: str, state: dict) -> tuple[Tensor, Tensor]:
        generator = data.torch_rng("judges", cfg.seed, name, device=lab.device)
        return respond(policy_of(lab, state), lab.prompts, cfg.eval_samples, cfg.max_tokens, lab.encoding.eot_token, generator)

    sft = {"method": "sft", "setting": 0., "policy": {}}
    fixed = nearest(runs, "preferred_ft") or sft
    opponent = responses("fixed", fixed["policy"])
    compared = [run for run in (nearest(runs, "dpo"), sft, nearest(runs, "ppo")) if run]
    rows, verdicts = [], []
    for run in compared:
        verdicts.append(verdicts_of(lab, responses(run["method"], run["policy"]), opponent, run["method"]))
        for judge, says in verdicts[-1].items():
            rate, se = clustered(says)
            rows.append({"figure": "judges", "method": run["method"], "setting": run["setting"], "against": fixed["method"],
                         "judge": judge, "win_rate": rate, "win_rate_se": se})
    for judge, other in itertools.combinations(JUDGES, 2):
        same, se = clustered(torch.cat([agreement(says[judge], says[other]) for says in verdicts], 1))
        rows.append({"figure": "judges", "judge": judge, "other": other, "agreement": same, "agreement_se": se})
    return rows


def draw(rows: list[dict], path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), width_ratios=(1.15, 1))
    rates, looks = [r for r in rows if "method" in r], style(())
    methods = list(dict.fromkeys(r["method"] for r in rates))
    for (i, method), (j, judge) in itertools.product(enumerate(methods), enumerate(JUDGES)):
        mine = [r for r in rates if (r["method"], r["judge"]) == (method, judge)]
        left.errorbar([i + .16 * (j - 1.5)] * len(mine), [r["win_rate"] for r in mine], [r["win_rate_se"] for r in mine], fmt=MARKERS[j],
                      color=looks[method][1], ms=6, elinewidth=1.5, capsize=5)
    for marker, label in zip(MARKERS, JUDGES.values()):
        left.plot([], [], marker, color="0.4", ms=9, label=label)
    left.axhline(.5, color="0.5", ls=":", lw=1.2, zorder=0)
    left.set_xticks(range(len(methods)), [looks[m][0].split(" (")[0] for m in methods])
    left.set(xlim=(-.5, len(methods) - .5))
    left.set_ylabel(f"win rate against {looks[rates[0]['against']][0]}", fontsize=14)
    left.grid(axis="y", alpha=.25)
    left.legend(fontsize=12, loc="lower center", bbox_to_anchor=(.5, 1.), ncols=2, frameon=False)
    matrix = torch.ones(len(JUDGES), len(JUDGES))
    for r in (r for r in rows if "other" in r):
        i, j = (list(JUDGES).index(r[name]) for name in ("judge", "other"))
        matrix[i, j] = matrix[j, i] = r["agreement"]
        for a, b in ((i, j), (j, i)):
            right.text(b, a, f"{r['agreement']:.0%}\n\u00b1 {r['agreement_se']:.1%}", ha="center", va="center", fontsize=13)
    right.imshow(matrix.fill_diagonal_(torch.nan).numpy(), cmap="Blues", vmin=.4, vmax=1.3)    # pale, under the numbers
    names = [label.replace(" ", "\n") for label in JUDGES.values()]
    right.set_xticks(range(len(names)), names)
    right.set_yticks(range(len(names)), names)
    right.set_title("two judges agree on", fontsize=14)
    left.tick_params(labelsize=13), right.tick_params(labelsize=12, length=0)
    save(figure, path)
