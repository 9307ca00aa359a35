"""The part my_loss.py of a submission: its contract, then its training beside the baselines.

The student's function runs in a process that sees numbers only (remote_loss.py); train.py and
the contract are the grader's, in another process, and so is the evaluation of the policy. The files
of the baselines are compared before and after. What a determined student could still do: with
the same user of the machine, let his process look for the folder of the training and write there;
`--user` prevents it. And no fence helps against a loss that recognises pairs by their reference
log-probabilities and has their rewards from a run at home: read the losses with the best shares.
"""
import ast
import hashlib
import json
import os
import pathlib
import sys

import sandbox
import screening
from grading import Job, Refusal, ask_child, copy_of_repository, last_words, read, result

RESULTS = "runs/graded"
PROXY = """
import sys
sys.path.insert(0, {tests!r})
from remote_loss import connect
my_loss = connect({path!r}, {name!r}, {folder!r})    # {digest}
"""


# -------------------------------------------------------------------- reading what was handed in
def find_loss(tree: ast.Module) -> str:
    """The name of the function to grade: my_loss, or the only one of (pair, beta)."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            arguments = [x.arg for x in node.args.args]
            required = arguments[:len(arguments) - len(node.args.defaults)]
            if required == ["pair", "beta"]:
                names.append(node.name)
    if "my_loss" in names:
        return "my_loss"
    if len(names) != 1:
        raise Refusal(f"my_loss.py has {len(names)} functions of (pair, beta) at its top level: "
                      "name the one to grade my_loss")
    return names[0]


def find_betas(tree: ast.Module, default: tuple[float, ...]) -> tuple[float, ...]:
    """The betas to train at: those of a line BETAS = (.1, .3) in my_loss.py, or the default."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "BETAS":
            try:
                betas = tuple(float(x) for x in ast.literal_eval(node.value))
            except (ValueError, TypeError, OverflowError, RecursionError, MemoryError):
                betas = ()
            if not 0 < len(set(betas)) == len(betas) <= len(default) or not \
                    all(1e-6 <= x <= 1e6 for x in betas):
                raise Refusal(f"BETAS in my_loss.py must be 1 to {len(default)} different numbers "
                              "from 1e-6 to 1e6")
            return betas
    return default


def write_proxy(job: Job, trainer: pathlib.Path, student: pathlib.Path, name: str) -> None:
    """Write my_loss.py of the student's copy, and the file that stands for it at the grader's."""
    text = read(job, "my_loss.py")
    (student / "my_loss.py").write_text(text, "utf-8")
    sandbox.give_to(job.user, student)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    (trainer / "my_loss.py").write_text(PROXY.format(
        tests=str(trainer / "tests"), path=str(student / "my_loss.py"), name=name,
        folder=str(student), digest=digest), "utf-8")


# -------------------------------------------------------------------------------------- contract
def grade_contract(job: Job, name: str) -> list[dict]:
    """The propositions of classroom/test_contract.py, in one result."""
    points = job.settings.POINTS["contract"]
    try:
        with copy_of_repository(job) as trainer, copy_of_repository(job) as student:
            write_proxy(job, trainer, student, name)
            found = ask_child(job, trainer, job.settings.SECONDS["contract"], None,
                              {"GRADE_USER": job.user or ""}, part="contract",
                              loss="my_loss.py:my_loss")
    except Refusal as refusal:
        return [result("my_loss.py: contract", 0., points, str(refusal))]
    errors = found["errors"]
    wrong = {test: error for test, error in errors.items() if error}
    output = f"all {len(errors)} propositions hold"
    if wrong:
        test, error = next(iter(wrong.items()))
        output = (f"{len(errors) - len(wrong)} of {len(errors)} propositions hold; the first that "
                  f"does not: {test.replace('_', ' ')}: {' '.join(error.split())[:400]}")
    score = points * (len(errors) - len(wrong)) / len(errors)
    return [result("my_loss.py: contract", score, points, output)]


