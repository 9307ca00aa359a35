"""Planted bugs of train.py: what a run needs, its loop on pairs and its evaluation. See mutants.py.

`mock.patch` takes names in strings, so that `train` is imported when a bug is run.
"""
import importlib
import math
from functools import partial
from types import SimpleNamespace
from unittest import mock

import data
import model
from mutants_of_the_model import with_weight_decay
from planting import plant


# -------------------------------------------------------------------- what is ready before a run
@plant("all random tensors of one kind have the same random numbers",
       "data.named_generator",
       "no_two_parts_or_splits_share_random_numbers",
       "no_two_seeds_share_random_numbers",
       "every_epoch_on_pairs_has_an_order_of_its_own",
       "generators_of_other_names_are_other_generators")
def torch_generator_of_one_name(original, *names, device="cpu"):
    return original(names[0], device=device)


@plant("all seeds have the corpus, the prompts and the pi_ref of the first",
       "train.prepare",
       "each_seed_has_a_corpus_a_tokenizer_a_pi_ref_and_prompts_of_its_own")
def seeds_share_their_setup(original, cfg, seed, *arguments):
    return original(cfg, cfg.seed, *arguments)._replace(seed=seed)


@plant("the policies of every seed begin at, and are compared with, the pi_ref of the first",
       "train.prepare",
       "each_seed_has_a_corpus_a_tokenizer_a_pi_ref_and_prompts_of_its_own")
def reference_of_the_first_seed(original, cfg, seed, *arguments):
    first = original(cfg, cfg.seed, *arguments)
    return original(cfg, seed, *arguments)._replace(ref=first.ref)


@plant("pi_ref reads no restaurant reviews",
       "train.train_texts",
       "pi_ref_is_trained_on_every_review_once_an_epoch_in_an_order_of_its_own")
def restaurants_left_out(original, setup, films=None, restaurants=None):
    return original(setup, films, 0)


@plant("the prompts of training are those of the evaluation",
       "train.prompts_of_split",
       "completions_are_responses_of_pi_ref_to_the_first_prompts_in_order",
       "ppo_gets_the_train_prompts_its_score_and_its_target")
def training_on_evaluation_prompts(original, setup, split, *arguments):
    return original(setup, setup.cfg.split, *arguments)


@plant("the reward model is tested on prompts that it is trained on",
       "train.reference_preferences",
       "the_reward_model_learns_all_pairs_and_is_tested_on_held_out_ones")
def nothing_held_out(original, setup, split, count):
    return original(setup, "train", count)


@plant("the preferences of --pairs are ignored",
       "train.training_preferences",
       "preferences_of_a_user_replace_those_of_pi_ref")
def user_pairs_ignored(original, setup):
    train = importlib.import_module("train")
    return train.reference_preferences(setup, "train", setup.cfg.prompts)


# ----------------------------------------------------------------------------- the scores of PPO
@plant("the reward of PPO-GT is not normalised",
       "train.make_true_score",
       "the_true_reward_of_ppo_is_normalised_on_responses_of_pi_ref")
def true_reward_not_normalised(original, setup, *arguments):
    return partial(data.true_reward, setup.encoding)


@plant("the learned reward is normalised on each batch, which changes the price of KL",
       "train.make_learned_score",
       "the_learned_reward_of_ppo_is_normalised_by_its_mean_and_deviation")
def score_of_each_batch(original, *arguments):
    score = original(*arguments)

    def normalised(ids, mask):
        scores = score(ids, mask)
        return (scores - scores.mean()) / scores.std(correction=0)

    return normalised


@plant("the values of PPO are fitted to the true reward",
       "train.initial_critic",
       "the_values_of_ppo_are_fitted_to_its_scores_of_all_completions")
def values_of_the_true_reward(original, setup, method, make_score):
    train = importlib.import_module("train")
    return original(setup, method, train.make_true_score)


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


@plant("the row of the finished policy has the planned number of steps, also if fewer were made",
       "train.run_steps",
       "a_run_that_ends_early_is_evaluated_where_it_ends")
def planned_steps_reported(original, setup, policy, run, steps, progress, result):
    original(setup, policy, run, steps, progress, result)
    result["rows"][-1]["step"] = steps


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


# ------------------------------------------------------------------------------ on-policy rounds
@plant("the reference of the loss is the policy that sampled the round, instead of pi_ref",
       "train.sample_completions",
       "the_pairs_of_a_round_are_the_policys_and_the_reference_is_pi_refs",
       "rounds_on_bradley_terry_labels_arrive_at_equation_4")
def reference_of_the_round(original, setup, policy, prompts, generator):
    completions = original(setup, policy, prompts, generator)
    ref_logp = model.batched_sequence_logp(policy, completions["ids"], completions["mask"],
                                           setup.device)
    return {**completions, "ref_logp": ref_logp}


