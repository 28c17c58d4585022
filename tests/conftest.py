import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(path.stem for path in ROOT.glob("[0-9][0-9]_*.py"))
FURTHER_SCRIPTS = sorted((ROOT / "further").glob("[a-z]*.py"))


def load_script(path: str) -> ModuleType:
    """Import a script by its path, since a lesson's name is no identifier; registered, so that its functions can be
    pickled.
    """
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_lesson(name: str) -> ModuleType:
    return load_script(f"{name}.py")


@pytest.fixture
def lesson14() -> ModuleType:
    return load_lesson("14_dropout_regularization")


@pytest.fixture
def lesson15() -> ModuleType:
    return load_lesson("15_regularization_techniques_detailed")


@pytest.fixture
def lesson16() -> ModuleType:
    return load_lesson("16_batch_normalization")


@pytest.fixture
def lesson18() -> ModuleType:
    return load_lesson("18_learning_rate_scheduling")


@pytest.fixture
def lesson19() -> ModuleType:
    return load_lesson("19_weight_initialization")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
