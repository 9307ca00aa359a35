"""One thread: the tests' tensors are too small to share. `--loss FILE.py:FUNCTION` tests that loss instead of this repository."""
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dpo

torch.set_num_threads(1)
COMMANDS = "test_a_command_of_the_readme_runs"


def pytest_addoption(parser):
    parser.addoption("--loss", metavar="FILE.py:FUNCTION", help="run the contract of a preference loss on a loss of your own")


def pytest_generate_tests(metafunc):
    """The contract (test_contract.py) runs on the given loss, or on those of the paper and of the zoo."""
    if "loss" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("--loss")
    if given:
        try:
            metafunc.parametrize("loss", [dpo.load_loss(given)], ids=[given.rpartition(":")[2]])
        except dpo.LossError as error:
            pytest.exit(str(error), returncode=2)
        return
    import zoo
    losses = [dpo.dpo_loss, dpo.unlikelihood_loss, dpo.preferred_ft_loss, dpo.constant_weight_loss, zoo.ipo, zoo.cdpo, zoo.robust_dpo, zoo.hinge, zoo.simpo,
              zoo.orpo, zoo.kto]
    metafunc.parametrize("loss", losses, ids=[loss.__name__ for loss in losses])


def pytest_collection_modifyitems(config, items):
    """With a loss of one's own, its contract alone: the other tests are about this repository. The README's commands come last, see `commands`."""
    items.sort(key=lambda item: item.originalname == COMMANDS)
    if config.getoption("--loss"):
        config.hook.pytest_deselected(items=[item for item in items if "loss" not in item.fixturenames])
        items[:] = [item for item in items if "loss" in item.fixturenames]


@pytest.fixture(scope="session", autouse=True)
def commands(request, tmp_path_factory):
    """The README's commands for students, those that are to be tested, at work beside all other tests: command -> what comes of it."""
    tested = [item.callspec.params["command"] for item in request.session.items if item.originalname == COMMANDS]
    if not tested:
        yield {}
        return
    import test_commands
    checkout = test_commands.checkout(tmp_path_factory.mktemp("student") / "repository")
    with ThreadPoolExecutor(1) as one_by_one:
        yield {command: one_by_one.submit(test_commands.run, command, checkout) for command in tested}
        one_by_one.shutdown(cancel_futures=True)


def pytest_terminal_summary(terminalreporter):
    """The table of planted bugs and the theorem that caught each."""
    table = getattr(sys.modules.get("test_mutants"), "TABLE", [])
    if table:
        terminalreporter.section(f"{sum(bool(caught) for _, caught in table)} of {len(table)} planted bugs caught")
    for mutant, caught in table:
        theorem = caught[0].replace("_", " ") if caught else "SURVIVES"
        terminalreporter.write_line(f"{mutant.name.replace('_', ' '):<37} {mutant.target:<25} {theorem}")
