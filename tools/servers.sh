#!/usr/bin/env bash
# Installs the servers that tests/cluster runs on, as root from Debian's packages: a Slurm and an sshd.
# The tests start and end them; this starts nothing, and does nothing where they are.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge openssh-server openssh-client iproute2)

if dpkg -s "${packages[@]}" > /dev/null 2>&1; then exit 0; fi
policy=/usr/sbin/policy-rc.d # as Debian asks whether what it installs may start
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
timeout 60 apt-get -qq update
timeout 120 apt-get -qq install --no-install-recommends "${packages[@]}" > /dev/null
