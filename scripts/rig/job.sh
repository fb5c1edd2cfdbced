# Process 1 of the outer guest after init.sh: runs the steps of /mnt/host/plan one after the other, whatever fails.
# A step is three lines: its name, its limit in seconds, its command (bash). Lines that begin with @@rig are for outer.mjs.
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
ln -sfn /proc/self/fd /dev/fd
ip link set lo up
hostname -F /etc/hostname 2>/dev/null || cat /etc/hostname > /proc/sys/kernel/hostname
export PATH=/mnt/payload/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LANG=C.UTF-8
# On the payload's file system, so that stores can adopt the template by hard links.
export TMPDIR=/mnt/payload/tmp AMBERBOX_GUEST=/mnt/payload/guest
export AMBERBOX_BACKEND=kvm
mkdir -p "$TMPDIR"
cd /mnt/payload/project || exit 1
while read -r name && read -r limit && read -r command; do
  echo "@@rig begin $name"
  timeout --kill-after=10 "$limit" bash -c "$command" < /dev/null 2>&1
  code=$?
  # Whether a sandbox took the kernel with it is the first question.
  [ "$code" = 0 ] || { echo "Kernel messages:"; dmesg --level=emerg,alert,crit,err,warn | tail -n 15; }
  echo "@@rig end $code $name"
done < /mnt/host/plan
sync
echo "@@rig done"
echo o > /proc/sysrq-trigger
sleep 60
