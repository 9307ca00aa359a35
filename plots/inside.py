"""Section 4: what DPO's training does to the log-probabilities, margins and weights of its pairs.

Eq. 7 rewards the margin, not log pi(y_w). Both log-probabilities may fall, as long as that of y_l
falls faster. The weight of the gradient, sigma(rhat_l - rhat_w), shows how strongly the loss still
pushes.
"""
import numpy

from plots import plt, save

PANELS = {    # column of results.jsonl -> title
    "logp_w": "chosen: log \u03c0(y_w), nats",
    "logp_l": "rejected: log \u03c0(y_l), nats",
    "margin": "margin of the log-ratios, nats",
    "accuracy": "pairs ranked right",
    "weight": "weight \u03c3(r\u0302_l \u2212 r\u0302_w)",
}


def curve(rows: list[dict], name: str) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """A statistic during training: steps, its mean over seeds and the standard error, (S,) each.

    A row holds the mean over the steps since the row before, so it is placed at their middle. If
    there is one seed, the standard error is over batches.
    """
    runs = []
    for seed in sorted({row["seed"] for row in rows}):
        run = [row for row in rows if row["seed"] == seed]
        runs.append(sorted(run, key=lambda row: row["step"]))
    length = min(len(run) for run in runs)    # a failed run is shorter
    runs = [run[:length] for run in runs]
    steps = numpy.array([0] + [row["step"] for row in runs[0]])           # (S + 1,)
    middle = (steps[1:] + steps[:-1]) / 2
    values = numpy.array([[row[name] for row in run] for run in runs])    # (seeds, S)
    if len(runs) > 1:
        se = values.std(0, ddof=1) / len(runs) ** .5
    else:
        se = numpy.array([row[f"{name}_se"] for row in runs[0]])
    return middle, values.mean(0), se


def draw_beta(panels: dict, rows: list[dict], colour) -> None:
    """Draw the runs of one beta into every panel, with a band of one standard error."""
    for name, axis in panels.items():
        x, mean, se = curve(rows, name)
        axis.plot(x, mean, "o-", color=colour, ms=5, label=f"\u03b2 = {rows[0]['setting']:g}")
        axis.fill_between(x, mean - se, mean + se, color=colour, alpha=.25, lw=0)


def share_scale(axis, other_axis) -> None:
    """Give two axes the same vertical scale, wide enough for both."""
    low, high = zip(axis.get_ylim(), other_axis.get_ylim())
    axis.set_ylim(min(low), max(high))
    other_axis.set_ylim(min(low), max(high))


def draw(rows: list[dict], optimum: dict, path) -> None:
    """Draw the rows of DPO in results.jsonl; nothing if there are none.

    `optimum` is not used: the figures from results.jsonl have the same signature.
    """
    rows = [row for row in rows if row["method"] == "dpo"]
    if not rows:
        return
    figure, axes = plt.subplots(2, 3, figsize=(12.9, 7), sharex=True)
    panels = dict(zip(PANELS, axes.T.flat))
    betas = sorted({row["setting"] for row in rows})
    for i, beta in enumerate(betas):
        lightness = 1 - i / max(len(betas) - 1, 1)
        colour = plt.colormaps["cividis"](.85 * lightness)    # a larger beta is darker
        draw_beta(panels, [row for row in rows if row["setting"] == beta], colour)
    for name, axis in panels.items():
        axis.set_title(PANELS[name], fontsize=12)
        axis.grid(alpha=.25)
    for axis in (*axes[1], panels["weight"]):                # no panel is below that of the weight
        axis.set_xlabel("step", fontsize=12)
        axis.tick_params(labelbottom=True)
    share_scale(panels["logp_w"], panels["logp_l"])          # shows which one falls faster
    axes[1, 2].axis("off")
    seeds = len({row["seed"] for row in rows})
    title = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    axes[1, 2].legend(*panels["logp_w"].get_legend_handles_labels(), fontsize=12, loc="center",
                      title=f"{title},\nwith its standard error", title_fontsize=12)
    save(figure, path)
