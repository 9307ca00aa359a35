"""The task: what earns a reward and what does not, the texts and their tokens, and how preferences are labelled and batched."""
import functools
import math
import random
import time

import torch

import data
from world import agree, generator, normal

OPENING = "I saw this film last night"


@functools.cache
def ranks():
    """Byte-pair ranks from a few reviews, learned once."""
    return data.learn_ranks([text for domain in data.DOMAINS for text in data.write_corpus(15, 1, domain)["train"]], 330)


def encoding():
    return data.make_encoding(ranks())


def sigma(x):
    return 1 / (1 + math.exp(-x))


def close(text, expected, claim):
    reward = data.sentiment(text)
    assert abs(reward - expected) < 1e-12, f"{claim}\n  sentiment({text!r}) = {reward:.6f}, not {expected:.6f}"


def reviews(count, seed):
    return [data.write_review(data.rng("test", seed, n), d) for n in range(count) for d in data.DOMAINS]


# ------------------------------------------------------------------------------------------------------------ the reward
def test_an_opinion_is_the_adjective_scaled_by_intensifier_and_negation():
    """One clause: sigma(valence x intensifier x -.6 if negated), for every adjective, intensifier, verb and negation."""
    for adjective, valence in data.ADJECTIVES.items():
        for word, factor in [("", 1.), *((w + " ", f) for w, f in data.INTENSIFIERS.items())]:
            for verb, negation in [(v, n) for v in data.VERBS for n in ("", "not ")]:
                expected = sigma(valence * factor * (-.6 if negation else 1.))
                close(f"{OPENING}. The plot {verb} {negation}{word}{adjective}.", expected, "adjective x intensifier x negation")


def test_not_superb_is_weaker_than_awful_and_utterly_is_stronger_than_slightly():
    """The order a reader expects: utterly > plain > slightly; "not awful" is good but less than "superb", and the other way
    round."""
    texts = ["utterly awful", "awful", "slightly awful", "not utterly superb", "not superb", "not dull", "not awful", "fine",
             "superb", "utterly superb"]
    r = [data.sentiment(f"{OPENING}. The plot was {t}.") for t in texts]
    order = r[:3] + [.5] + r[7:]
    assert order == sorted(order) and r[3] < r[4] < .5 < r[5] < r[6] < r[8] and r[1] < r[4], \
        f"words out of order: {dict(zip(texts, r))}"


def test_a_clause_after_but_weighs_half_as_much_again():
    """Contrast: the mean valence is weighted 1 for a clause and 1.5 for one after "but"; two clauses agree by "and" at weight
    1."""
    text = f"{OPENING}. The plot was superb, but the cast was dull. The score felt fine, and the ending seemed awful."
    close(text, sigma((3 - 2 * 1.5 + 1 - 3) / 4.5), "the reward is sigma of the weighted mean valence of its clauses")


def test_a_text_without_an_opinion_scores_one_half():
    """No clause parses, no opinion: exactly .5."""
    for text in ["", " ", OPENING, OPENING + ".", "superb", "superb superb superb.", "The plot.", "The plot was not.",
                 "the plot was fine"]:
        close(text, .5, "a text without an opinion must score exactly .5")


def test_spam_earns_nothing():
    """Repeated adjectives, repeated aspects, broken clauses and pasted words leave the reward of the honest review as it is."""
    honest = f"{OPENING}. The plot was fine"
    for spam in [". superb superb superb", ". The plot was superb", ", and the plot was utterly superb" * 20, ". The cast superb",
                 ". The cast was superb superb", ". The cast was was superb", ". the Cast was superb", " superb",
                 ". The cast was really truly superb",
                 ". The cast was superb not", ". The soupcast was superb", "  superb", ". The cast  was superb", " \u0455uperb"]:
        expected = .5 if spam in (" superb", "  superb", " \u0455uperb") else sigma(1.)    # these spoil the honest clause itself
        close(honest + spam + ".", expected, "spam must earn nothing")


