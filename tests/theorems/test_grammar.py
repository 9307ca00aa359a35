"""The reviews that the grammar writes: their form, their words, their frequencies, their splits."""
import collections
import random
import re

import torch

import data
from test_true_reward import OPENING, reviews


def test_every_written_review_is_grammatical():
    """`is_grammatical` accepts every review that the grammar writes, in both domains.

    All clauses parse: 3 or 4 of them, on different aspects.
    """
    for text in reviews(150, seed=1):
        connectives = (": the ", ". The ", ", and the ", ", but the ")
        clauses = sum(text.count(connective) for connective in connectives)
        assert data.is_grammatical(text), f"a written review must be grammatical: {text!r}"
        assert len(data.parse_opinions(text)) == clauses in (3, 4), \
            f"a written review must have 3 or 4 opinions, and all must parse: {text!r}"


def test_broken_reviews_are_not_grammatical():
    """A review is rejected if it is cut inside a sentence, or if a word is doubled or missing.

    It is also rejected if its opening is a sentence, or if it mixes the two domains.
    """
    text = (f"{OPENING} the plot was not really superb, but the cast felt dull. "
            "The score seemed fine.")
    broken = []
    for cut in range(len(text)):
        if not text[:cut].endswith("."):
            broken.append(text[:cut])
    words = text.split(" ")
    for i, word in enumerate(words):
        broken.append(" ".join(words[:i] + [word, word] + words[i + 1:]))
        if word not in ("not", "really"):                    # a review is complete without these
            broken.append(" ".join(words[:i] + words[i + 1:]))
    broken += [text.replace(":", "."), text.replace("western", "bistro"),
               text.replace("plot", "soup"), text.replace("fine", "tasty")]
    accepted = [x for x in broken if data.is_grammatical(x)]
    assert not accepted, f"these are no reviews, but they are accepted: {accepted}"
    assert data.is_grammatical(text), f"this review must be accepted: {text!r}"


def parts_of_opinions(text):
    """The opinions of a review -> list of (connective, is negated, intensifier, adjective)."""
    connectives = r"(: the |\. The |, and the |, but the )"
    _, *pieces = re.split(connectives, text.removesuffix("."))
    parts = []
    for connective, opinion in zip(pieces[::2], pieces[1::2]):
        _, _, *modifiers, adjective = opinion.split(" ")
        intensifiers = [word for word in modifiers if word != "not"]
        parts.append((connective, "not" in modifiers, (intensifiers or [None])[0], adjective))
    return parts


def assert_share(count, total, p, claim):
    """A share of independent events has the probability p, within 4 standard deviations."""
    assert abs(count / total - p) < 4 * (p * (1 - p) / total) ** .5, \
        f"{claim}: {count / total:.3f} of {total}, and not {p:.3f}"


def test_reviews_have_the_frequencies_of_the_grammar():
    """Half of the reviews have 3 opinions, half 4; of 5 opinions 1 is negated, 2 are intensified.

    A mood of .25, .5 or .75 is the probability that an opinion is positive, so two opinions of a
    review agree with the probability 7/12. Half of the opinions are sentences of their own; "and"
    joins those that agree. A word of valence v is written in proportion to 5 - |v|.
    """
    rng, valences = random.Random(3), data.ADJECTIVES["film"]
    texts = [parts_of_opinions(data.write_review(rng)) for _ in range(3000)]
    opinions = [opinion for text in texts for opinion in text]
    signs = [[(valences[word] > 0) != negated for _, negated, _, word in text] for text in texts]
    pairs = [(a, b, text[i + 1][0]) for text, row in zip(texts, signs)
             for i, (a, b) in enumerate(zip(row, row[1:]))]
    agreeing = sum(row[0] == row[-1] for row in signs)
    assert_share(sum(len(text) == 3 for text in texts), 3000, .5, "reviews of 3 opinions")
    assert_share(sum(row[0] for row in signs), 3000, .5, "positive first opinions")
    assert_share(agreeing, 3000, 7 / 12, "first and last opinions of the same sign")
    assert_share(sum(x[1] for x in opinions), len(opinions), .2, "negated opinions")
    assert_share(sum(x[2] is not None for x in opinions), len(opinions), .4, "intensified opinions")
    assert_share(sum(x[2] == ". The " for x in pairs), len(pairs), .5, "sentences")
    assert all(x == ". The " or (x == ", and the ") == (a == b) for a, b, x in pairs), \
        '"and" must join opinions of the same sign, and "but" opinions of different signs'
    total = sum(5 - abs(v) for v in valences.values())
    for strength in (1, 2, 3):
        words = [word for word, v in valences.items() if abs(v) == strength]
        count = sum(word in words for *_, word in opinions)
        assert_share(count, len(opinions), len(words) * (5 - strength) / total,
                     f"words of valence {strength} or -{strength}")


