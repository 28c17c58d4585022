"""The training loop, in which all seeds of a recipe train at once as one stack of networks."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from numbers import Integral, Real
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from common.data import Batch, LessonError, Split, Task, derive, load, make_split

STACK = 10  # seeds in one stack: measured on two cores, 20 take nearly twice as long, and 5 more than half
EXAMPLES_AT_ONCE = {"cpu": 100, "cuda": 5_000, "mps": 5_000}  # of each seed, in an evaluation
UNITS = {f"{part}_{name}": unit for part in Split._fields for name, unit in (("loss", "nats"), ("accuracy", "%"))}
UNITS |= {"gap": "nats", "learning_rate": ""}
# Whose step treats each element by itself, so that it fits a stack; in a class of your own say `elementwise = True`.
ELEMENTWISE = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop, optim.Rprop)
# The attributes of modules, parameters and optimisers that hold hooks which a stack would not call, or call for all.
HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")
HOOKS += ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

Inspect = Callable[[nn.Module, Split], dict[str, Any]]  # what to note of a trained network
Results = tuple[dict[str, Any], list[dict[str, Any]]]  # arrays, and notes of each seed: see `fit`


def check_value(what: str, value: Any, wanted: type | str, right: bool = True) -> None:
    """Raise LessonError, one line, if what a reader's code gave or returned is not `right`, or of the `wanted` type."""
    if not right or (isinstance(wanted, type) and not isinstance(value, wanted)):
        found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else shorten(repr(value), 60)
        raise LessonError(f"{what} must be {getattr(wanted, '__name__', wanted)}; got {found}")


def build(recipe: "Recipe", dataset: str) -> nn.Module:
    """A fresh network of a recipe for a data set. Raises LessonError if it is none, or has no parameters."""
    model = recipe.model(load(dataset).task)
    check_value("a recipe's model", model, nn.Module)
    check_value("a recipe's model", model, "a network with parameters", any(True for _ in model.parameters()))
    return model


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of the model's logits for images x (N, C, H, W) and labels y (N,)."""
    return F.cross_entropy(model(x), y)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run except its seed and its device. Raises LessonError for a bad value.

    model, optimizer: build a fresh network for a Task, and the optimiser for its parameters.
    schedule: builds a scheduler from the optimiser and the number of times it will be stepped, once every "batch" or
        "epoch"; ReduceLROnPlateau is stepped once an epoch, with the validation loss.
    loss: what a step minimises, from (model, x, y). What is REPORTED is always the plain cross-entropy.
    examples, label_noise: size of the training set (None: all there is) and the share of its labels made wrong.
    evaluations: at how many epochs to measure; the start (epoch 0) is always measured too.
    after_step, after_epoch: called with each seed's State; where after_epoch returns True, that seed's training ends.

    All seeds take a step together as long as loss and hooks keep numbers in tensors and change tensors in place.
    """

    model: Callable[[Task], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], optim.Optimizer]
    schedule: Callable[[optim.Optimizer, int], LRScheduler] | None = None
    schedule_every: str = "epoch"
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy
    epochs: int = 30
    batch_size: int = 50
    examples: int | None = None
    label_noise: float = 0.0
    evaluations: int = 10
    after_step: Callable[["State"], None] | None = None
    after_epoch: Callable[["State"], bool | None] | None = None

    def __post_init__(self) -> None:
        least = {"epochs": 0, "batch_size": 1, "examples": 1, "evaluations": 1}
        for name, value in vars(self).items():
            right = callable(value) and not isinstance(value, nn.Module)
            wanted = "a function that builds one" if name in ("model", "optimizer", "schedule") else "a function"
            if name in least:
                right = isinstance(value, Integral) and not isinstance(value, bool) and value >= least[name]
                wanted = f"a whole number from {least[name]}"
            elif name == "label_noise":
                right = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1
                wanted = "a share from 0 to 1"
            elif name == "schedule_every":
                right, wanted = value in ("epoch", "batch"), "'epoch' or 'batch'"
            if value is not None or getattr(Recipe, name, ...) is not None:
                check_value(f"a recipe's {name}", value, wanted, right)


@dataclass
class State:
    """What a hook sees, and may change but for split and epochs; the learning rate is one for all seeds of a stack."""

    model: nn.Module
    split: Split
    epochs: int
    epoch: int = 0
    step: int = 0
    learning_rate: float = math.nan
    notes: dict[str, Any] = field(default_factory=dict)


class Borrowed(nn.Module):
    """A network as `functional_call` wants it: what is called is any function of the network and a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
        result = function(self.model, x, y)
        check_value("a recipe's loss", result, Tensor)
        return result


