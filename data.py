"""The task: film reviews, their true sentiment, a tokenizer, prompts and preferences (Section 6).

The paper prompts a language model with the beginning of an IMDb review and asks for a positive
continuation ("controlled sentiment"). Here a small grammar writes the reviews and `sentiment` reads
them, so the true reward r(x, y) is known exactly and costs microseconds.

What is simplified, and why:
  1. Reviews come from a grammar, not from IMDb: a laptop can learn it, and its reward has no error.
  2. The reward is a formula over parsed clauses, not a classifier, so that it is exact and fast. A
     clause that does not parse earns nothing.

As in the paper, a prompt is the first 2-8 tokens of a review, without a beginning-of-text token.
There are many openings and all are short, so most prompts reach into the first opinion: each prompt
has its own best responses, and its own Z(x). SFT sees restaurant reviews too, but no preference
shows one (Table 1: out of distribution).

Every random choice takes a generator made from names (`named_rng`, `named_generator`), so changing
a loss never changes the data.

Shapes: X prompts, K completions of each, C = X K completions in all, M pairs, B texts, T tokens.
"""
import hashlib
import math
import random
import re
from typing import NamedTuple

import tiktoken
import torch
from tiktoken._educational import bpe_train
from torch import Tensor

from model import last_response_token, trimmed_width

# ----------------------------------------------------------------------------------- the language
# An opening is a determiner and a subject, "This western:". The subject names the domain of the
# review.
DETERMINERS = ["This", "That", "The", "Our", "My", "Your", "Their", "His", "Her", "One", "Another",
               "Some", "Every", "Any", "Last", "First"]
SUBJECTS = {    # domain -> what is reviewed
    "film": ["western", "thriller", "comedy", "drama", "musical", "sequel", "remake", "cartoon",
             "documentary", "romance", "mystery", "satire", "biopic", "epic", "fable", "farce",
             "classic", "blockbuster", "prequel", "fantasy", "war film", "short film", "matinee",
             "premiere"],
    "restaurant": ["bistro", "diner", "tavern", "noodle bar", "bakery", "pizzeria", "canteen",
                   "grill", "steakhouse", "brasserie", "buffet", "cafe"]}
ASPECTS = {    # domain -> what opinions are about
    "film": ["acting", "plot", "script", "score", "pacing", "ending", "cast", "humour", "editing",
             "story", "villain", "finale"],
    "restaurant": ["soup", "service", "dessert", "menu", "wine", "bread", "music", "coffee",
                   "pasta", "waiter"]}
VERBS = ["was", "felt", "seemed", "looked"]
INTENSIFIERS = {"slightly": .5, "fairly": .7, "rather": .8, "really": 1.2, "truly": 1.4,
                "utterly": 1.6}
ADJECTIVES = {    # domain -> adjective -> valence, from -3 to 3
    "film": {
        "decent": 1, "fine": 1, "pleasant": 1, "solid": 1, "likeable": 1,
        "charming": 2, "clever": 2, "gripping": 2, "elegant": 2, "witty": 2,
        "brilliant": 3, "superb": 3, "dazzling": 3, "magnificent": 3,
        "flat": -1, "thin": -1, "plain": -1, "slow": -1, "predictable": -1,
        "dull": -2, "clumsy": -2, "bland": -2, "shallow": -2, "tedious": -2,
        "awful": -3, "dreadful": -3, "appalling": -3, "excruciating": -3},
    "restaurant": {
        "tasty": 1, "fresh": 1, "warm": 1, "tidy": 1, "generous": 1,
        "delicious": 2, "delightful": 2, "inviting": 2, "tender": 2, "lovely": 2,
        "exquisite": 3, "heavenly": 3, "sublime": 3, "divine": 3,
        "cold": -1, "salty": -1, "stingy": -1, "noisy": -1, "greasy": -1,
        "soggy": -2, "stale": -2, "sour": -2, "murky": -2, "grim": -2,
        "revolting": -3, "inedible": -3, "ghastly": -3, "disgusting": -3}}
