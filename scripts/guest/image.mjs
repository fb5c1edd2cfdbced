// The root file system with the agent in it: a sparse copy of rootfs.ext4 into which
// debugfs writes one file, so that a new agent costs a second and not a new Debian.

import { createHash } from 'node:crypto'
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import { normalizeTimes } from './ext4.mjs'
import { imageName, imagePaths, rootfsPaths } from './paths.mjs'
import { allocated, BuildError, needPackages, size, withBuild } from './steps.mjs'

const AGENT_DIR = '/usr/sbin' // /sbin is a link to it
const AGENT_NAME = 'amberbox-agent'
const EPOCH = 1767225600

export async function buildImage(agentPath, { tier = 'std' } = {}) {
  const agent = checkAgent(agentPath)
  const cached = () => imagePaths(agent, tier)?.dir
  const ready = cached()
  if (ready) {
    process.stdout.write(`image ${tier}: cached: ${ready}\n`)
    return ready
  }
  const rootfs = rootfsPaths(tier)
  process.stdout.write(`image ${tier}\n`)
  return withBuild('image', { needsBytes: 1e9, cached }, async (build) => {
    await build.step('tools', async () => needPackages(build, ['e2fsprogs']))
    const image = join(build.out, 'rootfs.ext4')
    const name = imageName(rootfs.dir, agent)
    await build.step('install the agent', async () => {
      await build.run('cp', ['--sparse=always', '--reflink=auto', rootfs.image, image])
      const script = join(build.tmp, 'debugfs')
      const target = `${AGENT_DIR}/${AGENT_NAME}`
      writeFileSync(script, [`cd ${AGENT_DIR}`, `write ${agent} ${AGENT_NAME}`, `sif ${target} mode 0100755`,
        `sif ${target} uid 0`, `sif ${target} gid 0`, `sif ${target} mtime @${EPOCH}`].join('\n'))
      await build.run('debugfs', ['-w', '-f', script, image], { env: { ...process.env, E2FSPROGS_FAKE_TIME: String(EPOCH) } })
      // debugfs reports no failure by its exit code: compare what is in the image
      const copy = join(build.tmp, 'agent')
      await build.run('debugfs', ['-R', `dump ${target} ${copy}`, image])
      if (!existsSync(copy) || !readFileSync(copy).equals(readFileSync(agent))) throw new BuildError('debugfs did not write the agent')
      normalizeTimes(image, EPOCH)
      await build.run('e2fsck', ['-f', '-n', image])
      return `agent ${size(statSync(agent).size)}, image ${size(allocated(image))} on disk`
    })
    build.writeManifest({
      kind: 'image',
      tier,
      rootfs: basename(rootfs.dir),
      agent: createHash('sha256').update(readFileSync(agent)).digest('hex'),
    })
    return { name }
  })
}

/** The absolute path of a usable agent. It is PID 1 of any root file system, so it must not need libraries. */
export function checkAgent(agentPath) {
  const agent = resolve(agentPath)
  if (!existsSync(agent)) throw new BuildError(`There is no agent binary at ${agent}. Build guest/agent first.`)
  const head = readFileSync(agent)
  const elf = head.length > 64 && head.readUInt32BE(0) === 0x7f454c46 && head[4] === 2 && head.readUInt16LE(18) === 62
  if (!elf) throw new BuildError(`${agent} is not an x86-64 ELF program`)
  const PT_INTERP = 3
  const table = Number(head.readBigUInt64LE(32))
  for (let i = 0; i < head.readUInt16LE(56); i++) {
    if (head.readUInt32LE(table + i * head.readUInt16LE(54)) === PT_INTERP) {
      throw new BuildError(`${agent} is linked dynamically; build it with RUSTFLAGS="-C target-feature=+crt-static"`)
    }
  }
  return agent
}
