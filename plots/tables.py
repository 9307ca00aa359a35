"""The tables printed beside the figures, and the checks of results against the optimum."""
import math
import statistics

import numpy
import torch
from torch import Tensor

import data
import dpo
from plots import BEST_OF_N, MIN_ESS, reliable_kl, styles_of


def optimum_of(optimum: dict, seed: int) -> dict:
    """The optimum of one seed, from the mean over seeds that holds it."""
    return optimum["seeds"][str(seed)]


def add_shares(rows: list[dict], optimum: dict) -> None:
    """Add to each row `optimal_reward`, the optimum of its seed at its KL, and the `share`.

    They are None at KL 0 (SFT), where the optimal gain is 0, and beyond the end of the curve.
    """
    for row in rows:
        row.update(optimal_reward=None, share=None, share_se=None)
        curve = optimum_of(optimum, row["seed"])
        if 1e-6 <= row["kl"] <= max(curve["kl"]):
            optimal, share, share_se = dpo.share_of_optimal_gain(
                row["reward"], row["reward_se"], row["kl"], row["kl_se"], curve)
            row.update(optimal_reward=optimal, share=share, share_se=share_se)


def above_optimum(rows: list[dict], optimum: dict) -> list[dict]:
    """Rows above the reliable part of the optimum by more than 4 standard errors.

    By Eq. 4 no policy can be there: each such row is a bug, not a discovery.
    """
    found = []
    for row in rows:
        curve = optimum_of(optimum, row["seed"])
        if row["optimal_reward"] is None or row["kl"] > reliable_kl(curve):
            continue
        optimal, slope, optimum_se = dpo.optimal_reward(row["kl"], curve)
        noise = math.hypot(row["reward_se"], slope * row["kl_se"], optimum_se)
        if row["reward"] - optimal > 4 * noise:
            found.append(row)
    return found


def finish_rows(rows: list[dict], measured: list[dict], optimum: dict, config: dict) -> list[dict]:
    """The rows of results.jsonl: those of SFT and training, with Best-of-N, shares and config."""
    for row in measured:
        if row["figure"] == "best_of_n" and row["setting"] > 1:    # Best-of-1 is SFT
            rows = rows + [{name: x for name, x in row.items() if name != "figure"}]
    rows = [{**row, "config": config} for row in rows]
    methods = list(styles_of(row["method"] for row in rows))    # in the order of the legend
    rows.sort(key=lambda row: methods.index(row["method"]))
    add_shares(rows, optimum)
    return rows


def share_cells(row: dict) -> str:
    """The cells "share" and "+-" of a table, 13 characters; dashes if the share is not known."""
    if row["share"] is None:
        return f"{'-':>7}{'-':>6}"
    return f"{row['share']:>7.0%}{row['share_se']:>6.0%}"


def print_row(row: dict, steps: int) -> None:
    """Print a row of results, and how many seconds of training are left."""
    names = ("method", "setting", "seed", "step", "final", "seconds")
    numbers = {name: x for name, x in row.items() if name not in names and not name.endswith("_se")}
    left = row["seconds"] / row["step"] * (steps - row["step"])
    print("{method} {setting:g} seed {seed}, step {step}".format(**row),
          f"of {steps}, {row['seconds']:.0f} s, about {left:.0f} s left:",
          *(f"{name} {x:.3g} " for name, x in numbers.items()), flush=True)


def table_of_policies(rows: list[dict]) -> str:
    """The finished policies; of Best-of-N only N = 4, 16 and 64."""
    lines = [f"{'method':<14}{'setting':>8}{'seed':>5}{'KL':>8}{'+-':>6}{'reward':>8}{'+-':>6}"
             f"{'share':>7}{'+-':>6}{'seconds':>9}"]
    for row in rows:
        is_best_of_n = row["method"] in BEST_OF_N
        if not row["final"] or (is_best_of_n and row["setting"] not in (4, 16, 64)):
            continue
        lines.append(f"{row['method']:<14}{row['setting']:>8g}{row['seed']:>5}{row['kl']:>8.2f}"
                     f"{row['kl_se']:>6.2f}{row['reward']:>8.3f}{row['reward_se']:>6.3f}"
                     f"{share_cells(row)}"
                     f"{row['seconds']:>9.0f}")
    return "\n".join(lines)


