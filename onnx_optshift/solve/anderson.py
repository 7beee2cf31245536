"""Anderson's acceleration of a fixed-point iteration, for many independent problems at once.

The next state is the combination of the last images (state plus residual) whose residuals, were they linear, would
cancel best: Walker and Ni 2011, "Anderson acceleration for fixed-point iterations", in the unconstrained form of
section 2. It has a ridge and a longest jump, instead of a test that costs an iteration wherever it fails.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MEMORY = 3  # images that are combined; 5 and 8 need as many iterations
_RIDGE = 1e-3  # relative to the trace of its normal equations
# In residuals. Without it and the ridge, 15 of 210 runs of `quant_range` on small equations ran away and never ended.
_LONGEST_JUMP = 10


class Anderson:
    """The memory of an iteration `x <- x + residual(x)` over several problems at once.

    Args:
        state: A state x `[g, d, m]`; its shape, dtype and device are taken over.
        sums: Sum of `[..., g, d, m]` over each problem, the summed axes kept with length 1.
    """

    def __init__(self, state: Tensor, sums: Callable[[Tensor], Tensor]) -> None:
        self._sums = sums
        self._changes = state.new_zeros((_MEMORY, *state.shape))  # of the residual
        self._moves = torch.zeros_like(self._changes)  # of the image, state + residual
        self._gram = state.new_zeros((_MEMORY, _MEMORY, *sums(state).shape), dtype=torch.float64)
        self._last: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def forget(self) -> None:
        """Starts anew, as the iteration is another one."""
        for memory in (self._changes, self._moves, self._gram):
            memory.zero_()
        self._last = None

    def step(self, state: Tensor, residual: Tensor) -> Tensor:
        """The next state `[g, d, m]`.

        Args:
            state: The present one.
            residual: By how much the plain iteration would move it.
        """
        image = state + residual
        last, self._last = self._last, (residual, image)
        if last is None:
            return image
        slot = self._count % _MEMORY
        self._count += 1
        torch.sub(residual, last[0], out=self._changes[slot])
        torch.sub(image, last[1], out=self._moves[slot])
        products = self._sums(self._changes * self._changes[slot]).to(torch.float64)
        self._gram[slot] = products
        self._gram[:, slot] = products
        gram = self._gram.movedim((0, 1), (-2, -1))
        right = self._sums(self._changes * residual).to(torch.float64).movedim(0, -1)
        # Slots not in use yet are 0, and the ridge keeps their weights at 0.
        ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) + 1e-300
        weights: Tensor = torch.linalg.solve(gram + torch.diag_embed(ridge.expand_as(right)), right)
        jump = (self._moves * weights.movedim(-1, 0).to(image.dtype)).sum(0)
        length, longest = self._sums(jump.square()).sqrt(), _LONGEST_JUMP * self._sums(residual.square()).sqrt()
        return image - jump * (longest / length.clamp_min(1e-30)).clamp_max(1)
