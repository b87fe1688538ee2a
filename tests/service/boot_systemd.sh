#!/bin/sh
# Process 1 of new pid, mount, cgroup, uts and ipc namespaces: a systemd that knows the units of $1
# and nothing of the machine's, and can write nowhere but to $1. $2…: directories that accounts
# other than root must be able to read.
set -eu
scene=$1
shift
mount --make-rprivate /
mount -t proc proc /proc
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/scene /run/keep /run/upper /run/work
mount --bind "$scene" /run/scene
# Homes that are closed to others, opened for what lies in them and is needed.
number=0
for directory; do
    number=$((number + 1))
    mkdir "/run/keep/$number"
    mount --bind "$directory" "/run/keep/$number"
done
for home in /root; do
    mount -t tmpfs -o mode=755 tmpfs "$home"
done
number=0
for directory; do
    number=$((number + 1))
    mkdir -p "$directory"
    mount --bind "/run/keep/$number" "$directory"
done
mount -t overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work overlay /etc
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
mount -t tmpfs -o mode=755 tmpfs /var/cache
mount -t tmpfs -o mode=755 tmpfs /var/log
mkdir -p "$scene"
mount --bind /run/scene "$scene"
mount -t tmpfs tmpfs /usr/lib/systemd/system-generators
mount -t tmpfs tmpfs /usr/lib/systemd/system
mount -t tmpfs tmpfs /etc/systemd/system
for name in sysinit basic multi-user shutdown umount final exit local-fs sockets timers paths; do
    printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' "$name" \
        > "/usr/lib/systemd/system/$name.target"
done
cp -r "$scene/units/." /etc/systemd/system/
export container=test
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=console \
    --show-status=no < /dev/null
