"""The policies that are fitted to the optimum, which sample for it (plots/frontier.py)."""
from unittest import mock

import torch

import dpo
import train
import world
from fake_setup import FakePolicy, numbers, true_reward
from plots import frontier
from test_loops_of_rounds import table_of
from test_stages_before_training import setup_of
from world import RESPONSES, agree


def fit_inputs(setup, kls, samples=1500):
    """What the last of the fits at these KLs gives to SFT, with so many samples and picks a prompt.

    Each call of SFT only multiplies the token embeddings by 4.
    -> embeddings at the start, ids, lengths, batches, learning rate; the value of the stage
    """
    calls = []

    def sft(model, ids, lengths, batches, lr):
        calls.append((model.token.weight.detach().clone(), ids, lengths, batches, lr))
        model.token.weight.data *= 4.

    with (mock.patch.object(frontier, "FIT_SAMPLES", samples),
          mock.patch.object(frontier, "FIT_PICKS", samples),
          mock.patch.object(frontier, "FIT_EPOCHS", 2),
          mock.patch.object(frontier, "FIT_BATCH", 1000)):
        value = frontier.fit_to_optimum(setup, kls, sft)
    return calls[-1], value


def optimum_of_train_prompts(setup, kl):
    """{prompt: pi*(y|x) of all responses} for the train prompts, at the beta of this mean KL."""
    ids, lengths = train.prompts_of_split(setup, "train", setup.cfg.prompts)
    prompts = [row[:n].tolist() for row, n in zip(ids, lengths)]
    logp = table_of(setup.ref, prompts)
    reward = numbers([[true_reward([*x, *y]) for y in RESPONSES] for x in prompts])
    betas = torch.logspace(1, -2.5, 400).tolist()
    stars = [dpo.optimal_policy(logp, reward, beta) for beta in betas]
    star = min(stars, key=lambda star: abs(world.kl(star, logp).mean().item() - kl))
    return {tuple(x): p for x, p in zip(prompts, star.exp())}


def test_a_fit_is_trained_on_samples_of_the_optimum_at_its_kl():
    """SFT gets responses to train prompts as often as pi* (Eq. 4) at the last KL, by enumeration.

    Each row is a prompt, the response and nothing more. The first fit starts from pi_ref, each
    other from the fit before; its samples are weighted for pi_ref.
    """
    setup = setup_of(3)
    for kls, factor in (((.2,), 1.), ((.2, .6), 4.), ((.2, .6, .4), 16.)):
        (embeddings, ids, lengths, *_), value = fit_inputs(setup, kls)
        agree(embeddings, factor * setup.ref.token.weight,
              "the first fit must start from pi_ref, each other from the fit before", 1e-6)
        agree(value["checkpoints"][-1]["token.weight"], 4. * embeddings,
              "the fit must be the trained policy", 1e-6)
        texts = [tuple(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
        optimum = optimum_of_train_prompts(setup, kls[-1])
        counts = {x: [texts.count((*x, *y)) for y in RESPONSES] for x in optimum}
        assert sum(map(sum, counts.values())) == len(texts), \
            "each row must be a train prompt with a whole response"
        for x, p in optimum.items():
            deviation = (numbers(counts[x]) / sum(counts[x]) - p).abs().max().item()
            assert deviation < .05, \
                f"responses to {x} are drawn with probabilities {deviation:.2f} from those of pi*"


def test_a_fit_trains_on_each_of_its_picks_once_an_epoch():
    """FIT_PICKS responses to each of FIT_PROMPTS random train prompts, in steps of FIT_BATCH.

    Each epoch has its own order, and each seed its own prompts.
    """
    chosen = []
    with mock.patch.object(frontier, "FIT_PROMPTS", 4):
        for seed in (5, 6):
            setup = setup_of(9, seed=seed)
            (_, ids, lengths, batches, lr), _ = fit_inputs(setup, (.2,), samples=300)
            assert (len(ids), lr) == (4 * 300, frontier.FIT_LR)
            assert [len(batch) for batch in batches] == [1000, 1000, 400], "batches of FIT_BATCH"
            order = sum(batches, [])
            first, second = order[:len(ids)], order[len(ids):]
            assert sorted(first) == sorted(second) == [*range(len(ids))], \
                "each response must be trained on once an epoch"
            assert first != second and first != sorted(first), "each epoch must have its own order"
            blocks = ids.view(4, 300, -1)[:, :, :2]                  # the shortest prompt has 2
            assert (blocks == blocks[:, :1]).all(), "each prompt must have FIT_PICKS rows"
            chosen.append((blocks[:, 0].tolist(), order))
    assert chosen[0] != chosen[1], "each seed must choose prompts and order of its own"


def test_the_fits_reach_the_largest_target_of_ppo_in_four_steps_and_repeat_it():
    """Fewer than four fits take fewer steps. Without --optimum-fits there are none."""
    def kls_of(count):
        setup = setup_of(2, optimum_fits=count, kl_targets=(2., 8., 4.))
        fits = frontier.fits_to_optimum(setup, train.sft)
        assert all(fit.arguments[0] == fits[-1].arguments[0][:i + 1]
                   for i, fit in enumerate(fits)), "each fit must read those before"
        return fits[-1].arguments[0] if fits else ()

    for count, kls in ((0, ()), (1, (8.,)), (2, (4., 8.)), (6, (2., 4., 6., 8., 8., 8.))):
        assert kls_of(count) == kls, f"{count} fits are at KL {kls_of(count)}"


def test_the_last_fit_and_the_last_but_two_sample_or_trained_policies_without_fits():
    """All fits are computed before, in an order in which few workers wait."""
    setups = [setup_of(2, optimum_fits=5, seed=seed) for seed in (5, 6)]
    computed = []
    with mock.patch.object(setups[0].stages, "get_all", computed.extend):
        proposals = frontier.all_proposals(setups, [], train.sft)
    order = [(stage.setup.seed, len(stage.arguments[0])) for stage in computed]
    assert order == [(seed, fits) for fits in (1, 2, 3, 4, 5) for seed in (5, 6)], \
        f"fits were computed in the order {order} of (seed, number of fits)"
    for setup, of_seed in zip(setups, proposals):
        found = [(stage.setup.seed, len(stage.arguments[0])) for stage in of_seed]
        assert found == [(setup.seed, 5), (setup.seed, 3)], f"{found} sample"
    policy = FakePolicy("ppo_gt", 1.)
    assert frontier.all_proposals([setup_of(2)], [policy], train.sft) == [(policy,)], \
        "without fits, trained policies must sample"
