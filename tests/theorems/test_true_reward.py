"""The true reward r(x, y): what earns a reward, and what earns nothing."""
import functools
import itertools
import math
import random
import time

import torch

import data
from world import agree

OPENING = "This western:"    # of a film review


@functools.cache
def ranks():
    """Byte-pair ranks learned from a few reviews of both domains, once for all tests."""
    texts = []
    for domain in data.SUBJECTS:
        texts += data.write_corpus(15, 1, domain)["train"]
    return data.learn_ranks(texts, 330)


def encoding():
    """The encoding of these ranks. It is not cached, because it depends on data.PATTERN."""
    return data.make_encoding(ranks())


def reviews(count, seed):
    """`count` random reviews of each domain, the domains in turn."""
    texts = []
    for n in range(count):
        for domain in data.SUBJECTS:
            texts.append(data.write_review(data.named_rng("test", seed, n), domain))
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

    This holds for every adjective, intensifier, verb and negation of both domains.
    """
    intensifiers = {"": 1.}
    for word, factor in data.INTENSIFIERS.items():
        intensifiers[word + " "] = factor
    negations = {"": 1., "not ": -.6}
    opinion_on = {"film": f"{OPENING} the plot", "restaurant": "Our bistro: the soup"}
    for domain, opinion in opinion_on.items():
        adjectives = data.ADJECTIVES[domain]
        for words in itertools.product(adjectives, intensifiers, data.VERBS, negations):
            adjective, intensifier, verb, negation = words
            factor = intensifiers[intensifier] * negations[negation]
            check_sentiment(f"{opinion} {verb} {negation}{intensifier}{adjective}.",
                            sigma(adjectives[adjective] * factor),
                            "the reward must be sigma(adjective x intensifier x negation)")


def test_not_superb_is_weaker_than_awful_and_utterly_is_stronger_than_slightly():
    """Words have the order that a reader expects.

    "utterly" is stronger than no intensifier, "slightly" is weaker. "not awful" is good, but less
    than "superb"; "not superb" is bad, but less than "awful".
    """
    words = ["utterly awful", "awful", "slightly awful", "not utterly superb", "not superb",
             "not dull", "not awful", "fine", "superb", "utterly superb"]
    r = {x: data.sentiment(f"{OPENING} the plot was {x}.") for x in words}
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
    text = (f"{OPENING} the plot was superb, but the cast was dull. "
            "The score felt fine, and the ending seemed awful.")
    check_sentiment(text, sigma((3 - 2 * 1.5 + 1 - 3) / 4.5),
                    "the reward must be sigma of the weighted mean valence of its clauses")


def test_a_text_without_an_opinion_scores_one_half():
    """If no clause parses there is no opinion, and the reward is exactly .5."""
    for text in ["", " ", OPENING, OPENING + " the", "This western", "superb",
                 "superb superb superb.", "The plot.", "The plot was not.", "plot was fine"]:
        check_sentiment(text, .5, "a text without an opinion must score exactly .5")


def test_spam_earns_nothing():
    """Repeated adjectives or aspects, broken clauses and pasted words leave the reward as it is."""
    honest = f"{OPENING} the plot was fine"
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
    clauses = [(" the plot was utterly superb", 4.8, 1.),                    # text, valence, weight
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


# ---------------------------------------------------------------------------------- the two domains
def test_only_opinions_of_the_domain_of_the_opening_count():
    """After the opening of a film review, opinions on a restaurant earn nothing, and vice versa.

    Later openings have no influence. Without an opening, the opinions of both domains count.
    """
    film, restaurant = "The plot was superb.", "The soup was stale."          # valences 3 and -2
    rewards = {f"This western: {film} {restaurant}": sigma(3.),
               f"Our bistro: {film} {restaurant}": sigma(-2.),
               f"Our bistro: {film}": .5,
               f"This western: {film} Our bistro: {restaurant}": sigma(3.),
               f"Our bistro: {restaurant} This western: {film}": sigma(-2.),
               f"{film} {restaurant}": sigma(.5),
               f"Well. This western: {film} {restaurant}": sigma(.5)}
    for text, expected in rewards.items():
        check_sentiment(text, expected, "the opening alone must tell which opinions count")


def test_an_adjective_of_the_other_domain_earns_nothing():
    """A clause parses only if its aspect and its adjective are of one domain.

    This holds for all openings, with or without one.
    """
    for opening in ("This western: the", "Our bistro: the", "The"):
        for words in ("plot was tasty", "plot was not revolting", "soup was superb",
                      "soup felt really dull"):
            check_sentiment(f"{opening} {words}.", .5, "aspect and adjective are of two domains")


def test_every_opening_of_a_domain_tells_its_domain():
    """Each determiner with each subject is an opening; it tells the domain of its subject alone."""
    for domain, subjects in data.SUBJECTS.items():
        for determiner, subject in itertools.product(data.DETERMINERS, subjects):
            text = f"{determiner} {subject}: the plot was superb, and the soup was stale."
            check_sentiment(text, sigma(3.) if domain == "film" else sigma(-2.),
                            f"{determiner!r} {subject!r} must be an opening of the domain {domain}")


# ---------------------------------------------------------------------------------- any text at all
def test_any_string_has_a_reward_in_the_unit_interval():
    """Any string has a reward: a float in [0, 1], never an error.

    Here: random unicode, shuffled pieces of reviews, and reviews that are cut off.
    """
    r = random.Random(3)
    words = " ".join(reviews(20, seed=2)).split(" ")
    words += [".", ",", ":", ". ", ", ", ": ", "\n", "\u00e9", "\U0001f600", "\x00", "\ud7ff"]
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
    """One megabyte of junk takes less than 1.5 seconds, for eight kinds of junk.

    Some of them begin clauses that they never finish.
    """
    for junk in ["The plot was ", "The plot was not really ", ". ,", ",.", "superb ",
                 ". The plot was superb", "This western: ", ": the plot was "]:
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
    filler = tokenizer.encode(". The finale was superb. The menu was divine.")
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
