"""Win rates, judges and domains: estimates against sums over all listed responses.

They belong to Fig. 2 (right) and Tables 1 and 2.

Letters: X prompts, N listed responses, n sampled responses to a prompt.
"""
import math
import types

import pytest
import torch

import data
import world
from plots import domains, judges, winrate
from test_best_of_n import listed_index

REPEATS = 800                             # copies of each prompt; SAMPLES responses to each copy
REWARD = world.rewards(seed=3).round()    # (X, N) the true reward: many responses tie
LEARNED_REWARD = world.rewards(seed=4)    # (X, N) the learned reward: no ties
OPPONENT_REWARD = torch.tensor([0., 1.], dtype=torch.float64)    # (X,) of one opponent a prompt


@pytest.fixture(name="setup")
def enumerable_setup(monkeypatch):
    """The fields of a Setup that the figures read; the rewards are those of the tables above."""
    def true_reward(encoding, ids, mask):
        return REWARD.flatten()[listed_index(ids, mask)]

    def learned_reward(ids, mask):
        return LEARNED_REWARD.flatten()[listed_index(ids, mask)]

    monkeypatch.setattr(data, "true_reward", true_reward)
    cfg = types.SimpleNamespace(seed=0, max_tokens=world.MAX_TOKENS, split="test", eval_prompts=20,
                                reviews=2000)
    return types.SimpleNamespace(
        cfg=cfg, device="cpu", encoding=types.SimpleNamespace(eot_token=world.END),
        ref=world.gpt(seed=1), learned_reward=learned_reward)


# ------------------------------------------------------------------------ win rates (Fig. 2, right)
def repeated_prompts():
    """REPEATS copies of each prompt, consecutive: ids (X * REPEATS, 3), lengths (X * REPEATS,)."""
    ids, lengths = world.prompts()
    return ids.repeat_interleave(REPEATS, 0), lengths.repeat_interleave(REPEATS, 0)


def probability_at(temperature):
    """pi_ref(y|x) (X, N) at a temperature.

    The logits are linear in the output of the last norm, so this norm is divided by the
    temperature.
    """
    policy = world.gpt(seed=1)
    with torch.no_grad():
        policy.norm.weight /= temperature
        policy.norm.bias /= temperature
    return world.table(policy).detach().exp()


def win_value(reward, opponent_reward):
    """1 for a win, 0 for a loss, .5 for a tie."""
    if reward == opponent_reward:
        return .5
    return float(reward > opponent_reward)


def listed_wins():
    """`win_value` of every listed response against its prompt's opponent (X, N)."""
    wins = []
    for rewards, opponent_reward in zip(REWARD.tolist(), OPPONENT_REWARD.tolist()):
        wins.append([win_value(reward, opponent_reward) for reward in rewards])
    return torch.tensor(wins, dtype=torch.float64)


def estimated_win_rate(reward):
    """The win rate at each prompt, (X,), from rewards of responses (X * REPEATS, n)."""
    wins = winrate.win_probability(reward, OPPONENT_REWARD.repeat_interleave(REPEATS))
    return wins.view(world.X, REPEATS).mean(1)


def assert_within_four_errors(estimate, probability, samples, claim):
    """Assert that the win rates (X,) are those of a distribution, within 4 standard errors.

    probability (X, N) is over the listed responses; `samples` counts the independent responses to
    each prompt.
    """
    wins = listed_wins()
    exact = (probability * wins).sum(1)
    variance = (probability * (wins - exact[:, None]) ** 2).sum(1)
    standard_error = (variance / samples).sqrt()
    assert ((estimate - exact).abs() <= 4 * standard_error + 1e-12).all(), (
        f"{claim}: {estimate.tolist()}, not {exact.tolist()} +- {standard_error.tolist()}")


def test_the_probability_of_a_win_is_the_mean_over_all_comparisons_with_ties_counted_half():
    """P(win) + P(tie) / 2 is over every response of one side against every one of the other.

    The other side may also be a single response.
    """
    reward = torch.randint(0, 4, (5, 3), generator=world.generator(1)).double()
    opponents = torch.randint(0, 4, (5, 7), generator=world.generator(2)).double()
    for opponent_reward in (opponents, opponents[:, 0], reward):
        expected = []
        for row, opponent_row in zip(reward.tolist(), opponent_reward.view(5, -1).tolist()):
            values = [win_value(a, b) for a in row for b in opponent_row]
            expected.append(sum(values) / len(values))
        world.agree(winrate.win_probability(reward, opponent_reward),
                    torch.tensor(expected, dtype=torch.float64),
                    "ties count half, and each prompt has its own opponents")


@pytest.mark.parametrize("temperature", [.5, 1.])
def test_win_rates_by_the_true_reward_are_those_of_all_responses(setup, temperature):
    """The win rate of sampled responses is the sum over y of pi(y|x) [P(win) + P(tie) / 2].

    pi is the policy at the temperature of the samples.
    """
    reward = winrate.rewards_at(setup, setup.ref, repeated_prompts(), temperature)
    assert_within_four_errors(estimated_win_rate(reward), probability_at(temperature),
                              REPEATS * winrate.SAMPLES, f"win rate at temperature {temperature}")


def test_at_temperature_0_the_response_is_the_greedy_one(setup):
    """At temperature 0 a prompt has one response, the limit of low temperatures.

    Best-of-N has the same one.
    """
    prompts = repeated_prompts()
    greedy = probability_at(1e-4).argmax(1, keepdim=True)                       # (X, 1)
    expected = REWARD.gather(1, greedy).repeat_interleave(REPEATS, 0)
    world.agree(winrate.rewards_at(setup, setup.ref, prompts, 0.), expected,
                "temperature 0 is argmax, token by token")
    world.agree(winrate.best_rewards(setup, prompts, 0.), expected,
                "Best-of-N at temperature 0 is the argmax of pi_ref")


