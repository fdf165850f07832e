"""The cards a plan can be made for: what their makers state, each with where it was read.

Rates are dense and those of the fastest unit that torch's matrix products use. Two mistakes are common and are held
off by tests: the rate of sparse matrices (twice as high), which most data sheets print first, and on GeForce cards the
rate of float16 that is summed in float16 (twice as high as well), which torch does not use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

_GIB, _MIB = 2**30, 2**20
# One lane, one direction, after line coding: 8, 16 and 32 GT/s at 128/130. PCI-SIG base specifications 3.0 to 5.0.
_PCIE_LANE_BYTES_PER_SECOND = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One card as its maker states it.

    ``name`` is ours and unique, ``torch_name`` what ``torch.cuda.get_device_name`` says. ``flops_per_second`` by dtype
    ("float64", "float32", "tf32", "float16", "bfloat16"): a dtype that the card has no unit for is absent.
    ``boost_hertz``: the clock that the rates are stated at; of laptop cards the highest, at their largest power.
    ``nominal_memory_bytes``: what the box says. ``reported_memory_bytes``: the total that torch or the CUDA runtime
    was seen to report in public logs, the smallest where there were several; None where none was found.
    """

    name: str
    torch_name: str
    nominal_memory_bytes: int
    reported_memory_bytes: int | None
    bandwidth_bytes_per_second: float
    flops_per_second: Mapping[str, float]
    compute_capability: tuple[int, int]
    streaming_multiprocessors: int
    boost_hertz: float
    pcie_generation: int
    pcie_lanes: int
    source: str

    @property
    def memory_bytes(self) -> int:
        """Bytes of the whole card: as reported, else as on the box (up to 5 % more than a process can see)."""
        return self.nominal_memory_bytes if self.reported_memory_bytes is None else self.reported_memory_bytes

    @property
    def memory_basis(self) -> str:
        return "as on the box" if self.reported_memory_bytes is None else "as the runtime reports it"

    @property
    def host_bandwidth_bytes_per_second(self) -> float:
        """The link to the host, one direction, by its generation and lanes; a machine may wire fewer."""
        return _PCIE_LANE_BYTES_PER_SECOND[self.pcie_generation] * self.pcie_lanes

    def arithmetic_of(self, dtype: str, *, tf32: bool) -> str:
        """The key of ``flops_per_second`` that work in ``dtype`` runs at; without a unit of its own, float32's."""
        if dtype == "float32" and tf32:
            dtype = "tf32"
        return dtype if dtype in self.flops_per_second else "float32"


# What was read, in November 2026. Where a page prints no rate for a dtype, it is the product of multiprocessors, clock
# and what one multiprocessor does in a cycle, which another card of the same generation was read for.
_TOPCPU = "topcpu.net, comparison pages"
_SYSRQMTS = "sysrqmts.com, comparison pages"
_HMC = "hmc-tech.com, comparison pages (rates by dtype)"
_AMPERE = "fudzilla.net 51457 (NVIDIA's figures); tensor rates of the RTX 3090 as quoted from the GA102 whitepaper"
_LAPTOPS = "nvidia.com/geforce/gaming-laptops/compare (clocks, cores, memory)"
_BLACKWELL = "tweaktown.com 102469 (NVIDIA's figures); 87.9 dense of the RTX 5070 Ti as techpowerup.com has it"
_VOLTA = "hmc-tech.com and sysrqmts.com, V100 (tensor cores summing in float32)"
_A100 = "NVIDIA A100 data sheet r4, as glennklockwood.com and thundercompute.com copy it"
_HOPPER = "NVIDIA H100 data sheet, as archive-lib.hpctech.co.jp copies it, halved where it states sparse rates"
_L4 = "fpsbench.com; NVIDIA L4 data sheet as grokipedia.com copies it, halved where it states sparse rates"
_B200 = "glennklockwood.com (dense), hmc-tech.com (float32, float64); bandwidth by pytorch/ao pull request 4002"


def _card(
    name: str, torch_name: str, memory: tuple[int, float | None], gigabytes_per_second: float,
    teraflops: tuple[float, float, float | None, float, float | None], capability: str, multiprocessors: int,
    boost_megahertz: float, pcie: tuple[int, int], source: str,
) -> Card:  # fmt: skip
    """A row of the table: memory in GiB and reported MiB; teraflops of float64, float32, tf32, float16, bfloat16."""
    gibibytes, reported_mebibytes = memory
    dtypes = ("float64", "float32", "tf32", "float16", "bfloat16")
    rates = {dtype: rate * 1e12 for dtype, rate in zip(dtypes, teraflops) if rate is not None}
    major, minor = capability.split(".")
    return Card(
        name=name, torch_name=torch_name, nominal_memory_bytes=gibibytes * _GIB,
        reported_memory_bytes=None if reported_mebibytes is None else int(reported_mebibytes * _MIB),
        bandwidth_bytes_per_second=gigabytes_per_second * 1e9, flops_per_second=MappingProxyType(rates),
        compute_capability=(int(major), int(minor)), streaming_multiprocessors=multiprocessors,
        boost_hertz=boost_megahertz * 1e6, pcie_generation=pcie[0], pcie_lanes=pcie[1], source=source,
    )  # fmt: skip


