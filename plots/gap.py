"""What keeps DPO from the optimum: one obstacle is removed at a time (`train.py --study`)."""
from plots import STYLE, plt, save

MORE_EPISODES = "four times the episodes"    # of PPO-GT, which generates its own data
SLOWER, FASTER = "learning rate / 3.2", "learning rate x 3.2"
LEARNING_RATES = {SLOWER: 10**-.5, "as it is": 1., FASTER: 10**.5}    # variant -> multiple
DPO_STYLE = {    # variant -> colour, marker, line style; no colour of another method
    "as it is": (STYLE["dpo"][1], "o", "-"),
    "half the pairs, twice": ("#999933", "v", "--"),
    "all pairs, twice": ("#2F4F4F", "s", "--"),
    "twice the pairs": ("#7F3FBF", "^", "-"),
    "Bradley-Terry labels": ("#8C564B", "D", ":"),
    "twice as wide": ("#E7298A", "P", "-."),
}


def variants(cfg) -> dict[str, tuple[dict, dict]]:
    """name -> (fields of the configuration to change, methods with the settings to train)."""
    dpo = {"dpo": cfg.betas}
    ppo_gt = {"ppo_gt": cfg.kl_targets[1:2]}
    one_setting = {"dpo": cfg.betas[1:2], "ppo": cfg.kl_targets[1:2], **ppo_gt}
    found = {
        "as it is": ({}, {**one_setting, **dpo}),
        "half the pairs, twice": (dict(prompts=cfg.prompts // 2, epochs=2 * cfg.epochs), dpo),
        "all pairs, twice": (dict(epochs=2 * cfg.epochs), dpo),
    }
    if 2 * cfg.prompts <= .8 * cfg.reviews:    # 80% of the reviews are for training
        found["twice the pairs"] = dict(prompts=2 * cfg.prompts), dpo
    factor = 10**.5
    return {
        **found,
        "Bradley-Terry labels": (dict(labels="bt"), dpo),
        "twice as wide": (dict(width=2 * cfg.width), dpo),
        MORE_EPISODES: (dict(ppo_steps=4 * cfg.ppo_steps), ppo_gt),
        SLOWER: (dict(lr=cfg.lr / factor, ppo_lr=cfg.ppo_lr / factor), one_setting),
        FASTER: (dict(lr=cfg.lr * factor, ppo_lr=cfg.ppo_lr * factor), one_setting),
    }


def draw_line(axis, x: list[float], rows: list[dict], label: str, **line_style) -> None:
    """Draw the shares of the optimal gain of some rows at `x`, joined, with their errors."""
    axis.errorbar(x, [row["share"] for row in rows], yerr=[row["share_se"] for row in rows],
                  label=label, lw=1.4, ms=7, mec="white", elinewidth=.8, **line_style)


def draw_variants(axis, rows: list[dict]) -> None:
    """Left: share of the optimal gain against KL, one line for each variant."""
    for variant, (colour, marker, line) in DPO_STYLE.items():
        points = [row for row in rows if row["variant"] == variant and row["method"] == "dpo"]
        points.sort(key=lambda row: row["kl"])
        draw_line(axis, [row["kl"] for row in points], points, f"DPO, {variant}", color=colour,
                  marker=marker, ls=line)
    points = [row for row in rows
              if row["method"] == "ppo_gt" and row["variant"] in ("as it is", MORE_EPISODES)]
    points.sort(key=lambda row: row["variant"] == MORE_EPISODES)
    _, colour, marker = STYLE["ppo_gt"]
    draw_line(axis, [row["kl"] for row in points], points,
              f"PPO-GT, as it is \u2192 {MORE_EPISODES}", color=colour, marker=marker, ls=":")
    axis.set(ylim=(.5, 1.03))
    axis.set_xlabel("sequence KL(\u03c0 \u2016 \u03c0_ref), nats", fontsize=12)
    axis.set_ylabel("share of the optimal gain", fontsize=12)
    axis.legend(fontsize=10, loc="lower right")


def draw_learning_rates(axis, rows: list[dict]) -> None:
    """Right: one line over three learning rates for each method; the KL is beside each point."""
    studied = {(row["method"], row["setting"]) for row in rows
               if row["variant"] in (SLOWER, FASTER)}
    for method, setting in sorted(studied):
        label, colour, marker = STYLE[method]
        points = [row for row in rows if row["method"] == method and row["setting"] == setting
                  and row["variant"] in LEARNING_RATES]
        points.sort(key=lambda row: LEARNING_RATES[row["variant"]])
        rates = [LEARNING_RATES[row["variant"]] for row in points]
        draw_line(axis, rates, points, label, color=colour, marker=marker)
        offset = 9 if method == "ppo_gt" else -17
        for rate, row in zip(rates, points):
            axis.annotate(f"KL {row['kl']:.1f}", (rate, row["share"]), (0, offset),
                          textcoords="offset points", ha="center", fontsize=9, color=colour)
    axis.set(xscale="log", xlim=(.2, 5))
    axis.set_xlabel("learning rate / default", fontsize=12)
    axis.set_xticks(list(LEARNING_RATES.values()), ["1/3.2", "1", "3.2"])
    axis.minorticks_off()
    axis.legend(fontsize=10, loc="lower right")


def draw(rows: list[dict], path) -> None:
    """Draw the variants and the learning rates, as far as the KL is on the optimal frontier."""
    rows = [row for row in rows if row["share"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), width_ratios=(3, 2), sharey=True)
    draw_variants(left, rows)
    draw_learning_rates(right, rows)
    for axis in (left, right):
        axis.axhline(1, color="0.25", lw=2)
        axis.grid(alpha=.25)
    save(figure, path)
