#!/usr/bin/env bash
# Installs what a step of the project needs and this machine lacks, so that
# `make demo` and `make test` work on a bare Debian 12 that has a Rust
# toolchain and nothing else.
#
#   scripts/bootstrap.sh build   a C and C++ compiler, make, cmake, pkg-config
#   scripts/bootstrap.sh demo    the same: the demo itself needs nothing else
#   scripts/bootstrap.sh test    also ffmpeg, openssl, curl, Chromium, Node and
#                                the packages of tests/players (the default)
#
# Why this shape: it asks for commands, not for packages, so a compiler or a
# Node from elsewhere is as good as Debian's, and a machine that has everything
# gets no apt call, no network access and no output. What it does install, it
# names, one line each; the installers' own output is shown only when they fail.
#
# Deliberately absent: the Rust toolchain (a condition, not a part of this),
# package sources other than those the machine is set to, and removal of
# anything.

set -euo pipefail

readonly MIN_NODE_MAJOR=18
readonly LOCK_TIMEOUT_SECS=300
readonly LOCK_RETRY_SECS=5
readonly FAILURE_LINES=20

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
readonly players_dir=$root/tests/players
# A copy of the lock file that node_modules was installed from. Contents, not
# times, are compared: a checkout or an image layer may set any time it likes.
readonly stamp=$players_dir/node_modules/.bootstrap-lock.json

main() {
    local target=${1:-test}
    if (($# > 1)) || [[ ! $target =~ ^(build|demo|test)$ ]]; then
        echo "usage: scripts/bootstrap.sh [build|demo|test]" >&2
        exit 2
    fi

    # Two of these at once (a demo and a test, say) take turns, where there is
    # flock to see to it: Debian always has it, other systems may not.
    exec 9<"$root"
    if command -v flock >/dev/null; then
        flock -w "$LOCK_TIMEOUT_SECS" 9 || die "another bootstrap.sh has not finished for $LOCK_TIMEOUT_SECS s"
    fi

    log=$(mktemp)
    trap 'rm -f -- "$log"' EXIT

    packages=()
    want_build_tools
    if [[ $target == test ]]; then
        want_test_tools
    fi
    install_packages

    if [[ $target == test ]]; then
        check_node
        install_node_packages
    fi
}

want_build_tools() {
    want gcc cc gcc
    want g++ c++ g++
    want make make
    want cmake cmake
    want pkg-config pkg-config
}

want_test_tools() {
    want ffmpeg ffmpeg ffprobe
    want openssl openssl
    want curl curl
    [[ -e /etc/ssl/certs/ca-certificates.crt ]] || packages+=(ca-certificates)
    if [[ -n ${CHROMIUM:-} ]]; then
        [[ -x $CHROMIUM ]] || die "CHROMIUM is set to $CHROMIUM, which is not an executable"
    elif [[ ! -x /usr/bin/chromium ]]; then
        packages+=(chromium)
    fi
    if ((MIN_NODE_MAJOR > $(node_major))); then
        packages+=(nodejs npm)
    else
        want npm npm
    fi
}

# want PACKAGE COMMAND... : the package is needed unless every command is there.
want() {
    local package=$1 name
    shift
    for name in "$@"; do
        if ! command -v "$name" >/dev/null; then
            packages+=("$package")
            return
        fi
    done
}

# 0 when there is no node, or one that does not start.
node_major() {
    local version
    version=$(node --version 2>/dev/null) || version=v0
    version=${version#v}
    echo "${version%%.*}"
}

install_packages() {
    ((${#packages[@]})) || return 0

    local as_root=()
    command -v apt-get >/dev/null || die "missing: ${packages[*]}; there is no apt-get here, please install them by hand"
    if ((EUID != 0)); then
        command -v sudo >/dev/null || die "missing: ${packages[*]}; installing them takes root or sudo, and this is neither"
        as_root=(sudo)
    fi
    local apt=(
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive LC_ALL=C
        apt-get -q -y -o "DPkg::Lock::Timeout=$LOCK_TIMEOUT_SECS" -o Acquire::Retries=3
    )

    printf 'bootstrap: installing %s\n' "${packages[@]}"
    run_apt "${apt[@]}" update
    run_apt "${apt[@]}" install --no-install-recommends "${packages[@]}"
    hash -r
}

# apt-get waits for dpkg's lock by itself, but for that of the package lists
# (taken by `update`) it has no option, so waiting for it is done here.
run_apt() {
    local deadline=$((SECONDS + LOCK_TIMEOUT_SECS))
    until run_quietly "$@"; do
        if ! grep -q 'Could not get lock' "$log" || ((SECONDS >= deadline)); then
            fail_with_log "this command failed: $*"
        fi
        sleep "$LOCK_RETRY_SECS"
    done
}

# A node that comes earlier in PATH than Debian's may still be the old one.
check_node() {
    if ((MIN_NODE_MAJOR > $(node_major))); then
        die "$(command -v node || echo node) is older than version $MIN_NODE_MAJOR, which the player tests need"
    fi
}

install_node_packages() {
    local lock=$players_dir/package-lock.json
    [[ -e $lock ]] || die "$lock is missing"
    if cmp -s -- "$lock" "$stamp"; then
        return
    fi
    echo "bootstrap: installing the Node packages of tests/players"
    # Neither package runs a script at installation; none is given the chance.
    run_quietly npm ci --prefix "$players_dir" --ignore-scripts --no-audit --no-fund ||
        fail_with_log "npm ci failed in $players_dir"
    cp -- "$lock" "$stamp"
}

# Runs with the output in $log, and without the lock of main: a service that a
# package starts would otherwise hold it for as long as it lives.
run_quietly() {
    "$@" >"$log" 2>&1 </dev/null 9<&-
}

fail_with_log() {
    tail -n "$FAILURE_LINES" -- "$log" >&2
    die "$1"
}

die() {
    echo "bootstrap: $1" >&2
    exit 1
}

main "$@"
