"""Table 1: the same policies, untouched, on another domain: restaurant reviews, where nothing was trained on anything but films.

Prompts are beginnings of that domain's own reviews, which are the opponents as well; the true reward, which knows the aspects of
both domains, judges. The paper (trained on TL;DR posts, tested on CNN/DailyMail; GPT-4 win rate against the ground truth):
DPO .36 at temperature 0 and .31 at .25, PPO .26 and .23.
The reward does not ask whether a response keeps to the topic, so this says whether the policies' taste carries over to
beginnings that they never saw, not whether they can talk about food. Temperature 1 stands in for the paper's 0, at which a policy
has one text for nearly all prompts (see winrate.py).
"""
import data
from plots import plt, save, style
from plots.frontier import clustered
from plots.winrate import challenge, rewards_at, shown, win_probability

TEMPERATURES = .25, 1.
DOMAINS = {"film": "films (trained on)", "restaurant": "restaurants (never seen)"}


def reviews(lab, domain: str) -> list[str]:
    """Held-out reviews of a domain: those of winrate's left panel, or as many of the other domain."""
    count = 4 * lab.cfg.eval_prompts    # a tenth of a corpus is in the split
    corpus = lab.corpus if domain == "film" else data.write_corpus(10 * count, lab.cfg.seed, domain)
    return corpus[lab.cfg.split][:count]


def measure(lab, runs: list[dict]) -> list[dict]:
    """A row a domain, policy and temperature: win rate and true reward."""
    rows, policies = [], shown(lab, runs)
    for domain in DOMAINS:
        prompts, rival = challenge(lab, reviews(lab, domain))
        for method, setting, policy, t in ((*p, t) for p in policies for t in TEMPERATURES):
            reward = rewards_at(lab, policy, prompts, t)
            (rate, rate_se), (mean, se) = clustered(win_probability(reward, rival)[:, None]), clustered(reward)
            rows.append({"figure": "domains", "method": method, "setting": setting, "domain": domain, "temperature": t,
                         "win_rate": rate, "win_rate_se": rate_se, "reward": mean, "reward_se": se})
    return rows


def draw(rows: list[dict], path) -> None:
    """A panel a temperature, a group of bars a method: filled where it was trained, hatched where it was not."""
    figure, axes = plt.subplots(1, len(TEMPERATURES), figsize=(12, 5.2), sharey=True)
    there = {r["method"] for r in rows}
    looks = [(m, *s) for m, s in style(there).items() if m in there]
    for axis, t in zip(axes, TEMPERATURES):
        for (i, (method, _, colour, _)), (j, domain) in ((a, b) for a in enumerate(looks) for b in enumerate(DOMAINS)):
            mine = [r for r in rows if (r["method"], r["domain"], r["temperature"]) == (method, domain, t)]
            axis.bar([i + .38 * (j - .5)] * len(mine), [r["win_rate"] for r in mine], .36, yerr=[r["win_rate_se"] for r in mine],
                     color="white" if j else colour, edgecolor=colour, hatch="///" * j, lw=1.5, ecolor="0.25", capsize=3)
        axis.axhline(.5, color="0.5", ls=":", lw=1.2, zorder=0)
        axis.set_xticks(range(len(looks)), [label.replace("-", "-\n").split(" (")[0] for _, label, _, _ in looks])
        axis.set_title(f"temperature {t:g}", fontsize=14)
        axis.tick_params(labelsize=13)
        axis.set(ylim=(0, 1.2), yticks=[0, .2, .4, .6, .8, 1])
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=.25)
    axes[0].set_ylabel("win rate against the review itself", fontsize=14)
    for j, label in enumerate(DOMAINS.values()):
        axes[0].bar([0], [0], color="white" if j else "0.4", edgecolor="0.4", hatch="///" * j, label=label)
    axes[0].legend(fontsize=12, loc="upper center", ncols=2)
    save(figure, path)
