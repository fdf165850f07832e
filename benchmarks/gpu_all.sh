#!/usr/bin/env bash
# Everything that needs one GPU, in one call: the gpu tests, then the figures. Results go to $OUT or benchmarks/results.
set -uo pipefail
export PYTHONPATH="src:${PYTHONPATH:-}"
python3 -m pytest -q -m gpu -o addopts="" -p no:cacheprovider tests/gpu tests/data tests/store
tests=$?
python3 benchmarks/contract_gpu.py || tests=1
python3 benchmarks/autoencoder_gpu.py "$@"
python3 benchmarks/keyed_dropout.py
python3 benchmarks/calibrate_gpu.py
exit $tests
