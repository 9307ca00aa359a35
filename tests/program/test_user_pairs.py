"""Preferences of one's own (--pairs): an export is read back exactly, an unusable line is named."""
import json

import pytest
import torch

import data
import harness
import model
import train

TEXTS = ["This western: the acting was fine", ". The plot was superb.",
         ". The plot was not really dull, but the cast felt awful."]
MAX_TOKENS = 60    # longest response


def preference(prompt, chosen, rejected):
    """One line of a file of preferences, with the three columns that are required."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


PLAIN_PAIR = preference(*TEXTS)


@pytest.fixture(scope="module")
def encoding():
    corpus = data.write_corpus(400, 0)
    return data.make_encoding(data.learn_ranks(corpus["train"][:100], 400))


@pytest.fixture(scope="module")
def encoding_of_another_seed():
    return data.make_encoding(data.learn_ranks(data.write_corpus(400, 1)["train"][:100], 400))


def make_preferences(encoding):
    """Preferences over two equal prompts with three completions each.

    One completion occurs twice, one is cut off (it has no end token), and one is empty.
    """
    prompt = encoding.encode(TEXTS[0])[:4]
    end = [encoding.eot_token]
    plot, plot_and_cast = encoding.encode(TEXTS[1]), encoding.encode(TEXTS[2])
    rows = [prompt + plot + end, prompt + plot_and_cast + end, prompt + plot + end,
            prompt + encoding.encode(" The"), prompt + plot_and_cast + end, prompt + end]
    ids, stop = data.pad(rows, encoding.eot_token, MAX_TOKENS)
    columns = torch.arange(ids.shape[1])
    mask = (columns >= len(prompt)) & (columns < stop[:, None])
    winner, loser = torch.tensor([0, 1, 3, 4, 5]), torch.tensor([1, 2, 4, 5, 3])
    return data.Preferences(ids, mask, torch.zeros(6), winner, loser, k=3)


def export(path, encoding):
    """Write `make_preferences` to a file as a run does, and return them."""
    preferences = make_preferences(encoding)
    harness.write_jsonl(path, harness.export_preferences(encoding, preferences))
    return preferences


def encode(encoding, pairs):
    """A list of preferences as tokens."""
    return harness.encode_pairs(encoding, pairs, MAX_TOKENS, "p.jsonl")


def responses(preferences):
    """(chosen, rejected) of each pair, as lists of response ids."""
    rows = [ids[mask].tolist() for ids, mask in zip(preferences.ids, preferences.mask)]
    return [(rows[w], rows[l]) for w, l in zip(preferences.winner, preferences.loser)]


def prompts(preferences):
    """The prompt of each pair's winner, as a list of ids."""
    rows = [ids[:mask.int().argmax()].tolist() for ids, mask
            in zip(preferences.ids, preferences.mask)]
    return [rows[w] for w in preferences.winner]


