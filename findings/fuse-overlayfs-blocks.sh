#!/bin/bash
# fuse-overlayfs 1.10 shows st_blocks of 0 for a new file of 4 MiB, also after fsync.
#
# The file is made, written through the mount and synced. fstat and stat show the right st_size and
# st_blocks of 0, while the file below takes 4 MiB. They show it only once something has the kernel forget
# what it knows: a truncate, say. Programs that look for holes by st_blocks * 512 < st_size (cp, tar
# --sparse, du) take the data for a hole, or count nothing.
#
# Why: the kernel keeps the attributes that it got when the file was created, for as long as the file
# system allowed, and knows of writes only what they do to the length.
#
# What to do: don't take st_blocks for what is allocated; ask SEEK_HOLE, or read.

. "$(dirname "$0")/lib.sh"
need fuse-overlayfs=1.10-1 libfuse3-3=3.14.0-4

mkdir "$temp"/{lower,upper,work}
unmount_later "$temp/mount"
fuse-overlayfs -o "lowerdir=$temp/lower,upperdir=$temp/upper,workdir=$temp/work" "$temp/mount" \
    2> /dev/null

cat > "$temp/blocks.py" << 'EOF'
import os, sys
mount, upper = sys.argv[1:]
with open(mount + "/file", "wb", buffering=0) as file:
    file.write(b"x" * (4 << 20))
    os.fsync(file.fileno())
    seen = os.fstat(file.fileno())
below = os.stat(upper + "/file").st_blocks * 512
print(f"size {seen.st_size}, allocated {seen.st_blocks * 512}, below {below >= 4 << 20},", end=" ")
os.truncate(mount + "/file", 5 << 20)
print(f"after a truncate {os.stat(mount + '/file').st_blocks * 512 >= 4 << 20}")
EOF
expect "fuse-overlayfs" "$(python3 "$temp/blocks.py" "$temp/mount" "$temp/upper")" \
    "size 4194304, allocated 0, below True, after a truncate True"
