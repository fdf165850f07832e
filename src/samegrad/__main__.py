"""``python -m samegrad``: the command line."""

import sys

from samegrad.cli.main import main

sys.exit(main())
