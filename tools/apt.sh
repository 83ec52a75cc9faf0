#!/bin/sh
# Install Debian packages that are missing: tools/apt.sh PACKAGE...
# Ends with 1 and says what to do where it cannot.
set -eu

missing=""
for package in "$@"; do
    if ! dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed; then
        missing="$missing $package"
    fi
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "not a Debian system; install what corresponds to:$missing" >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif command -v sudo >/dev/null; then
    as_root="sudo"
else
    echo "neither root nor sudo; ask for: apt-get install$missing" >&2
    exit 1
fi
echo "installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # both are lists
{
    $as_root apt-get update --quiet=2
    $as_root apt-get install --yes --quiet=2 --no-install-recommends $missing
} >&2
