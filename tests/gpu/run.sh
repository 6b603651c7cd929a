#!/usr/bin/env bash
# What only a GPU can show, in stages that can be repeated; see README.md and run.py, which this starts. Needs a CUDA driver,
# the toolkit's cublasLt and Python 3, and the folder `make gpu-bundle` makes; no network, no distribution packages.
chmod +x "$(dirname "$0")"/bin/* 2>/dev/null  # some ways of carrying a folder lose this
exec env PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 python3 "$(dirname "$0")/run.py" "$@"
