"""The tokenizer and prompts; how preferences are labelled and put into batches."""
import functools
import itertools
from unittest import mock

import torch

import data
import train
from data import learn_ranks
from fake_setup import fake_setup
from test_true_reward import encoding, reviews, sigma
from world import agree, generator, normal


# ---------------------------------------------------------------------------- tokenizer and prompts
def test_decoding_undoes_encoding():
    """decode(encode(text)) = text for reviews of both domains and for any other text.

    No encoded text holds the end token.
    """
    texts = reviews(100, seed=4)
    texts += ["", "  two  spaces\n\ttab", "na\u00efve \u6f22\u5b57 \U0001f600!?", "<|endoftext|"]
    tokenizer = encoding()
    for text in texts:
        ids = tokenizer.encode(text)
        decoded = tokenizer.decode(ids)
        assert decoded == text, f"{text!r} must not be decoded as {decoded!r}"
        assert tokenizer.eot_token not in ids, f"the tokens of {text!r} hold the end token"


def test_prompts_are_prefixes_of_two_to_eight_tokens():
    """Each prompt is the first n tokens of its own review, 2 <= n <= 8; the rest is filler.

    All seven lengths occur.
    """
    texts = reviews(60, seed=6)
    tokenizer = encoding()
    ids, lengths = data.make_prompts(tokenizer, texts, data.named_rng("prompts"))
    for text, row, n in zip(texts, ids.tolist(), lengths.tolist()):
        expected = tokenizer.encode(text)[:n] + [tokenizer.eot_token] * (8 - n)
        assert row == expected, \
            f"a prompt must be the first {n} tokens of {text!r}, {expected}, not {row}"
    observed = set(lengths.tolist())
    assert observed == set(range(2, 9)), f"lengths must be 2 to 8, not {sorted(observed)}"


@functools.cache
def learned_ranks(texts, vocab_size):
    """`data.learn_ranks` of a tuple of texts. It takes seconds, so it is computed once."""
    return learn_ranks(list(texts), vocab_size)


def encoding_of_the_experiment():
    """The encoding of the default experiment, which is learned from its first reviews alone."""
    def learn(texts, vocab_size):
        return learned_ranks(tuple(texts), vocab_size)

    with mock.patch.object(data, "learn_ranks", learn):
        return data.make_encoding(train.learn_tokenizer(fake_setup(seed=0, reviews=400)))


def openings(domain):
    """Every opening of a domain, without its colon."""
    pairs = itertools.product(data.DETERMINERS, data.SUBJECTS[domain])
    return [f"{determiner} {subject}" for determiner, subject in pairs]


def test_openings_are_many_and_none_fills_a_prompt():
    """Each domain has at least a hundred openings, all different, of 2 to 7 tokens.

    Those of films have at most 5: then come ":" and " the", so a prompt of 8 tokens always has a
    token of the first opinion.
    """
    tokenizer = encoding_of_the_experiment()
    for domain, most in (("film", 5), ("restaurant", 7)):
        texts = openings(domain)
        assert len(set(texts)) == len(texts) >= 100, \
            f"the domain {domain} has only {len(set(texts))} openings: most prompts are equal"
        for text in texts:
            count = len(tokenizer.encode(text))
            assert 2 <= count <= most, \
                f"the opening {text!r} has {count} tokens, not 2 to {most}"


def test_more_than_half_of_the_prompts_reach_into_the_first_opinion():
    """With the tokenizer of the experiment, most prompts are longer than "This western: the".

    So they differ in what they have already decided, and each has its own Z(x).
    """
    tokenizer = encoding_of_the_experiment()
    texts = data.write_corpus(2500, 0)["train"]
    ids, lengths = data.make_prompts(tokenizer, texts, data.named_rng("prompts"))
    begun = []
    for row, n in zip(ids.tolist(), lengths.tolist()):
        _, _, opinion = tokenizer.decode(row[:n]).partition(": the ")
        if opinion:
            begun.append(opinion)
    share = len(begun) / len(texts)
    assert share > .5, f"only {share:.2f} of the prompts reach into the first opinion"
    assert len(set(begun)) > 100, f"the prompts begin only {len(set(begun))} different opinions"


def test_the_beginning_of_a_review_decides_a_part_of_its_reward():
    """Reviews whose first opinion is good have another distribution of rewards, and another Z.

    log Z(x) = log E[exp(r / beta)] at beta = .2 differs by more than half a nat.
    """
    rewards = {True: [], False: []}
    for text in data.write_corpus(1000, 1)["train"]:
        _, valence, _ = data.parse_opinions(text)[0]
        rewards[valence > 0].append(data.sentiment(text))
    log_z = []
    for group in rewards.values():
        log_z.append((torch.tensor(group) / .2).exp().mean().log().item())
    assert log_z[0] > log_z[1] + .5, \
        f"log Z is {log_z[0]:.2f} after a good opinion and {log_z[1]:.2f} after a bad one"


