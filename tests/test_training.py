"""The training loop: a stack gives the numbers of single runs, and single runs are the loop one would write by hand."""

import copy
import math
import time
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import recipes as small
import torch
import torch.nn.functional as F
from recipes import DIVERGES, SGD, SMALL
from torch import nn, optim
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau
from torch.utils._python_dispatch import TorchDispatchMode

from common import training
from common.data import Batch, LessonError, Split, derive, load, make_split
from common.training import UNITS, Recipe, State, Training, cross_entropy, fit, off_device, split_for

SEEDS = [0, 1, 2]


@pytest.fixture
def double():
    """In double precision only real differences show."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def curve(found: dict, name: str, row: int = 0) -> dict[int, float]:
    """A seed's curve as {epoch: number}, without the epochs at which it was not measured."""
    pairs = zip(found["epoch"][1].tolist(), found[f"{name}_curve"][1][row].tolist(), strict=True)
    return {epoch: value for epoch, value in pairs if not math.isnan(value)}


def as_array(note) -> np.ndarray:
    """The values of a note: a number, an array, a list of tensors, or (dimensions, values)."""
    note = note[1] if isinstance(note, tuple) else note
    return torch.stack(note).numpy() if isinstance(note, list) and torch.is_tensor(note[0]) else np.asarray(note)


def assert_close(a, b) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def assert_same_numbers(together: list, alone: list) -> None:
    """What `fit` found for several seeds at once, and for each by itself: numbers, curves and notes."""
    rows = [(found, notes, i) for found, every_seed in together for i, notes in enumerate(every_seed)]
    assert len(rows) == len(alone)
    for (found, notes, i), (single, (single_notes,)) in zip(rows, alone, strict=True):
        for name in [*UNITS, *(f"best_{each}" for each in UNITS), "best_epoch", "diverged_at"]:
            assert_close(found[name][1][i], single[name][1][0])
        for name in UNITS:
            ours, theirs = curve(found, name, i), curve(single, name)
            assert set(ours) == set(theirs) or (name.startswith("test") and set(ours) > set(theirs))
            assert_close([ours[epoch] for epoch in theirs], list(theirs.values()))
        assert set(notes) == set(single_notes)
        for name, note in single_notes.items():
            assert_close(as_array(notes[name]), as_array(note))


def assert_stack_equals_single_runs(recipe: Recipe, seeds=SEEDS, inspect=small.tensors) -> list:
    together = fit(recipe, seeds, inspect=inspect)
    assert len(together) == 1, together[0][0]["seconds"][2]["alone"]
    assert together[0][0]["seconds"][2]["alone"] == ""
    assert_same_numbers(together, [fit(recipe, [seed], inspect=inspect)[0] for seed in seeds])
    return together


def assert_falls_back(recipe: Recipe, reason: str) -> list:
    together = fit(recipe, SEEDS, inspect=small.tensors)
    assert len(together) == len(SEEDS)
    assert {found["seconds"][2]["alone"] for found, _ in together} == {together[0][0]["seconds"][2]["alone"]}
    assert reason in together[0][0]["seconds"][2]["alone"]
    assert "\n" not in together[0][0]["seconds"][2]["alone"]
    assert_same_numbers(together, [fit(recipe, [seed], inspect=small.tensors)[0] for seed in SEEDS])
    return together


# The stack against single runs


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "optimizer",
    [
        partial(optim.SGD, lr=0.1, momentum=0.9),
        partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        partial(optim.Adam, lr=0.01, amsgrad=True),
        partial(optim.AdamW, lr=0.01, weight_decay=0.3),
    ],
)
def test_a_stack_gives_the_numbers_of_single_runs_for_every_usual_optimiser(double, optimizer, fused):
    assert_stack_equals_single_runs(replace(SMALL, model=small.mlp, optimizer=partial(optimizer, fused=fused)))


@pytest.mark.parametrize("optimizer", sorted(training.ELEMENTWISE, key=lambda each: each.__name__))
def test_every_optimiser_that_is_called_elementwise_is(double, optimizer):
    assert_stack_equals_single_runs(replace(SMALL, model=small.mlp, optimizer=partial(optimizer, lr=0.01)))


@pytest.mark.parametrize(
    "model", [small.batch_norm, small.convolution, small.layer_norm, small.Tied, small.frozen, small.transformer]
)
def test_a_stack_gives_the_numbers_of_single_runs_for_every_network(double, model):
    """Running statistics, too: `tensors` returns every buffer."""
    momentum = partial(optim.SGD, lr=0.1, momentum=0.9)
    assert_stack_equals_single_runs(replace(SMALL, model=model, optimizer=momentum))


def test_running_statistics_are_among_what_is_compared():
    ((_, notes),) = fit(replace(SMALL, model=small.batch_norm), SEEDS, inspect=small.tensors)
    names = "3.running_mean", "3.running_var", "3.num_batches_tracked"
    assert all(not np.array_equal(notes[0][name][1], notes[1][name][1]) for name in names[:2])
    assert [note[names[2]][1] for note in notes] == [12, 12, 12]


def half_each_time(optimizer: optim.Optimizer, n: int) -> ExponentialLR:
    return ExponentialLR(optimizer, 0.5)


def one_cycle(optimizer: optim.Optimizer, n: int) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.2, total_steps=n)


@pytest.mark.parametrize(("every", "schedule"), [("epoch", half_each_time), ("batch", one_cycle)])
def test_a_stack_follows_a_schedule_as_single_runs_do(double, every, schedule):
    momentum = partial(optim.SGD, lr=0.1, momentum=0.9)
    recipe = replace(SMALL, model=small.mlp, optimizer=momentum, schedule=schedule, schedule_every=every)
    assert_stack_equals_single_runs(recipe)


def test_groups_of_parameters_are_made_from_an_ordinary_networks_parameters(double):
    """`weights_apart` sorts them by their number of dimensions, which a stack's have one more of."""
    together = assert_stack_equals_single_runs(replace(SMALL, model=small.mlp, optimizer=small.weights_apart))
    undecayed = fit(replace(SMALL, model=small.mlp, optimizer=partial(small.weights_apart, decay=0.0)), SEEDS)
    assert not np.allclose(together[0][0]["train_loss"][1], undecayed[0][0]["train_loss"][1])


