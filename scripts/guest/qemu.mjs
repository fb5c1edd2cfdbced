#!/usr/bin/env node
// Boots the guest's kernel and root file system in QEMU without hardware
// virtualization: proof that the image is sound on a machine that is not ours, and
// the peer of the benchmark. Kernel, image and command line are the same; the image
// is opened with snapshot=on and stays as it is.
//
// The shell script to run arrives on a second disk, and bash is PID 1. When it exits
// the kernel panics by design, which carries the exit code and ends QEMU.

import { spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { requireGuest } from './paths.mjs'

const PRELUDE = `mount -t proc proc /proc
mount -t sysfs sysfs /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -o remount,noatime /
hostname -F /etc/hostname 2>/dev/null || cat /etc/hostname > /proc/sys/kernel/hostname
ip link set lo up
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=xterm-256color LANG=C.UTF-8
cd /
echo @@amberbox-ready
`
const READY = '@@amberbox-ready'
const EXIT = /Kernel panic - not syncing: Attempted to kill init! exitcode=0x([0-9a-f]+)/

export function haveQemu() {
  return !spawnSync('qemu-system-x86_64', ['--version']).error
}

/**
 * Boots, runs `script` (bash) as root, and resolves when the machine has ended.
 *
 * Result: `{ exitCode, output, lines: [{ text, seconds }], bootSeconds, seconds }`; seconds count
 * from the start of the QEMU process, `bootSeconds` is when the script began. `exitCode` is
 * null when the machine ended otherwise (panic, timeout, see `output`).
 */
export async function bootQemu({
  kernel, disk, script, memoryMiB = 512, accel = 'tcg', cpu, append = '', timeoutSeconds = 600, onLine,
} = {}) {
  const files = requireDefaults(kernel, disk)
  const dir = mkdtempSync(join(tmpdir(), 'amberbox-qemu-'))
  try {
    const args = machineArguments({ ...files, script, dir, memoryMiB, accel, cpu, append })
    return await run(args, dir, timeoutSeconds, onLine)
  } finally {
    rmSync(dir, { recursive: true, force: true })
  }
}

/** QEMU's arguments for our guest; the script's disk is written to `dir`. `accel`: `tcg` or `kvm`. */
export function machineArguments({ kernel, disk, script, dir, memoryMiB = 512, accel = 'tcg', cpu, append = '' }) {
  const scriptDisk = join(dir, 'script')
  const text = `${PRELUDE}${script}\n`
  // bash reads the device to its end: pad the last sector with blank lines
  writeFileSync(scriptDisk, text + '\n'.repeat((512 - (Buffer.byteLength(text) % 512)) % 512))
  // Where the microvm machine has its virtio-mmio windows, in our order: the kernel names disks as it finds them.
  const devices = [0, 1, 2].map((i) => `virtio_mmio.device=512@0x${(0xfeb00000 + i * 512).toString(16)}:${5 + i}`).join(' ')
  return [
    '-M', 'microvm,acpi=off,x-option-roms=off,isa-serial=on,rtc=on,pit=on,pic=on,auto-kernel-cmdline=off',
    '-accel', accel, '-cpu', cpu ?? (accel === 'kvm' ? 'host' : 'max'), '-smp', '1', '-m', `${memoryMiB}`,
    '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-serial', 'stdio',
    '-global', 'virtio-mmio.force-legacy=false',
    '-kernel', kernel,
    '-append', `console=ttyS0 quiet reboot=t panic=-1 noreplace-smp swiotlb=noforce root=/dev/vda rw rootfstype=ext4 init=/bin/bash ${devices} ${append} -- /dev/vdb`,
    '-drive', `id=root,file=${disk},format=raw,if=none,snapshot=on`,
    '-device', 'virtio-blk-device,drive=root,bus=virtio-mmio-bus.0',
    '-drive', `id=script,file=${scriptDisk},format=raw,if=none,readonly=on`,
    '-device', 'virtio-blk-device,drive=script,bus=virtio-mmio-bus.1',
    '-device', 'virtio-rng-device,bus=virtio-mmio-bus.2',
  ]
}

function requireDefaults(kernel, disk) {
  if (kernel && disk) return { kernel, disk }
  const guest = requireGuest()
  return { kernel: kernel ?? guest.kernel.vmlinux, disk: disk ?? guest.rootfs.image }
}

function run(args, dir, timeoutSeconds, onLine) {
  return new Promise((done, fail) => {
    const began = performance.now()
    const now = () => (performance.now() - began) / 1000
    // TMPDIR: where QEMU keeps the temporary overlay of snapshot=on
    const qemu = spawn('qemu-system-x86_64', args, { stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, TMPDIR: dir } })
    const lines = []
    let rest = ''
    let errors = ''
    let bootSeconds = null
    let exitCode = null
    const take = (text) => {
      const panic = EXIT.exec(text)
      if (panic) exitCode = (parseInt(panic[1], 16) >> 8) & 0xff
      if (exitCode !== null) return
      if (text === READY) { bootSeconds = now(); return }
      lines.push({ text, seconds: now() })
      onLine?.(text, now())
    }
    qemu.stdout.setEncoding('utf8').on('data', (data) => {
      const parts = (rest + data).split(/\r*\n/)
      rest = parts.pop()
      parts.forEach(take)
    })
    qemu.stderr.on('data', (data) => { errors += data })
    const deadline = setTimeout(() => qemu.kill('SIGKILL'), timeoutSeconds * 1000)
    const quit = () => qemu.kill('SIGKILL')
    process.once('exit', quit)
    qemu.on('error', (error) => {
      clearTimeout(deadline)
      process.off('exit', quit)
      fail(new Error(error.code === 'ENOENT' ? 'QEMU is missing. Run: sudo apt-get install --no-install-recommends qemu-system-x86' : error.message))
    })
    qemu.on('close', (code) => {
      clearTimeout(deadline)
      process.off('exit', quit)
      if (rest) take(rest)
      if (code !== 0 && code !== null) fail(new Error(`QEMU failed with exit code ${code}: ${errors.trim()}`))
      else done({ exitCode, output: lines.map(({ text }) => `${text}\n`).join(''), lines, bootSeconds, seconds: now() })
    })
  })
}

