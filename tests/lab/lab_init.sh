#!/bin/bash
# The first process in the lab's root: makes it a computer, runs the one command for which it was started, and ends it.
#
# The command is a script that QEMU hands over (fw_cfg). Ports of virtio-serial, found by their names, take its output, its
# errors and its status; a script named "shell" gets the serial console instead.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root TERM=linux LANG=C.UTF-8 VIADUCT_IN_LAB=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t debugfs debug /sys/kernel/debug
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
ln -s fd/1 /dev/stdout
ln -s fd/2 /dev/stderr
modprobe -a $(</etc/lab-modules)
mount -t hugetlbfs huge /dev/hugepages
mount -t erofs -o ro /dev/vdb /viaduct
echo lab >/proc/sys/kernel/hostname
ip link set lo up

declare -A port
for entry in /sys/class/virtio-ports/*; do port[$(<"$entry/name")]=/dev/${entry##*/}; done
export VIADUCT_LAB_REPORTS=${port[reports]}
command=/sys/firmware/qemu_fw_cfg/by_name/opt/viaduct
if [ -e $command/shell ]; then
    cp $command/shell/raw /run/shell
    setsid --ctty --wait bash --rcfile /run/shell -i </dev/ttyS0 >/dev/ttyS0 2>&1
else
    cp $command/run/raw /run/command
    # A sign of life, by which one who watches from outside tells a lab that stands still from a test that does.
    while echo; do sleep 5; done >"${port[pulse]}" &
    pulse=$!
    # Through cat, so that the command's output is a pipe like any, that its children may open again by name.
    bash /run/command </dev/null 2> >(exec cat >"${port[stderr]}") | cat >"${port[stdout]}"
    status=${PIPESTATUS[0]}
    kill $pulse
    wait
    echo "$status" >"${port[status]}"
fi
sync
printf '\0' | dd of=/dev/port bs=1 seek=$((0xf4)) status=none # isa-debug-exit: QEMU ends here
