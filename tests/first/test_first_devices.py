"""A training step waits for no device: every arm of every lesson takes its first steps on PyTorch's meta device, which
has shapes and no numbers, so that whatever asks for a number, or carries one over from the CPU, raises.
"""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import FIRST as LESSONS
from conftest import ROOT, load_lesson
from first_recipes import SMALL
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.first import experiment
from common.first.data import Batch, Split, load
from common.first.training import Recipe, State, cross_entropy, fit, off_device, train_step

STEPS = 4  # the first steps at which every hook that looks at some steps only has looked


class NoTransfers(TorchDispatchMode):
    """Raises when a tensor goes from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {each.device for each in (*args, out) if isinstance(each, torch.Tensor)}
        if len(devices) > 1 and func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            raise RuntimeError(f"{func} between {devices}")
        return out


def unfused(build):
    """The same optimiser without its fused kernel, of which the meta device has none."""
    if not isinstance(build, partial):
        return build
    keywords = {name: unfused(value) for name, value in build.keywords.items() if name != "fused"}
    return partial(unfused(build.func), *map(unfused, build.args), **keywords)


def steps_without_a_wait(recipe: Recipe, dataset: str) -> None:
    """Take the recipe's first steps on the meta device."""
    data = load(dataset)
    n = min(recipe.batch_size, recipe.examples or recipe.batch_size)

    def images(count: int) -> Batch:
        return Batch(torch.empty(count, *data.task.shape, device="meta"), torch.empty(count, device="meta").long())

    model = recipe.model(data.task).to("meta")
    optimizer = unfused(recipe.optimizer)(model.parameters())
    state = State(model, optimizer, Split(images(recipe.examples or n), images(50), images(50)), recipe.epochs)
    model.train()
    for _ in range(STEPS):
        x, y = images(n)
        with NoTransfers():
            loss = train_step(recipe, state, x, y)
        assert not loss.requires_grad  # or every step's graph would be kept until the end of the epoch


def code_of(recipe: Recipe) -> frozenset[tuple[str, str]]:
    """What decides which lines of code a step runs: all settings but the numbers."""
    settings = {}
    for name in ("model", "optimizer", "loss", "after_step"):
        settings |= experiment.flatten(name, getattr(recipe, name))
    return frozenset((name, value) for name, value in settings.items() if not re.fullmatch(r"[-+.\de]+", value))


@pytest.mark.parametrize("lesson", LESSONS)
def test_no_arm_waits_for_a_device(lesson, tmp_path, monkeypatch):
    checked = set()

    def check_and_fit(recipe, seed, dataset, device, inspect):
        if (code := code_of(recipe)) not in checked:
            steps_without_a_wait(recipe, dataset)
            checked.add(code)
        return fit(recipe, seed, dataset, device, inspect)

    monkeypatch.setattr(experiment, "fit", check_and_fit)
    load_lesson(lesson).main(["--quick", "--seeds", "1", "--jobs", "1", "--out", str(tmp_path)])
    assert checked


def asks_for_a_number(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = cross_entropy(model, x, y)
    return loss * 2 if loss > 0 else loss


def brings_its_own_mask(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model, x * (torch.rand(x.shape) < 0.5).to(x.device), y)


def forgets_the_device(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model, x + torch.rand(x.shape), y)


def picks_by_value(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model, x[y > 0], y[y > 0])


def note_a_number(state: State) -> None:
    state.notes["norm"] = sum(p.norm() for p in state.model.parameters()).item()


@pytest.mark.parametrize("loss", [asks_for_a_number, brings_its_own_mask, forgets_the_device, picks_by_value])
def test_a_loss_that_waits_is_found_out(loss):
    with pytest.raises((RuntimeError, NotImplementedError)):
        steps_without_a_wait(replace(SMALL, loss=loss), "digits")


def test_a_hook_that_waits_is_found_out():
    with pytest.raises(RuntimeError):
        steps_without_a_wait(replace(SMALL, after_step=note_a_number), "digits")
    steps_without_a_wait(SMALL, "digits")


def test_no_step_makes_a_tensor_of_numbers_anew():
    """torch.tensor([...], device=...) copies from the CPU and waits, which the meta device does not show."""
    for lesson in LESSONS:
        text = (ROOT / f"{lesson}.py").read_text(encoding="utf-8")
        for name, body in re.findall(r"^def (\w+)\(.*?\) -> Tensor:\n((?:    .*\n|\n)+)", text, re.MULTILINE):
            assert "torch.tensor(" not in body, f"{lesson}: {name}"


def note_tensors(state: State) -> None:
    state.notes.setdefault("list", []).append(torch.full((2,), float(state.step)))
    state.notes["last"] = torch.tensor(state.step)
    state.notes["number"] = state.step


def test_tensors_among_the_notes_become_arrays_when_the_run_ends():
    notes = fit(replace(SMALL, after_step=note_tensors, epochs=1), 0).notes
    assert notes["list"].tolist() == [[step, step] for step in (1, 2, 3, 4)]
    assert notes["last"] == notes["number"] == 4
    assert not isinstance(notes["last"], torch.Tensor)
    assert off_device([]) == []
    assert off_device([1, 2]) == [1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lesson", LESSONS)
def test_quick_run_on_cuda(lesson, tmp_path):
    load_lesson(lesson).main(["--quick", "--seeds", "1", "--device", "cuda", "--out", str(tmp_path)])
    assert (tmp_path / lesson / "results.json").exists()
