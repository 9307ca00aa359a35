"""A small experiment in memory for the tests of train.py: no files, no workers, four sentences.

The tokens are those of world.py. Every token but END is a sentence, so the true reward of a text is
known without the code under test.

    setup = fake_setup(ref=world.gpt(seed=1), corpus={"train": reviews(5, seed=1)}, lr=.01)

A setup belongs to one seed, as in train.py. Setups of several seeds may share their stages.
"""
import math
from types import SimpleNamespace

import torch

import train
import world

SEED = 3    # of every setup, unless another is given
SENTENCES = ["The plot was superb. ", "The cast was dull. ", "The score was fine. ", "Well then. "]
VALENCES = {0: 3., 1: -2., 2: 1.}    # token -> valence of its opinion; "Well then" is no opinion


class Tokenizer:
    """A tokenizer whose tokens 0 to 3 are the sentences; END ends a text."""
    eot_token = world.END

    def encode(self, text):
        """Return the tokens of a text made of the sentences."""
        return [SENTENCES.index(f"{sentence}. ") for sentence in text.split(". ")[:-1]]

    def decode(self, ids):
        """Return the text of tokens without END."""
        return "".join(SENTENCES[token] for token in ids)


class Stages:
    """Stages in memory: each is computed once. `watched` are the rows of the runs in the making."""
    def __init__(self):
        self.values = {}
        self.watched = []

    def get(self, stage):
        """Return the value of a stage."""
        key = stage.function, stage.setup.seed, stage.arguments
        if key not in self.values:
            self.values[key] = stage.function(stage.setup, *stage.arguments)
        return self.values[key]

    def get_all(self, stages):
        """Return the values of several stages."""
        return [stage.value for stage in stages]

    def on_row(self, row):
        """Record a row of a run that is not finished yet."""
        self.watched.append(row)


class FakePolicy:
    """A stage of `train.train_policy` whose value is there: a run with its last checkpoint."""
    def __init__(self, method="dpo", setting=1., seed=SEED, failure=None, state=None):
        self.setup = SimpleNamespace(seed=seed)
        self.value = {"method": method, "setting": setting, "seed": seed, "failure": failure,
                      "rows": [], "checkpoints": [{"no": "parameters"}, state]}


def fake_setup(ref=None, corpus=None, preferences=None, **fields):
    """Return a setup with this pi_ref, these reviews, and a user's preferences if given.

    `fields` are the fields of the configuration that are not the default; `seed` among them is the
    seed of the setup.
    """
    cfg = train.Config(**{"seed": SEED, **fields})
    return train.Setup(cfg, cfg.seed, Stages(), "cpu", key="fake", encoding=Tokenizer(),
                       corpus=corpus, ref=ref, user_pairs=preferences)


def reviews(count, seed):
    """Return `count` random reviews of 8 to 10 sentences, most of them without an opinion."""
    generator = world.generator(seed)
    texts = []
    for _ in range(count):
        length = int(torch.randint(8, 11, (), generator=generator))
        tokens = torch.randint(0, 9, (length,), generator=generator).clamp(max=3).tolist()
        texts.append("".join(SENTENCES[token] for token in tokens))
    return texts


def true_reward(tokens):
    """Return sigma(mean valence) of the opinions among these tokens; .5 if there is none.

    Each opinion counts once.
    """
    valences = [VALENCES[token] for token in set(tokens) if token in VALENCES]
    if not valences:
        return .5
    return 1 / (1 + math.exp(-sum(valences) / len(valences)))


def numbers(values):
    """Return a list of numbers as a tensor in float64, as world.agree compares them."""
    return torch.tensor(values, dtype=torch.float64)
