"""PPO's learned reward against the true one: where the proxy rises and the truth does not follow (Gao et al. 2023, Fig. 1).

The two have no common unit: the true reward ends at 1, the learned one nowhere. So the learned reward of a response is shown as what
it promises: the true reward that has the same rank among responses of pi_ref. For a proxy that ranks as the truth does the two
agree at every KL.
"""
import numpy
import torch
from torch import Tensor

from data import torch_rng
from model import respond, score_batches
from plots import STYLE, plt, policy_of, save
from plots.frontier import clustered

SAMPLES = 8       # responses to each prompt
RANKED = 64       # of pi_ref


def promise(learned: Tensor, ref_learned: Tensor, ref_true: Tensor) -> Tensor:
    """The true reward with the rank, among samples of pi_ref, of a learned one: (B,), (M,), (M,) -> (B,) float64, linear between ranks."""
    ranks = ref_learned.cpu().sort().values, ref_true.cpu().sort().values
    return torch.from_numpy(numpy.interp(learned.cpu(), *ranks))


def measure(lab, runs: list[dict]) -> list[dict]:
    """True reward and what the learned one promises, of PPO's policies all the way."""
    def rewards(state: dict, samples: int, *names) -> tuple[Tensor, Tensor]:
        ids, mask = respond(policy_of(lab, state), lab.prompts, samples, lab.cfg.max_tokens, lab.encoding.eot_token,
                            torch_rng("overoptimisation", *names, device=lab.device))
        return lab.reward(ids, mask), score_batches(lab.learned, ids, mask)

    (ref_true, ref_learned), rows = rewards({}, RANKED, "sft"), []
    for run in (run for run in runs if run["method"] == "ppo" and run["seed"] == lab.cfg.seed):
        for (step, state), at in zip(run["way"], run["rows"]):
            true, learned = rewards(state, SAMPLES, run["setting"], step)
            rows.append({"figure": "overoptimisation", "setting": run["setting"], "step": step, "kl": at["kl"]})
            for name, r in (("true", true), ("learned", promise(learned, ref_learned, ref_true))):
                rows[-1][name], rows[-1][f"{name}_se"] = clustered(r.view(-1, SAMPLES))
    return rows


def draw(rows: list[dict], path) -> None:
    figure, axis = plt.subplots(figsize=(8, 5))
    colour = STYLE["ppo"][1]
    settings = sorted({row["setting"] for row in rows})
    for i, setting in enumerate(settings):
        mine = sorted((row for row in rows if row["setting"] == setting), key=lambda row: row["step"])
        axis.vlines([r["kl"] for r in mine], [r["true"] for r in mine], [r["learned"] for r in mine], color="0.8", lw=1, zorder=0)
        for name, fill in (("learned", "white"), ("true", colour)):
            axis.errorbar([r["kl"] for r in mine], [r[name] for r in mine], yerr=[r[f"{name}_se"] for r in mine], fmt="osD^v<>"[i % 7],
                          ms=7, mfc=fill, color=colour, elinewidth=.8)
    for name, fill in (("what the learned reward, which PPO is paid, promises", "white"), ("true reward", colour)):
        axis.plot([], [], "o", mfc=fill, color=colour, label=name)
    for i, setting in enumerate(settings):
        axis.plot([], [], "osD^v<>"[i % 7], color="0.4", label=f"target KL {setting:g}")
    axis.set(xlabel="sequence KL(\u03c0 \u2016 \u03c0_ref), nats, during training", ylabel="true reward (probability of positive sentiment)")
    axis.xaxis.label.set_size(12), axis.yaxis.label.set_size(12)
    axis.grid(alpha=.25)
    axis.legend(fontsize=11, loc="lower right")
    save(figure, path)
