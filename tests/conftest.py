"""One thread: the tests' tensors are too small to share. `--loss FILE.py:FUNCTION` tests that loss instead of this repository."""
import sys

import pytest
import torch

import dpo

torch.set_num_threads(1)


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
    if config.getoption("--loss"):
        for item in items:
            if "loss" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="about DPO and this repository, not about your loss"))


def pytest_terminal_summary(terminalreporter):
    """The table of planted bugs and the theorem that caught each."""
    table = getattr(sys.modules.get("test_mutants"), "TABLE", [])
    if table:
        terminalreporter.section(f"{sum(bool(caught) for _, caught in table)} of {len(table)} planted bugs caught")
    for mutant, caught in table:
        theorem = caught[0].replace("_", " ") if caught else "SURVIVES"
        terminalreporter.write_line(f"{mutant.name.replace('_', ' '):<37} {mutant.target:<25} {theorem}")
