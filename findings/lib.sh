# What the findings share. Sourced, not run.
#
# need PACKAGE=VERSION...   unpacks Debian packages, of Debian 12 if nothing else is said, in $temp
# unmount_later FOLDER      and the folder is unmounted at the end, come what may
# expect NAME SEEN WANTED   fails, and says so, where the behaviour has changed
# from answers import answer, in Python below $temp: what a call does, "done" or the name of its error
#
# Everything is below $temp, which goes at the end.

set -eu
[ "$(id -u)" = 0 ] || { echo "mounting needs root" >&2; exit 2; }
temp=$(mktemp -d)
mounts=()

cleanup() {
    local folder
    for folder in "${mounts[@]}"; do
        for _ in 1 2 3 4 5; do
            mountpoint -q "$folder" || break
            umount "$folder" 2> /dev/null || sleep 1
        done
        ! mountpoint -q "$folder" || umount --lazy "$folder"
    done
    rm -rf "$temp"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

cat > "$temp/answers.py" << 'EOF'
import errno

def answer(act, *words):
    try:
        act(*words)
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
EOF

need() {
    mkdir -p "$temp/packages" "$temp/root"
    # The one who downloads may be another user.
    chmod 755 "$temp"
    chmod 777 "$temp/packages"
    (cd "$temp/packages" && apt-get download "$@" > "$temp/log" 2>&1) || { cat "$temp/log" >&2; exit 2; }
    local package library
    for package in "$temp"/packages/*.deb; do
        dpkg-deb -x "$package" "$temp/root"
    done
    export PATH="$temp/root/usr/bin:$temp/root/usr/sbin:$temp/root/bin:$temp/root/sbin:$PATH"
    library=$(dpkg-architecture -q DEB_HOST_MULTIARCH 2> /dev/null || echo "$(uname -m)-linux-gnu")
    export LD_LIBRARY_PATH="$temp/root/usr/lib/$library:$temp/root/lib/$library"
}

unmount_later() {
    mkdir -p "$1"
    mounts+=("$1")
}

expect() {
    printf '%s: %s\n' "$1" "$2"
    [ "$2" = "$3" ] || { printf 'that has changed; it was: %s\n' "$3" >&2; exit 1; }
}
