"""What `first_aid` can examine, told in one line; and that all stays as it was."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MAKE_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)


class UnfitError(ValueError):
    """What cannot be examined, and why, in one line."""


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is raised as UnfitError."""
    try:
        yield
    except UnfitError:
        raise
    except Exception as error:
        raise UnfitError(shorten(f"{what}: {type(error).__name__}: {error}", 300)) from error


@contextmanager
def undisturbed(tensors: list[Tensor]) -> Iterator[None]:
    """Inside there are gradients, and nothing is compiled; afterwards the generators of random
    numbers, those of the tensors' devices among them, are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = {each.device for each in tensors} - {torch.device("cpu"), torch.device("meta")}
    kind = next((each.type for each in devices), "cuda")
    try:
        with (
            torch.random.fork_rng(devices, device_type=kind),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class AsConstants(TorchFunctionMode):
    """Lets `deepcopy` copy tensors that were computed, such as kept activations."""

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), named: dict | None = None
    ) -> object:
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return function(*args, **(named or {}))


def copies(model: nn.Module, optimizer: object) -> tuple[nn.Module, object]:
    """Copies of the network, without hooks and not compiled, and of its optimiser, if it is one.
    Hooks that belong to a layer stay: those that make its weights, and methods of its own."""
    modules, memo = list(model.modules()), {}  # memo: what `deepcopy` is not to copy itself
    for module in modules:
        for name in HOOKS:
            memo[id(getattr(module, name))] = OrderedDict()
    with AsConstants():
        for module in reversed(modules):
            if hasattr(module, "_orig_mod"):  # it is compiled
                memo[id(module)] = deepcopy(module._orig_mod, memo)
        model = deepcopy(model, memo)
        for module in modules:
            for key, hook in module._forward_pre_hooks.items():
                if isinstance(hook, MAKE_WEIGHTS) or getattr(hook, "__self__", None) is module:
                    memo[id(module._forward_pre_hooks)][key] = deepcopy(hook, memo)
        if optimizer is None or callable(optimizer):
            return model, optimizer
        twin = deepcopy(optimizer, memo)  # loses what a subclass adds
        for name in vars(optimizer).keys() - vars(twin).keys() - {"step"}:  # a scheduler's wrapper
            setattr(twin, name, deepcopy(vars(optimizer)[name], memo))
    return model, twin


def check(model: nn.Module, x: Tensor, y: Tensor, optimizer: object) -> None:
    """Raise UnfitError for what is no network, no batch or no optimiser."""
    if not isinstance(model, nn.Module):
        raise UnfitError(f"model: found {type(model).__name__}, wanted an nn.Module")
    for name, given in (("x", x), ("y", y)):
        if not isinstance(given, Tensor) or given.ndim == 0:
            kind, shape = type(given).__name__, tuple(getattr(given, "shape", ()))
            raise UnfitError(f"{name}: found {kind} {shape}, wanted a tensor (N, …)")
    if not len(x) == len(y) > 0:
        raise UnfitError(f"found {len(x)} inputs and {len(y)} labels, wanted as many, at least one")
    if y.dtype not in (torch.int64, torch.uint8):
        raise UnfitError(f"y: found {y.dtype}, wanted the classes' numbers as torch.int64")
    if not (optimizer is None or callable(optimizer) or hasattr(optimizer, "param_groups")):
        kind = type(optimizer).__name__
        raise UnfitError(f"optimizer: found {kind}, wanted an optimiser, or what makes one")


def forward(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, classes, …) and their loss. Raises UnfitError if they do not fit the labels."""
    with one_line(f"the network fails on x {tuple(x.shape)}, {x.dtype}, {x.device}"):
        output = model(x.detach().clone())
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise UnfitError(f"the network returns a {kind}, wanted logits (N, classes, …), or .logits")
    shape = tuple(logits.shape)
    if logits.ndim < 2 or shape[1] < 2 or not logits.is_floating_point():
        raise UnfitError(
            f"found outputs {shape}, wanted logits (N, classes, …), two classes or more"
        )
    labels, wanted = y.to(logits.device, copy=True), (shape[0], *shape[2:])
    if y.shape != wanted:
        raise UnfitError(f"logits {shape} want labels {wanted}, found {tuple(y.shape)}")
    real = labels[labels != -100]  # -100: cross-entropy leaves it out
    low, high = (real.min().item(), real.max().item()) if len(real) else (-100, -100)
    if not 0 <= low <= high < shape[1]:
        raise UnfitError(f"found labels from {low} to {high}, wanted 0 to {shape[1] - 1}")
    return logits, nn.functional.cross_entropy(logits, labels)
