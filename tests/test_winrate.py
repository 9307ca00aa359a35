"""Win rates and judges: the estimators against sums over all responses of a world small enough to list (Fig. 2 right, Tables 1, 2)."""
import types

import pytest
import torch

import data
import world
from plots import domains, judges, winrate

REPEATS = 800    # times that each prompt is asked; SAMPLES responses each time


def lab():
    """What the figures need of a run: the listed responses' true rewards, with many ties, and a learned reward without any."""
    ids, mask = world.listed()
    row = {tuple(a[:b.nonzero().max() + 1].tolist()): i for i, (a, b) in enumerate(zip(ids, mask))}
    true, learned = world.rewards(seed=3).round().flatten(), world.rewards(seed=4).flatten()

    def find(ids, mask):
        return torch.tensor([row[tuple(a[:b.nonzero().max() + 1].tolist())] for a, b in zip(ids, mask)])

    cfg = types.SimpleNamespace(seed=0, max_tokens=world.MAX_TOKENS, split="test", eval_prompts=20)
    return types.SimpleNamespace(cfg=cfg, encoding=types.SimpleNamespace(eot_token=world.END), device="cpu", ref=world.gpt(seed=1),
                                 reward=lambda ids, mask: true[find(ids, mask)], learned=lambda ids, mask: learned[find(ids, mask)],
                                 true=true.view(world.X, world.N), scores=learned.view(world.X, world.N),
                                 prompts=tuple(p.repeat_interleave(REPEATS, 0) for p in world.prompts()))


def policy_at(temperature):
    """pi_ref with its logits divided by a temperature: they are linear in the last norm's output."""
    policy = world.gpt(seed=1)
    with torch.no_grad():
        policy.norm.weight /= temperature
        policy.norm.bias /= temperature
    return world.table(policy).detach().exp()


def listed_wins(reward, rival):
    """1, 0 or a half for every listed response against its prompt's opponent: (X, N), (X,) -> (X, N)."""
    return torch.tensor([[1. if r > q else .5 if r == q else 0. for r in row] for row, q in zip(reward.tolist(), rival.tolist())])


def within_four_errors(wins, probability, estimate, draws, claim):
    """An estimate from independent draws is that near to its exact mean: wins, probability (X, N); estimate (X,)."""
    exact = (probability * wins).sum(1)
    error = ((probability * (wins - exact[:, None]) ** 2).sum(1) / draws).sqrt()
    assert ((estimate - exact).abs() <= 4 * error + 1e-12).all(), f"{claim}: {estimate.tolist()}, not {exact.tolist()} +- {error.tolist()}"


def test_the_probability_of_a_win_is_the_mean_over_all_comparisons_with_ties_counted_half():
    """P(win) + P(tie) / 2 over every response of one side against every one of the other, or against the only one."""
    reward, rival = (torch.randint(0, 4, shape, generator=world.generator(s)).double() for s, shape in ((1, (5, 3)), (2, (5, 7))))
    for opponent in (rival, rival[:, 0], reward):
        against = opponent if opponent.dim() == 2 else opponent[:, None]
        expected = [sum((a > b) + (a == b) / 2 for a in mine for b in theirs) / (len(mine) * len(theirs))
                    for mine, theirs in zip(reward.tolist(), against.tolist())]
        world.agree(winrate.win_probability(reward, opponent), torch.tensor(expected, dtype=torch.float64), "ties count half, prompt by prompt")


@pytest.mark.parametrize("temperature", [.5, 1.])
def test_win_rates_by_the_true_reward_are_those_of_all_responses(temperature):
    """The win rate of sampled responses is the sum over listed y of pi(y|x)^(temperature) [P(win) + P(tie) / 2]."""
    here, rival = lab(), torch.tensor([0., 1.]).double()
    reward = winrate.rewards_at(here, here.ref, here.prompts, temperature)
    estimate = winrate.win_probability(reward, rival.repeat_interleave(REPEATS)).view(world.X, REPEATS).mean(1)
    within_four_errors(listed_wins(here.true, rival), policy_at(temperature), estimate, REPEATS * winrate.SAMPLES,
                       f"win rate at temperature {temperature}")


