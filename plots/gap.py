"""What keeps DPO from the optimum? One obstacle taken away at a time (`python train.py --study`)."""
from plots import STYLE, plt, save

LINES = {    # variant -> colour, marker, line
    "as it is": ("#D55E00", "o", "-"), "half the pairs, twice": ("#E69F00", "v", "--"), "all pairs, twice": ("#000000", "s", "--"),
    "twice the pairs": ("#009E73", "^", "-"), "Bradley-Terry labels": ("#0072B2", "D", ":"), "twice as wide": ("#CC79A7", "P", "-.")}


def variants(cfg) -> dict[str, tuple[dict, dict]]:
    """name -> (fields of the configuration to change, methods and settings to run)"""
    dpo_alone, spread = {"dpo": cfg.betas}, {"dpo": cfg.betas[1:2], "ppo": cfg.kl_targets[1:2], "ppo_gt": cfg.kl_targets[1:2]}
    return {"as it is": ({}, {**spread, **dpo_alone}),
            "half the pairs, twice": (dict(prompts=cfg.prompts // 2, epochs=2 * cfg.epochs), dpo_alone),
            "all pairs, twice": (dict(epochs=2 * cfg.epochs), dpo_alone),
            "twice the pairs": (dict(prompts=2 * cfg.prompts, reviews=max(cfg.reviews, 5 * cfg.prompts // 2)), dpo_alone),
            "Bradley-Terry labels": (dict(labels="bt"), dpo_alone),
            "twice as wide": (dict(width=2 * cfg.width), dpo_alone),
            "learning rate / 3.2": (dict(lr=cfg.lr / 10**.5, ppo_lr=cfg.ppo_lr / 10**.5), spread),
            "learning rate x 3.2": (dict(lr=cfg.lr * 10**.5, ppo_lr=cfg.ppo_lr * 10**.5), spread)}


def draw(rows: list[dict], path) -> None:
    """Left: share of the optimal gain against KL, a line a variant. Right: the same method at three learning rates."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), width_ratios=(3, 2), sharey=True)
    for variant, (colour, marker, line) in LINES.items():
        mine = sorted((r for r in rows if r["variant"] == variant and r["method"] == "dpo" and r["share"] is not None), key=lambda r: r["kl"])
        left.errorbar([r["kl"] for r in mine], [r["share"] for r in mine], yerr=[r["share_se"] for r in mine], color=colour, marker=marker,
                      ls=line, lw=1.4, ms=7, mec="white", elinewidth=.8, label=variant)
    left.set(xscale="log", xlabel="sequence KL(\u03c0 \u2016 \u03c0_ref), nats", ylabel="share of the optimal gain", ylim=(0, 1.05))
    left.axhline(1, color="0.25", lw=2)
    left.legend(fontsize=10, loc="lower right", title="DPO, one \u03b2 a point")
    spread = [r for r in rows if r["variant"].startswith("learning rate")]
    settings = {(r["method"], r["setting"]) for r in spread}
    for method, setting in sorted(settings):
        name, colour, marker = STYLE[method]
        mine = [(x, r) for variant, x in (("learning rate / 3.2", 10**-.5), ("as it is", 1.), ("learning rate x 3.2", 10**.5)) for r in rows
                if (r["variant"], r["method"], r["setting"]) == (variant, method, setting) and r["share"] is not None]
        right.errorbar([x for x, _ in mine], [r["share"] for _, r in mine], yerr=[r["share_se"] for _, r in mine], color=colour,
                       marker=marker, ms=7, lw=1.4, mec="white", elinewidth=.8, label=name)
        for x, r in mine:
            right.annotate(f"KL {r['kl']:.1f}", (x, r["share"]), (0, 9), textcoords="offset points", ha="center", fontsize=9, color=colour)
    right.axhline(1, color="0.25", lw=2)
    right.set(xscale="log", xlim=(.2, 5), xlabel="learning rate / default")
    right.set_xticks([10**-.5, 1, 10**.5], ["1/3.2", "1", "3.2"])
    right.minorticks_off()
    right.legend(fontsize=10, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=.25)
        axis.xaxis.label.set_size(12), axis.yaxis.label.set_size(12)
    save(figure, path)