def test_being_cut_off_costs_nothing():
    """A text cut at any character scores what its complete clauses score: an unfinished clause is absent, neither good nor
    bad."""
    clauses = [(". The plot was utterly superb", 4.8, 1.), (", but the cast felt not dull", 1.2, 1.5),
               (". The score seemed awful", -3., 1.)]
    text = OPENING + "".join(c for c, _, _ in clauses) + "."
    ends = [len(OPENING) + sum(len(c) for c, _, _ in clauses[:i + 1]) for i in range(3)]
    for cut in range(len(text) + 1):
        whole = [c for c, end in zip(clauses, ends) if end <= cut]
        expected = sigma(sum(v * w for _, v, w in whole) / sum(w for _, _, w in whole)) if whole else .5
        close(text[:cut], expected, "being cut off must cost nothing by itself")


def test_any_string_has_a_reward_in_the_unit_interval():
    """Random unicode, pieces of reviews shuffled together, reviews cut off: a float in [0, 1], never an error."""
    r, words = random.Random(3), " ".join(reviews(20, seed=2)).split(" ")
    words += [".", ",", ". ", ", ", "\n", "\u00e9", "\U0001f600", "\x00", "\ud7ff"]
    letters = [*range(0xd800), *range(0xe000, 0x110000)]
    texts = ["".join(map(chr, r.choices(letters, k=r.randrange(60)))) for _ in range(300)]
    texts += [r.choice(["", " "]).join(r.choices(words, k=r.randrange(60))) for _ in range(300)]
    texts += [text[:r.randrange(len(text))] + r.choice(words) for text in reviews(100, seed=3)]
    for text in texts:
        reward = data.sentiment(text)
        assert isinstance(reward, float) and 0. <= reward <= 1., f"sentiment({text!r}) = {reward!r}, not a float in [0, 1]"


