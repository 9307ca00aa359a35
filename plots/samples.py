"""Tables 4-10: responses of the policies to some prompts, with the true reward of each text.

The result is a Markdown file instead of a picture.
"""
import re

import data
from model import generate
from plots import STYLE, evaluation_prompts, load_policy
from plots.winrate import policies_to_compare

PROMPTS = 4
METHODS = "dpo", "ppo", "ppo_gt", "preferred_ft", "unlikelihood"
HEADER = [    # lines of Markdown
    "# What the policies write",
    "",
    "One response of each policy to each of the first evaluation prompts, with the true reward of",
    "prompt and response together. No response was selected. Of each method this is the finished",
    "policy nearest to KL 2 nats, or one during training if only that is within .2. All policies",
    "use the same random numbers: two texts are equal up to the token where the policies differ.",
]


# ---------------------------------------------------------------------------------------- measuring
def measure(setup, runs: list[dict]) -> list[dict]:
    """One response of each policy to each of the first evaluation prompts; none is selected."""
    encoding = setup.encoding
    ids, lengths = (p[:PROMPTS] for p in evaluation_prompts(setup))
    prompts = [encoding.decode(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())]
    rows = []
    for policy in policies_to_compare(runs, METHODS):
        # the same random numbers for all methods
        generator = data.named_generator("samples", setup.cfg.seed, device=setup.device)
        model = load_policy(setup, policy["state"])
        responses, mask = generate(model, (ids, lengths), 1, setup.cfg.max_tokens,
                                   encoding.eot_token, generator)
        texts = data.decode(encoding, responses, mask)
        rewards = data.true_reward(encoding, responses, mask).tolist()
        for i, (prompt, text, reward) in enumerate(zip(prompts, texts, rewards)):
            rows.append({"figure": "samples", "method": policy["method"],
                         "setting": policy["setting"], "kl": policy["kl"], "index": i,
                         "prompt": prompt, "response": text[len(prompt):], "reward": reward})
    return rows


# ---------------------------------------------------------------------------------------- the table
def escape_markdown(text: str) -> str:
    """A text that Markdown shows unchanged; a policy may write any characters."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", text)


def table_row(row: dict) -> str:
    """One response as a row of a Markdown table."""
    label, *_ = STYLE[row["method"]]
    return (f"| {label} | {row['setting']:g} | {row['kl']:.2f} | {row['reward']:.2f} | "
            f"{escape_markdown(row['response'])} |")


def draw(rows: list[dict], path) -> None:
    """Write one table for each prompt; the file is `path` with the suffix .md."""
    lines = [*HEADER]
    for index in sorted({row["index"] for row in rows}):
        responses = [row for row in rows if row["index"] == index]
        lines += ["", f"## {escape_markdown(responses[0]['prompt'])} ...", "",
                  "| policy | setting | KL, nats | reward | response |", "|---|---|---|---|---|"]
        lines += [table_row(row) for row in responses]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", "utf-8")
