"""Fig. 2, right, and Fig. 3: win rate against the reviews' own continuations, over sampling temperature and over DPO's training.

A response's opponent is the review from which its prompt was cut; the true reward judges, a tie counts half. Policies are those
nearest to 2 nats of KL at temperature 1. The paper (TL;DR, judged by GPT-4): DPO wins 61% at temperature 0, PPO 57% at its best,
which is 0 too, and PPO falls to the level of the model before SFT as the temperature rises; DPO does not.

At temperature 0 a policy says nearly the same whatever the prompt, since openings are neutral: its win rate is that of one text,
good or bad by luck, and the standard error over prompts does not know that. `distinct` counts the different rewards; points that
rest on fewer than FEW are drawn hollow.
"""
import torch
from torch import Tensor

import data
from model import GPT, respond, score_batches
from plots import nearest, plt, policy_of, save, style
from plots.frontier import clustered

METHODS = "preferred_ft", "ppo", "ppo_gt", "dpo"    # shown beside pi_ref
TEMPERATURES = 0., .25, .5, .75, 1.
ON_THE_WAY = {.25: "-", 1.: "--"}                   # temperatures of the right panel, and their lines
SAMPLES = 4                                         # responses to a prompt; temperature 0 has only one
BEST_OF = 16
FEW = 10


def win_probability(reward: Tensor, rival: Tensor) -> Tensor:
    """P(win) + P(tie) / 2 at each prompt: rewards of n responses (N, n), of the opponent's one or m (N,) or (N, m) -> (N,) float64."""
    assert reward.dtype == rival.dtype and len(reward) == len(rival), "equal rewards are ties only in the same precision"
    a, b = reward.cpu()[:, :, None], rival.cpu().reshape(len(rival), 1, -1)
    return ((a > b).double() + .5 * (a == b).double()).mean((1, 2))