def test_a_penalty_over_the_models_parameters_is_each_seeds_own(double):
    assert_stack_equals_single_runs(replace(SMALL, model=small.mlp, loss=small.penalised))


def test_a_ragged_last_batch_and_wrong_labels_are_each_seeds_own(double):
    assert_stack_equals_single_runs(replace(SMALL, model=small.mlp, examples=90, batch_size=40, label_noise=0.3))


def test_any_seeds_make_a_stack_in_the_order_given(double):
    ((found, _),) = assert_stack_equals_single_runs(SMALL, [1_000_003, 7])
    assert found["seed"] == ("seed", [1_000_003, 7])


# The loop one would write by hand


def test_fit_is_the_loop_one_would_write_by_hand():
    """Plain SGD, full batches: two epochs by hand give the same weights and losses."""
    recipe = replace(SMALL, batch_size=100, epochs=2)
    ((found, (weights,)),) = fit(recipe, [4], inspect=small.tensors)
    split = make_split(load("digits"), 4, 100)
    torch.manual_seed(derive(4, "start"))
    model = small.linear(load("digits").task)
    optimizer = SGD(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(split.train.x), split.train.y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(weights[name][1], value.numpy(), rtol=1e-5, atol=1e-6)
    logits = model(split.test.x)
    assert found["test_loss"][1] == pytest.approx(F.cross_entropy(logits, split.test.y).item(), rel=1e-5)
    assert found["test_accuracy"][1] == pytest.approx(100 * (logits.argmax(1) == split.test.y).float().mean().item())


@pytest.mark.parametrize(("examples", "size"), [(100, 25), (90, 40)])
def test_fit_visits_every_example_once_an_epoch_in_the_seeds_own_order(examples, size):
    """By hand with batches, the last of which may be smaller: the order is drawn by a generator of the seed's own,
    anew for each epoch.
    """
    recipe = replace(SMALL, examples=examples, batch_size=size)
    ((_, (weights,)),) = fit(recipe, [4], inspect=small.tensors)
    x, y = make_split(load("digits"), 4, examples).train
    torch.manual_seed(derive(4, "start"))
    model = small.linear(load("digits").task)
    optimizer, order = SGD(model.parameters()), torch.Generator().manual_seed(derive(4, "batches"))
    for _ in range(3):
        for batch in torch.randperm(examples, generator=order).split(size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    np.testing.assert_allclose(weights["2.weight"][1], model[2].weight.detach().numpy(), rtol=1e-5, atol=1e-6)


# What a seed fixes

TRACED = replace(SMALL, model=partial(small.Traced, p=0.5), loss=small.traced, after_step=small.note_the_trace)


def traces(recipe: Recipe = TRACED, seeds=SEEDS) -> list[dict]:
    ((_, every_seed),) = fit(recipe, seeds)
    return [{name: as_array(note) for name, note in notes.items()} for notes in every_seed]


def test_seeds_of_a_stack_have_data_starts_orders_and_masks_of_their_own():
    notes = traces()
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        for name in ("start", "x", "y", "mask"):
            assert not np.array_equal(notes[a][name], notes[b][name])
        assert not np.array_equal(notes[a]["x"][0], notes[a]["x"][4])  # nor does an epoch repeat the one before


def test_the_splits_of_a_stack_are_those_of_its_seeds():
    stack = split_for("digits", (3, 5), 100, 0.2, "cpu")
    for i, seed in enumerate((3, 5)):
        fresh = make_split(load("digits"), seed, 100, 0.2)
        for part, own in zip(stack, fresh, strict=True):
            assert torch.equal(part.x[i], own.x)
            assert torch.equal(part.y[i], own.y)


def test_order_of_batches_is_the_same_in_a_stack_and_alone():
    """Each batch holds the very images of the single run's, and each epoch every image once."""
    for seed, note in zip(SEEDS, traces(), strict=True):
        (alone,) = traces(seeds=[seed])
        assert all(np.array_equal(note[name], alone[name]) for name in ("start", "x", "y"))
        images = np.concatenate(note["x"][:4])
        assert len(np.unique(images.reshape(100, -1), axis=0)) == 100


def test_arms_of_a_seed_share_split_start_and_batches_whatever_they_draw():
    plain, drawing = traces(replace(TRACED, model=partial(small.Traced, p=0.0))), traces()
    for a, b in zip(plain, drawing, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in ("start", "x", "y"))
        assert not np.array_equal(a["mask"], b["mask"])


class DrawingMore(small.Traced):
    """The same layers, and one more, whose weights are drawn last and never used."""

    def __init__(self, task, p: float) -> None:
        super().__init__(task, p)
        self.unused = nn.Linear(7, 7)


def test_masks_are_a_stream_of_their_own_whatever_the_starting_weights_drew():
    for a, b in zip(traces(), traces(replace(TRACED, model=partial(DrawingMore, p=0.5))), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in ("start", "x", "y", "mask"))


def test_masks_differ_from_example_to_example_and_from_step_to_step():
    for note in traces():
        masks = note["mask"]
        assert set(np.unique(masks)) == {0, 2}
        assert 0.45 < (masks == 0).mean() < 0.55
        assert not np.array_equal(masks[0], masks[1])
        assert not np.array_equal(masks[0, 0], masks[0, 1])


def test_a_single_seeds_masks_are_its_own():
    one, other = (traces(seeds=[seed])[0]["mask"] for seed in (0, 1))
    assert not np.array_equal(one, other)


def numbers(results: list) -> list:
    return [
        {name: np.asarray(entry[1]).tolist() for name, entry in found.items() if name != "seconds"}
        for found, _ in results
    ]


def test_same_seeds_same_run_whatever_was_drawn_before():
    recipe = replace(SMALL, model=small.noisy)
    first = fit(recipe, SEEDS)
    torch.manual_seed(12345)
    torch.rand(7)
    np.testing.assert_equal(numbers(first), numbers(fit(recipe, SEEDS)))
    assert numbers(first)[0]["test_loss"] != numbers(fit(recipe, [3, 4, 5]))[0]["test_loss"]


def test_runs_leave_the_kept_split_as_it_was():
    before = [part.x.clone() for part in split_for("digits", (0, 1), 100, 0.0, "cpu")]
    fit(SMALL, [0, 1])
    after = split_for("digits", (0, 1), 100, 0.0, "cpu")
    assert all(torch.equal(a, part.x) for a, part in zip(before, after, strict=True))


def test_every_seed_of_every_run_has_a_fresh_network():
    built = []

    def build(task):
        built.append(small.linear(task))
        return built[-1]

    fit(replace(SMALL, model=build), SEEDS)
    fit(replace(SMALL, model=build), SEEDS)
    assert len({id(model) for model in built}) == 6


# A seed that diverges


def test_a_seed_that_diverges_disturbs_no_other_and_is_dated_to_its_step(double):
    recipe = replace(SMALL, model=partial(small.Counting, seed=1), loss=small.breaks_at_6, epochs=4, evaluations=4)
    ((found, notes),) = assert_stack_equals_single_runs(recipe)
    np.testing.assert_equal(found["diverged_at"][1], [math.nan, 6, math.nan])
    for name in UNITS:
        assert np.isfinite(found[name][1]).tolist() == [True, False, True]
        assert np.isnan(found[f"best_{name}"][1][1])
    assert list(curve(found, "train_loss", 1)) == [0, 1]
    assert list(curve(found, "train_loss", 2)) == [0, 1, 2, 3, 4]
    assert notes[1] == {}
    assert notes[0]["count"][1] == 16


def adds_infinity_at_6(model: nn.Module, x, y):
    return cross_entropy(model, x, y) + torch.where(model.chosen & (model.count == 6), math.inf, 0.0)


def test_one_loss_that_is_not_finite_ends_a_run_even_if_the_next_ones_are(double):
    recipe = replace(SMALL, model=partial(small.Counting, seed=0), loss=adds_infinity_at_6)
    ((found, _),) = assert_stack_equals_single_runs(recipe)
    np.testing.assert_equal(found["diverged_at"][1], [6, math.nan, math.nan])


def grows_at_the_last_step(model: nn.Module, x, y):
    return cross_entropy(model, x, y) * torch.where(model.chosen & (model.count == 12), 1e200, 1.0)


def test_a_network_that_overflows_only_when_it_is_measured_diverged_at_the_last_step(double):
    recipe = replace(SMALL, model=partial(small.Counting, seed=2), loss=grows_at_the_last_step)
    ((found, notes),) = assert_stack_equals_single_runs(recipe)
    np.testing.assert_equal(found["diverged_at"][1], [math.nan, math.nan, 12])
    assert math.isnan(found["test_accuracy"][1][2])
    assert list(curve(found, "validation_loss", 2)) == [0, 1, 2]
    assert notes[2] == {}


@pytest.mark.parametrize("seeds", [[0], SEEDS])
def test_divergence_is_a_result_though_every_seed_diverges(seeds):
    ((found, notes),) = fit(DIVERGES, seeds, inspect=small.tensors)
    assert ((found["diverged_at"][1] >= 1) & (found["diverged_at"][1] <= 16)).all()
    for name in ("test_accuracy", "gap", "best_test_loss", "learning_rate"):
        assert np.isnan(found[name][1]).all()
    assert found["epoch"][1][0] == 0
    assert found["validation_loss_curve"][1].shape == (len(seeds), len(found["epoch"][1]))
    assert np.isfinite(found["validation_loss_curve"][1][:, 0]).all()
    assert notes == [{} for _ in seeds]


# Hooks


def note_the_state(state: State) -> None:
    state.notes.setdefault("steps", []).append((state.epoch, state.step, state.epochs))
    state.notes.setdefault("gradients", []).append(state.model[2].weight.grad.clone())
    state.notes.setdefault("weights", []).append(state.model[2].weight.detach().clone())
    assert len(state.split.train.y) == 100


def test_a_hook_sees_its_own_seeds_state_and_gradients(double):
    recipe = replace(SMALL, model=small.mlp, after_step=note_the_state, epochs=2)
    ((_, notes),) = assert_stack_equals_single_runs(recipe, inspect=None)
    assert notes[1]["steps"] == [((step + 3) // 4, step, 2) for step in range(1, 9)]
    gradients, weights = (as_array(notes[1][name]) for name in ("gradients", "weights"))
    assert not np.allclose(as_array(notes[0]["gradients"]), gradients)
    assert (np.abs(gradients).sum((1, 2)) > 0).all()
    assert_close(weights[1:], weights[:-1] - 0.1 * gradients[1:])


def shrink_data(state: State) -> None:
    for p in state.model.parameters():
        p.data.mul_(0.9)


def clamp(state: State) -> None:
    with torch.no_grad():
        for p in state.model.parameters():
            p.clamp_(-0.05, 0.05)


def perturb_a_buffer(state: State) -> None:
    state.model[3].running_mean += 0.1 * state.step


@pytest.mark.parametrize("hook", [shrink_data, clamp, perturb_a_buffer])
@pytest.mark.parametrize("when", ["after_step", "after_epoch"])
def test_a_hook_may_change_tensors_in_place_and_the_stack_follows(double, hook, when):
    adam = partial(optim.Adam, lr=0.01)
    recipe = replace(SMALL, model=small.batch_norm, optimizer=adam, **{when: hook})
    ((changed, _),) = assert_stack_equals_single_runs(recipe)
    ((untouched, _),) = fit(replace(recipe, **{when: None}), SEEDS)
    assert not np.allclose(changed["train_loss"][1], untouched["train_loss"][1])


def replace_data(state: State) -> None:
    for p in state.model.parameters():
        p.data = p.data * 0.9


def replace_a_parameter(state: State) -> None:
    with torch.no_grad():
        state.model[2].weight = nn.Parameter(state.model[2].weight * 0.9)


@pytest.mark.parametrize("hook", [replace_data, replace_a_parameter])
def test_a_hook_that_puts_a_new_tensor_in_place_is_found_out(double, hook):
    assert_falls_back(replace(SMALL, model=small.mlp, after_epoch=hook), "a hook puts a new tensor in place")


def freeze(state: State) -> None:
    if state.epoch == 1:
        state.model[2].weight.requires_grad_(False)


def test_a_parameter_that_a_hook_freezes_is_found_out(double):
    assert_falls_back(replace(SMALL, model=small.mlp, after_epoch=freeze), "or freezes it")


def halve_some_rates(state: State) -> None:
    state.learning_rate *= 0.5 if state.model[2].bias.sum() > 0 else 1.0


def test_rates_that_differ_from_seed_to_seed_are_each_seeds_own(double):
    together = assert_falls_back(replace(SMALL, after_epoch=halve_some_rates), "the learning rate that all share")
    assert len({found["learning_rate"][1][0] for found, _ in together}) > 1


def set_the_rate(state: State) -> None:
    state.learning_rate = 0.1 * 0.5**state.epoch


def test_a_hook_may_set_the_rate_that_all_seeds_share(double):
    ((found, _),) = assert_stack_equals_single_runs(replace(SMALL, after_epoch=set_the_rate))
    assert curve(found, "learning_rate") == {0: 0.1, 1: 0.1, 2: 0.05, 3: 0.025}


def set_the_rate_to_zero(state: State) -> None:
    state.learning_rate = 0.0


@pytest.mark.parametrize("seeds", [[0], SEEDS])
def test_the_rate_that_a_hook_sets_is_that_of_every_group_of_parameters(seeds):
    """Of the weights and of the biases: at a rate of 0 neither changes any more."""
    recipe = replace(SMALL, model=small.mlp, optimizer=small.weights_apart, after_epoch=set_the_rate_to_zero)
    ((found, _),) = fit(recipe, seeds)
    losses = found["train_loss_curve"][1]
    assert (losses[:, 1] < losses[:, 0]).all()
    assert (losses[:, 1:] == losses[:, 1:2]).all()


def note_the_rate(state: State) -> None:
    state.notes.setdefault("rates", []).append(state.learning_rate)


@pytest.mark.parametrize("seeds", [[0], SEEDS])
def test_a_hook_reads_the_rate_that_a_schedule_has_set(seeds):
    ((_, notes),) = fit(replace(SMALL, schedule=half_each_time, after_step=note_the_rate), seeds)
    assert [note["rates"] for note in notes] == [[0.1] * 4 + [0.05] * 4 + [0.025] * 4 for _ in seeds]


def stop_early(state: State) -> bool:
    state.notes.setdefault("epochs", []).append(state.epoch)
    return bool(state.epoch == state.model.stop)


def copies(model: nn.Module, split: Split) -> dict:
    return copy.deepcopy(small.tensors(model, split))


def test_seeds_of_a_stack_may_stop_at_epochs_of_their_own(double):
    """Seed 0 after 3 epochs, seed 1 after 1, seed 2 never: what was found of each is the single run's."""
    recipe = replace(SMALL, model=small.Patient, epochs=5, evaluations=2, after_epoch=stop_early)
    ((found, notes),) = assert_stack_equals_single_runs(recipe, inspect=copies)
    assert [list(curve(found, "train_loss", i)) for i in range(3)] == [[0, 2, 3], [0, 1], [0, 2, 5]]
    assert [note["epochs"] for note in notes] == [[1, 2, 3], [1], [1, 2, 3, 4, 5]]
    assert np.isnan(found["diverged_at"][1]).all()
    assert np.isfinite(found["test_accuracy"][1]).all()


def test_what_was_found_of_a_seed_that_stopped_is_not_changed_by_those_that_go_on(double):
    """Though `inspect` returns the network's own tensors, which are views of the stack."""
    recipe = replace(SMALL, model=small.Patient, epochs=5, evaluations=2, after_epoch=stop_early)
    assert_stack_equals_single_runs(recipe, inspect=small.tensors)


def numpy_views(model: nn.Module, split: Split) -> dict:
    """As `tensors`, but arrays, which share the memory of the stack."""
    return {name: (note[0], note[1].numpy()) for name, note in small.tensors(model, split).items()}


def note_an_array(state: State) -> None:
    state.notes["weights"] = state.model.layers[2].weight.detach().numpy()


def test_arrays_that_were_found_of_a_seed_that_stopped_are_copied_too(double):
    recipe = replace(SMALL, model=small.Patient, epochs=5, evaluations=2, after_epoch=stop_early)
    assert_stack_equals_single_runs(replace(recipe, after_step=note_an_array), inspect=numpy_views)


def leave_in_eval_mode(model: nn.Module, split: Split) -> dict:
    model.eval()
    return {}


def test_a_seed_that_inspect_leaves_in_eval_mode_does_not_hold_up_those_that_go_on(double):
    recipe = replace(SMALL, model=small.Patient, epochs=5, evaluations=2, after_epoch=stop_early)
    assert_stack_equals_single_runs(recipe, inspect=leave_in_eval_mode)


def test_after_epoch_can_stop_all_and_the_stop_is_measured():
    recipe = replace(SMALL, epochs=50, evaluations=2, after_epoch=lambda state: state.epoch == 3)
    ((found, _),) = fit(recipe, SEEDS)
    assert found["epoch"][1].tolist() == [0, 3]
    assert (found["test_accuracy"][1] > 30).all()


def rest(state: State) -> None:
    time.sleep(0.02)


def test_the_time_of_hooks_is_counted_and_shared_among_the_seeds():
    start = time.perf_counter()
    ((found, _),) = fit(replace(SMALL, after_epoch=rest), SEEDS)
    assert found["seconds"][1].sum() <= time.perf_counter() - start
    assert (found["seconds"][1] >= 3 * 0.02).all()
    assert len(set(found["seconds"][1])) == 1


def note_tensors(state: State) -> None:
    state.notes.setdefault("list", []).append(torch.full((2,), float(state.step)))
    state.notes["last"] = torch.tensor(state.step)
    state.notes["array"] = ("layer", torch.full((2,), 0.5), {"unit": "nats"})
    state.notes["number"] = state.step


def test_notes_of_hooks_and_inspections_come_back_without_tensors():
    recipe = replace(SMALL, after_step=note_tensors, epochs=1)
    ((_, notes),) = fit(recipe, [0, 1], inspect=lambda model, split: {"layers": len(model), "two": torch.tensor(2.0)})
    for note in notes:
        assert note["last"] == note["number"] == 4
        assert (note["layers"], note["two"]) == (3, 2)
        assert not isinstance(note["last"], torch.Tensor)
        dimension, values, about = note["array"]
        assert (dimension, values.tolist(), about) == ("layer", [0.5, 0.5], {"unit": "nats"})
    assert off_device([1, 2]) == [1, 2]


def test_of_two_notes_of_one_name_that_of_inspect_is_kept():
    ((_, notes),) = fit(replace(SMALL, after_step=note_tensors), SEEDS, inspect=lambda model, split: {"number": -1})
    assert [(note["number"], note["last"]) for note in notes] == [(-1, 12)] * 3


def darken(state: State) -> None:
    state.split.train.x.mul_(0.5)


def relabel(model: nn.Module, split: Split) -> dict:
    split.test.y.fill_(0)
    return {}


@pytest.mark.parametrize("seeds", [[0], SEEDS])
@pytest.mark.parametrize(
    ("hooks", "inspect"), [({"after_step": darken}, None), ({"after_epoch": darken}, None), ({}, relabel)]
)
def test_images_and_labels_that_runs_share_may_not_be_changed_and_no_other_run_meets_them(seeds, hooks, inspect):
    with pytest.raises(LessonError, match="changes images or labels"):
        fit(replace(SMALL, **hooks), seeds, inspect=inspect)
    for i, seed in enumerate(seeds):
        fresh = make_split(load("digits"), seed, 100)
        for part, own in zip(split_for("digits", tuple(seeds), 100, 0.0, "cpu"), fresh, strict=True):
            assert torch.equal(part.x[i], own.x)
            assert torch.equal(part.y[i], own.y)


# What cannot be stacked


def asks_for_a_number(model: nn.Module, x, y):
    loss = cross_entropy(model, x, y)
    return loss * (2 if loss.item() > 1 else 1)


def branches(model: nn.Module, x, y):
    loss = cross_entropy(model, x, y)
    return loss * 2 if loss > 1 else loss


def rotated(model: nn.Module, x, y):
    """Each image turned by its own mean, with operations for which vmap would loop over the seeds."""
    angle = x.mean((1, 2, 3))
    rows = [
        torch.stack([angle.cos(), -angle.sin(), 0 * angle], 1),
        torch.stack([angle.sin(), angle.cos(), 0 * angle], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return cross_entropy(model, F.grid_sample(x, grid, align_corners=False), y)


@pytest.mark.parametrize("loss", [asks_for_a_number, branches, rotated])
def test_a_loss_that_no_stack_can_compute_is_found_out(double, loss):
    reasons = {"asks_for_a_number": "item()", "branches": "control flow", "rotated": "performance drop"}
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as in a lesson: pytest would make an error of every warning
        assert_falls_back(replace(SMALL, model=small.mlp, loss=loss), reasons[loss.__name__])


DIFFER = "the networks differ in more than their parameters and buffers"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (small.lstm, DIFFER),  # it keeps a list of its weights
        (small.Drawing, DIFFER),
        (partial(small.Replacing, seed=1), "new tensor in place of a buffer"),
    ],
)
def test_a_network_that_no_stack_can_hold_is_found_out(double, model, reason):
    assert_falls_back(replace(SMALL, model=model), reason)


def differ(hooked: list, plain: list) -> list[bool]:
    """For each seed that trained alone, whether it ended elsewhere than in a stack without hooks."""
    alone = [found["train_loss"][1][0] for found, _ in hooked]
    return (~np.isclose(alone, plain[0][0]["train_loss"][1], rtol=1e-6)).tolist()


def weaken_some(state: State) -> None:
    """Those with a bias above zero, during the second epoch."""
    state.model.strength = 0.5 if state.epoch == 1 and state.model.out.bias.sum() > 0 else 1.0


def weaken_some_at_the_end(state: State) -> None:
    state.model.strength = 0.5 if state.step == 12 and state.model.out.bias.sum() > 0 else 1.0


@pytest.mark.parametrize("hooks", [{"after_epoch": weaken_some}, {"after_step": weaken_some_at_the_end}])
def test_networks_that_a_hook_makes_differ_are_found_out_before_an_epoch_and_a_measurement(double, hooks):
    recipe = replace(SMALL, model=small.Weakened, evaluations=1)
    changed = differ(assert_falls_back(replace(recipe, **hooks), DIFFER), fit(recipe, SEEDS))
    assert len(set(changed)) == 2


def put_some_in_eval_mode(state: State) -> None:
    state.model.train(state.model[3].bias.sum().item() > 0)


def test_a_mode_that_a_hook_sets_for_some_seeds_is_found_out(double):
    recipe = replace(SMALL, model=partial(small.noisy, p=0.0), evaluations=1, after_epoch=put_some_in_eval_mode)
    assert_falls_back(recipe, DIFFER)


@pytest.mark.parametrize("hook", ["backward", "backward_pre", "parameter", "accumulated"])
def test_a_hook_on_gradients_is_called_for_each_seed(double, hook):
    together = assert_falls_back(replace(SMALL, model=partial(small.hooked, hook=hook)), "there is a hook on gradients")
    assert all(differ(together, fit(replace(SMALL, model=small.mlp), SEEDS)))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_on_an_optimisers_steps_is_called_for_each_seed(double, when):
    """It clips the norm of a tensor, which in a stack would be the norm of all seeds' tensors."""
    recipe = replace(SMALL, optimizer=partial(small.clipping, when=when))
    assert all(differ(assert_falls_back(recipe, "on the optimiser's steps"), fit(SMALL, SEEDS)))


def needs_a_tensor_of_its_own(state: State) -> None:
    weight = state.model[2].weight
    if weight.untyped_storage().nbytes() > weight.nbytes:
        raise KeyError("a view of something larger")


def test_whatever_fails_in_a_stack_only_is_done_seed_by_seed(double):
    assert_falls_back(replace(SMALL, after_step=needs_a_tensor_of_its_own), "a view of something larger")


def halve_at_once(optimizer: optim.Optimizer, n: int) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0)


def test_a_plateau_is_each_seeds_own(double):
    """Stepped once an epoch with the validation loss: the rate halves after each epoch that did not lower it."""
    recipe = replace(
        SMALL, model=small.mlp, optimizer=partial(optim.SGD, lr=0.5), schedule=halve_at_once, label_noise=0.5
    )
    together = assert_falls_back(replace(recipe, epochs=12, evaluations=12), "ReduceLROnPlateau")
    histories = []
    for found, _ in together:
        losses, rates = found["validation_loss_curve"][1][0], found["learning_rate_curve"][1][0]
        lowest, rate = math.inf, 0.5
        for epoch in range(1, 13):
            assert rates[epoch] == rate
            rate, lowest = (rate, losses[epoch]) if losses[epoch] < lowest else (rate / 2, lowest)
        histories.append(rates.tolist())
    assert len({tuple(rates) for rates in histories}) > 1
    assert all(rates[-1] < 0.5 for rates in histories)


def test_an_optimiser_that_looks_at_a_whole_parameter_is_not_stacked(double):
    assert_falls_back(replace(SMALL, model=small.mlp, optimizer=partial(small.Normed, lr=0.1)), "Normed may look at")


def test_an_optimiser_of_the_readers_own_is_stacked_if_it_says_that_it_may(double):
    recipe = replace(SMALL, model=small.mlp, optimizer=partial(small.Elementwise, lr=0.01))
    assert_stack_equals_single_runs(recipe)


def test_a_subclass_of_an_elementwise_optimiser_is_not_taken_for_one(double):
    class Ours(optim.SGD):
        pass

    assert_falls_back(replace(SMALL, optimizer=partial(Ours, lr=0.1)), "Ours may look at")


def misshapen(task):
    return nn.Sequential(nn.Flatten(), nn.Linear(10, task.classes))


def not_a_network(model: nn.Module, x, y):
    return F.cross_entropy(model(x).softmax(1)[0], y)


@pytest.mark.parametrize("seeds", [[0], SEEDS])
def test_a_mistake_in_a_model_or_a_loss_raises_its_own_error(seeds):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fit(replace(SMALL, model=misshapen), seeds)
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        fit(replace(SMALL, loss=not_a_network), seeds)
    with pytest.raises(AttributeError, match="no_such_layer"):
        fit(replace(SMALL, loss=lambda model, x, y: model.no_such_layer(x)), seeds)
    with pytest.raises(LessonError, match="5000 training examples"):
        fit(replace(SMALL, examples=5000), seeds)


# Measuring


@pytest.mark.parametrize("seeds", [[0], SEEDS])
def test_measured_in_eval_mode_and_weighed_by_examples(monkeypatch, seeds):
    """Ragged pieces, and a network that drops half of its inputs in training."""
    monkeypatch.setattr(training, "EXAMPLES_AT_ONCE", {"cpu": 70})
    recipe = replace(SMALL, model=small.noisy)
    ((found, notes),) = fit(recipe, seeds, inspect=by_hand)
    for i in range(len(seeds)):
        for name in ("train", "validation", "test"):
            loss, accuracy = notes[i][name]
            assert found[f"{name}_loss"][1][i] == pytest.approx(loss, rel=1e-5)
            assert found[f"{name}_accuracy"][1][i] == pytest.approx(accuracy, rel=1e-5)


def by_hand(model: nn.Module, split: Split) -> dict:
    found, model = {}, copy.deepcopy(model).eval()
    for name, (x, y) in split._asdict().items():
        logits = model(x)
        accuracy = 100 * (logits.argmax(1) == y).float().mean().item()
        found[name] = F.cross_entropy(logits, y).item(), accuracy
    return found


@pytest.mark.parametrize("seeds", [[0], SEEDS])
@pytest.mark.parametrize(
    ("most", "pieces"), [(210, [199, 198]), (397, [397]), (396, [199, 198]), (100, [100, 100, 100, 97])]
)
def test_an_evaluation_has_equal_pieces_whatever_the_number_of_seeds(monkeypatch, seeds, most, pieces):
    monkeypatch.setattr(training, "EXAMPLES_AT_ONCE", {"cpu": most})
    run, sizes, each = Training(SMALL, seeds, "digits", "cpu", None), [], Training.each

    def noting(self, function, x, y):
        sizes.append((*x.shape[:2], *y.shape))
        return each(self, function, x, y)

    monkeypatch.setattr(Training, "each", noting)
    run.measure("validation")
    assert sizes == [(len(seeds), piece) * 2 for piece in pieces]


@pytest.mark.parametrize("seeds", [[0], SEEDS])
def test_the_training_mode_is_restored_after_measuring(seeds):
    run = Training(SMALL, seeds, "digits", "cpu", None)
    run.measure("train", "test")
    assert all(state.model.training for state in run.states)
    ((_, notes),) = fit(SMALL, seeds, inspect=lambda model, split: {"training": model.training})
    assert [note["training"] for note in notes] == [True for _ in seeds]


def test_a_step_is_taken_in_training_mode_whatever_a_hook_left():
    def back_to_eval_mode(state: State) -> None:
        state.model.eval()

    once = replace(SMALL, model=small.noisy, evaluations=1)  # so that no measurement puts it right
    ((found, _),) = fit(replace(once, after_epoch=back_to_eval_mode), SEEDS)
    ((plain, _),) = fit(once, SEEDS)
    assert found["train_loss"][1].tolist() == plain["train_loss"][1].tolist()


def doubled(model: nn.Module, x, y):
    return 2 * cross_entropy(model, x, y)


def test_reported_loss_is_plain_cross_entropy_whatever_is_minimised():
    ((once, _),), ((twice, _),) = (
        fit(replace(SMALL, epochs=1), SEEDS),
        fit(replace(SMALL, epochs=1, loss=doubled), SEEDS),
    )
    assert once["train_loss_curve"][1][:, 0].tolist() == twice["train_loss_curve"][1][:, 0].tolist()
    assert once["train_loss"][1].tolist() != twice["train_loss"][1].tolist()


def test_best_is_at_the_lowest_validation_loss_and_final_at_the_end():
    recipe = replace(SMALL, optimizer=partial(optim.SGD, lr=0.5), epochs=20, evaluations=20, label_noise=0.4)
    ((found, _),) = fit(recipe, SEEDS)
    validation, epochs = found["validation_loss_curve"][1], found["epoch"][1]
    lowest = validation.argmin(1)
    assert (lowest < 20).any()
    assert found["best_epoch"][1].tolist() == epochs[lowest].tolist()
    for name in UNITS:
        values = found[f"{name}_curve"][1]
        assert found[f"best_{name}"][1].tolist() == values[np.arange(3), lowest].tolist()
        assert found[name][1].tolist() == values[:, -1].tolist()
        assert np.isfinite(found[name][1]).all()
        assert np.isfinite(found[f"best_{name}"][1]).all()
    assert found["gap"][1].tolist() == (found["validation_loss"][1] - found["train_loss"][1]).tolist()


@pytest.mark.parametrize(("epochs", "rate", "last"), [(1, 0.01, True), (30, 0.5, False)])
def test_the_final_test_is_measured_whether_the_last_epoch_is_the_best_or_not(epochs, rate, last):
    sgd = partial(optim.SGD, lr=rate)
    ((found, (notes,)),) = fit(replace(SMALL, optimizer=sgd, epochs=epochs, label_noise=0.9), [0], inspect=by_hand)
    assert (found["best_epoch"][1][0] == epochs) == last
    assert found["test_loss"][1][0] == pytest.approx(notes["test"][0], rel=1e-5)
    assert (found["best_test_loss"][1][0] == found["test_loss"][1][0]) == last


@pytest.mark.parametrize("evaluations", [1, 7, 30, 100])
def test_measured_as_often_as_asked_and_always_first_and_last(evaluations):
    ((found, _),) = fit(replace(SMALL, epochs=30, evaluations=evaluations, examples=25), SEEDS)
    epochs = found["epoch"][1].tolist()
    assert (epochs[0], epochs[-1], len(epochs)) == (0, 30, min(evaluations, 30) + 1)
    assert epochs == sorted(set(epochs))
    assert {found[f"{name}_curve"][1].shape for name in UNITS} == {(3, len(epochs))}


def test_a_recipe_of_no_epochs_measures_the_start():
    ((found, notes),) = fit(replace(SMALL, epochs=0), SEEDS, inspect=small.tensors)
    assert found["epoch"][1].tolist() == [0]
    assert np.isfinite(found["test_loss"][1]).all()
    assert found["best_epoch"][1].tolist() == [0, 0, 0]
    torch.manual_seed(derive(1, "start"))
    assert np.array_equal(notes[1]["2.weight"][1], small.linear(load("digits").task)[2].weight.detach())


def test_results_are_labelled_with_dimensions_units_and_names():
    ((found, _),) = fit(SMALL, SEEDS)
    assert found["train_loss"][2] == {"unit": "nats", "long_name": "train loss"}
    assert found["test_accuracy"][2] == {"unit": "%", "long_name": "test accuracy"}
    assert found["gap"][2]["unit"] == "nats"
    assert found["best_test_loss"][2] == {"unit": "nats", "long_name": "test loss at the lowest validation loss"}
    assert found["diverged_at"][2] == {"unit": "steps"}
    assert found["seconds"][2] == {"unit": "s", "alone": ""}
    assert found["validation_loss_curve"][0] == ("seed", "epoch")
    assert (found["test_accuracy"][1] > 30).all()  # in %


# Schedules


@pytest.mark.parametrize("every", ["epoch", "batch"])
@pytest.mark.parametrize("seeds", [[0], SEEDS])
def test_the_rate_that_is_reported_is_the_one_that_the_last_step_applied(every, seeds):
    ((found, _),) = fit(replace(SMALL, schedule=half_each_time, schedule_every=every), seeds)
    applied = {"epoch": [0.1, 0.1, 0.05, 0.025], "batch": [0.1, 0.1 / 2**3, 0.1 / 2**7, 0.1 / 2**11]}[every]
    for i in range(len(seeds)):
        assert list(curve(found, "learning_rate", i).values()) == pytest.approx(applied)
    assert found["learning_rate"][1] == pytest.approx([applied[-1]] * len(seeds))


def test_schedule_is_told_how_often_it_will_be_stepped():
    periods = []

    def schedule(optimizer: optim.Optimizer, n: int) -> LinearLR:
        periods.append(n)
        return LinearLR(optimizer)

    for every, size in (("epoch", 25), ("batch", 25), ("batch", 40)):
        fit(replace(SMALL, schedule=schedule, schedule_every=every, batch_size=size), SEEDS)
    assert periods == [3, 12, 9]


# Recipes


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ({"schedule_every": "step"}, "'epoch' or 'batch'; got 'step'"),
        ({"label_noise": 2.0}, "a share from 0 to 1; got 2.0"),
        ({"label_noise": -0.1}, "a share from 0 to 1; got -0.1"),
        ({"label_noise": math.nan}, "a share from 0 to 1; got nan"),
        ({"label_noise": "0.2"}, "a share from 0 to 1; got '0.2'"),
        ({"label_noise": None}, "a share from 0 to 1; got None"),
        ({"batch_size": 0}, "a whole number from 1; got 0"),
        ({"batch_size": True}, "a whole number from 1; got True"),
        ({"batch_size": 2.5}, "a whole number from 1; got 2.5"),
        ({"epochs": -1}, "a whole number from 0; got -1"),
        ({"epochs": "3"}, "a whole number from 0; got '3'"),
        ({"epochs": None}, "a whole number from 0; got None"),
        ({"evaluations": 0}, "a whole number from 1; got 0"),
        ({"examples": 0}, "a whole number from 1; got 0"),
        ({"examples": 10.0}, "a whole number from 1; got 10.0"),
        ({"model": nn.Linear(3, 4)}, "a function that builds one; got Linear(in_features=3, out_features=4"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "a function that builds one; got SGD ( Parameter Group 0"),
        ({"schedule": 3}, "a function that builds one; got 3"),
        ({"loss": None}, "a function; got None"),
        ({"loss": nn.CrossEntropyLoss()}, "a function; got CrossEntropyLoss()"),
        ({"after_step": [1]}, "a function; got [1]"),
    ],
)
def test_a_recipe_refuses_bad_values_in_one_line(wrong, wanted):
    with pytest.raises(LessonError) as error:
        replace(SMALL, **wrong)
    assert str(error.value).startswith(f"a recipe's {next(iter(wrong))} must be {wanted}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 140


@pytest.mark.parametrize("right", [{"epochs": np.int64(2)}, {"examples": None}, {"label_noise": 1}, {"schedule": None}])
def test_a_recipe_takes_any_whole_number_and_leaves_out_what_may_be_left_out(right):
    replace(SMALL, **right)


def untrained(task) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)


def few_logits(task) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


def no_parameters(task) -> nn.Module:
    return nn.Flatten()


def pictures(task) -> nn.Module:
    return nn.Conv2d(1, 10, 3)


class Pair(nn.Linear):
    """A network with two outputs."""

    def forward(self, x):
        return super().forward(x.flatten(1)), x


def two_outputs(task) -> nn.Module:
    return Pair(64, 10)


def a_number(model, x, y):
    return F.cross_entropy(model(x), y).item()


def without_reduction(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def without_gradient(model, x, y):
    return F.cross_entropy(model(x), y).detach()


LOSS = r"a recipe's loss must be one number, a tensor \(\) that depends on a parameter to train; got"
LOGITS = r"a network's output must be \(\d+, 10\), a logit for each class; got a tensor \(\d+, "


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": lambda task: "a network"}, "a recipe's model must be Module; got 'a network'"),
        ({"model": no_parameters}, "a recipe's model must be a network with parameters; got Flatten"),
        ({"model": few_logits}, LOGITS),
        ({"model": pictures}, LOGITS),
        ({"model": two_outputs}, "a network's output must be Tensor; got"),
        ({"optimizer": lambda parameters: list(parameters)}, "what a recipe's optimizer builds must be Optimizer; got"),
        ({"schedule": lambda optimizer, steps: 3}, "what a recipe's schedule builds must be LRScheduler; got 3"),
        ({"loss": without_reduction}, LOSS),
        ({"loss": without_gradient}, LOSS),
    ],
)
def test_what_a_recipe_builds_is_checked_where_it_is_built(wrong, message, seeds):
    with pytest.raises(LessonError, match=f"^{message}") as error:
        fit(replace(SMALL, **wrong), seeds)
    assert "\n" not in str(error.value)


