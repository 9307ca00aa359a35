"""Planted bugs of the optimum (Eq. 3, Eq. 4) and of its frontier. See mutants.py."""
import math

import torch

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
       "with_deterministic_labels_beta_no_longer_selects_the_optimum",
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
@plant("each sample of pi_ref has weight 1 instead of 1 / N",
       "dpo.optimal_frontier",
       "the_frontier_is_equation_4_at_each_beta_averaged_over_prompts",
       "test_frontier")
def log_n_forgotten(original, reward, betas):
    frontier = original(reward, betas)
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
       "test_frontier")
def frontier_of_the_worst_prompt(original, reward, betas):
    frontier = original(reward, betas)
    heights = []
    for beta in frontier["beta"]:
        by_prompt = [original(row[None], torch.tensor([beta]))["reward"][0] for row in reward]
        heights.append(min(by_prompt))
    return {**frontier, "reward": heights}


@plant("the curve is corrected upwards for its bias",
       "dpo.optimal_frontier",
       "the_frontier_of_a_few_samples_is_biased_low",
       "test_frontier")
def frontier_bias_hidden(original, reward, betas):
    frontier = original(reward, betas)
    heights = []
    for height, beta in zip(frontier["reward"], frontier["beta"]):
        heights.append(height + 1 / (2 * reward.shape[1] * beta))
    return {**frontier, "reward": heights}


@plant("the effective sample size is that of the best prompt",
       "dpo.optimal_frontier",
       "ess_is_the_tenth_percentile_over_prompts_of_the_effective_sample_size")
def ess_of_the_best_prompt(original, reward, betas):
    by_prompt = [original(row[None], betas)["ess"] for row in reward]
    ess = [max(values) for values in zip(*by_prompt)]
    return {**original(reward, betas), "ess": ess}


@plant("the standard error of the curve lacks its factor beta",
       "dpo.optimal_frontier",
       "the_standard_error_is_the_scatter_of_the_height_over_fresh_samples")
def frontier_error_without_beta(original, reward, betas):
    frontier = original(reward, betas)
    se = [se / beta for se, beta in zip(frontier["se"], frontier["beta"])]
    return {**frontier, "se": se}
