"""A plan that outlives a kill: made from the memory that is free, it would be another one now, and give other bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_optshift.geometry import Tap
from onnx_optshift.run.budget import Plan
from onnx_optshift.run.checkpoint import Checkpoint, Entry, digest


def kept_plan(checkpoint: Checkpoint, plan: Plan, taps: Sequence[Tap], asked: str) -> Plan:
    """The plan of the first run that was asked for the same with these taps; of this one where it is the first."""
    number = {tap: place for place, tap in enumerate(taps)}

    def pack(made: Plan) -> Entry:
        return Entry(facts={"size": made.batch_size, "waves": [[number[tap] for tap in wave] for wave in made.waves]})

    def unpack(entry: Entry) -> Plan:
        waves = tuple(tuple(taps[place] for place in wave) for wave in entry.facts["waves"])
        return replace(plan, batch_size=entry.facts["size"], waves=waves)

    return checkpoint.once("plan", lambda: digest(asked, *(tap.key for tap in taps)), lambda: plan, pack, unpack)
