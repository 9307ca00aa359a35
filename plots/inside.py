"""Section 4, inside DPO's training: why the chosen log-probability falls. What the batches of each beta saw, from results alone.

Eq. 7 rewards the margin, not log pi(y_w): both log-probabilities may fall as long as y_l falls faster, and the weight of the
gradient, sigma(rhat_l - rhat_w), says how much push is left.
"""
import numpy

from plots import plt, save

PANELS = {"logp_w": "chosen: log \u03c0(y_w), nats", "logp_l": "rejected: log \u03c0(y_l), nats", "margin": "margin of the log-ratios, nats",
          "accuracy": "pairs ranked right", "weight": "weight \u03c3(r\u0302_l \u2212 r\u0302_w)"}


def curve(rows: list[dict], name: str) -> tuple:
    """Steps, mean and its standard error: over seeds, or for one seed over batches. A row's mean over batches is put at the middle of them."""
    seeds = [sorted((row for row in rows if row["seed"] == seed), key=lambda row: row["step"]) for seed in sorted({r["seed"] for r in rows})]
    seeds = [line[:min(map(len, seeds))] for line in seeds]    # a failed run is shorter
    steps = numpy.array([0] + [row["step"] for row in seeds[0]])
    values = numpy.array([[row[name] for row in line] for line in seeds])                 # (seeds, steps)
    se = values.std(0, ddof=1) / len(seeds) ** .5 if len(seeds) > 1 else numpy.array([row[f"{name}_se"] for row in seeds[0]])
    return (steps[1:] + steps[:-1]) / 2, values.mean(0), se


def draw(rows: list[dict], _, path) -> None:
    """From all rows of results.jsonl; the optimum plays no part."""
    rows = [row for row in rows if row["method"] == "dpo"]
    figure, axes = plt.subplots(2, 3, figsize=(12.9, 7), sharex=True)
    panels, betas = dict(zip(PANELS, axes.T.flat)), sorted({row["setting"] for row in rows})
    for i, beta in enumerate(betas):
        colour = plt.colormaps["cividis"](.85 * (1 - i / max(len(betas) - 1, 1)))          # light to dark: how large beta is
        for name, axis in panels.items():
            x, mean, se = curve([row for row in rows if row["setting"] == beta], name)
            axis.plot(x, mean, "o-", color=colour, ms=5, label=f"\u03b2 = {beta:g}")
            axis.fill_between(x, mean - se, mean + se, color=colour, alpha=.25, lw=0)
    for name, axis in panels.items():
        axis.set_title(PANELS[name], fontsize=12)
        axis.grid(alpha=.25)
    for axis in (*axes[1], panels["weight"]):                                               # below which there is none
        axis.set_xlabel("step", fontsize=12)
        axis.tick_params(labelbottom=True)
    chosen, rejected = panels["logp_w"], panels["logp_l"]
    low, high = zip(chosen.get_ylim(), rejected.get_ylim())
    chosen.set_ylim(min(low), max(high)), rejected.set_ylim(min(low), max(high))           # one scale: who falls faster?
    axes[1, 2].axis("off")
    axes[1, 2].legend(*chosen.get_legend_handles_labels(), fontsize=12, loc="center")
    save(figure, path)
