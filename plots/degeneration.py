"""Table 3: Unlikelihood degenerates during training and DPO does not.

The panels show length, repetition, grammar and true reward over training. The difference is the
weight sigma(rhat_l - rhat_w) of Section 4: it reduces the gradient of pairs that the policy already
ranks right. Unlikelihood has no such weight; at alpha = 1 it is DPO with a constant weight
(`dpo.constant_weight_loss`).
"""
import itertools

import torch

import data
from model import GPT, generate
from plots import STYLE, evaluation_prompts, load_policy, mean_and_se, plt, runs_near_kl, save

SAMPLES = 4    # responses to each prompt
PANELS = {"length": "response length, tokens", "distinct_2": "distinct bigrams / bigrams",
          "grammatical": "grammatical share", "reward": "true reward"}
SYMBOLS = {"dpo": "\u03b2", "unlikelihood": "\u03b1"}    # of the setting, in labels


def distinct_2(responses: list[list[int]]) -> float:
    """Distinct bigrams / bigrams of the responses (token ids) to one prompt.

    1 if no bigram is repeated, near 0 for a loop, 0 if there are no bigrams.
    """
    bigrams = []
    for tokens in responses:
        bigrams += itertools.pairwise(tokens)
    return len(set(bigrams)) / max(len(bigrams), 1)


def evaluate(setup, policy: GPT, *names) -> dict:
    """The numbers of PANELS for one policy, with standard errors over prompts, and a sample.

    The sample is the first response to the first prompt. `names` name the random generator.
    """
    generator = data.named_generator("degeneration", setup.cfg.seed, *names, device=setup.device)
    ids, mask = generate(policy, evaluation_prompts(setup), SAMPLES, setup.cfg.max_tokens,
                         setup.encoding.eot_token, generator)
    texts = data.decode(setup.encoding, ids, mask)
    responses = [row[is_response].tolist() for row, is_response in zip(ids, mask)]
    by_prompt = [responses[i:i + SAMPLES] for i in range(0, len(responses), SAMPLES)]
    values = {"length": mask.sum(1),
              "distinct_2": torch.tensor([distinct_2(group) for group in by_prompt]),
              "grammatical": torch.tensor([data.is_grammatical(text) for text in texts]),
              "reward": data.true_reward(setup.encoding, ids, mask)}
    row = {}
    for name, x in values.items():
        row[name], row[name + "_se"] = mean_and_se(x.view(len(by_prompt), -1))
    return {**row, "sample": texts[0]}


def runs_to_show(runs: list[dict]) -> list[dict]:
    """DPO near COMPARED_KL, then Unlikelihood at its largest and smallest alpha, failed or not."""
    chosen = runs_near_kl(runs, "dpo")
    unlikelihood = [run for run in runs if run["method"] == "unlikelihood"]
    unlikelihood.sort(key=lambda run: run["setting"])
    chosen += unlikelihood[-1:]
    if len(unlikelihood) > 1:
        chosen.append(unlikelihood[0])
    return chosen


def measure(setup, runs: list[dict]) -> list[dict]:
    """A row for pi_ref, and one for each checkpoint of the runs to show."""
    rows = [{"figure": "degeneration", "method": "sft", "setting": 0., "step": 0,
             **evaluate(setup, setup.ref, "sft")}]
    for run in runs_to_show(runs):
        for evaluation, state in zip(run["rows"], run["checkpoints"]):
            step, policy = evaluation["step"], load_policy(setup, state)
            numbers = evaluate(setup, policy, run["method"], run["setting"], step)
            rows.append({"figure": "degeneration", "method": run["method"],
                         "setting": run["setting"], "step": step, **numbers})
    return rows


def printable(text: str, width: int = 100) -> str:
    """The first `width` characters of a text; "?" for those that are not printable ASCII.

    A degenerate policy can write any bytes. "$" is escaped, because it starts a formula in labels.
    """
    characters = [c if c.isascii() and c.isprintable() else "?" for c in text]
    text = "".join(characters).replace("$", "\\$")
    return text if len(text) <= width else text[:width] + " ..."


def draw_curve(axes, rows: list[dict], label: str, dashed: bool) -> None:
    """The rows of one run in all panels; a dashed line has hollow markers."""
    _, colour, marker = STYLE[rows[-1]["method"]]
    line, fill = "-", colour
    if dashed:
        line, fill = "--", "white"
    for axis, name in zip(axes.flat, PANELS):
        axis.errorbar([row["step"] for row in rows], [row[name] for row in rows],
                      [row[name + "_se"] for row in rows], color=colour, fmt=marker + line,
                      mfc=fill, ms=7, lw=1.6, elinewidth=1, capsize=2, label=label)


def draw_panels(axes, start: dict) -> None:
    """The row of pi_ref in all panels, titles and axes."""
    for axis, (name, title) in zip(axes.flat, PANELS.items()):
        axis.errorbar([0], [start[name]], [start[name + "_se"]], fmt="*", color="black", ms=13,
                      label="SFT (\u03c0_ref)", zorder=5)
        axis.set_title(title, fontsize=12)
        axis.set_ylim(0, None if name == "length" else 1.04)
        axis.grid(alpha=.25)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=12)
    axes[1, 1].legend(fontsize=10, loc="lower right")


def draw(rows: list[dict], path) -> None:
    """A panel for each number, a curve for each run, and the last sample of each run as text."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), sharex=True)
    start, curves = rows[0], {}
    for row in rows[1:]:
        curves.setdefault((row["method"], row["setting"]), []).append(row)
    caption = ["At the end, the first response to the first prompt:"]
    methods_drawn = set()
    for (method, setting), curve in curves.items():
        label = f"{STYLE[method][0]}, {SYMBOLS[method]} = {setting:g}"
        if len(curve) > 1:    # a single evaluation is a point, not a line
            curve = [start, *curve]
        draw_curve(axes, curve, label, dashed=method in methods_drawn)
        methods_drawn.add(method)
        caption.append(f"{label}: {printable(curve[-1]['sample'])}")
    draw_panels(axes, start)
    figure.supxlabel("\n".join(caption), x=.02, ha="left", fontsize=10)
    save(figure, path)
