#!/bin/sh
# Checks for the system packages behind its arguments: `tools/system.sh venv opencv chromium dciodvfy dcmtk gdcm orthanc`.
# As root on Debian or Ubuntu it installs missing ones; otherwise it names them with the command
# that installs them. It prints nothing if none is missing.
set -eu
# On Debian, an ordinary user's PATH lacks the folders of ldconfig.
PATH="$PATH:/usr/sbin:/sbin"

has_library() { ldconfig -p 2>/dev/null | grep -q "$1"; }

missing=""
for need in "$@"; do
  case "$need" in
    venv) "${PYTHON:-python3}" -c "import ensurepip, venv" 2>/dev/null || missing="$missing python3-venv" ;;
    opencv)
      has_library libGL.so.1 || missing="$missing libgl1"
      has_library libgthread-2.0.so.0 || missing="$missing libglib2.0-0"
      ;;
    chromium) command -v chromium >/dev/null 2>&1 || missing="$missing chromium" ;;
    dciodvfy) command -v dciodvfy >/dev/null 2>&1 || missing="$missing dicom3tools" ;;
    dcmtk) command -v dcmj2pnm >/dev/null 2>&1 || command -v dcm2img >/dev/null 2>&1 || missing="$missing dcmtk" ;;
    gdcm) command -v gdcmconv >/dev/null 2>&1 || missing="$missing libgdcm-tools" ;;
    orthanc) [ -x /usr/sbin/Orthanc ] || missing="$missing orthanc" ;;
    *)
      echo "tools/system.sh knows venv, opencv, chromium, dciodvfy, dcmtk, gdcm and orthanc, not $need." >&2
      exit 2
      ;;
  esac
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "Installing$missing (Debian packages) …"
  log=$(mktemp)
  # shellcheck disable=SC2086  # a list of packages
  if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } \
    >"$log" 2>&1 </dev/null; then
    rm -f "$log"
    exit 0
  fi
  tail -n 5 "$log" >&2
  echo "The system packages$missing could not be installed; the end of apt-get's output is above, all of it in $log." >&2
  exit 1
fi
echo "Missing system packages:$missing. Install them, on Debian with: sudo apt-get install$missing" >&2
exit 1
