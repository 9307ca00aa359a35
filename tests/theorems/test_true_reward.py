"""The true reward r(x, y): what earns a reward, and what earns nothing."""
import functools
import itertools
import math
import random
import time

import torch

import data
from world import agree

OPENING = "I saw this film last night"


@functools.cache
def ranks():
    """Byte-pair ranks learned from a few reviews of both domains, once for all tests."""
    texts = []
    for domain in data.DOMAINS:
        texts += data.write_corpus(15, 1, domain)["train"]
    return data.learn_ranks(texts, 330)


def encoding():
    """The encoding of these ranks. It is not cached, because it depends on data.PATTERN."""
    return data.make_encoding(ranks())


def reviews(count, seed):
    """`count` random reviews of each domain, the domains in turn."""
    texts = []
    for n in range(count):
        for domain in data.DOMAINS:
            texts.append(data.write_review(data.rng("test", seed, n), domain))
    return texts


def sigma(x):
    """The logistic function of a number."""
    return 1 / (1 + math.exp(-x))


def check_sentiment(text, expected, claim):
    """Assert that `sentiment` of the text is the expected number."""
    reward = data.sentiment(text)
    assert abs(reward - expected) < 1e-12, \
        f"{claim}\n  sentiment({text!r}) = {reward:.6f}, not {expected:.6f}"


# -------------------------------------------------------------------------------------- one opinion
def test_an_opinion_is_the_adjective_scaled_by_intensifier_and_negation():
    """One clause has the reward sigma(valence x intensifier), times -.6 inside if negated.

    This holds for every adjective, intensifier, verb and negation.
    """
    intensifiers = {"": 1.}
    for word, factor in data.INTENSIFIERS.items():
        intensifiers[word + " "] = factor
    negations = {"": 1., "not ": -.6}
    adjectives = data.ADJECTIVES
    for words in itertools.product(adjectives, intensifiers, data.VERBS, negations):
        adjective, intensifier, verb, negation = words
        factor = intensifiers[intensifier] * negations[negation]
        check_sentiment(f"{OPENING}. The plot {verb} {negation}{intensifier}{adjective}.",
                        sigma(adjectives[adjective] * factor),
                        "the reward must be sigma(adjective x intensifier x negation)")


def test_not_superb_is_weaker_than_awful_and_utterly_is_stronger_than_slightly():
    """Words have the order that a reader expects.

    "utterly" is stronger than no intensifier, "slightly" is weaker. "not awful" is good, but less
    than "superb"; "not superb" is bad, but less than "awful".
    """
    words = ["utterly awful", "awful", "slightly awful", "not utterly superb", "not superb",
             "not dull", "not awful", "fine", "superb", "utterly superb"]
    r = {x: data.sentiment(f"{OPENING}. The plot was {x}.") for x in words}
    plain = [r["utterly awful"], r["awful"], r["slightly awful"], .5,
             r["fine"], r["superb"], r["utterly superb"]]
    assert plain == sorted(plain), f"words out of order: {r}"
    assert r["not utterly superb"] < r["not superb"] < .5, f"words out of order: {r}"
    assert .5 < r["not dull"] < r["not awful"] < r["superb"], f"words out of order: {r}"
    assert r["awful"] < r["not superb"], f"words out of order: {r}"


# --------------------------------------------------------------------------------- several opinions
def test_a_clause_after_but_weighs_half_as_much_again():
    """Contrast: in the mean valence a clause after "but" has weight 1.5, others have weight 1.

    A clause after "and" is one of the others.
    """
    text = (f"{OPENING}. The plot was superb, but the cast was dull. "
            "The score felt fine, and the ending seemed awful.")
    check_sentiment(text, sigma((3 - 2 * 1.5 + 1 - 3) / 4.5),
                    "the reward must be sigma of the weighted mean valence of its clauses")


def test_a_text_without_an_opinion_scores_one_half():
    """If no clause parses there is no opinion, and the reward is exactly .5."""
    for text in ["", " ", OPENING, OPENING + ".", "superb", "superb superb superb.", "The plot.",
                 "The plot was not.", "the plot was fine"]:
        check_sentiment(text, .5, "a text without an opinion must score exactly .5")


