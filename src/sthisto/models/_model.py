"""What a section is to models, what a model is to the rest of the package, and how settings are checked."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from sthisto._statistics import FeatureStatistics

Patches = Callable[[NDArray[np.intp]], NDArray[np.uint8]]  # rows (b,) -> patches (b, h, w, 3)
State = dict[str, NDArray[Any]]
HeldOut = list[NDArray[np.float32]]


@dataclass(frozen=True)
class Range:
    """Values that a number among a model's settings may have, as in ``Annotated[int, Range(1)]``."""

    low: float
    high: float = np.inf
    is_open: bool = False  # without the bounds themselves

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high if self.is_open else self.low <= value <= self.high

    def __str__(self) -> str:
        if np.isinf(self.high):
            return f"above {self.low:g}" if self.is_open else f"{self.low:g} or more"
        return f"between {self.low:g} and {self.high:g}" + ", both excluded" * self.is_open


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, is_open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, is_open=True)]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One tissue section as models see it; rows are spots where ``expression`` is given, points where it is not.

    Attributes
    ----------
    name
        Identifies a section within a fit; a section is *fitted* if ``fit`` was given one of its name.
    xy
        Positions (n, 2) in units of the pitch, the distance between neighboring spots.
    features
        Image features (n, d) as the encoder gave them.
    expression
        Log-normalized expression (n, g).
    patches
        Gives the patches (b, h, w, 3) uint8 around rows (b,).
    pitch_um
        The unit of ``xy`` in micrometers; ``None`` where it is not known.
    feature_statistics
        Mean and standard deviation of the features of the section's own spots. Points of a section that was not fitted
        are standardized with them, whichever points are predicted; ``None`` takes the rows for the whole section.
    prior
        Expression (n, g) as predicted elsewhere, on the scale of ``expression``; NaN columns for genes that it lacks.
    """

    name: str
    xy: NDArray[np.float64]
    features: NDArray[np.float32] | None = None
    expression: NDArray[np.float32] | None = None
    patches: Patches | None = None
    pitch_um: float | None = None
    feature_statistics: FeatureStatistics | None = None
    prior: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.xy)

    def keep(self, rows: NDArray[np.intp]) -> "Section":
        """Only some of the rows, with all that is known of them."""
        patches = self.patches
        return replace(
            self,
            xy=self.xy[rows],
            features=None if self.features is None else self.features[rows],
            expression=None if self.expression is None else self.expression[rows],
            prior=None if self.prior is None else self.prior[rows],
            patches=None if patches is None else lambda wanted: patches(rows[wanted]),
        )


@dataclass(kw_only=True)
class Model(ABC):
    """A map from image features, pixels and positions to expression.

    Subclasses are dataclasses whose fields are the user's ``params``; types and ranges of the annotations are checked
    when one is made. They implement ``_fit`` and ``_predict`` and name the arrays of their state.

    Laws, tested for every entry of :data:`sthisto.models.MODELS`: permuting the points permutes the prediction; a
    second ``fit`` with the same ``random_state`` gives the same bits on a CPU; ``restore(state())`` predicts the same
    bits; nothing but the sections given to ``fit`` affects a prediction.

    Attributes
    ----------
    history
        Curves over epochs; empty for models that do not iterate.
    """

    state_names: ClassVar[tuple[str, ...]]  # arrays that prediction needs
    state_prefix: ClassVar[str] = "net."  # of further ones, the weights of a network

    history: dict[str, NDArray[np.float64]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _arrays: State | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for each in fields(self):
            if each.init:
                _check(each.name, getattr(self, each.name), hints[each.name])

    def fit(
        self,
        sections: Sequence[Section],
        *,
        random_state: int = 0,
        device: str | None = None,
        progress: bool = False,
    ) -> HeldOut:
        """Learn from sections with expression.

        Parameters
        ----------
        sections
            Training spots.
        random_state
            Seed.
        device
            Where networks train and predict, as torch names it; ``None`` or "" takes a GPU where there is one.
        progress
            Show a progress bar.

        Returns
        -------
        Held-out predictions (n, g) of each section's spots, from a fit that does not know the spot's expression. Rows
        that the model does not hold out are NaN.

        Raises
        ------
        ValueError
            Two sections of one name, or one without expression, features or patches that the model needs.
        """
        names = [section.name for section in sections]
        if len(set(names)) < len(names):
            raise ValueError(f"names of sections must differ, and are {names}")
        self._arrays, held_out = self._fit(sections, random_state=random_state, device=device, progress=progress)
        return held_out

    def predict(self, points: Section) -> NDArray[np.float32]:
        """Expression (m, g) at the points; ``points.name`` is the fitted section they belong to.

        Raises
        ------
        RuntimeError
            The model is neither fitted nor restored.
        ValueError
            The points lack what the model reads, have another number of features than in ``fit``, or belong to a
            section that was not fitted and that the model cannot predict.
        """
        return self._predict(points, self.arrays)

    def state(self) -> State:
        """All that prediction needs, as named numeric arrays."""
        return dict(self.arrays)

    def restore(self, state: Mapping[str, NDArray[Any]], *, device: str | None = None) -> None:
        """Predict from now on as the model whose :meth:`state` this is; the settings have to be the same.

        Raises
        ------
        ValueError
            Arrays are missing.
        """
        missing = [name for name in self.state_names if name not in state]
        if missing:
            raise ValueError(
                f"no fit of {type(self).__name__} by this version of sthisto: {', '.join(missing)} missing. Fit again."
            )
        own = {name for name in state if name in self.state_names or name.startswith(self.state_prefix)}
        self._arrays = {name: state[name] for name in own}
        self._restored(self._arrays, device)

    @property
    def arrays(self) -> State:
        """The state itself, or an error if there is none yet."""
        if self._arrays is None:
            raise RuntimeError(f"{type(self).__name__} is not fitted yet: call fit or restore first")
        return self._arrays

    @abstractmethod
    def _fit(
        self, sections: Sequence[Section], *, random_state: int, device: str | None, progress: bool
    ) -> tuple[State, HeldOut]:
        """State and held-out predictions."""

    @abstractmethod
    def _predict(self, points: Section, state: State) -> NDArray[np.float32]:
        """Expression (m, g)."""

    def _restored(self, state: State, device: str | None) -> None:  # noqa: B027  networks are made here
        """Make what is not in the arrays."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the registry knows of a model without importing it."""

    source: str  # "module:Class"; the class is a dataclass whose fields are the user's params
    inputs: frozenset[Literal["features", "patches", "xy"]]
    context: Literal["spot", "window", "section"]  # what one prediction reads
    reference: str
    iterative: bool = False  # takes params={"epochs": n}
    min_spots: int = 20  # below this, fit refuses
    can_overfit: bool = True  # where it is iterative: reproduces twenty training spots of pure noise

    def load(self) -> type[Model]:
        """Import and return the model's class."""
        module, name = self.source.split(":")
        model: type[Model] = getattr(import_module(module), name)
        return model


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise unless the value of a setting has the annotated type and is in its range."""
    if not _is(value, kind):
        error = ValueError if get_origin(kind) is Literal and isinstance(value, str) else TypeError
        raise error(f"{name} is {value!r}, but has to be {_described(kind)}")
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) and not len(value):
        raise ValueError(f"{name} is empty, but needs at least one value")
    for allowed in _ranges(kind):
        for each in np.atleast_1d(np.asarray(value, dtype=float)) if value is not None else ():
            if each not in allowed:
                raise ValueError(f"{name} is {value!r}, but has to be {allowed}")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type; numpy's numbers and arrays, as they come from files, count as Python's."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is(value, parts[0])
    if origin in (Union, UnionType):
        return any(_is(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is Sequence:
        several = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
        return several and all(_is(each, parts[0]) for each in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool | np.bool_)
    return isinstance(value, bool | np.bool_ if kind is bool else kind)


def _ranges(kind: Any) -> list[Range]:
    """Ranges anywhere within an annotation."""
    own = [part for part in get_args(kind) if isinstance(part, Range)]
    return own + [allowed for part in get_args(kind) for allowed in _ranges(part)]


def _described(kind: Any) -> str:
    """Name a type as a message does."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _described(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(map(_described, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Sequence:
        return f"a sequence of {_described(parts[0])}"
    names = {int: "an integer", float: "a number", str: "a text", bool: "True or False", type(None): "None"}
    return names.get(kind, str(kind))
