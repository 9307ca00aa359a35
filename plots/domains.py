"""Table 1: the same policies on a domain without any training, restaurant reviews instead of films.

The prompts are beginnings of the domain's own reviews, and the opponents are these reviews. The
true reward, which knows the aspects of both domains, decides. The paper (trained on TL;DR posts,
tested on CNN/DailyMail; GPT-4 win rate against the ground truth): DPO .36 at temperature 0 and .31
at .25, PPO .26 and .23.

The reward does not ask whether a response keeps to the topic. So this figure shows whether what the
policies have learned carries over to new beginnings, not whether they can write about food. The
paper's temperature 0 is replaced by 1, because at 0 a policy has one text for nearly all prompts
(see winrate.py).
"""
import data
from plots import STYLE, mean_and_se, plt, save
from plots.winrate import policies_to_compare, review_prompts, rewards_at, win_probability

TEMPERATURES = .25, 1.
DOMAINS = {"film": "films (trained on)", "restaurant": "restaurants (never seen)"}


def reviews(setup, domain: str) -> list[str]:
    """Held-out reviews of a domain: for films those of winrate.py, else as many new ones."""
    count = 4 * setup.cfg.eval_prompts
    corpus = setup.corpus
    if domain != "film":
        corpus = data.write_corpus(10 * count, setup.cfg.seed, domain)    # a tenth is in the split
    return corpus[setup.cfg.split][:count]


def measure(setup, runs: list[dict]) -> list[dict]:
    """A row for each domain, policy and temperature: win rate and true reward."""
    rows = []
    policies = policies_to_compare(setup, runs)
    for domain in DOMAINS:
        prompts, review_reward = review_prompts(setup, reviews(setup, domain))
        for method, setting, policy in policies:
            for temperature in TEMPERATURES:
                reward = rewards_at(setup, policy, prompts, temperature)
                wins = win_probability(reward, review_reward)
                win_rate, win_rate_se = mean_and_se(wins[:, None])
                mean_reward, reward_se = mean_and_se(reward)
                rows.append({"figure": "domains", "method": method, "setting": setting,
                             "domain": domain, "temperature": temperature,
                             "win_rate": win_rate, "win_rate_se": win_rate_se,
                             "reward": mean_reward, "reward_se": reward_se})
    return rows


def bar_style(domain: str, colour: str) -> dict[str, str]:
    """Filled bars for the domain of the training, hatched bars for the other."""
    if domain == "film":
        return {"color": colour, "edgecolor": colour}
    return {"color": "white", "edgecolor": colour, "hatch": "///"}


def short_name(label: str) -> str:
    """The label of a method without its parentheses, on two lines if it has a hyphen."""
    return label.split(" (")[0].replace("-", "-\n")


def draw_panel(axis, rows: list[dict], methods: list[str]) -> None:
    """The rows of one temperature: a group of bars for each method, one bar for each domain."""
    row_of = {(row["method"], row["domain"]): row for row in rows}
    for i, method in enumerate(methods):
        for j, domain in enumerate(DOMAINS):
            row = row_of[method, domain]
            axis.bar([i + .38 * (j - .5)], [row["win_rate"]], .36, yerr=[row["win_rate_se"]],
                     **bar_style(domain, STYLE[method][1]), lw=1.5, ecolor="0.25", capsize=3)
    axis.axhline(.5, color="0.5", ls=":", lw=1.2, zorder=0)
    axis.set_xticks(range(len(methods)), [short_name(STYLE[method][0]) for method in methods])
    axis.tick_params(labelsize=13)
    axis.set(ylim=(0, 1.2), yticks=[0, .2, .4, .6, .8, 1])
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=.25)


def draw(rows: list[dict], path) -> None:
    """A panel for each temperature: win rates of all methods in both domains."""
    figure, axes = plt.subplots(1, len(TEMPERATURES), figsize=(12, 5.2), sharey=True)
    measured = {row["method"] for row in rows}
    methods = [method for method in STYLE if method in measured]
    for axis, temperature in zip(axes, TEMPERATURES):
        draw_panel(axis, [row for row in rows if row["temperature"] == temperature], methods)
        axis.set_title(f"temperature {temperature:g}", fontsize=14)
    axes[0].set_ylabel("win rate against the review itself", fontsize=14)
    for domain, label in DOMAINS.items():
        axes[0].bar([0], [0], **bar_style(domain, "0.4"), label=label)
    axes[0].legend(fontsize=12, loc="upper center", ncols=2)
    save(figure, path)
