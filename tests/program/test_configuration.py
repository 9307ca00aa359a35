"""The configuration of train.py: its fields, its presets, and sizes that do not fit together."""
import dataclasses
import pathlib
import re

import pytest

import harness
import train

ROOT = pathlib.Path(train.__file__).parent


def test_every_field_of_the_configuration_is_read():
    """The code of the experiment reads every field: a flag without effect would mislead."""
    code = "".join((ROOT / name).read_text("utf-8")
                   for name in ("train.py", "ppo.py", "plots/__init__.py", "plots/frontier.py"))
    unread = [field.name for field in dataclasses.fields(train.Config)
              if not re.search(rf"cfg\.{field.name}\b", code)]
    assert not unread, f"no code reads {unread}"


def test_the_presets_are_valid():
    """Every preset passes the checks of the command line."""
    for preset in train.PRESETS:
        cfg, _ = harness.read_flags(["--preset", preset], train.Config, train.PRESETS, "")
        train.check_config(cfg)
        assert cfg.prompts > 0


def test_every_value_of_a_preset_can_be_given_as_a_flag():
    """Each default and each value of a preset is within the bounds of its own flag."""
    for preset, fields in train.PRESETS.items():
        expected = train.Config(**fields)
        argv = []
        for name, value in vars(expected).items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            argv += [f"--{name.replace('_', '-')}", text]
        cfg, _ = harness.read_flags(argv, train.Config, train.PRESETS, "")
        assert cfg == expected, f"the preset {preset} cannot be given by flags"


def test_counts_begin_at_one_unless_there_is_a_reason():
    """The smallest value that each flag accepts, by reason."""
    smallest = {"seed": 0, "preferred_runs": 0, "optimum_fits": 0,   # may be none
                "completions": 2, "ppo_batch": 2, "eval_prompts": 2,    # a pair; two for a spread
                "reviews": 50, "vocab_size": 300, "optimum_samples": 16}    # to mean anything
    for field in dataclasses.fields(train.Config):
        if field.type is int:
            assert field.metadata["low"] == smallest.get(field.name, 1), field.name


def test_the_paper_preset_has_the_papers_sizes():
    """25,000 prompts, 4 completions, alphas, deterministic labels, 3 epochs (Section 6, App. C)."""
    cfg, _ = harness.read_flags(["--preset", "paper"], train.Config, train.PRESETS, "")
    assert (cfg.prompts, cfg.completions, cfg.labels, cfg.rounds) == (25_000, 4, "deterministic", 1)
    assert cfg.alphas == (.05, .1, .5, 1.) and cfg.rm_epochs == 3
    assert len(cfg.betas) == len(cfg.kl_targets) == 4, "the paper has four betas and four targets"


def listed(numbers) -> str:
    """Numbers as the documents write them: "1, .7"."""
    return ", ".join(f"{x:g}".removeprefix("0") for x in numbers)


