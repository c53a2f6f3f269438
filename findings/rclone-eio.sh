#!/bin/bash
# rclone mount 1.60.1 answers what it has not with EIO: link(2), listxattr(2), a socket's bind(2).
#
# A file system without hard links says EPERM (link(2)), one without extended attributes ENOTSUP
# (listxattr(2)), and EIO is for a disk that fails. Here all three fail with EIO, on a mount on which
# reading, writing and renaming work. Programs that fall back where a thing is missing take it for a broken
# disk instead, and stop.
#
# What to do: fall back on EIO too, where what one falls back on would meet a broken disk as well.

. "$(dirname "$0")/lib.sh"
need rclone=1.60.1+dfsg-2+b5

mkdir "$temp/below" "$temp/cache"
unmount_later "$temp/mount"
rclone mount --daemon --config "$temp/cache/config" --cache-dir "$temp/cache" \
    --vfs-cache-mode writes "$temp/below" "$temp/mount" 2> /dev/null

cat > "$temp/calls.py" << 'EOF'
import os, socket, sys
from answers import answer
os.chdir(sys.argv[1])

with open("a", "wb") as file:
    file.write(b"x" * 4096)
os.rename("a", "b")
assert open("b", "rb").read() == b"x" * 4096
print("link {}, listxattr {}, bind {}".format(
    answer(os.link, "b", "c"), answer(os.listxattr, "b"),
    answer(socket.socket(socket.AF_UNIX).bind, "socket")))
EOF
expect "rclone mount" "$(python3 "$temp/calls.py" "$temp/mount")" "link EIO, listxattr EIO, bind EIO"
