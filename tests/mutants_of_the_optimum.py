"""Planted bugs of the optimum (Eq. 3, Eq. 4) and of its frontier. See mutants.py."""
import math
from types import SimpleNamespace
from unittest import mock

import torch

import model
from planting import plant


# ----------------------------------------------------------------------------------- the optimum
@plant("the optimum takes 1 / beta for beta",
       "dpo.optimal_policy",
       "a_smaller_beta_moves_further_from_the_reference_for_more_reward",
       "test_objective_and_optimum",
       "direct_ascent_on_equation_3_finds_equation_4",
       "test_dpo_loss", "test_dpo_gradient",
       "test_equivalent_rewards",
       "test_ppo_fixed_point",
       "test_rankings_and_baselines")
def beta_inverted(original, ref_logp, reward, beta):
    return original(ref_logp, reward, 1 / beta)


@plant("the exponent of Eq. 4 has the wrong sign",
       "dpo.optimal_policy",
       "the_optimal_policy_attains_beta_log_z",
       "test_objective_and_optimum",
       "test_equivalent_rewards")
def exponent_sign(original, ref_logp, reward, beta):
    return original(ref_logp, -reward, beta)


@plant("Z is one number for all prompts",
       "dpo.log_partition",
       "log_partition_is_the_log_of_the_sum_over_responses",
       "test_objective_and_optimum",
       "test_equivalent_rewards")
def partition_over_prompts(original, ref_logp, reward, beta):
    log_z = original(ref_logp, reward, beta)
    return log_z.mean().expand(log_z.shape)


@plant("Z leaves out the reference",
       "dpo.log_partition",
       "every_implicit_reward_is_normalised",
       "test_equivalent_rewards",
       "test_objective_and_optimum")
def partition_without_reference(original, ref_logp, reward, beta):
    return original(torch.zeros_like(ref_logp), reward, beta)


@plant("the KL of the objective is KL(pi_ref || pi)",
       "dpo.objective",
       "objective_is_log_partition_minus_kl_to_the_optimum_for_every_policy",
       "test_objective_and_optimum",
       "test_equivalent_rewards")
def objective_of_the_other_kl(original, logp, ref_logp, reward, beta):
    return (logp.exp() * reward + beta * ref_logp.exp() * (logp - ref_logp)).sum(-1)


@plant("the objective rewards KL",
       "dpo.objective",
       "no_other_policy_attains_as_much",
       "test_objective_and_optimum",
       "test_equivalent_rewards")
def objective_rewards_kl(original, logp, ref_logp, reward, beta):
    return original(logp, ref_logp, reward, -beta)


# ---------------------------------------------------------------------------------- the frontier
def frontiers_by_prompt(optimal_frontier, reward, betas, *weights):
    """The frontier of each prompt by itself: reward (X, N), weights (X, N) if any."""
    rows = zip(reward, *weights)
    return [optimal_frontier(row[None], betas, *(weight[None] for weight in row_weights))
            for row, *row_weights in rows]


@plant("each sample of pi_ref has weight 1 instead of 1 / N",
       "dpo.optimal_frontier",
       "the_frontier_is_equation_4_at_each_beta_averaged_over_prompts",
       "test_frontier", "test_optimum_of_a_mixture")
def log_n_forgotten(original, reward, betas, *weights):
    frontier = original(reward, betas, *weights)
    kl = [kl - math.log(reward.shape[1]) for kl in frontier["kl"]]
    return {**frontier, "kl": kl}


@plant("F is the last point of the curve before the KL instead of the lowest tangent",
       "dpo.optimal_reward",
       "the_frontiers_height_is_the_least_of_its_tangents",
       "the_frontier_is_attained",
       "no_policy_lies_above_the_frontier",
       "test_frontier")
def frontier_by_steps(original, kl, frontier):
    columns = [frontier[name] for name in ("reward", "beta", "se", "kl")]
    points = []
    for reward, beta, se, kl_beta in zip(*columns):
        if kl_beta <= kl + 1e-9 or beta == frontier["beta"][0]:
            points.append((reward, beta, se))
    return max(points)


@plant("the price of a nat is reported as its inverse",
       "dpo.optimal_reward",
       "the_slope_of_the_frontier_is_beta",
       "test_frontier")
def slope_inverted(original, kl, frontier):
    height, beta, se = original(kl, frontier)
    return height, 1 / beta, se


@plant("the height of the frontier is that of the prompt with the lowest optimal reward",
       "dpo.optimal_frontier",
       "one_common_price_beats_a_price_for_each_prompt",
       "the_optimum_of_the_evaluation_is_that_of_all_responses",
       "test_frontier", "test_optimum_of_a_mixture")
def frontier_of_the_worst_prompt(original, reward, betas, *weights):
    by_prompt = frontiers_by_prompt(original, reward, betas, *weights)
    heights = zip(*(frontier["reward"] for frontier in by_prompt))
    return {**original(reward, betas, *weights), "reward": list(map(min, heights))}


