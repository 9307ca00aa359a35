"""Simpler, cheaper, stabler? Seconds until a policy has 80% of the optimal gain at KL 2, everything before it charged.

Of a method's runs the one with the least training counts, at the first of its (noisy) evaluations that is good enough and whose next is too.
"""
import re

import dpo
from plots import STYLE, plt, save

KL, SHARE = 2., .8
CHARGED = {    # parts of a pipeline that come before a policy's own training -> beginning of the stages' names
    "SFT": "sft", "sampling and labelling": "completions-train", "reward model": "reward-model", "values": "values-{method}-"}
ON_PAIRS = ["SFT", "sampling and labelling"]
PIPELINES = {"dpo": ON_PAIRS, "ppo": list(CHARGED), "ppo_gt": [*ON_PAIRS, "values"], "unlikelihood": ON_PAIRS, "preferred_ft": ON_PAIRS}


def arrivals(rows: list[dict], optimum: dict) -> list[dict]:
    """For each run the first evaluation that has the reward of 80% of the optimal gain at KL 2, and 80% of the gain at its own KL.

    The second condition keeps out who buys the reward with more KL than it is worth. The next evaluation must do as well, unless
    this is the finished policy's: the best of several noisy ones is better than the policy.
    """
    enough = optimum["ref_reward"] + SHARE * (dpo.optimal_reward(KL, optimum)[0] - optimum["ref_reward"])
    runs, found = {}, []

    def good(row: dict) -> bool:
        return row["share"] is not None and row["share"] >= SHARE and row["reward"] >= enough

    for row in sorted(rows, key=lambda row: row["step"]):
        runs.setdefault((row["method"], row["setting"], row["seed"]), []).append(row)
    for mine in runs.values():
        found += [row for row, after in zip(mine, mine[1:] + [r for r in mine[-1:] if r["final"]]) if good(row) and good(after)][:1]
    return found


def tokens(rows: list[dict], until: dict, name: str) -> float:
    """Tokens of a run up to an evaluation: its rows hold means over the steps since the row before."""
    mine = sorted((r for r in rows if all(r[x] == until[x] for x in ("method", "setting", "seed")) and r["step"] <= until["step"]),
                  key=lambda r: r["step"])
    return sum(r.get(name, 0.) * (r["step"] - before) for r, before in zip(mine, [0] + [r["step"] for r in mine]))


def reckon(rows: list[dict], optimum: dict, seconds: dict[str, float]) -> list[dict]:
    """For each method and seed the cheapest run that arrives, with the seconds (one thread) of each part; or that none does."""
    arrived, found = arrivals(rows, optimum), []
    for method, seed in sorted({(row["method"], row["seed"]) for row in rows if row["method"] in PIPELINES}):
        mine = [row for row in arrived if (row["method"], row["seed"]) == (method, seed)]
        row = min(mine, key=lambda row: (row["step"], row["setting"]), default=None)
        shared = {part: sum(s for name, s in seconds.items() if name.startswith(CHARGED[part].format(method=method))
                            and re.search(rf"-seed{seed}(-|$)|^sft$", name)) for part in PIPELINES[method]}
        found.append({"figure": "cost", "method": method, "seed": seed, "arrived": row is not None, **{f"{part}_seconds": s for part, s in shared.items()},
                      "settings_that_arrive": sorted({row["setting"] for row in mine})})
        if row:
            found[-1] |= {"setting": row["setting"], "training_seconds": row["seconds"], "kl": row["kl"], "reward": row["reward"],
                          "sampled_tokens": tokens(rows, row, "sampled_tokens"), "trained_tokens": tokens(rows, row, "trained_tokens")}
    return found


def draw(rows: list[dict], path) -> None:
    """Bars of seconds, a part of the pipeline a shade, mean over seeds; a method that does not arrive has a word instead of a bar."""
    figure, axis = plt.subplots(figsize=(8, 4.2))
    methods = [m for m in STYLE if any(row["method"] == m for row in rows)]
    parts = [f"{part}_seconds" for part in CHARGED] + ["training_seconds"]
    shades = dict(zip(parts, ["0.85", "0.7", "0.5", "0.3"]))
    for y, method in enumerate(reversed(methods)):
        mine, left = [row for row in rows if row["method"] == method and row["arrived"]], 0.
        for part in parts if mine else []:
            width = sum(row.get(part, 0.) for row in mine) / len(mine)
            axis.barh(y, width, left=left, color=shades.get(part, STYLE[method][1]), height=.6)
            left += width
        total = [sum(row.get(part, 0.) for part in parts) for row in mine]
        tried = sum(row["method"] == method for row in rows)
        spread = f" ({min(total):.0f}-{max(total):.0f}, {len(total)} of {tried} seeds)" if tried > 1 and total else ""
        kl = sum(row["kl"] for row in mine) / max(len(mine), 1)
        axis.annotate(f"{sum(total) / len(total):.0f} s{spread}, at KL {kl:.1f}" if mine else "does not get there", (left, y), (5, 0),
                      textcoords="offset points", va="center", fontsize=11)
    axis.set_yticks(range(len(methods)), [STYLE[m][0] for m in reversed(methods)], fontsize=11)
    for part in parts[:-1]:
        axis.barh(0, 0, color=shades[part], label=part.removesuffix("_seconds"))
    axis.barh(0, 0, color="0.15", label="training of the policy (in its colour)")
    axis.set(xlim=(0, max(axis.get_xlim()[1] * 2, 1)), ylim=(-.6, len(methods) - .4))
    axis.set_xlabel(f"seconds of one thread to {SHARE:.0%} of the optimal gain at KL {KL:g}", fontsize=12)
    axis.legend(fontsize=10, loc="lower right")
    save(figure, path)
