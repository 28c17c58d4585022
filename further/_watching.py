"""What `first_aid` sees of a network on one batch, forwards and backwards."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import log, nan
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from further._guarding import UnfitError, check, copies, forward, one_line, undisturbed

WATCHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass
class Seen:
    """What an examination has seen."""

    layers: list[SimpleNamespace]  # the calls of layers that the loss depends on: see `look`
    unseen: list[str]  # other modules with weights that the loss depends on
    unseen_share: float  # of all such weights
    not_finite: list[str]  # parameters
    lost: list[str]  # parameters whose gradients are not finite
    frozen: bool  # no parameter is to be trained
    probabilities: bool  # where logits should be
    loss: float
    guessing: float  # the loss of equal logits
    step: float = nan  # how far the optimiser moves the weights, in units of their norm
    stranger: bool = False  # the optimiser has nothing to train in this network


def examine(model: nn.Module, x: Tensor, y: Tensor, optimizer: object = None) -> Seen:
    """Run a copy, in training mode. Whatever fails raises UnfitError, a ValueError of one line."""
    check(model, x, y, optimizer)
    with undisturbed([x, *model.parameters()]), one_line("the network cannot be examined"):
        with one_line("the network, or its optimiser, cannot be copied"):
            model, optimizer = copies(model, optimizer)
        model.train()
        parameters, broken = list(model.parameters()), not_finite(model.named_parameters())
        frozen = [each for each in parameters if not each.requires_grad]
        for each in frozen:  # so that a gradient is seen there, too
            each.requires_grad_(each.is_floating_point())
        calls = watch(model)
        logits, loss = forward(model, x, y)
        if loss.requires_grad:
            loss.backward()
        layers = [call for call in calls if call.gradient is not None]
        unseen, share = not_looked_at(model, layers)
        if not layers:
            hint = f"; not seen: {', '.join(unseen[:4])}" if unseen else ""
            raise UnfitError(f"the loss depends on no linear or convolutional layer{hint}")
        for each in frozen:
            each.requires_grad_(False).grad = None
        untrained = len(frozen) == len(parameters)
        lost = not_finite([(name, each.grad) for name, each in model.named_parameters()])
        faults = (broken, lost, untrained, probabilities(logits))
        seen = Seen(layers, unseen, share, *faults, loss.item(), log(logits.shape[1]))
        if optimizer is not None and not untrained:
            with one_line("the optimiser fails"):
                seen.step, seen.stranger = step(model, optimizer, partial(forward, model, x, y))
    return seen


def watch(model: nn.Module) -> list[SimpleNamespace]:
    """A list to which each call of a WATCHED layer, not of one inside it, will be added."""
    calls, inner = [], set()
    for name, layer in model.named_modules():
        if isinstance(layer, WATCHED) and layer not in inner:
            layer.register_forward_hook(partial(look, calls, name), with_kwargs=True)
            inner.update(layer.modules() if hasattr(layer, "weight") else [])
    return calls


def look(
    calls: list, name: str, layer: nn.Module, inputs: tuple, named: dict, output: object
) -> None:
    """Note a call. Inputs: difference between images, share that is zero for all (dead) or at
    either end of the range (flat: a tanh's ±1). Weights: their size in that of He's (gain)."""
    given, output = tensor_in([*inputs, *named.values()]), tensor_in(output)
    weight = tensor_in(getattr(layer, "weight", None))
    if given is None or output is None or weight is None:
        return
    x, inner = given.detach().cpu().double(), given.requires_grad  # inner: not the images
    call = SimpleNamespace(name=name, gradient=None, blind=not output.requires_grad)
    call.difference = x.var(0, correction=0).mean().sqrt().item()
    call.dead = inner * (x == 0).all(0).double().mean().item()
    margin = 0.0125 * (x.max() - x.min())  # there a tanh has lost 95 % of its slope
    ends = (x < x.min() + margin).double().mean(), (x > x.max() - margin).double().mean()
    call.flat = sum(ends).item() if inner and min(ends) > 0.05 else 0.0
    size = weight.detach().cpu().double().square().mean()
    call.gain = (size * weight[0].numel() / 2).sqrt().item()
    place = first_look(calls, call)
    calls[place : place + 1] = [call]
    if not call.blind:
        output.register_hook(partial(look_back, call, isinstance(layer, nn.Linear), weight))


def first_look(calls: list, call: SimpleNamespace) -> int:
    """Where this call stands in the list. A checkpointed layer is called twice: first without
    gradients, where it belongs, and again for them, on the same inputs."""
    for place in reversed(range(len(calls))):
        each = calls[place]
        if each.blind and (each.name, each.difference) == (call.name, call.difference):
            return place
    return len(calls)


def look_back(call: SimpleNamespace, linear: bool, weight: Tensor, gradient: Tensor) -> None:
    """Note an output's gradient for an image, and the share of units that are no copies."""
    gradient = gradient.cpu().double()
    call.gradient = gradient.flatten(1).norm(dim=1).mean().item()
    units, rows = gradient[:9].movedim(-1 if linear else 1, 0), []
    for part in (weight.detach().cpu(), units):
        part = part.nan_to_num(0, 0, 0).flatten(1)
        if len(part) == len(units):  # as many rows as units
            rows.append((1000 * part / part.abs().max()).nan_to_num().round().double())
    rows, private = torch.cat(rows, 1), torch.Generator().manual_seed(0)
    keys = torch.randint(2**24, (rows.shape[1], 2), generator=private).double()
    call.distinct = len((rows @ keys).unique(dim=0)) / len(rows)  # exact: whole numbers


def tensor_in(values: object) -> Tensor | None:
    """The first tensor of numbers with two dimensions or more, if there is one."""
    for each in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(each, Tensor) and each.is_floating_point() and each.ndim > 1 and each.numel():
            return each
    return None


def not_looked_at(model: nn.Module, layers: list) -> tuple[list[str], float]:
    """The modules with weights that have a gradient and were not looked at, and their share of all
    such weights. An embedding is seen by the layer that gets its vectors."""
    seen, names, hidden, total = set(), {}, 0, 0
    for name in {layer.name for layer in layers}:
        layer = model.get_submodule(name)
        for part in layer.modules():
            if part is layer or not isinstance(part, WATCHED):
                seen.update(part.parameters(recurse=False))
    for name, module in model.named_modules():
        for each in module.parameters(recurse=False):
            if each.grad is None or each.ndim < 2 or isinstance(module, EMBEDDINGS):
                continue
            total += each.numel()
            if each not in seen:
                hidden += each.numel()
                names[name or type(module).__name__] = None
    return list(names), hidden / max(total, 1)


def not_finite(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of the tensors that are not finite."""
    found = []
    for name, each in named:
        if each is not None and not is_lazy(each) and not each.to_dense().isfinite().all():
            found.append(name)
    return found


def probabilities(logits: Tensor) -> bool:
    """Whether the outputs come from a softmax or a sigmoid."""
    if logits.grad_fn is not None and logits.grad_fn.name() == "SigmoidBackward0":
        return True
    sums = logits.detach().cpu().double().sum(1)
    return bool((logits >= 0).all() and ((sums - 1).abs() < 0.01).all())


def step(model: nn.Module, optimizer: object, forward: Callable) -> tuple[float, bool]:
    """How far a step moves the weights, in units of their norm, NaN if that is zero; and whether
    the optimiser has nothing to train in this network. Raises whatever the optimiser raises."""
    made = optimizer(model.parameters()) if callable(optimizer) else optimizer
    own, held = set(model.parameters()), []
    for group in made.param_groups:
        held += [each for each in group["params"] if each.requires_grad and each in own]
    if not held:
        return nan, True

    def closure() -> Tensor:
        model.zero_grad()
        loss = forward()[1]
        loss.backward()
        return loss

    before = [each.detach().clone() for each in held]
    wanted = signature(made.step).parameters.get("closure")  # LBFGS cannot do without
    arguments = [closure] if wanted and wanted.default is wanted.empty else []
    made.step(*arguments)
    moved = [new.detach() - old for new, old in zip(held, before, strict=True)]
    return norm(moved) / norm(before) if norm(before) else nan, False


def norm(tensors: list[Tensor]) -> float:
    """That of all their numbers together."""
    return sum(each.float().norm().item() ** 2 for each in tensors) ** 0.5
