"""What a diagnosis found, as frozen data: the values of the report's `flatness`, `collapse` and `drift`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PASS, NOTE, WARN, FAIL = "pass", "note", "warn", "fail"
GO, TRY_SMALL, NO_GO = "go", "try small", "no-go"


@dataclass(frozen=True)
class Estimate:
    """A figure from random probes, and its standard error; the error is None when there was one probe."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Flatness:
    """One figure before and after, on the same probes."""

    before: Estimate  # of the original weights
    after: Estimate | None = None  # of the trial weights; None when there are none
    # Mean over probes of after - before: its error is that of paired differences, often far smaller than both.
    change: Estimate | None = None


@dataclass(frozen=True)
class LayerFlatness:
    """Curvature of the loss in one layer's weight."""

    name: str  # the initializer
    parameters: int  # its elements
    step: float  # h of the central difference, absolute; the same before and after
    trace: Flatness  # tr H of the layer's block of the Hessian
    relative: Flatness  # relative flatness (Petzka et al. 2021): the same however layers are scaled against each other


@dataclass(frozen=True)
class Sharpness:
    """E[L(w + σz)] - L(w) at one σ: how much the mean loss rises under noise of this size, relative to each filter."""

    sigma: float
    rise: Flatness


@dataclass(frozen=True)
class TopEigenvalue:
    """A bracket for the largest eigenvalue of the Gauss-Newton matrix, which no single probe can tell."""

    # A direction found with one half of the probes, judged by the other half: at most the eigenvalue, in expectation.
    lower: float
    upper: float  # of the sketch made of all probes: at least the eigenvalue, in expectation
    probes: int


@dataclass(frozen=True)
class FlatnessReport:
    """How curved the loss is around the weights."""

    loss: str  # its name
    samples: int  # that its mean is over
    probes: int  # random directions for each layer
    seed: int
    noise: float  # standard deviation of the mean loss around its smooth course: what rounding leaves
    loss_before: float
    loss_after: float | None  # None when there are no trial weights
    trace: Flatness  # sum of the layers' traces
    gauss_newton: Flatness  # the same of the Gauss-Newton matrix, from first differences of the same runs
    layers: tuple[LayerFlatness, ...]
    sharpness: tuple[Sharpness, ...]  # over a grid of σ
    top_before: TopEigenvalue | None  # None where the outputs are too many to keep
    top_after: TopEigenvalue | None
    seconds: float


@dataclass(frozen=True)
class LayerRank:
    """How many directions a layer's input uses."""

    name: str  # the initializer
    d: int  # width of the input
    rows: int  # calibration rows
    rank: int  # directions that rounding can tell from nothing; with groups their mean, rounded down, and 1 at least
    needed: int  # directions that matter to the output at its dtype's rounding unit, likewise
    free: int  # directions that do not, over all groups
    effective: float  # exp of the entropy of the singular values' shares (Roy and Vetterli 2007); mean over groups
    stable: float  # ||A||_F² / ||A||_2²; mean over groups


@dataclass(frozen=True)
class Collapse:
    """Neural collapse at the input of the last linear layer (Papyan, Han and Donoho 2020). All are 0 when collapsed.

    What is about the classifier is None where the layer is none.
    """

    layer: str  # the initializer whose input was looked at
    classes: int  # K, classes present
    samples: int  # rows looked at, one for each sample
    counts: dict[str, int]  # samples of each class, by label
    nc1: float  # variability within classes, against that between them
    nc2_norms: float  # spread of the centred class means' norms
    nc2_angles: float  # mean distance of their cosines from -1/(K-1)
    nc2_weight_norms: float | None  # spread of the norms of the classifier's columns
    nc3: float | None  # squared distance of the classifier from the class means, both scaled to norm 1
    nc4: float | None  # share of samples where the model's answer is not the nearest class mean


@dataclass(frozen=True)
class Check:
    """One condition."""

    name: str  # what must hold
    status: str  # pass, warn or fail; note for what only another mode needs, and has not
    figure: str  # what was found, with its number
    advice: str = ""  # what to do; empty when it passed


@dataclass(frozen=True)
class Verdict:
    """A checklist and what follows from it: go, try small, or no-go, with one sentence why."""

    answer: str
    why: str
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Diagnosis:
    """The verdict, neural collapse (None where it could not be measured), and the ranks of all layers."""

    verdict: Verdict
    features: Collapse | None
    layers: tuple[LayerRank, ...]


@dataclass(frozen=True)
class LayerDrift:
    """How much of a layer's output its change moves, over the samples of one data set."""

    name: str  # the initializer
    samples: int
    quantiles: Mapping[str, float]  # share of a sample's output, by quantile
    worst: tuple[tuple[int, float], ...]  # (sample number, share) of the largest, descending


@dataclass(frozen=True)
class Drift:
    """Whether data still looks like the calibration data to the changed layers."""

    figure: float  # the worst layer's share at `quantile`
    quantile: float
    limit: float | None  # None where none was asked for
    passed: bool
    baseline_figure: float | None  # of the baseline data; None without any
    layers: tuple[LayerDrift, ...]
    baseline: tuple[LayerDrift, ...] | None