@plant("the curve is corrected upwards for its bias",
       "dpo.optimal_frontier",
       "the_frontier_of_a_few_samples_is_biased_low",
       "test_frontier", "test_optimum_of_a_mixture")
def frontier_bias_hidden(original, reward, betas, *weights):
    frontier = original(reward, betas, *weights)
    heights = []
    for height, beta in zip(frontier["reward"], frontier["beta"]):
        heights.append(height + 1 / (2 * reward.shape[1] * beta))
    return {**frontier, "reward": heights}


@plant("the effective sample size is that of the best prompt",
       "dpo.optimal_frontier",
       "ess_is_the_tenth_percentile_over_prompts_of_the_effective_sample_size")
def ess_of_the_best_prompt(original, reward, betas, *weights):
    by_prompt = frontiers_by_prompt(original, reward, betas, *weights)
    sizes = zip(*(frontier["ess"] for frontier in by_prompt))
    return {**original(reward, betas, *weights), "ess": list(map(max, sizes))}


@plant("the effective sample size forgets the reward",
       "dpo.optimal_frontier",
       "policies_near_the_optimum_give_more_effective_samples",
       "ess_is_the_tenth_percentile_over_prompts_of_the_effective_sample_size")
def ess_of_the_reference(original, reward, betas, *weights):
    ess = original(torch.zeros_like(reward), betas, *weights)["ess"]
    return {**original(reward, betas, *weights), "ess": ess}


@plant("the standard error of the curve lacks its factor beta",
       "dpo.optimal_frontier",
       "the_standard_error_is_the_scatter_of_the_height_over_fresh_samples")
def frontier_error_without_beta(original, reward, betas, *weights):
    frontier = original(reward, betas, *weights)
    se = [se / beta for se, beta in zip(frontier["se"], frontier["beta"])]
    return {**frontier, "se": se}


# ------------------------------------------------------- the mixture that estimates the frontier
@plant("the policies of the mixture are added instead of averaged, so log M is missing",
       "dpo.balance_heuristic",
       "the_weights_of_a_mixture_are_those_of_the_balance_heuristic",
       "a_mixture_never_biases_z",
       "samples_of_pi_ref_alone_have_weight_1")
def log_m_forgotten(original, ref_logp, proposal_logp):
    return original(ref_logp, proposal_logp) - math.log(len(proposal_logp))


@plant("the mixture is the geometric mean of its policies instead of their mean",
       "dpo.balance_heuristic",
       "a_mixture_never_biases_z",
       "the_estimate_of_z_has_the_right_mean_and_that_of_log_z_is_low",
       "a_mixture_with_pi_ref_has_weights_of_at_most_the_number_of_its_policies")
def mixture_of_logarithms(original, ref_logp, proposal_logp):
    return ref_logp - proposal_logp.mean(0)


@plant("one of the policies that sampled is left out of the denominator of the weights",
       "dpo.balance_heuristic",
       "the_weights_of_a_mixture_are_those_of_the_balance_heuristic",
       "the_estimate_of_z_has_the_right_mean_and_that_of_log_z_is_low",
       "a_mixture_with_pi_ref_has_weights_of_at_most_the_number_of_its_policies")
def policy_left_out_of_the_mixture(original, ref_logp, proposal_logp):
    return original(ref_logp, proposal_logp[:max(len(proposal_logp) - 1, 1)])


@plant("a response is weighed by the policy that sampled it alone",
       "train.frontier.sample_mixture",
       "samples_of_a_mixture_carry_the_reward_and_the_weight_of_their_response")
def weights_of_one_policy(original, *arguments):
    def plain_weight(ref_logp, proposal_logp):
        parts = proposal_logp.chunk(len(proposal_logp), 1)    # of the responses of each policy
        own_logp = torch.cat([part[m] for m, part in enumerate(parts)])
        return ref_logp - own_logp

    with mock.patch("dpo.balance_heuristic", plain_weight):
        return original(*arguments)


@plant("the weights forget that pi_ref ends the responses of the other policies",
       "train.frontier.hand_over_logp",
       "the_density_of_handing_over_is_that_of_a_loop_over_tokens",
       "no_response_is_left_out_by_a_policy_that_hands_over",
       "samples_of_a_mixture_carry_the_reward_and_the_weight_of_their_response")
def hand_over_without_weight(original, token_logp, ref_token_logp, mask):
    return token_logp.sum(1)


@plant("pi_ref never takes over from the policies that sample for the optimum",
       "train.frontier.sample_and_hand_over",
       "responses_begun_by_a_policy_and_ended_by_pi_ref_follow_their_density")
def never_handed_over(original, setup, ref, policy, prompts, samples, generator):
    return model.generate(policy, prompts, samples, setup.cfg.max_tokens,
                          setup.encoding.eot_token, generator)


