# shellcheck shell=bash
# Debian packages, for the scripts that source this: tests/setup, .ci/run, examples/two-roles/run. Each defines `say` and
# `die` (a message, and a message that ends it), and asks by what a package brings, so that docker-ce, or a dockerd that
# somebody built, will do as well:
#
#     find_missing() { missing=(); need_engine; need curl has curl; }
#     install_missing find_missing

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # not in every user's PATH, and dockerd, nft and iptables live there

missing=()

as_root() { if [[ $EUID -eq 0 ]]; then "$@"; else sudo "$@"; fi; }
has() { command -v "$1"; }
statically_linked() { [[ -x /bin/busybox ]] && ! ldd /bin/busybox; }

# The mirror that this machine installs from; empty if none is configured.
debian_mirror() {
    { cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true; } |
        awk '/^URIs:/ { print $2; exit } /^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^http/) { print $i; exit } }'
}

need() { # PACKAGE TEST...: PACKAGE is missing if TEST fails
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}

# What a dockerd of one's own takes, and an image for it where there is no registry.
need_engine() {
    need docker.io has dockerd
    need iptables has iptables
    need iproute2 has ip
    need busybox-static statically_linked
    # Debian 13 took the client out of docker.io.
    if has dockerd >/dev/null; then need docker-cli has docker; fi
}

# For the C parts of the TLS stack: a C compiler is all they want on Linux (no cmake, perl, go or clang).
need_compiler() {
    need gcc has cc
    need libc6-dev test -e /usr/include/stdlib.h
    need ca-certificates test -s /etc/ssl/certs/ca-certificates.crt
}

# A package's own dockerd must not start: it would rewrite the firewall of this machine, and nothing here needs it.
policy=/usr/sbin/policy-rc.d
kept_policy=$policy.kept-by-imds-router

forbid_services() {
    if [[ -e $policy && ! -e $kept_policy ]]; then as_root mv "$policy" "$kept_policy"; fi
    printf '#!/bin/sh\n# Temporary, by tests/packages.sh of imds-router.\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
}

allow_services() {
    as_root rm -f "$policy"
    if [[ -e $kept_policy ]]; then as_root mv "$kept_policy" "$policy"; fi
}

# In a shell of its own, since the trap is: whatever ends it, services may start again. What apt says is of interest only
# when it fails.
apt_install() (
    trap allow_services EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    forbid_services
    said=$(as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" 2>&1) ||
        { echo "$said" >&2; die "apt-get install $* failed; the reason is above"; }
)

install_missing() { # FIND: a function that fills `missing`
    local find=$1
    "$find"
    if ((${#missing[@]} == 0)); then return; fi
    has apt-get >/dev/null || die "this is not Debian; install by hand what these packages bring: ${missing[*]}"
    if ((EUID != 0)) && ! has sudo >/dev/null; then
        die "these packages are missing: ${missing[*]}; install them, or run this as root (there is no sudo)"
    fi
    say "installing ${missing[*]}"
    as_root apt-get -qq update
    apt_install "${missing[@]}"
    "$find" # the client, on Debian 13
    if ((${#missing[@]})); then apt_install "${missing[@]}"; fi
    "$find"
    ((${#missing[@]} == 0)) || die "still missing after installing them: ${missing[*]}"
}
