"""Planted bugs of the model, its log-probabilities, fine-tuning and the sampler. See mutants.py."""
import contextlib
from unittest import mock

import torch

import model
from planting import plant


# ------------------------------------------------------------------------ the start, and batches
@plant("all token embeddings start close together",
       "model.GPT.__init__",
       "tokens_start_apart")
def tokens_start_together(original, gpt, *arguments):
    original(gpt, *arguments)
    gpt.token.weight.data.mul_(.1)


@plant("values of tokens come back one position late",
       "model.map_batches",
       "scoring_tokens_in_batches_keeps_their_places")
def tokens_scored_next_door(original, function, ids, mask, batch=64):
    result = original(function, ids, mask, batch)
    return result.roll(1, 1) if result.dim() > 1 else result


# ------------------------------------------------------------------------------------- the model
@plant("attention sees later tokens",
       "model.causal_mask",
       "later_tokens_change_nothing_earlier",
       "padding_changes_nothing",
       "sampled_responses_follow_the_enumerated_distribution")
def attention_not_causal(original, x, start):
    return original(x, start).clamp(min=0)


@plant("queries and keys do not know their positions",
       "model.apply_rotary",
       "attention_sees_distances_not_positions")
def not_rotated(original, x, table):
    return x


@plant("all pairs of coordinates turn at the same frequency",
       "model.rotary_table",
       "each_pair_of_coordinates_turns_at_its_own_frequency")
def one_frequency(original, positions, size):
    half = size // 2
    table = original(positions, 2)                                      # one pair
    columns = [0] * half + [1] * half
    return torch.cat([table[..., columns], original(positions, 1)[..., :size % 2]], -1)


@plant("the rows of a batch see each other",
       "model.GPT.forward",
       "a_batch_of_one_equals_a_batch_of_many",
       "scoring_in_batches_is_scoring_at_once")
def batch_leaks(original, gpt, ids):
    logits = original(gpt, ids)
    return logits + .01 * logits.mean(0)


@plant("masked log-probabilities are multiplied by 0, so NaN stays NaN",
       "model.sequence_logp",
       "masked_entries_are_never_read")
def masked_multiplied(original, logits, ids, mask):
    return (model.token_logp(logits, ids.clamp(min=0)) * mask[:, 1:]).sum(1)


@plant("the log-softmax is computed in half precision",
       "model.log_softmax",
       "half_precision_is_promoted_before_the_softmax")
def half_precision_kept(original, logits):
    return torch.log_softmax(logits, -1)


@plant("float64 is narrowed to float32",
       "model.log_softmax",
       "float64_stays_float64")
def float64_narrowed(original, logits):
    return torch.log_softmax(logits.float(), -1)


@plant("response_token_logp puts each log-probability one position early",
       "model.response_token_logp",
       "response_logp_stands_where_its_token_stands")
def response_logp_shifted(original, *arguments):
    return original(*arguments).roll(-1, 1)


@plant("response_token_logp is divided by the length of the response",
       "model.response_token_logp",
       "response_logp_sums_to_sequence_logp")
def response_logp_mean(original, gpt, ids, mask):
    return original(gpt, ids, mask) / mask.sum(1, keepdim=True)


@plant("the KL is KL(pi_ref || pi)",
       "model.token_kl",
       "mean_of_sequence_kl_is_the_kl",
       "token_kl_sums_over_the_whole_vocabulary")
def kl_reversed(original, logits, ref_logits):
    return original(ref_logits, logits)


@plant("the log-probability of each token has the wrong sign",
       "model.token_logp",
       "mean_of_the_sampled_log_ratio_is_the_kl")
def log_probability_negated(original, logits, ids):
    return -original(logits, ids)


@plant("the sequence KL is read at the tokens instead of one position before them",
       "model.sequence_kl",
       "mean_of_sequence_kl_is_the_kl",
       "sequence_kl_ignores_what_is_masked",
       "response_kl_is_the_sequence_kl")
def sequence_kl_shifted(original, logits, ref_logits, mask):
    return original(logits, ref_logits, mask.roll(1, 1))


# ----------------------------------------------------------------------------------- fine-tuning
@plant("the learning rate has no warm-up",
       "model.lr_schedule",
       "the_learning_rate_warms_up_and_comes_down")
def no_warm_up(original, optimizer, steps):
    def factor(step):
        return 1 - step / steps

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@plant("fine-tuning learns filler",
       "train.sft",
       "fine_tuning_learns_the_texts_and_no_filler")
def fit_learns_filler(original, gpt, ids, lengths, batches, lr):
    full_width = torch.full_like(lengths, ids.shape[1])
    return original(gpt, ids, full_width, batches, lr)


@plant("the mask of fine-tuning reaches one token past the end of each text",
       "train.sft",
       "what_follows_the_end_of_a_text_has_no_influence_on_sft",
       "sft_is_adamw_on_the_mean_nats_a_token_with_clipped_gradients")
def fit_one_token_too_far(original, gpt, ids, lengths, batches, lr):
    one_more = (lengths + 1).clamp(max=ids.shape[1])
    return original(gpt, ids, one_more, batches, lr)


