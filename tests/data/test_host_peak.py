"""Host memory in a fresh process: the data (nothing, when it is mapped) and two partitions, no more.

Streaming runs under RLIMIT_DATA, which the kernel holds against every private allocation and not against mapped
files: one byte over the promise and the allocation fails. Decoding is judged by the peak of resident memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS, WIDTH = 22_000, 2304
# 40 MB a partition: below 32 MiB glibc's allocator keeps holes of the freed ones, which are not ours to promise.
PARTITION_ROWS = 4400
# For gather scratch and indices; a fifth of a partition.
SLACK_BYTES = 8 * 2**20

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")

PRELUDE = """
import json, re, resource, sys
import numpy as np, torch
import samegrad as sg
from samegrad import trees
from samegrad.data import stream_chunks
torch.set_num_threads(1)
def status_bytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
"""

# One forked child a case: importing torch once is half the time of this file.
STREAM = """
import os
path, partition_rows, slack_bytes, cases = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4:]

def stream(storage, fault):
    rows = sg.open_rows(path) if storage == "mapped" else sg.Rows(np.load(path))
    rows = rows.shuffled(seed=0, epoch=1)
    layout = trees.find_rows(rows)
    rows.read(0, 1).double().sum()
    allowed_bytes = status_bytes("VmData") + 2 * partition_rows * rows.row_bytes + slack_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (allowed_bytes, allowed_bytes))
    total, chunks = 0.0, []
    try:
        if fault == "copies the data set":
            rows = sg.Rows(rows.read(0, len(rows)))
        for chunk in stream_chunks(rows, layout, trees.even_sizes(layout.rows, partition_rows), "cpu"):
            total += float(chunk[:, :7].double().sum())
            if fault == "keeps two more partitions":
                chunks = [*chunks[-1:], chunk]
    except (RuntimeError, MemoryError):
        return None
    return total

totals = {}
for case in cases:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, json.dumps(stream(*case.split(", "))).encode())
        os._exit(0)
    os.close(write)
    totals[case] = json.loads(os.read(read, 100))
    os.waitpid(child, 0)
print(json.dumps(totals))
"""
CASES = ["mapped, correct", "held, correct", "mapped, copies the data set", "mapped, keeps two more partitions"]

DECODE = """
path, warm_up = sys.argv[1:]
sg.open_rows(warm_up)
open("/proc/self/clear_refs", "w").write("5")
before_bytes = status_bytes("VmRSS")
rows = sg.open_rows(path, column="act")
peak_bytes = status_bytes("VmHWM") - before_bytes
print(json.dumps({"peak_bytes": peak_bytes, "array_bytes": rows.resident_bytes, "rows": len(rows)}))
"""


def run(code: str, *arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def totals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | None]:
    """The sum that each case read, None where the kernel refused an allocation; "expected" is the file's."""
    path = tmp_path_factory.mktemp("peak") / "acts.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(ROWS, WIDTH))
    array[:] = np.arange(ROWS, dtype=np.float32)[:, None] % 64
    expected = float(array[:, :7].sum(dtype=np.float64))
    return {"expected": expected, **run(STREAM, path, PARTITION_ROWS, SLACK_BYTES, *CASES)}


@pytest.mark.parametrize("case", CASES[:2])
def test_a_shuffled_epoch_needs_two_partitions_beside_the_data(totals: dict[str, float | None], case: str) -> None:
    assert totals[case] == totals["expected"]


@pytest.mark.parametrize("case", CASES[2:])
def test_the_limit_catches_a_planted_copy(totals: dict[str, float | None], case: str) -> None:
    assert totals[case] is None


def test_decoding_parquet_peaks_below_1_3_times_the_array(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(9000 * WIDTH, dtype=np.float32)
    lists = pa.ListArray.from_arrays(np.arange(9001, dtype=np.int32) * WIDTH, pa.array(values))
    # One row group: the worst case for readers that decode a group at a time.
    pq.write_table(pa.table({"act": lists}), tmp_path / "large.parquet", use_dictionary=False)
    pq.write_table(pa.table({"act": lists[:2]}), tmp_path / "small.parquet")
    result = run(DECODE, tmp_path / "large.parquet", tmp_path / "small.parquet")
    ratio = result["peak_bytes"] / result["array_bytes"]
    print(f"peak of decoding parquet: {ratio:.2f} x the array")
    assert result["array_bytes"] == values.nbytes
    assert ratio <= 1.3


def test_the_decoding_peak_catches_a_whole_row_group(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(3000 * WIDTH, dtype=np.float32)
    lists = pa.ListArray.from_arrays(np.arange(3001, dtype=np.int32) * WIDTH, pa.array(values))
    pq.write_table(pa.table({"act": lists}), tmp_path / "x.parquet", use_dictionary=False)
    planted = DECODE.replace("\npeak_bytes", "\nimport pyarrow.parquet as pq; whole = pq.read_table(path)\npeak_bytes")
    result = run(planted, tmp_path / "x.parquet", tmp_path / "x.parquet")
    assert result["peak_bytes"] > 1.3 * result["array_bytes"]
