// Where the built guest files are. Everything here works offline and fast, so that
// the template builder, the benchmark and the tests can ask on every start.
//
// Layout of the cache (`cacheRoot()`/guest):
//   kernel-<hash>/   vmlinux, vmlinux.zst, System.map, config, manifest.json
//   rootfs-<hash>/   rootfs.ext4 (sparse, without the agent), packages.txt, manifest.json
//   image-<hash>/    rootfs.ext4 (sparse, with the agent at /sbin/amberbox-agent), manifest.json
//   rig-<hash>/      vmlinuz, initrd: the outer guest of `npm run test:kvm` (scripts/rig), manifest.json
//   <kind>.<inputs>.current   names the directory built from these inputs
// A directory never changes once it has its name. <inputs> is a hash of the project's
// own files (fragment, package lists, scripts); <hash> adds what the build found
// outside: package versions and the compiler. `build.mjs --refresh` looks for newer ones.

import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { homedir } from 'node:os'
import { dirname, join, relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

export const here = dirname(fileURLToPath(import.meta.url))
export const projectRoot = resolve(here, '..', '..')
export const TIERS = ['std', 'dev']

/** `$AMBERBOX_CACHE`, else `$XDG_CACHE_HOME/amberbox`, else `~/.cache/amberbox`. */
export function cacheRoot() {
  if (process.env.AMBERBOX_CACHE) return resolve(process.env.AMBERBOX_CACHE)
  return join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'amberbox')
}

export function guestCache() {
  return join(cacheRoot(), 'guest')
}

/** The kernel built from the present fragment, or null when there is none yet. */
export function kernelPaths() {
  const dir = current('kernel', kernelInputs())
  return dir && {
    dir,
    vmlinux: join(dir, 'vmlinux'),
    compressed: join(dir, 'vmlinux.zst'),
    systemMap: join(dir, 'System.map'),
    config: join(dir, 'config'),
    manifest: manifest(dir),
  }
}

/** The root file system (without an agent) built from the present package list, or null. */
export function rootfsPaths(tier = 'std') {
  const dir = current(`rootfs-${tier}`, rootfsInputs(tier))
  return dir && {
    dir,
    image: join(dir, 'rootfs.ext4'),
    packages: join(dir, 'packages.txt'),
    manifest: manifest(dir),
  }
}

/** The root file system with this agent binary in it, or null. */
export function imagePaths(agent, tier = 'std') {
  const rootfs = rootfsPaths(tier)
  if (!rootfs || !existsSync(agent)) return null
  const dir = join(guestCache(), imageName(rootfs.dir, agent))
  return existsSync(dir) ? { dir, image: join(dir, 'rootfs.ext4'), manifest: manifest(dir) } : null
}

/** The kernel and initramfs of the machine in which KVM is tested, or null. */
export function rigPaths() {
  const dir = current('rig', rigInputs())
  return dir && { dir, vmlinuz: join(dir, 'vmlinuz'), initrd: join(dir, 'initrd'), manifest: manifest(dir) }
}

/** Like the functions above, but a missing file is an error that says what to run. */
export function requireGuest({ agent, tier = 'std' } = {}) {
  const kernel = kernelPaths()
  const rootfs = agent ? imagePaths(agent, tier) : rootfsPaths(tier)
  if (!kernel || !rootfs) {
    const verb = kernel ? 'rootfs' : rootfs ? 'kernel' : 'all'
    const options = `${tier === 'std' ? '' : ` --tier ${tier}`}${agent ? ` --agent ${agent}` : ''}`
    throw new Error(`The guest ${verb === 'all' ? 'image' : verb} is not built. Run: node scripts/guest/build.mjs ${verb}${options}`)
  }
  return { kernel, rootfs }
}

export function kernelInputs() {
  return hashFiles([join(projectRoot, 'guest/kernel/microvm.config'), join(here, 'kernel.mjs')])
}

export function rootfsInputs(tier) {
  return hashFiles([
    ...packageLists(tier),
    ...walk(join(projectRoot, 'guest/rootfs')).filter((file) => !file.endsWith('.packages')),
    join(here, 'rootfs.mjs'),
    join(here, 'ext4.mjs'),
  ])
}

export function rigInputs() {
  return hashFiles(['kernel.mjs', 'init.sh'].map((name) => join(projectRoot, 'scripts/rig', name)))
}

/** The lists that make up a tier: `std`, then what the tier adds. */
export function packageLists(tier) {
  if (!TIERS.includes(tier)) throw new Error(`Unknown tier "${tier}". Known: ${TIERS.join(', ')}`)
  const names = tier === 'std' ? ['std'] : ['std', tier]
  return names.map((name) => join(projectRoot, 'guest/rootfs', `${name}.packages`))
}

export function imageName(rootfsDir, agent) {
  const hash = createHash('sha256').update(relative(guestCache(), rootfsDir))
  return `image-${short(hash.update(hashFiles([join(here, 'image.mjs')])).update(readFileSync(agent)))}`
}

export function currentFile(kind, inputs) {
  return join(guestCache(), `${kind}.${inputs}.current`)
}

export function short(hash) {
  return hash.digest('hex').slice(0, 16)
}

function current(kind, inputs) {
  let name
  try {
    name = readFileSync(currentFile(kind, inputs), 'utf8').trim()
  } catch {
    return null
  }
  const dir = join(guestCache(), name)
  return existsSync(join(dir, 'manifest.json')) ? dir : null
}

function manifest(dir) {
  return JSON.parse(readFileSync(join(dir, 'manifest.json'), 'utf8'))
}

function hashFiles(files) {
  const hash = createHash('sha256')
  for (const file of files) {
    const body = readFileSync(file)
    hash.update(`${relative(projectRoot, file)}\0${body.length}\0`).update(body)
  }
  return short(hash)
}

function walk(dir) {
  return readdirSync(dir).sort().flatMap((name) => {
    const path = join(dir, name)
    return statSync(path).isDirectory() ? walk(path) : [path]
  })
}

if (process.argv[1] && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const agent = process.argv[2]
  const summary = { cache: guestCache(), kernel: kernelPaths(), ...Object.fromEntries(TIERS.map((tier) => [tier, rootfsPaths(tier)])) }
  if (agent) summary.image = imagePaths(agent)
  process.stdout.write(`${JSON.stringify(summary, null, 2)}\n`)
}
