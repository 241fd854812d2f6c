"""Training of networks: device, seeds, the loop, and weights as plain arrays.

Layers draw (first weights, dropout) inside :func:`seeded`, which restores torch's global random state; the order of the
minibatches comes from a generator of its own. The same ``random_state`` gives the same bits on a CPU, in threads too:
as layers of torch know one generator only, :func:`seeded` lets one thread in at a time. A forked child computes on one
thread, since the threads of its parent are not there.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sthisto._messages import progress_bar

Rows = NDArray[np.intp]
Curves = dict[str, NDArray[np.float64]]

_global_generator = threading.RLock()


def _after_fork() -> None:
    """Compute on one thread, under a lock that no thread of the parent holds."""
    global _global_generator  # noqa: PLW0603  a lock of this process
    _global_generator = threading.RLock()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a network is trained."""

    epochs: int
    learning_rate: float
    batch_size: int | None = None  # rows a step; None takes all at once
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9  # of sgd
    clip: float | None = None  # longest gradient of a step, all weights taken together; None leaves it as it is
    patience: int | None = None  # epochs without a better validation loss before it stops; None trains to the end

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}, but has to be 1 or more")

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer over the trainable weights of the module.

        Raises
        ------
        ValueError
            No optimizer of that name.
        """
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        settings: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        match self.optimizer:
            case "adam":
                return torch.optim.Adam(weights, **settings)
            case "adamw":
                return torch.optim.AdamW(weights, **settings)
            case "sgd":
                return torch.optim.SGD(weights, momentum=self.momentum, **settings)
        raise ValueError(f"no optimizer {self.optimizer!r}; there are 'adam', 'adamw' and 'sgd'")


def pick_device(device: str | None) -> torch.device:
    """Find the device to compute on: the one named, else a GPU where there is one, else the CPU.

    Raises
    ------
    ValueError
        This machine, or this torch, has no such device.

    Examples
    --------
    >>> pick_device("cpu")
    device(type='cpu')
    """
    there = [name for name in ("cuda", "mps", "cpu") if torch.get_device_module(name).is_available()]
    if not device:
        return torch.device(there[0])
    kind, _, number = device.partition(":")
    known = kind in there and (not number or number.isdecimal())
    if not known or int(number or 0) >= torch.get_device_module(kind).device_count():
        raise ValueError(f"device {device!r} is not there; torch {torch.__version__} finds {', '.join(there)} here.")
    return torch.device(device)


def generator(random_state: int) -> torch.Generator:
    """Random numbers of their own, on the CPU, whatever else is drawn."""
    return torch.Generator().manual_seed(random_state)


@contextmanager
def seeded(random_state: int, device: torch.device | None = None) -> Iterator[None]:
    """Draw from ``random_state`` within, one thread at a time; afterwards the global state is what it was."""
    with _global_generator, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the GPUs, too.
        torch.default_generator.manual_seed(random_state)
        if device is None or device.type == "cpu":
            yield
            return
        on_device = torch.get_device_module(device)
        before = on_device.get_rng_state(device)
        on_device.set_rng_state(torch.Generator(device).manual_seed(random_state).get_state(), device)
        try:
            yield
        finally:
            on_device.set_rng_state(before, device)


def split(n: int, fraction: float, random_state: int) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out, a random fraction of n but at least one, both ascending.

    Raises
    ------
    ValueError
        Nothing would be left to train on.
    """
    n_held_out = max(1, round(fraction * n))
    if n_held_out >= n:
        raise ValueError(f"holding out {fraction:g} of {n} rows leaves none to train on")
    shuffled = np.random.default_rng(random_state).permutation(n)
    return np.sort(shuffled[n_held_out:]), np.sort(shuffled[:n_held_out])