def test_the_reward_takes_linear_time():
    """A megabyte of junk of six kinds, clauses begun and never finished among them, is read in less than a second each."""
    for junk in ["The plot was ", "The plot was not really ", ". ,", ",.", "superb ", ". The plot was superb"]:
        start = time.process_time()    # not the clock's: other work on this machine must not fail it
        data.sentiment(junk * (1_000_000 // len(junk)))
        seconds = time.process_time() - start
        assert seconds < 1.5, \
            f"{seconds:.1f} s for 1 MB of {junk!r}: the reward backtracks, and a policy could stall training with it"


# ------------------------------------------------------------------------------------------------------------- the texts
def test_every_written_review_is_grammatical():
    """What the grammar writes, `is_grammatical` accepts whole, in both domains; its clauses all parse, 3 or 4 on different
    aspects."""
    for text in reviews(150, seed=1):
        clauses = sum(text.count(joint) for joint in (". The ", ", and the ", ", but the "))
        assert data.is_grammatical(text) and len(data.opinions(text)) == clauses in (3, 4), \
            f"not a review, or a lost opinion: {text!r}"


def test_broken_reviews_are_not_grammatical():
    """A review cut anywhere but at the end of a sentence, or with a word doubled, or dropped, is not accepted."""
    text = f"{OPENING}. The plot was not really superb, but the cast felt dull. The score seemed fine."
    words, whole = text.split(" "), [i + 1 for i in range(len(text)) if text[i] == "." and i > len(OPENING)]
    broken = [text[:cut] for cut in range(len(text)) if cut not in whole]
    broken += [" ".join(words[:i] + [words[i]] * 2 + words[i + 1:]) for i in range(len(words))]
    broken += [" ".join(words[:i] + words[i + 1:]) for i in range(len(words)) if words[i] not in ("not", "really")]
    accepted = [t for t in broken if data.is_grammatical(t)]
    assert not accepted and data.is_grammatical(text), f"accepted as reviews: {accepted}"


def test_decoding_undoes_encoding():
    """decode(encode(text)) = text for reviews of both domains and for any other text; no text holds the end token."""
    texts = reviews(100, seed=4) + ["", "  two  spaces\n\ttab", "na\u00efve \u6f22\u5b57 \U0001f600!?", "<|endoftext|"]
    tokens = encoding()
    for text in texts:
        ids = tokens.encode(text)
        assert tokens.decode(ids) == text and tokens.eot_token not in ids, f"{text!r} came back as {tokens.decode(ids)!r}"


def test_splits_are_disjoint():
    """No review stands in two splits, none twice in one, and the splits are 80, 10 and 10 percent of what was asked for."""
    splits = data.write_corpus(230, seed=3)
    texts = [text for split in splits.values() for text in split]
    sizes = {name: len(split) for name, split in splits.items()}
    assert len(set(texts)) == len(texts) == 230, \
        f"{len(texts) - len(set(texts))} reviews stand in two places: training sees the test set"
    assert sizes == {"train": 184, "validation": 23, "test": 23}, f"80/10/10 percent of 230 are not {sizes}"


def test_a_corpus_depends_on_its_seed_alone():
    """Same seed, same corpus, whatever the global generators did before, which are left as they were; another seed, another
    corpus."""
    random.seed(1)
    first, other = data.write_corpus(40, seed=5), data.write_corpus(40, seed=6)
    drawn = random.random()
    random.seed(1)
    assert random.random() == drawn, "writing a corpus consumed the global random state"
    assert data.write_corpus(40, seed=5) == first, "the same seed must write the same corpus, whatever the global random state"
    assert not set(other["train"]) & set(first["train"]), "another seed must write another corpus"


def test_generators_of_other_names_are_other_generators():
    """`rng` and `torch_rng` depend on all their names and on nothing else: changing a loss never changes the data."""
    names = [("a", 1), ("a", 2), ("b", 1), ("a",), ("a1",), (1, "a")]
    plain, tensors = ([make(*n) for n in names] for make in (data.rng, data.torch_rng))
    numbers = [r.random() for r in plain] + [torch.rand(1, generator=g).item() for g in tensors]
    again = data.rng("a", 1).random(), torch.rand(1, generator=data.torch_rng("a", 1)).item()
    assert len(set(numbers)) == 12 and again == (numbers[0], numbers[6]), f"names and numbers do not go together: {numbers}"


def test_prompts_are_prefixes_of_two_to_eight_tokens():
    """Each prompt is the first n tokens of its own review, 2 <= n <= 8, all seven lengths occur, and the rest is filler."""
    texts = reviews(60, seed=6)
    ids, lengths = data.make_prompts(encoding(), texts, data.rng("prompts"))
    for text, row, n in zip(texts, ids.tolist(), lengths.tolist()):
        expected = encoding().encode(text)[:n] + [encoding().eot_token] * (8 - n)
        assert row == expected, f"{row} is not the first {n} tokens of {text!r}: {expected}"
    assert set(lengths.tolist()) == set(range(2, 9)), f"lengths must be 2 to 8, not {sorted(set(lengths.tolist()))}"


def test_the_true_reward_reads_prompt_and_response_and_no_filler():
    """r(x, y) = sentiment of prompt and response together, without end token and without what stands behind it."""
    end, texts, rows = encoding().eot_token, [], []
    for n, text in enumerate(reviews(10, seed=8)):
        tokens = encoding().encode(text)
        stop, behind = len(tokens) - 2 * n, encoding().encode(". The finale was superb.")
        texts.append(encoding().decode(tokens[:stop]))
        rows.append((tokens[:stop] + [end] * (n % 2), behind))
    ids, _ = data.pad([a + b for a, b in rows], end)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(a)] for a, _ in rows])
    mask[:, :5] = False
    agree(data.true_reward(encoding(), ids, mask), torch.tensor([data.sentiment(t) for t in texts]),
          "the true reward must read prompt and response, and nothing behind the response", tolerance=1e-6)


# ------------------------------------------------------------------------------------------------------- the preferences
def test_the_higher_reward_wins_and_ties_are_dropped_and_counted():
    """Deterministic labels: of all pairs of a prompt's completions the higher reward wins; an exact tie is no pair; a loop."""
    reward, slow, ties = torch.randint(0, 4, (7, 5), generator=generator(1)) / 3., [], 0
    for n, row in enumerate(reward.tolist()):
        for i in range(5):
            for j in range(i + 1, 5):
                ties += row[i] == row[j]
                slow += [] if row[i] == row[j] else [(5 * n + i, 5 * n + j) if row[i] > row[j] else (5 * n + j, 5 * n + i)]
    winner, loser, dropped = data.label_pairs(reward, "deterministic", .3, generator(2))
    assert dropped == ties > 0, f"{dropped} ties dropped, of {ties}"
    agree(torch.stack([winner, loser], 1), torch.tensor(slow),
          "the higher true reward must win: swapped, or rows of another prompt?")


