// The root file system: Debian 12 packages by mmdebstrap, guest/rootfs/customize.sh,
// then one ext4 image. Runs as root, or in a user namespace where the user has
// subordinate ids.

import { createHash } from 'node:crypto'
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { userInfo } from 'node:os'
import { join } from 'node:path'
import { ext4Usage, normalizeTimes } from './ext4.mjs'
import { packageLists, projectRoot, rootfsInputs, rootfsPaths, short } from './paths.mjs'
import { allocated, BuildError, needPackages, size, withBuild } from './steps.mjs'

const TOOLS = ['debian-archive-keyring', 'e2fsprogs', 'mmdebstrap']
const SUITE = 'bookworm'
const SOURCE_DATE_EPOCH = 1767225600 // 2026-01-01: no file of the image is newer
const KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg'
// Logical size. Blocks that are never written cost nothing on the host.
const DISK_BYTES = 8 * 2 ** 30

// No documentation but the licences.
const DPKG_OPTIONS = ['path-exclude=/usr/share/man/*', 'path-exclude=/usr/share/info/*', 'path-exclude=/usr/share/locale/*',
  'path-exclude=/usr/share/doc/*', 'path-include=/usr/share/doc/*/copyright', 'path-exclude=/usr/share/lintian/*']

// - No journal: a host crash loses the sandbox anyway, and a snapshot is taken of a consistent machine.
// - No checksums: the store hashes every frame; the guest would compute a CRC per metadata write.
// - One flex group for all 64 groups: bitmaps and inode tables lie together, so that
//   new files dirty few pages. An inode per 32 KiB: 262144, 64 MiB of zeros.
// - No backup superblocks, no reserved blocks.
const EXT4_OPTIONS = ['-t', 'ext4', '-b', '4096', '-I', '256', '-i', '32768', '-G', '64', '-m', '0',
  '-O', 'none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super2,large_file,huge_file,dir_nlink,extra_isize',
  '-E', 'num_backup_sb=0,lazy_itable_init=0,nodiscard,hash_seed=6f2b8a14-53c9-4e0d-9a37-c1d4e58f7b62',
  '-U', '3d1f9c52-7a86-4b1e-8f0c-2e94d7a6b135', '-L', 'amberbox']

export async function buildRootfs({ tier = 'std', refresh = false } = {}) {
  const cached = () => (refresh ? null : rootfsPaths(tier)?.dir)
  const ready = cached()
  if (ready) {
    process.stdout.write(`rootfs ${tier}: cached, ${rootfsPaths(tier).manifest.packages} packages: ${ready}\n`)
    return ready
  }
  process.stdout.write(`rootfs ${tier}\n`)
  const kind = `rootfs-${tier}`
  return withBuild(kind, { needsBytes: 3e9, cached }, async (build) => {
    await build.step('tools', async () => needPackages(build, process.getuid() === 0 ? TOOLS : [...TOOLS, 'uidmap']))
    const inNamespace = namespace()
    const env = { ...process.env, LC_ALL: 'C', SOURCE_DATE_EPOCH: String(SOURCE_DATE_EPOCH) }
    const tar = join(build.tmp, 'rootfs.tar')
    await build.step('install Debian packages', async () => {
      const onLine = (line) => { if (line.startsWith('I: ')) build.note = line.includes('customize-hook') ? 'customizing' : line.slice(3) }
      await build.run('mmdebstrap', mmdebstrapArguments(tier, tar), { env: inNamespace.length ? env : { ...env, TMPDIR: build.tmp }, onLine })
      return size(statSync(tar).size)
    })
    const packages = installedPackages(await build.run('tar', ['--extract', '--to-stdout', '--file', tar, './var/lib/dpkg/status'], { quiet: true }))
    writeFileSync(join(build.out, 'packages.txt'), packages)
    const image = join(build.out, 'rootfs.ext4')
    await build.step('make the ext4 image', async () => {
      const tree = join(build.tmp, 'tree')
      // Without device nodes, which the kernel's devtmpfs provides and a user namespace cannot make.
      // In one process tree, because a user namespace's files can be removed only from within.
      const script = 'mkdir "$0" && tar --extract --xattrs --xattrs-include="*" --numeric-owner --preserve-permissions --exclude="./dev/*" --directory "$0" --file "$1"'
        + ' && shift && "$@"; code=$?; rm -rf --one-file-system "$0"; exit $code'
      const dense = join(build.tmp, 'dense.ext4')
      const make = ['mke2fs', '-q', '-F', ...EXT4_OPTIONS, '-d', tree, dense, `${DISK_BYTES / 4096}`]
      // 1.47.1 and later read SOURCE_DATE_EPOCH, earlier ones this
      const stamped = { ...env, E2FSPROGS_FAKE_TIME: env.SOURCE_DATE_EPOCH, MKE2FS_CONFIG: '/dev/null' }
      const [command, ...rest] = [...inNamespace, 'sh', '-c', script, tree, tar, ...make]
      await build.run(command, rest, { env: stamped })
      normalizeTimes(dense, SOURCE_DATE_EPOCH)
      await build.run('cp', ['--sparse=always', dense, image])
      await build.run('e2fsck', ['-f', '-n', image])
      const { usedBlocks, usedInodes } = ext4Usage(image)
      return `${usedBlocks} blocks (${size(usedBlocks * 4096)}), ${usedInodes} inodes, ${size(allocated(image))} on disk`
    })
    const inputs = rootfsInputs(tier)
    build.writeManifest({ kind: 'rootfs', tier, inputs, suite: SUITE, packages: packages.trimEnd().split('\n').length, ...ext4Usage(image) })
    return { name: `${kind}-${short(createHash('sha256').update(`${inputs}\0${packages}`))}`, currentFor: inputs }
  })
}

