r"""Few-shot training as the document calls it: the same command line, on the recipe ``fewshot_cosine``.

    python examples/train_test.py --method FSCT_cosine --dataset miniImagenet --data_root FOLDER \
        --backbone ResNet34 --n_way 5 --k_shot 5 --lambda_I 1.0 --lambda_V 0.5 --lambda_C 0.1

Every option of ``samegrad run fewshot_cosine``; without a data set, on letters that matplotlib's fonts bring.
"""

from __future__ import annotations

import sys

from samegrad.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", "fewshot_cosine", *sys.argv[1:]]))