# -------------------------------------------------------------------------------------- training
def file_digests(folder: pathlib.Path) -> dict[str, str]:
    """A digest of the content of each stage's file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.glob("*.pt"))}


def copy_baseline(job: Job, folder: pathlib.Path) -> None:
    """Copy the stages of the baselines, and nothing that a loss wrote there."""
    folder.mkdir(parents=True)
    for path in sorted(job.baseline.glob("*.pt")) if job.baseline else []:
        (folder / path.name).write_bytes(path.read_bytes())


def read_results(folder: pathlib.Path, finished: sandbox.Finished) -> list[list[dict]]:
    """Rows, failures and the optimum that train.py wrote. Raises Refusal if it did not."""
    if not (folder / "optimum.json").exists():
        said = [x for x in finished.output.splitlines() if x.startswith("train.py: ")]
        raise Refusal(said[-1].removeprefix("train.py: ") if said else
                      finished.problem + last_words(finished.output))
    files = "results.jsonl", "failures.jsonl", "optimum.json"
    return [[json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]
            for file in files]


def train(job: Job, name: str, betas: tuple[float, ...]) -> tuple[list, list, dict]:
    """Train a loss -> its rows of results, its failures, and the optimum. Raises Refusal."""
    settings = job.settings
    command = ["train.py", "--preset", settings.PRESET, *settings.FLAGS, "--out", RESULTS,
               "--loss", "my_loss.py:my_loss", "--betas", ",".join(map(repr, betas)),
               "--workers", str(settings.WORKERS), "--device", "cpu"]
    variables = {**os.environ, "GRADE_USER": job.user or "", "PYTHONDONTWRITEBYTECODE": "1"}
    variables.pop("RANK", None)    # of torchrun
    with copy_of_repository(job) as trainer, copy_of_repository(job) as student:
        write_proxy(job, trainer, student, name)
        folder = trainer / RESULTS
        copy_baseline(job, folder)
        before = file_digests(folder)
        finished = sandbox.run(command, trainer, settings.SECONDS["training"], "", variables)
        after = file_digests(folder)
        if any(after.get(file) != x for file, x in before.items()) or \
                sandbox.changed_files(job.snapshot, trainer):
            raise Refusal("files of the grader were changed while the loss was trained; a human "
                          "should read my_loss.py")
        rows, failures, [optimum] = read_results(folder, finished)
    own = [row for row in rows if row["method"] == "my_loss"]
    if job.baseline and len(rows) == len(own) + 1:    # and SFT
        print(f"the baselines in {job.baseline} are of other code or settings and were not used: "
              "train them again", file=sys.stderr)
    return own, failures, optimum


def points_of_policy(settings, row: dict) -> tuple[float, str]:
    """The share of the points of one finished policy, and what to say."""
    said = f"reward {row['reward']:.3f} at KL {row['kl']:.2f}"
    if row["kl"] < settings.MIN_KL:
        return 0., f"{said}: it hardly left pi_ref (KL below {settings.MIN_KL:g})"
    if row["share"] is None:
        return 0., f"{said}: it is beyond the end of the optimum's curve"
    low, high = settings.SHARE_OF_NO_POINTS, settings.SHARE_OF_ALL_POINTS
    said += (f", {row['share']:.0%} +- {row['share_se']:.0%} of the optimal gain there (no points "
             f"at {low:.0%}, all at {high:.0%})")
    share = row["share"] + row["share_se"]    # the benefit of the doubt
    return min(max((share - low) / (high - low), 0.), 1.), said


def grade_policy(job: Job, rows: list, failures: list, optimum: dict, beta: float):
    """The share of the points of one beta, and what to say."""
    from plots import tables
    failed = [failure for failure in failures if failure["setting"] == beta]
    if failed:
        return 0., f"it failed at step {failed[0]['step']}: {failed[0]['reason'][:400]}"
    rows = [row for row in rows if row["setting"] == beta]
    final = [row for row in rows if row["final"]]
    if not final:
        return 0., "there is no result for it"
    if tables.above_optimum(rows, optimum):
        return 0., "it is above the optimum, where no policy can be: a human should read my_loss.py"
    return points_of_policy(job.settings, final[0])


def grade_training(job: Job, name: str, betas: tuple[float, ...]) -> tuple[list, list, dict]:
    """A result for each beta; the rows of results; the optimum."""
    points = job.settings.POINTS["training"] / len(betas)
    titles = {beta: f"my_loss.py: trained at beta {beta:g}" for beta in betas}
    try:
        rows, failures, optimum = train(job, name, betas)
    except Refusal as refusal:
        return [result(x, 0., points, str(refusal)) for x in titles.values()], [], {}
    results = []
    for beta, title in titles.items():
        share, output = grade_policy(job, rows, failures, optimum, beta)
        results.append(result(title, share * points, points, output))
    return results, rows, optimum


def grade_loss(job: Job) -> tuple[list[dict], list[dict], dict]:
    """my_loss.py: the results of its tests, the rows of its policies, and the optimum.

    A loss that fails its first call is not trained.
    """
    points = job.settings.POINTS
    try:
        tree, problem = screening.parse(read(job, "my_loss.py"), "my_loss.py")
        if problem:
            raise Refusal(problem)
        name, betas = find_loss(tree), find_betas(tree, job.settings.BETAS)
    except Refusal as refusal:
        return [result(f"my_loss.py: {part}", 0., points[part], str(refusal))
                for part in ("contract", "training")], [], {}
    contract = grade_contract(job, name)
    if contract[0]["score"] == 0:
        training = result("my_loss.py: training", 0., points["training"],
                          "not trained, because no proposition of the contract holds")
        return [*contract, training], [], {}
    results, rows, optimum = grade_training(job, name, betas)
    return contract + results, rows, optimum
