#!/usr/bin/env bash
# Compiles one kernel file and keeps what ptxas says about it (registers, shared memory, spills) beside the object.
# Usage: nvcc.sh SOURCE OBJECT DEPFILE COMMAND...   COMMAND is nvcc with its flags, perhaps behind ccache.
set -uo pipefail
source=$1 object=$2 depfile=$3
shift 3
"$@" -Xptxas -v -MD -MF "$depfile" -c "$source" -o "$object" >"$object.log" 2>&1
status=$?
# ptxas's own lines are the report; anything else is a warning or an error, and both stop the build.
grep -E "^ptxas info|bytes stack frame" "$object.log" >"$object.ptxas"
grep -vE "^ptxas info|bytes stack frame" "$object.log" >&2
exit $status
