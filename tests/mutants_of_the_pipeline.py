"""Planted bugs of the model and its sampler, of the task and its labels, of the reward model and of PPO. See mutants.py."""
import math
import random
import re

import torch
import torch.nn.functional as F

import data
import model
import ppo
from mutants import plant


# --------------------------------------------------------------------------------------------------------------- the model
@plant("attention sees later tokens", "model.later",
       "later_tokens_change_nothing_earlier padding_changes_nothing sampled_responses_follow_the_enumerated_distribution")
def attention_not_causal(original, x, start):
    return original(x, start).clamp(min=0)


@plant("keys and queries know no positions", "model.rotate", "attention_sees_distances_not_positions")
def not_rotated(original, x, rotation):
    return x


@plant("rows of a batch see each other", "model.GPT.forward",
       "a_batch_of_one_equals_a_batch_of_many scoring_in_batches_is_scoring_at_once")
def batch_leaks(original, self, ids):
    logits = original(self, ids)
    return logits + .01 * logits.mean(0)


@plant("masked log-probabilities are multiplied by 0: NaN stays NaN", "model.sequence_logp", "masked_entries_are_never_read")
def masked_multiplied(original, logits, ids, mask):
    return (model.token_logp(logits, ids.clamp(min=0)) * mask[:, 1:]).sum(1)


@plant("half precision goes into the log-softmax", "model.log_softmax", "half_precision_is_promoted_before_the_softmax")
def half_precision_kept(original, logits):
    return torch.log_softmax(logits, -1)


@plant("float64 is narrowed to float32", "model.log_softmax", "float64_stays_float64")
def float64_narrowed(original, logits):
    return torch.log_softmax(logits.float(), -1)


@plant("response_logp puts each token's log-probability one place early", "model.response_logp",
       "response_logp_stands_where_its_token_stands")
def response_logp_shifted(original, *arguments):
    return original(*arguments).roll(-1, 1)


@plant("response_logp is a mean over the response", "model.response_logp", "response_logp_sums_to_sequence_logp")
def response_logp_mean(original, gpt, ids, mask):
    return original(gpt, ids, mask) / mask.sum(1, keepdim=True)


@plant("the KL is KL(pi_ref || pi)", "model.token_kl", "mean_of_sequence_kl_is_the_kl token_kl_sums_over_the_whole_vocabulary")
def kl_reversed(original, logits, ref_logits):
    return original(ref_logits, logits)


@plant("log pi is taken for log pi_ref where policies are scored", "model.token_logp", "mean_of_the_sampled_log_ratio_is_the_kl")
def log_probability_negated(original, logits, ids):
    return -original(logits, ids)


@plant("the sequence KL is read at the tokens, not before them", "model.sequence_kl", "mean_of_sequence_kl_is_the_kl "
       "sequence_kl_ignores_what_is_masked response_kl_is_the_sequence_kl")
def sequence_kl_shifted(original, logits, ref_logits, mask):
    return original(logits, ref_logits, mask.roll(1, 1))


@plant("the learning rate has no warm-up", "model.schedule", "the_learning_rate_warms_up_and_comes_down")
def no_warm_up(original, optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / steps)


@plant("fine-tuning learns filler", "model.fit", "fine_tuning_learns_the_texts_and_no_filler")
def fit_learns_filler(original, gpt, ids, lengths, order, lr):
    return original(gpt, ids, torch.full_like(lengths, ids.shape[1]), order, lr)


# ------------------------------------------------------------------------------------------------------------- the sampler
@plant("the cache is off by one position", "model.GPT.hidden", "hidden_states_in_pieces_are_those_of_the_whole cached_sampling_equals_uncached_sampling")
def cache_off_by_one(original, self, ids, caches=None, start=0):
    return original(self, ids, caches, max(start - 1, 0))


@plant("the temperature is ignored", "model.draw", "temperature_divides_the_logits cached_sampling_equals_uncached_sampling")
def temperature_ignored(original, logits, temperature, u):
    return original(logits, min(temperature, 1) and 1., u)


@plant("the temperature multiplies the logits", "model.draw", "temperature_divides_the_logits")
def temperature_inverted(original, logits, temperature, u):
    return original(logits, temperature and 1 / temperature, u)


@plant("temperature 0 samples", "model.draw", "temperature_zero_is_argmax")
def temperature_zero_samples(original, logits, temperature, u):
    return original(logits, temperature or 1., u)


@plant("the end token does not stop a response", "model.sample", "a_row_is_its_prompt_then_its_response_then_end")
def end_does_not_stop(original, gpt, prompts, lengths, max_tokens, end, *arguments, **options):
    ids = original(gpt, prompts, lengths, max_tokens, -1, *arguments, **options)
    return ids.where(ids >= 0, end)


