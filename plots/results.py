"""What a run leaves behind: results.jsonl, optimum.json, failures.jsonl, preferences, the table, the figures; whether it can be true.

And what it reads again: preferences, exported or a user's own (`--pairs`).
"""
import json
import math
import os
import pathlib
import re
import statistics

import numpy
import torch

import data
import dpo
from plots import (SOLID, best_of_n, cost, degeneration, domains, frontier, gap, inside, judges, load_lines, overoptimisation, samples,
                   style, winrate)


def add_shares(rows: list[dict], optimum: dict) -> None:
    """Adds to each row the most that is possible at its KL, F, and the share of that gain that was attained.

    share = (E_pi[r] - E_ref[r]) / (F(KL) - E_ref[r]); its standard error moves reward and KL, each by its own. None for SFT and
    Best-of-1, whose gain is 0, and where the curve ends.
    """
    for row in rows:
        row.update(optimal_reward=None, share=None, share_se=None)
        if row["kl"] < 1e-6 or row["kl"] > max(optimum["kl"]):
            continue
        best, slope, _ = dpo.optimal_reward(row["kl"], optimum)
        gain = best - optimum["ref_reward"]
        share = (row["reward"] - optimum["ref_reward"]) / gain
        row.update(optimal_reward=best, share=share, share_se=math.hypot(row["reward_se"], share * slope * row["kl_se"]) / gain)


def solid_to(optimum: dict) -> float:
    """The KL, nats, up to which the optimum rests on enough effective samples."""
    return max((kl for kl, ess in zip(optimum["kl"], optimum["ess"]) if ess >= SOLID), default=0.)


def impossible(rows: list[dict], optimum: dict) -> list[dict]:
    """Rows above the optimum, where it is solid, by more than 4 standard errors: by Eq. 4 each is a bug, not a discovery."""
    found = []
    for row in (row for row in rows if row["optimal_reward"] is not None):
        best, slope, se = dpo.optimal_reward(row["kl"], optimum)
        noise = math.hypot(row["reward_se"], slope * row["kl_se"], se)
        if row["kl"] <= solid_to(optimum) and row["reward"] - best > 4 * noise:
            found.append(row)
    return found


def table(rows: list[dict]) -> str:
    """The finished policies, as text."""
    lines = [f"{'method':<14}{'setting':>8}{'seed':>5}{'KL':>8}{'+-':>6}{'reward':>8}{'+-':>6}{'share':>7}{'+-':>6}{'seconds':>9}"]
    for r in (row for row in rows if row["final"] and not (row["method"] in ("best_of_n", "best_of_n_gt") and row["setting"] not in (4, 16, 64))):
        share = f"{r['share']:>7.0%}{r['share_se']:>6.0%}" if r["share"] is not None else f"{'-':>7}{'-':>6}"
        lines.append(f"{r['method']:<14}{r['setting']:>8g}{r['seed']:>5}{r['kl']:>8.2f}{r['kl_se']:>6.2f}{r['reward']:>8.3f}"
                     f"{r['reward_se']:>6.3f}{share}{r['seconds']:>9.0f}")
    return "\n".join(lines)


def shares_at(rows: list[dict], method: str, kl: float) -> list[tuple[float, float]]:
    """For each seed the share of the optimal gain, and its standard error, at a KL of the method's own frontier: linear in KL between
    two finished policies, of which the farther is at most 4 times as far. A policy within a tenth of `kl` is near enough itself."""
    found = []
    for seed in sorted({row["seed"] for row in rows if row["method"] == method}):
        mine = sorted((r for r in rows if r["final"] and (r["method"], r["seed"]) == (method, seed) and r["share"] is not None), key=lambda r: r["kl"])
        low, high = [r for r in mine if r["kl"] <= kl * 1.1][-1:], [r for r in mine if r["kl"] >= kl / 1.1][:1]
        if low and high and high[0]["kl"] <= 4 * low[0]["kl"]:
            at = sorted(low + high, key=lambda r: r["kl"])
            found.append(tuple(float(numpy.interp(kl, [r["kl"] for r in at], [r[name] for r in at])) for name in ("share", "share_se")))
    return found