@lru_cache(maxsize=4)
def split_for(dataset: str, seeds: tuple[int, ...], examples: int | None, label_noise: float, device: str) -> Split:
    """The splits of several seeds, stacked: x (seeds, N, C, H, W), y (seeds, N). The last few are kept. Read only."""
    splits = [make_split(load(dataset), seed, examples, label_noise, device) for seed in seeds]
    return Split(*(Batch(*map(torch.stack, zip(*part, strict=True))) for part in zip(*splits, strict=True)))


def fit(
    recipe: Recipe, seeds: Sequence[int], dataset: str = "digits", device: str = "cpu", inspect: Inspect | None = None
) -> list[Results]:
    """Train one network for each seed by the recipe and measure it; everything random comes from the seeds.

    A seed fixes its split, starting weights, order of batches and, together with the seeds beside it, masks, each by a
    stream of its own: two recipes with the same seeds see the same data in the same order, whatever else they draw.
    All seeds train as one stack; where that cannot be, one at a time, and the attribute `alone` of `seconds` says why.

    Returns, for the stack or for each seed that trained alone, arrays (dimensions, values, attributes) and notes.
    - train_loss, train_accuracy, validation_…, test_… at the end, in nats and %; gap, validation loss minus training
      loss; best_test_accuracy, …, best_epoch, at the lowest validation loss. NaN for a seed that diverged.
    - train_loss_curve, …, learning_rate_curve by epoch; the learning rate is the one that the last step applied.
    - diverged_at, the first step whose loss was not finite (0: dead at the start), or NaN; seconds of training alone.
    - Notes, of each seed: what hooks left in State.notes and `inspect(model, split)` found: numbers, or (dimensions,
      values, attributes); a dimension's own values are given as {"layer": ("layer", values)}.
    """
    torch.backends.mha.set_fastpath_enabled(False)  # like the faster kernels of attention it has no batching rule
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("error", "There is a performance drop")  # vmap would loop over the seeds, slowly
            return [Training(recipe, seeds, dataset, device, inspect).run()]
    except Exception as error:  # a mistake of the recipe's own is raised again by a single run
        if len(seeds) == 1 or isinstance(error, LessonError):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]
    return [Training(recipe, [seed], dataset, device, inspect, reason).run() for seed in seeds]


