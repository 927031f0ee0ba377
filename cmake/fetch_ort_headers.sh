#!/usr/bin/env bash
# fetch_ort_headers.sh DEST: unpacks Debian trixie's libonnxruntime-dev into DEST. The mirror is the machine's own; nothing is
# installed and apt's own lists stay as they are, so no root is needed.
set -euo pipefail
dest=${1:?usage: fetch_ort_headers.sh DEST}
mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' | grep -v -e security -e updates | awk '/debian/ {print $1; exit}')
[ -n "$mirror" ] || { echo "no Debian mirror among apt's sources" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state/lists/partial,cache/archives/partial,etc}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" > "$work/etc/sources.list"
options=(-qq -o "Dir::Etc::sourcelist=$work/etc/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State=$work/state"
  -o "Dir::Cache=$work/cache" -o APT::Get::List-Cleanup=0 -o Acquire::Languages=none -o "APT::Sandbox::User=$(id -un)")
apt-get "${options[@]}" update
(cd "$work" && apt-get "${options[@]}" download libonnxruntime-dev)
mkdir -p "$dest"
dpkg-deb -x "$work"/libonnxruntime-dev_*.deb "$dest"
