#!/usr/bin/env bash
# Measure vlmbuild on one GPU in at most ten minutes, without a network.
#
#   bash tests/gpu/measure.sh OUT [PART ...]         run all parts, or these; write OUT/PART.json and OUT/summary.md
#   bash tests/gpu/measure.sh --rehearse OUT [PART ...]   the same on tiny sizes without a GPU
#   bash tests/gpu/measure.sh --wheels [DIR]         list the wheels to bring along, or download them into DIR
#   bash tests/gpu/measure.sh --compile CACHE        compile the kernels for sm_90 without a GPU
#
# Environment: WHEELS=DIR with wheels or unpacked packages that the machine lacks, TRITON_CACHE_DIR=CACHE from --compile,
# PYTHON (default python3).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
[ $# -gt 0 ] || { sed -n '2,11p' "${BASH_SOURCE[0]}" | cut -c3-; exit 2; }
if [ "$1" = --wheels ]; then
    exec "$python" "$root/tests/gpu/measure/wheels.py" "${@:2}"
fi
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
path=$root:$root/tests/helpers
if [ -n "${WHEELS:-}" ]; then
    for wheel in "$WHEELS"/*.whl; do
        [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$site"
    done
    path=$path:$(cd "$WHEELS" && pwd)
fi
# Packages in $site go first: they replace older ones of the machine. vlmbuild itself needs passes/ and targets/ inside.
if ! (cd "$site" && "$python" -c "import importlib.util as u; raise SystemExit(u.find_spec('vlmbuild.passes') is None)") 2>/dev/null; then
    mkdir -p "$site/vlmbuild" "$site/vlmbuild-0.dist-info"
    ln -s "$root"/vlmbuild/* "$root/passes" "$root/targets" "$site/vlmbuild/"
    printf 'Metadata-Version: 2.1\nName: vlmbuild\nVersion: 0\n' >"$site/vlmbuild-0.dist-info/METADATA"
fi
case $1 in
    --rehearse) export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 ;;
    --compile) unset TRITON_INTERPRET ;;
esac
export PYTHONSAFEPATH=1 PYTHONPATH=$site:$path${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" -W ignore -m tests.gpu.measure "$@"