def test_the_best_of_n_wins_as_often_as_the_maximum_of_n_draws(setup):
    """P(y is the best of N) = F(y)^N - F(y-)^N; the true reward decides who wins.

    F is the distribution function of the learned reward under pi_ref.
    """
    reward = winrate.best_rewards(setup, repeated_prompts(), 1.)
    probability = probability_at(1.)
    below = []                                                                  # F(y-)
    for p, score in zip(probability, LEARNED_REWARD):
        is_lower = score[None] < score[:, None]                                 # (N, N)
        below.append((p[None] * is_lower).sum(1))
    below = torch.stack(below)
    best = (below + probability) ** winrate.BEST_OF - below ** winrate.BEST_OF
    assert_within_four_errors(estimated_win_rate(reward), best, REPEATS,
                              "Best-of-N by the learned reward")


# --------------------------------------------------------------------------------- judges (Table 2)
def test_a_judge_agrees_with_itself_and_never_with_its_opposite():
    """Agreement is 1 for equal verdicts, ties included, and 0 for opposite ones.

    It is a half if only one of two judges sees a tie.
    """
    r_1 = torch.randint(0, 3, (6, 5), generator=world.generator(1)).double()
    r_2 = torch.randint(0, 3, (6, 5), generator=world.generator(2)).double()
    tied = r_1 == r_2
    verdicts, opposite = judges.verdict(r_1, r_2), judges.verdict(r_2, r_1)
    always_response_2 = torch.zeros(6, 5)
    world.agree(judges.agreement(verdicts, verdicts), torch.ones(6, 5),
                "a judge agrees with itself")
    world.agree(judges.agreement(verdicts, opposite), tied.double(),
                "a judge disagrees with its opposite, except for ties")
    world.agree(judges.agreement(verdicts, always_response_2),
                torch.where(tied, .5, (r_1 < r_2).double()), "a tie is half an agreement")


def assert_mean_probability(verdicts, probability, claim):
    """Assert that the mean of 0/1 verdicts (X, n) is that of their probabilities (X,).

    The tolerance is 4 standard errors of independent verdicts.
    """
    variance = (probability * (1 - probability)).sum()
    error = variance.sqrt() / len(probability) / verdicts.shape[1] ** .5
    assert abs(verdicts.mean() - probability.mean()) <= 4 * error, \
        f"{claim}: {verdicts.mean():.4f}, not {probability.mean():.4f} +- {error:.4f}"


def test_annotators_agree_as_often_as_bradley_terry_allows():
    """With p = sigma((r_1 - r_2) / tau), an annotator prefers response 1 with probability p.

    It agrees with the true reward with probability max(p, 1 - p), and with another annotator with
    probability p^2 + (1 - p)^2.
    """
    tau, n = .2, 2000
    r = torch.rand(2, 40, 1, generator=world.generator(5), dtype=torch.float64)
    r_1, r_2 = r.expand(2, 40, n)                                               # (X, n) each
    rewards = zip(r[0].flatten().tolist(), r[1].flatten().tolist())
    p = [1 / (1 + math.exp((b - a) / tau)) for a, b in rewards]
    p = torch.tensor(p, dtype=torch.float64)                                    # (X,)
    verdicts_1 = judges.annotate(r_1, r_2, tau, world.generator(6))
    verdicts_2 = judges.annotate(r_1, r_2, tau, world.generator(7))
    with_truth = judges.agreement(verdicts_1, judges.verdict(r_1, r_2))
    with_each_other = judges.agreement(verdicts_1, verdicts_2)
    assert_mean_probability(verdicts_1, p, "wins of response 1")
    assert_mean_probability(with_truth, torch.maximum(p, 1 - p), "agreement with the true reward")
    assert_mean_probability(with_each_other, p ** 2 + (1 - p) ** 2, "agreement of two annotators")


# -------------------------------------------------------------------------------- domains (Table 1)
def aspects_of(texts):
    """The aspects that the opinions of some texts are about."""
    return {aspect for text in texts for aspect, _, _ in data.parse_opinions(text)}


def test_the_second_domain_shares_neither_texts_nor_aspects_with_the_first(setup):
    """Both domains have as many held-out reviews, all grammatical.

    No text and no aspect is in both, although the same reward reads both. pi_ref is trained on
    reviews of both domains, but on none of these.
    """
    setup.corpus = data.write_corpus(setup.cfg.reviews, setup.cfg.seed)
    read_by_ref = setup.corpus["train"] + data.write_corpus(
        setup.cfg.reviews // 4, setup.cfg.seed, "restaurant")["train"]
    film, restaurant = (domains.reviews(setup, domain) for domain in domains.DOMAINS)
    assert len(film) == len(restaurant) == 40, "each domain has 40 held-out reviews"
    assert all(data.is_grammatical(text) for text in film + restaurant), \
        "a held-out review is not grammatical"
    assert not set(setup.corpus["train"] + film) & set(restaurant), "the domains share a text"
    assert not set(read_by_ref) & set(film + restaurant), "pi_ref was trained on a held-out review"
    film_aspects, restaurant_aspects = aspects_of(film), aspects_of(restaurant)
    assert film_aspects and restaurant_aspects, "the reward finds no opinions in a domain"
    assert not film_aspects & restaurant_aspects, "the domains share an aspect"
