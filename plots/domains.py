"""Table 1: the same policies out of distribution, on restaurant reviews.

pi_ref has read restaurant reviews, but no prompt and no preference of any method was about one.
They have aspects and adjectives of their own, and the true reward counts opinions on the domain of
the prompt alone. So a policy keeps its gain only if it has learned more than a list of film words,
and loses it if it drifts to films. The paper (trained on TL;DR posts, tested on CNN/DailyMail;
GPT-4 win rate against the ground truth): DPO .36 at temperature 0 and .31 at .25, PPO .26 and .23.

Prompts are beginnings of the domain's own test reviews, and these reviews are the opponents. The
share of the optimal gain compares with the optimum of the same prompts, estimated from pi_ref and
the policies themselves.
"""
import data
import dpo
from plots import (STYLE, load_policy, mean_and_se, paired_bar_style, plt, save,
                   short_label)
from plots.frontier import optimum_from_samples, sample_mixture, sample_rewards
from plots.winrate import policies_to_compare, review_prompts, win_probability

DOMAINS = {"film": "films (trained on)", "restaurant": "restaurants (never trained on)"}
SAMPLES = 4             # responses of a policy to each prompt
MIXTURE_SAMPLES = 32    # responses of each policy to each prompt, for the optimum


def reviews(setup, domain: str) -> list[str]:
    """Held-out reviews of a domain, twice as many as there are evaluation prompts."""
    count = 2 * setup.cfg.eval_prompts
    corpus = setup.corpus
    if domain != "film":
        corpus = data.write_corpus(setup.cfg.reviews // 4, setup.cfg.seed, domain)
    return corpus[setup.cfg.split][:count]


def evaluate(setup, policy: dict, model, domain: str, prompts, review_reward) -> dict:
    """Win rate, true reward and KL of a policy on the prompts of a domain, with standard errors."""
    generator = data.named_generator("domains", setup.cfg.seed, domain, device=setup.device)
    reward, kl, _ = sample_rewards(setup, model, prompts, SAMPLES, generator)
    wins = win_probability(reward, review_reward)
    row = {"figure": "domains", "method": policy["method"], "setting": policy["setting"],
           "step": policy["step"], "domain": domain}
    for name, x in (("win_rate", wins[:, None]), ("reward", reward), ("kl", kl)):
        row[name], row[f"{name}_se"] = mean_and_se(x)
    return row


def measure(setup, runs: list[dict]) -> list[dict]:
    """A row for each domain and policy: win rate, reward, KL, share of the optimal gain."""
    policies = policies_to_compare(runs)
    models = [load_policy(setup, policy["state"]) for policy in policies]
    rows = []
    for domain in DOMAINS:
        prompts, review_reward = review_prompts(setup, reviews(setup, domain))
        generator = data.named_generator("domains optimum", setup.cfg.seed, domain,
                                         device=setup.device)
        *_, mixture_reward, log_weight = sample_mixture(setup, models, prompts, MIXTURE_SAMPLES,
                                                        generator)
        optimum = optimum_from_samples(mixture_reward, log_weight)
        for policy, model in zip(policies, models):
            row = evaluate(setup, policy, model, domain, prompts, review_reward)
            row.update(share=None, share_se=None)
            if policy["method"] != "sft":
                _, row["share"], row["share_se"] = dpo.share_of_optimal_gain(
                    row["reward"], row["reward_se"], row["kl"], row["kl_se"], optimum)
            rows.append(row)
    return rows


def draw_panel(axis, rows: list[dict], methods: list[str], name: str) -> None:
    """A group of bars for each method, one bar for each domain, of the column `name`."""
    row_of = {(row["method"], row["domain"]): row for row in rows}
    for i, method in enumerate(methods):
        for j, domain in enumerate(DOMAINS):
            row = row_of[method, domain]
            axis.bar([i + .38 * (j - .5)], [row[name]], .36, yerr=[row[f"{name}_se"]],
                     **paired_bar_style(domain == "film", STYLE[method][1]), lw=1.5,
                     ecolor="0.25", capsize=3)
            axis.annotate(f"KL {row['kl']:.1f}" if row["kl"] > .01 else "",
                          (i + .38 * (j - .5), .02), ha="center", rotation=90, fontsize=10,
                          bbox={"color": "white", "pad": 1})
    labels = [short_label(method).replace("-", "-\n") for method in methods]
    axis.set_xticks(range(len(methods)), labels)
    axis.tick_params(labelsize=12)
    axis.set(ylim=(0, 1.2), yticks=[0, .2, .4, .6, .8, 1])
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=.25)


def draw(rows: list[dict], path) -> None:
    """Left: win rates in both domains. Right: shares of the optimal gain."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), sharey=True)
    measured = {row["method"] for row in rows}
    methods = [method for method in STYLE if method in measured]
    draw_panel(left, rows, methods, "win_rate")
    draw_panel(right, rows, [method for method in methods if method != "sft"], "share")
    left.axhline(.5, color="0.5", ls=":", lw=1.2, zorder=0)
    left.set_title("win rate against the review itself", fontsize=14)
    right.set_title("share of the optimal gain", fontsize=14)
    for domain, label in DOMAINS.items():
        left.bar([0], [0], **paired_bar_style(domain == "film", "0.4"), label=label)
    left.legend(fontsize=11, loc="upper center", ncols=2, columnspacing=1.)
    save(figure, path)
