'use strict'
const {
  createReadStream,
  createWriteStream,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
} = require('node:fs')
const os = require('node:os')
const path = require('node:path')
const { Readable } = require('node:stream')
const { Sandbox, SandboxError, InvalidArgumentError, store } = require('..')
const { ownStore, failure, program } = require('./support')

const own = ownStore()
const scratch = mkdtempSync(path.join(os.tmpdir(), 'amberbox-move-test-'))
afterAll(() => rmSync(scratch, { recursive: true, force: true }))

/** Runs `body` with another store, as another machine would have. */
async function elsewhere(home, body) {
  const before = process.env.AMBERBOX_HOME
  process.env.AMBERBOX_HOME = home
  try {
    return await body()
  } finally {
    process.env.AMBERBOX_HOME = before
  }
}

test('a snapshot moves to another store as one file, or as a stream without what is there', async () => {
  const source = await own.create({ metadata: { made: 'here' } })
  await source.files.write('/tmp/note', 'first')
  const first = await source.createSnapshot({ name: 'moving' })
  await source.files.write('/tmp/note', 'second')
  const second = await source.createSnapshot()
  expect(second).toMatchObject({ sandboxId: source.sandboxId, metadata: { made: 'here' } })
  expect(await Sandbox.listSnapshots({ name: second.snapshotId }).nextItems()).toEqual([second])

  const file = path.join(scratch, 'first')
  const whole = await Sandbox.exportSnapshot('moving', file)
  expect(whole).toEqual({
    snapshotId: first.snapshotId,
    bytes: statSync(file).size,
    layers: expect.any(Number),
    leftOut: 0,
  })
  expect(await failure(Sandbox.exportSnapshot('moving', file))).toBeInstanceOf(SandboxError)
  expect(await failure(Sandbox.exportSnapshot('unknown', `${file}.x`))).toBeInstanceOf(SandboxError)
  expect(await failure(Sandbox.exportSnapshot('moving', 7))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(Sandbox.importSnapshot(7))).toBeInstanceOf(InvalidArgumentError)

  const there = path.join(scratch, 'store')
  await elsewhere(there, async () => {
    expect(await Sandbox.importSnapshot(file)).toEqual({ snapshotId: first.snapshotId, names: ['moving'] })
    const copy = await own.create('moving')
    expect(await copy.files.read('/tmp/note')).toBe('first')
    await copy.kill()
  })

  const known = await elsewhere(there, () => store.layers())
  const stream = path.join(scratch, 'second')
  const part = await Sandbox.exportSnapshot(second.snapshotId, createWriteStream(stream), { without: known })
  expect(part.leftOut).toBeGreaterThan(0)
  expect(part.bytes).toBe(statSync(stream).size)
  expect(part.bytes).toBeLessThan(whole.bytes / 5)
  await elsewhere(there, async () => {
    const { snapshotId } = await Sandbox.importSnapshot(createReadStream(stream))
    const copy = await own.create(snapshotId)
    expect(await copy.files.read('/tmp/note')).toBe('second')
    await copy.kill()
    expect(await store.verify()).toMatchObject({ snapshots: 2, problems: [] })
  })
  const damaged = Buffer.from(readFileSync(stream))
  damaged[damaged.length - 100] ^= 1
  const refused = await elsewhere(path.join(scratch, 'other'), () =>
    failure(Sandbox.importSnapshot(Readable.from([damaged]))),
  )
  expect(refused).toBeInstanceOf(SandboxError)
  expect(refused).not.toBeInstanceOf(InvalidArgumentError)
  await source.kill()
})

test('deleted by force: its copies run on, the bytes come back, and their next snapshot is whole', async () => {
  const source = await own.create()
  await source.commands.run('head -c 4000000 /dev/urandom > /tmp/random; sha256sum /tmp/random > /tmp/sum')
  const { snapshotId, ownSize } = await source.createSnapshot()
  expect(ownSize).toBeGreaterThan(4_000_000)
  await source.kill()
  const copy = await own.create(snapshotId)
  const before = await store.du()
  expect(before.snapshots.find((s) => s.snapshotId === snapshotId).bytes).toBeGreaterThan(4_000_000)
  const refused = await failure(Sandbox.deleteSnapshot(snapshotId))
  expect(refused.message).toContain(copy.sandboxId)
  expect(await Sandbox.deleteSnapshot(snapshotId, { force: true })).toBe(true)
  expect(await Sandbox.deleteSnapshot(snapshotId, { force: true })).toBe(false)
  const after = await store.du()
  expect(before.layerBytes - after.layerBytes).toBeGreaterThan(4_000_000)
  expect((await copy.commands.run('sha256sum -c /tmp/sum')).stdout).toContain('OK')
  const again = await copy.createSnapshot()
  await copy.kill()
  const third = await own.create(again.snapshotId)
  expect((await third.commands.run('sha256sum -c /tmp/sum')).stdout).toContain('OK')
  await third.kill()
  expect(await Sandbox.deleteSnapshot(again.snapshotId)).toBe(true)
})

test('amberbox store: verify, du, gc, export and import from the command line', async () => {
  const source = await own.create()
  const { snapshotId } = await source.createSnapshot()
  await source.kill()
  const cli = async (...args) => {
    const call = `require('./cli/store').run({ json: ${args[0] === '--json'} }, ${JSON.stringify(args.filter((a) => a !== '--json'))})`
    return program(`${call}.then((code) => (process.exitCode = code))`)
  }
  expect(await cli('verify')).toMatchObject({ code: 0, stdout: expect.stringContaining('no problems') })
  expect((await cli('du')).stdout).toContain(`${snapshotId}:default`)
  expect(JSON.parse((await cli('--json', 'gc')).stdout)).toEqual({ layers: 0, bytes: 0, unreadable: 0 })
  const file = path.join(scratch, 'by-hand')
  expect(await cli('export', snapshotId, file)).toMatchObject({ code: 0 })
  expect((await cli('import', file)).stdout).toBe(`${snapshotId}\n`)
  expect((await cli('layers')).stdout.trim().split('\n')).toEqual(await store.layers())
  expect(await cli('import')).toMatchObject({ code: 2 })
  expect(await cli('unknown')).toMatchObject({ code: 2 })
})

test('a quota is kept, and the sandbox runs on', async () => {
  const { code, stdout, stderr } = await program(
    `
    const { Sandbox, NotEnoughSpaceError } = require('.')
    ;(async () => {
      const sandbox = await Sandbox.create()
      await sandbox.commands.run('head -c 3000000 /dev/urandom > /tmp/random')
      const error = await sandbox.createSnapshot().catch((error) => error)
      console.log(error instanceof Error, error.message)
      console.log((await sandbox.commands.run('echo alive')).stdout)
      await sandbox.kill()
    })()`,
    { env: { AMBERBOX_HOME: path.join(scratch, 'small'), AMBERBOX_STORE_QUOTA: '2M' } },
  )
  expect(stderr).toBe('')
  expect(code).toBe(0)
  expect(stdout).toMatch(/^true .*quota/)
  expect(stdout).toContain('alive')
})
