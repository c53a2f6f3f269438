#!/bin/bash
# bindfs 1.14.7 with --enable-lock-forwarding grants one exclusive lock to two open files.
#
# Two descriptions of one file ask for a write lock on all of it by F_OFD_SETLK. fcntl(2) promises that
# OFD locks of different open file descriptions conflict. Here both are granted, at the same time, while
# F_OFD_GETLK tells each of the other's lock. After the first one is closed, the second still hears of a
# lock: closing does not give it back.
#
# Why: bindfs is one process, and forwards each request as a lock of its own process, on the file that
# it opened. Without the option the kernel keeps the locks, and keeps them right.
#
# What to do: ask F_OFD_GETLK as well after F_OFD_SETLK, and unlock before closing.

. "$(dirname "$0")/lib.sh"
need bindfs=1.14.7-1 libfuse3-3=3.14.0-4

cat > "$temp/locks.py" << 'EOF'
import fcntl, struct, sys
F_OFD_GETLK, F_OFD_SETLK = 36, 37
FORMAT = "hhqqi4x"

def lock():
    return struct.pack(FORMAT, fcntl.F_WRLCK, 0, 0, 0, 0)

def take(file):
    try:
        fcntl.fcntl(file, F_OFD_SETLK, lock())
        return "granted"
    except BlockingIOError:
        return "refused"

def told(file):
    kind = struct.unpack(FORMAT, fcntl.fcntl(file, F_OFD_GETLK, lock()))[0]
    return "free" if kind == fcntl.F_UNLCK else "held by another"

open(sys.argv[1], "w").close()
first, second = open(sys.argv[1], "r+"), open(sys.argv[1], "r+")
seen = [take(first), take(second), told(second)]
first.close()
seen.append(told(second))
print(", ".join(seen))
EOF

for option in --enable-lock-forwarding --no-allow-other; do
    mkdir -p "$temp/below"
    unmount_later "$temp/mount$option"
    bindfs --multithreaded $option "$temp/below" "$temp/mount$option"
done
expect "with lock forwarding" "$(python3 "$temp/locks.py" "$temp/mount--enable-lock-forwarding/a")" \
    "granted, granted, held by another, held by another"
expect "without" "$(python3 "$temp/locks.py" "$temp/mount--no-allow-other/b")" \
    "granted, refused, held by another, free"
