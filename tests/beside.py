"""A run with a planted bug beside a healthy run: their numbers, and their figures in one file.

    python tests/beside.py HEALTHY BROKEN        two folders of results; draws BROKEN/beside.png
"""
import math
import pathlib
import sys

TESTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import harness  # noqa: E402
from plots import plt, save, tables  # noqa: E402

FIGURES = "frontier", "inside"
MOST = 8    # numbers that are printed
MEANING = {
    "reward": "mean true reward of the finished policy",
    "kl": "KL(pi || pi_ref), nats; of SFT it must be 0, and PPO aims at its setting",
    "length": "response tokens",
    "logp_w": "log pi(y_w) of the pairs, nats",
    "logp_l": "log pi(y_l) of the pairs, nats",
    "margin": "how much further log pi / pi_ref of y_w is raised than that of y_l, nats",
    "accuracy": "pairs that the policy ranks right; at least .5",
    "loss": "loss on the last pairs; log 2 = .693 of DPO before it has learned anything",
}


def read_numbers(folder: pathlib.Path) -> dict[tuple, tuple[float, float]]:
    """The numbers of finished policies: (method, setting, name) -> value, standard error."""
    numbers = {}
    for row in harness.read_jsonl(folder / "results.jsonl"):
        for name in MEANING:
            if row["final"] and not row["method"].startswith("best") and row.get(name) is not None:
                key = row["method"], row["setting"], name
                numbers[key] = row[name], row.get(f"{name}_se") or 0.
    return numbers


def differences(healthy: dict, broken: dict) -> list[tuple]:
    """(size in standard errors, key, healthy, broken), the largest first; equal ones left out."""
    found = []
    for key in healthy.keys() & broken.keys():
        (old, old_se), (new, new_se) = healthy[key], broken[key]
        scale = math.hypot(old_se, new_se) or .05 * abs(old) + 1e-6
        if old != new:
            found.append((abs(new - old) / scale, key, old, new))
    return sorted(found, reverse=True)


def summary(healthy: pathlib.Path, broken: pathlib.Path) -> str:
    """What to look at first."""
    lines = ["", "What to look at first:"]
    for failure in harness.read_jsonl(broken / "failures.jsonl"):
        lines.append("  a run failed: {method} {setting:g} at step {step}: {reason}"
                     .format(**failure))
    rows = harness.read_jsonl(broken / "results.jsonl")
    [optimum] = harness.read_jsonl(broken / "optimum.json")
    if tables.above_optimum(rows, optimum):
        lines.append("  policies are above the optimum, where none can be: is it the reward, the "
                     "KL or the optimum that is wrong?")
    found = differences(read_numbers(healthy), read_numbers(broken))
    if not found:
        lines.append("  the numbers of the finished policies equal those of the healthy run: look "
                     "at the optimum, the shares, and the other figures")
    else:
        lines.append(f"  {'':<26}{'healthy':>10}{'broken':>10}   (largest differences first, in "
                     "standard errors)")
    for _, (method, setting, name), old, new in found[:MOST]:
        label = f"{method} {setting:g}: {name}"
        lines.append(f"  {label:<26}{old:>10.3f}{new:>10.3f}   {MEANING[name]}")
    lines.append("Then read the function that you suspect, and name the theorem of tests/theorems "
                 "that would fail on it.")
    return "\n".join(lines)


def draw(healthy: pathlib.Path, broken: pathlib.Path, path: pathlib.Path) -> None:
    """Draw the figures of both folders side by side."""
    names = [name for name in FIGURES
             if all((folder / f"{name}.png").exists() for folder in (healthy, broken))]
    figure, axes = plt.subplots(max(len(names), 1), 2, figsize=(20, 5.4 * len(names) + .1),
                                squeeze=False)
    for name, row in zip(names, axes):
        for title, folder, axis in zip(("healthy", "broken"), (healthy, broken), row):
            axis.imshow(plt.imread(folder / f"{name}.png"))
            axis.set_title(f"{title}: {name}", fontsize=16)
    for axis in axes.flat:
        axis.axis("off")
    save(figure, path)


def config_of(folder: pathlib.Path) -> dict:
    """The configuration of the run in a folder."""
    return harness.read_jsonl(folder / "results.jsonl")[0]["config"]


def compare(healthy: pathlib.Path, broken: pathlib.Path, command: str) -> str:
    """What to look at first, and where the figures are. `command` computes the healthy run."""
    if not (broken / "optimum.json").exists():
        return "The run did not reach its end: that is the symptom."
    if not (healthy / "optimum.json").exists():
        return (f"There is no healthy run in {healthy}. `{command}` computes it; the same command "
                "as before then shows both side by side.")
    if config_of(healthy) != config_of(broken):
        return (f"The healthy run in {healthy} has other flags than this one. `{command}` computes "
                "it with the same.")
    path = broken / "beside.png"
    draw(healthy, broken, path)
    return f"{summary(healthy, broken)}\nBoth runs side by side: {path}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tests/beside.py HEALTHY BROKEN")
    print(compare(*map(pathlib.Path, sys.argv[1:]), "python train.py"))
