"""What a run leaves behind: results.jsonl, optimum.json, failures.jsonl, the table, the figures; and whether it can be true."""
import json
import math
import os
import pathlib
import re

import torch

import data
import dpo
from plots import SOLID, frontier, style


def add_shares(rows: list[dict], optimum: dict) -> None:
    """Adds to each row the most that is possible at its KL, F, and the share of that gain that was attained.

    share = (E_pi[r] - E_ref[r]) / (F(KL) - E_ref[r]); its standard error moves reward and KL, each by its own. None for SFT, whose
    gain is 0, and where the curve ends.
    """
    for row in rows:
        row.update(optimal_reward=None, share=None, share_se=None)
        if row["method"] == "sft" or row["kl"] > max(optimum["kl"]):
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
    for r in (row for row in rows if row["final"]):
        share = f"{r['share']:>7.0%}{r['share_se']:>6.0%}" if r["share"] is not None else f"{'-':>7}{'-':>6}"
        lines.append(f"{r['method']:<14}{r['setting']:>8g}{r['seed']:>5}{r['kl']:>8.2f}{r['kl_se']:>6.2f}{r['reward']:>8.3f}"
                     f"{r['reward_se']:>6.3f}{share}{r['seconds']:>9.0f}")
    return "\n".join(lines)


def trained(out: pathlib.Path, methods) -> dict[str, list[float]]:
    """The settings at which each method's runs lie in a folder: the file of a run is method-setting-seedN.key.pt."""
    files = [path.name for path in out.glob("*-seed*.pt")]
    return {m: sorted({float(x[1]) for f in files if (x := re.match(rf"{m}-([^-]+(?:e-\d+)?)-seed\d+\.", f))}) for m in methods}


def write_lines(path: pathlib.Path, rows) -> None:
    """A row a line, as JSON, atomically."""
    path.with_suffix(".partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(path.with_suffix(".partial"), path)


def describe(path: pathlib.Path, encoding, pairs: data.Preferences, judges: tuple) -> None:
    """Writes the preferences as text, in the field's standard columns, and prints what pi_ref is like."""
    texts = data.decode(encoding, pairs.ids, pairs.mask)
    prompts = data.decode(encoding, pairs.ids, ~pairs.mask & (pairs.mask.flip(1).cumsum(1).flip(1) > 0))
    write_lines(path, ({"prompt": prompts[w], "chosen": texts[w][len(prompts[w]):], "rejected": texts[l][len(prompts[l]):]}
                       for w, l in zip(pairs.winner.tolist(), pairs.loser.tolist())))
    reward, some = torch.tensor([data.sentiment(text) for text in texts]), texts[:1000]
    all_pairs, begun = len(texts) * (pairs.k - 1) // 2, set(prompts)
    again = sum(encoding.decode(row[:n]) in begun for row, n in zip(*(x.tolist() for x in judges))) / len(judges[0])
    print(f"pi_ref: {sum(map(data.is_grammatical, some)) / len(some):.1%} of {len(some):,} responses are grammatical, reward "
          f"{reward.mean():.3f} +- {reward.std():.3f} (standard deviation); {len(pairs.winner):,} pairs, {all_pairs - len(pairs.winner):,} "
          f"ties dropped; {again:.0%} of the prompts that judge (prefixes of other reviews) are word for word prompts of the pairs too", flush=True)


def publish(out: pathlib.Path, rows: list[dict], runs: list[dict], optimum: dict, config: dict) -> int:
    """Write and draw all, the rows given and those of the runs; print the table and whatever is wrong. Returns the exit code."""
    rows = [{**row, "config": config} for row in rows + [row for run in runs for row in run["rows"]]]
    order = list(style(row["method"] for row in rows))
    rows.sort(key=lambda row: order.index(row["method"]))
    failures = [run["failure"] for run in runs if run["failure"]]
    add_shares(rows, optimum)
    write_lines(out / "results.jsonl", rows)
    write_lines(out / "failures.jsonl", failures)
    write_lines(out / "optimum.json", [optimum])
    frontier.draw(rows, optimum, out / "frontier.png")
    print(table(rows))
    for failure in failures:
        print("FAILED: {method} {setting:g} seed {seed} at step {step}, its rows up to there are kept: {reason}".format(**failure))
    wrong = impossible(rows, optimum)
    for row in wrong:
        print("IMPOSSIBLE: {method} {setting:g} seed {seed} step {step}, reward {reward:.3f} at KL {kl:.2f}, is above the optimum "
              "{optimal_reward:.3f} by more than 4 standard errors: a bug in reward, KL or optimum".format(**row))
    print(f"{'No' if not wrong else len(wrong)} evaluation(s) of {len(rows)} above the optimum, which is solid to KL {solid_to(optimum):.2f} and dashed "
          f"beyond (fewer than {SOLID} effective samples); results and figures are in {out}")
    return 1 if failures or wrong else 0