def test_a_loss_that_is_no_tensor_is_told():
    with pytest.raises(LessonError, match=r"^a recipe's loss must be Tensor; got \d"):
        fit(replace(SMALL, loss=a_number), [0])


def test_a_plateau_is_followed_by_epoch():
    recipe = replace(SMALL, schedule=lambda optimizer, steps: ReduceLROnPlateau(optimizer), schedule_every="batch")
    with pytest.raises(LessonError, match="schedule_every='epoch'"):
        fit(recipe, [0])


class Overflows(nn.Module):
    """A network whose logits are not finite before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((64, 10), 1e38))

    def forward(self, x):
        return (100 * x.flatten(1)) @ self.weight


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_run_that_is_dead_at_the_start_is_known_as_such_and_warns_of_nothing(seeds):
    ((found, _),) = fit(replace(SMALL, model=lambda task: Overflows()), seeds)
    assert found["diverged_at"][1].tolist() == [0] * len(seeds)
    for name in ("train_loss", "test_accuracy", "gap", "best_epoch"):
        assert np.isnan(found[name][1]).all()


# No step waits for a device: PyTorch's meta device has shapes and no numbers, so what asks for a number, or carries one
# over from the CPU, raises.


class NoTransfers(TorchDispatchMode):
    """Raises when a tensor goes from one device to another."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {each.device for each in (*args, out) if isinstance(each, torch.Tensor)}
        if len(devices) > 1 and func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            raise RuntimeError(f"{func} between {devices}")
        return out


