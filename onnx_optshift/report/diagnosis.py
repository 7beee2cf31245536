"""What a diagnosis found, as frozen data: the values of the report's `flatness` and `collapse`.

Numbers and sentences only, so that every renderer and the JSON report can read them.
"""

from __future__ import annotations

from dataclasses import dataclass

PASS, WARN, FAIL = "pass", "warn", "fail"
GO, TRY_SMALL, NO_GO = "go", "try small", "no-go"


@dataclass(frozen=True)
class Estimate:
    """A figure from random probes, and its standard error; the error is None when there was one probe."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Flatness:
    """One figure before and after, on the same probes.

    Attributes:
        before: Of the original weights.
        after: Of the trial weights; None when there are none.
        change: Mean over probes of after - before. Its error is that of paired differences, often far smaller than
            the errors of the two.
    """

    before: Estimate
    after: Estimate | None = None
    change: Estimate | None = None


@dataclass(frozen=True)
class LayerFlatness:
    """Curvature of the loss in one layer's weight.

    Attributes:
        name: The initializer.
        parameters: Its elements.
        step: h of the central difference, absolute; the same before and after.
        trace: tr H of the layer's block of the Hessian.
        relative: Relative flatness (Petzka et al. 2021): the same however one layer is scaled against the next.
    """

    name: str
    parameters: int
    step: float
    trace: Flatness
    relative: Flatness


@dataclass(frozen=True)
class Sharpness:
    """E[L(w + σz)] - L(w) at one σ: how much the mean loss rises under noise of this size, relative to each filter."""

    sigma: float
    rise: Flatness


@dataclass(frozen=True)
class TopEigenvalue:
    """A bracket for the largest eigenvalue of the Gauss-Newton matrix, which no single probe can tell.

    Attributes:
        lower: A direction found with one half of the probes, judged by the other half: at most the eigenvalue, in
            expectation.
        upper: Of the sketch made of all probes: at least the eigenvalue, in expectation.
        probes: How many the sketch was made of.
    """

    lower: float
    upper: float
    probes: int


@dataclass(frozen=True)
class FlatnessReport:
    """How curved the loss is around the weights.

    Attributes:
        loss: Name of the loss.
        samples: Samples that its mean is over.
        probes: Random directions for each layer.
        seed: Of the directions.
        noise: Standard deviation of the computed mean loss around its smooth course: what rounding leaves.
        loss_before: Mean loss of the original.
        loss_after: Mean loss with the trial weights; None when there are none.
        trace: Sum of the layers' traces.
        gauss_newton: Sum of the layers' traces of the Gauss-Newton matrix, from first differences of the same runs.
        layers: One for each weight.
        sharpness: Rise of the loss under noise, over a grid of σ.
        top_before: Largest eigenvalue, bracketed; None where the outputs are too many to keep.
        top_after: The same with the trial weights.
        seconds: Time it took.
    """

    loss: str
    samples: int
    probes: int
    seed: int
    noise: float
    loss_before: float
    loss_after: float | None
    trace: Flatness
    gauss_newton: Flatness
    layers: tuple[LayerFlatness, ...]
    sharpness: tuple[Sharpness, ...]
    top_before: TopEigenvalue | None
    top_after: TopEigenvalue | None
    seconds: float


@dataclass(frozen=True)
class LayerRank:
    """How many directions a layer's input uses.

    Attributes:
        name: The initializer.
        d: Width of the input.
        rows: Calibration rows.
        rank: Directions that rounding can tell from nothing: of the group that has fewest.
        needed: Directions that matter to the layer's output at its dtype's rounding unit; `d - needed` are free.
        effective: exp of the entropy of the singular values' shares (Roy and Vetterli 2007); mean over groups.
        stable: ||A||_F² / ||A||_2²; mean over groups.
    """

    name: str
    d: int
    rows: int
    rank: int
    needed: int
    effective: float
    stable: float


@dataclass(frozen=True)
class Collapse:
    """Neural collapse at the input of the last linear layer (Papyan, Han and Donoho 2020). All are 0 when collapsed.

    Attributes:
        layer: The initializer whose input was looked at.
        classes: K, classes present.
        samples: Rows looked at, one for each sample.
        counts: Samples of each class, by label.
        nc1: Variability within classes, against that between them.
        nc2_norms: Spread of the centred class means' norms.
        nc2_angles: Mean distance of their cosines from -1/(K-1).
        nc2_weight_norms: Spread of the norms of the classifier's columns; None where the layer is no classifier.
        nc3: Squared distance of the classifier from the class means, both scaled to norm 1; None likewise.
        nc4: Share of samples where the model's answer is not the nearest class mean; None likewise.
    """

    layer: str
    classes: int
    samples: int
    counts: dict[str, int]
    nc1: float
    nc2_norms: float
    nc2_angles: float
    nc2_weight_norms: float | None
    nc3: float | None
    nc4: float | None


@dataclass(frozen=True)
class Check:
    """One condition.

    Attributes:
        name: What must hold.
        status: pass, warn or fail.
        figure: What was found, with its number.
        advice: What to do; empty when it passed.
    """

    name: str
    status: str
    figure: str
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """A checklist and what follows from it: go, try small, or no-go, with one sentence why."""

    answer: str
    why: str
    checks: tuple[Check, ...]