@plant("every round is sampled from pi_ref instead of from the policy as it is then",
       "train.sample_round",
       "the_pairs_of_a_round_are_the_policys_and_the_reference_is_pi_refs",
       "every_step_of_every_round_is_that_of_the_recipe")
def rounds_of_the_reference(original, setup, policy, *arguments):
    return original(setup, setup.ref, *arguments)


@plant("every round has the prompts of the first",
       "train.sample_round",
       "rounds_use_each_prompt_once_in_order_and_the_policy_as_it_is_then",
       "every_step_of_every_round_is_that_of_the_recipe")
def rounds_of_the_same_prompts(original, setup, policy, run, number):
    return original(setup, policy, run, 0)


@plant("every round has the random numbers of the first",
       "train.sample_round",
       "no_two_rounds_or_runs_share_random_numbers")
def rounds_of_equal_random_numbers(original, *arguments):
    train = importlib.import_module("train")
    make_generator = train.named_generator

    def of_the_first_round(*names, **options):
        if names[0] == "round":
            names = *names[:-1], 0    # the last name is the number of the round
        return make_generator(*names, **options)

    with mock.patch("train.named_generator", of_the_first_round):
        return original(*arguments)


@plant("a single round is sampled, too, for each policy anew, instead of taking the pairs at hand",
       "train.train_on_pairs",
       "one_round_trains_on_the_pairs_of_pi_ref")
def one_round_sampled(original, *arguments):
    with mock.patch("train.training_preferences", return_value=None):
        return original(*arguments)


@plant("the learning rate comes down to 0 in the first round, and is negative in the next",
       "train.train_on_pairs",
       "every_step_of_every_round_is_that_of_the_recipe")
def schedule_of_one_round(original, setup, *arguments):
    def schedule(optimizer, steps):
        return model.lr_schedule(optimizer, steps // setup.cfg.rounds)

    with mock.patch("train.lr_schedule", schedule):
        return original(setup, *arguments)


@plant("the steps are announced without the epochs, so the first evaluations come too early",
       "train.train_on_pairs",
       "the_announced_steps_are_the_sum_over_the_rounds")
def steps_of_one_epoch(original, setup, *arguments):
    steps, progress = original(setup, *arguments)
    return steps // setup.cfg.epochs, progress


@plant("Adam has its default beta2 on pairs, .999",
       "train.train_on_pairs",
       "every_step_on_pairs_is_adamw_on_the_mean_loss_of_its_pairs")
def default_beta2_on_pairs(original, setup, *arguments):
    cfg = SimpleNamespace(**{**vars(setup.cfg), "adam_beta2": .999})
    return original(setup._replace(cfg=cfg), *arguments)


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
    with mock.patch("plots.frontier.generate", partial(model.generate, temperature=.7)):
        return original(*arguments)


@plant("the standard errors treat the responses to a prompt as independent",
       "train.mean_and_se",
       "the_error_of_a_mean_is_that_of_the_prompts_means",
       "an_evaluation_is_a_mean_over_responses_with_the_error_of_the_prompts_means")
def error_over_responses(original, x):
    return original(x.flatten()[:, None])


@plant("all evaluations of a run have the same random numbers",
       "train.run_steps",
       "a_run_is_evaluated_at_equal_intervals_and_at_its_end")
def evaluations_with_equal_random_numbers(original, *arguments):
    evaluate = importlib.import_module("train").evaluate

    def evaluate_without_step(setup, policy, samples, *names):
        return evaluate(setup, policy, samples, *names[:-1])

    with mock.patch("train.evaluate", evaluate_without_step):
        return original(*arguments)


@plant("the gain is measured from a reward of 0 instead of pi_ref's",
       "dpo.share_of_optimal_gain",
       "the_share_of_the_optimal_gain_and_its_error")
def gain_from_zero(original, reward, reward_se, kl, kl_se, frontier):
    return original(reward, reward_se, kl, kl_se, {**frontier, "ref_reward": 0.})


@plant("the share of every seed is measured at the optimum of the first",
       "train.tables.optimum_of",
       "each_row_is_compared_with_the_optimum_of_its_own_seed")
def optimum_of_another_seed(original, optimum, seed):
    return original(optimum, min(optimum["seeds"], key=int))


@plant("a share is read off beyond the end of the optimal curve",
       "train.tables.add_shares",
       "a_row_has_a_share_where_the_optimal_gain_is_known_and_not_zero")
def share_beyond_the_curve(original, rows, optimum):
    seeds = {seed: {**curve, "kl": [*curve["kl"], math.inf]}
             for seed, curve in optimum["seeds"].items()}
    return original(rows, {**optimum, "seeds": seeds})


@plant("the error of the KL is forgotten where rewards are compared with the optimum",
       "train.tables.above_optimum",
       "rows_above_the_optimum_by_more_than_four_standard_errors_are_found")
def noise_of_the_kl_forgotten(original, rows, optimum):
    found = []
    for row in rows:
        if original([{**row, "kl_se": 0.}], optimum):
            found.append(row)
    return found
