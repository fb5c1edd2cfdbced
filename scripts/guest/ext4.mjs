// The little of ext4's on-disk format that the build needs: usage figures, and one
// fixed time for what mke2fs takes from the build host (change, access and creation
// times). Layout: Linux Documentation/filesystems/ext4, for file systems without
// checksums and with 32-byte group descriptors, which is what rootfs.mjs makes.

import { closeSync, openSync, readSync, writeSync } from 'node:fs'

const SUPERBLOCK = 1024
const MAGIC = 0xef53
const INCOMPAT_64BIT = 0x80
const RO_COMPAT_GDT_CSUM = 0x10
const RO_COMPAT_METADATA_CSUM = 0x400

/** Blocks and inodes in use, from the superblock. */
export function ext4Usage(path) {
  return withFile(path, 'r', (fd) => {
    const { blocks, freeBlocks, inodes, freeInodes } = superblock(fd)
    return { blocks, usedBlocks: blocks - freeBlocks, inodes, usedInodes: inodes - freeInodes }
  })
}

/** Sets access, change and creation time of every inode in use, and clamps the modification time. */
export function normalizeTimes(path, epoch) {
  withFile(path, 'r+', (fd) => {
    const sb = superblock(fd)
    const groups = Math.ceil(sb.blocks / sb.blocksPerGroup)
    const descriptors = read(fd, sb.blockSize === 1024 ? 2048 : sb.blockSize, groups * 32)
    for (let group = 0; group < groups; group++) {
      const bitmap = read(fd, descriptors.readUInt32LE(group * 32 + 4) * sb.blockSize, sb.inodesPerGroup / 8)
      if (bitmap.every((byte) => byte === 0)) continue
      const at = descriptors.readUInt32LE(group * 32 + 8) * sb.blockSize
      const table = read(fd, at, sb.inodesPerGroup * sb.inodeSize)
      for (let index = 0; index < sb.inodesPerGroup; index++) {
        const inode = table.subarray(index * sb.inodeSize, (index + 1) * sb.inodeSize)
        const used = bitmap[index >> 3] & (1 << (index & 7))
        if (used && inode.readUInt16LE(0) !== 0) stamp(inode, epoch)
      }
      writeSync(fd, table, 0, table.length, at)
    }
  })
}

function stamp(inode, epoch) {
  inode.writeUInt32LE(epoch, 0x08) // atime
  inode.writeUInt32LE(epoch, 0x0c) // ctime
  if (inode.readUInt32LE(0x10) >= epoch) { // mtime
    inode.writeUInt32LE(epoch, 0x10)
    inode.writeUInt32LE(0, 0x88)
  }
  inode.writeUInt32LE(0, 0x84) // nanoseconds of ctime
  inode.writeUInt32LE(0, 0x8c) // nanoseconds of atime
  inode.writeUInt32LE(epoch, 0x90) // crtime
  inode.writeUInt32LE(0, 0x94)
}

function superblock(fd) {
  const sb = read(fd, SUPERBLOCK, 1024)
  const unsupported = (sb.readUInt32LE(0x60) & INCOMPAT_64BIT) || (sb.readUInt32LE(0x64) & (RO_COMPAT_GDT_CSUM | RO_COMPAT_METADATA_CSUM))
  if (sb.readUInt16LE(0x38) !== MAGIC || unsupported) throw new Error('Not an ext4 image of the expected features')
  return {
    inodes: sb.readUInt32LE(0),
    blocks: sb.readUInt32LE(4),
    freeBlocks: sb.readUInt32LE(0x0c),
    freeInodes: sb.readUInt32LE(0x10),
    blockSize: 1024 << sb.readUInt32LE(0x18),
    blocksPerGroup: sb.readUInt32LE(0x20),
    inodesPerGroup: sb.readUInt32LE(0x28),
    inodeSize: sb.readUInt16LE(0x58),
  }
}

function read(fd, at, length) {
  const buffer = Buffer.alloc(length)
  if (readSync(fd, buffer, 0, length, at) !== length) throw new Error('The ext4 image is shorter than its superblock says')
  return buffer
}

function withFile(path, flags, body) {
  const fd = openSync(path, flags)
  try {
    return body(fd)
  } finally {
    closeSync(fd)
  }
}