# --------------------------------------------------------------------------- pairs that can be used
def test_exported_preferences_are_read_back_token_for_token(encoding, tmp_path):
    """Prompts, responses and pairs are those of the export, whatever tokens spell the same text.

    Pairs of a prompt share completions: 2 different ones for the first prompt, 3 for the second.
    """
    exported = export(tmp_path / "p.jsonl", encoding)
    loaded = encode(encoding, harness.read_pairs(tmp_path / "p.jsonl"))
    assert responses(loaded) == responses(exported)
    assert prompts(loaded) == prompts(exported)
    assert (loaded.k, len(loaded.ids)) == (3, 6)
    assert (loaded.winner // 3).tolist() == (exported.winner // 3).tolist()


def test_labels_that_are_flipped_in_the_file_are_flipped_in_training(encoding, tmp_path):
    """If only the texts of chosen and rejected are swapped, winner and loser change places."""
    exported = export(tmp_path / "p.jsonl", encoding)
    lines = harness.read_jsonl(tmp_path / "p.jsonl")
    flipped = [{**line, "chosen": line["rejected"], "rejected": line["chosen"]} for line in lines]
    expected = [(loser, winner) for winner, loser in responses(exported)]
    assert responses(encode(encoding, flipped)) == expected


def test_plain_pairs_are_tokenised_with_an_end(encoding, tmp_path):
    """With the three columns only, each response has an end token, and each pair is a group."""
    lines = [preference(TEXTS[0], TEXTS[1], TEXTS[2]),
             preference(TEXTS[0], TEXTS[1], ". The cast was fine."),
             preference("My short film", TEXTS[2], TEXTS[1])]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    preferences = encode(encoding, harness.read_pairs(tmp_path / "p.jsonl"))
    assert (preferences.k, len(preferences.ids)) == (2, 6)
    end = [encoding.eot_token]
    expected = [(encoding.encode(line["chosen"]) + end, encoding.encode(line["rejected"]) + end)
                for line in lines]
    assert responses(preferences) == expected


def test_the_reference_log_probabilities_become_part_of_the_preferences(tmp_path):
    """`train.prepare` scores the responses of a user's pairs with pi_ref."""
    cfg = train.Config(reviews=200, vocab_size=300, layers=1, heads=1, width=4, sft_epochs=1,
                       prompts=20, eval_prompts=20)
    stages = harness.Stages(tmp_path, torch.distributed.HashStore())
    setup = train.prepare(cfg, 5, stages, "cpu", [PLAIN_PAIR], "p.jsonl")
    pairs = setup.user_pairs
    expected = model.sequence_logp(setup.ref(pairs.ids), pairs.ids, pairs.mask)
    torch.testing.assert_close(pairs.ref_logp, expected)


def test_lines_may_stand_in_any_order(encoding, tmp_path):
    """An export in another order gives the same pairs, and those of a prompt are consecutive.

    Batches need them consecutive. The orders are reversed, and mixed between the two prompts.
    """
    exported = export(tmp_path / "p.jsonl", encoding)
    lines = harness.read_pairs(tmp_path / "p.jsonl")
    for order in ([4, 3, 2, 1, 0], [3, 0, 4, 1, 2]):
        loaded = encode(encoding, [lines[i] for i in order])
        assert sorted(responses(loaded)) == sorted(responses(exported))
        groups = loaded.winner // loaded.k
        assert groups.diff().min() >= 0, f"pairs of a prompt are not consecutive: {groups.tolist()}"


def test_two_exports_in_one_file_stay_apart(encoding, tmp_path):
    """Two exports both number their prompts from 0: other prompts of a number are other groups."""
    export(tmp_path / "p.jsonl", encoding)
    line = harness.read_jsonl(tmp_path / "p.jsonl")[0]
    loaded = encode(encoding, [line, {**line, "prompt": "This western"}])
    assert (loaded.winner // loaded.k).tolist() == [0, 1]
    assert prompts(loaded) == [encoding.encode(line["prompt"]), encoding.encode("This western")]
    assert responses(loaded)[0] == responses(loaded)[1]


# ------------------------------------------------------------------------ pairs that cannot be used
BAD_LINES = {    # line: words of the error
    "{": "not a JSON object",
    "[1, 2]": "not a JSON object",
    "null": "not a JSON object",
    '{"prompt": "This western"}': "not a JSON object",
    json.dumps({**PLAIN_PAIR, "chosen": ""}): "is empty",
    json.dumps({**PLAIN_PAIR, "prompt": "  "}): "not empty",
    json.dumps({**PLAIN_PAIR, "rejected": 3}): "must be text",
    json.dumps({**PLAIN_PAIR, "chosen": TEXTS[2]}): "the same",
    json.dumps({**PLAIN_PAIR, "chosen": "qwert zxcv uiop"}): "in no review",
    json.dumps({**PLAIN_PAIR, "prompt": "\u2603\u2603"}): "in no review",
    json.dumps({**PLAIN_PAIR, "prompt": "This western: the plot felt", "chosen": "clumsy."}):
        "needs a space",
    "": "not a JSON object",
    "[" * 100_000: "not a JSON object"}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_cannot_be_used_is_named(line, tmp_path):
    """The error names the file, the line and the reason."""
    good_line = json.dumps(PLAIN_PAIR)
    (tmp_path / "p.jsonl").write_text("\n".join([good_line, line, good_line]))
    with pytest.raises(harness.UserError, match="p.jsonl, line 2") as error:
        harness.read_pairs(tmp_path / "p.jsonl")
    assert BAD_LINES[line] in str(error.value)


def test_tokens_of_another_tokenizer_are_refused(encoding, encoding_of_another_seed, tmp_path):
    """Each seed has its own tokenizer: the tokens of an export spell other texts with another."""
    export(tmp_path / "p.jsonl", encoding)
    pairs = harness.read_pairs(tmp_path / "p.jsonl")
    with pytest.raises(harness.UserError, match="--seed"):
        encode(encoding_of_another_seed, pairs)


def test_a_plain_text_need_not_survive_the_tokenizer(encoding):
    """Half of a surrogate pair has no tokens of its own; a text without tokens may contain it."""
    pair = {**PLAIN_PAIR, "chosen": ". The plot was superb \ud800."}
    assert len(encode(encoding, [pair]).winner) == 1


BAD_COLUMNS = [
    {"prompt_ids": 3},
    {"prompt_ids": {TEXTS[0]: 3}},
    {"prompt_ids": {TEXTS[0]: [10**9]}},
    {"response_ids": []},
    {"response_ids": {TEXTS[1]: [-1]}},
    {"response_ids": {TEXTS[1]: ["a"]}},
    {"response_ids": {TEXTS[2]: "ab"}},
    {"response_ids": None},
    {"group": []},
    {"chosen": TEXTS[1] * 60}]    # too long


@pytest.mark.parametrize("columns", BAD_COLUMNS)
def test_a_pair_that_cannot_be_encoded_is_named(columns, encoding):
    """The error names a line with damaged columns of an export, or with too long a text."""
    with pytest.raises(harness.UserError, match="line 2"):
        encode(encoding, [PLAIN_PAIR, {**PLAIN_PAIR, **columns}])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", None])
def test_a_file_without_pairs_is_refused(content, tmp_path):
    """An empty file, a file that is not UTF-8, and a folder (content None) are refused."""
    path = tmp_path / "p.jsonl"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(harness.UserError, match="p.jsonl"):
        harness.read_pairs(path)