NEGATION = -.6    # factor of "not": "not superb" is weaker than "dull"
CONTRAST = 1.5    # weight of a clause after "but": it is what the reviewer concludes


def one_of(words) -> str:
    """A regular expression that matches any of the words."""
    return "(?:" + "|".join(words) + ")"


def opening_pattern(domain: str) -> str:
    """A regular expression of an opening, "This western:"."""
    return rf"{one_of(DETERMINERS)} {one_of(SUBJECTS[domain])}:"


def opinion_pattern(domain: str) -> str:
    """A regular expression of an opinion: aspect, verb, negation, intensifier, adjective."""
    return (rf"(?P<aspect>{one_of(ASPECTS[domain])}) {one_of(VERBS)}(?P<negation> not)?"
            rf"(?: (?P<intensifier>{one_of(INTENSIFIERS)}))? "
            rf"(?P<adjective>{one_of(ADJECTIVES[domain])})")


def review_pattern(domain: str) -> str:
    """A regular expression of a whole review: an opening, then sentences of opinions."""
    opinion = re.sub(r"\?P<\w+>", "?:", opinion_pattern(domain))    # names may not repeat
    more = rf"(?:, (?:and|but) the {opinion})*\."
    return rf"{opening_pattern(domain)} the {opinion}{more}(?: The {opinion}{more})*"


OPENING = {domain: re.compile(opening_pattern(domain)) for domain in SUBJECTS}
CLAUSE = {domain: re.compile(rf"(?:The|the|and the|but the) {opinion_pattern(domain)}")
          for domain in SUBJECTS}
REVIEW = {domain: re.compile(review_pattern(domain)) for domain in SUBJECTS}


def domains_of(text: str) -> list[str]:
    """The domain that the opening of a text names; all domains if there is no opening."""
    return [domain for domain in SUBJECTS if OPENING[domain].match(text)] or list(SUBJECTS)


def parse_opinions(text: str) -> list[tuple[str, float, float]]:
    """The clauses of a text that parse, in order, as (aspect, valence, weight).

    Only opinions of the domain of its opening count, and only the first on each aspect.
    """
    domains = domains_of(text)
    opinions = {}
    for part in re.split(r"[.,:] ?", text):
        for domain in domains:
            match = CLAUSE[domain].fullmatch(part)
            if match:
                aspect = match["aspect"]
                valence = ADJECTIVES[domain][match["adjective"]]
                valence *= INTENSIFIERS.get(match["intensifier"], 1.)
                valence *= NEGATION if match["negation"] else 1.
                weight = CONTRAST if part.startswith("but") else 1.
                opinions.setdefault(aspect, (aspect, valence, weight))
    return list(opinions.values())


def sentiment(text: str) -> float:
    """The true reward r(x, y): the probability in [0, 1] that a text is positive.

    sigma(weighted mean valence) over the opinions that parse in prompt and response together; .5 if
    there is none. Takes any string, in linear time. Repeated and broken clauses earn nothing and
    cost nothing. A text that is cut off keeps the opinions before the cut.
    """
    opinions = parse_opinions(text)
    if not opinions:
        return .5
    total = sum(valence * weight for _, valence, weight in opinions)
    return 1 / (1 + math.exp(-total / sum(weight for _, _, weight in opinions)))


def is_grammatical(text: str) -> bool:
    """Whether a whole text is a review: one opening, then at least one sentence of opinions."""
    return any(REVIEW[domain].fullmatch(text) for domain in SUBJECTS)


def write_opinion(domain: str, aspect: str, positive: bool, rng: random.Random) -> str:
    """A random opinion on an aspect, without the words that join it to the text before."""
    negated = rng.random() < .2
    is_good = positive != negated                                      # "not dull" is positive
    valences = ADJECTIVES[domain]
    adjectives = [word for word, valence in valences.items() if (valence > 0) == is_good]
    weights = [5 - abs(valences[word]) for word in adjectives]         # strong words are rarer
    adjective = rng.choices(adjectives, weights)[0]
    intensifier = rng.choice(list(INTENSIFIERS)) + " " if rng.random() < .4 else ""
    return f"{aspect} {rng.choice(VERBS)} {'not ' if negated else ''}{intensifier}{adjective}"