def challenge(lab, texts: list[str]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The beginnings of reviews as prompts, and the true rewards of the reviews themselves: ((N, PROMPT), (N,)), (N,)."""
    prompts = data.make_prompts(lab.encoding, texts, data.rng("winrate", lab.cfg.seed))
    return tuple(p.to(lab.device) for p in prompts), torch.tensor([data.sentiment(text) for text in texts], device=lab.device)


def shown(lab, runs: list[dict]) -> list[tuple[str, float, GPT]]:
    """Method, setting and policy of pi_ref and of the run that stands for each method."""
    chosen = [run for run in (nearest(runs, method) for method in METHODS) if run]
    return [("sft", 0., lab.ref)] + [(run["method"], run["setting"], policy_of(lab, run["policy"])) for run in chosen]


def respond_at(lab, policy: GPT, prompts: tuple[Tensor, Tensor], count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """`respond` with the same random numbers for every policy: differences between them are less noisy than each of them."""
    generator = data.torch_rng("winrate", lab.cfg.seed, temperature, device=lab.device)
    return respond(policy, prompts, count, lab.cfg.max_tokens, lab.encoding.eot_token, generator, temperature)


def rewards_at(lab, policy: GPT, prompts: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """True rewards of a policy's responses: (N, SAMPLES), or (N, 1) at temperature 0."""
    return lab.reward(*respond_at(lab, policy, prompts, SAMPLES if temperature else 1, temperature)).view(len(prompts[0]), -1)


def best_rewards(lab, prompts: tuple[Tensor, Tensor], temperature: float) -> Tensor:
    """True reward of the one of BEST_OF responses of pi_ref that the learned reward likes best: (N, 1). Argmax at temperature 0."""
    ids, mask = respond_at(lab, lab.ref, prompts, BEST_OF if temperature else 1, temperature)
    score = score_batches(lab.learned, ids, mask).view(len(prompts[0]), -1)
    best = score.argmax(1) + score.shape[1] * torch.arange(len(score), device=score.device)
    return lab.reward(ids[best], mask[best])[:, None]


def measure(lab, runs: list[dict]) -> list[dict]:
    """A row a policy and temperature; `step` is None for finished policies, of the right panel's otherwise."""
    prompts, rival = challenge(lab, lab.corpus[lab.cfg.split][:4 * lab.cfg.eval_prompts])

    def row(method: str, setting: float, temperature: float, step: int | None, reward: Tensor) -> dict:
        rate, se = clustered(win_probability(reward, rival)[:, None])
        return {"figure": "winrate", "method": method, "setting": setting, "temperature": temperature, "step": step,
                "win_rate": rate, "win_rate_se": se, "distinct": len(reward.unique())}

    rows = [row(method, setting, t, None, rewards_at(lab, policy, prompts, t))
            for method, setting, policy in shown(lab, runs) for t in TEMPERATURES]
    rows += [row("best_of_n", float(BEST_OF), t, None, best_rewards(lab, prompts, t)) for t in TEMPERATURES]
    run = nearest(runs, "dpo") or {"way": []}
    return rows + [row("dpo", run["setting"], t, step, rewards_at(lab, policy_of(lab, state), prompts, t))
                   for step, state in run["way"] for t in ON_THE_WAY]


def draw_marks(axis, rows: list[dict], x: list[float], look: tuple[str, str, str], size: float) -> None:
    """Error bars and marks of some rows, hollow where they rest on few different responses."""
    for r, where in zip(rows, x):
        axis.errorbar([where], [r["win_rate"]], [r["win_rate_se"]], fmt=look[2], color=look[1], ms=size, mew=1.3, elinewidth=1.2,
                      mfc="white" if r["distinct"] < FEW else look[1], mec=look[1] if r["distinct"] < FEW else "white")


def draw(rows: list[dict], path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.4), sharey=True)
    finished, on_way = [r for r in rows if r["step"] is None], [r for r in rows if r["step"] is not None]
    there = {r["method"] for r in finished}
    for i, (method, look) in enumerate((m, s) for m, s in style(there).items() if m in there):
        mine = [r for r in finished if r["method"] == method]
        x = [r["temperature"] + .012 * (i - 2.5) for r in mine]    # beside each other, not on top
        left.plot(x, [r["win_rate"] for r in mine], "-", color=look[1], lw=1.6)
        draw_marks(left, mine, x, look, 11 if method == "sft" else 8)
        left.plot([], [], look[2] + "-", color=look[1], ms=8, label=look[0])
    left.plot([], [], "o", color="0.4", mfc="white", ms=8, label="hollow: nearly one text for all prompts")
    left.set(xlabel="sampling temperature", ylabel="win rate against the review itself", xticks=TEMPERATURES, ylim=(-.02, 1.02))
    look = style(())["dpo"]
    for t, line in ON_THE_WAY.items():
        mine = [{**r, "step": 0} for r in finished if r["method"] == "sft" and r["temperature"] == t and on_way] \
            + [r for r in on_way if r["temperature"] == t]
        x, y, se = ([r[name] for r in mine] for name in ("step", "win_rate", "win_rate_se"))
        right.plot(x, y, line, color=look[1], lw=1.6, label=f"DPO, temperature {t:g}")
        right.fill_between(x, [a - b for a, b in zip(y, se)], [a + b for a, b in zip(y, se)], color=look[1], alpha=.15, lw=0)
        draw_marks(right, mine, x, look, 8)
    right.set(xlabel="steps of DPO (0: SFT)")
    for axis in (left, right):
        axis.axhline(.5, color="0.5", ls=":", lw=1.2, zorder=0)
        axis.grid(alpha=.25)
        axis.tick_params(labelsize=12)
        axis.xaxis.label.set_size(14), axis.yaxis.label.set_size(14)
        axis.legend(fontsize=12, loc="lower center", bbox_to_anchor=(.5, 1.), ncols=2 if axis is left else 1, frameon=False)
    save(figure, path)
