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
    if len(seeds) > 1:
        se = values.std(0, ddof=1) / len(seeds) ** .5
    else:
        se = numpy.array([row.get(f"{name}_se", 0.) for row in seeds[0]])                 # results of old have none
    return (steps[1:] + steps[:-1]) / 2, values.mean(0), se


def draw(rows: list[dict], _, path) -> None:
    """From all rows of results.jsonl; the optimum plays no part. A panel whose column is missing (older results) is left out."""
    rows = [row for row in rows if row["method"] == "dpo"]
    names = [name for name in PANELS if rows and all(name in row for row in rows)]
    columns = max(-(-len(names) // 2), 1)
    figure, axes = plt.subplots(2, columns, figsize=(4.3 * columns, 7), sharex=True, squeeze=False)
    betas = sorted({row["setting"] for row in rows})
    for i, beta in enumerate(betas):
        colour = plt.colormaps["cividis"](.85 * (1 - i / max(len(betas) - 1, 1)))          # light to dark: how large beta is
        for name, axis in zip(names, axes.T.flat):
            x, mean, se = curve([row for row in rows if row["setting"] == beta], name)
            axis.plot(x, mean, "o-", color=colour, ms=5, label=f"\u03b2 = {beta:g}")
            axis.fill_between(x, mean - se, mean + se, color=colour, alpha=.25, lw=0)
    for axis, name in zip(axes.T.flat, names):
        axis.set_title(PANELS[name], fontsize=12)
        axis.grid(alpha=.25)
    for axis in {*axes[1], axes.T.flat[len(names) - 1]}:    # also above the empty place of an odd number of panels
        axis.set_xlabel("step", fontsize=12)
        axis.tick_params(labelbottom=True)
    finish(figure, axes.T, len(names))
    save(figure, path)


def finish(figure, axes, panels: int) -> None:
    """One scale for both log-probabilities, so that who falls faster can be seen; the legend where there is room."""
    if panels < 3:
        return
    chosen, rejected = axes.flat[:2]
    low, high = min(chosen.get_ylim()[0], rejected.get_ylim()[0]), max(chosen.get_ylim()[1], rejected.get_ylim()[1])
    chosen.set_ylim(low, high), rejected.set_ylim(low, high)
    handles, labels = chosen.get_legend_handles_labels()
    for axis in axes.flat[panels:]:
        axis.axis("off")
    axis = axes.flat[min(panels, axes.size - 1)]
    axis.legend(handles, labels, fontsize=12, loc="center" if panels < axes.size else "lower right")
