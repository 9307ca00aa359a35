"""Table 3: how Unlikelihood degenerates, and DPO does not: length, repetition, grammar and reward over training.

What Section 4's weight sigma(rhat_l - rhat_w) is for: it takes the push off pairs that are apart. Unlikelihood has no such weight;
at alpha 1 it is DPO with a constant one (`dpo.constant_weight_loss`).
"""
import itertools

import torch

from data import decode, is_grammatical, torch_rng
from model import respond
from plots import nearest, plt, policy_of, save, style
from plots.frontier import clustered

SAMPLES = 4    # responses to each prompt
PANELS = {"length": "response length, tokens", "distinct_2": "distinct bigrams / bigrams", "grammatical": "grammatical share",
          "reward": "true reward"}


def distinct_2(responses: list[list[int]]) -> float:
    """Distinct bigrams / bigrams of a prompt's responses (token ids): 1 if none comes twice, near 0 for a loop; 0 without any."""
    bigrams = [pair for tokens in responses for pair in itertools.pairwise(tokens)]
    return len(set(bigrams)) / max(len(bigrams), 1)


def judge(lab, policy, *names) -> dict:
    """The numbers of PANELS for one policy, their standard errors clustered by prompt, and its first response to the first prompt."""
    prompts = len(lab.prompts[0])
    ids, mask = respond(policy, lab.prompts, SAMPLES, lab.cfg.max_tokens, lab.encoding.eot_token,
                        torch_rng("degeneration", lab.cfg.seed, *names, device=lab.device))
    tokens, texts = [row[m].tolist() for row, m in zip(ids, mask)], decode(lab.encoding, ids, mask)
    values = {"length": mask.sum(1), "distinct_2": torch.tensor([distinct_2(tokens[i:i + SAMPLES]) for i in range(0, len(ids), SAMPLES)]),
              "grammatical": torch.tensor([is_grammatical(text) for text in texts]), "reward": lab.reward(ids, mask)}
    row = {}
    for name, x in values.items():
        row[name], row[name + "_se"] = clustered(x.view(prompts, -1))
    return {**row, "sample": texts[0]}


def shown(runs: list[dict]) -> list[dict]:
    """DPO near KL 2; Unlikelihood at its largest and smallest alpha, of the first seed, failed or not."""
    alphas = sorted((run for run in runs if run["method"] == "unlikelihood" and run["seed"] == runs[0]["seed"]), key=lambda run: run["setting"])
    return [run for run in (nearest(runs, "dpo"), *alphas[-1:], *alphas[:-1][:1]) if run]


def measure(lab, runs: list[dict]) -> list[dict]:
    """pi_ref, then the policies kept on the way of each run shown, or the final one where no other was kept."""
    rows = [{"figure": "degeneration", "method": "sft", "setting": 0., "step": 0, **judge(lab, lab.ref, "sft")}]
    for run in shown(runs):
        for step, state in run["way"] or [(row["step"], run["policy"]) for row in run["rows"][-1:] if run["policy"]]:
            name = {"method": run["method"], "setting": run["setting"], "step": step}
            rows.append({"figure": "degeneration", **name, **judge(lab, policy_of(lab, state), *name.values())})
    return rows


def draw(rows: list[dict], path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), sharex=True)
    start, lines, samples = rows[0], {}, ["At the end, the first response to the first prompt:"]
    for row in rows[1:]:
        lines.setdefault((row["method"], row["setting"]), []).append(row)
    drawn = []    # methods, in order: a second line of one is dashed
    for (method, setting), line in lines.items():
        label, colour, marker = style([method])[method]
        label += {"unlikelihood": f", \u03b1 = {setting:g}", "dpo": f", \u03b2 = {setting:g}"}.get(method, "")
        line = [start, *line] if len(line) > 1 else line    # a final policy alone is a point: how it came there was not seen
        for axis, name in zip(axes.flat, PANELS):
            axis.errorbar([row["step"] for row in line], [row[name] for row in line], [row[name + "_se"] for row in line], color=colour,
                          fmt=marker + ("--" if method in drawn else "-"), mfc="white" if method in drawn else colour, ms=7, lw=1.6,
                          elinewidth=1, capsize=2, label=label)
        drawn.append(method)
        samples.append(f"{label}: {readable(line[-1]['sample'])}")
    for axis, (name, title) in zip(axes.flat, PANELS.items()):
        axis.errorbar([0], [start[name]], [start[name + "_se"]], fmt="*", color="black", ms=13, label="SFT (\u03c0_ref)", zorder=5)
        axis.set_title(title, fontsize=12)
        axis.set_ylim(0, None if name == "length" else 1.04)
        axis.grid(alpha=.25)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=12)
    axes[1, 1].legend(fontsize=10, loc="lower right")
    figure.supxlabel("\n".join(samples), x=.02, ha="left", fontsize=10)
    save(figure, path)


def readable(text: str, width: int = 100) -> str:
    """One line of printable ASCII: a degenerate policy writes any bytes."""
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in text).replace("$", "\\$")
    return text if len(text) <= width else text[:width] + " ..."