def test_the_lexicon_is_balanced():
    """Each domain has as many words of valence v as of -v, for v = 1, 2, 3, and none else.

    Intensifiers go from half to 1.6 times, in the order of the list.
    """
    for domain, valences in data.ADJECTIVES.items():
        counts = collections.Counter(valences.values())
        assert set(counts) == {-3, -2, -1, 1, 2, 3}, f"{domain}: valences {sorted(counts)}"
        for v in (1, 2, 3):
            assert counts[v] == counts[-v] > 3, f"{domain}: {counts[v]} words of valence {v}"
    factors = list(data.INTENSIFIERS.values())
    assert factors == sorted(factors) and (factors[0], factors[-1]) == (.5, 1.6)


def words_of(texts):
    """The words of some texts, without punctuation."""
    return {word.strip(":.,") for text in texts for word in text.split(" ")}


def test_restaurants_have_words_that_no_film_review_contains():
    """Subject, aspects and adjectives of a restaurant are in no film review, and vice versa.

    A restaurant review has at least 7 such words: a subject, and 3 opinions with two of them each.
    """
    lexicon = {}
    for domain in data.SUBJECTS:
        phrases = [*data.SUBJECTS[domain], *data.ASPECTS[domain], *data.ADJECTIVES[domain]]
        lexicon[domain] = words_of(phrases)
    for domain, other in (("film", "restaurant"), ("restaurant", "film")):
        texts = data.write_corpus(300, 7, domain)["train"]
        shared = words_of(texts) & lexicon[other]
        assert not shared, f"{domain} reviews contain words of the domain {other}: {shared}"
        for text in texts:
            own = [word for word in text.split(" ") if word.strip(":.,") in lexicon[domain]]
            assert len(own) >= 7, f"this {domain} review has few words of its own: {text!r}"


def test_splits_are_disjoint():
    """No review occurs twice, in one split or in two.

    The splits hold 80, 10 and 10 percent of the reviews.
    """
    splits = data.write_corpus(230, seed=3)
    texts = [text for split in splits.values() for text in split]
    sizes = {name: len(split) for name, split in splits.items()}
    assert len(set(texts)) == len(texts) == 230, \
        f"{len(texts) - len(set(texts))} reviews occur twice: training sees the test set"
    assert sizes == {"train": 184, "validation": 23, "test": 23}, \
        f"the splits must hold 80, 10 and 10 percent of 230 reviews, not {sizes}"


def test_a_corpus_depends_on_its_seed_alone():
    """The same seed gives the same corpus, and another seed gives another corpus.

    The global random state has no influence, and it is left unchanged.
    """
    random.seed(1)
    corpus = data.write_corpus(40, seed=5)
    other_seed = data.write_corpus(40, seed=6)
    number = random.random()
    random.seed(1)
    assert random.random() == number, "writing a corpus must not use the global random state"
    assert data.write_corpus(40, seed=5) == corpus, \
        "the same seed must give the same corpus, whatever the global random state is"
    assert not set(other_seed["train"]) & set(corpus["train"]), \
        "another seed must give another corpus"


def test_generators_of_other_names_are_other_generators():
    """`named_rng` and `named_generator` depend on all their names and on nothing else.

    So changing a loss never changes the data.
    """
    names = [("a", 1), ("a", 2), ("b", 1), ("a",), ("a1",), (1, "a")]
    numbers = [data.named_rng(*name).random() for name in names]
    tensor_numbers = []
    for name in names:
        tensor_numbers.append(torch.rand(1, generator=data.named_generator(*name)).item())
    assert len({*numbers, *tensor_numbers}) == 12, \
        f"generators of different names must give different numbers: {numbers} {tensor_numbers}"
    assert data.named_rng("a", 1).random() == numbers[0], \
        "named_rng of the same names must repeat its numbers"
    repeated = torch.rand(1, generator=data.named_generator("a", 1)).item()
    assert repeated == tensor_numbers[0], \
        "named_generator of the same names must repeat its numbers"