# ------------------------------------------------------------------------------------------- labels
def test_the_higher_reward_wins_and_ties_are_dropped():
    """Deterministic labels: in each pair of a prompt's completions, the higher reward wins.

    An exact tie is no pair: a loop over all pairs.
    """
    reward = torch.randint(0, 4, (7, 5), generator=generator(1)) / 3.        # 7 prompts, K = 5
    expected, ties = [], 0
    for n, row in enumerate(reward.tolist()):
        for i, j in itertools.combinations(range(5), 2):
            if row[i] == row[j]:
                ties += 1
                continue
            w, l = (i, j) if row[i] > row[j] else (j, i)
            expected.append((5 * n + w, 5 * n + l))
    winner, loser = data.label_pairs(reward, "deterministic", .3, generator(2))
    dropped = 7 * 10 - len(winner)
    assert dropped == ties > 0, f"{dropped} ties are dropped, but there are {ties}"
    agree(torch.stack([winner, loser], 1), torch.tensor(expected),
          "the completion with the higher true reward must win: are winner and loser swapped, or "
          "are the rows those of another prompt?")


def test_labels_follow_bradley_terry_at_their_temperature():
    """Eq. 1: y_1 beats y_2 in a share sigma((r_1 - r_2) / tau) of the pairs.

    The tolerance is 4 standard deviations. A tie is a coin flip, and none is dropped.
    """
    rewards = [.2, .9, .2, .55]
    tau, count = .45, 4000
    reward = torch.tensor([rewards]).double().expand(count, 4)
    winner, loser = data.label_pairs(reward, "bt", tau, generator(5))
    assert len(winner) == 6 * count, \
        f"{len(winner)} pairs instead of {6 * count}: a tie is a coin flip"
    for i, j in itertools.combinations(range(4), 2):
        share = ((winner % 4 == i) & (loser % 4 == j)).sum().item() / count
        p = sigma((rewards[i] - rewards[j]) / tau)
        assert abs(share - p) < 4 * (p * (1 - p) / count) ** .5, \
            f"{rewards[i]} must beat {rewards[j]} in {p:.3f} of the pairs, not in {share:.3f}: " \
            "is tau wrong?"


# ------------------------------------------------------------------------------------------ batches
def random_preferences(seed):
    """Random `Preferences`: 11 prompts with 4 completions each, responses of 2 to 9 tokens.

    All completions of prompts 2 and 7 have the same reward, so these prompts have no pair.
    """
    length = torch.randint(2, 10, (44, 1), generator=generator(seed))
    length[20:24] = 3                                        # every response to prompt 5
    reward = torch.randint(0, 3, (11, 4), generator=generator(seed + 1)) / 2.
    reward[[2, 7]] = .5
    winner, loser = data.label_pairs(reward, "deterministic", 1., generator(0))
    ids = torch.randint(0, 30, (44, 13), generator=generator(seed + 2))
    columns = torch.arange(13)
    mask = (columns >= 3) & (columns < 3 + length)
    return data.Preferences(ids, mask, normal(44, seed=seed), winner, loser, 4)


def contents(preferences, pair, width):
    """The winner's row, then the loser's: its first `width` tokens, then log pi_ref of the row.

    `pair` holds two row numbers. Tokens outside the mask are -1.
    """
    rows = []
    for n in pair:
        tokens = preferences.ids[n, :width].where(preferences.mask[n, :width], -1)
        rows.append(tokens.tolist() + [preferences.ref_logp[n].item()])
    return rows


def test_a_batch_of_prompts_holds_the_same_pairs():
    """App. B: the pairs of a batch, which index its completions, are the pairs of its prompts.

    Tokens, masks and log pi_ref are the same, and there is no other pair.
    """
    preferences = random_preferences(seed=3)
    prompts = torch.tensor([8, 0, 2, 5])
    batch = data.select_prompts(preferences, prompts)
    width = batch.ids.shape[1]
    expected = []
    for prompt in prompts:
        for pair in zip(preferences.winner, preferences.loser):
            if pair[0] // 4 == prompt:
                expected.append(contents(preferences, pair, width))
    result = [contents(batch, pair, width) for pair in zip(batch.winner, batch.loser)]
    assert result == expected, \
        f"the {len(result)} pairs of the batch must be the {len(expected)} pairs of its prompts, " \
        "in the same order"
    response_tokens = preferences.mask.view(11, 4, 13)[prompts].sum()
    assert batch.mask.sum() == response_tokens, "response tokens of the batch were cut off"


def test_an_epoch_holds_each_prompt_once():
    """Each prompt with a pair is in exactly one batch of an epoch.

    No batch is larger than asked for. Another generator gives another order.
    """
    preferences = random_preferences(seed=3)
    batches = data.shuffled_batches(preferences, 2, generator(1), window=2)
    other_order = data.shuffled_batches(preferences, 2, generator(2), window=2)
    prompts = torch.cat(batches).tolist()
    with_pairs = set((preferences.winner // 4).tolist())
    assert sorted(prompts) == sorted(with_pairs), \
        f"an epoch must hold each prompt with pairs once, not {sorted(prompts)}"
    assert max(len(batch) for batch in batches) == 2, "batches must have at most 2 prompts"
    assert prompts != torch.cat(other_order).tolist(), "the order of the prompts must be random"


def test_prompts_of_like_length_go_together():
    """Within a window of batches, prompts are sorted by their longest response.

    So little filler is computed.
    """
    preferences = random_preferences(seed=3)
    longest = preferences.mask.sum(1).view(11, 4).amax(1)                    # (11,)
    batches = data.shuffled_batches(preferences, 2, generator(1), window=100)
    ranges = []
    for batch in batches:
        ranges.append((int(longest[batch].min()), int(longest[batch].max())))
    ranges.sort()
    for shorter, longer in itertools.pairwise(ranges):
        assert shorter[1] <= longer[0], \
            f"the lengths of batches in one window must not overlap: {ranges}"
