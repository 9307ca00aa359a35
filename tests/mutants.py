"""Planted bugs: each changes one name of the code, and some theorem must fail on it. No mutant survives. Here those of DPO and of
the optimum; mutants_of_the_pipeline.py has those of the model, the task, the reward model and PPO.

A mutant is a function that takes the original and its arguments and does what the bug would do (for a constant: takes the
original and returns another). To plant one of your own, write five lines here:

    @plant("what is wrong", "module.name", "the_theorem_that_should_fail or_a_whole_test_module")
    def name(original, *arguments): ...
"""
import contextlib
import functools
import math
import sys
from typing import Callable, NamedTuple

import torch

import data
import dpo
import model
import ppo

CORE = {"data": data, "model": model, "dpo": dpo, "ppo": ppo}


class Mutant(NamedTuple):
    name: str
    bug: str            # what is wrong, in words
    target: str         # the name that is replaced
    theorems: str       # test functions (without `test_`) and test modules that are run against it
    body: Callable


MUTANTS = []


def plant(bug, target, theorems):
    return lambda body: MUTANTS.append(Mutant(body.__name__, bug, target, theorems, body)) or body


def fails(theorem):
    """Whether a theorem raises: a bug may make it false, or make it crash."""
    try:
        theorem()
    except KeyboardInterrupt:
        raise
    except BaseException as error:    # pytest's own are no Exceptions
        return type(error).__name__ != "Skipped"
    return False


@contextlib.contextmanager
def planted(mutant):
    """The code with the bug in it; `from model import sample` made second names, which are replaced too."""
    *path, name = mutant.target.split(".")
    owner = functools.reduce(getattr, path[1:], CORE[path[0]])
    original = getattr(owner, name)
    bug = (lambda *args, **kwargs: mutant.body(original, *args, **kwargs)) if callable(original) else mutant.body(original)
    others = [*CORE.values(), *(module for n, module in list(sys.modules.items()) if n == "train" or n.startswith("plots."))]
    places = [owner] + [m for m in others if m is not owner and getattr(m, name, None) is original]
    for place in places:
        setattr(place, name, bug)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, original)


# ------------------------------------------------------------------------- the thirteen of public DPO code (and their kin)
SUM_TO_ONE = "probabilities_of_all_responses_sum_to_one "


@plant("labels are not shifted: the logits at t are read for the token at t",
       "model.token_logp", SUM_TO_ONE + "token_logp_is_read_one_position_before_the_token "
       "every_implicit_reward_is_normalised sampled_responses_follow_the_enumerated_distribution")
def labels_not_shifted(original, logits, ids):
    return original(logits.roll(-1, 1), ids)


@plant("the mask counts padding", "model.response_mask", SUM_TO_ONE + "response_mask_ends_with_the_first_end_token")
def mask_counts_padding(original, ids, lengths, max_tokens, end):
    return torch.arange(ids.shape[1]) >= lengths[:, None]


@plant("the mask counts the prompt", "model.response_mask", SUM_TO_ONE + "a_roll_out_records_what_its_names_say")
def mask_counts_prompt(original, ids, lengths, max_tokens, end):
    return original(ids, lengths, max_tokens, end) | (torch.arange(ids.shape[1]) < lengths[:, None])


@plant("the mask drops the first response token", "model.response_mask", SUM_TO_ONE)
def mask_drops_first_token(original, ids, lengths, max_tokens, end):
    return original(ids, lengths, max_tokens, end) & (torch.arange(ids.shape[1]) > lengths[:, None])


@plant("the mask drops the end token", "model.response_mask", SUM_TO_ONE)
def mask_drops_end_token(original, ids, lengths, max_tokens, end):
    return original(ids, lengths, max_tokens, end) & (ids != end)


@plant("log pi(y|x) is a mean over tokens, not a sum",
       "model.sequence_logp", SUM_TO_ONE + "sequence_logp_is_the_sum_over_response_tokens_alone "
       "a_gpt_trained_on_equation_3_arrives_at_equation_4 "
       "six_pairs_by_index_have_the_gradient_of_twelve_separate_forwards response_logp_sums_to_sequence_logp")
def mean_for_sum(original, logits, ids, mask):
    return original(logits, ids, mask) / mask.sum(1)


@plant("the softmax is over time, not over the vocabulary",
       "model.log_softmax", SUM_TO_ONE + "token_kl_sums_over_the_whole_vocabulary")