@plant("responses are one token too long", "model.sample", "a_row_is_its_prompt_then_its_response_then_end")
def response_too_long(original, gpt, prompts, lengths, max_tokens, *arguments, **options):
    return original(gpt, prompts, lengths, max_tokens + 1, *arguments, **options)


@plant("responses to one prompt do not stand together", "model.respond", "responses_to_a_prompt_stand_together")
def respond_interleaved(original, gpt, prompts, count, *arguments, **options):
    rows = original(gpt, prompts, count, *arguments, **options)
    return tuple(x.unflatten(0, (-1, count)).transpose(0, 1).flatten(0, 1) for x in rows)


@plant("a batch is cut one column short", "model.score_batches", "scoring_in_batches_is_scoring_at_once")
def batch_cut_short(original, function, ids, mask, batch=512):
    return original(lambda a, b: function(a[:, :-1], b[:, :-1]), ids, mask, batch)


# ---------------------------------------------------------------------------------------------------------------- the task
@plant("negation is not read", "data.NEGATION", "an_opinion_is_the_adjective_scaled_by_intensifier_and_negation test_data")
def negation_ignored(original):
    return 1.


@plant("intensifiers weaken what they should strengthen", "data.INTENSIFIERS",
       "not_superb_is_weaker_than_awful_and_utterly_is_stronger_than_slightly")
def intensifiers_inverted(original):
    return {word: 1 / factor for word, factor in original.items()}


@plant("a clause after \"but\" weighs no more", "data.CONTRAST", "a_clause_after_but_weighs_half_as_much_again")
def contrast_ignored(original):
    return 1.


@plant("what follows a clause is not read: spam is paid for", "data.CLAUSE", "spam_earns_nothing")
def clause_matched_loosely(original):
    return re.compile(original.pattern + ".*")


@plant("each mention of an aspect counts", "data.opinions", "spam_earns_nothing")
def repetition_counts(original, text):
    return [clause for part in re.split(r"(?<=[.,]) ?", text) for clause in original(part.rstrip(".,"))]


@plant("a text without an opinion scores 0", "data.sentiment", "a_text_without_an_opinion_scores_one_half")
def no_opinion_scores_zero(original, text):
    return original(text) if data.opinions(text) else 0.


@plant("a text that is cut off is punished", "data.sentiment", "being_cut_off_costs_nothing")
def truncation_punished(original, text):
    return original(text) * (1. if text.endswith(".") or not data.opinions(text) else .9)


@plant("the reward is a log-odds, not a probability", "data.sentiment", "any_string_has_a_reward_in_the_unit_interval")
def reward_in_log_odds(original, text):
    return math.log(original(text) / (1 - original(text)))


@plant("sentences begin with a small letter", "data.write_review", "every_written_review_is_grammatical")
def small_letters(original, r, domain="film"):
    return original(r, domain).replace(". The", ". the")


@plant("a review need only begin well", "data.REVIEW", "broken_reviews_are_not_grammatical")
def review_matched_loosely(original):
    return re.compile(original.pattern + ".*")


@plant("the tokenizer loses spaces", "data.PATTERN", "decoding_undoes_encoding")
def spaces_lost(original):
    return r"\p{L}+|[^\s\p{L}]+"


@plant("test reviews are training reviews", "data.write_corpus", "splits_are_disjoint")
def splits_overlap(original, *arguments):
    splits = original(*arguments)
    return splits | {"test": splits["train"][:len(splits["test"])]}


@plant("the corpus depends on the global random state", "data.write_corpus", "a_corpus_depends_on_its_seed_alone")
def corpus_of_global_state(original, count, seed, domain="film"):
    return original(count, seed + random.random(), domain)


@plant("a generator depends on the first of its names alone", "data.rng", "generators_of_other_names_are_other_generators")
def generator_of_one_name(original, *names):
    return original(names[0])


@plant("prompts have 3 to 9 tokens", "data.make_prompts", "prompts_are_prefixes_of_two_to_eight_tokens")
def prompts_too_long(original, *arguments):
    ids, lengths = original(*arguments)
    return ids, lengths + 1


@plant("the true reward reads what stands behind the response", "data.decode",
       "the_true_reward_reads_prompt_and_response_and_no_filler")
def decode_reads_filler(original, encoding, ids, mask):
    return original(encoding, ids, torch.ones_like(mask))


# -------------------------------------------------------------------------------------------------------------- the labels
@plant("Bradley-Terry's rewards are swapped", "data.bradley_terry", "bradley_terry_is_the_winners_share_of_exponentiated_reward "
       "minimising_equation_2_recovers_reward_over_tau_up_to_a_constant")