# fmt: off
CARDS: tuple[Card, ...] = (
    _card("RTX 3060 12GB", "NVIDIA GeForce RTX 3060", (12, 11931), 360, (0.199, 12.74, 12.74, 25.5, 25.5),
          "8.6", 28, 1777, (4, 16), "pcpartdb.com and hmc-tech.com, RTX 3060"),
    _card("RTX 3060 Laptop", "NVIDIA GeForce RTX 3060 Laptop GPU", (6, None), 336, (0.204, 13.1, 13.1, 26.2, 26.2),
          "8.6", 30, 1703, (4, 16), _HMC + "; hardwaredb.net (clock)"),
    _card("RTX 3070", "NVIDIA GeForce RTX 3070", (8, None), 448, (0.317, 20.3, 20.3, 40.6, 40.6),
          "8.6", 46, 1725, (4, 16), _AMPERE),
    _card("RTX 3080 10GB", "NVIDIA GeForce RTX 3080", (10, None), 760, (0.465, 29.8, 29.8, 59.5, 59.5),
          "8.6", 68, 1710, (4, 16), _AMPERE),
    _card("RTX 3080 12GB", "NVIDIA GeForce RTX 3080", (12, None), 912.4, (0.479, 30.64, 30.64, 61.3, 61.3),
          "8.6", 70, 1710, (4, 16), _SYSRQMTS),
    _card("RTX 3090", "NVIDIA GeForce RTX 3090", (24, 24268), 936, (0.556, 35.6, 35.6, 71, 71),
          "8.6", 82, 1695, (4, 16), _AMPERE),
    _card("RTX 4060", "NVIDIA GeForce RTX 4060", (8, None), 272, (0.236, 15.11, 15.11, 30.2, 30.2),
          "8.9", 24, 2460, (4, 8), _TOPCPU),
    _card("RTX 4060 Ti 8GB", "NVIDIA GeForce RTX 4060 Ti", (8, None), 288, (0.345, 22.06, 22.06, 44.1, 44.1),
          "8.9", 34, 2535, (4, 8), _TOPCPU),
    _card("RTX 4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti", (16, None), 288, (0.345, 22.06, 22.06, 44.1, 44.1),
          "8.9", 34, 2535, (4, 8), _TOPCPU),
    _card("RTX 4070", "NVIDIA GeForce RTX 4070", (12, None), 504.2, (0.455, 29.15, 29.15, 58.3, 58.3),
          "8.9", 46, 2475, (4, 16), _TOPCPU),
    _card("RTX 4070 Laptop", "NVIDIA GeForce RTX 4070 Laptop GPU", (8, None), 256, (0.313, 20.04, 20.04, 40.1, 40.1),
          "8.9", 36, 2175, (4, 8), _LAPTOPS),
    _card("RTX 4080", "NVIDIA GeForce RTX 4080", (16, 16049), 716.8, (0.762, 48.7, 48.7, 97.5, 97.5),
          "8.9", 76, 2505, (4, 16), "cputronic.com, RTX 4080"),
    _card("RTX 4080 Laptop", "NVIDIA GeForce RTX 4080 Laptop GPU", (12, None), 432, (0.529, 33.85, 33.85, 67.7, 67.7),
          "8.9", 58, 2280, (4, 16), _LAPTOPS),
    _card("RTX 4090", "NVIDIA GeForce RTX 4090", (24, 24207), 1008, (1.29, 82.6, 82.6, 165.2, 165.2),
          "8.9", 128, 2520, (4, 16), "waredb.com, RTX 4090 (rates by dtype, dense and sparse)"),
    _card("RTX 4090 Laptop", "NVIDIA GeForce RTX 4090 Laptop GPU", (16, None), 576, (0.620, 39.7, 39.7, 79.4, 79.4),
          "8.9", 76, 2040, (4, 16), _LAPTOPS),
    _card("RTX 5060 Ti 8GB", "NVIDIA GeForce RTX 5060 Ti", (8, None), 448, (0.370, 23.7, 23.7, 47.4, 47.4),
          "12.0", 36, 2572, (5, 8), "fpsbench.com, RTX 5060 Ti"),
    _card("RTX 5060 Ti 16GB", "NVIDIA GeForce RTX 5060 Ti", (16, None), 448, (0.370, 23.7, 23.7, 47.4, 47.4),
          "12.0", 36, 2572, (5, 8), "fpsbench.com, RTX 5060 Ti"),
    _card("RTX 5070", "NVIDIA GeForce RTX 5070", (12, None), 672, (0.482, 30.9, 30.9, 61.7, 61.7),
          "12.0", 48, 2512, (5, 16), _BLACKWELL),
    _card("RTX 5070 Ti", "NVIDIA GeForce RTX 5070 Ti", (16, None), 896, (0.687, 43.9, 43.9, 87.9, 87.9),
          "12.0", 70, 2452, (5, 16), _BLACKWELL),
    _card("RTX 5080", "NVIDIA GeForce RTX 5080", (16, None), 960, (0.879, 56.3, 56.3, 112.6, 112.6),
          "12.0", 84, 2617, (5, 16), _BLACKWELL),
    _card("RTX 5090", "NVIDIA GeForce RTX 5090", (32, 32117), 1792, (1.64, 104.8, 104.8, 209.5, 209.5),
          "12.0", 170, 2407, (5, 16), _BLACKWELL),
    _card("RTX 5090 Laptop", "NVIDIA GeForce RTX 5090 Laptop GPU", (24, None), 896, (0.708, 45.3, 45.3, 90.7, 90.7),
          "12.0", 82, 2160, (5, 16), "hmc-tech.com, RTX 5090 Laptop 150W (clock, float32, memory)"),
    _card("T4", "Tesla T4", (16, 14930), 320, (0.254, 8.1, None, 65, None),
          "7.5", 40, 1590, (3, 16), _HMC),
    _card("V100 SXM2 16GB", "Tesla V100-SXM2-16GB", (16, 16160), 900, (7.8, 15.7, None, 125, None),
          "7.0", 80, 1530, (3, 16), _VOLTA),
    _card("V100 SXM2 32GB", "Tesla V100-SXM2-32GB", (32, None), 900, (7.8, 15.7, None, 125, None),
          "7.0", 80, 1530, (3, 16), _VOLTA),
    _card("V100 PCIe 16GB", "Tesla V100-PCIE-16GB", (16, None), 900, (7.0, 14.0, None, 112, None),
          "7.0", 80, 1380, (3, 16), _VOLTA),
    _card("V100 PCIe 32GB", "Tesla V100-PCIE-32GB", (32, None), 900, (7.0, 14.0, None, 112, None),
          "7.0", 80, 1380, (3, 16), _VOLTA),
    _card("A10", "NVIDIA A10", (24, None), 600, (0.488, 31.2, 62.5, 125, 125),
          "8.6", 72, 1695, (4, 16), _SYSRQMTS + "; tensor rates by the units of the A40 on hmc-tech.com"),
    _card("A100 SXM4 40GB", "NVIDIA A100-SXM4-40GB", (40, 39539), 1555, (19.5, 19.5, 156, 312, 312),
          "8.0", 108, 1410, (4, 16), _A100),
    _card("A100 SXM4 80GB", "NVIDIA A100-SXM4-80GB", (80, None), 2039, (19.5, 19.5, 156, 312, 312),
          "8.0", 108, 1410, (4, 16), _A100),
    _card("A100 PCIe 40GB", "NVIDIA A100-PCIE-40GB", (40, None), 1555, (19.5, 19.5, 156, 312, 312),
          "8.0", 108, 1410, (4, 16), _A100),
    _card("A100 PCIe 80GB", "NVIDIA A100 80GB PCIe", (80, 81049), 1935, (19.5, 19.5, 156, 312, 312),
          "8.0", 108, 1410, (4, 16), _A100),
    _card("L4", "NVIDIA L4", (24, None), 300, (0.473, 30.3, 60, 121, 121),
          "8.9", 58, 2040, (4, 16), _L4),
    _card("L40S", "NVIDIA L40S", (48, 45589), 864, (1.43, 91.6, 183, 362.05, 362.05),
          "8.9", 142, 2520, (4, 16), "NVIDIA L40S data sheet, as mullet.se copies it (dense and sparse)"),
    _card("RTX A6000", "NVIDIA RTX A6000", (48, 48676), 768, (0.605, 38.7, 77.4, 154.8, 154.8),
          "8.6", 84, 1800, (4, 16), _SYSRQMTS + "; tensor rates as quoted from the GA102 whitepaper"),
    _card("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", (48, 48622), 960, (1.42, 91.1, 182.1, 364.2, 364.2),
          "8.9", 142, 2505, (4, 16), "cputronic.com and grafikkarten.com, RTX 6000 Ada"),
    _card("H100 SXM 80GB", "NVIDIA H100 80GB HBM3", (80, 81008), 3350, (67, 67, 494.7, 989.4, 989.4),
          "9.0", 132, 1980, (5, 16), _HOPPER),
    _card("H100 PCIe 80GB", "NVIDIA H100 PCIe", (80, 81008), 2000, (51, 51, 378, 756, 756),
          "9.0", 114, 1755, (5, 16), _HOPPER),
    _card("H200", "NVIDIA H200", (141, 143156), 4800, (67, 67, 494.7, 989.4, 989.4),
          "9.0", 132, 1980, (5, 16), "hmc-tech.com and itkb.uw.cz, H200 SXM (dense)"),
    _card("B200", "NVIDIA B200", (180, 182631), 7672, (37, 75, 1100, 2250, 2250),
          "10.0", 148, 1980, (5, 16), _B200),
)
# fmt: on
