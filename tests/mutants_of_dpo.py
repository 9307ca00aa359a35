"""Planted bugs of DPO: the thirteen of public code and their kin, the appendix, the baselines.

mutants.py imports all bugs. score.py takes the first thirteen, which public code had.
"""
import torch

import dpo
from planting import plant


# -------------------------------------------------------------- the thirteen of public DPO code
@plant("labels are not shifted: the logits at t are read for the token at t",
       "model.token_logp",
       "probabilities_of_all_responses_sum_to_one",
       "token_logp_is_read_one_position_before_the_token",
       "every_implicit_reward_is_normalised",
       "sampled_responses_follow_the_enumerated_distribution")
def labels_not_shifted(original, logits, ids):
    return original(logits.roll(-1, 1), ids)


@plant("the mask counts padding",
       "model.response_mask",
       "probabilities_of_all_responses_sum_to_one",
       "response_mask_ends_with_the_first_end_token")
def mask_counts_padding(original, ids, lengths, max_tokens, end):
    return torch.arange(ids.shape[1]) >= lengths[:, None]


@plant("the mask counts the prompt",
       "model.response_mask",
       "probabilities_of_all_responses_sum_to_one",
       "a_roll_out_records_what_its_names_say")
def mask_counts_prompt(original, ids, lengths, max_tokens, end):
    is_prompt = torch.arange(ids.shape[1]) < lengths[:, None]
    return original(ids, lengths, max_tokens, end) | is_prompt


@plant("the mask drops the first response token",
       "model.response_mask",
       "probabilities_of_all_responses_sum_to_one")
def mask_drops_first_token(original, ids, lengths, max_tokens, end):
    is_later = torch.arange(ids.shape[1]) > lengths[:, None]
    return original(ids, lengths, max_tokens, end) & is_later


@plant("the mask drops the end token",
       "model.response_mask",
       "probabilities_of_all_responses_sum_to_one")
def mask_drops_end_token(original, ids, lengths, max_tokens, end):
    return original(ids, lengths, max_tokens, end) & (ids != end)


@plant("log pi(y|x) is a mean over tokens instead of a sum",
       "model.sequence_logp",
       "probabilities_of_all_responses_sum_to_one",
       "sequence_logp_is_the_sum_over_response_tokens_alone",
       "a_gpt_trained_on_equation_3_arrives_at_equation_4",
       "response_logp_sums_to_sequence_logp")
def mean_for_sum(original, logits, ids, mask):
    return original(logits, ids, mask) / mask.sum(1)


@plant("the softmax is over time instead of over the vocabulary",
       "model.log_softmax",
       "probabilities_of_all_responses_sum_to_one",
       "token_kl_sums_over_the_whole_vocabulary")
def softmax_over_time(original, logits):
    return torch.log_softmax(logits, -2)


@plant("the loss forgets the reference",
       "dpo.dpo_loss",
       "minimising_dpo_over_all_policies_gives_equation_4",
       "test_equivalent_rewards")
def reference_forgotten(original, pair, beta):
    return original(pair._replace(ref_w=0 * pair.ref_w, ref_l=0 * pair.ref_l), beta)


@plant("the reference has the wrong sign",
       "dpo.dpo_loss",
       "dpo_is_the_reward_model_loss_of_the_implicit_reward",
       "test_dpo_loss", "test_dpo_gradient")
def reference_sign_flipped(original, pair, beta):
    return original(pair._replace(ref_w=-pair.ref_w, ref_l=-pair.ref_l), beta)


@plant("chosen and rejected are swapped",
       "dpo.dpo_loss",
       "the_gradient_in_log_probabilities_is_the_slope_of_the_loss",
       "test_dpo_loss", "test_dpo_gradient",
       "with_deterministic_labels_the_loss_falls_for_ever_along_the_true_reward",
       "with_deterministic_labels_training_on_raises_the_margin_and_the_kl")
