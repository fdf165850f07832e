"""What the zoo of known truths is made of: small modules that do one thing each, float64.

They take ``x`` (29, 6), or ``tokens`` (29, 5) where they say so by ``takes``, and give (29, 7) or a nesting of such.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import zoo

D = torch.float64


def linear(inputs: int = 6, outputs: int = zoo.CLASSES) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=D)


class Fn(nn.Module):
    """``function(self, hidden)`` after a linear layer; ``held`` are attributes, tensors among them buffers."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **held: Any) -> None:
        super().__init__()
        self.inner, self.function = linear(), function
        for name, value in held.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.inner(x))


class Alone(nn.Module):
    """A function without parameters, as a module that can be named."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def between(*layers: nn.Module) -> nn.Module:
    """``layers`` between two linear ones, on (29, 8)."""
    return nn.Sequential(linear(6, 8), *layers, linear(8)).to(D)


def signals(*layers: nn.Module, width: int = 12) -> nn.Module:
    """``layers`` on (29, 2, 3) signals, of which ``width`` numbers a row are left."""
    return nn.Sequential(nn.Unflatten(1, (2, 3)), *layers, nn.Flatten(), linear(width)).to(D)


def images(*layers: nn.Module, width: int) -> nn.Module:
    """``layers`` on (29, 4, 4, 4) images."""
    return nn.Sequential(linear(6, 64), nn.Unflatten(1, (4, 4, 4)), *layers, nn.Flatten(), linear(width)).to(D)


class Tokens(nn.Module):
    """Of ``tokens`` (29, 5): ``embed`` gives (29, 6), or (29, 5, 6) to be averaged."""

    takes = "tokens"

    def __init__(self, embed: nn.Module, offsets: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.offsets = embed, linear(), offsets

    def forward(self, tokens: Tensor) -> Tensor:
        if self.offsets:
            starts = torch.arange(len(tokens), device=tokens.device) * tokens.shape[1]
            return self.head(self.embed(tokens.flatten(), starts))
        z = self.embed(tokens)
        return self.head(z.mean(1) if z.dim() == 3 else z)


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = linear(rnn.hidden_size * (1 + rnn.bidirectional))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 3, 2))[0][:, -1])


class Attending(nn.Module):
    """Attention over five tokens of each row, under a causal mask and a padding mask of the row's own."""

    def __init__(self, layer: nn.Module, decoder: bool = False) -> None:
        super().__init__()
        self.layer, self.decoder, self.head = layer, decoder, linear()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, None] * torch.linspace(0.5, 1.5, 5, dtype=x.dtype, device=x.device)[:, None]
        padded = torch.arange(5, device=x.device) > 3 + (x[:, :1] > 0)
        causal = torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1)
        if self.decoder:
            z = self.layer(tokens, tokens.flip(1), tgt_mask=causal, memory_key_padding_mask=padded)
        elif isinstance(self.layer, nn.MultiheadAttention):
            z = self.layer(tokens, tokens, tokens, attn_mask=causal, key_padding_mask=padded)[0]
        else:
            z = self.layer(tokens, causal, padded)
        return self.head(z.mean(1))


class Parameters(nn.Module):
    """A ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 8, dtype=D), torch.randn(8, zoo.CLASSES, dtype=D)])
        self.more = nn.ParameterDict({"bias": torch.randn(8, dtype=D)})

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weights[0] + self.more["bias"]).tanh() @ self.weights[1]


class Complex(nn.Module):
    """A layer of complex weights, seen through their absolute values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8, dtype=torch.complex128), linear(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.fft(self.inner(x.to(torch.complex128))).abs())


class Experts(nn.Module):
    """Each row goes to the expert that scores highest, as long as that has room for it."""

    def __init__(self, capacity: Callable[[int], int] | None) -> None:
        super().__init__()
        self.gate, self.capacity = linear(6, 2), capacity
        self.experts = nn.ModuleList([linear(), linear()])

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(1)
        out = x.new_zeros(len(x), zoo.CLASSES)
        for number, expert in enumerate(self.experts):
            room = len(x) if self.capacity is None else self.capacity(len(x))
            mine = (scores.argmax(1) == number).nonzero()[:room, 0]
            out = out.index_put((mine,), expert(x[mine]) * scores[mine, number, None])
        return out


