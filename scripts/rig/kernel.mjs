// The outer guest's kernel: Debian's own, because its KVM modules are what users' hosts run, and an initramfs that loads
// the modules in the order they need each other. Packages are downloaded and unpacked, not installed: no root.

import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { basename, join } from 'node:path'
import { rigInputs, rigPaths, short } from '../guest/paths.mjs'
import { BuildError, candidate, needPackages, size, withBuild } from '../guest/steps.mjs'

const KERNEL = 'linux-image-amd64'
const BUSYBOX = 'busybox-static'
const TOOLS = ['cpio', 'zstd']
/** What the outer guest needs; their dependencies come along. */
const MODULES = [
  // ext4 asks the kernel's crypto layer for it by name
  'crc32c_generic',
  'virtio_pci',
  'virtio_blk',
  'virtio_rng',
  'ext4',
  '9pnet_virtio',
  '9p',
  'kvm_amd',
]

/** Builds kernel and initramfs unless they are cached; returns their paths. */
export async function buildRigKernel() {
  const cached = () => rigPaths()?.dir
  if (!cached()) {
    process.stdout.write('outer guest\n')
    await withBuild('rig', { needsBytes: 1e9, cached }, build)
  }
  const paths = rigPaths()
  process.stdout.write(`outer guest: ${paths.manifest.packages.join(', ')}: ${paths.dir}\n`)
  return paths
}

async function build(build) {
  await build.step('tools', async () => needPackages(build, TOOLS))
  let kernel
  let packages
  await build.step('download Debian packages', async () => {
    await candidate(build, KERNEL)
    const depends = await build.run('apt-cache', ['depends', '--important', KERNEL], {
      env: { ...process.env, LC_ALL: 'C' },
    })
    kernel = /Depends: (linux-image-\S+)/.exec(depends)?.[1]
    if (!kernel) throw new BuildError(`The package ${KERNEL} does not name a kernel`)
    packages = [kernel, BUSYBOX]
    await build.run('apt-get', ['download', ...packages], { cwd: build.tmp })
    return packages.join(' ')
  })
  const tree = join(build.tmp, 'tree')
  await build.step('unpack', async () => {
    mkdirSync(tree)
    for (const file of readdirSync(build.tmp).filter((name) => name.endsWith('.deb'))) {
      await build.run('dpkg-deb', ['--extract', join(build.tmp, file), tree])
    }
  })
  await build.step('make the initramfs', async () => {
    const release = readdirSync(join(tree, 'lib/modules'))[0]
    copyFileSync(join(tree, 'boot', `vmlinuz-${release}`), join(build.out, 'vmlinuz'))
    const modules = inOrder(join(tree, 'lib/modules', release))
    await initramfs(build, join(tree, 'bin/busybox'), modules)
    return `${modules.length} modules, ${size(statSync(join(build.out, 'initrd')).size)}`
  })
  const versions = readdirSync(build.tmp)
    .filter((name) => name.endsWith('.deb'))
    .map((name) => decodeURIComponent(name.replace(/_[^_]*\.deb$/, '')).replace('_', ' '))
  build.writeManifest({ kind: 'rig', packages: versions.sort() })
  const hash = createHash('sha256').update(`${rigInputs()}\0${versions.join('\0')}`)
  return { name: `rig-${short(hash)}`, currentFor: rigInputs() }
}

/** The files of [`MODULES`] and of what they depend on, dependencies first. */
function inOrder(dir) {
  const files = new Map()
  for (const entry of readdirSync(dir, { recursive: true })) {
    if (entry.endsWith('.ko')) files.set(moduleName(entry), join(dir, entry))
  }
  const order = new Set()
  const add = (name) => {
    const file = files.get(name)
    if (!file) throw new BuildError(`The kernel package has no module ${name}`)
    // What modinfo shows: `depends=a,b` in the section .modinfo, which is text between zero bytes.
    const depends = /\0depends=([^\0]*)\0/.exec(readFileSync(file, 'latin1'))?.[1] ?? ''
    for (const other of depends.split(',').filter(Boolean)) add(moduleName(other))
    order.add(file)
  }
  MODULES.forEach(add)
  return [...order]
}

function moduleName(path) {
  return basename(path, '.ko').replaceAll('-', '_')
}

async function initramfs(build, busybox, modules) {
  const tree = join(build.tmp, 'initramfs')
  for (const dir of ['bin', 'dev', 'proc', 'sys', 'root', 'modules']) {
    mkdirSync(join(tree, dir), { recursive: true })
  }
  const executable = (from, to) => {
    copyFileSync(from, join(tree, to))
    chmodSync(join(tree, to), 0o755)
  }
  executable(busybox, 'bin/busybox')
  executable(join(import.meta.dirname, 'init.sh'), 'init')
  for (const file of modules) copyFileSync(file, join(tree, 'modules', basename(file)))
  writeFileSync(join(tree, 'modules/order'), modules.map((file) => `${basename(file)}\n`).join(''))
  const archive = join(build.tmp, 'initramfs.cpio')
  const names = ['.', ...readdirSync(tree, { recursive: true })].sort().join('\n')
  const cpio = spawnSync(
    'cpio',
    ['--create', '--format=newc', '--owner=0:0', '--quiet', '--reproducible', `--file=${archive}`],
    { cwd: tree, input: names, encoding: 'utf8' },
  )
  if (cpio.status !== 0) throw new BuildError(`cpio failed: ${cpio.error?.message ?? cpio.stderr}`)
  await build.run('zstd', ['-q', '-3', archive, '-o', join(build.out, 'initrd')])
}
