// Builds the base template: boots the guest once in our own machine and freezes it as soon as its agent answers.
// Cached by content: kernel, root file system and the addon that made it. `<root>/.cache/guest/template` leads to
// the current one; that is where the library looks in a clone.

import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import { basename, join } from 'node:path'
import { guestCache, imagePaths, kernelPaths } from './guest/paths.mjs'
import { withBuild } from './guest/steps.mjs'
import { root, run, ScriptError, size } from './progress.mjs'

const MEMORY_MB = 512
/** Several CPUs, and the host's own CPU ('host'), need KVM: when the template is built and whenever it is used. */
const CPU_COUNT = Number(process.env.AMBERBOX_TEMPLATE_CPUS ?? 1)
const CPU = process.env.AMBERBOX_TEMPLATE_CPU ?? 'baseline'
/** A booting guest executes some 40 M instructions: this is for a very busy host. */
const BOOT_TIMEOUT_MS = 180_000
/** Older templates are removed; stores that adopted them keep their own links. */
const KEEP = 3

export const templateLink = join(root, '.cache', 'guest', 'template')

/** Builds the template if it is not cached, and makes the link lead to it. */
export async function buildTemplate(addon, agent) {
  const kernel = kernelPaths()
  const image = imagePaths(agent)
  if (!kernel || !image) throw new ScriptError('The guest image is not built. Run: npm run setup')
  const key = createHash('sha256')
    .update([basename(kernel.dir), basename(image.dir), MEMORY_MB, CPU_COUNT, CPU].join('\0'))
    .update(readFileSync(addon))
    .digest('hex')
    .slice(0, 16)
  const dir = join(guestCache(), `template-${key}`)
  const cached = () => (existsSync(dir) ? dir : undefined)
  if (cached()) {
    process.stdout.write(`template: cached: ${dir}\n`)
  } else {
    process.stdout.write('template\n')
    await withBuild('template', { needsBytes: 300e6, cached }, async (build) => {
      await build.step('boot the guest and freeze it', async () => {
        const request = {
          kernel: kernel.vmlinux,
          rootfs: image.image,
          out: build.out,
          memoryMb: MEMORY_MB,
          cpuCount: CPU_COUNT,
          cpu: CPU,
          bootTimeoutMs: BOOT_TIMEOUT_MS,
        }
        // A process of its own: what it holds of the guest is gone when it ends.
        const output = await run(process.execPath, [import.meta.filename, addon, JSON.stringify(request)])
        const { bootMs, captureMs } = JSON.parse(output)
        return `boot ${(bootMs / 1000).toFixed(2)} s, freeze ${(captureMs / 1000).toFixed(2)} s, ${size(diskUsage(build.out))}`
      })
      return { name: basename(dir) }
    })
    removeOld(basename(dir))
  }
  link(dir)
  return dir
}

function link(dir) {
  let now
  try {
    now = readlinkSync(templateLink)
  } catch {
    // not there yet
  }
  if (now === dir) return
  mkdirSync(join(root, '.cache', 'guest'), { recursive: true })
  const temporary = `${templateLink}.${process.pid}`
  rmSync(temporary, { force: true })
  symlinkSync(dir, temporary)
  renameSync(temporary, templateLink)
}

function removeOld(current) {
  const others = readdirSync(guestCache())
    .filter((name) => name.startsWith('template-') && name !== current)
    .map((name) => ({ dir: join(guestCache(), name), time: statSync(join(guestCache(), name)).mtimeMs }))
    .sort((a, b) => b.time - a.time)
  for (const { dir } of others.slice(KEEP - 1)) rmSync(dir, { recursive: true, force: true })
}

/** Bytes on disk of all files below a directory. */
export function diskUsage(dir) {
  return readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .reduce((sum, entry) => sum + statSync(join(entry.parentPath, entry.name)).blocks * 512, 0)
}

if (process.argv[1] === import.meta.filename) {
  const [addon, request] = process.argv.slice(2)
  const native = createRequire(import.meta.url)(addon)
  try {
    const built = await native.buildTemplate(JSON.parse(request), { token: 0, timeoutMs: 0 })
    process.stdout.write(`${JSON.stringify(built)}\n`)
  } catch (error) {
    process.stderr.write(`${error.message}\n`)
    process.exitCode = 1
  }
}
