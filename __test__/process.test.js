'use strict'
/** How the addon lives in a Node process: what keeps it alive, how it ends, and what it leaves behind. */
const { existsSync, readdirSync, mkdtempSync, rmSync } = require('node:fs')
const os = require('node:os')
const path = require('node:path')
const { ownStore, program, until } = require('./support')
const { Sandbox } = require('..')

ownStore()

/** A store for one program, so that what it leaves behind can be seen. */
let home
beforeEach(() => {
  home = mkdtempSync(path.join(os.tmpdir(), 'amberbox-process-'))
})
afterEach(() => rmSync(home, { recursive: true, force: true }))

const run = (source, options = {}) =>
  program(`const { Sandbox } = require('./index.js');(async () => {${source}})()`, {
    ...options,
    env: { AMBERBOX_HOME: home, ...options.env },
  })

/** Files of the store that no whole snapshot accounts for. */
function leftovers() {
  return readdirSync(home, { recursive: true }).filter((name) => /tmp|temp|partial/i.test(name))
}

test('a running sandbox does not keep Node alive', async () => {
  const { code, stdout, stderr } = await run(`await Sandbox.create(); console.log('done')`)
  expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: 'done\n', stderr: '' })
})

test('a command that is waited for does', async () => {
  const source = `const s = await Sandbox.create(); console.log((await s.commands.run('sleep 1; echo waited')).stdout.trim())`
  const { code, stdout, stderr } = await run(source)
  expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: 'waited\n', stderr: '' })
})

test('process.exit in the middle of everything', async () => {
  const { code, stdout, stderr } = await run(`
    const s = await Sandbox.create()
    s.commands.run('sleep 600').catch(() => {})
    s.commands.run('while :; do echo x; done', { onStdout() {} }).catch(() => {})
    s.createSnapshot().catch(() => {})
    Sandbox.create().catch(() => {})
    setTimeout(() => { console.log('leaving'); process.exit(7) }, 500)
  `)
  expect({ code, stdout, stderr }).toEqual({ code: 7, stdout: 'leaving\n', stderr: '' })
})

test('a process killed during a snapshot leaves a whole snapshot or none, and no lock', async () => {
  const { signal } = await run(
    `const s = await Sandbox.create()
     await s.commands.run('head -c 50000000 /dev/urandom > /tmp/noise')
     s.createSnapshot({ name: 'cut' }).catch(() => {})
     console.log('now')
     setTimeout(() => {}, 60000)`,
    { onOutput: (text, child) => text.includes('now') && setTimeout(() => child.kill('SIGKILL'), 60) },
  )
  expect(signal).toBe('SIGKILL')
  const before = process.env.AMBERBOX_HOME
  process.env.AMBERBOX_HOME = home
  try {
    for (const { snapshotId } of await Sandbox.listSnapshots().nextItems()) {
      const copy = await Sandbox.create(snapshotId)
      expect((await copy.commands.run('stat -c %s /tmp/noise')).stdout).toBe('50000000\n')
      await copy.kill()
      expect(await Sandbox.deleteSnapshot(snapshotId)).toBe(true)
    }
    // The next writer cleans up behind the dead one.
    const sandbox = await Sandbox.create()
    const { snapshotId } = await sandbox.createSnapshot()
    await sandbox.kill()
    expect(await Sandbox.deleteSnapshot(snapshotId)).toBe(true)
  } finally {
    process.env.AMBERBOX_HOME = before
  }
  await until(
    () =>
      leftovers().filter((name) => !existsSync(path.join(home, name)) || name.includes('.tmp')).length === 0,
    5000,
  )
})

test('worker threads share the sandboxes and may end at any time', async () => {
  const { code, stdout, stderr } = await run(`
    const { Worker } = require('node:worker_threads')
    const worker = new Worker(\`
      const { parentPort } = require('node:worker_threads')
      const { Sandbox } = require('./index.js')
      ;(async () => {
        const s = await Sandbox.create()
        parentPort.postMessage({ id: s.sandboxId, out: (await s.commands.run('echo from worker')).stdout })
        s.commands.run('sleep 600').catch(() => {})
        s.commands.run('sleep 1; echo late').catch(() => {})
      })()
    \`, { eval: true })
    const { id, out } = await new Promise((done) => worker.once('message', done))
    console.log(out.trim())
    await new Promise((done) => setTimeout(done, 300))
    await worker.terminate()
    const same = await Sandbox.connect(id)
    console.log((await same.commands.run('sleep 2; echo from main')).stdout.trim())
    console.log(await same.kill())
  `)
  expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: 'from worker\nfrom main\ntrue\n', stderr: '' })
})

test('without an addon the error names cause and remedy', async () => {
  const { code, stderr } = await program(
    `Object.defineProperty(process, 'arch', { value: 'riscv64' }); require('./index.js')`,
  )
  expect(code).not.toBe(0)
  expect(stderr).toContain('no native addon for linux-riscv64-gnu')
  expect(stderr).toContain('npm run setup')
})