def shares_at(rows: list[dict], method: str, kl: float,
              max_ratio: float = 4.) -> list[tuple[float, float]]:
    """The share of the optimal gain and its standard error at a KL, one for each seed.

    Interpolates linearly in KL between the nearest finished policy below and the nearest above, if
    the ratio of their KLs is at most `max_ratio`. A policy within a tenth of `kl` may serve as
    both. A seed without such policies is left out.
    """
    finished = [row for row in rows
                if row["final"] and row["method"] == method and row["share"] is not None]
    found = []
    for seed in sorted({row["seed"] for row in finished}):
        curve = sorted((row for row in finished if row["seed"] == seed), key=lambda row: row["kl"])
        below = [row for row in curve if row["kl"] <= kl * 1.1][-1:]
        above = [row for row in curve if row["kl"] >= kl / 1.1][:1]
        if below and above and above[0]["kl"] <= max_ratio * below[0]["kl"]:
            ends = sorted(below + above, key=lambda row: row["kl"])
            kls = [row["kl"] for row in ends]
            share, share_se = (float(numpy.interp(kl, kls, [row[name] for row in ends]))
                               for name in ("share", "share_se"))
            found.append((share, share_se))
    return found


def mean_share(shares_of_seeds: list[tuple[float, float]]) -> str:
    """The mean over seeds with its standard error; the error over prompts if there is one seed."""
    if not shares_of_seeds:
        return "-"
    shares, errors = zip(*shares_of_seeds)
    error = errors[0]
    if len(shares) > 1:
        error = statistics.stdev(shares) / len(shares) ** .5
    return f"{statistics.fmean(shares):.1%} +- {error:.1%}"


def table_of_shares(rows: list[dict], kls: tuple[float, ...] = (1., 2., 4., 7.)) -> str:
    """The share of the optimal gain at some KLs, along each method's own frontier."""
    lines = ["share of the optimal gain at KL" + "".join(f"{kl:>14g}" for kl in kls)
             + "   along each method's own frontier, mean over the seeds with policies there"]
    for method, (label, *_) in styles_of(row["method"] for row in rows).items():
        cells = [mean_share(shares_at(rows, method, kl)) for kl in kls]
        if set(cells) != {"-"}:
            lines.append(f"{label:<31}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def summary_of_preferences(encoding, pairs: data.Preferences,
                           eval_prompts: tuple[Tensor, Tensor]) -> str:
    """A sentence on pi_ref's completions, and on which evaluation prompts occur in the pairs.

    Grammar is checked on the first 1,000 completions.
    """
    texts = data.decode(encoding, pairs.ids, pairs.mask)
    reward = torch.tensor([data.sentiment(text) for text in texts])
    checked = texts[:1000]
    grammatical = sum(map(data.is_grammatical, checked)) / len(checked)
    ties = len(texts) * (pairs.k - 1) // 2 - len(pairs.winner)
    starts = data.prompt_lengths(pairs.mask).tolist()
    prompts = {tuple(row[:start]) for row, start in zip(pairs.ids.tolist(), starts)}
    evaluated = [tuple(row[:n]) for row, n in zip(*(x.tolist() for x in eval_prompts))]
    seen = sum(prompt in prompts for prompt in evaluated) / len(evaluated)
    return (f"completions: {grammatical:.1%} of {len(checked):,} are grammatical, reward "
            f"{reward.mean():.3f} +- {reward.std():.3f} (standard deviation); "
            f"{len(pairs.winner):,} pairs, {ties:,} ties dropped; {seen:.0%} of the evaluation "
            "prompts are also prompts of the pairs")


def report(rows: list[dict], failures: list[dict], optimum: dict) -> str:
    """The two tables, failed runs, and evaluations above the optimum."""
    parts = [table_of_policies(rows), "", table_of_shares(rows), ""]
    for failure in failures:
        parts.append("FAILED: {method} {setting:g} seed {seed} at step {step}; its earlier rows "
                     "are kept: {reason}".format(**failure))
    impossible = above_optimum(rows, optimum)
    for row in impossible:
        parts.append("IMPOSSIBLE: {method} {setting:g} seed {seed} step {step}, reward "
                     "{reward:.3f} at KL {kl:.2f}, is above the optimum {optimal_reward:.3f} by "
                     "more than 4 standard errors: a bug in reward, KL or optimum".format(**row))
    parts.append(f"{len(impossible) or 'no'} evaluation(s) of {len(rows)} above the optimum; it is "
                 f"reliable (solid) to KL {reliable_kl(optimum):.2f}, with at least {MIN_ESS} "
                 "effective samples")
    return "\n".join(parts)