def softmax_over_time(original, logits):
    return torch.log_softmax(logits, -2)


@plant("the reference is forgotten", "dpo.dpo_loss", "minimising_dpo_over_all_policies_gives_equation_4 test_section5")
def reference_forgotten(original, pair, beta):
    return original(pair._replace(ref_w=0 * pair.ref_w, ref_l=0 * pair.ref_l), beta)


@plant("the sign of the reference is flipped", "dpo.dpo_loss",
       "dpo_is_the_reward_model_loss_of_the_implicit_reward test_section4")
def reference_sign_flipped(original, pair, beta):
    return original(pair._replace(ref_w=-pair.ref_w, ref_l=-pair.ref_l), beta)


@plant("chosen and rejected are swapped", "dpo.dpo_loss",
       "the_gradient_in_log_probabilities_is_the_slope_of_the_loss test_section4 "
       "with_deterministic_labels_the_loss_falls_for_ever_along_the_true_reward "
       "with_deterministic_labels_training_on_raises_the_margin_and_the_kl")
def chosen_and_rejected_swapped(original, pair, beta):
    return original(dpo.Pair(pair.logp_l, pair.logp_w, pair.ref_l, pair.ref_w, pair.len_l, pair.len_w), beta)


@plant("beta stands outside the sigmoid", "dpo.dpo_loss", "minimising_dpo_over_all_policies_gives_equation_4 test_section4")
def beta_outside_the_sigmoid(original, pair, beta):
    return beta * original(pair, 1.)


@plant("sigma stands for log sigma", "dpo.dpo_loss", "dpo_loss_agrees_with_extended_precision "
       "section_4s_gradient_is_the_slope_of_the_loss_in_theta test_section4")
def sigma_for_log_sigma(original, pair, beta):
    return -(-original(pair, beta)).exp()


@plant("the reference is not frozen", "model.score_batches", "the_reference_receives_no_gradient")
def reference_not_frozen(original, function, ids, mask, batch=512):
    return original.__wrapped__(function, ids, mask, batch)


@plant("log(sigmoid()) for logsigmoid: infinite where sigma underflows", "dpo.dpo_loss", "test_section4")
def log_of_sigmoid(original, pair, beta):
    return -torch.log(torch.sigmoid(beta * (pair.logp_w - pair.ref_w - pair.logp_l + pair.ref_l)))


@plant("DPO's log-probabilities are divided by the lengths", "dpo.dpo_loss",
       "autograd_agrees_with_the_gradient_by_hand_and_gives_the_lengths_none test_section4")
def loss_of_length_means(original, pair, beta):
    return original(pair._replace(logp_w=pair.logp_w / pair.len_w, logp_l=pair.logp_l / pair.len_l), beta)


@plant("the loss is already reduced over the batch", "dpo.dpo_loss",
       "losses_are_one_number_per_pair_and_keep_float64 test_section4")
def loss_reduced(original, pair, beta):
    return original(pair, beta).mean().expand(len(pair.logp_w))


@plant("the reference is counted for the winner alone", "dpo.dpo_loss", "dpo_is_blind_to_a_shift_common_to_both_responses "
       "a_gpt_trained_with_dpo_on_all_pairs_arrives_at_equation_4")
def reference_of_the_winner_alone(original, pair, beta):
    return original(pair._replace(ref_l=0 * pair.ref_l), beta)


@plant("the gradient's weight is sigma(rhat_w - rhat_l): right pairs are pushed, wrong ones not", "dpo.dpo_gradient",
       "the_gradient_is_weighed_by_how_wrongly_the_implicit_reward_ranks test_section4")
def gradient_weight_of_the_right_order(original, pair, beta):
    on_w, on_l = original(pair, beta)
    return -beta - on_w, beta - on_l


@plant("the gradient has lost its factor beta", "dpo.dpo_gradient",
       "at_the_reference_the_loss_is_log_2_but_the_gradient_is_not_0 test_section4")
def gradient_without_beta(original, pair, beta):
    return tuple(g / beta for g in original(pair, beta))


@plant("the gradient in logits stands at the token, not before it", "dpo.dpo_gradient_logits",
       "the_gradient_in_logits_is_the_slope_of_the_loss test_section4")
def logit_gradient_not_shifted(original, logits, ids, mask, coefficient):
    return original(logits, ids, mask, coefficient).roll(1, 1)


