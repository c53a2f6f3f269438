#!/bin/bash
# mergerfs 2.33.5 and unionfs-fuse 1.0 show two inode numbers for two names of one file, unless told not to.
#
# Two names are those of one file where st_dev and st_ino are the same (POSIX, sys/stat.h). Here a hard link
# shows another st_ino than the file, while what is written by one name is read by the other. Programs that
# look whether two names are one file (cp, rsync -H, tar, du, lock files made by link) are told no.
#
# Why: libfuse makes a number for each name that is looked up, unless the option use_ino leaves it to the
# file system. It is no default of either; with it both show one number. mergerfs's manual recommends it;
# its own option inodecalc does nothing without it.
#
# What to do: mount with use_ino; where the answer matters and the mount is somebody else's, write through
# one name and look through the other.

. "$(dirname "$0")/lib.sh"
need mergerfs=2.33.5-1 unionfs-fuse=1.0-1+b1 libfuse2=2.9.9-6+b1

look() {
    local folder=$1 numbers
    echo one > "$folder/first"
    ln "$folder/first" "$folder/second"
    echo two > "$folder/first"
    numbers=$(stat -c %i "$folder/first" "$folder/second" | sort -u | wc -l)
    echo "inode numbers: $numbers, the second name reads: $(cat "$folder/second")"
}

# try WANTED COMMAND [OPTION]: a mount of two new folders.
try() {
    local wanted=$1 command=$2 option=${3-} here
    here=$(mktemp -d -p "$temp")
    mkdir "$here/a" "$here/b"
    unmount_later "$here/mount"
    case $command in
        mergerfs) mergerfs -o "minfreespace=0$option" "$here/a:$here/b" "$here/mount" ;;
        unionfs-fuse) unionfs-fuse -o "cow$option" "$here/a=RW:$here/b=RO" "$here/mount" ;;
    esac
    expect "$command$option" "$(look "$here/mount")" \
        "inode numbers: $wanted, the second name reads: two"
}

try 2 mergerfs
try 2 mergerfs ,inodecalc=devino-hash
try 1 mergerfs ,use_ino
try 2 unionfs-fuse
try 1 unionfs-fuse ,use_ino
