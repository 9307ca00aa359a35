"""Tables 4-10: what the policies write, prompt by prompt, with the true reward of each text: Markdown instead of a picture."""
import re

from data import decode, torch_rng
from model import respond
from plots import nearest, policy_of, style

PROMPTS = 4
METHODS = ["dpo", "ppo", "ppo_gt", "preferred_ft", "unlikelihood"]


def measure(lab, runs: list[dict]) -> list[dict]:
    """One response of pi_ref and of each method's policy nearest to KL 2 to the first prompts that judge: the first drawn, none chosen."""
    chosen = [{"method": "sft", "setting": 0., "policy": {}, "rows": [{"kl": 0.}]}] + [nearest(runs, method) for method in METHODS]
    prompts, rows = tuple(p[:PROMPTS] for p in lab.prompts), []
    for run in filter(None, chosen):
        generator = torch_rng("samples", lab.cfg.seed, device=lab.device)    # the same for all methods
        ids, mask = respond(policy_of(lab, run["policy"]), prompts, 1, lab.cfg.max_tokens, lab.encoding.eot_token, generator)
        begun = [lab.encoding.decode(row[:n]) for row, n in zip(*(p.tolist() for p in prompts))]
        for i, (text, reward) in enumerate(zip(decode(lab.encoding, ids, mask), lab.reward(ids, mask).tolist())):
            rows.append({"figure": "samples", "method": run["method"], "setting": run["setting"], "kl": run["rows"][-1]["kl"], "index": i,
                         "prompt": begun[i], "response": text[len(begun[i]):], "reward": reward})
    return rows


def cell(text: str) -> str:
    """A text that Markdown shows as it is: a policy may write anything."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", text)


def draw(rows: list[dict], path) -> None:
    """A table for each prompt, written as PATH.md."""
    lines = ["# What the policies write", "", "One response of each policy to each prompt, the first that was drawn, with the true reward of prompt",
             "and response together; of each method the policy whose KL is nearest to 2 nats. All were drawn with the same random numbers:",
             "where two policies agree, so do their texts."]
    for index in sorted({row["index"] for row in rows}):
        mine = [row for row in rows if row["index"] == index]
        lines += ["", f"## {cell(mine[0]['prompt'])} ...", "", "| policy | setting | KL, nats | reward | response |", "|---|---|---|---|---|"]
        lines += [f"| {style([row['method']])[row['method']][0]} | {row['setting']:g} | {row['kl']:.2f} | {row['reward']:.2f} | "
                  f"{cell(row['response'])} |" for row in mine]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