def write_review(rng: random.Random, domain: str = "film") -> str:
    """A random review: an opening, then 3 or 4 opinions.

    A latent mood correlates the opinions of a review. "but" joins opinions that disagree, "and"
    opinions that agree.
    """
    mood = rng.choice([.25, .5, .75])                                    # P(an opinion is positive)
    text = f"{rng.choice(DETERMINERS)} {rng.choice(SUBJECTS[domain])}"
    previous = None
    for aspect in rng.sample(ASPECTS[domain], rng.choice([3, 4])):
        positive = rng.random() < mood
        if previous is None:
            connective = ": the "
        elif rng.random() < .5:
            connective = ". The "
        else:
            connective = ", and the " if positive == previous else ", but the "
        text += connective + write_opinion(domain, aspect, positive, rng)
        previous = positive
    return text + "."


def named_rng(*names) -> random.Random:
    """A random generator that depends only on its names: the same names, the same numbers."""
    return random.Random(repr(names))


def named_generator(*names, device="cpu") -> torch.Generator:
    """`named_rng` for tensors."""
    seed = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)


def write_corpus(count: int, seed: int, domain: str = "film") -> dict[str, list[str]]:
    """`count` distinct reviews in disjoint splits: train 80%, validation 10%, test 10%.

    Validation prompts are for tuning, test prompts for results.
    """
    rng = named_rng("corpus", domain, seed)
    reviews = {}                                                       # a dict keeps the order
    while len(reviews) < count:
        reviews[write_review(rng, domain)] = None
    texts = list(reviews)
    train_end, validation_end = int(.8 * count), int(.9 * count)
    return {"train": texts[:train_end], "validation": texts[train_end:validation_end],
            "test": texts[validation_end:]}


# ---------------------------------------------------------------------------------- the tokenizer
PATTERN = r" ?\p{L}+| ?[^\s\p{L}]+|\s+"    # words with their leading space, punctuation, the rest
MAX_PROMPT_TOKENS = 8