def chosen_and_rejected_swapped(original, pair, beta):
    swapped = dpo.Pair(pair.logp_l, pair.logp_w, pair.ref_l, pair.ref_w, pair.len_l, pair.len_w)
    return original(swapped, beta)


@plant("beta is outside the sigmoid",
       "dpo.dpo_loss",
       "minimising_dpo_over_all_policies_gives_equation_4",
       "test_dpo_loss", "test_dpo_gradient")
def beta_outside_the_sigmoid(original, pair, beta):
    return beta * original(pair, 1.)


@plant("sigma instead of log sigma",
       "dpo.dpo_loss",
       "dpo_loss_agrees_with_extended_precision",
       "section_4s_gradient_is_the_slope_of_the_loss_in_theta",
       "test_dpo_loss", "test_dpo_gradient")
def sigma_for_log_sigma(original, pair, beta):
    return -(-original(pair, beta)).exp()


@plant("the reference is not frozen",
       "model.map_batches",
       "the_reference_receives_no_gradient")
def reference_not_frozen(original, function, ids, mask, batch=64):
    with_gradients = original.__wrapped__    # without the decorator torch.no_grad()
    return with_gradients(function, ids, mask, batch)


# ------------------------------------------------------------------ more bugs of loss and gradient
@plant("log(sigmoid(u)) instead of logsigmoid(u): infinite where sigma underflows",
       "dpo.dpo_loss",
       "test_dpo_loss", "test_dpo_gradient")
def log_of_sigmoid(original, pair, beta):
    u = beta * (pair.logp_w - pair.ref_w - pair.logp_l + pair.ref_l)
    return -torch.log(torch.sigmoid(u))


@plant("DPO divides log-probabilities by lengths",
       "dpo.dpo_loss",
       "autograd_agrees_with_the_gradient_by_hand_and_gives_the_lengths_none",
       "test_dpo_loss", "test_dpo_gradient")
def loss_of_length_means(original, pair, beta):
    logp_w = pair.logp_w / pair.len_w
    logp_l = pair.logp_l / pair.len_l
    return original(pair._replace(logp_w=logp_w, logp_l=logp_l), beta)


@plant("the loss is already reduced over the batch",
       "dpo.dpo_loss",
       "losses_are_one_number_per_pair_and_keep_float64",
       "test_dpo_loss", "test_dpo_gradient")
def loss_reduced(original, pair, beta):
    return original(pair, beta).mean().expand(len(pair.logp_w))


@plant("the reference counts for the winner alone",
       "dpo.dpo_loss",
       "dpo_is_blind_to_a_shift_common_to_both_responses",
       "a_gpt_trained_with_dpo_on_all_pairs_arrives_at_equation_4")
def reference_of_the_winner_alone(original, pair, beta):
    return original(pair._replace(ref_l=0 * pair.ref_l), beta)


@plant("the weight of the gradient is sigma(rhat_w - rhat_l), large for pairs ranked right",
       "dpo.dpo_gradient",
       "the_gradient_is_weighed_by_how_wrongly_the_implicit_reward_ranks",
       "test_dpo_loss", "test_dpo_gradient")
def gradient_weight_of_the_right_order(original, pair, beta):
    gradient_w, gradient_l = original(pair, beta)
    return -beta - gradient_w, beta - gradient_l


@plant("the gradient lacks its factor beta",
       "dpo.dpo_gradient",
       "at_the_reference_the_loss_is_log_2_but_the_gradient_is_not_0",
       "test_dpo_loss", "test_dpo_gradient")
def gradient_without_beta(original, pair, beta):
    gradient_w, gradient_l = original(pair, beta)
    return gradient_w / beta, gradient_l / beta


@plant("the gradient in logits is at its token instead of one position before it",
       "dpo.dpo_gradient_logits",
       "the_gradient_in_logits_is_the_slope_of_the_loss",
       "test_dpo_loss", "test_dpo_gradient")