def table_of_shares(rows: list[dict], kls: tuple[float, ...] = (1., 2., 4.)) -> str:
    """Along each method's own frontier, as text: means over seeds and their standard errors, or one seed's own."""
    lines = ["share of the optimal gain at KL" + "".join(f"{kl:>14g}" for kl in kls) + "   along each method's own frontier, mean over seeds"]
    for method, (name, *_) in style(row["method"] for row in rows).items():
        cells = []
        for found in (shares_at(rows, method, kl) for kl in kls):
            share, own = zip(*found) if found else ((), ())
            error = statistics.stdev(share) / len(share) ** .5 if len(share) > 1 else sum(own)
            cells.append(f"{statistics.fmean(share):.1%} +- {error:.1%}" if found else "-")
        if set(cells) != {"-"}:
            lines.append(f"{name:<31}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def trained(out: pathlib.Path, methods) -> dict[str, list[float]]:
    """The settings at which each method's runs lie in a folder: the file of a run is method-setting-seedN.key.pt."""
    files = [path.name for path in out.glob("*-seed*.pt")]
    return {m: sorted({float(x[1]) for f in files if (x := re.match(rf"{m}-(\d+(?:\.\d+)?(?:e[-+]\d+)?)-seed\d+\.", f))}) for m in methods}


def write_lines(path: pathlib.Path, rows) -> None:
    """A row a line, as JSON, atomically."""
    partial = path.with_suffix(f".{os.getpid()}.partial")    # its own: two runs may write here at once
    try:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:    # a full disk has no file's name in its error
        raise data.UserError(f"cannot write {path}: {error.strerror}; make room, or choose another --out") from None
    os.replace(partial, path)


def describe(path: pathlib.Path, encoding, pairs: data.Preferences, judges: tuple) -> None:
    """Writes the preferences as text, in the field's standard columns, and prints what pi_ref is like."""
    before = ~pairs.mask & (pairs.mask.flip(1).cumsum(1).flip(1) > 0)    # the prompts
    ids = [[row[m].tolist() for row, m in zip(pairs.ids, some)] for some in (before, pairs.mask)]
    prompts, responses = ([encoding.decode([t for t in row if t != encoding.eot_token]) for row in rows] for rows in ids)
    write_lines(path, ({"prompt": prompts[w], "chosen": responses[w], "rejected": responses[l], "group": w // pairs.k,
                        "rows": [w % pairs.k, l % pairs.k], "ids": [ids[0][w], ids[1][w], ids[1][l]]}
                       for w, l in zip(pairs.winner.tolist(), pairs.loser.tolist())))
    texts, begun = [x + y for x, y in zip(prompts, responses)], set(prompts)
    reward, some, drawn = torch.tensor([data.sentiment(text) for text in texts]), texts[:1000], len(texts) * (pairs.k - 1) // 2
    again = sum(encoding.decode(row[:n]) in begun for row, n in zip(*(x.tolist() for x in judges))) / len(judges[0])
    print(f"completions: {sum(map(data.is_grammatical, some)) / len(some):.1%} of {len(some):,} are grammatical, reward "
          f"{reward.mean():.3f} +- {reward.std():.3f} (standard deviation); {len(pairs.winner):,} pairs, {drawn - len(pairs.winner):,} ties "
          f"dropped; {again:.0%} of the prompts that judge (prefixes of other reviews) are word for word prompts of the pairs too", flush=True)


# ------------------------------------------------------------------------------------ preferences of one's own, read again
KNOWN = set(re.findall(r"\w+", data.CLAUSE.pattern + data.REVIEW.pattern))    # the two patterns hold every word of the reviews


def is_known(text: str) -> bool:
    """Whether at least half of a text's words are words of the reviews; the last does not count, it may be cut off."""
    words = re.findall(r"\w+", text)
    words = words[:-1] or words
    return len(words) > 0 and 2 * sum(word in KNOWN for word in words) >= len(words)


def read_pairs(path: str) -> list[dict]:
    """Preferences of one's own: a JSON object a line, with `prompt`, `chosen`, `rejected`. Raises data.UserError that names the line.

    What a run exported also has `ids` (the tokens of the three), `group` and `rows` (which prompt, which of its completions).
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise data.UserError(f"--pairs: cannot read {path} as text ({error})") from None
    if not text:
        raise data.UserError(f"--pairs: {path} holds no pairs")
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):    # not splitlines(): JSON may hold what that splits at
        try:
            pair = json.loads(line)
            texts = [pair[name] for name in ("prompt", "chosen", "rejected")]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise data.UserError(f'{path}, line {number} is not a JSON object {{"prompt": ..., "chosen": ..., "rejected": ...}}') from None
        sampled = "ids" in pair    # a policy may answer anything, nothing at all included
        for wrong, why in (
                (not all(isinstance(text, str) and (text.strip() or sampled and i) for i, text in enumerate(texts)), "the three must be text, and not empty"),
                (texts[1] == texts[2] and not sampled, "chosen and rejected are the same: there is nothing to learn from them"),
                (not sampled and not all(map(is_known, map(str, texts))), "most words of a text are in no review: pi_ref cannot know them")):
            if wrong:
                raise data.UserError(f"{path}, line {number}: {why}")
        pairs.append(pair)
    return pairs


def encode_pairs(encoding, pairs: list[dict], max_tokens: int, path: str) -> data.Preferences:
    """`read_pairs` as tokens, `ref` still 0. Pairs of one `group` share completions, others stand alone.
    A prompt with fewer completions than others repeats its last. Raises data.UserError that names the line of `path`."""
    end, groups, ends = encoding.eot_token, {}, []    # group -> row -> (prompt, response)
    for number, pair in enumerate(pairs, 1):
        try:    # exact tokens where a text is still as it was exported, even if chosen and rejected were swapped since
            known = {encoding.decode([t for t in ids if t != end]): (ids, (row + 0,))
                     for ids, row in zip(pair.get("ids", []), [-1, *pair.get("rows", [])], strict="ids" in pair)}
            prompt = known[pair["prompt"]][0] if pair["prompt"] in known else encoding.encode_ordinary(pair["prompt"])
            fresh = [encoding.encode_ordinary(pair[name]) + [end] for name in ("chosen", "rejected")]
            two, rows = zip(*(known.get(pair[name], (ids, tuple(ids))) for name, ids in zip(("chosen", "rejected"), fresh)))
            group = pair.get("group", -number)
            assert all(groups.setdefault(group, {}).setdefault(row, (prompt, ids)) == (prompt, ids) for row, ids in zip(rows, two))
            ends.append((group, *rows))
        except AssertionError:
            raise data.UserError(f"{path}, line {number}: group {group} has other texts in an earlier line: two exports in one file?") from None
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
            raise data.UserError(f"{path}, line {number}: ids, group or rows are not as a run exports them") from None
        if len(prompt) + max(map(len, two)) > data.PROMPT + max_tokens:
            raise data.UserError(f"{path}, line {number}: {len(prompt) + max(map(len, two))} tokens do not fit into {data.PROMPT + max_tokens}: "
                            "shorten it, or take a larger --max-tokens")
    k = max(map(len, groups.values()))
    texts, place = [], {}
    for group, mine in groups.items():
        place.update({(group, row): len(texts) + i for i, row in enumerate(sorted(mine))})
        texts += [mine[row] for row in sorted(mine)]
        texts += texts[-1:] * (-len(texts) % k)
    ids, stop = data.pad([prompt + response for prompt, response in texts], end, data.PROMPT + max_tokens)
    columns, start = torch.arange(ids.shape[1]), torch.tensor([len(prompt) for prompt, _ in texts])
    mask = (columns >= start[:, None]) & (columns < stop[:, None])
    winner, loser = (torch.tensor([place[e[0], e[i]] for e in ends]) for i in (1, 2))
    order = (winner // k).argsort(stable=True)    # prompt by prompt, in whatever order the lines stand
    return data.Preferences(ids, mask, torch.zeros(len(ids)), winner[order], loser[order], k)


# ------------------------------------------------------------------------------------------------------- all of it, at last
DRAWN = {"frontier": frontier, "inside": inside}    # from results.jsonl and optimum.json: draw(rows, optimum, path)
MEASURED = {"winrate": winrate, "best_of_n": best_of_n, "overoptimisation": overoptimisation, "domains": domains, "judges": judges,
            "degeneration": degeneration, "samples": samples}    # the slowest first; from policies, by measure(lab, runs) -> rows: draw(rows, path)
RECKONED = {"cost": cost, "gap": gap}                                    # from rows, which measured.jsonl holds too: draw(rows, path)


def draw_all(out: pathlib.Path) -> list[str]:
    """Every figure for which a folder has results; their names."""
    rows, measured = load_lines(out / "results.jsonl"), load_lines(out / "measured.jsonl")
    optimum = json.loads((out / "optimum.json").read_text())
    for name, module in DRAWN.items():
        module.draw(rows, optimum, out / f"{name}.png")
    modules = {**MEASURED, **RECKONED}
    there = [name for name in modules if any(row["figure"] == name for row in measured)]
    for name in there:
        modules[name].draw([row for row in measured if row["figure"] == name], out / f"{name}.png")
    return [*DRAWN, *there]


def publish(out: pathlib.Path, rows: list[dict], runs: list[dict], optimum: dict, config: dict, measured: list[dict],
            seconds: dict[str, float]) -> int:
    """Write and draw all, the rows given and those of the runs; print the table and whatever is wrong. Returns the exit code.

    `seconds` are those of the stages, by name; without them the cost of what is there stays as it was reckoned.
    """
    made = {row["figure"] for row in measured}
    if load_lines(out / "optimum.json") == [optimum]:    # what an earlier command measured of this pi_ref stays
        measured = measured + [row for row in load_lines(out / "measured.jsonl") if row["figure"] not in made]
    best = [row for row in measured if row["figure"] == "best_of_n" and row["setting"] > 1]    # Best-of-1 is SFT
    rows = rows + [row for run in runs for row in run["rows"]] + best
    rows = [{**{name: x for name, x in row.items() if name != "figure"}, "config": config} for row in rows]
    order = list(style(row["method"] for row in rows))
    rows.sort(key=lambda row: order.index(row["method"]))
    failures = [run["failure"] for run in runs if run["failure"]]
    add_shares(rows, optimum)
    write_lines(out / "results.jsonl", rows)
    write_lines(out / "failures.jsonl", failures)
    write_lines(out / "optimum.json", [optimum])
    if seconds:
        measured = [row for row in measured if row["figure"] != "cost"] + cost.reckon(rows, optimum, seconds)
    write_lines(out / "measured.jsonl", measured)
    draw_all(out)
    print(table(rows), table_of_shares(rows), sep="\n\n")
    for failure in failures:
        print("FAILED: {method} {setting:g} seed {seed} at step {step}, its rows up to there are kept: {reason}".format(**failure))
    wrong = impossible(rows, optimum)
    for row in wrong:
        print("IMPOSSIBLE: {method} {setting:g} seed {seed} step {step}, reward {reward:.3f} at KL {kl:.2f}, is above the optimum "
              "{optimal_reward:.3f} by more than 4 standard errors: a bug in reward, KL or optimum".format(**row))
    print(f"{'No' if not wrong else len(wrong)} evaluation(s) of {len(rows)} above the optimum, which is solid to KL {solid_to(optimum):.2f} and dashed "
          f"beyond (fewer than {SOLID} effective samples); results and figures are in {out}")
    return 1 if failures or wrong else 0
