"""Three processes, each with its share of seeded rows: what their owner makes of them, beside all rows in one place.

A script for `test_ownership.py`; the first process prints, by case, what it found as JSON.
"""

import json

import torch

from onnx_optshift.geometry import MatrixRows, Tap
from onnx_optshift.run.ownership import Elsewhere, to_owners
from onnx_optshift.run.world import joined
from onnx_optshift.stats.moments import InputMoments

WIDTH, GROUPS = 12, 2
# Rows of every process.
CASES = {
    "few": (3, 2, 4),  # stay rows: 9 of 12
    "as many as inputs": (4, 4, 4),
    "folded where they meet": (8, 2, 7),
    "folded in one": (5, 30, 2),
    "folded in all": (40, 20, 33),
    "none in one": (20, 0, 25),
    "none but in one": (0, 0, 30),
    "none": (0, 0, 0),
}


def rows_of(case, rank):
    generator = torch.Generator().manual_seed(100 * list(CASES).index(case) + rank)
    return torch.randn(GROUPS, CASES[case][rank], WIDTH, generator=generator, dtype=torch.float64)


def moments_of(case, ranks):
    moments = InputMoments(GROUPS, WIDTH)
    for rank in ranks:
        moments.update(rows_of(case, rank))
        moments.nonfinite += rank
    return moments


def compared(found, case):
    """Of moments at their owner: how they are held, and how far they are off all rows, and those of two processes."""
    whole, part = moments_of(case, range(3)), moments_of(case, range(2))
    return {
        "rows": found.rows,
        "nonfinite": found.nonfinite,
        "stored": found.stored_rows is not None,
        "stored alone": whole.stored_rows is not None,
        "same rows": found.stored_rows is not None and torch.equal(found.stored_rows, whole.stored_rows),
        "off": [float((found.gram() - whole.gram()).abs().max()), float((found.total - whole.total).abs().max())],
        "off a part": float((found.gram() - part.gram()).abs().max()),
        "size": float(whole.gram().abs().max()),
    }


with joined() as world:
    taps = {case: Tap(case, MatrixRows(), GROUPS, WIDTH) for case in CASES}
    owners = {tap: number % 3 for number, tap in enumerate(taps.values())}
    mine = {tap: moments_of(case, [world.rank]) for case, tap in taps.items()}
    found = to_owners(world, mine, owners)
    owned = {case: compared(found[tap], case) for case, tap in taps.items() if owners[tap] == world.rank}
    others = {case: found[tap] for case, tap in taps.items() if case not in owned}
    counts = {case: [isinstance(m, Elsewhere), m.rows, m.nonfinite] for case, m in others.items()}
    everywhere = world.gather((owned, counts))
    if world.first:
        print(json.dumps(everywhere))