class Training:
    """Several networks trained as one: each parameter or buffer one tensor (seeds, …), a model's tensors its views."""

    def __init__(
        self, recipe: Recipe, seeds: Sequence[int], dataset: str, device: str, inspect: Inspect | None, alone: str = ""
    ) -> None:
        self.recipe, self.seeds, self.inspect, self.alone = recipe, list(seeds), inspect, alone
        self.split = split_for(dataset, tuple(seeds), recipe.examples, recipe.label_noise, device)
        self.networks, self.stacked = [], {}
        for seed in seeds:
            torch.manual_seed(derive(seed, "start"))
            self.networks.append(Borrowed(build(recipe, dataset).to(device).train()))
        self.classes = load(dataset).task.classes
        self.optimizer = recipe.optimizer(self.networks[0].parameters())
        check_value("what a recipe's optimizer builds", self.optimizer, optim.Optimizer)
        self.rate = self.optimizer.param_groups[0]["lr"]  # that the last step applied
        steps = math.ceil(self.split.train.y.shape[1] / recipe.batch_size) if recipe.schedule_every == "batch" else 1
        self.schedule = recipe.schedule(self.optimizer, recipe.epochs * steps) if recipe.schedule else None
        check_value("what a recipe's schedule builds", self.schedule, LRScheduler if recipe.schedule else type(None))
        if isinstance(self.schedule, ReduceLROnPlateau) and recipe.schedule_every == "batch":
            raise LessonError("ReduceLROnPlateau follows the validation loss of an epoch: schedule_every='epoch'")
        if len(seeds) > 1:
            self.stack()
        self.orders = [torch.Generator().manual_seed(derive(seed, "batches")) for seed in seeds]
        torch.manual_seed(derive(seeds[0], "masks"))
        own = [Split(*(Batch(part.x[i], part.y[i]) for part in self.split)) for i in range(len(seeds))]
        pairs = zip(self.networks, own, strict=True)
        self.states = [State(each.model, split, recipe.epochs) for each, split in pairs]
        self.live = np.ones(len(seeds), bool)  # which seeds have neither diverged nor ended
        self.diverged_at, self.seconds, self.epoch, self.step = np.full(len(seeds), np.nan), 0.0, 0, 0
        self.epochs: list[int] = []  # at which `curves` were measured: (seeds,), NaN for those that had ended
        self.curves: dict[str, list[np.ndarray]] = {name: [] for name in UNITS}

    def stack(self) -> None:
        """Make the networks views of one stack, and let the optimiser step that."""
        if not (type(self.optimizer) in ELEMENTWISE or getattr(self.optimizer, "elementwise", False)):
            raise RuntimeError(f"{type(self.optimizer).__name__} may look at a parameter as a whole")
        if isinstance(self.schedule, ReduceLROnPlateau):
            raise RuntimeError("ReduceLROnPlateau follows each seed's own loss")
        parameters, buffers = stack_module_state(self.networks)
        self.stacked = parameters | buffers
        wholes = {}
        for tensor, whole, i in self.views():
            tensor.data, wholes[id(tensor)] = whole.data[i], whole
        for group in self.optimizer.param_groups:
            group["params"] = [wholes[id(parameter)] for parameter in group["params"]]

    def views(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Each tensor of each seed's model, the stacked one, and the seed's place in it; none for a single network."""
        for i, network in enumerate(self.networks if self.stacked else []):
            for name, tensor in chain(network.named_parameters(), network.named_buffers()):
                yield tensor, self.stacked[name], i

    def each(self, function: Callable[[nn.Module, Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """`function(model, x, y)` for every seed's network on its own x (seeds, N, …) and y (seeds, N): (seeds, …)."""
        if not self.stacked:
            return self.networks[0](function, x[0], y[0])[None]

        def one(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            given = dict(tensors)
            result = functional_call(self.networks[0], tensors, (function, x, y))
            if any(tensors[name] is not tensor for name, tensor in given.items()):
                raise RuntimeError("the network puts a new tensor in place of a buffer")
            return result

        return vmap(one, randomness="different")(self.stacked, x, y)

    @torch.no_grad()
    def measure(self, *parts: str) -> dict[str, np.ndarray]:
        """Mean loss in nats and accuracy in % on parts of the split, in eval mode: {"train_loss": (seeds,), …}."""

        def totals(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            logits, wanted = model(x), (len(y), self.classes)
            check_value("a network's output", logits, Tensor)
            right = logits.ndim == 2 and len(logits) == len(y) and logits.shape[1] >= self.classes
            check_value("a network's output", logits, f"{wanted}, a logit for each class", right)
            return torch.stack([F.cross_entropy(logits, y, reduction="sum"), 100.0 * (logits.argmax(1) == y).sum()])

        found = {}
        self.compare()
        nn.ModuleList(self.networks).eval()
        for part in parts:
            x, y = getattr(self.split, part)
            pieces = math.ceil(y.shape[1] / EXAMPLES_AT_ONCE[x.device.type])
            sums = [self.each(totals, *piece) for piece in zip(x.chunk(pieces, 1), y.chunk(pieces, 1), strict=True)]
            found[f"{part}_loss"], found[f"{part}_accuracy"] = (sum(sums) / y.shape[1]).T.cpu().double().numpy()
        nn.ModuleList(self.networks).train()
        return found

    def compare(self) -> None:
        """Raise RuntimeError if the networks of a stack differ in more than parameters and buffers, or have hooks."""
        held, tensors = set(), dict.fromkeys(("_parameters", "_buffers", "_modules"))
        for network in self.networks if self.stacked else []:
            parts = [(type(part).__name__, vars(part) | tensors) for part in network.modules()]
            held.add(json.dumps(parts, default=lambda each: each.tolist() if isinstance(each, Tensor) else repr(each)))
            for each in (*network.modules(), *network.parameters(), self.optimizer):
                if any(getattr(each, name, None) for name in HOOKS):
                    raise RuntimeError("there is a hook on gradients or on the optimiser's steps")
        if len(held) > 1:
            raise RuntimeError("the networks differ in more than their parameters and buffers")

    def run(self) -> Results:
        """Train, measuring now and then, to the last epoch or until no seed is left."""
        epochs = self.recipe.epochs
        measured = set(np.linspace(0, epochs, self.recipe.evaluations + 1).round().astype(int).tolist())
        self.record(self.live, self.live & (epochs == 0))
        while self.epoch < epochs and self.live.any():
            start = time.perf_counter()
            self.train_epoch()
            ending = self.call(self.recipe.after_epoch) | (self.epoch == epochs)
            self.seconds += (time.perf_counter() - start) / len(self.seeds)
            if ending.any() or self.epoch in measured:
                self.record(self.live & ((self.epoch in measured) | ending), ending)
        return self.results()

    def train_epoch(self) -> None:
        """One pass over the training set, a step for each batch; only at its end a look at which seeds diverged."""
        recipe, losses = self.recipe, []
        self.epoch += 1
        self.networks[0].train()
        x, y = self.split.train
        order = torch.stack([torch.randperm(y.shape[1], generator=each) for each in self.orders]).to(y.device)
        seed = torch.arange(len(y), device=y.device)[:, None]
        for batch in order.split(recipe.batch_size, 1):
            losses.append(self.train_step(x[seed, batch], y[seed, batch]))
            if self.schedule and recipe.schedule_every == "batch":
                self.schedule.step()
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(self.measure("validation")["validation_loss"].item())
        elif self.schedule and recipe.schedule_every == "epoch":
            self.schedule.step()
        broken = ~torch.stack(losses).isfinite().cpu().numpy()  # (steps, seeds)
        diverged = self.live & broken.any(0)
        self.diverged_at[diverged] = self.step - len(losses) + 1 + broken.argmax(0)[diverged]
        self.live = self.live & ~diverged

    def train_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of each network on its own batch, x (seeds, N, C, H, W): losses (seeds,). It waits for no GPU."""
        self.step += 1
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad()
        losses = self.each(self.recipe.loss, x, y)
        right = losses.ndim == 1 and losses.requires_grad
        check_value("a recipe's loss", losses[0], "one number, a tensor () that depends on a parameter to train", right)
        losses.sum().backward()
        self.optimizer.step()
        self.call(self.recipe.after_step)
        return losses.detach()

    def call(self, hook: Callable[[State], bool | None] | None) -> np.ndarray:
        """Call a hook with the state of each live seed; returns for which seeds it returned True."""
        true = np.zeros(len(self.seeds), bool)
        if hook:
            for tensor, whole, i in self.views():
                tensor.grad = None if whole.grad is None else whole.grad[i]
            rates, before = set(), float(self.optimizer.param_groups[0]["lr"])
            for i in np.flatnonzero(self.live):
                state = self.states[i]
                state.epoch, state.step, state.learning_rate = self.epoch, self.step, before
                result = hook(state)
                right = isinstance(result, (bool, np.bool_, Tensor, type(None))) or hook is self.recipe.after_step
                check_value("what after_epoch returns", result, "True, False or None", right)
                true[i] = bool(result)
                rates.add(state.learning_rate)
            if len(rates) > 1:
                raise RuntimeError("a hook changes for one seed the learning rate that all share")
            for group in self.optimizer.param_groups if rates - {before} else []:
                group["lr"] = max(rates)
            for tensor, whole, i in self.views():
                if tensor.data_ptr() != whole[i].data_ptr() or tensor.requires_grad != whole.requires_grad:
                    raise RuntimeError("a hook puts a new tensor in place of a parameter, or freezes it")
            self.compare()
        return true

    def record(self, seeds: np.ndarray, ending: np.ndarray) -> None:
        """Measure these seeds, of which those that are `ending` train no longer: `inspect` has its look at them."""
        now = self.measure(*Split._fields)
        finite = np.isfinite(now["validation_loss"]) & np.isfinite(now["train_loss"])
        losses = (np.where(finite, now[f"{part}_loss"], np.nan) for part in ("validation", "train"))
        now |= {"gap": np.subtract(*losses), "learning_rate": np.full(len(seeds), self.rate)}
        overflowed = seeds & ~finite  # by the last step, or dead at the start
        self.diverged_at[overflowed] = self.step
        self.live = self.live & ~overflowed
        self.epochs.append(self.epoch)
        for name, curve in self.curves.items():
            curve.append(np.where(seeds & self.live, now[name], np.nan))
        for state in (self.states[i] for i in np.flatnonzero(ending & self.live)):
            found = self.inspect(state.model, state.split) if self.inspect else {}
            check_value("what inspect returns", found, dict)
            state.notes = {name: off_device(note) for name, note in (state.notes | found).items()}
            state.model.train()
        self.live = self.live & ~ending

    def results(self) -> Results:
        """What `fit` returns."""
        if any(tensor._version for part in self.split for tensor in part):
            split_for.cache_clear()
            raise LessonError("a hook or `inspect` changes images or labels, which other runs share: clone them first")
        seeds, survived, epochs = np.arange(len(self.seeds)), np.isnan(self.diverged_at), np.array(self.epochs)
        validation = np.stack(self.curves["validation_loss"], 1)  # (seeds, measurements)
        last = np.isfinite(validation).cumsum(1).argmax(1)
        best = np.where(np.isfinite(validation), validation, np.inf).argmin(1)
        found: dict[str, tuple[Any, ...]] = {"seed": ("seed", self.seeds), "epoch": ("epoch", epochs)}
        for name, unit in UNITS.items():
            curve, about = np.stack(self.curves[name], 1), {"unit": unit, "long_name": name.replace("_", " ")}
            found[f"{name}_curve"] = (("seed", "epoch"), curve, about)
            found[name] = ("seed", np.where(survived, curve[seeds, last], np.nan), about)
            about = about | {"long_name": f"{about['long_name']} at the lowest validation loss"}
            found[f"best_{name}"] = ("seed", np.where(survived, curve[seeds, best], np.nan), about)
        found["best_epoch"] = ("seed", np.where(survived, epochs[best], np.nan), {"unit": "epochs"})
        found["diverged_at"] = ("seed", self.diverged_at, {"unit": "steps"})
        found["seconds"] = ("seed", np.full(len(self.seeds), self.seconds), {"unit": "s", "alone": self.alone})
        return found, [{name: off_device(note) for name, note in state.notes.items()} for state in self.states]


def off_device(note: Any) -> Any:
    """A note with its tensors as arrays, copied: what the stack does next does not change them."""
    if isinstance(note, (tuple, list)):
        return type(note)([off_device(each) for each in note])
    note = note.detach().cpu().numpy() if isinstance(note, Tensor) else note
    return note.copy() if isinstance(note, np.ndarray) else note
