#!/bin/sh
# The first process of a guest in the lab: drivers for the devices that are there, then a shell on the console.
#
# The shell answers a program as well as a person: "TAG SCRIPT" with the script in base64 is answered by "TAG STATUS OUTPUT", also
# in base64, after a line "ready UPTIME" has announced it. With viaduct.end on the kernel's command line the guest says that it
# is ready and ends.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
echo /bin/modprobe >/proc/sys/kernel/modprobe
read -r uptime _ </proc/uptime
echo "init at $uptime"
# Drivers load as udev would load them: each device says what it is. Those of a bus bring new devices with them.
load_drivers() {
    modprobe -aq $(for bus; do cat /sys/bus/$bus/devices/*/modalias 2>/dev/null; done | sort -u)
}
load_drivers acpi pci platform
load_drivers virtio
ip link set lo up
stty -echo
read -r uptime _ </proc/uptime
echo "ready $uptime"
if grep -q viaduct.end /proc/cmdline; then
    poweroff -f
fi
serve() {
    while read -r tag script; do
        echo "$script" | base64 -d >/tmp/script
        sh /tmp/script </dev/null >/tmp/output 2>&1
        status=$?
        echo "$tag $status $(base64 -w 0 /tmp/output)"
    done
}
# Orphans become children of this process, and busybox loses what it has read of a line when a child ends. So another reads.
exec 3<&0 # because what runs behind has no standard input
serve <&3 &
wait $!
poweroff -f