const USAGE = `Usage: node scripts/guest/qemu.mjs [options] -- COMMAND...
       node scripts/guest/qemu.mjs [options] --script FILE

Boots the guest in QEMU (TCG), runs the command with bash as root, prints its output.

  --kernel FILE --disk FILE   instead of the cached ones
  --memory MIB                default 512
  --cpu MODEL                 default max
  --append TEXT               more kernel command line
  --timeout SECONDS           default 600`

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: Object.fromEntries(['kernel', 'disk', 'memory', 'cpu', 'append', 'timeout', 'script'].map((name) => [name, { type: 'string' }])),
  })
  const script = values.script ? readFileSync(values.script, 'utf8') : positionals.join(' ')
  if (!script) throw new Error(USAGE)
  const result = await bootQemu({
    ...values,
    script,
    memoryMiB: values.memory ? Number(values.memory) : undefined,
    timeoutSeconds: values.timeout ? Number(values.timeout) : undefined,
    onLine: (text, seconds) => process.stdout.write(`${seconds.toFixed(2).padStart(8)}  ${text}\n`),
  })
  process.stdout.write(`exit code ${result.exitCode ?? 'none'}, script began after ${result.bootSeconds?.toFixed(2) ?? '-'} s, all ${result.seconds.toFixed(2)} s\n`)
  process.exitCode = result.exitCode ?? 1
}

if (process.argv[1] && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main().catch((error) => {
    process.stderr.write(`${error.message}\n`)
    process.exitCode = 1
  })
}