@plant("the loss of fine-tuning is a mean over each text, so the tokens of short texts count more",
       "train.sft",
       "sft_ends_at_the_conditional_frequencies_of_the_corpus",
       "sft_is_adamw_on_the_mean_nats_a_token_with_clipped_gradients")
def fit_mean_of_texts(original, *arguments):
    def mean_logp(gpt, ids, mask):
        length = mask.sum(1, keepdim=True)
        return model.response_token_logp(gpt, ids, mask) / length * length.float().mean()

    with mock.patch("train.response_token_logp", mean_logp):
        return original(*arguments)


@plant("the loss of fine-tuning is a mean where its sum is divided by the number of tokens",
       "train.sft",
       "sft_is_adamw_on_the_mean_nats_a_token_with_clipped_gradients")
def fit_mean_for_sum(original, *arguments):
    def scaled_logp(gpt, ids, mask):
        return model.response_token_logp(gpt, ids, mask) / mask.numel()

    with mock.patch("train.response_token_logp", scaled_logp):
        return original(*arguments)


@contextlib.contextmanager
def with_weight_decay():
    """Context in which AdamW has weight decay, whatever its caller asks for."""
    adamw = torch.optim.AdamW

    def decaying(parameters, **options):
        return adamw(parameters, **{**options, "weight_decay": 1.})

    with mock.patch("torch.optim.AdamW", decaying):
        yield


@plant("fine-tuning has weight decay",
       "train.sft",
       "sft_is_adamw_on_the_mean_nats_a_token_with_clipped_gradients",
       "sft_ends_at_the_conditional_frequencies_of_the_corpus")
def fit_with_weight_decay(original, *arguments):
    with with_weight_decay():
        return original(*arguments)


# ----------------------------------------------------------------------------------- the sampler
@plant("the cache is off by one position",
       "model.GPT.hidden",
       "hidden_states_in_pieces_are_those_of_the_whole",
       "cached_sampling_equals_uncached_sampling")
def cache_off_by_one(original, gpt, ids, caches=None, start=0):
    return original(gpt, ids, caches, max(start - 1, 0))


@plant("the temperature is ignored",
       "model.sample_token",
       "temperature_divides_the_logits",
       "cached_sampling_equals_uncached_sampling")
def temperature_ignored(original, logits, temperature, u):
    return original(logits, 0. if temperature == 0 else 1., u)


@plant("the temperature multiplies the logits",
       "model.sample_token",
       "temperature_divides_the_logits")
def temperature_inverted(original, logits, temperature, u):
    return original(logits, 0. if temperature == 0 else 1 / temperature, u)


@plant("temperature 0 samples",
       "model.sample_token",
       "temperature_zero_is_argmax")
def temperature_zero_samples(original, logits, temperature, u):
    return original(logits, 1. if temperature == 0 else temperature, u)


@plant("the end token does not stop a response",
       "model.sample",
       "a_row_is_its_prompt_then_its_response_then_end")
def end_does_not_stop(original, gpt, prompts, lengths, max_tokens, end, *arguments, **options):
    no_token = -1
    hidden = model.GPT.hidden

    def hidden_of_any_filler(gpt, ids, *options):
        return hidden(gpt, ids.where(ids >= 0, end), *options)

    with mock.patch("model.GPT.hidden", hidden_of_any_filler):
        ids = original(gpt, prompts, lengths, max_tokens, no_token, *arguments, **options)
    return ids.where(ids >= 0, end)


@plant("responses are one token too long",
       "model.sample",
       "a_row_is_its_prompt_then_its_response_then_end")
def response_too_long(original, gpt, prompts, lengths, max_tokens, *arguments, **options):
    return original(gpt, prompts, lengths, max_tokens + 1, *arguments, **options)


@plant("all rows have the limit of the one that may be longest",
       "model.sample",
       "each_row_may_have_a_limit_of_its_own",
       "responses_begun_by_a_policy_and_ended_by_pi_ref_follow_their_density")
def limit_of_the_longest(original, gpt, prompts, lengths, max_tokens, *arguments, **options):
    longest = int(torch.as_tensor(max_tokens).max())
    return original(gpt, prompts, lengths, longest, *arguments, **options)


@plant("the responses to one prompt are not consecutive",
       "model.generate",
       "responses_to_a_prompt_stand_together",
       "completions_are_responses_of_pi_ref_to_the_first_prompts_in_order")
def respond_interleaved(original, gpt, prompts, count, *arguments, **options):
    ids, mask = original(gpt, prompts, count, *arguments, **options)

    def interleave(x):
        return x.unflatten(0, (-1, count)).transpose(0, 1).flatten(0, 1)

    return interleave(ids), interleave(mask)


@plant("a batch is cut one column short",
       "model.map_batches",
       "scoring_in_batches_is_scoring_at_once")
def batch_cut_short(original, function, ids, mask, batch=64):
    def cut_short(ids, mask):
        return function(ids[:, :-1], mask[:, :-1])

    return original(cut_short, ids, mask, batch)
