"""What the forward keeps for backward waits on the host and comes back when backward asks for it.

Saves: the kept tensors of the model's forward, but for what is on the device anyway: parameters, buffers, the batch.
What the loss keeps stays, since backward begins with it.
Costs: every kept byte travels twice, beside the computation, on streams of its own; where the link takes longer, the
computation waits for it. Ahead of their turn in backward come no more bytes than the two largest storages have. Pinned
host memory, in blocks of powers of two.
Why the gradient is the same: backward reads the bits that forward kept, with the same strides. A kept tensor that is
modified in place before backward raises, as autograd does.
Refuses: models on the CPU, where it is on the host already. In a forward that uses torch.func, torch refuses it.
Source: Rhu et al. 2016, "vDNN", arXiv:1602.08124; torch.autograd.graph.save_on_cpu.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from samegrad import trees
from samegrad.declared import DeclaredStep, Within
from samegrad.errors import BadInput
from samegrad.levers._lever import Execution, Slot
from samegrad.levers._parts import parts_called
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

    @contextlib.contextmanager
    def apply(self, execution: Execution) -> Iterator[Execution]:
        declared = execution.declared
        keeping = _Keeping(self.smallest_bytes, everywhere=self.modules is None)
        with parts_called(self.name, declared.network, self.modules or [], keeping.call):
            forward = Within(declared.forward, keeping.forward)
            changed = dataclasses.replace(declared, forward=forward)
            yield dataclasses.replace(execution, declared=changed, travels=self.name)

    def knobs(self) -> dict[str, Any]:
        return {"smallest_bytes": self.smallest_bytes, "modules": self.modules}


class _Keeping:
    """What forwards keep for backward, those of the whole model or those of parts of it."""

    def __init__(self, smallest_bytes: int, *, everywhere: bool) -> None:
        self._smallest_bytes = smallest_bytes
        self._everywhere = everywhere
        self._saved: SavedTensors | None = None

    @contextlib.contextmanager
    def forward(self, network: nn.Module, batch: Any) -> Iterator[None]:
        """One forward of the model."""
        resident = [*network.parameters(), *network.buffers(), *trees.leaves_of(batch)]
        saved = SavedTensors(self._smallest_bytes, [leaf for leaf in resident if isinstance(leaf, Tensor)])
        self._saved = saved
        try:
            with saved.travelling() if self._everywhere else saved.leaving():
                yield
        finally:
            self._saved = None

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a part. In a block that runs again in backward, it is to save what it saved before: as many."""
        with (self._saved or SavedTensors.all_staying()).hooked():
            return forward(*args, **kwargs)
