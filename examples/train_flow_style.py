"""The document's program: a config.json in, a trained style flow out, with the whole logical batch's gradient.

    python examples/train_flow_style.py --config config.json --output runs/flow
"""

from __future__ import annotations

import sys

from samegrad.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "flow_style", *sys.argv[1:]]))
