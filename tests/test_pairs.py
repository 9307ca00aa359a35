"""Preferences of one's own (`--pairs`): what a run exports can be read again, and a line that cannot be used is named."""
import json

import pytest
import torch

import data
from plots import results

TEXTS = ["I saw this film last night", ". The plot was superb.", ". The plot was not really dull, but the cast felt awful."]


@pytest.fixture(scope="module")
def encoding():
    return data.make_encoding(data.learn_ranks(data.write_corpus(400, 0)["train"][:100], 400))


def exported(path, encoding):
    """Two prompts that are equal, three completions each with their pairs, one completion twice, as `describe` writes them."""
    rows = [encoding.encode(TEXTS[0])[:4] + encoding.encode(text) + [encoding.eot_token] * ended
            for text, ended in ((TEXTS[1], 1), (TEXTS[2], 1), (TEXTS[1], 1), (" The", 0), (TEXTS[2], 1), ("", 1))]
    ids, stop = data.pad(rows, encoding.eot_token, 60)
    mask = (torch.arange(ids.shape[1]) >= 4) & (torch.arange(ids.shape[1]) < stop[:, None])
    pairs = data.Preferences(ids, mask, torch.zeros(6), torch.tensor([0, 1, 3, 4, 5]), torch.tensor([1, 2, 4, 5, 3]), 3)
    results.describe(path, encoding, pairs, (ids[:1, :8], torch.tensor([2])))
    return pairs


def sides(encoding, pairs):
    """The pairs as tokens: (chosen, rejected), each a list of response ids."""
    row = lambda i: pairs.ids[i][pairs.mask[i]].tolist()
    return [(row(w), row(l)) for w, l in zip(pairs.winner, pairs.loser)]


def test_exported_preferences_are_read_back_token_for_token(encoding, tmp_path):
    """ids, masks, groups and pairs are those that were written, whatever tokens spell the same text."""
    pairs = exported(tmp_path / "p.jsonl", encoding)
    again = results.encode_pairs(encoding, results.read_pairs(tmp_path / "p.jsonl"), 60, "p.jsonl")
    width = pairs.ids.shape[1]
    assert torch.equal(again.mask[:, :width], pairs.mask) and torch.equal(again.ids[:, :width][pairs.mask], pairs.ids[pairs.mask])
    assert torch.equal(again.winner, pairs.winner) and torch.equal(again.loser, pairs.loser) and again.k == pairs.k


def test_labels_that_are_flipped_in_the_file_are_flipped_in_training(encoding, tmp_path):
    """Chosen and rejected swapped as text alone, the rest of the line left as it was: winner and loser change places."""
    pairs = exported(tmp_path / "p.jsonl", encoding)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    flipped = [{**line, "chosen": line["rejected"], "rejected": line["chosen"]} for line in lines]
    again = results.encode_pairs(encoding, flipped, 60, "p.jsonl")
    assert sides(encoding, again) == [(l, w) for w, l in sides(encoding, pairs)]


def test_plain_pairs_are_tokenised_with_an_end(encoding, tmp_path):
    """Three columns alone: each response ends, and each pair stands alone."""
    lines = [dict(zip(("prompt", "chosen", "rejected"), texts)) for texts in
             ((TEXTS[0], TEXTS[1], TEXTS[2]), (TEXTS[0], TEXTS[1], ". The cast was fine."), ("We watched a thriller", TEXTS[2], TEXTS[1]))]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = results.encode_pairs(encoding, results.read_pairs(tmp_path / "p.jsonl"), 60, "p.jsonl")
    assert (pairs.k, len(pairs.ids)) == (2, 6)
    expected = [tuple(encoding.encode(line[name]) + [encoding.eot_token] for name in ("chosen", "rejected")) for line in lines]
    assert sides(encoding, pairs) == expected


def test_lines_may_stand_in_any_order(encoding, tmp_path):
    """An export sorted otherwise: the same pairs, those of a prompt still together, as batches need them."""
    pairs = exported(tmp_path / "p.jsonl", encoding)
    again = results.encode_pairs(encoding, results.read_pairs(tmp_path / "p.jsonl")[::-1], 60, "p.jsonl")
    assert sorted(sides(encoding, again)) == sorted(sides(encoding, pairs)) and (again.winner // again.k).diff().min() >= 0


def test_two_exports_in_one_file_are_refused(encoding, tmp_path):
    """Both number their prompts from 0, with other texts."""
    exported(tmp_path / "p.jsonl", encoding)
    line = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    other = {**line, "ids": [line["ids"][0], line["ids"][2], line["ids"][1]], "chosen": line["rejected"], "rejected": line["chosen"]}
    with pytest.raises(data.UserError, match="line 2.*two exports"):
        results.encode_pairs(encoding, [line, other], 60, "p.jsonl")


GOOD = dict(zip(("prompt", "chosen", "rejected"), TEXTS))
BAD_LINES = {
    "{": "not a JSON object", "[1, 2]": "not a JSON object", "null": "not a JSON object", '{"prompt": "I saw"}': "not a JSON object",
    json.dumps({**GOOD, "chosen": ""}): "not empty", json.dumps({**GOOD, "prompt": "  "}): "not empty", json.dumps({**GOOD, "rejected": 3}): "must be text",
    json.dumps({**GOOD, "chosen": TEXTS[2]}): "the same", json.dumps({**GOOD, "chosen": "qwert zxcv uiop"}): "in no review",
    json.dumps({**GOOD, "prompt": "\u2603\u2603"}): "in no review", "": "not a JSON object", "[" * 100_000: "not a JSON object"}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_cannot_be_used_is_named(line, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join([json.dumps(GOOD), line, json.dumps(GOOD)]))
    with pytest.raises(data.UserError, match="p.jsonl, line 2") as error:
        results.read_pairs(tmp_path / "p.jsonl")
    assert BAD_LINES[line] in str(error.value)


@pytest.mark.parametrize("extra", [{"ids": 3, "rows": [0, 1]}, {"ids": [[1], [2]], "rows": [0, 1]}, {"ids": [[10**9], [1], [2]], "rows": [0, 1]},
                                   {"ids": [[-1], [1], [2]], "rows": [0, 1]}, {"ids": [["a"], [1], [2]], "rows": [0, 1]},
                                   {"ids": [[1], [2], [3]], "rows": "ab"}, {"ids": [[1], [2], [3]]}, {"group": []}, {"chosen": TEXTS[1] * 60}])
def test_a_pair_that_cannot_be_encoded_is_named(extra, encoding):
    """Columns of an export that were spoilt, or a text that does not fit."""
    with pytest.raises(data.UserError, match="line 2"):
        results.encode_pairs(encoding, [GOOD, {**GOOD, **extra}], 60, "p.jsonl")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", None])
def test_a_file_without_pairs_is_refused(content, tmp_path):
    path = tmp_path / "p.jsonl"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(data.UserError, match="p.jsonl"):
        results.read_pairs(path)
