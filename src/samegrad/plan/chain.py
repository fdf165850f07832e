"""What a choice for a chain of units holds at every position of the step, and how long it takes.

This prediction is the measure of every choice; solvers only look for good ones. Saved bytes alone mislead: a choice
that keeps less can peak higher, where a stretch runs again beside the gradients that have arrived.

A unit's bytes leave for the host by a copy engine that works beside the step, in order. What has not left yet still
stands on the device, ``in_flight_bytes`` at most: the step waits where it would be more. In backward the same holds
with time reversed, so that what comes back does so as late as it can.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

from samegrad.errors import BadInput
from samegrad.plan.heights import Bytes, Chain, Stage, Way
from samegrad.unit_tables import Unit


class Moment(enum.Enum):
    """What a unit does at a position of the step."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"


class Position(NamedTuple):
    """The most bytes on the device while unit number ``unit`` runs."""

    unit: int
    moment: Moment
    live_bytes: int


@dataclasses.dataclass(frozen=True)
class HostLink:
    """The way to the host: bytes a second in each direction, and how much may wait there (None: as much as comes)."""

    bytes_per_second: float = math.inf
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0 or (self.host_bytes is not None and self.host_bytes < 0):
            raise BadInput(
                asked="offload to the host",
                found=f"{self.bytes_per_second} bytes a second and room for {self.host_bytes}",
                do="give the measured bandwidth of the bus and the bytes that the host can spare",
            )

    @property
    def is_free(self) -> bool:
        return math.isinf(self.bytes_per_second) and self.host_bytes is None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A step's peak and time. ``stall_seconds``, part of ``seconds``, are spent waiting for the host."""

    peak_bytes: int
    seconds: float
    stall_seconds: float
    host_bytes: int
    positions: tuple[Position, ...]


@dataclasses.dataclass(frozen=True)
class ChainChoice:
    """How a chain is run, with its predicted peak (resident bytes included) and seconds of a step."""

    stages: tuple[Stage, ...]
    peak_bytes: int
    seconds: float
    in_flight_bytes: int = 0
    host_bytes: int = 0
    stall_seconds: float = 0.0


def plain_stages(units: Sequence[Unit]) -> tuple[Stage, ...]:
    """Every unit keeps what its backward needs."""
    return tuple(Stage(k, k, Way.KEEP) for k in range(len(units)))


def predict_chain(
    units: Sequence[Unit] | Chain,
    stages: Sequence[Stage],
    *,
    resident_bytes: int = 0,
    link: HostLink | None = None,
    in_flight_bytes: float = math.inf,
) -> Prediction:
    """The peak of ``stages`` at every position, in the order of the step, and its time.

    Raises BadInput for stages that do not cover the units in order, or that ask of a unit what it cannot do.
    """
    chain = units if isinstance(units, Chain) else Chain.of(units)
    check_stages(chain, stages)
    moved = [chain.units[s.first].moved_bytes if s.way is Way.OFFLOAD else 0 for s in stages]
    rate = math.inf if link is None else link.bytes_per_second
    forward_seconds = [float(chain.forward_seconds[s.first : s.last + 1].sum()) for s in stages]
    backward_seconds = [
        float(chain.backward_seconds[s.first : s.last + 1].sum()) + chain.extra_seconds(s) for s in stages
    ]
    leaving, stall_out = _in_flight(forward_seconds, moved, rate, in_flight_bytes)
    returning, stall_back = _in_flight(backward_seconds, moved, rate, in_flight_bytes)

    base, ahead, back = resident_bytes, [], []
    for stage, out_bytes, in_bytes in zip(stages, leaving, returning):
        heights = chain.heights(stage)
        ahead += _positions(stage, Moment.FORWARD, base + out_bytes, heights.forward)
        again = _positions(stage, Moment.RECOMPUTE, base + in_bytes, heights.recompute)
        back.append(again + _positions(stage, Moment.BACKWARD, base + in_bytes, heights.backward)[::-1])
        base += chain.left_bytes(stage)
    positions = (*ahead, *(position for stage in reversed(back) for position in stage))
    stall = stall_out + stall_back
    return Prediction(
        peak_bytes=max(position.live_bytes for position in positions),
        seconds=chain.plain_seconds + sum(chain.extra_seconds(stage) for stage in stages) + stall,
        stall_seconds=stall,
        host_bytes=sum(moved),
        positions=positions,
    )


