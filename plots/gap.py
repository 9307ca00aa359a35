"""What keeps DPO from the optimum? One obstacle taken away at a time (`python train.py --study`)."""
from plots import STYLE, plt, save

LINES = {    # variant -> colour, marker, line; no other method's colours
    "as it is": (STYLE["dpo"][1], "o", "-"), "half the pairs, twice": ("#999933", "v", "--"), "all pairs, twice": ("#2F4F4F", "s", "--"),
    "twice the pairs": ("#7F3FBF", "^", "-"), "Bradley-Terry labels": ("#8C564B", "D", ":"), "twice as wide": ("#E7298A", "P", "-.")}
EPISODES = "four times the episodes"    # of PPO-GT, whose data are its own


def variants(cfg) -> dict[str, tuple[dict, dict]]:
    """name -> (fields of the configuration to change, methods and settings to run)"""
    dpo_alone, spread = {"dpo": cfg.betas}, {"dpo": cfg.betas[1:2], "ppo": cfg.kl_targets[1:2], "ppo_gt": cfg.kl_targets[1:2]}
    return {"as it is": ({}, {**spread, **dpo_alone}),
            "half the pairs, twice": (dict(prompts=cfg.prompts // 2, epochs=2 * cfg.epochs), dpo_alone),
            "all pairs, twice": (dict(epochs=2 * cfg.epochs), dpo_alone),
            **({"twice the pairs": (dict(prompts=2 * cfg.prompts), dpo_alone)} if 2 * cfg.prompts <= .8 * cfg.reviews else {}),
            "Bradley-Terry labels": (dict(labels="bt"), dpo_alone),
            "twice as wide": (dict(width=2 * cfg.width), dpo_alone),
            EPISODES: (dict(ppo_steps=4 * cfg.ppo_steps), {"ppo_gt": cfg.kl_targets[1:2]}),
            "learning rate / 3.2": (dict(lr=cfg.lr / 10**.5, ppo_lr=cfg.ppo_lr / 10**.5), spread),
            "learning rate x 3.2": (dict(lr=cfg.lr * 10**.5, ppo_lr=cfg.ppo_lr * 10**.5), spread)}


def draw(rows: list[dict], path) -> None:
    """Left: share of the optimal gain against KL, a line a variant. Right: the same method at three learning rates."""
    rows = [r for r in rows if r["share"] is not None]    # within the reach of the curve
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), width_ratios=(3, 2), sharey=True)
    for variant, (colour, marker, line) in LINES.items():
        points(left, sorted((r for r in rows if (r["variant"], r["method"]) == (variant, "dpo")), key=lambda r: r["kl"]), "kl", f"DPO, {variant}",
               color=colour, marker=marker, ls=line)
    mine = [r for r in rows if r["method"] == "ppo_gt" and r["variant"] in ("as it is", EPISODES)]
    points(left, sorted(mine, key=lambda r: r["variant"] == EPISODES), "kl", f"PPO-GT, as it is \u2192 {EPISODES}", color=STYLE["ppo_gt"][1],
           marker=STYLE["ppo_gt"][2], ls=":")
    left.set(xlabel="sequence KL(\u03c0 \u2016 \u03c0_ref), nats", ylabel="share of the optimal gain", ylim=(.5, 1.03))
    left.legend(fontsize=10, loc="lower right")
    draw_rates(right, rows)
    for axis in (left, right):
        axis.axhline(1, color="0.25", lw=2)
        axis.grid(alpha=.25)
        axis.xaxis.label.set_size(12), axis.yaxis.label.set_size(12)
    save(figure, path)


def points(axis, rows: list[dict], x: str, label: str, **how) -> None:
    axis.errorbar([r[x] for r in rows], [r["share"] for r in rows], yerr=[r["share_se"] for r in rows], label=label, lw=1.4, ms=7, mec="white",
                  elinewidth=.8, **how)


def draw_rates(axis, rows: list[dict]) -> None:
    """A line a method, over the learning rates of `variants`; beside each point its KL."""
    rates = {"learning rate / 3.2": 10**-.5, "as it is": 1., "learning rate x 3.2": 10**.5}
    studied = {(r["method"], r["setting"]) for r in rows if r["variant"].startswith("learning rate")}
    for method, setting in sorted(studied):
        name, colour, marker = STYLE[method]
        mine = [{**r, "rate": rates[r["variant"]]} for r in rows if (r["method"], r["setting"]) == (method, setting) and r["variant"] in rates]
        mine.sort(key=lambda r: r["rate"])
        points(axis, mine, "rate", name, color=colour, marker=marker)
        for r in mine:
            axis.annotate(f"KL {r['kl']:.1f}", (r["rate"], r["share"]), (0, 9 if method == "ppo_gt" else -17), textcoords="offset points",
                          ha="center", fontsize=9, color=colour)
    axis.set(xscale="log", xlim=(.2, 5), xlabel="learning rate / default")
    axis.set_xticks(list(rates.values()), ["1/3.2", "1", "3.2"])
    axis.minorticks_off()
    axis.legend(fontsize=10, loc="lower right")