def train(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    rows: Rows,
    schedule: Schedule,
    *,
    validation: Callable[[], float] | None = None,
    random_state: int,
    device: torch.device,
    progress: bool,
    label: str = "training",
) -> Curves:
    """Train the module in place on the device, and leave it there in evaluation mode.

    Every epoch goes once through the rows in a new order, in minibatches of nearly equal size. With a ``patience`` the
    weights of the epoch with the lowest validation loss are kept: later epochs fit the training spots' noise.

    Parameters
    ----------
    module
        Network, with its first weights drawn (:func:`seeded`).
    loss
        Mean loss, a scalar, of the rows (b,) int64 of one minibatch; it closes over the data and the module.
    rows
        Rows (n,) of the data to train on: spots, or sequences of them.
    schedule
        Optimizer, epochs, batches, stopping.
    validation
        Loss on what is held out, called after every epoch in evaluation mode without gradients; see :func:`mean_loss`.
    random_state
        Seeds the order of the rows and dropout.
    device
        From :func:`pick_device`.
    progress, label
        Whether to show a bar, and its name.

    Returns
    -------
    Curves over the epochs that were run, (e,) each: ``train``, the mean loss in training, and ``validation`` where
    one is given.

    Raises
    ------
    ValueError
        A loss is no longer finite, or a patience without validation.

    Examples
    --------
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> with seeded(0):
    ...     line = nn.Linear(1, 1)
    >>> schedule = Schedule(epochs=100, learning_rate=0.1)
    >>> def loss(rows):
    ...     return nn.functional.mse_loss(line(x[rows]), 3 * x[rows])
    >>> curves = train(line, loss, np.arange(8), schedule, random_state=0, device=pick_device("cpu"), progress=False)
    >>> bool(curves["train"][-1] < 0.01)
    True
    """
    if schedule.patience is not None and validation is None:
        raise ValueError(f"patience is {schedule.patience}, but nothing is held out to validate on")
    module.to(device)
    optimizer, order = schedule.build(module), generator(random_state)
    curves: dict[str, list[float]] = {name: [] for name in ("train", *(["validation"] if validation else []))}
    best: dict[str, Tensor] = {}
    with (
        seeded(random_state, device),
        progress_bar(range(schedule.epochs), desc=label, unit="epoch", shown=progress) as bar,
    ):
        for epoch in bar:
            module.train()
            curves["train"].append(_epoch(loss, _batches(rows, schedule.batch_size, order), optimizer, schedule.clip))
            module.eval()
            if validation is not None:
                with torch.no_grad():
                    curves["validation"].append(validation())
            now = {name: curve[-1] for name, curve in curves.items()}
            _refuse_divergence(now, epoch)
            bar.set_postfix({name: f"{value:.4g}" for name, value in now.items()}, refresh=False)
            if schedule.patience is not None:
                lowest = int(np.argmin(curves["validation"]))
                if lowest == epoch:
                    best = {name: value.detach().clone() for name, value in module.state_dict().items()}
                elif epoch - lowest >= schedule.patience:
                    break
    if best:
        module.load_state_dict(best)
    return {name: np.array(curve) for name, curve in curves.items()}


def mean_loss(loss: Callable[[Tensor], Tensor], rows: Rows, batch_size: int | None = None) -> float:
    """Mean loss over the rows (n,), in batches, as :func:`train` takes it for ``validation``."""
    batches = _batches(rows, batch_size)
    return sum(loss(batch).item() * len(batch) for batch in batches) / len(rows)


def in_batches(module: nn.Module, call: Callable[[slice], Tensor], n: int, batch_size: int) -> NDArray[np.float32]:
    """Output (n, ...) of ``call``, which uses the module, for slices of n rows, without gradients or dropout."""
    module.eval()
    with torch.no_grad():
        parts = [call(slice(start, start + batch_size)).cpu().numpy() for start in range(0, max(n, 1), batch_size)]
    outputs: NDArray[np.float32] = np.concatenate(parts).astype(np.float32, copy=False)
    return outputs


def to_arrays(module: nn.Module, prefix: str = "net.") -> dict[str, NDArray[np.generic]]:
    """Weights and buffers of the module as named arrays, copied."""
    return {prefix + name: value.detach().cpu().numpy().copy() for name, value in module.state_dict().items()}


def from_arrays(module: nn.Module, arrays: Mapping[str, NDArray[np.generic]], prefix: str = "net.") -> None:
    """Undo :func:`to_arrays`; arrays without the prefix are left alone.

    Raises
    ------
    RuntimeError
        Arrays are missing, too many, or of other shapes than the module's (from torch, which names them).
    """
    own = {name: value for name, value in arrays.items() if name.startswith(prefix)}
    module.load_state_dict({name.removeprefix(prefix): torch.tensor(value) for name, value in own.items()})


def _batches(rows: Rows, batch_size: int | None, order: torch.Generator | None = None) -> tuple[Tensor, ...]:
    """Cut the rows, shuffled where an order is given, into minibatches.

    Of nearly equal size: a remainder of one row would weigh as much as a whole batch, and batch norm cannot take it.
    """
    if order is not None:
        rows = rows[torch.randperm(len(rows), generator=order).numpy()]
    return torch.from_numpy(rows).tensor_split(-(-len(rows) // (batch_size or len(rows))))


def _epoch(
    loss: Callable[[Tensor], Tensor], batches: tuple[Tensor, ...], optimizer: torch.optim.Optimizer, clip: float | None
) -> float:
    total = 0.0
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for batch in batches:
        optimizer.zero_grad()
        value = loss(batch)
        torch.autograd.backward(value)
        if clip is not None:
            nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        total += value.item() * len(batch)
    return total / sum(map(len, batches))


def _refuse_divergence(losses: Mapping[str, float], epoch: int) -> None:
    if not np.isfinite(list(losses.values())).all():
        raise ValueError(f"training diverged: the losses of epoch {epoch + 1} are {losses}; lower the learning rate.")