def on_meta(*arguments) -> Split:
    split = split_for("digits", tuple(SEEDS), 100, 0.0, "cpu")
    return Split(*(Batch(x.to("meta"), y.to("meta")) for x, y in split))


def steps_without_a_wait(recipe: Recipe, monkeypatch) -> None:
    monkeypatch.setattr(training, "split_for", on_meta)
    run = Training(recipe, SEEDS, "digits", "meta", None)
    assert run.stacked
    assert all(tensor.is_meta for tensor in run.stacked.values())
    x, y = run.split.train
    run.networks[0].train()
    for _ in range(2):
        with NoTransfers():
            losses = run.train_step(x[:, :25], y[:, :25])
        assert losses.shape == (3,)
        assert not losses.requires_grad  # or every step's graph would be kept until the end of the epoch


def scale(state: State) -> None:
    with torch.no_grad():
        for p in state.model.parameters():
            p.mul_(0.9)
    state.notes["norm"] = next(state.model.parameters()).grad.norm()


@pytest.mark.parametrize("model", [small.mlp, small.batch_norm, small.noisy, small.convolution])
@pytest.mark.parametrize(
    "optimizer", [partial(optim.SGD, lr=0.1, momentum=0.9), partial(optim.Adam, lr=0.01, fused=False)]
)
def test_no_step_of_a_stack_waits_for_a_device(monkeypatch, model, optimizer):
    hook = None if model is small.convolution else scale
    steps_without_a_wait(replace(SMALL, model=model, optimizer=optimizer, after_step=hook), monkeypatch)


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_an_epoch_waits_for_a_device_only_when_its_last_step_is_queued(monkeypatch, every):
    monkeypatch.setattr(training, "split_for", on_meta)
    recipe = replace(SMALL, schedule=half_each_time, schedule_every=every)
    run = Training(recipe, SEEDS, "digits", "meta", None)
    with pytest.raises(NotImplementedError, match="meta"):
        run.train_epoch()
    assert run.step == 4


