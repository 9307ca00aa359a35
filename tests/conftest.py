"""Settings of all tests: import paths, one thread, --loss, and the commands of the documents.

`python -m pytest --loss FILE.py:FUNCTION` runs the contract of a preference loss on that function.
"""
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

TESTS = pathlib.Path(__file__).resolve().parent
for folder in (TESTS / "theorems", TESTS, TESTS.parent):
    sys.path.insert(0, str(folder))

import dpo  # noqa: E402
import harness  # noqa: E402

torch.set_num_threads(1)    # the tensors of the tests are too small for several threads
TEST_OF_COMMANDS = "test_a_command_of_the_documents_runs"


def pytest_addoption(parser):
    parser.addoption("--loss", metavar="FILE.py:FUNCTION",
                     help="run the contract of a preference loss on a loss of your own")


def losses_of_the_repository():
    """The preference losses of the paper and of tests/zoo.py."""
    import zoo
    return [dpo.dpo_loss, dpo.unlikelihood_loss, dpo.preferred_ft_loss, dpo.constant_weight_loss,
            zoo.ipo, zoo.cdpo, zoo.robust_dpo, zoo.hinge, zoo.simpo, zoo.orpo, zoo.kto]


def pytest_generate_tests(metafunc):
    """Run the contract (test_contract.py) on the loss of --loss, or on those of the repository."""
    if "loss" not in metafunc.fixturenames:
        return
    name = metafunc.config.getoption("--loss")
    if not name:
        losses = losses_of_the_repository()
        metafunc.parametrize("loss", losses, ids=[loss.__name__ for loss in losses])
        return
    try:
        loss = harness.UserLoss(name)
    except harness.LossError as error:
        pytest.exit(str(error), returncode=2)
    metafunc.parametrize("loss", [loss], ids=[name.rpartition(":")[2]])


def pytest_collection_modifyitems(config, items):
    """With --loss, keep the contract only: the other tests check this repository.

    The tests of the commands come last, see `commands`.
    """
    items.sort(key=lambda item: item.originalname == TEST_OF_COMMANDS)
    if config.getoption("--loss"):
        contract = [item for item in items if "loss" in item.fixturenames]
        deselected = [item for item in items if "loss" not in item.fixturenames]
        config.hook.pytest_deselected(items=deselected)
        items[:] = contract


@pytest.fixture(scope="session", autouse=True)
def commands(request, tmp_path_factory):
    """Run the commands of the documents one by one, beside the other tests.

    A dict: command -> the future of its finished process. Only commands that were selected run.
    """
    selected = [item.callspec.params["command"] for item in request.session.items
                if item.originalname == TEST_OF_COMMANDS]
    if not selected:
        yield {}
        return
    import test_documents
    checkout = test_documents.checkout(tmp_path_factory.mktemp("student") / "repository")
    with ThreadPoolExecutor(max_workers=1) as executor:
        yield {command: executor.submit(test_documents.run, command, checkout)
               for command in selected}
        executor.shutdown(cancel_futures=True)


def pytest_terminal_summary(terminalreporter):
    """Print the table of planted bugs, each with the theorem that caught it."""
    table = getattr(sys.modules.get("test_planted_bugs"), "TABLE", [])
    if table:
        caught_bugs = sum(bool(theorems) for _, theorems in table)
        terminalreporter.section(f"{caught_bugs} of {len(table)} planted bugs caught")
    for mutant, theorems in table:
        theorem = theorems[0].replace("_", " ") if theorems else "SURVIVES"
        name = mutant.name.replace("_", " ")
        terminalreporter.write_line(f"{name:<37} {mutant.target:<25} {theorem}")
