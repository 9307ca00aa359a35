"""Planted bugs of train.py: what a run needs, its loop on pairs and its evaluation. See mutants.py.

`mock.patch` takes names in strings, so that `train` is imported when a bug is run.
"""
import importlib
import math
from functools import partial
from unittest import mock

import data
import model
from mutants_of_the_model import with_weight_decay
from planting import plant


# -------------------------------------------------------------------- what is ready before a run
@plant("all random tensors of one kind have the same random numbers",
       "data.torch_rng",
       "no_two_parts_or_splits_share_random_numbers",
       "no_two_seeds_share_random_numbers",
       "every_epoch_on_pairs_has_an_order_of_its_own",
       "generators_of_other_names_are_other_generators")
def torch_generator_of_one_name(original, *names, device="cpu"):
    return original(names[0], device=device)


@plant("the prompts of training are those of the evaluation",
       "train.make_prompts",
       "completions_are_responses_of_pi_ref_to_the_first_prompts_in_order",
       "ppo_gets_the_train_prompts_its_score_and_its_target")
def training_on_evaluation_prompts(original, setup, split, *arguments):
    return original(setup, setup.cfg.split, *arguments)


@plant("the reward model is tested on prompts that it is trained on",
       "train.label",
       "the_reward_model_learns_all_pairs_and_is_tested_on_held_out_ones")
def nothing_held_out(original, setup, split, *arguments):
    return original(setup, "train", *arguments)


@plant("the preferences of --pairs are ignored",
       "train.train_pairs",
       "preferences_of_a_user_replace_those_of_pi_ref")
def user_pairs_ignored(original, setup, *arguments):
    train = importlib.import_module("train")
    return train.label(setup, "train", setup.cfg.prompts, *arguments)


# ----------------------------------------------------------------------------- the scores of PPO
@plant("the reward of PPO-GT is not normalised",
       "train.true_score",
       "the_true_reward_of_ppo_is_normalised_on_responses_of_pi_ref")
def true_reward_not_normalised(original, setup, *arguments):
    return partial(data.true_reward, setup.encoding)


@plant("the learned reward is normalised on each batch, which changes the price of KL",
       "train.learned_score",
       "the_learned_reward_of_ppo_is_normalised_by_its_mean_and_deviation")
def score_of_each_batch(original, *arguments):
    score = original(*arguments)

    def normalised(ids, mask):
        scores = score(ids, mask)
        return (scores - scores.mean()) / scores.std(correction=0)

    return normalised


@plant("the values of PPO are fitted to the true reward",
       "train.initial_values",
       "the_values_of_ppo_are_fitted_to_its_scores_of_all_completions")
def values_of_the_true_reward(original, *arguments):
    train = importlib.import_module("train")
    return original(*arguments[:-1], train.true_score)


# ----------------------------------------------------------------------------- the loop on pairs
@plant("DPO has weight decay",
       "train.train_on_pairs",
       "every_step_on_pairs_is_adamw_on_the_mean_loss_of_its_pairs")
def pairs_with_weight_decay(original, *arguments):
    with with_weight_decay():
        return original(*arguments)


@plant("the reference shares the weights of the policy, so every margin is 0",
       "dpo.make_pairs",
       "every_step_on_pairs_is_adamw_on_the_mean_loss_of_its_pairs",
       "training_on_bradley_terry_pairs_arrives_at_equation_4",
       "training_on_pairs_of_a_few_responses_gives_them_the_ratios_of_equation_4")
def reference_follows_the_policy(original, logp, ref, *arguments):
    return original(logp, logp.detach(), *arguments)


@plant("a copy of the parameters shares their memory, so a checkpoint changes with the policy",
       "model.cpu_state_dict",
       "checkpoints_are_the_policies_that_were_evaluated")
def checkpoints_change(original, gpt):
    return {name: p.detach() for name, p in gpt.state_dict().items()}


@plant("a row holds the statistics of its last step alone",
       "train.mean_over_steps",
       "a_row_holds_the_means_of_the_steps_since_the_last_row_and_the_seconds_of_training")
def row_of_its_last_step(original, steps):
    return original(steps[-1:])


@plant("a run goes on with numbers that are not finite",
       "train.check_finite",
       "a_number_that_is_not_finite_or_a_failing_loss_ends_a_run_by_name")
def nan_ignored(original, statistics):
    return None


# -------------------------------------------------------------------------------- the evaluation
@plant("policies are evaluated on prompts of the training set",
       "train.evaluation_prompts",
       "evaluation_prompts_are_prefixes_of_the_first_reviews_of_their_split")
def evaluation_on_train_prompts(original, setup):
    with mock.patch.dict(setup.corpus, {setup.cfg.split: setup.corpus["train"]}):
        return original(setup)


@plant("policies are evaluated at temperature .7",
       "train.evaluate",
       "evaluations_agree_with_enumeration")
def evaluated_at_a_lower_temperature(original, *arguments):
    with mock.patch("train.generate", partial(model.generate, temperature=.7)):
        return original(*arguments)


@plant("the standard errors treat the responses to a prompt as independent",
       "train.mean_and_se",
       "the_error_of_a_mean_is_that_of_the_prompts_means",
       "an_evaluation_is_a_mean_over_responses_with_the_error_of_the_prompts_means")
def error_over_responses(original, x):
    return original(x.flatten()[:, None])


@plant("all evaluations of a run have the same random numbers",
       "train.evaluation_row",
       "a_run_is_evaluated_at_equal_intervals_and_at_its_end")
def evaluations_with_equal_random_numbers(original, setup, policy, run, step, *arguments):
    return {**original(setup, policy, run, 0, *arguments), "step": step}


@plant("the gain is measured from a reward of 0 instead of pi_ref's",
       "dpo.share_of_optimal_gain",
       "the_share_of_the_optimal_gain_and_its_error")
def gain_from_zero(original, reward, reward_se, kl, kl_se, frontier):
    return original(reward, reward_se, kl, kl_se, {**frontier, "ref_reward": 0.})


@plant("a share is read off beyond the end of the optimal curve",
       "train.tables.add_shares",
       "a_row_has_a_share_where_the_optimal_gain_is_known_and_not_zero")
def share_beyond_the_curve(original, rows, optimum):
    return original(rows, {**optimum, "kl": [*optimum["kl"], math.inf]})


@plant("the error of the KL is forgotten where rewards are compared with the optimum",
       "train.tables.above_optimum",
       "rows_above_the_optimum_by_more_than_four_standard_errors_are_found")
def noise_of_the_kl_forgotten(original, rows, optimum):
    found = []
    for row in rows:
        if original([{**row, "kl_se": 0.}], optimum):
            found.append(row)
    return found