def test_spam_earns_nothing():
    """Repeated adjectives or aspects, broken clauses and pasted words leave the reward as it is."""
    honest = f"{OPENING}. The plot was fine"
    for spam in [". superb superb superb", ". The plot was superb",
                 ", and the plot was utterly superb" * 20, ". The cast superb",
                 ". The cast was superb superb", ". The cast was was superb",
                 ". the Cast was superb", ". The cast was really truly superb",
                 ". The cast was superb not", ". The soupcast was superb",
                 ". The cast  was superb"]:
        check_sentiment(honest + spam + ".", sigma(1.), "spam must earn nothing")
    for spam in [" superb", "  superb", " \u0455uperb"]:     # \u0455 is a letter that looks like s
        check_sentiment(honest + spam + ".", .5,
                        "spam inside the honest clause must break it and earn nothing")


def test_being_cut_off_costs_nothing():
    """A text that is cut at any character scores what its complete clauses score.

    An unfinished clause counts as absent: it is neither good nor bad.
    """
    clauses = [(". The plot was utterly superb", 4.8, 1.),                   # text, valence, weight
               (", but the cast felt not dull", 1.2, 1.5),
               (". The score seemed awful", -3., 1.)]
    text, ends = OPENING, []
    for words, _, _ in clauses:
        text += words
        ends.append(len(text))
    text += "."
    for cut in range(len(text) + 1):
        complete = [clause for clause, end in zip(clauses, ends) if end <= cut]
        expected = .5
        if complete:
            total = sum(valence * weight for _, valence, weight in complete)
            expected = sigma(total / sum(weight for _, _, weight in complete))
        check_sentiment(text[:cut], expected, "being cut off must cost nothing by itself")


# ---------------------------------------------------------------------------------- any text at all
def test_any_string_has_a_reward_in_the_unit_interval():
    """Any string has a reward: a float in [0, 1], never an error.

    Here: random unicode, shuffled pieces of reviews, and reviews that are cut off.
    """
    r = random.Random(3)
    words = " ".join(reviews(20, seed=2)).split(" ")
    words += [".", ",", ". ", ", ", "\n", "\u00e9", "\U0001f600", "\x00", "\ud7ff"]
    code_points = [*range(0xd800), *range(0xe000, 0x110000)]                 # without surrogates
    texts = []
    for _ in range(300):
        texts.append("".join(map(chr, r.choices(code_points, k=r.randrange(60)))))
    for _ in range(300):
        separator = r.choice(["", " "])
        texts.append(separator.join(r.choices(words, k=r.randrange(60))))
    for review in reviews(100, seed=3):
        cut = r.randrange(len(review))
        texts.append(review[:cut] + r.choice(words))
    for text in texts:
        reward = data.sentiment(text)
        assert isinstance(reward, float) and 0. <= reward <= 1., \
            f"sentiment({text!r}) must be a float in [0, 1], not {reward!r}"


def test_the_reward_takes_linear_time():
    """One megabyte of junk takes less than 1.5 seconds, for six kinds of junk.

    Some of them begin clauses that they never finish.
    """
    for junk in ["The plot was ", "The plot was not really ", ". ,", ",.", "superb ",
                 ". The plot was superb"]:
        start = time.process_time()       # CPU time: other programs on the machine do not count
        data.sentiment(junk * (1_000_000 // len(junk)))
        seconds = time.process_time() - start
        assert seconds < 1.5, \
            f"{seconds:.1f} s for 1 MB of {junk!r}: the parser backtracks, and a policy that " \
            "writes such texts could stall training"


def test_the_true_reward_reads_prompt_and_response_and_no_filler():
    """r(x, y) = sentiment of prompt and response together, without the end token.

    Tokens after the response have no influence.
    """
    tokenizer = encoding()
    end = tokenizer.eot_token
    filler = tokenizer.encode(". The finale was superb.")
    texts, responses = [], []
    for n, text in enumerate(reviews(10, seed=8)):
        tokens = tokenizer.encode(text)
        tokens = tokens[:len(tokens) - 2 * n]
        texts.append(tokenizer.decode(tokens))
        has_end = n % 2 == 1                                 # every second response
        responses.append(tokens + [end] if has_end else tokens)
    ids, _ = data.pad([response + filler for response in responses], end)
    columns = torch.arange(ids.shape[1])
    stop = torch.tensor([len(response) for response in responses])
    mask = (columns >= 5) & (columns < stop[:, None])
    expected = torch.tensor([data.sentiment(text) for text in texts])
    agree(data.true_reward(tokenizer, ids, mask), expected,
          "the true reward must read prompt and response, and nothing after the response",
          tolerance=1e-6)
