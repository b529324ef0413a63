#!/usr/bin/env bash
# Prepares one Debian or Ubuntu machine: apt packages, a virtual environment in .venv, and the project in it.
# Skips what is already there. Needs root (or sudo without a password) only when an apt package is missing.
#   cluster/setup.sh          what users need
#   cluster/setup.sh s3       and an extra of pyproject.toml, or several: s3,onnx
#   cluster/setup.sh dev      and what the tests need
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
python=${PYTHON:-python3}
venv=.venv
stamp=$venv/.coe-dist-setup-$(cat pyproject.toml cluster/setup.sh | sha256sum | cut -c1-16)-${extra:-user}
[ -f "$stamp" ] && exit 0

say() { printf '[setup] %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 2; }

# FFCV compiles against OpenCV's imgproc and libturbojpeg. The full libopencv-dev is 689 MB; these two are 49 MB.
packages=(g++ make pkg-config libopencv-imgproc-dev libturbojpeg0-dev libgl1 libglib2.0-0 libgomp1 dataset-fashion-mnist iproute2)
[ "$python" = python3 ] && case "$(command -v python3)" in /usr/bin/*) packages+=(python3-venv python3-dev) ;; esac
# Tests look at the report in a real browser (306 MB); any of these will do, or one that CHROMIUM names.
if [ "$extra" = dev ] && ! command -v "${CHROMIUM:-chromium}" chromium-headless-shell chromium google-chrome >/dev/null; then
    packages+=(chromium-headless-shell)
fi
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' && continue
    # Ubuntu 24.04 and Debian 13 ship this library under a newer name
    dpkg-query -W -f='${Status}' "${package}t64" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || die "this machine has no apt-get; install the equivalents of: ${missing[*]}"
    if [ "$(id -u)" = 0 ]; then root=(env)
    elif sudo -n true 2>/dev/null; then root=(sudo)
    else die "these packages are missing and need root: sudo apt-get install --no-install-recommends ${missing[*]}"
    fi
    say "apt: ${missing[*]}"
    "${root[@]}" apt-get update -qq
    "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        die "apt could not install: ${missing[*]}"
fi

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
    die "PYTHON: $("$python" --version) is not supported; set PYTHON to a Python from 3.11 to 3.13"
[ -x $venv/bin/python ] || "$python" -m venv $venv

# FFCV's setup asks pkg-config for `opencv4` and includes the umbrella header; the slim packages have neither.
shim=$PWD/$venv/opencv-shim
mkdir -p "$shim/include/opencv2"
printf '#pragma once\n#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' > "$shim/include/opencv2/opencv.hpp"
cat > "$shim/opencv4.pc" <<PC
Name: opencv4
Description: the two OpenCV libraries that FFCV uses
Version: 4
Libs: -lopencv_imgproc -lopencv_core
Cflags: -I$shim/include -I/usr/include/opencv4
PC
export PKG_CONFIG_PATH=$shim${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}

say "python packages (several minutes the first time)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)
# torch first: its exact build is what everything after it must resolve against
"${pip[@]}" install "torch>=2.11,<2.15" "torchvision>=0.26,<0.30"
"${pip[@]}" install -e ".${extra:+[$extra]}"
touch "$stamp"
say "done"
