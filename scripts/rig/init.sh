#!/bin/busybox sh
# Process 1 of the outer guest until the switch to its root: loads the modules in the order given, mounts the root (a
# Debian image), the payload and the directory of the host. What is written to the disks is thrown away by QEMU.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
fail() {
  echo "@@rig failed $*"
  reboot -f
}
while read -r module; do
  insmod "/modules/$module" || fail "cannot load $module"
done < /modules/order
mount -t ext4 -o noatime /dev/vda /root || fail 'cannot mount the root file system'
mkdir -p /root/mnt/payload /root/mnt/host
mount -t ext4 -o noatime /dev/vdb /root/mnt/payload || fail 'cannot mount the payload'
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=none host /root/mnt/host || fail "cannot mount the host's directory"
mount -o move /dev /root/dev
mount -o move /proc /root/proc
mount -o move /sys /root/sys
exec switch_root /root /bin/bash /mnt/payload/rig/job.sh