def bradley_terry_swapped(original, r_1, r_2):
    return original(r_2, r_1)


@plant("Bradley-Terry is a ratio of rewards, and r + f(x) matters", "data.bradley_terry",
       "rewards_that_differ_by_a_function_of_the_prompt_give_the_same_preferences")
def bradley_terry_of_ratios(original, r_1, r_2):
    return original(r_1 / r_2, torch.ones_like(r_2))


@plant("the label swaps winner and loser", "data.label_pairs", "the_higher_reward_wins_and_ties_are_dropped_and_counted "
       "labels_follow_bradley_terry_at_their_temperature with_deterministic_labels_training_on_raises_the_margin_and_the_kl")
def labels_swapped(original, *arguments):
    winner, loser, ties = original(*arguments)
    return loser, winner, ties


@plant("ties are kept, and the first wins", "data.label_pairs", "the_higher_reward_wins_and_ties_are_dropped_and_counted")
def ties_kept(original, reward, *arguments):
    return original(reward.double() - 1e-9 * torch.arange(reward.shape[1]), *arguments)


@plant("tau is forgotten in the labels", "data.label_pairs", "labels_drawn_by_the_code_follow_bradley_terry_at_reward_over_tau")
def tau_forgotten(original, reward, mode, tau, generator):
    return original(reward, mode, 1., generator)


@plant("deterministic labels are drawn", "data.label_pairs", "with_deterministic_labels_beta_no_longer_selects_the_optimum")
def labels_never_deterministic(original, reward, mode, tau, generator):
    return original(reward, "bt", tau, generator)


@plant("a batch takes pi_ref from other rows than its tokens", "data.prompt_batch", "a_batch_of_prompts_holds_the_same_pairs")
def batch_of_other_references(original, everything, prompts):
    batch = original(everything, prompts)
    return batch._replace(ref=everything.ref[:len(batch.ref)])


@plant("an epoch leaves out its last batch", "data.prompt_order", "an_epoch_holds_each_prompt_once")
def epoch_cut_short(original, *arguments, **options):
    return original(*arguments, **options)[:-1]


@plant("batches mix lengths", "data.prompt_order", "prompts_of_like_length_go_together")
def lengths_mixed(original, everything, batch, generator, window=8):
    return original(everything, batch, generator, 1)


# -------------------------------------------------------------------------------------------------------- the reward model
@plant("the reward model learns the loser", "ppo.reward_model_loss",
       "reward_model_loss_is_the_negative_log_of_equation_1 reward_model_gradient_is_the_probability_of_the_wrong_order")
def reward_pair_swapped(original, r_w, r_l):
    return original(r_l, r_w)


@plant("the reward is read at the last column", "ppo.last_token", "the_reward_is_read_at_the_last_response_token "
       "filler_does_not_change_the_reward the_score_is_paid_on_the_last_real_token")
def last_column(original, mask):
    return torch.full((len(mask),), mask.shape[1] - 1)


@plant("the critic shares its weights with the reference", "ppo.ScalarModel.__init__", "a_scalar_model_has_weights_of_its_own")
def critic_shares_weights(original, self, gpt):
    original(self, gpt)
    self.gpt = gpt


@plant("values and rewards do not start at 0", "ppo.ScalarModel.__init__", "a_scalar_model_starts_at_zero")
def head_starts_anywhere(original, self, gpt):
    original(self, gpt)
    torch.nn.init.normal_(self.head.weight)


@plant("the best epoch is remembered without a copy, so that the last is kept", "ppo.state_of",
       "the_reward_model_learns_the_preferences_and_keeps_its_best_epoch")
def last_epoch_kept(original, model):
    return model.state_dict()


# --------------------------------------------------------------------------------------------------------------------- PPO
@plant("the score is paid on a padding token", "ppo.token_rewards",
       "the_score_is_paid_on_the_last_real_token clipped_ppo_arrives_at_the_optimum")
def score_on_padding(original, score, logp, ref_logp, mask, coefficient):
    rewards = original(0 * score, logp, ref_logp, mask, coefficient)
    rewards[:, -1] += score
    return rewards


@plant("the penalty rewards KL", "ppo.token_rewards", "the_mean_penalty_is_the_kl each_token_pays_for_its_own_log_ratio "
       "at_the_optimum_every_advantage_is_zero token_rewards_sum_to_score_minus_the_price_of_the_log_ratio")
def penalty_rewards_kl(original, score, logp, ref_logp, mask, coefficient):
    return original(score, logp, ref_logp, mask, -coefficient)


@plant("a value is read at its token, which it then knows", "ppo.states_of", "the_value_of_a_token_is_read_before_it")
def value_at_the_token(original, critic, ids):
    return critic.gpt.hidden(ids)


