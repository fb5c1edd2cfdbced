// The guest kernel: Debian's linux-source with guest/kernel/microvm.config over an
// empty configuration. Needs no root: the source package is downloaded and unpacked,
// not installed.

import { createHash } from 'node:crypto'
import { chmodSync, copyFileSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { kernelInputs, kernelPaths, projectRoot, short } from './paths.mjs'
import { BuildError, candidate, needPackages, size, withBuild } from './steps.mjs'

// The major version is pinned; Debian's security team moves the rest.
const SOURCE = 'linux-source-6.12'
const TOOLS = ['bc', 'bison', 'build-essential', 'flex', 'libelf-dev', 'xz-utils', 'zstd']
// Never read when building vmlinux for x86: 700 MB of the unpacked tree.
const UNUSED = ['drivers/gpu/drm/amd/include', 'tools/testing', 'Documentation/[a-z]*', 'arch/arm*/boot/dts']
const FRAGMENT = join(projectRoot, 'guest/kernel/microvm.config')
// Measured: what `make vmlinux` compiles, for the progress line.
const OBJECTS = 1165

export async function buildKernel({ refresh = false } = {}) {
  const cached = () => (refresh ? null : kernelPaths()?.dir)
  const ready = cached()
  if (ready) {
    process.stdout.write(`kernel: cached, ${kernelPaths().manifest.source}: ${ready}\n`)
    return ready
  }
  process.stdout.write('kernel\n')
  return withBuild('kernel', { needsBytes: 2.5e9, cached }, async (build) => {
    let version
    let compiler
    await build.step('tools', async () => needPackages(build, TOOLS))
    await build.step('source version', async () => {
      version = await candidate(build, SOURCE, { refresh })
      compiler = (await build.run('gcc', ['--version'])).split('\n')[0]
      return `${SOURCE} ${version}, ${compiler}`
    })
    await build.step('download', async () => {
      await build.run('apt-get', ['download', `${SOURCE}=${version}`], { cwd: build.tmp })
      return size(statSync(join(build.tmp, debFile(build.tmp))).size)
    })
    const tree = join(build.tmp, SOURCE)
    await build.step('unpack', async () => {
      const exclude = UNUSED.map((path) => `--exclude='${SOURCE}/${path}'`).join(' ')
      await build.run('bash', ['-c', `set -o pipefail; dpkg-deb --fsys-tarfile '${debFile(build.tmp)}' `
        + `| tar --extract --to-stdout ./usr/src/${SOURCE}.tar.xz | xz --decompress --threads=0 | tar --extract --wildcards ${exclude}`], { cwd: build.tmp, env: environment() })
    })
    await build.step('configure', async () => {
      const make = { cwd: tree, env: environment() }
      await build.run('make', ['allnoconfig'], make)
      await build.run('scripts/kconfig/merge_config.sh', ['-m', '.config', FRAGMENT], make)
      await build.run('make', ['olddefconfig'], make)
      const lost = lostSettings(readFileSync(FRAGMENT, 'utf8'), readFileSync(join(tree, '.config'), 'utf8'))
      if (lost.length > 0) throw new BuildError(`Kconfig does not accept these lines of guest/kernel/microvm.config: ${lost.join(', ')}`)
    })
    await build.step('compile', async () => {
      let objects = 0
      const onLine = (line) => {
        if (/^\s+(CC|AS)\s/.test(line)) build.note = `${++objects} of about ${OBJECTS} objects`
      }
      await build.run('make', [`-j${availableParallelism()}`, 'vmlinux'], { cwd: tree, env: environment(), onLine })
      return `${objects} objects`
    })
    const vmlinux = join(build.out, 'vmlinux')
    await build.step('strip, compress', async () => {
      await build.run('strip', ['--strip-all', '-o', vmlinux, join(tree, 'vmlinux')])
      chmodSync(vmlinux, 0o644)
      await build.run('zstd', ['-q', '-19', '-T0', vmlinux, '-o', `${vmlinux}.zst`])
      copyFileSync(join(tree, 'System.map'), join(build.out, 'System.map'))
      copyFileSync(join(tree, '.config'), join(build.out, 'config'))
      return `vmlinux ${size(statSync(vmlinux).size)}, zstd -19 ${size(statSync(`${vmlinux}.zst`).size)}`
    })
    const inputs = kernelInputs()
    build.writeManifest({
      kind: 'kernel',
      inputs,
      source: `${SOURCE} ${version}`,
      compiler,
      sha256: createHash('sha256').update(readFileSync(vmlinux)).digest('hex'),
      bytes: statSync(vmlinux).size,
    })
    return { name: `kernel-${short(createHash('sha256').update(`${inputs}\0${version}\0${compiler}`))}`, currentFor: inputs }
  })
}

/** Lines of the fragment that the final configuration does not have. */
function lostSettings(fragment, config) {
  const settings = (text) => new Map([...text.matchAll(/^(?:# )?(CONFIG_\w+)(?:=(.*)| is not set)$/gm)].map(([, name, value]) => [name, value ?? 'n']))
  const has = settings(config)
  return [...settings(fragment)].filter(([name, value]) => (has.get(name) ?? 'n') !== value).map(([name, value]) => `${name}=${value}`)
}

/** Nothing of the build host gets into the kernel's version string. */
function environment() {
  return {
    ...process.env,
    LC_ALL: 'C',
    KBUILD_BUILD_TIMESTAMP: 'Thu Jan  1 00:00:00 UTC 2026',
    KBUILD_BUILD_USER: 'amberbox',
    KBUILD_BUILD_HOST: 'guest',
    KBUILD_BUILD_VERSION: '1',
  }
}

function debFile(dir) {
  const file = readdirSync(dir).find((name) => name.endsWith('.deb'))
  if (!file) throw new BuildError(`apt-get download left no package in ${dir}`)
  return file
}
