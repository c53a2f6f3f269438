#!/bin/bash
# fuse2fs 1.47.0 answers fallocate(FALLOC_FL_ZERO_RANGE) with EINVAL.
#
# fallocate(2) has EOPNOTSUPP for a mode that the file system does not support, and EINVAL for a range
# that can't be (no length, a negative offset). A program that falls back on writing zeros only where it
# hears EOPNOTSUPP fails here, on a range with nothing wrong. FALLOC_FL_PUNCH_HOLE works.
#
# What to do: take EINVAL as "not supported" too, where the range is known to be right.

. "$(dirname "$0")/lib.sh"
need fuse2fs=1.47.0-2+b2 e2fsprogs=1.47.0-2+b2 libext2fs2=1.47.0-2+b2 libcom-err2=1.47.0-2+b2 \
    libss2=1.47.0-2+b2 libfuse2=2.9.9-6+b1

truncate -s 32M "$temp/ext4"
mkfs.ext4 -q -F "$temp/ext4"
unmount_later "$temp/mount"
fuse2fs -o fakeroot "$temp/ext4" "$temp/mount"

cat > "$temp/fallocate.py" << 'EOF'
import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
with open(sys.argv[1], "w+b") as file:
    file.write(b"x" * (1 << 20))
    file.flush()
    seen = []
    for mode in (PUNCH_HOLE, ZERO_RANGE):
        failed = libc.fallocate(file.fileno(), KEEP_SIZE | mode, ctypes.c_long(65536),
                                ctypes.c_long(65536))
        seen.append(errno.errorcode[ctypes.get_errno()] if failed else "done")
print("punch {}, zero {}".format(*seen))
EOF
expect "fuse2fs" "$(python3 "$temp/fallocate.py" "$temp/mount/file")" "punch done, zero EINVAL"