@plant("values are fitted to the score of another row", "ppo.score_batches", "fitted_values_are_expected_scores")
def value_of_another(original, function, ids, mask, batch=512):
    return original(function, ids, mask, batch).roll(len(ids) // 2, 0)


@plant("the network under the critic learns on", "ppo.update", "updates_move_the_policy_and_the_critics_head_and_nothing_else")
def critic_learns_on(original, policy, critic, optimizer, batch, *rest):
    critic.gpt.requires_grad_(True)
    return original(policy, critic, optimizer, batch._replace(state=ppo.states_of(critic, batch.ids)), *rest)


@plant("gae uses the value past the end", "ppo.gae", "the_value_after_the_last_token_is_zero gae_is_the_discounted_sum_of_errors")
def value_past_the_end(original, rewards, values, mask, gamma, lam):
    next_value = F.pad(values[:, 1:], (0, 1))
    ends = torch.arange(mask.shape[1]) == ppo.last_token(mask)[:, None]
    return original(rewards + gamma * next_value * ends, values, mask, gamma, lam)


@plant("gae forgets lambda", "ppo.gae", "gae_is_the_discounted_sum_of_errors")
def lambda_forgotten(original, rewards, values, mask, gamma, lam):
    return original(rewards, values, mask, gamma, 1.)


@plant("gae swaps gamma and lambda", "ppo.gae", "with_lambda_one_the_advantage_is_return_minus_value")
def gamma_and_lambda_swapped(original, rewards, values, mask, gamma, lam):
    return original(rewards, values, mask, lam, gamma)


@plant("returns are made from whitened advantages", "ppo.gae", "returns_are_advantages_plus_values")
def returns_of_whitened(original, rewards, values, mask, gamma, lam):
    advantages, _ = original(rewards, values, mask, gamma, lam)
    return advantages, (ppo.whiten(advantages, mask) + values).masked_fill(~mask, 0.)


@plant("whitening counts padding", "ppo.whiten", "whitening_counts_real_tokens_alone the_first_loss_of_an_update_is_the_critics")
def whitening_counts_padding(original, x, mask):
    x = x.masked_fill(~mask, 0.)
    return ((x - x.mean()) / x.std(correction=0)).masked_fill(~mask, 0.)


@plant("the ratio is upside down", "ppo.policy_loss", "policy_loss_is_the_pessimistic_bound")
def ratio_inverted(original, logp, old_logp, advantage, clip=.2):
    return original(old_logp, logp, advantage, clip)


@plant("the sign of the advantage is flipped", "ppo.policy_loss", "the_policy_gradient_raises_good_tokens_until_the_clip "
       "ppo_raises_the_objective clipped_ppo_arrives_at_the_optimum ppo_on_a_fitted_reward_arrives_at_the_optimum_of_r_over_tau")
def advantage_sign(original, logp, old_logp, advantage, clip=.2):
    return original(logp, old_logp, -advantage, clip)


@plant("nothing is clipped", "ppo.policy_loss", "the_policy_gradient_raises_good_tokens_until_the_clip")
def clip_missing(original, logp, old_logp, advantage, clip=.2):
    return original(logp, old_logp, advantage, 1e9)


@plant("the smaller value error counts, not the larger", "ppo.value_loss", "value_loss_is_the_worse_of_plain_and_clipped "
       "the_value_gradient_points_at_the_return")
def value_error_optimistic(original, value, old_value, returns, clip=.2):
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return .5 * torch.min((value - returns) ** 2, (clipped - returns) ** 2)


@plant("the controller makes KL cheaper above its target", "ppo.adapt", "the_controller_converges_to_its_target "
       "the_price_of_kl_moves_by_a_clipped_proportion ppo_starts_at_the_reference_and_prices_kl_by_its_controller")
def controller_direction(original, coefficient, kl, target, episodes, horizon):
    return 2 * coefficient - original(coefficient, kl, target, episodes, horizon)


@plant("the roll-out records pi for pi_ref", "ppo.roll_out", "a_roll_out_records_what_its_names_say")
def roll_out_without_reference(original, *arguments):
    batch = original(*arguments)
    return batch._replace(ref_logp=batch.logp)


@plant("the roll-out keeps gradients", "ppo.roll_out", "a_roll_out_is_a_constant")
def roll_out_with_gradients(original, *arguments):
    return original.__wrapped__(*arguments)


@plant("pi_old is taken to be pi_ref", "ppo.roll_out", "the_ratio_is_one_on_the_first_minibatch")
def old_policy_is_the_reference(original, *arguments):
    batch = original(*arguments)
    return batch._replace(logp=batch.ref_logp)