def test_at_temperature_0_the_response_is_the_greedy_one():
    """Temperature 0: one response a prompt, that of the limit of temperatures; for Best-of-N it is the same."""
    here = lab()
    greedy = here.true.gather(1, policy_at(1e-4).argmax(1, keepdim=True)).repeat_interleave(REPEATS, 0)
    world.agree(winrate.rewards_at(here, here.ref, here.prompts, 0.), greedy, "temperature 0 is argmax, token by token")
    world.agree(winrate.best_rewards(here, here.prompts, 0.), greedy, "Best-of-N at temperature 0 is pi_ref's argmax")


def test_the_best_of_n_wins_as_often_as_the_maximum_of_n_draws():
    """P(y is the best of N) = F(y)^N - F(y-)^N, F the distribution of the learned reward under pi_ref; the true reward judges."""
    here, rival = lab(), torch.tensor([0., 1.]).double()
    estimate = winrate.win_probability(winrate.best_rewards(here, here.prompts, 1.), rival.repeat_interleave(REPEATS))
    probability = policy_at(1.)
    below = torch.stack([(p[None] * (s[None] < s[:, None])).sum(1) for p, s in zip(probability, here.scores)])
    best = (below + probability) ** winrate.BEST_OF - below ** winrate.BEST_OF
    within_four_errors(listed_wins(here.true, rival), best, estimate.view(world.X, REPEATS).mean(1), REPEATS, "Best-of-N by the learned reward")


def test_a_judge_agrees_with_itself_and_never_with_its_opposite():
    """Agreement is 1 with the same verdicts, ties too; 0 with the opposite; a half where only one of two sees a tie."""
    r_1, r_2 = (torch.randint(0, 3, (6, 5), generator=world.generator(seed)).double() for seed in (1, 2))
    says, tied = judges.verdict(r_1, r_2), r_1 == r_2
    world.agree(judges.agreement(says, says), torch.ones(6, 5), "a judge agrees with itself")
    world.agree(judges.agreement(says, judges.verdict(r_2, r_1)), tied.double(), "a judge disagrees with its opposite, but for ties")
    world.agree(judges.agreement(says, torch.zeros(6, 5)), torch.where(tied, .5, (r_1 < r_2).double()), "a tie is half an agreement")


def test_annotators_agree_as_often_as_bradley_terry_allows():
    """With p = sigma((r_1 - r_2) / tau): E[max(p, 1 - p)] with the true reward, E[p^2 + (1 - p)^2] with each other; wins E[p]."""
    tau, r = .2, torch.rand(2, 40, 1, generator=world.generator(5), dtype=torch.float64)
    p = torch.tensor([1 / (1 + 2.718281828459045 ** ((b - a) / tau)) for a, b in zip(*r.flatten(1).tolist())]).double()
    r_1, r_2 = r.expand(2, 40, 2000)
    one, two = (judges.annotate(r_1, r_2, tau, world.generator(seed)) for seed in (6, 7))
    for got, chance, claim in ((one, p, "wins"), (judges.agreement(one, judges.verdict(r_1, r_2)), torch.maximum(p, 1 - p), "true reward"),
                               (judges.agreement(one, two), p ** 2 + (1 - p) ** 2, "each other")):
        error = (chance * (1 - chance)).sum().sqrt() / 40 / 2000 ** .5
        assert abs(got.mean() - chance.mean()) <= 4 * error, f"{claim}: {got.mean():.4f}, not {chance.mean():.4f} +- {error:.4f}"


def test_the_second_domain_shares_neither_texts_nor_aspects_with_the_first():
    """Both are grammatical held-out reviews, as many of each; no text and no aspect is in both, though the same reward reads them."""
    here = lab()
    here.corpus = data.write_corpus(1000, 0)
    film, other = (domains.reviews(here, domain) for domain in domains.DOMAINS)
    aspects = [{aspect for text in texts for aspect, _, _ in data.opinions(text)} for texts in (film, other)]
    assert len(film) == len(other) == 80 and all(map(data.is_grammatical, film + other)), "80 held-out reviews each"
    assert not set(here.corpus["train"] + film) & set(other) and not aspects[0] & aspects[1] and all(aspects), "the domains overlap"