def chain_peak_bytes(chain: Chain, stages: Sequence[Stage], *, resident_bytes: int = 0) -> int:
    """The peak that ``predict_chain`` gives of stages of which none waits for the host. Raises BadInput as it does."""
    check_stages(chain, stages)
    base, peak = resident_bytes, resident_bytes
    for stage in stages:
        heights = chain.heights(stage)
        for each in (heights.forward, heights.recompute, heights.backward):
            peak = max(peak, base + int(each.max(initial=0)))
        base += chain.left_bytes(stage)
    return peak


def predicted_choice(
    chain: Chain, stages: Sequence[Stage], *, resident_bytes: int, link: HostLink, in_flight_bytes: int
) -> ChainChoice:
    """``stages`` with what is predicted for them."""
    found = predict_chain(chain, stages, resident_bytes=resident_bytes, link=link, in_flight_bytes=in_flight_bytes)
    return ChainChoice(
        stages=tuple(stages),
        peak_bytes=found.peak_bytes,
        seconds=found.seconds,
        in_flight_bytes=in_flight_bytes,
        host_bytes=found.host_bytes,
        stall_seconds=found.stall_seconds,
    )


def fastest_first(choices: Sequence[ChainChoice]) -> tuple[ChainChoice, ...]:
    """The choices that are worth taking: each next one is smaller, and none that is as small is faster.

    Equally fast ones stay, since the larger does less for its time.
    """
    front: list[ChainChoice] = []
    for choice in sorted(choices, key=lambda choice: (choice.seconds, -choice.peak_bytes)):
        if not front or choice.peak_bytes < front[-1].peak_bytes:
            front.append(choice)
    return tuple(front)


def check_stages(chain: Chain, stages: Sequence[Stage]) -> None:
    """Raises BadInput unless ``stages`` cover the chain in order, each in a way that its units can go."""
    following = 0
    for stage in stages:
        inside = chain.units[stage.first : stage.last + 1]
        wrong = None
        if stage.first != following or not stage.first <= stage.last < len(chain):
            wrong = f"units {stage.first} to {stage.last} where unit {following} comes next of {len(chain)}"
        elif stage.way in (Way.KEEP, Way.OFFLOAD) and len(inside) > 1:
            wrong = f"units {stage.first} to {stage.last} together"
        elif stage.way in (Way.RECOMPUTE, Way.CHUNKED) and not all(unit.recomputable for unit in inside):
            wrong = f"units {stage.first} to {stage.last}, of which one cannot run again"
        elif stage.way is Way.CHUNKED and not all(unit.row_independent for unit in inside):
            wrong = f"units {stage.first} to {stage.last}, of which one does not treat rows alone"
        elif stage.chunks < 1 or (stage.chunks > 1 and stage.way is not Way.CHUNKED):
            wrong = f"{stage.chunks} chunks"
        if wrong:
            raise BadInput(
                asked=f"a chain with a stage to {stage.way.value}", found=wrong, do="plan again, or correct the stages"
            )
        following = stage.last + 1
    if following != len(chain):
        raise BadInput(
            asked="a choice for a chain", found=f"its stages end after {following} of {len(chain)} units",
            do="plan again: the chain has changed",
        )  # fmt: skip


def _positions(stage: Stage, moment: Moment, base_bytes: int, heights: Bytes) -> list[Position]:
    return [Position(stage.first + k, moment, base_bytes + int(height)) for k, height in enumerate(heights)]


def _in_flight(
    seconds: Sequence[float], moved_bytes: Sequence[int], bytes_per_second: float, most_bytes: float
) -> tuple[list[int], float]:
    """Bytes on their way when each stage begins, and the seconds waited for them; at the end all have arrived.

    Queueing in fluid bytes: stage k takes ``seconds[k]`` and then hands over ``moved_bytes[k]``.
    """
    if math.isinf(bytes_per_second):
        return [0] * len(seconds), 0.0
    queued, waited, standing = 0.0, 0.0, []
    for duration, moved in zip(seconds, moved_bytes):
        standing.append(math.ceil(queued))
        queued = max(0.0, queued - bytes_per_second * duration)
        if moved:
            too_many = min(queued, max(0.0, queued + moved - most_bytes))
            waited += too_many / bytes_per_second
            queued += moved - too_many
    return standing, waited + queued / bytes_per_second
