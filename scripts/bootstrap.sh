#!/usr/bin/env bash
# Installs what a step of the project needs and this machine lacks, so that
# `make demo` and `make test` work on a bare Debian 12 that has a Rust
# toolchain and nothing else.
#
#   scripts/bootstrap.sh build   a C and C++ compiler, make, cmake, pkg-config
#   scripts/bootstrap.sh demo    the same: the demo itself needs nothing else
#   scripts/bootstrap.sh test    also ffmpeg, GStreamer, VLC, Chromium, Node and
#                                the packages of tests/players (hls.js, Shaka
#                                Player, video.js, Shaka Packager) and tests/edge
#                                (miniflare, the Fastly CLI, falco), openssl, curl,
#                                PostgreSQL, nginx, varnish, Python and the
#                                packages of tests/tools (the default)
#
# Why this shape: it asks for commands, not for packages, so a compiler or a
# Node from elsewhere is as good as Debian's, and a machine that has everything
# gets no apt call, no network access and no output. What it does install, it
# names, one line each; the installers' own output is shown only when they fail.
#
# PostgreSQL, nginx and varnish are wanted as programs, which the tests start themselves:
# installing them here makes no database cluster and starts no service, now or at
# the next boot.
#
# Deliberately absent: the Rust toolchain (a condition, not a part of this),
# package sources other than those the machine is set to, and removal of
# anything.

set -euo pipefail

readonly MIN_NODE_MAJOR=18
readonly MIN_PYTHON=3.10
readonly LOCK_TIMEOUT_SECS=300
readonly LOCK_RETRY_SECS=5
readonly FAILURE_LINES=20

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
readonly node_dirs=("$root/tests/players" "$root/tests/edge")
readonly tools_dir=$root/tests/tools
readonly venv=$tools_dir/.venv
# Likewise, of the requirements that the venv was made from.
readonly venv_stamp=$venv/.bootstrap-requirements.txt

# What Debian asks before it starts a service, and before it makes a cluster.
readonly policy=/usr/sbin/policy-rc.d
readonly no_cluster=/etc/postgresql-common/createcluster.d/keyshield-bootstrap.conf
# Files outside the project that stand only while packages are being installed.
written=()
as_root=()

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
    trap clean_up EXIT

    packages=()
    want_build_tools
    if [[ $target == test ]]; then
        want_test_tools
    fi
    install_packages

    if [[ $target == test ]]; then
        check_node
        for dir in "${node_dirs[@]}"; do
            install_node_packages "$dir"
        done
        check_python
        install_python_packages
    fi
}

clean_up() {
    rm -f -- "$log"
    if ((${#written[@]})); then
        "${as_root[@]}" rm -f -- "${written[@]}"
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
    want_gstreamer
    want_vlc
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
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || packages+=(postgresql)
    # Not in the PATH of everybody.
    [[ -x /usr/sbin/nginx ]] || want nginx nginx
    [[ -x /usr/sbin/varnishd ]] || want varnish varnishd
    python_serves || packages+=(python3 python3-venv)
}

# What is asked for is plugins, which only GStreamer itself can name. A tool that
# finds no plugin of a name, or is not there, says so by its exit code alone.
want_gstreamer() {
    want gstreamer1.0-tools gst-launch-1.0 gst-inspect-1.0
    want_plugins gstreamer1.0-plugins-base playbin3 audioconvert
    want_plugins gstreamer1.0-plugins-good hlsdemux2 souphttpsrc qtdemux
    want_plugins gstreamer1.0-plugins-bad tsdemux h264parse aacparse
    want_plugins gstreamer1.0-libav avdec_h264 avdec_aac avdec_ac3
}

want_plugins() {
    local package=$1 name
    shift
    for name in "$@"; do
        if ! gst-inspect-1.0 --exists "$name" 2>/dev/null; then
            packages+=("$package")
            return
        fi
    done
}

# The program alone plays nothing: HLS and the decoders are plugins too.
want_vlc() {
    want vlc-bin cvlc
    compgen -G '/usr/lib*/*/vlc/plugins/demux/libadaptive_plugin.so' >/dev/null ||
        compgen -G '/usr/lib/vlc/plugins/demux/libadaptive_plugin.so' >/dev/null ||
        packages+=(vlc-plugin-base)
}

# New enough, and able to make a venv with pip in it.
python_serves() {
    python3 -c '
import ensurepip, sys, venv
sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))
' "$MIN_PYTHON" 2>/dev/null
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
    hold_services
    run_apt "${apt[@]}" install --no-install-recommends "${packages[@]}"
    release_services
    hash -r
}

# Whoever has a policy of their own keeps it.
hold_services() {
    if [[ " ${packages[*]} " == *" postgresql "* ]]; then
        write_for_now "$no_cluster" 644 'create_main_cluster = false'
    fi
    if [[ " ${packages[*]} " =~ \ (postgresql|nginx|varnish)\  && ! -e $policy ]]; then
        write_for_now "$policy" 755 '#!/bin/sh' '# scripts/bootstrap.sh is installing: services stay as they are.' 'exit 101'
    fi
}

release_services() {
    if ((${#written[@]})); then
        "${as_root[@]}" rm -f -- "${written[@]}"
        written=()
    fi
    local service
    for service in nginx varnish; do
        [[ " ${packages[*]} " == *" $service "* ]] || continue
        # It would listen from the next boot on.
        local disable=(update-rc.d "$service" disable)
        ! command -v systemctl >/dev/null || disable=(systemctl disable "$service.service")
        run_quietly "${as_root[@]}" "${disable[@]}" || fail_with_log "this command failed: ${disable[*]}"
    done
}

# write_for_now FILE MODE LINE... : a file that goes when the packages are there, or when this script ends.
write_for_now() {
    local file=$1 mode=$2
    shift 2
    "${as_root[@]}" mkdir -p -- "${file%/*}"
    written+=("$file")
    printf '%s\n' "$@" | "${as_root[@]}" tee -- "$file" >/dev/null
    "${as_root[@]}" chmod "$mode" -- "$file"
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
    local dir=$1
    local lock=$dir/package-lock.json
    # A copy of the lock file that node_modules was installed from. Contents, not
    # times, are compared: a checkout or an image layer may set any time it likes.
    local stamp=$dir/node_modules/.bootstrap-lock.json
    [[ -e $lock ]] || die "$lock is missing"
    if cmp -s -- "$lock" "$stamp"; then
        return
    fi
    echo "bootstrap: installing the Node packages of ${dir#"$root"/}"
    # No package needs a script at its installation; none is given the chance.
    run_quietly npm ci --prefix "$dir" --ignore-scripts --no-audit --no-fund ||
        fail_with_log "npm ci failed in $dir"
    cp -- "$lock" "$stamp"
}

check_python() {
    python_serves ||
        die "$(command -v python3 || echo python3) is older than $MIN_PYTHON or has no venv, which the tests of the API need"
}

install_python_packages() {
    local requirements=$tools_dir/requirements.txt
    [[ -e $requirements ]] || die "$requirements is missing"
    if cmp -s -- "$requirements" "$venv_stamp"; then
        return
    fi
    echo "bootstrap: installing the Python packages of tests/tools"
    run_quietly python3 -m venv --clear "$venv" || fail_with_log "no venv could be made in $venv"
    # Wheels only: nothing of a package runs at its installation.
    run_quietly "$venv/bin/pip" install --disable-pip-version-check --only-binary :all: -r "$requirements" ||
        fail_with_log "pip install failed in $venv"
    cp -- "$requirements" "$venv_stamp"
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