def brings_its_own_mask(model: nn.Module, x, y):
    return cross_entropy(model, x * (torch.rand(x.shape) < 0.5).to(x.device), y)


def forgets_the_device(model: nn.Module, x, y):
    return cross_entropy(model, x + torch.rand(x.shape), y)


@pytest.mark.parametrize("loss", [asks_for_a_number, branches, brings_its_own_mask, forgets_the_device])
def test_a_loss_that_waits_is_found_out(monkeypatch, loss):
    with pytest.raises((RuntimeError, NotImplementedError)):
        steps_without_a_wait(replace(SMALL, loss=loss), monkeypatch)


def note_a_number(state: State) -> None:
    state.notes["norm"] = state.model[2].weight.norm().item()


def test_a_hook_that_waits_is_found_out(monkeypatch):
    with pytest.raises(RuntimeError):
        steps_without_a_wait(replace(SMALL, after_step=note_a_number), monkeypatch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stack_gives_the_numbers_of_single_runs_on_cuda(double):
    recipe = replace(SMALL, model=small.batch_norm)
    together = fit(recipe, SEEDS, device="cuda", inspect=small.tensors)
    assert len(together) == 1
    alone = [fit(recipe, [seed], device="cuda", inspect=small.tensors)[0] for seed in SEEDS]
    assert_same_numbers(together, alone)
