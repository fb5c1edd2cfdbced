// What a snapshot costs the sandbox it is taken from, and the disk: `npm run bench capture`.
//
// The pause is seen from inside: a program in the guest reads the monotonic clock in a loop and reports the longest gap of
// each window of time. Windows with a snapshot alternate with windows without one, so that both have the host's noise.

import { execFileSync } from 'node:child_process'
import { mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const WINDOWS = 12
const COPIES = 50

const quantile = (values, q) => [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(q * values.length))]
const ms = (v) => `${v.toFixed(1)} ms`
const spread = (values) => `p50 ${ms(quantile(values, 0.5))}, p95 ${ms(quantile(values, 0.95))} (n=${values.length})`
const sleep = (t) => new Promise((done) => setTimeout(done, t))

/** Keeps `megabytes` of memory dirty, page by page, and prints the longest gap whenever it is asked to. */
const watcher = (megabytes) => `
import mmap, os, sys, threading, time
size = ${megabytes} << 20
memory = mmap.mmap(-1, size)
noise = os.urandom(1 << 20)
for at in range(0, size, 4096):
    memory[at:at + 4096] = noise[at * 7 % 1044480:][:4088] + at.to_bytes(8, 'little')
worst = 0.0
print('ready', flush=True)
def ask():
    global worst
    for line in sys.stdin:
        print('%.3f' % (worst * 1000), flush=True)
        worst = 0.0
threading.Thread(target=ask, daemon=True).start()
sys.setswitchinterval(10)
at = 0
last = time.monotonic()
while True:
    for _ in range(50):
        now = time.monotonic()
        if now - last > worst: worst = now - last
        last = now
    memory[at] = memory[at] ^ 1
    at = (at + 4096) % size
    if at % (4096 * 64) == 0: time.sleep(0); last = time.monotonic()
`

/** Bytes on disk below a directory, each inode once. */
function diskUsage(dir) {
  const seen = new Map()
  for (const entry of readdirSync(dir, { recursive: true, withFileTypes: true })) {
    if (!entry.isFile()) continue
    const { ino, blocks } = statSync(join(entry.parentPath, entry.name))
    seen.set(ino, blocks * 512)
  }
  return [...seen.values()].reduce((sum, bytes) => sum + bytes, 0)
}

async function pause(Sandbox, show, megabytes) {
  const sandbox = await Sandbox.create({ timeoutMs: 3_600_000 })
  await sandbox.files.write('/tmp/watch.py', watcher(megabytes))
  const lines = []
  let told
  const handle = await sandbox.commands.run('exec python3 /tmp/watch.py', {
    background: true,
    stdin: true,
    timeoutMs: 0,
    onStdout(text) {
      lines.push(...text.split('\n').filter(Boolean))
      told?.()
    },
  })
  const next = async () => {
    while (lines.length === 0) await new Promise((done) => (told = done))
    return lines.shift()
  }
  const ask = async () => {
    await sandbox.commands.sendStdin(handle.pid, '?\n')
    return Number(await next())
  }
  await next()
  const gaps = { with: [], without: [] }
  const took = []
  for (let i = 0; i < WINDOWS; i++) {
    await ask()
    await sleep(700)
    gaps.without.push(await ask())
    const began = performance.now()
    const { snapshotId } = await sandbox.createSnapshot()
    took.push(performance.now() - began)
    await sleep(Math.max(0, 700 - (performance.now() - began)))
    gaps.with.push(await ask())
    await Sandbox.deleteSnapshot(snapshotId)
  }
  await sandbox.kill()
  show(`longest gap in a guest process, ${megabytes} MB dirty, with a snapshot`, spread(gaps.with))
  show('... and in windows without one', spread(gaps.without))
  show(`createSnapshot() there: first, ${took.length - 1} later ones`, `${ms(took[0])}, ${spread(took.slice(1))}`)
}

async function bytes(Sandbox, show, home) {
  const sizes = []
  const took = []
  for (let i = 0; i < 10; i++) {
    const sandbox = await Sandbox.create()
    const before = diskUsage(home)
    const began = performance.now()
    const { snapshotId } = await sandbox.createSnapshot()
    took.push(performance.now() - began)
    sizes.push((diskUsage(home) - before) / 1e6)
    await sandbox.kill()
    await Sandbox.deleteSnapshot(snapshotId)
  }
  show('createSnapshot() of a fresh sandbox', `${spread(took)}, ${quantile(sizes, 0.5).toFixed(2)} MB on disk`)
  const sandbox = await Sandbox.create()
  await sandbox.createSnapshot()
  await sandbox.commands.run('head -c 20000000 /dev/urandom > /home/user/random && sync')
  let before = diskUsage(home)
  const began = performance.now()
  await sandbox.createSnapshot()
  const first = performance.now() - began
  show('... after 20 MB of new random data in a file', `${ms(first)}, ${((diskUsage(home) - before) / 1e6).toFixed(1)} MB more`)
  before = diskUsage(home)
  await sandbox.createSnapshot()
  show('... and once more', `${((diskUsage(home) - before) / 1e6).toFixed(2)} MB more`)
  await sandbox.kill()
}

async function copies(Sandbox, show) {
  const sandbox = await Sandbox.create()
  const { snapshotId } = await sandbox.createSnapshot()
  await sandbox.kill()
  const began = performance.now()
  const all = await Promise.all(
    Array.from({ length: COPIES }, async () => {
      const copy = await Sandbox.create(snapshotId)
      await copy.commands.run('echo hi')
      return copy
    }),
  )
  show(`${COPIES} copies at once, until all have answered`, ms(performance.now() - began))
  await Promise.all(all.map((copy) => copy.kill()))

  // A process of its own each time: nothing is decoded yet.
  const program = `
    import { Sandbox } from ${JSON.stringify(new URL('../index.mjs', import.meta.url).href)}
    const began = performance.now()
    const copy = await Sandbox.create(${JSON.stringify(snapshotId)})
    const created = performance.now() - began
    let heard
    await copy.commands.run('echo hi', { onStdout: () => (heard ??= performance.now() - began) })
    await copy.kill()
    console.log(JSON.stringify([created, heard]))`
  const runs = Array.from({ length: 10 }, () =>
    JSON.parse(execFileSync(process.execPath, ['--input-type=module', '-e', program], { encoding: 'utf8' })),
  )
  show('first create in a process; to the first byte of echo', `${spread(runs.map((r) => r[0]))}; ${spread(runs.map((r) => r[1]))}`)
}

/** Prints through `show(name, value)`. */
export async function captureBench(show) {
  const home = mkdtempSync(join(tmpdir(), 'amberbox-bench-'))
  process.env.AMBERBOX_HOME = home
  const { Sandbox } = await import('../index.mjs')
  try {
    await bytes(Sandbox, show, home)
    await pause(Sandbox, show, 200)
    await copies(Sandbox, show)
  } finally {
    rmSync(home, { recursive: true, force: true })
  }
}
