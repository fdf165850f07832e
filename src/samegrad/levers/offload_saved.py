"""What the forward keeps for backward waits on the host and comes back when backward asks for it.

Saves: the kept tensors of the model's forward, but for what is on the device anyway: parameters, buffers, the batch.
What the loss keeps stays, since backward begins with it.
Costs: every kept byte travels twice. Out it goes beside the computation, on a stream of its own; backward waits for
its way in. Pinned host memory, in blocks of powers of two.
Why the gradient is the same: backward reads the bits that forward kept, with the same strides. A kept tensor that is
modified in place before backward raises, as autograd does.
Refuses: models on the CPU, where it is on the host already.
Source: Rhu et al. 2016, "vDNN", arXiv:1602.08124; torch.autograd.graph.save_on_cpu.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, Within
from samegrad.errors import BadInput
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.levers._effects import effects_of, with_effect_of
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._saved_tensors import SavedTensors
from samegrad.records import Exactness, Footprint


@dataclasses.dataclass(frozen=True)
class OffloadSaved:
    """``smallest_bytes``: smaller storages stay. ``modules``: whose forwards' saved tensors travel; None means all."""

    smallest_bytes: int = 2**20
    modules: list[str] | None = None

    name: ClassVar[str] = "offload_saved"
    slot: ClassVar[Slot] = Slot.SAVED
    exactness: ClassVar[Exactness] = Exactness.SAME_BITS

    def __post_init__(self) -> None:
        if not isinstance(self.smallest_bytes, int) or isinstance(self.smallest_bytes, bool) or self.smallest_bytes < 0:
            raise BadInput(
                asked=f"{self.name} with smallest_bytes={self.smallest_bytes!r}",
                found="not a number of bytes",
                do="give a whole number, 0 for every tensor",
            )

    @classmethod
    def unsuited(cls, declared: DeclaredStep) -> str | None:
        if declared.device.type == "cpu":
            return "the model is on the CPU: what waits for backward is on the host already"
        return None

    @classmethod
    def refusal(cls, footprint: Footprint) -> str | None:
        return footprint.refusals.get(cls.name)

    @classmethod
    def candidates(cls, footprint: Footprint, budget_bytes: int) -> Iterator[Self]:
        for effect in effects_of(cls.name, footprint):
            yield cls(**effect.knobs)

    def predict(self, footprint: Footprint) -> Footprint:
        return with_effect_of(self.name, self.knobs(), footprint)

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        declared = execution.declared
        block = functools.partial(_travelling, self.smallest_bytes, self._parts(declared.network))
        forward = Within(declared.forward, block)
        yield dataclasses.replace(execution, declared=dataclasses.replace(declared, forward=forward))

    def knobs(self) -> dict[str, Any]:
        return {"smallest_bytes": self.smallest_bytes, "modules": self.modules}

    def _parts(self, network: nn.Module) -> list[nn.Module] | None:
        if self.modules is None:
            return None
        known = dict(network.named_modules())
        if missing := [path for path in self.modules if path not in known]:
            raise BadInput(
                asked=f"{self.name} with modules={self.modules}",
                found=f"the model has no part {missing[0]!r}",
                do="use names of model.named_modules()",
            )
        return [known[path] for path in self.modules]


@contextlib.contextmanager
def _travelling(
    smallest_bytes: int, parts: list[nn.Module] | None, network: nn.Module, batch: Any
) -> Iterator[None]:
    """One forward, of which the tensors that ``parts`` keep for backward travel."""
    resident = [*network.parameters(), *network.buffers(), *trees.leaves_of(batch)]
    saved = SavedTensors(smallest_bytes, [leaf for leaf in resident if isinstance(leaf, Tensor)])
    with contextlib.ExitStack() as stack:
        if parts is None:
            stack.enter_context(saved.travelling())
        else:
            for part in parts:
                stack.enter_context(forward_replaced(part, functools.partial(_within, saved, part.forward)))
        yield


def _within(saved: SavedTensors, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with saved.travelling():
        return forward(*args, **kwargs)
