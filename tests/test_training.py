"""The training loop against formulas by hand: optimizers, minibatches, stopping, seeds, weights as arrays."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn import functional

from sthisto import _training
from sthisto._training import Schedule

CPU = torch.device("cpu")
RUN = {"random_state": 0, "device": CPU, "progress": False}


def problem(n: int = 30, d: int = 3):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x, (x @ rng.normal(size=(d, 2)) + rng.normal(size=(n, 2)) / 5).astype(np.float32)


def network(random_state: int = 0, dropout: float = 0.0) -> nn.Module:
    with _training.seeded(random_state):
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 2))


def squared(module, x, y):
    return lambda rows: functional.mse_loss(module(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows])


def global_states():
    return [torch.get_rng_state().numpy(), np.random.get_state()[1]]  # noqa: NPY002


def test_device():
    assert _training.pick_device("cpu") == CPU
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert _training.pick_device(None) == _training.pick_device("") == torch.device(best)


@pytest.mark.parametrize("device", ["cuda:99", "cpu:1", "gpu", "cuda:x", ":0"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=rf"'{device}' is not there.*cpu"):
        _training.pick_device(device)


def test_seeded_draws_leave_the_global_state_alone():
    before = global_states()
    with _training.seeded(3):
        first = torch.rand(4)
    with pytest.raises(KeyError), _training.seeded(4):  # noqa: PT012
        other = torch.rand(4)
        raise KeyError
    with _training.seeded(3, CPU):
        again = torch.rand(4)
    assert_array_equal(first, again)
    assert not torch.equal(first, other)
    for was, now in zip(before, global_states(), strict=True):
        assert_array_equal(was, now)


@given(st.integers(2, 200), st.floats(0, 0.9), st.integers(0, 2**32))
def test_a_split_is_a_partition(n, share, random_state):
    learnt, held_out = (
        _training.split(n, share, random_state) if round(share * n) < n else _training.split(n, 0.1, random_state)
    )
    assert_array_equal(np.sort(np.concatenate([learnt, held_out])), np.arange(n))
    assert len(held_out) >= 1
    assert (np.diff(learnt) > 0).all()


def test_a_split_takes_its_share_by_its_seed():
    learnt, held_out = _training.split(200, 0.15, 0)
    assert (len(learnt), len(held_out)) == (170, 30)
    assert_array_equal(held_out, _training.split(200, 0.15, 0)[1])
    assert not np.array_equal(held_out, _training.split(200, 0.15, 1)[1])
    with pytest.raises(ValueError, match="leaves none"):
        _training.split(1, 0.15, 0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_one_step_by_hand(optimizer):
    x, y = problem()
    module = network()
    w = module[1].weight.detach().numpy().copy()
    residual = x @ w.T + module[1].bias.detach().numpy() - y
    gradient = 2 * residual.T @ x / residual.size
    expected = {
        "sgd": w - 0.1 * (gradient + 0.5 * w),
        "adam": w - 0.1 * np.sign(gradient + 0.5 * w),
        "adamw": w * (1 - 0.1 * 0.5) - 0.1 * np.sign(gradient),
    }
    schedule = Schedule(epochs=1, learning_rate=0.1, optimizer=optimizer, weight_decay=0.5)
    curves = _training.train(module, squared(module, x, y), np.arange(30), schedule, **RUN)
    assert_allclose(module[1].weight.detach(), expected[optimizer], atol=1e-5)
    assert_allclose(curves["train"], [(residual**2).mean()], rtol=1e-5)


@pytest.mark.parametrize(("clip", "length"), [(None, None), (1e-3, 1e-3), (1e3, None)])
def test_long_gradients_are_cut(clip, length):
    """One step of plain gradient descent moves all weights together by as much as the gradient is long."""
    module, data = network(), problem()
    torch.autograd.backward(squared(module, *data)(torch.arange(30)))
    gradient = torch.cat([weight.grad.flatten() for weight in module.parameters()])
    before = torch.cat([weight.detach().flatten().clone() for weight in module.parameters()])
    schedule = Schedule(epochs=1, learning_rate=1.0, optimizer="sgd", clip=clip)
    _training.train(module, squared(module, *data), np.arange(30), schedule, **RUN)
    step = before - torch.cat([weight.detach().flatten() for weight in module.parameters()])
    expected = gradient if length is None else gradient * length / gradient.norm()
    assert_allclose(step, expected, rtol=1e-3, atol=1e-6)


def test_momentum_carries_on():
    module = nn.Linear(1, 1, bias=False)
    start = module.weight.item()
    schedule = Schedule(epochs=3, learning_rate=0.1, optimizer="sgd", momentum=0.9)
    _training.train(module, lambda rows: module.weight.sum(), np.arange(1), schedule, **RUN)
    assert module.weight.item() == pytest.approx(start - 0.1 * (1 + 1.9 + 2.71))


def test_finds_the_least_squares_of_its_rows():
    x, y = problem()
    rows = np.arange(0, 30, 2)
    module = network()
    schedule = Schedule(epochs=300, learning_rate=0.05, batch_size=None)
    _training.train(module, squared(module, x, y), rows, schedule, **RUN)
    solution = np.linalg.lstsq(np.c_[x[rows], np.ones(15)], y[rows], rcond=None)[0]
    assert_allclose(module[1].weight.detach(), solution[:3].T, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_an_epoch_takes_every_row_once_in_even_batches(n, batch_size):
    seen = []
    module = nn.Linear(1, 1)

    def loss(rows):
        seen.append(rows.numpy())
        return module.weight.sum() * 0

    schedule = Schedule(epochs=2, learning_rate=0.1, batch_size=batch_size)
    _training.train(module, loss, np.arange(n) + 7, schedule, **RUN)
    sizes = [len(rows) for rows in seen]
    assert max(sizes) <= (batch_size or n)
    assert max(sizes) - min(sizes) <= 1
    epochs = np.split(np.concatenate(seen), 2)
    assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n) + 7, (2, 1)))
    assert n < 20 or not np.array_equal(*epochs)


def train_noisily(random_state):
    x, y = problem()
    module = network(dropout=0.5)
    schedule = Schedule(epochs=3, learning_rate=0.01, batch_size=8)
    _training.train(module, squared(module, x, y), np.arange(30), schedule, **(RUN | {"random_state": random_state}))
    return module[1].weight.detach().numpy()


def test_same_seed_same_bits_whatever_else_is_drawn():
    before = global_states()
    first = train_noisily(0)
    for was, now in zip(before, global_states(), strict=True):
        assert_array_equal(was, now)
    with _training.seeded(99):
        assert_array_equal(train_noisily(0), first)
    assert not np.array_equal(train_noisily(1), first)


def run_with_validation(losses, **settings):
    """Train while validation says ``losses`` in turn; give the curves, the weight at each epoch and the last."""
    module, weights, said = nn.Linear(1, 1), [], iter(losses)

    def validation():
        assert not module.training
        assert not torch.is_grad_enabled()
        weights.append(module.weight.item())
        return next(said)

    schedule = Schedule(epochs=len(losses), learning_rate=0.1, **settings)
    curves = _training.train(
        module, lambda rows: module.weight.sum(), np.arange(1), schedule, validation=validation, **RUN
    )
    assert not module.training
    return curves, weights, module.weight.item()


def test_stops_when_nothing_gets_better_and_keeps_the_best():
    curves, weights, last = run_with_validation([3.0, 1.0, 2.0, 0.5, 0.9, 0.8, 0.7, 0.1], patience=3)
    assert_array_equal(curves["validation"], [3, 1, 2, 0.5, 0.9, 0.8, 0.7])
    assert len(curves["train"]) == 7
    assert last == weights[3]


def test_without_patience_it_goes_on_to_the_end():
    curves, weights, last = run_with_validation([1.0, 2.0, 3.0])
    assert_array_equal(curves["validation"], [1, 2, 3])
    assert last == weights[-1]


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"batch_size": 0}, {"patience": -1}])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .* 1 or more"):
        Schedule(**({"epochs": 3, "learning_rate": 0.1} | bad))


def test_what_cannot_be_trained_is_refused():
    x, y = problem()
    module = network()
    loss = squared(module, x, y)
    with pytest.raises(ValueError, match="nothing is held out"):
        _training.train(module, loss, np.arange(30), Schedule(epochs=1, learning_rate=0.1, patience=2), **RUN)
    with pytest.raises(ValueError, match="no optimizer 'lion'"):
        _training.train(module, loss, np.arange(30), Schedule(epochs=1, learning_rate=0.1, optimizer="lion"), **RUN)
    steep = Schedule(epochs=200, learning_rate=1e9, optimizer="sgd")
    with pytest.raises(ValueError, match=r"diverged: .*epoch \d+.*learning rate"):
        _training.train(module, loss, np.arange(30), steep, **RUN)


@pytest.mark.parametrize("batch_size", [None, 1, 4, 7])
def test_the_mean_loss_does_not_depend_on_the_batches(batch_size):
    x, y = problem()
    module = network()
    rows = np.arange(3, 29)
    predicted = x @ module[1].weight.detach().numpy().T + module[1].bias.detach().numpy()
    expected = ((predicted - y)[rows] ** 2).mean()
    assert _training.mean_loss(squared(module, x, y), rows, batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [0, 1, 10, 11])
def test_output_in_batches(n):
    module = network(dropout=0.5).train()
    x = torch.from_numpy(problem()[0])[:n]
    output = _training.in_batches(module, lambda rows: module(x[rows]), n, 4)
    assert output.dtype == np.float32
    assert output.shape == (n, 2)
    assert_allclose(output, module[1](x).detach(), rtol=1e-6)


def test_weights_go_through_arrays_to_the_bit():
    module, other = (nn.Sequential(network(random_state), nn.BatchNorm1d(2)) for random_state in (0, 1))
    module(torch.rand(5, 3))
    arrays = _training.to_arrays(module)
    assert all(name.startswith("net.") and value.dtype.kind in "if" for name, value in arrays.items())
    _training.from_arrays(other, arrays | {"gene_mean": np.zeros(3)})
    for name, value in module.state_dict().items():
        assert_array_equal(other.state_dict()[name], value)
    arrays["net.0.1.weight"][:] = 0
    assert module[0][1].weight.abs().min() > 0, "arrays are copies"
    del arrays["net.0.1.weight"]
    with pytest.raises(RuntimeError, match=r"0\.1\.weight"):
        _training.from_arrays(other, arrays)


def test_threads_give_the_bits_of_one_thread_and_leave_the_global_state():
    x, y = problem()

    def fit(random_state):
        module = network(random_state, dropout=0.5)
        schedule = Schedule(epochs=20, learning_rate=0.01, batch_size=7)
        _training.train(
            module, squared(module, x, y), np.arange(30), schedule, **(RUN | {"random_state": random_state})
        )
        return np.concatenate([value.ravel() for value in _training.to_arrays(module).values()])

    alone = [fit(each) for each in range(4)]
    before = global_states()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(fit, range(4)))
    assert_array_equal(together, alone)
    for now, then in zip(global_states(), before, strict=True):
        assert_array_equal(now, then)


FORKED = """
import os, sys, numpy as np, torch
from sthisto import _training
from torch import nn
torch.set_num_threads(2)
x = torch.randn(4000, 300, generator=_training.generator(0))
def fit():
    with _training.seeded(0):
        module = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 1))
    loss = lambda rows: module(x[rows]).square().mean()
    schedule = _training.Schedule(epochs=2, learning_rate=0.01)
    device = torch.device("cpu")
    return _training.train(module, loss, np.arange(4000), schedule, random_state=0, device=device, progress=False)
fit()
child = os.fork()
if not child:
    os._exit(0 if torch.get_num_threads() == 1 and np.isfinite(fit()["train"]).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_train_after_its_parent_has():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], timeout=120, check=False)
    assert done.returncode == 0