@plant("the gradient in logits multiplies by the mask, and 0 x NaN is NaN", "dpo.dpo_gradient_logits",
       "masked_out_logits_and_ids_are_never_read")
def logit_gradient_reads_the_masked(original, logits, ids, mask, coefficient):
    return original(logits, ids, mask, coefficient) + 0 * logits


@plant("the implicit reward adds the reference", "dpo.implicit_reward", "implicit_reward_is_beta_times_the_log_ratio "
       "test_section5")
def implicit_reward_adds_the_reference(original, logp, ref, beta):
    return beta * (logp + ref)


@plant("the implicit reward has lost beta", "dpo.implicit_reward",
       "the_reward_is_the_implicit_reward_of_its_optimum_plus_beta_log_z test_section5")
def implicit_reward_without_beta(original, logp, ref, beta):
    return logp - ref


# --------------------------------------------------------------------------------------------- the appendix, the baselines
@plant("a ranking is read worst first", "dpo.plackett_luce_loss", "plackett_luce_of_two_is_dpo test_appendix")
def ranking_worst_first(original, logp, ref, beta):
    return original(logp.flip(-1), ref.flip(-1), beta)


@plant("every choice of a ranking is among all responses, not among what is left", "dpo.plackett_luce_loss",
       "the_probabilities_of_all_rankings_sum_to_1 minimising_plackett_luce_over_all_policies_gives_equation_4 "
       "test_appendix test_section5")
def ranking_with_replacement(original, logp, ref, beta):
    rhat = beta * (logp - ref)
    return (torch.logsumexp(rhat, -1, keepdim=True) - rhat)[..., :-1].sum(-1)


@plant("the best of a ranking is counted twice, so that r + f(x) matters", "dpo.plackett_luce_loss", "test_section5")
def ranking_counts_the_best_twice(original, logp, ref, beta):
    return original(logp, ref, beta) - beta * (logp - ref)[..., 0]


@plant("a ranking's exponentials are taken before the logarithm", "dpo.plackett_luce_loss",
       "plackett_luce_is_right_at_enormous_log_ratios_in_float32")
def ranking_overflows(original, logp, ref, beta):
    e = (beta * (logp - ref)).exp()
    return -(e / e.flip(-1).cumsum(-1).flip(-1)).log().sum(-1)


@plant("pairs by index take winners for losers", "dpo.make_pairs",
       "six_pairs_by_index_equal_twelve_separate_forwards test_appendix")
def index_pairs_swapped(original, logp, ref, length, winner, loser):
    return original(logp, ref, length, loser, winner)


@plant("the constant weight is 1, not where DPO begins", "dpo.constant_weight_loss",
       "with_constant_weight_every_pair_is_pushed_as_dpo_pushes_at_the_reference")
def constant_weight_of_one(original, pair, beta):
    return 2 * original(pair, beta)


@plant("the unlikelihood of y_l is rewarded with its likelihood", "dpo.unlikelihood_loss",
       "unlikelihood_raises_the_winner_and_lowers_the_loser_at_constant_rates test_appendix")
def unlikelihood_sign(original, pair, alpha):
    return original(pair, -alpha)


@plant("Preferred-FT learns y_l", "dpo.preferred_ft_loss", "preferred_ft_sees_the_winner_alone test_appendix")
def preferred_ft_on_the_loser(original, pair, beta):
    return -pair.logp_l


# -------------------------------------------------------------------------------------------- the optimum and its frontier
@plant("beta is inverted in the optimum", "dpo.optimal_policy",
       "a_smaller_beta_moves_further_from_the_reference_for_more_reward test_section3 "
       "direct_ascent_on_equation_3_finds_equation_4 test_section4 test_section5 test_fixed_point "
       "with_deterministic_labels_beta_no_longer_selects_the_optimum test_appendix")
def beta_inverted(original, ref_logp, reward, beta):
    return original(ref_logp, reward, 1 / beta)


@plant("the sign of the exponent in Eq. 4 is flipped", "dpo.optimal_policy",
       "the_optimal_policy_attains_beta_log_z test_section3 test_section5")
def exponent_sign(original, ref_logp, reward, beta):
    return original(ref_logp, -reward, beta)


@plant("Z is one number for all prompts", "dpo.log_partition",
       "log_partition_is_the_log_of_the_sum_over_responses test_section3 test_section5")