def test_labels_follow_bradley_terry_at_their_temperature():
    """Eq. 1: y_1 beats y_2 in sigma((r_1 - r_2) / tau) of the pairs, within 4 standard deviations; a tie is a coin, none is
    dropped."""
    row, tau, count = [.2, .9, .2, .55], .45, 4000
    winner, loser, dropped = data.label_pairs(torch.tensor([row]).double().expand(count, 4), "bt", tau, generator(5))
    assert dropped == 0 and len(winner) == 6 * count, \
        f"{dropped} dropped, {len(winner)} pairs of {6 * count}: a tie is a coin here"
    for i, j in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        wins = ((winner % 4 == i) & (loser % 4 == j)).sum().item() / count
        p = sigma((row[i] - row[j]) / tau)
        assert abs(wins - p) < 4 * (p * (1 - p) / count) ** .5, \
            f"{row[i]} beats {row[j]} in {wins:.3f} of the pairs, not {p:.3f}: tau?"


def preferences(seed):
    """11 prompts with 4 completions each, some of them without a pair, as `Preferences`; lengths 2 to 9."""
    length = torch.randint(2, 10, (44, 1), generator=generator(seed))
    length[20:24] = 3
    columns, reward = torch.arange(13), torch.randint(0, 3, (11, 4), generator=generator(seed + 1)) / 2.
    reward[[2, 7]] = .5
    winner, loser, _ = data.label_pairs(reward, "deterministic", 1., generator(0))
    ids = torch.randint(0, 30, (44, 13), generator=generator(seed + 2))
    return data.Preferences(ids, (columns >= 3) & (columns < 3 + length), normal(44, seed=seed), winner, loser, 4)


def test_a_batch_of_prompts_holds_the_same_pairs():
    """App. B: pairs that index a batch's completions are the pairs of those prompts, with their tokens, masks and pi_ref; no
    other."""
    everything, prompts = preferences(seed=3), torch.tensor([8, 0, 2, 5])
    batch = data.prompt_batch(everything, prompts)
    width = batch.ids.shape[1]

    def rows(d, pair):
        return [d.ids[n, :width].where(d.mask[n, :width], -1).tolist() + [d.ref[n].item()] for n in pair]

    direct = [rows(everything, pair) for p in prompts for pair in zip(everything.winner, everything.loser) if pair[0] // 4 == p]
    batched = [rows(batch, pair) for pair in zip(batch.winner, batch.loser)]
    assert batched == direct, \
        f"{len(batched)} pairs in the batch, {len(direct)} by direct indexing, or others, or in another order"
    assert batch.mask.sum() == everything.mask.view(11, 4, 13)[prompts].sum(), "response tokens of the batch were cut off"


def test_an_epoch_holds_each_prompt_once():
    """Every prompt that has a pair stands in one batch, once; no batch is larger than asked; another generator, another order."""
    everything = preferences(seed=3)
    batches, other = (data.prompt_order(everything, 2, generator(s), window=2) for s in (1, 2))
    once = sorted(torch.cat(batches).tolist())
    assert once == sorted(set((everything.winner // 4).tolist())), f"an epoch must hold each prompt with pairs once, not {once}"
    assert max(map(len, batches)) == 2 and torch.cat(batches).tolist() != torch.cat(other).tolist(), \
        "batches of 2, in random order"


def test_prompts_of_like_length_go_together():
    """Within a window of batches prompts are sorted by their longest response, so that little filler is computed."""
    everything = preferences(seed=3)
    longest = everything.mask.sum(1).view(11, 4).amax(1)
    batches = data.prompt_order(everything, 2, generator(1), window=100)
    spans = sorted((int(longest[b].min()), int(longest[b].max())) for b in batches)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])), f"batches in one window must not overlap in length: {spans}"