function mmdebstrapArguments(tier, tar) {
  const include = packageLists(tier).flatMap((file) => readFileSync(file, 'utf8').split('\n'))
    .map((line) => line.replace(/#.*/, '').trim()).filter(Boolean)
  // Without a mirror of their own, users get mmdebstrap's defaults: Debian's, with updates and security.
  const { AMBERBOX_DEBIAN_MIRROR: mirror, AMBERBOX_DEBIAN_SECURITY_MIRROR: security } = process.env
  const source = (uri, suite) => `deb [signed-by=${KEYRING}] ${uri} ${suite} main`
  return [
    '--verbose',
    `--mode=${process.getuid() === 0 ? 'root' : 'unshare'}`,
    '--variant=minbase',
    '--architectures=amd64',
    `--include=${include.join(',')}`,
    '--aptopt=APT::Install-Recommends "false"',
    ...DPKG_OPTIONS.map((option) => `--dpkgopt=${option}`),
    `--customize-hook=sh '${join(projectRoot, 'guest/rootfs/customize.sh')}' "$1"`,
    SUITE,
    tar,
    ...(mirror ? [source(mirror, SUITE), source(mirror, `${SUITE}-updates`)] : []),
    ...(mirror && security ? [source(security, `${SUITE}-security`)] : []),
  ]
}

/** The command prefix under which files may belong to any user. */
function namespace() {
  if (process.getuid() === 0) return []
  const { username } = userInfo()
  const subuid = existsSync('/etc/subuid') ? readFileSync('/etc/subuid', 'utf8') : ''
  if (!subuid.split('\n').some((line) => line.startsWith(`${username}:`))) {
    throw new BuildError(`The root file system needs root, or subordinate ids for ${username}. `
      + `Run as root, or: sudo apt-get install uidmap && sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 ${username}`)
  }
  return ['unshare', '--user', '--map-root-user', '--map-auto', '--']
}

/** `name version` lines of the installed packages, sorted. */
function installedPackages(status) {
  const field = (paragraph, name) => new RegExp(`^${name}: (.*)$`, 'm').exec(paragraph)?.[1]
  return status.split('\n\n')
    .filter((paragraph) => field(paragraph, 'Status') === 'install ok installed')
    .map((paragraph) => `${field(paragraph, 'Package')} ${field(paragraph, 'Version')}\n`)
    .sort().join('')
}