def partition_over_prompts(original, ref_logp, reward, beta):
    z = original(ref_logp, reward, beta)
    return z.mean().expand(z.shape)


@plant("the reference is left out of Z", "dpo.log_partition", "every_implicit_reward_is_normalised test_section5 test_section3")
def partition_without_reference(original, ref_logp, reward, beta):
    return original(torch.zeros_like(ref_logp), reward, beta)


@plant("the KL of the objective is KL(pi_ref || pi)", "dpo.objective",
       "objective_is_log_partition_minus_kl_to_the_optimum_for_every_policy "
       "test_section3 test_section5")
def objective_of_the_other_kl(original, logp, ref_logp, reward, beta):
    return (logp.exp() * reward + beta * ref_logp.exp() * (logp - ref_logp)).sum(-1)


@plant("the objective rewards KL", "dpo.objective", "no_other_policy_attains_as_much test_section3 test_section5")
def objective_rewards_kl(original, logp, ref_logp, reward, beta):
    return original(logp, ref_logp, reward, -beta)


@plant("log N is forgotten: each sample of pi_ref weighs 1, not 1 / N", "dpo.optimal_frontier",
       "the_frontier_is_equation_4_at_each_beta_averaged_over_prompts test_frontier")
def log_n_forgotten(original, reward, betas):
    curve = original(reward, betas)
    return curve | {"kl": [k - math.log(reward.shape[1]) for k in curve["kl"]]}


@plant("F is the curve's point before k, not the least tangent", "dpo.optimal_reward",
       "the_frontiers_height_is_the_least_of_its_tangents the_frontier_is_attained no_policy_lies_above_the_frontier "
       "test_frontier")
def frontier_by_steps(original, kl, frontier):
    rows = zip(*(frontier[name] for name in ("beta", "kl", "reward", "se")))
    return max((r, b, s) for b, k, r, s in rows if k <= kl + 1e-9 or b == frontier["beta"][0])


@plant("the price of a nat is reported as its inverse", "dpo.optimal_reward", "the_slope_of_the_frontier_is_beta test_frontier")
def slope_inverted(original, kl, frontier):
    height, beta, se = original(kl, frontier)
    return height, 1 / beta, se


@plant("the frontier gives each prompt's best reward, whatever its KL", "dpo.optimal_frontier",
       "one_common_price_beats_a_price_for_each_prompt "
       "test_frontier")
def frontier_of_the_worst_prompt(original, reward, betas):
    curve = original(reward, betas)
    return curve | {"reward": [min(original(row[None], torch.tensor([b]))["reward"][0] for row in reward) for b in curve["beta"]]}


@plant("the curve is corrected upwards by its bias", "dpo.optimal_frontier",
       "the_frontier_of_a_few_samples_is_biased_low test_frontier")
def frontier_bias_hidden(original, reward, betas):
    curve = original(reward, betas)
    return curve | {"reward": [r + 1 / (2 * reward.shape[1] * b) for r, b in zip(curve["reward"], curve["beta"])]}


@plant("the effective sample size is the best prompt's", "dpo.optimal_frontier",
       "ess_is_the_tenth_percentile_over_prompts_of_the_effective_sample_size")
def ess_of_the_best_prompt(original, reward, betas):
    rows = [original(row[None], betas) for row in reward]
    return original(reward, betas) | {"ess": [max(e) for e in zip(*(r["ess"] for r in rows))]}


@plant("the curve's standard error has lost beta", "dpo.optimal_frontier",
       "the_standard_error_is_the_scatter_of_the_height_over_fresh_samples")
def frontier_error_without_beta(original, reward, betas):
    curve = original(reward, betas)
    return curve | {"se": [s / b for s, b in zip(curve["se"], curve["beta"])]}


# -------------------------------------------------------------------------------------------------- the start, and batches
@plant("all tokens start in one place", "model.GPT.__init__", "tokens_start_apart")
def tokens_start_together(original, gpt, *arguments):
    original(gpt, *arguments)
    gpt.token.weight.data.mul_(.1)


@plant("numbers of tokens come back at the next token", "model.score_batches", "scoring_tokens_in_batches_keeps_their_places")
def tokens_scored_next_door(original, function, ids, mask, batch=512):
    result = original(function, ids, mask, batch)
    return result.roll(1, 1) if result.dim() > 1 else result
