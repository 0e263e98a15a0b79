#!/bin/busybox sh
# The lab's first process: drivers for the disk, the read-only root below a scratch one, and on to lab_init.sh there.
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do /bin/busybox insmod "/modules/$module"; done </modules/order
/bin/busybox mkdir /lower /scratch /new
/bin/busybox mount -t erofs -o ro /dev/vda /lower
/bin/busybox mount -t tmpfs scratch /scratch
/bin/busybox mkdir /scratch/upper /scratch/work
/bin/busybox mount -t overlay -o lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work root /new
/bin/busybox mount --move /dev /new/dev
exec /bin/busybox switch_root /new /sbin/lab-init
