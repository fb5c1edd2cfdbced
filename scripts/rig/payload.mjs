// The payload: a disk for the outer guest with Node, the package as a clone has it, and the base template. Making it takes
// two seconds, which is less than finding out whether an old one is still right.

import { spawnSync } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, readdirSync, realpathSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { root, run, ScriptError } from '../progress.mjs'
import { diskUsage } from '../template.mjs'

/** Of the clone, what the Jest suite needs at run time. */
const PROJECT = [
  '__test__',
  'cli',
  'amberbox.linux-x64-gnu.node',
  'index.d.ts',
  'index.js',
  'index.mjs',
  'jest.config.js',
  'lib',
  'package.json',
]
/** Packages of node_modules that only type checks and formatting need. */
const UNUSED = /^(@types|@typescript|prettier|typescript)$/

/** The C library is the outer guest's own. */
const GLIBC = /^(ld-linux|libc|libm|libdl|librt|libpthread|libresolv)[-.]/

/** This host's QEMU with its libraries and firmware, as `extra` of [`makePayload`]; needs the same Debian release as the outer guest's. */
export async function qemuFiles() {
  const binary = '/usr/bin/qemu-system-x86_64'
  const libraries = await run('ldd', [binary])
  const files = { 'opt/qemu/bin/qemu-system-x86_64': binary }
  for (const [, name, path] of libraries.matchAll(/^\s*(\S+) => (\/\S+)/gm)) {
    if (!GLIBC.test(name)) files[`opt/qemu/lib/${name}`] = path
  }
  for (const name of ['bios-microvm.bin', 'kvmvapic.bin', 'linuxboot_dma.bin', 'pvh.bin', 'qboot.rom']) {
    const path = [`/usr/share/qemu/${name}`, `/usr/share/seabios/${name}`].find((place) => existsSync(place))
    if (path) files[`opt/qemu/share/qemu/${name}`] = path
  }
  return { ...files, 'bin/qemu-system-x86_64': join(import.meta.dirname, 'qemu.sh') }
}

/**
 * Makes the disk in `directory` and returns its path. `template`: directory of the base template; `extra`: `{ path in the
 * payload: file or directory }`.
 */
export async function makePayload(directory, { template, extra = {} }) {
  const tree = join(directory, 'payload')
  const put = (from, to) => {
    mkdirSync(join(tree, to, '..'), { recursive: true })
    // Only cp knows about reflinks.
    const copy = spawnSync('cp', ['--recursive', '--dereference', '--reflink=auto', from, join(tree, to)], {
      encoding: 'utf8',
    })
    if (copy.status !== 0) throw new ScriptError(`Cannot copy ${from}: ${copy.stderr.trim()}`)
  }
  for (const name of PROJECT) put(join(root, name), `project/${name}`)
  for (const name of readdirSync(join(root, 'node_modules'))) {
    if (!UNUSED.test(name) && !name.startsWith('.'))
      put(join(root, 'node_modules', name), `project/node_modules/${name}`)
  }
  put(realpathSync(process.execPath), 'bin/node')
  chmodSync(join(tree, 'bin/node'), 0o755)
  for (const name of ['job.sh', 'reporter.cjs']) put(join(import.meta.dirname, name), `rig/${name}`)
  put(template, 'guest/template')
  for (const [to, from] of Object.entries(extra)) put(from, to)

  const image = join(directory, 'payload.ext4')
  // As much room again for what the tests write; blocks that are never written cost nothing.
  const megabytes = Math.ceil(diskUsage(tree) / 1e6) + 4096
  await run('mke2fs', [
    '-q',
    '-F',
    '-t',
    'ext4',
    '-b',
    '4096',
    '-m',
    '0',
    '-O',
    '^has_journal,^metadata_csum',
    '-d',
    tree,
    image,
    `${megabytes}M`,
  ])
  rmSync(tree, { recursive: true, force: true })
  return image
}
