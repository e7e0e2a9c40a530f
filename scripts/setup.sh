#!/usr/bin/env bash
# Makes .venv with hyperlearn (editable) and everything that `make` uses; safe to run again.
#
# PYTHON=...           the interpreter to use instead of the first one >= 3.11 that is found
# TORCH_INDEX_URL=...  one more package index, for a PyTorch built for another device
# CHOLMOD=no           leave sparse Cholesky out, and install no system package
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
log=$venv/setup.log
unset PYTHONPATH PYTHONHOME

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}
recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Runs a command with its output in the log.
logged() {
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1
}

# Runs a command with administrator's rights if that needs no password.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# Installs Debian packages, where there is apt-get and the user may.
apt_install() {
    command -v apt-get >/dev/null && as_root true || return 1
    mkdir -p $venv
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y
        -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2)
    logged as_root "${apt[@]}" update && logged as_root "${apt[@]}" install --no-install-recommends "$@"
}

# --- Python ---------------------------------------------------------------------------------------
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13 python3.14 python; do
        if [ -n "$candidate" ] && recent_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

if ! { recent_enough $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python) || die "Python 3.11 or newer is needed and none was found (set PYTHON=...)."
    say "making $venv with $("$python" --version)"
    if ! "$python" -m venv --clear $venv >/dev/null 2>&1; then
        # Debian and Ubuntu keep what makes a virtual environment in a package of its own.
        package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
        say "installing $package"
        { apt_install "$package" && "$python" -m venv --clear $venv; } || die \
            "$python could not make a virtual environment." \
            "On Debian and Ubuntu the missing part is: apt-get install $package"
    fi
fi
: >$log

pip_install() {
    # --no-build-isolation: what is built here is built with the pinned tools, against the pinned NumPy.
    logged $venv/bin/python -m pip install --disable-pip-version-check --no-build-isolation \
        --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$@"
}

started=$SECONDS
say "installing hyperlearn and its tools (the first time, minutes; log: $log)"
if ! { pip_install hatchling editables && pip_install --editable '.[test,lint,docs,bench]'; }; then
    tail -n 25 $log >&2
    die "could not install hyperlearn; the whole story is in $log"
fi
say "installed in $((SECONDS - started)) s"

# --- CHOLMOD, optional ----------------------------------------------------------------------------
# Nothing below may fail the set-up: without CHOLMOD the library works and says what it lacks.

# Whether the C compiler finds every header named.
compiles_with() {
    local header python_include
    python_include=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    for header in "$@"; do
        printf '#include <%s>\n' "$header"
    done | cc -E -x c -I/usr/include/suitesparse ${SUITESPARSE_INCLUDE_DIR:+-I"$SUITESPARSE_INCLUDE_DIR"} \
        -I"$python_include" - >/dev/null 2>&1
}

# Prints the Debian packages that a build of scikit-sparse still lacks.
missing_packages() {
    if ! command -v cc >/dev/null || ! compiles_with stdlib.h; then
        echo gcc libc6-dev
        [ -e /usr/include/suitesparse/cholmod.h ] || echo libsuitesparse-dev libopenblas0-pthread
        python_header_package
        return
    fi
    # OpenBLAS is asked for by name: Debian's default, the reference BLAS, makes CHOLMOD several times slower.
    compiles_with cholmod.h || echo libsuitesparse-dev libopenblas0-pthread
    compiles_with Python.h || python_header_package
}
python_header_package() {
    $venv/bin/python -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])'
}

has_cholmod() { $venv/bin/python -c 'from sksparse import cholmod' >/dev/null 2>&1; }

# Tries to install CHOLMOD; on failure leaves the reason in $reason.
install_cholmod() {
    local missing
    missing=$(missing_packages | tr '\n' ' ')
    missing=${missing% }
    if [ -n "$missing" ]; then
        reason="these system packages are missing: $missing"
        command -v apt-get >/dev/null || return 1
        as_root true || return 1
        say "installing system packages for sparse Cholesky: $missing"
        reason="apt-get could not install: $missing"
        # shellcheck disable=SC2086  # a list of package names
        apt_install $missing || return 1
    fi
    say "building scikit-sparse"
    reason="scikit-sparse did not build"
    pip_install setuptools wheel Cython || return 1
    pip_install --editable '.[cholmod]' || return 1
    reason="scikit-sparse was built but cannot be imported"
    has_cholmod
}

if [ "${CHOLMOD:-yes}" = no ]; then
    say "sparse Cholesky (CHOLMOD) left out, as asked"
elif has_cholmod; then
    say "sparse Cholesky (CHOLMOD) is there"
elif install_cholmod; then
    say "sparse Cholesky (CHOLMOD) installed"
else
    say "going on WITHOUT CHOLMOD: $reason (details: $log)"
    say "  what is lost: sparse Cholesky factorisations. No solver that is there today needs them; the"
    say "  sparse direct solver that is to come does, and will fall back on SciPy's slower SuperLU."
    say "  to get it later, as an administrator on Debian or Ubuntu:"
    say "      apt-get install gcc libsuitesparse-dev libopenblas0-pthread $(python_header_package)"
    say "  and then, here: scripts/setup.sh"
fi
say "done in $SECONDS s"
