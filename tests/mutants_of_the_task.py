"""Planted bugs of the task: the true reward, reviews, prompts, preferences. See mutants.py."""
import math
import random
import re
from unittest import mock

import torch

import data
from planting import plant


# ------------------------------------------------------------------------------- the true reward
@plant("negation is not read",
       "data.NEGATION",
       "an_opinion_is_the_adjective_scaled_by_intensifier_and_negation",
       "test_true_reward",
       "test_preferences")
def negation_ignored(original):
    return 1.


@plant("intensifiers have the inverse effect",
       "data.INTENSIFIERS",
       "not_superb_is_weaker_than_awful_and_utterly_is_stronger_than_slightly")
def intensifiers_inverted(original):
    return {word: 1 / factor for word, factor in original.items()}


@plant("a clause after \"but\" has no more weight than others",
       "data.CONTRAST",
       "a_clause_after_but_weighs_half_as_much_again")
def contrast_ignored(original):
    return 1.


@plant("a clause may have any words after it, so spam is rewarded",
       "data.CLAUSE",
       "spam_earns_nothing")
def clause_matched_loosely(original):
    return {domain: re.compile(pattern.pattern + ".*") for domain, pattern in original.items()}


@plant("each mention of an aspect counts",
       "data.parse_opinions",
       "spam_earns_nothing")
def repetition_counts(original, text):
    opening, colon, rest = text.rpartition(": ")
    opinions = []
    for clause in re.split("[.,] ?", rest):
        opinions += original(opening + colon + clause)
    return opinions


@plant("opinions of the other domain count",
       "data.domains_of",
       "only_opinions_of_the_domain_of_the_opening_count",
       "test_true_reward")
def domain_ignored(original, text):
    return list(data.SUBJECTS)


@plant("an opening tells its domain only if its subject is one word",
       "data.OPENING",
       "every_opening_of_a_domain_tells_its_domain")
def opening_of_one_word(original):
    patterns = {}
    for domain, subjects in data.SUBJECTS.items():
        words = [subject for subject in subjects if " " not in subject]
        patterns[domain] = re.compile(f"{data.one_of(data.DETERMINERS)} {data.one_of(words)}:")
    return patterns


@plant("an adjective is read whatever its domain",
       "data.parse_opinions",
       "an_adjective_of_the_other_domain_earns_nothing")
def adjectives_of_both_domains(original, text):
    adjectives = {word: x for words in data.ADJECTIVES.values() for word, x in words.items()}
    clauses = {}
    for domain, pattern in data.CLAUSE.items():
        one_domain = data.one_of(data.ADJECTIVES[domain])
        both_domains = pattern.pattern.replace(one_domain, data.one_of(adjectives))
        clauses[domain] = re.compile(both_domains)
    every_domain = dict.fromkeys(data.ADJECTIVES, adjectives)
    with mock.patch.multiple(data, CLAUSE=clauses, ADJECTIVES=every_domain):
        return original(text)


@plant("the first opinion does not count, so that the prompt hardly changes the reward",
       "data.sentiment",
       "the_beginning_of_a_review_decides_a_part_of_its_reward",
       "spam_earns_nothing")
def first_opinion_ignored(original, text):
    opinions = data.parse_opinions(text)
    with mock.patch("data.parse_opinions", return_value=opinions[1:]):
        return original(text)


@plant("a text without an opinion has reward 0",
       "data.sentiment",
       "a_text_without_an_opinion_scores_one_half")
def no_opinion_scores_zero(original, text):
    return original(text) if data.parse_opinions(text) else 0.


@plant("a text that is cut off has a lower reward",
       "data.sentiment",
       "being_cut_off_costs_nothing")
def truncation_punished(original, text):
    is_complete = text.endswith(".") or not data.parse_opinions(text)
    return original(text) if is_complete else .9 * original(text)


@plant("the reward is a log-odds instead of a probability",
       "data.sentiment",
       "any_string_has_a_reward_in_the_unit_interval")
def reward_in_log_odds(original, text):
    probability = original(text)
    return math.log(probability / (1 - probability))


# ------------------------------------------------------------------------------------ the grammar
@plant("the mood of a review does not reach its opinions",
       "data.write_opinion",
       "reviews_have_the_frequencies_of_the_grammar")
def mood_forgotten(original, domain, aspect, positive, rng):
    return original(domain, aspect, rng.random() < .5, rng)


@plant("a word is stronger than all others",
       "data.ADJECTIVES",
       "the_lexicon_is_balanced")
def unbalanced_lexicon(original):
    return {**original, "film": {**original["film"], "brilliant": 4}}


# --------------------------------------------------------------- reviews, the tokenizer, prompts
@plant("sentences begin with a small letter",
       "data.write_review",
       "every_written_review_is_grammatical")
def small_letters(original, rng, domain="film"):
    return original(rng, domain).replace(". The", ". the")


@plant("restaurants are reviewed in the adjectives of films, which the reward does not read there",
       "data.write_opinion",
       "restaurants_have_words_that_no_film_review_contains",
       "every_written_review_is_grammatical")
def adjectives_of_films_alone(original, domain, *arguments):
    return original("film", *arguments)


@plant("all openings have the same determiner, so many prompts are equal",
       "data.DETERMINERS",
       "openings_are_many_and_none_fills_a_prompt")
