"""The document's automatic script: the recipe's command under the document's name.

    python examples/train_wpo_sgm_memory_efficient.py --train_kernel_size 500 --strategy chunked --chunk_size 50
"""

from __future__ import annotations

import sys

from samegrad.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["run", "score_kernel", *sys.argv[1:]]))
