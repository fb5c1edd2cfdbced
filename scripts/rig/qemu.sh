#!/bin/sh
# QEMU in the outer guest, where only the benchmark needs it.
LD_LIBRARY_PATH=/mnt/payload/opt/qemu/lib exec /mnt/payload/opt/qemu/bin/qemu-system-x86_64 "$@"
