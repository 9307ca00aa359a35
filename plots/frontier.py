"""Fig. 2, left: true reward against KL(pi || pi_ref), every method under the exact optimum."""
import statistics
from functools import partial

import torch
from torch import Tensor

import dpo
from data import torch_rng
from model import GPT, respond, response_kl, score_batches
from plots import SOLID, plt, save, style

RIGHT = 10.     # nats shown; finished policies beyond are drawn at the edge, with their KL beside them


def clustered(x: Tensor) -> tuple[float, float]:
    """Mean and its standard error over prompts: (X prompts, n samples) -> two numbers. Samples of a prompt are not independent."""
    by_prompt = x.cpu().double().mean(1)
    return by_prompt.mean().item(), (by_prompt.std() / len(by_prompt) ** .5).item()


def averages(steps: list[dict[str, float]]) -> dict[str, float]:
    """Over the steps of training since a policy was last judged: each number's mean, and its standard error as `name_se`."""
    means = {}
    for name in steps[0]:
        x = torch.tensor([step[name] for step in steps], dtype=torch.float64)
        means |= {name: x.mean().item(), f"{name}_se": x.std(correction=0).item() / max(len(x) - 1, 1) ** .5}
    return means


def measure(lab, policy: GPT, samples: int, *names) -> dict[str, float]:
    """Mean true reward and mean sequence KL of a policy on the prompts that judge, with standard errors; `names` name the generator."""
    ids, mask = respond(policy, lab.prompts, samples, lab.cfg.max_tokens, lab.encoding.eot_token, torch_rng("judge", *names, device=lab.device))
    r = lab.reward(ids, mask).view(-1, samples)
    kl = score_batches(lambda a, b: response_kl(policy, lab.ref, a, b), ids, mask, batch=64).view(-1, samples)
    (mean_r, se_r), (mean_kl, se_kl) = clustered(r), clustered(kl)
    return {"reward": mean_r, "reward_se": se_r, "kl": mean_kl, "kl_se": se_kl, "length": mask.sum(1).float().mean().item()}


def optimum(lab, key: str) -> dict:
    """The optimal frontier of the prompts that judge, from many responses of pi_ref to each; and pi_ref's own mean reward."""
    cfg, parts = lab.cfg, list(zip(*(p.split(1) for p in lab.prompts)))

    def make(i: int) -> Tensor:
        generator = torch_rng("optimum", cfg.seed, i, device=lab.device)
        return lab.reward(*respond(lab.ref, parts[i], cfg.optimum_samples, cfg.max_tokens, lab.encoding.eot_token, generator)).cpu()

    reward = torch.stack(lab.stages.share([(f"optimum-{i}", key, partial(make, i)) for i in range(len(parts))]))
    return {**dpo.optimal_frontier(reward, torch.logspace(-3.5, 1.5, 400)), "ref_reward": reward.mean().item()}


def draw_optimum(axis, optimum: dict) -> None:
    """The optimal frontier: solid where its estimate rests on enough samples, dashed beyond, shaded where no policy can be."""
    points = sorted(zip(optimum["kl"], optimum["reward"], optimum["ess"]))
    kl, reward, ess = zip(*points)
    solid = sum(e >= SOLID for e in ess)
    axis.fill_between(kl, reward, 1.02, color="0.93", lw=0)
    axis.plot(kl[:solid], reward[:solid], color="0.25", lw=2, label="optimum (Eq. 4)")
    axis.plot(kl[max(solid - 1, 0):], reward[max(solid - 1, 0):], "--", color="0.25", lw=1.5, label="the same, too few samples")


def over_seeds(rows: list[dict]) -> list[dict]:
    """One row for each method and setting, along its KL: means over seeds. Standard errors are over seeds, or over prompts where there is one seed."""
    groups, found = {}, []
    for row in rows:
        groups.setdefault((row["method"], row["setting"]), []).append(row)
    for mine in groups.values():
        mean = {name: statistics.fmean(row[name] for row in mine) for name in ("kl", "kl_se", "reward", "reward_se")}
        if len({row["reward"] for row in mine}) > 1:    # SFT is the same for all seeds, and keeps its own
            mean |= {f"{name}_se": statistics.stdev(row[name] for row in mine) / len(mine) ** .5 for name in ("kl", "reward")}
        found.append({**mine[0], **mean})
    return sorted(found, key=lambda row: row["kl"])


def draw(rows: list[dict], optimum: dict, path) -> None:
    figure, axis = plt.subplots(figsize=(10.5, 5.4))
    draw_optimum(axis, optimum)
    looks = style(row["method"] for row in rows)
    for method, (label, colour, marker) in looks.items():
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        on_way, final = [row for row in mine if not row["final"] and row["kl"] <= RIGHT], over_seeds([row for row in mine if row["final"]])
        axis.scatter([r["kl"] for r in on_way], [r["reward"] for r in on_way], s=9, color=colour, alpha=.35, lw=0)
        if method in ("best_of_n", "best_of_n_gt"):    # not trained: a curve over N
            axis.plot([r["kl"] for r in final], [r["reward"] for r in final], ":", color=colour, marker=marker, ms=4, lw=1.2, label=label, zorder=3)
            continue
        axis.errorbar([min(r["kl"], RIGHT) for r in final], [r["reward"] for r in final],
                      xerr=[r["kl_se"] if r["kl"] <= RIGHT else 0. for r in final], yerr=[r["reward_se"] for r in final],
                      fmt=marker, color=colour, ms=13 if method == "sft" else 8, mec="white", mew=.7, elinewidth=1,
                      label=label, zorder=4, clip_on=False)
    axis.scatter([], [], s=9, color="0.5", lw=0, label="on the way, in its colour")
    height = 0.
    far = [row for row in over_seeds([row for row in rows if row["final"]]) if row["kl"] > RIGHT]
    for r in sorted(far, key=lambda r: r["reward"]):
        height = max(r["reward"], height + .025)    # labels of neighbours stand above each other
        axis.annotate(f"{looks[r['method']][0]}, KL {r['kl']:.0f} \u2192", (RIGHT, height), (-10, 0), textcoords="offset points", ha="right", va="center", fontsize=9)
    bottom = min([row["reward"] for row in rows if row["kl"] <= RIGHT or row["final"]])
    axis.set(xlim=(-.2, RIGHT), ylim=(min(.45, bottom - .03), 1.02), xlabel="sequence KL(\u03c0 \u2016 \u03c0_ref), nats",
             ylabel="true reward (probability of positive sentiment)")
    axis.xaxis.label.set_size(12), axis.yaxis.label.set_size(12)
    axis.grid(alpha=.25)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, .5), fontsize=11, frameon=False)    # outside: every place inside may hold a point
    save(figure, path)