def test_the_documents_state_the_sizes_of_the_presets():
    """plots/README.md compares the paper's sizes with those of both runs of ours."""
    default, paper = (train.Config(**train.PRESETS[name]) for name in ("default", "paper"))
    gpt = train.new_gpt(default, "cpu")
    parameters = round(sum(p.numel() for p in gpt.parameters()), -3)
    pairs = default.completions * (default.completions - 1) // 2
    sentences = [
        f"{paper.prompts:,} prompts x {paper.completions} completions, {pairs} pairs each",
        f"the same (default run: {default.prompts:,} prompts)",
        f"{default.layers} layers, width {default.width}, rotary positions: {parameters:,} param",
        f"beta {listed(paper.betas)} (default run: {listed(default.betas)})",
        f"target KL {listed(paper.kl_targets)}, which",
        f"{paper.ppo_steps} batches of {paper.ppo_batch} episodes (default run: "
        f"{listed(default.kl_targets)} and {default.ppo_steps} batches)",
        f"Adam, {1e4 * paper.lr:g}e-4 (default run: {1e4 * default.lr:g}e-4), batch of "
        f"{default.batch_prompts * pairs} pairs, beta2 {listed([default.adam_beta2])} (also PPO's)",
        f"{default.reviews:,} train reviews ({.8 * default.reviews:,.0f} of films, "
        f"{.2 * default.reviews:,.0f} of restaurants), {default.sft_epochs} epochs, batch "
        f"{default.sft_batch}, Adam, {1e3 * default.sft_lr:g}e-3; a vocabulary of "
        f"{default.vocab_size} tokens, responses of at most {default.max_tokens} tokens",
        f"| {default.rm_epochs} epochs, the best kept | the same, Adam, {1e3 * default.rm_lr:g}e-3",
        f"{default.ppo_epochs} epoch over minibatches of {default.ppo_minibatch} episodes, Adam, "
        f"{1e3 * default.ppo_lr:g}e-3; the KL coefficient starts at "
        f"{listed([default.ppo_init_kl_coef])} / target; horizon {default.ppo_horizon:,} episodes",
        f"{default.evaluations} times a run, {paper.eval_prompts} prompts x "
        f"{paper.eval_samples} responses, during training {paper.eval_samples // 4} (default run: "
        f"{default.eval_prompts} prompts x {default.eval_samples} and {default.eval_samples // 4}"
        "); the optimum "
        f"from {paper.optimum_samples} responses of each policy to each prompt (default run: "
        f"{default.optimum_samples})",
        f"with `--labels bt` tau is {listed([default.tau])}"]
    text = (ROOT / "plots/README.md").read_text("utf-8")
    assert not [sentence for sentence in sentences if sentence not in text]
    assert set(paper.alphas) - set(default.alphas) == {.05}, "the same (default run: not .05)"
    assert set(default.alphas) < set(paper.alphas)
    assert (default.epochs, default.preferred_runs, default.seed) == (1, 1, 0)


def needed_memory(cfg) -> int:
    """Bytes: weights, gradients, Adam's two moments, pi_ref in float32; token ids and mask."""
    block = 12 * cfg.width ** 2    # attention 4 W^2, MLP 8 W^2
    parameters = cfg.layers * block + cfg.vocab_size * cfg.width
    tokens = cfg.prompts * cfg.completions * cfg.max_tokens
    return 5 * 4 * parameters + (8 + 1) * tokens


@pytest.mark.parametrize("at_limit, beyond", [
    ({"reviews": 100, "prompts": 80, "eval_prompts": 10}, {"prompts": 81}),
    ({"reviews": 100, "prompts": 80, "eval_prompts": 10}, {"eval_prompts": 11}),
    ({"prompts": 20, "rounds": 20}, {"rounds": 21}),
    ({"heads": 3, "width": 66}, {"width": 67}),
    ({"completions": 3, "ppo_batch": 21}, {"ppo_batch": 22}),
], ids=lambda fields: ",".join(fields))
def test_sizes_at_their_limits_are_accepted_and_one_more_is_refused(at_limit, beyond):
    """The message names the flag whose value is too large."""
    cfg = train.Config(**at_limit)
    train.check_config(cfg)
    [name] = beyond
    with pytest.raises(harness.UserError, match=f"--{name.replace('_', '-')}"):
        train.check_config(dataclasses.replace(cfg, **beyond))


def test_sizes_need_the_memory_of_their_weights_and_tokens(monkeypatch):
    """Exactly enough memory is accepted; a byte less is refused."""
    cfg = train.Config(layers=3, width=10, heads=2, vocab_size=321, prompts=37, completions=2)
    monkeypatch.setattr(harness, "total_memory", lambda: needed_memory(cfg))
    train.check_config(cfg)
    monkeypatch.setattr(harness, "total_memory", lambda: needed_memory(cfg) - 1)
    with pytest.raises(harness.UserError, match="GB of memory"):
        train.check_config(cfg)