def one_determiner(original):
    return original[:1]


@plant("a review may have any words after it",
       "data.REVIEW",
       "broken_reviews_are_not_grammatical")
def review_matched_loosely(original):
    return {domain: re.compile(pattern.pattern + ".*") for domain, pattern in original.items()}


@plant("the tokenizer loses spaces",
       "data.PATTERN",
       "decoding_undoes_encoding")
def spaces_lost(original):
    return r"\p{L}+|[^\s\p{L}]+"


@plant("test reviews are train reviews",
       "data.write_corpus",
       "splits_are_disjoint")
def splits_overlap(original, *arguments, **options):
    splits = original(*arguments, **options)
    return {**splits, "test": splits["train"][:len(splits["test"])]}


@plant("the corpus depends on the global random state",
       "data.write_corpus",
       "a_corpus_depends_on_its_seed_alone")
def corpus_of_global_state(original, count, seed, domain="film"):
    return original(count, seed + random.random(), domain)


@plant("a generator depends on the first of its names alone",
       "data.named_rng",
       "generators_of_other_names_are_other_generators",
       "pi_ref_is_trained_on_every_review_once_an_epoch_in_an_order_of_its_own")
def generator_of_one_name(original, *names):
    return original(names[0])


@plant("prompts have 3 to 9 tokens",
       "data.make_prompts",
       "prompts_are_prefixes_of_two_to_eight_tokens")
def prompts_too_long(original, *arguments):
    ids, lengths = original(*arguments)
    return ids, lengths + 1


@plant("prompts have at most 5 tokens, so few reach into the first opinion",
       "data.MAX_PROMPT_TOKENS",
       "more_than_half_of_the_prompts_reach_into_the_first_opinion",
       "prompts_are_prefixes_of_two_to_eight_tokens")
def prompts_too_short(original):
    return 5


@plant("the true reward reads the filler after the response",
       "data.decode",
       "the_true_reward_reads_prompt_and_response_and_no_filler")
def decode_reads_filler(original, encoding, ids, mask):
    return original(encoding, ids, torch.ones_like(mask))


# ------------------------------------------------------------------------------------ the labels
@plant("Bradley-Terry swaps its rewards",
       "data.bradley_terry",
       "bradley_terry_is_the_winners_share_of_exponentiated_reward",
       "minimising_equation_2_recovers_reward_over_tau_up_to_a_constant")
def bradley_terry_swapped(original, r_1, r_2):
    return original(r_2, r_1)


@plant("Bradley-Terry takes the ratio of rewards, so adding f(x) to r changes it",
       "data.bradley_terry",
       "rewards_that_differ_by_a_function_of_the_prompt_give_the_same_preferences")
def bradley_terry_of_ratios(original, r_1, r_2):
    return original(r_1 / r_2, torch.ones_like(r_2))


@plant("labels swap winner and loser",
       "data.label_pairs",
       "the_higher_reward_wins_and_ties_are_dropped",
       "labels_follow_bradley_terry_at_their_temperature",
       "the_labels_of_a_prompt_compare_its_completions_by_the_true_reward")
def labels_swapped(original, *arguments):
    winner, loser = original(*arguments)
    return loser, winner


@plant("ties are kept, and the earlier response wins",
       "data.label_pairs",
       "the_higher_reward_wins_and_ties_are_dropped",
       "completions_that_all_tie_are_no_preferences")
def ties_kept(original, reward, *arguments):
    tie_breaker = 1e-9 * torch.arange(reward.shape[1])
    return original(reward.double() - tie_breaker, *arguments)


@plant("labels forget tau",
       "data.label_pairs",
       "labels_drawn_by_the_code_follow_bradley_terry_at_reward_over_tau",
       "labels_are_drawn_at_the_temperature_of_the_configuration")
def tau_forgotten(original, reward, mode, tau, generator):
    return original(reward, mode, 1., generator)


@plant("deterministic labels are sampled",
       "data.label_pairs",
       "with_deterministic_labels_beta_no_longer_selects_the_optimum")
def labels_never_deterministic(original, reward, mode, tau, generator):
    return original(reward, "bt", tau, generator)


# ----------------------------------------------------------------------------------- the batches
@plant("a batch has log pi_ref of other rows than its tokens",
       "data.select_prompts",
       "a_batch_of_prompts_holds_the_same_pairs")
def batch_of_other_references(original, preferences, numbers):
    batch = original(preferences, numbers)
    return batch._replace(ref_logp=preferences.ref_logp[:len(batch.ref_logp)])


@plant("an epoch leaves out its last batch",
       "data.shuffled_batches",
       "an_epoch_holds_each_prompt_once")
def epoch_cut_short(original, *arguments, **options):
    return original(*arguments, **options)[:-1]


@plant("batches mix lengths",
       "data.shuffled_batches",
       "prompts_of_like_length_go_together")
def lengths_mixed(original, preferences, batch, generator, window=8):
    return original(preferences, batch, generator, 1)


@plant("without pairs there is still a step",
       "data.shuffled_batches",
       "a_round_of_ties_has_no_step_and_a_run_of_ties_says_so")
def step_without_pairs(original, preferences, batch, generator, window=8):
    return original(preferences, batch, generator, window) or [torch.zeros(0, dtype=torch.long)]
