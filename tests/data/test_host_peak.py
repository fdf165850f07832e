"""Host memory in a fresh process: the data (or nothing, when mapped) and two partitions, no more.

VmHWM is reset before the part that is measured. Mapped pages are the page cache's, so peaks of mapped data count
anonymous memory alone, sampled after every read while two partitions are held.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

WIDTH = 2304
PRELUDE = """
import json, re, sys
import numpy as np, torch
import samegrad as sg
from samegrad import trees
from samegrad.data.prefetch import stream_chunks
from samegrad.data.rows import Rows
torch.set_num_threads(1)
def amount(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def measured(code: str, *arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout)
    return result


STREAM = """
path, how = sys.argv[1:]
rows = sg.open_rows(path) if how.startswith("mapped") else Rows(np.load(path))
if how == "copied":  # the planted fault: what data[indices] does each epoch
    rows = Rows(rows.read(0, len(rows)))
rows = rows.shuffled(seed=0, epoch=1)
layout = trees.find_rows(rows)
rows.read(0, 1)
reset_peak()
before, most, checksum = amount("RssAnon"), 0, 0.0
for chunk in stream_chunks(rows, layout, trees.even_sizes(layout.rows, 1800), "cpu"):
    checksum += float(chunk.double().sum())
    most = max(most, amount("RssAnon"))
partition = 1800 * rows.row_bytes
peak = amount("VmHWM")
print(json.dumps({"before": before, "most": most, "peak": peak, "partition": partition, "data": len(rows) * rows.row_bytes, "checksum": checksum}))
"""