def logit_gradient_not_shifted(original, logits, ids, mask, coefficient):
    return original(logits, ids, mask, coefficient).roll(1, 1)


@plant("the gradient in logits is multiplied by the mask, and 0 x NaN is NaN",
       "dpo.dpo_gradient_logits",
       "masked_out_logits_and_ids_are_never_read")
def logit_gradient_reads_the_masked(original, logits, ids, mask, coefficient):
    return original(logits, ids, mask, coefficient) + 0 * logits


@plant("the implicit reward adds the reference instead of subtracting it",
       "dpo.implicit_reward",
       "implicit_reward_is_beta_times_the_log_ratio",
       "test_equivalent_rewards")
def implicit_reward_adds_the_reference(original, logp, ref, beta):
    return beta * (logp + ref)


@plant("the implicit reward lacks its factor beta",
       "dpo.implicit_reward",
       "the_reward_is_the_implicit_reward_of_its_optimum_plus_beta_log_z",
       "test_equivalent_rewards")
def implicit_reward_without_beta(original, logp, ref, beta):
    return logp - ref


# ------------------------------------------------------------------ the appendix, the baselines
@plant("a ranking is read worst first",
       "dpo.plackett_luce_loss",
       "plackett_luce_of_two_is_dpo",
       "test_rankings_and_baselines")
def ranking_worst_first(original, logp, ref, beta):
    return original(logp.flip(-1), ref.flip(-1), beta)


@plant("each choice of a ranking is among all responses instead of among those that remain",
       "dpo.plackett_luce_loss",
       "the_probabilities_of_all_rankings_sum_to_1",
       "minimising_plackett_luce_over_all_policies_gives_equation_4",
       "test_rankings_and_baselines",
       "test_equivalent_rewards")
def ranking_with_replacement(original, logp, ref, beta):
    rhat = beta * (logp - ref)
    return (torch.logsumexp(rhat, -1, keepdim=True) - rhat)[..., :-1].sum(-1)


@plant("the best response of a ranking counts twice, so adding f(x) to r changes the loss",
       "dpo.plackett_luce_loss",
       "test_equivalent_rewards")
def ranking_counts_the_best_twice(original, logp, ref, beta):
    return original(logp, ref, beta) - beta * (logp - ref)[..., 0]


@plant("a ranking takes exponentials before the logarithm, which overflow",
       "dpo.plackett_luce_loss",
       "plackett_luce_is_right_at_enormous_log_ratios_in_float32")
def ranking_overflows(original, logp, ref, beta):
    exponentials = (beta * (logp - ref)).exp()
    remaining = exponentials.flip(-1).cumsum(-1).flip(-1)
    return -(exponentials / remaining).log().sum(-1)


@plant("pairs by index take winners for losers",
       "dpo.make_pairs",
       "six_pairs_by_index_equal_twelve_separate_forwards",
       "test_rankings_and_baselines")
def index_pairs_swapped(original, logp, ref, length, winner, loser):
    return original(logp, ref, length, loser, winner)


@plant("the constant weight is 1 instead of 1/2, the weight at the start of DPO",
       "dpo.constant_weight_loss",
       "with_constant_weight_every_pair_is_pushed_as_dpo_pushes_at_the_reference")
def constant_weight_of_one(original, pair, beta):
    return 2 * original(pair, beta)


@plant("unlikelihood raises log pi(y_l) instead of lowering it",
       "dpo.unlikelihood_loss",
       "unlikelihood_raises_the_winner_and_lowers_the_loser_at_constant_rates",
       "test_rankings_and_baselines")
def unlikelihood_sign(original, pair, alpha):
    return original(pair, -alpha)


@plant("Preferred-FT learns the loser",
       "dpo.preferred_ft_loss",
       "preferred_ft_sees_the_winner_alone",
       "test_rankings_and_baselines")
def preferred_ft_on_the_loser(original, pair, beta):
    return -pair.logp_l
