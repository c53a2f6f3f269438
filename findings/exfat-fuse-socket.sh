#!/bin/bash
# exfat-fuse 1.3.0 makes a plain file where a socket is asked for, and then the call fails.
#
# exFAT has no sockets. A bind(2) of a Unix socket there fails with EIO, where EPERM or EOPNOTSUPP would
# tell of a thing that is missing, and an empty regular file stays under the socket's name: mknod(2) of
# S_IFSOCK made it without looking at the kind, and the kernel found something else than it had asked for.
# The next bind of that name fails with EADDRINUSE. A fifo goes the same way.
#
# What to do: take EIO of a bind for "no sockets here", and remove the name after it.

. "$(dirname "$0")/lib.sh"
need exfat-fuse=1.3.0+git20220115-2 exfatprogs=1.2.0-1+deb12u1 libfuse2=2.9.9-6+b1

truncate -s 32M "$temp/exfat"
mkfs.exfat "$temp/exfat" > /dev/null
device=$(losetup --find --show "$temp/exfat")
trap 'cleanup; losetup --detach "$device"' EXIT
unmount_later "$temp/mount"
mount.exfat-fuse "$device" "$temp/mount" > /dev/null

cat > "$temp/sockets.py" << 'EOF'
import os, socket, stat, sys
from answers import answer
os.chdir(sys.argv[1])

def left(name):
    if not os.path.lexists(name):
        return "nothing"
    return "a regular file" if stat.S_ISREG(os.lstat(name).st_mode) else "something else"

def bind():
    socket.socket(socket.AF_UNIX).bind("socket")

print(f"bind {answer(bind)}, leaves {left('socket')}, again {answer(bind)};",
      f"mkfifo {answer(os.mkfifo, 'fifo')}, leaves {left('fifo')}")
EOF
expect "exfat-fuse" "$(python3 "$temp/sockets.py" "$temp/mount")" \
    "bind EIO, leaves a regular file, again EADDRINUSE; mkfifo EIO, leaves a regular file"
