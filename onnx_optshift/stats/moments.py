"""First and second moments of the rows that meet a weight, as a mergeable accumulator.

A solver needs the rows A `[g, n, d]` only through `G = AᵀA`. While there are at most d rows they are kept as they are:
they take no more memory than G, and factoring them does not square the condition number. Beyond that only G is kept.

Everything is accumulated in float64: through G it resolves singular values down to about 6e-8 of the largest one,
float32's own rounding unit. Products of float32 rows, in pieces that are summed in float64, resolve 1e-3 in half the
time: enough where a solution may move outputs by more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

# A block row of the upper triangle has at least this many columns: thinner ones cost more in calls than they save.
_MIN_BLOCK = 64
_MAX_BLOCKS = 8


class InputMoments:
    """Unnormalized moments of rows A `[g, n, d]`: a commutative monoid under `merge`.

    The result depends neither on the order of the rows nor on how they were split into updates, up to rounding; and not
    by a bit on whether anybody has looked at it in between.

    Attributes:
        groups: g, the number of independent problems; every update brings the same number of rows to each.
        width: d, the length of a row.
        device: The torch device where the moments live; updates are moved there.
        products: dtype in which products of rows that do not come in float64 are taken; sums of them are float64.
        rows: n, rows seen per group.
        nonfinite: Elements of activations that were not finite. Such activations are not part of the moments.
        total: Column sums `[g, d]`, float64, not divided by n.
    """

    def __init__(
        self,
        groups: int,
        width: int,
        device: str | torch.device = "cpu",
        products: torch.dtype = torch.float64,
    ) -> None:
        self.groups = groups
        self.width = width
        self.device = torch.device(device)
        self.products = products
        self.rows = 0
        self.nonfinite = 0
        self.total = torch.zeros(groups, width, dtype=torch.float64, device=self.device)
        self._stored: list[Tensor] = []
        self._upper: Tensor | None = None  # block upper triangle of G; what lies below it is meaningless

    @property
    def stored_rows(self) -> Tensor | None:
        """The rows themselves `[g, n, d]` while n <= d, float64; None once they were folded into G."""
        if self._upper is not None:
            return None
        if len(self._stored) != 1:
            empty = self.total.new_empty(self.groups, 0, self.width)
            self._stored = [torch.cat([empty, *self._stored], dim=1)]
        return self._stored[0]

    @property
    def nbytes(self) -> int:
        """Bytes held at the moment; at most `8 g d (d + 1)`."""
        held = [self.total, *self._stored] if self._upper is None else [self.total, self._upper]
        return sum(tensor.nbytes for tensor in held)

    def gram(self) -> Tensor:
        """G = AᵀA `[g, d, d]`, float64, not divided by n; a new tensor, exactly symmetric."""
        upper = self._product() if self._upper is None else self._upper
        return upper.triu() + upper.triu(1).mT

    def update(self, rows: Tensor) -> None:
        """Adds rows `[g, n, d]` of any floating dtype and device. They are copied, never referred to.

        Raises:
            ValueError: The shape does not fit.
        """
        if rows.ndim != 3 or rows.shape[0] != self.groups or rows.shape[2] != self.width:
            raise ValueError(f"rows must be [{self.groups}, n, {self.width}], found {list(rows.shape)}.")
        count = rows.shape[1]
        if count == 0:
            return
        fits = self._upper is None and self.rows + count <= self.width
        wide = fits or rows.dtype == torch.float64
        rows = rows.to(self.device, torch.float64 if wide else self.products)
        if fits:
            # They must not alias a buffer that the caller may fill again, and lie as they will once saved and read.
            rows = rows.clone(memory_format=torch.contiguous_format)
        self.total += rows.sum(dim=1, dtype=torch.float64)
        self.rows += count
        if fits:
            self._stored.append(rows)
        else:
            _add_product(self._fold(), rows)

    def update_gram(self, gram: Tensor, total: Tensor, rows: int) -> None:
        """Adds `rows` rows per group by their AᵀA `[g, d, d]` (its upper triangle is read) and column sums `[g, d]`.

        Raises:
            ValueError: The shape does not fit.
        """
        if gram.shape != (*self.total.shape, self.width) or total.shape != self.total.shape:
            raise ValueError(
                f"moments must be {[*self.total.shape, self.width]} and {list(self.total.shape)}, found "
                f"{list(gram.shape)} and {list(total.shape)}."
            )
        self._fold().add_(gram.to(self.device, torch.float64))
        self.total += total.to(self.device, torch.float64)
        self.rows += rows

    def merge(self, other: InputMoments) -> InputMoments:
        """Moments of the rows of both, as a new object on this one's device. Neither operand changes.

        Raises:
            ValueError: The two are of different shape.
        """
        if (other.groups, other.width) != (self.groups, self.width):
            raise ValueError(
                f"moments of [{self.groups}, n, {self.width}] cannot take rows of [{other.groups}, n, {other.width}]."
            )
        merged = InputMoments(self.groups, self.width, self.device, self.products)
        # The folded one first: the stored rows of the other then join its G without being kept.
        for part in sorted((self, other), key=lambda moments: moments._upper is None):
            if (rows := part.stored_rows) is None:
                merged.update_gram(part._fold(), part.total, part.rows)
            else:
                merged.update(rows)
        merged.nonfinite = self.nonfinite + other.nonfinite
        return merged

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors: `total` `[g, d]`, `counts` (rows, nonfinite), and `rows` `[g, n, d]` or `upper`."""
        counts = torch.tensor([self.rows, self.nonfinite], dtype=torch.int64)
        stored = self.stored_rows
        kept = {"rows": stored} if stored is not None else {"upper": self._fold()}
        return {"total": self.total, "counts": counts, **kept}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        products: torch.dtype = torch.float64,
    ) -> InputMoments:
        """The inverse of `state`, on the device of its tensors unless another is given.

        Whatever is added next gives bit by bit what it would have given to the moments that `state` was taken of, if
        they had the same device and products.
        """
        total = state["total"]
        moments = cls(total.shape[0], total.shape[1], total.device if device is None else device, products)
        moments.total = total.to(moments.device, copy=True)
        moments.rows, moments.nonfinite = (int(count) for count in state["counts"])
        if "upper" in state:
            moments._upper = state["upper"].to(moments.device, copy=True)
        else:
            moments._stored = [state["rows"].to(moments.device, copy=True)]
        return moments

    def _product(self) -> Tensor:
        """G's upper triangle, of the stored rows: all at once, so that how they came makes no difference to a bit."""
        rows = self.stored_rows
        assert rows is not None
        upper = self.total.new_zeros(self.groups, self.width, self.width)
        if rows.shape[1]:
            _add_product(upper, rows)
        return upper

    def _fold(self) -> Tensor:
        """G's upper triangle, into which the stored rows have gone."""
        if self._upper is None:
            self._upper = self._product()
            self._stored = []
        return self._upper


def _add_product(upper: Tensor, rows: Tensor) -> None:
    """Adds AᵀA of rows `[g, n, d]` to the block upper triangle of G, in place.

    torch has no symmetric rank-k update; block rows that start at their diagonal save up to 7/16 of the products
    (measured, 16384 x 576: 101 ms as one product, 69 ms in 8 blocks).
    """
    width = rows.shape[2]
    blocks = max(1, min(_MAX_BLOCKS, width // _MIN_BLOCK))
    edges = [width * k // blocks for k in range(blocks + 1)]
    for start, stop in pairwise(edges):
        left, right, target = rows[..., start:stop].mT, rows[..., start:], upper[:, start:stop, start:]
        if rows.dtype == upper.dtype:
            target.baddbmm_(left, right)
        else:
            target += left @ right
