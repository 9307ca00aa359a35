"""No two parts of a stage, rounds, runs or seeds share random numbers, or what is drawn with them.

The stages are those of test_stages_before_training.py.
"""
import contextlib
import dataclasses
import io
import itertools
from unittest import mock

import torch

import data
import dpo
import harness
import ppo
import train
from fake_setup import SEED, reviews
from plots import frontier
from test_log_probabilities import long_gpt
from test_stages_before_training import setup_of, sft_inputs
from world import V


@contextlib.contextmanager
def recorded_generators():
    """Context that gives a list of (names, state) of all random generators that are made.

    Those of train.py, and those of the reviews, which data.py makes.
    """
    made = []

    def recorded(make):
        def make_and_record(*names, **options):
            generator = make(*names, **options)
            is_torch = isinstance(generator, torch.Generator)
            state = generator.initial_seed() if is_torch else generator.getstate()
            made.append((names, state))
            return generator
        return make_and_record

    names = "named_rng", "named_generator"
    with contextlib.ExitStack() as stack:
        for module, name in itertools.product((data, train), names):
            make = recorded(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, make))
        yield made


def test_no_two_parts_or_splits_share_random_numbers():
    """Prompts, labels and each part of the completions have a generator of their own.

    Five prompts have five parts. So do the parts of the prompts of the optimum.
    """
    with recorded_generators() as made:
        for split, seed in itertools.product(("train", "validation"), (SEED, SEED + 1)):
            train.reference_preferences(setup_of(9, seed=seed), split, 5)
    states = {state for _, state in made}
    assert len(states) == len(made) == 4 * 7, \
        f"{len(made)} generators make {len(states)} different random numbers, not 28"
    with recorded_generators() as made:
        frontier.estimate_optimum(setup_of(2, eval_prompts=4, optimum_samples=2), ())
    assert len({state for _, state in made}) == 1 + 4, \
        "the parts of the prompts of the optimum must not share random numbers"


def test_no_two_rounds_or_runs_share_random_numbers():
    """Each round of each run has generators of its own, for its completions and for its labels.

    All share the prompts, which have one generator.
    """
    setup = setup_of(9, rounds=3, labels="bt")
    runs = train.Run("dpo", 1.), train.Run("dpo", 2.), train.Run("my_loss", 1.)
    with recorded_generators() as made:
        for run, number in itertools.product(runs, range(3)):
            train.sample_round(setup, setup.ref, run, number)
    states = {state for _, state in made}
    assert len(states) == len(made) == 1 + 2 * 9, \
        f"9 rounds make {len(states)} different random numbers with {len(made)} generators, not 19"


def run_all_stages(seed):
    """Run all stages of a seed and the beginning of its runs, on fakes.

    -> (names, state) of all their random generators
    """
    setup = setup_of(9, seed=seed, vocab_size=V, width=4, heads=1, eval_prompts=4, rm_epochs=2,
                     optimum_samples=2, reviews=50, rounds=3)
    setup.corpus["restaurant"] = reviews(2, seed=4)
    one_round = setup._replace(cfg=dataclasses.replace(setup.cfg, rounds=1))
    patches = dict.fromkeys(("train_reward_model", "pretrain_critic", "train_ppo"), mock.DEFAULT)
    with recorded_generators() as made, mock.patch.multiple(ppo, **patches):
        for domain in ("film", "restaurant"):
            train.make_corpus(setup, domain)
        sft_inputs(setup)
        train.fit_reward_model(setup)
        frontier.estimate_optimum(setup, ())
        frontier.fit_to_optimum(setup, (.1, .2), train.sft)
        train.reference_row(setup)
        train.evaluate(setup, setup.ref, 2, *train.Run("dpo", 1.), 7)
        _, steps = train.train_on_pairs(one_round, long_gpt(), train.Run("dpo", 1.), dpo.dpo_loss)
        next(steps)
        train.sample_round(setup, setup.ref, train.Run("dpo", 1.), 1)
        run = train.Run("ppo_gt", 1.)
        train.train_with_ppo(setup, setup.ref, run, train.make_true_score)
    return made


def test_no_two_seeds_share_random_numbers():
    """All stages and runs of a seed use other generators than those of another seed.

    The reviews, the initial weights, the prompts, the evaluation and the rounds too. The names of
    each generator contain the seed. So the results of two seeds are independent.
    """
    seeds = 1234, 5678
    made = [run_all_stages(seed) for seed in seeds]
    for seed, generators in zip(seeds, made):
        without_seed = [names for names, _ in generators if seed not in names]
        assert not without_seed, f"the names {without_seed} do not contain the seed"
    parts = {names[0] for names, _ in made[0]}
    assert {"corpus", "init", "sft", "prompts", "completions", "labels", "order", "round",
            "reward model", "values", "evaluation", "optimum", "ppo_gt"} <= parts, \
        f"this test needs the generators of all stages, not only of {parts}"
    states = [{state for _, state in generators} for generators in made]
    shared = states[0] & states[1]
    assert len(states[0]) == len(states[1]) > 25 and not shared, \
        f"two seeds share {len(shared)} of their {len(states[0])} random generators"


def things_of_a_seed(setup):
    """{name: what a seed must have of its own}, as values that can be compared."""
    tokens = [setup.encoding.decode_single_token_bytes(i) for i in range(299)]
    return {"seed": (setup.seed, setup.cfg.seed), "key": setup.key, "corpus": setup.corpus,
            "tokenizer": tokens,
            "pi_ref": [p.tolist() for p in setup.ref.parameters()],
            "train prompts": train.prompts_of_split(setup, "train", 20)[0].tolist(),
            "evaluation prompts": train.evaluation_prompts(setup)[0].tolist(),
            "evaluation": train.reference_row(setup)}


def test_each_seed_has_a_corpus_a_tokenizer_a_pi_ref_and_prompts_of_its_own(tmp_path):
    """`prepare` gives every seed its own everything; the same seed gives the same.

    The second of --seeds is what --seed would give alone. No review of one seed's evaluation is a
    train review of that seed.
    """
    cfg = train.Config(reviews=200, vocab_size=300, max_tokens=8, layers=1, heads=1, width=4,
                       sft_epochs=1, prompts=20, eval_prompts=20)
    setups = []
    with contextlib.redirect_stdout(io.StringIO()):
        for folder, first, seed in (("a", 5, 5), ("a", 5, 6), ("b", 6, 6)):
            (tmp_path / folder).mkdir(exist_ok=True)
            stages = harness.Stages(tmp_path / folder, torch.distributed.HashStore())
            first_cfg = dataclasses.replace(cfg, seed=first)
            setups.append(train.prepare(first_cfg, seed, stages, "cpu"))
    five, six, six_alone = map(things_of_a_seed, setups)
    for name in five:
        assert six[name] == six_alone[name], f"{name} must not depend on the first of --seeds"
        assert five[name] != six[name], f"two seeds share the same {name}"
    for setup in setups[:2]:
        held_out = setup.corpus["test"] + setup.corpus["validation"]
        assert not set(held_out) & set(setup.corpus["train"]), "splits must be disjoint"
        assert set(setup.corpus["train"]) <= set(train.train_texts(setup)), "SFT sees all films"
    for split, texts in setups[0].corpus.items():
        others = set(setups[1].corpus[split])
        assert len(others & set(texts)) <= 1, f"two seeds share the reviews of {split}"
