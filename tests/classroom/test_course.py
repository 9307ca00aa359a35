"""The course around the grader: a bug for every student, the class on one frontier, the archive."""
import zipfile

import pytest

import beside
import drawing
import grade
import grading
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
def test_the_class_is_drawn_on_one_frontier(tmp_path):
    """The table has a line for each finished policy, the best first, and who has none."""
    for name, share in (("ann", .5), ("bob", .9)):
        job = submit(tmp_path / name, {})
        contract = grading.result("my_loss.py: contract", 3, 3, "")
        results = {"tests": [contract], "leaderboard": []}
        grade.write(job.submission / "graded", job, results, [policy(share=share)], optimum())
    job = submit(tmp_path / "cem", {})
    grade.write(job.submission / "graded", job, {"tests": []}, [], {})
    folders = [tmp_path / name for name in ("ann", "bob", "cem")]
    table = class_frontier.draw_class(folders, tmp_path / "class.png").splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["bob", "ann", "cem"], table
    assert "kept" in table[1] and "no policy" in table[3], table
    assert (tmp_path / "class.png").stat().st_size > 10_000


def test_the_archive_holds_what_gradescope_runs(tmp_path):
    """setup.sh and run_autograder can be executed; the repository and private bugs are there."""
    (tmp_path / "bugs.py").write_text("# private")
    with zipfile.ZipFile(packing.pack(tmp_path, str(tmp_path / "bugs.py"))) as archive:
        for name in ("setup.sh", "run_autograder"):
            assert archive.getinfo(name).external_attr >> 16 & 0o111, f"{name} is no program"
        assert b"DPO_BUGS=/autograder/source/private_bugs.py" in archive.read("run_autograder")
        assert {"train.py", "private_bugs.py", "tests/grade.py", "plots/frontier.py",
                "requirements.txt"} <= set(archive.namelist())