@plant("the samples for the optimum are different ones in each run",
       "train.frontier.sample_and_hand_over",
       "handing_over_uses_its_generator_alone_and_needs_no_response_to_hand_over")
def handed_over_by_the_global_generator(original, *arguments):
    return original(*arguments[:-1], torch.default_generator)


@plant("samples of trained policies count as samples of pi_ref",
       "train.frontier.optimum_from_samples",
       "the_frontier_of_a_mixture_is_that_of_all_responses",
       "the_optimum_is_the_same_with_trained_policies_among_the_samplers")
def weights_forgotten(original, reward, log_weight):
    return original(reward, torch.zeros_like(log_weight))


@plant("the mean reward of pi_ref is the mean over the samples of all policies",
       "train.frontier.optimum_from_samples",
       "the_frontier_of_a_mixture_is_that_of_all_responses")
def reference_reward_of_the_mixture(original, reward, log_weight):
    return {**original(reward, log_weight), "ref_reward": reward.mean().item()}


@plant("samples are grouped by policy instead of by prompt",
       "train.frontier.sample_mixture",
       "samples_of_a_mixture_carry_the_reward_and_the_weight_of_their_response")
def mixture_grouped_by_policy(original, setup, policies, prompts, samples, generator):
    columns = original(setup, policies, prompts, samples, generator)

    def by_policy(x):
        parts = x.unflatten(1, (len(policies), samples)).transpose(0, 1)
        return parts.flatten(0, 2).unflatten(0, (len(prompts[0]), -1))

    return tuple(map(by_policy, columns))


@plant("the error of the mean over seeds is the mean of their errors",
       "train.frontier.mean_optimum",
       "the_mean_over_seeds_is_the_frontier_of_the_prompts_of_all_seeds")
def errors_of_seeds_averaged(original, optima):
    errors = zip(*(optimum["se"] for optimum in optima.values()))
    return {**original(optima), "se": [sum(column) / len(column) for column in errors]}


@plant("the policies of every seed sample for the optimum of each",
       "train.frontier.choose_proposals",
       "the_proposals_are_ppo_gt_and_dpo_at_its_two_smallest_betas")
def proposals_of_all_seeds(original, setup, policies):
    return original(setup, [SimpleNamespace(setup=setup, value=policy.value)
                            for policy in policies])


@plant("policies of failed runs sample for the optimum",
       "train.frontier.choose_proposals",
       "the_proposals_are_ppo_gt_and_dpo_at_its_two_smallest_betas")
def proposals_that_failed(original, setup, policies):
    return original(setup, [SimpleNamespace(setup=policy.setup,
                                            value={**policy.value, "failure": None})
                            for policy in policies])


FITS = "a_fit_is_trained_on_samples_of_the_optimum_at_its_kl"


@plant("a fit to the optimum is trained on all responses alike",
       "train.frontier.fit_to_optimum", FITS)
def fitted_to_the_samplers(original, setup, kls, sft):
    with mock.patch("dpo.optimal_policy",
                    lambda log_weight, reward, beta: torch.zeros_like(reward)):
        return original(setup, kls, sft)


@plant("a fit to the optimum forgets which policy wrote a response",
       "train.frontier.fit_to_optimum", FITS)
def fitted_without_weights(original, setup, kls, sft):
    def unweighted(log_weight, reward, beta):
        return torch.log_softmax(reward / beta, -1)

    with mock.patch("dpo.optimal_policy", unweighted):
        return original(setup, kls, sft)


@plant("each fit to the optimum is at the KL of the first",
       "train.frontier.fit_to_optimum", FITS)
def fitted_to_the_first_kl(original, setup, kls, sft):
    return original(setup, (kls[0],) * len(kls), sft)


@plant("the KL of a fit to the optimum grows beyond the largest target",
       "train.frontier.fits_to_optimum",
       "the_fits_reach_the_largest_target_of_ppo_in_four_steps_and_repeat_it")
def fits_beyond_the_largest_target(original, setup, sft):
    with mock.patch("train.frontier.min", lambda step, one: step, create=True):
        return original(setup, sft)


@plant("the last fit to the optimum does not sample for it",
       "train.frontier.all_proposals",
       "the_last_fit_and_the_last_but_two_sample_or_trained_policies_without_fits")
def last_fit_left_out(original, setups, trained, sft):
    return [stages[1:] or stages for stages in original(setups, trained, sft)]


@plant("a fit to the optimum has the same order in every epoch",
       "train.frontier.fit_to_optimum", "a_fit_trains_on_each_of_its_picks_once_an_epoch")
def fitted_in_one_order(original, setup, kls, sft):
    def sft_in_one_order(policy, ids, lengths, batches, lr):
        size, epochs = len(batches[0]), sum(map(len, batches)) // len(ids)
        order = sum(batches, [])[:len(ids)] * epochs
        sft(policy, ids, lengths, [order[i:i + size] for i in range(0, len(order), size)], lr)

    return original(setup, kls, sft_in_one_order)
