"""The course around the grader: a bug for every student, the class on one frontier, the archive."""
import itertools
import zipfile

import pytest
from matplotlib.text import Text

import beside
import drawing
import grade
import grading
import harness
import packing
from plots import class_frontier
from test_grade import optimum, policy, submit


# --------------------------------------------------------------------- a bug for every student
def test_a_name_draws_the_same_bug_and_neighbours_draw_others():
    """Case and spaces do not matter; of 40 names with numbers, most draw different bugs."""
    numbers = list(range(1, 100))
    names = [f"student {i}" for i in range(40)]
    drawn = {name: drawing.draw(name, numbers) for name in names}
    assert drawn == {name: drawing.draw(f"  {name.upper()} ", numbers) for name in names}
    assert len(set(drawn.values())) > 25, f"only {len(set(drawn.values()))} different bugs"


def test_no_two_names_of_a_roster_draw_the_same_bug():
    """As long as there are enough bugs; a name that is not on it draws too."""
    numbers, names = [3, 4, 7, 8, 9], ("Ann", "Bob", "Cem", "Dua", "Eva")
    drawn = {drawing.draw(name, numbers, roster=names) for name in names}
    assert drawn == set(numbers), f"{names} drew {drawn}"
    assert drawing.draw("Zoe", numbers, roster=names) in numbers


@pytest.mark.parametrize("where, expected", [
    ("dpo.dpo_loss", 1.), ("dpo.py:dpo_loss()", 1.), ("dpo.make_pairs", .5), ("model.sample", 0.)])
def test_half_of_the_points_for_the_module_of_a_bug(where, expected):
    """The function gives all points, its module half of them."""
    assert grading.grade_place(where, "dpo.dpo_loss")[0] == expected


def test_what_differs_most_from_the_healthy_run_comes_first():
    """In standard errors of both runs; equal numbers are left out."""
    healthy = {("dpo", 1., "kl"): (2., .1), ("dpo", 1., "reward"): (.9, .1), ("ppo", 1., "kl"):
               (1., .1)}
    broken = {**healthy, ("dpo", 1., "kl"): (9., .1), ("dpo", 1., "reward"): (.8, .1)}
    found = [key for _, key, *_ in beside.differences(healthy, broken)]
    assert found == [("dpo", 1., "kl"), ("dpo", 1., "reward")], found


# ------------------------------------------------------------------- the class and its archive
def grade_as(folder, rows):
    """Write a graded submission that has these rows, and its contract if it has any -> folder."""
    job = submit(folder, {})
    tests = [grading.result("my_loss.py: contract", 3, 3, "")] * bool(rows)
    grade.write(folder / "graded", job, {"tests": tests}, rows, optimum() if rows else {})
    return folder


def baselines_in(folder):
    """Write a run of the baselines: SFT, and DPO with 80% of the optimal gain -> folder."""
    folder.mkdir()
    rows = [policy(0., kl=0., share=0., method="sft"), policy(.1, share=.8, method="dpo")]
    harness.write_jsonl(folder / "results.jsonl", rows)
    harness.write_jsonl(folder / "optimum.json", [optimum()])
    return folder


def test_the_class_is_drawn_on_one_frontier(tmp_path):
    """A line for each policy, the best first, then who hardly moved, then who has none."""
    policies = {"dpo": [policy(share=.5)], "bob": [policy(share=.9)], "cem": [],
                "dua": [policy(kl=.2, share=1.2)]}
    folders = [grade_as(tmp_path / name, rows) for name, rows in policies.items()]
    folders.append(baselines_in(tmp_path / "graded-default"))
    text = class_frontier.draw_class(folders, tmp_path / "class.png")
    table = text.splitlines()
    names = [line.split()[:2] for line in table[1:6]]
    assert names == [["2", "bob"], ["-", "DPO"], ["1", "dpo"], ["4", "dua"], ["3", "cem"]], text
    assert "kept" in table[1] and "hardly moved" in table[4] and "no policy" in table[5], text
    assert [line[:31].strip() for line in table[8:]] == ["DPO", "1 dpo", "2 bob"], text
    assert (tmp_path / "class.png").stat().st_size > 10_000


def test_an_empty_table_of_shares_of_a_class_has_no_header(tmp_path):
    """If all submissions hardly moved, and the baselines are not given."""
    folder = grade_as(tmp_path / "ann", [policy(kl=.2)])
    text = class_frontier.draw_class([folder], tmp_path / "class.png")
    assert len(text.splitlines()) == 2, text


@pytest.mark.parametrize("count", [2, 12, 30])
def test_each_policy_of_a_class_has_its_number_and_no_number_covers_another(
        count, tmp_path, monkeypatch):
    """The legend does not grow with the class."""
    figures = []
    monkeypatch.setattr(class_frontier, "save", lambda figure, path: figures.append(figure))
    folders = []
    for i in range(count):
        rows = [policy(.1, kl=1 + i / 20, share=.8), policy(.2, kl=.4 + i / 99, share=.7)]
        folders.append(grade_as(tmp_path / f"student {i}", rows))
    class_frontier.draw_class([baselines_in(tmp_path / "runs"), *folders], tmp_path / "class.png")
    figures[0].canvas.draw()
    [axis] = figures[0].axes
    numbers = sorted(int(text.get_text()) for text in axis.texts)
    assert numbers == sorted([*range(1, count + 1)] * 2)
    boxes = [Text.get_window_extent(text).padded(-1) for text in axis.texts]    # without its line
    covered = [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert not covered, covered
    labels = {text.get_text() for text in axis.get_legend().get_texts()}
    assert labels == {"optimum (Eq. 4)", "the same, too few samples", "submission", "SFT", "DPO"}
    class_frontier.plt.close(figures[0])


def test_the_archive_holds_what_gradescope_runs(tmp_path):
    """setup.sh and run_autograder can be executed; the repository and private bugs are there."""
    (tmp_path / "bugs.py").write_text("# private")
    with zipfile.ZipFile(packing.pack(tmp_path, str(tmp_path / "bugs.py"))) as archive:
        for name in ("setup.sh", "run_autograder"):
            assert archive.getinfo(name).external_attr >> 16 & 0o111, f"{name} is no program"
        assert b"DPO_BUGS=/autograder/source/private_bugs.py" in archive.read("run_autograder")
        assert {"train.py", "private_bugs.py", "tests/grade.py", "plots/frontier.py",
                "requirements.txt"} <= set(archive.namelist())
