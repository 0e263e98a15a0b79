#!/bin/sh
# The first process of a guest: load the drivers, then do what the host asks for over the second serial port.
#
# One request is one line "TAG SCRIPT" with the script in base64; its answer is one line "TAG STATUS OUTPUT", also in base64, so
# that kernel messages and terminal modes cannot be taken for either. "ready BOOT_ID" announces a fresh boot.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
while read -r module; do insmod "/modules/$module"; done </modules/order
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
ip link set lo up
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo "ready $(cat /proc/sys/kernel/random/boot_id)" >&3
serve() {
    while read -r tag script <&3; do
        echo "$script" | base64 -d >/tmp/script
        sh /tmp/script </dev/null >/tmp/output 2>&1
        status=$?
        echo "$tag $status $(base64 -w 0 /tmp/output)" >&3
    done
}
# Orphans become children of this process, and busybox loses what it has read of a line when a child ends. So another reads.
serve &
wait $!