class Quantised(nn.Module):
    """A codebook that follows the rows (van den Oord et al. 2017, arXiv:1711.00937, appendix): two decayed sums."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = linear(6, 4), linear(4)
        self.register_buffer("counts", torch.ones(5, dtype=D))
        self.register_buffer("sums", torch.randn(5, 4, dtype=D))
        self.register_buffer("codes", self.sums / self.counts[:, None])

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        nearest = torch.cdist(z.detach(), self.codes).argmin(1)
        code = self.codes[nearest]
        with torch.no_grad():
            mine = F.one_hot(nearest, 5).to(D)
            self.counts.mul_(0.9).add_(mine.sum(0), alpha=0.1)
            self.sums.mul_(0.9).add_(mine.T @ z, alpha=0.1)
            self.codes.copy_(self.sums / self.counts[:, None])
        return self.head(z + (code - z).detach())


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Output(OrderedDict):  # type: ignore[type-arg]
    """A dict whose entries are attributes as well, as transformers' model outputs are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


torch.utils._pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(zip(names, values)),
    flatten_with_keys_fn=lambda output: (
        [(torch.utils._pytree.MappingKey(name), value) for name, value in output.items()],
        list(output),
    ),
    serialized_type_name="tests.exact.module_zoo.Output",
)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, block: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.reentrant = linear(6, 8), reentrant
        self.block = nn.Sequential(linear(8, 8), nn.GELU(), linear(8)) if block is None else block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)


class Looping(nn.Module):
    """As many iterations as each row asks for, one row after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = linear(6, 6), linear()

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            for _ in range(1 + int(row[0] > 0) + int(row[1] > 0.5)):
                row = self.inner(row).tanh()
            rows.append(row)
        return self.head(torch.stack(rows))


class StochasticDepth(nn.Module):
    """Huang et al. 2016, arXiv:1603.09382: drops a branch for a row, or for the batch."""

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        super().__init__()
        self.inner, self.shape = linear(8, 8), shape

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(self.shape or (len(x), 1), dtype=D) > 0.3
        return x + self.inner(x) * keep


class Rotary(nn.Module):
    """A table that the first forward builds, for a length that no row changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tables = linear(), {}

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        if z.shape[1] not in self.tables:
            self.tables[z.shape[1]] = torch.arange(z.shape[1], dtype=z.dtype).cos()
        return z * self.tables[z.shape[1]]


def hooked(kind: str, hook: Callable[..., Any]) -> nn.Module:
    """A hook of this kind on the activation between two linear layers."""
    model = between(nn.Tanh())
    getattr(model[1], f"register_{kind}_hook")(hook)
    return model


def parameter_hooked() -> nn.Module:
    model = between(nn.Tanh())
    model[0].weight.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return model


def tied() -> nn.Module:
    model = nn.Sequential(linear(6, 6), nn.Tanh(), linear(6, 6), linear())
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Module:
    model = zoo.mlp()
    model[0].requires_grad_(False)
    return model


def with_state(change: Callable[[Any, Tensor], None], **held: Any) -> nn.Module:
    """A layer that makes ``change(self, hidden)`` to what it keeps."""

    def function(self: Any, z: Tensor) -> Tensor:
        change(self, z.detach())
        return z

    return Fn(function, **held)


class Listed(nn.Module):
    """Parameters held where a swap cannot reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()
        self.held = [self.inner.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held[0].T


class OneWeight(nn.Module):
    """One weight, no submodules, and ``function(hidden)``."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, zoo.CLASSES, dtype=D))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x @ self.weight)


def faint_straight_through(z: Tensor) -> Tensor:
    mean = z.mean(0)
    return z + 1e-10 * (mean - mean.detach())


class Outside:
    """State where no module sees it: every call scales by another number."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z * (1 + 0.01 * self.calls)


class Remembered:
    """Rows that came twice come from a cache from then on, in fewer digits; no module sees it."""

    def __init__(self) -> None:
        self.seen: Counter[bytes] = Counter()

    def __call__(self, z: Tensor) -> Tensor:
        key = z.detach().numpy().tobytes()
        self.seen[key] += 1
        return z if self.seen[key] < 3 else z + (z.detach().float().to(z.dtype) - z.detach())


class FromFirstBatch(nn.Module):
    """A scale that the first batch sets, as in activation normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, zoo.CLASSES, dtype=D))
        self.scale = nn.Parameter(torch.zeros(1, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.weight
        if not self.scale.any():
            self.scale.data.copy_(1 / z.detach().std())
        return z * self.scale


class ClampedWeight(nn.Module):
    """A hook on what is made of a weight: it is handed the gradient of a chunk, not the total."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, zoo.CLASSES, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        made = self.weight.tanh()
        if made.requires_grad:
            made.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return x @ made


class ByLength(torch.autograd.Function):
    """The identity, whose gradient is divided by the rows there are."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / len(g)