def learn_ranks(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair ranks of `vocab_size` - 1 tokens, learned from texts (takes seconds).

    The last token is reserved for end-of-text. Raises ValueError if the texts have too few distinct
    words for that many tokens.
    """
    return bpe_train("\n".join(texts), vocab_size - 1, PATTERN, visualise=None)


def make_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """A tiktoken encoding whose last token, `encoding.eot_token`, ends a text."""
    return tiktoken.Encoding("reviews", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def pad(rows: list[list[int]], filler: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of token ids, padded on the right to `width` at least -> ids (B, T), lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), max(width, int(lengths.max()))), filler)
    for row, tokens in zip(ids, rows):
        row[:len(tokens)] = torch.tensor(tokens)
    return ids, lengths


def make_prompts(encoding, texts: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
    """The first 2-8 tokens of each text (App. C.1) -> ids (B, 8), lengths (B,)."""
    rows = [encoding.encode(text)[:rng.randint(2, MAX_PROMPT_TOKENS)] for text in texts]
    return pad(rows, encoding.eot_token, MAX_PROMPT_TOKENS)


def prompt_lengths(mask: Tensor) -> Tensor:
    """The tokens before the response: mask (B, T) of response tokens -> (B,)."""
    return mask.int().argmax(1)


def decode(encoding, ids: Tensor, mask: Tensor) -> list[str]:
    """The text of each row, prompt and response, without end token or filler.

    ids (B, T), mask (B, T) of response tokens.
    """
    ends = last_response_token(mask) + 1
    return [encoding.decode([t for t in row[:end] if t != encoding.eot_token])
            for row, end in zip(ids.tolist(), ends.tolist())]


def true_reward(encoding, ids: Tensor, mask: Tensor) -> Tensor:
    """`sentiment` of each row: ids (B, T), mask (B, T) -> (B,) float32 on the device of the ids."""
    return torch.tensor([sentiment(text) for text in decode(encoding, ids, mask)],
                        device=ids.device)


# -------------------------------------------------------------------------------- the preferences
def bradley_terry(r_1: Tensor, r_2: Tensor) -> Tensor:
    """P(y_1 preferred to y_2 | x) = sigma(r_1 - r_2)                                     Eq. 1"""
    return torch.sigmoid(r_1 - r_2)


def label_pairs(reward: Tensor, mode: str, tau: float,
                generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Label all pairs of the K completions of each prompt: reward (X, K) -> winner, loser.

    `deterministic` (the paper): the higher reward wins; exact ties are dropped. `bt` (the theory):
    y_1 wins with the probability of Eq. 1 at rewards r / tau, so a tie is a coin flip. Winner and
    loser (M,), for M pairs, index the X * K completions, prompt by prompt. A prompt has K(K-1)/2
    pairs, less its dropped ties; they are consecutive.
    """
    n, k = reward.shape
    i, j = torch.triu_indices(k, k, 1)                                 # (K(K-1)/2,) each
    r_i, r_j = reward[:, i], reward[:, j]                              # (X, K(K-1)/2)
    if mode == "deterministic":
        i_wins = r_i > r_j
        keep = r_i != r_j
    else:
        i_wins = torch.rand(r_i.shape, generator=generator) < bradley_terry(r_i / tau, r_j / tau)
        keep = torch.ones_like(i_wins)
    first_row = k * torch.arange(n)[:, None]
    winner = torch.where(i_wins, i, j) + first_row
    loser = torch.where(i_wins, j, i) + first_row
    return winner[keep], loser[keep]


class Preferences(NamedTuple):
    """K completions of each of X prompts (C = X * K rows), and M labelled pairs of them.

    Both are ordered by prompt.
    """
    ids: Tensor       # (C, T) prompt, response, filler
    mask: Tensor      # (C, T) response tokens
    ref_logp: Tensor  # (C,) log pi_ref(y|x), nats, fixed during training
    winner: Tensor    # (M,) rows of y_w
    loser: Tensor     # (M,) rows of y_l
    k: int            # K, completions of a prompt


def select_prompts(preferences: Preferences, indices: Tensor) -> Preferences:
    """The completions and pairs of the prompts at these indices (n,), as a batch.

    The pairs index the rows of the batch; its width is that of its longest row.
    """
    ids, mask, ref_logp, winner, loser, k = preferences
    rows = (indices[:, None] * k + torch.arange(k)).flatten()              # (n * K,)
    # the pairs of a prompt are consecutive, from `first` to before `after_last`
    first, after_last = torch.searchsorted(winner // k, torch.stack([indices, indices + 1]))
    pairs = torch.cat([torch.arange(a, b) for a, b in zip(first.tolist(), after_last.tolist())])
    shift = k * (torch.arange(len(indices)) - indices)                     # from old to new rows
    shift = shift.repeat_interleave(after_last - first)                    # (pairs,)
    width = trimmed_width(mask[rows])
    return Preferences(ids[rows, :width], mask[rows, :width], ref_logp[rows],
                       winner[pairs] + shift, loser[pairs] + shift, k)


def shuffled_batches(preferences: Preferences, batch: int, generator: torch.Generator,
                     window: int = 8) -> list[Tensor]:
    """One epoch: batches of the indices of all prompts that have pairs, in random order.

    Within a window of batches, prompts are sorted by their longest response, so that less filler
    is computed. Each batch is (batch,) or shorter, for `select_prompts`.
    """
    k = preferences.k
    length = preferences.mask.sum(1).view(-1, k).amax(1)               # (X,) longest completion
    prompts = (preferences.winner // k).unique()
    if not len(prompts):
        return []
    prompts = prompts[torch.randperm(len(prompts), generator=generator)]
    batches = []
    for part in prompts.split(batch * window):
        batches += part[length[part].argsort(stable=True)].split(batch)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
