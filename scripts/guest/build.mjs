#!/usr/bin/env node
// Builds the guest: kernel, root file system, and the image with the agent in it.
// See guest/README.md; where the results are: paths.mjs.

import { spawnSync } from 'node:child_process'
import { mkdirSync, readdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { buildImage, checkAgent } from './image.mjs'
import { buildKernel } from './kernel.mjs'
import { TIERS } from './paths.mjs'
import { buildRootfs } from './rootfs.mjs'
import { BuildError } from './steps.mjs'

const USAGE = `Usage: node scripts/guest/build.mjs kernel|rootfs|all [options]

  kernel          the guest kernel (about 6 minutes of two cores, once)
  rootfs          the root file system (about a minute and 100 MB of downloads, once)
  all             both

  --agent PATH    also make the image with this static agent binary (rootfs, all)
  --tier NAME     ${TIERS.join(' or ')}: the package list (default std)
  --out DIR       copy the results to DIR
  --refresh       build again with the newest Debian packages

Results are cached under $AMBERBOX_CACHE, $XDG_CACHE_HOME/amberbox or ~/.cache/amberbox.`

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      agent: { type: 'string' },
      tier: { type: 'string', default: 'std' },
      out: { type: 'string' },
      refresh: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  })
  if (values.help) {
    process.stdout.write(`${USAGE}\n`)
    return
  }
  const [verb, ...extra] = positionals
  if (!['kernel', 'rootfs', 'all'].includes(verb) || extra.length > 0 || !TIERS.includes(values.tier)) throw new BuildError(USAGE)
  if (values.agent && verb === 'kernel') throw new BuildError('--agent belongs to rootfs or all')
  if (values.agent) checkAgent(values.agent)
  const results = []
  if (verb !== 'rootfs') results.push(await buildKernel(values))
  if (verb !== 'kernel') {
    const rootfs = await buildRootfs(values)
    results.push(values.agent ? await buildImage(values.agent, values) : rootfs)
  }
  if (values.out) copyTo(resolve(values.out), results)
}

function copyTo(out, dirs) {
  mkdirSync(out, { recursive: true })
  for (const dir of dirs) {
    const files = readdirSync(dir).filter((name) => name !== 'manifest.json').map((name) => join(dir, name))
    const copy = spawnSync('cp', ['--sparse=always', '--reflink=auto', ...files, out], { encoding: 'utf8' })
    if (copy.status !== 0) throw new BuildError(`Cannot copy to ${out}: ${copy.stderr.trim()}`)
  }
  process.stdout.write(`copied to ${out}\n`)
}

try {
  await main()
} catch (error) {
  const usage = error.code?.startsWith?.('ERR_PARSE_ARGS')
  process.stderr.write(`${error instanceof BuildError || usage ? error.message : error.stack}\n`)
  process.exitCode = 1
}
