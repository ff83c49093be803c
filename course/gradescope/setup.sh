#!/usr/bin/env bash
# Run once by Gradescope, as root, when the image is built. The system's python stays as it is.
set -euo pipefail
apt-get update
apt-get install -y --no-install-recommends python3 python3-venv
/usr/bin/python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --no-cache-dir {torch} --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install --no-cache-dir {others}
