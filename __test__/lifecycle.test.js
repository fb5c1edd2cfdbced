'use strict'
const { Sandbox, SandboxNotFoundError, TimeoutError } = require('..')
const { ownStore, failure, failures, until } = require('./support')

const store = ownStore()

test('create, connect, getInfo, kill', async () => {
  const before = Date.now()
  const sandbox = await store.create({ metadata: { a: '1' }, timeoutMs: 60_000 })
  expect(sandbox).toBeInstanceOf(Sandbox)
  expect(sandbox.sandboxId).toMatch(/^i[a-z0-9]{19}$/)
  const info = await sandbox.getInfo()
  expect(info).toMatchObject({
    sandboxId: sandbox.sandboxId,
    name: 'base',
    metadata: { a: '1' },
    state: 'running',
    cpuCount: 1,
    memoryMB: 512,
  })
  expect(['kvm', 'soft']).toContain(info.backend)
  expect(info.backendReason.length).toBeGreaterThan(10)
  expect(info.startedAt.getTime()).toBeGreaterThanOrEqual(before)
  expect(info.endAt.getTime() - info.startedAt.getTime()).toBeGreaterThan(59_000)
  expect(info.endAt.getTime() - info.startedAt.getTime()).toBeLessThan(61_000)
  expect(await Sandbox.getInfo(sandbox.sandboxId)).toEqual(info)

  const again = await Sandbox.connect(sandbox.sandboxId)
  expect((await again.commands.run('echo same')).stdout).toBe('same\n')
  expect(await sandbox.isRunning()).toBe(true)

  expect(await sandbox.kill()).toBe(true)
  expect(await sandbox.kill()).toBe(false)
  expect(await Sandbox.kill('iunknown')).toBe(false)
  expect(await sandbox.isRunning()).toBe(false)
  for (const error of await failures([
    sandbox.getInfo(),
    sandbox.setTimeout(1000),
    Sandbox.connect(sandbox.sandboxId),
  ])) {
    expect(error).toBeInstanceOf(SandboxNotFoundError)
  }
})

test('setTimeout moves the end both ways, connect only extends it', async () => {
  const sandbox = await store.create({ timeoutMs: 100_000 })
  const endAt = async () => (await sandbox.getInfo()).endAt.getTime()
  const first = await endAt()
  await sandbox.setTimeout(200_000)
  const longer = await endAt()
  expect(longer - first).toBeGreaterThan(95_000)
  await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 1000 })
  expect(await endAt()).toBe(longer)
  await sandbox.connect({ timeoutMs: 300_000 })
  expect(await endAt()).toBeGreaterThan(longer)
  await Sandbox.setTimeout(sandbox.sandboxId, 50_000)
  expect(await endAt()).toBeLessThan(longer)
})

test('a sandbox ends at its timeout; what was running says so', async () => {
  const sandbox = await store.create()
  const running = failure(sandbox.commands.run('sleep 600', { timeoutMs: 0 }))
  const reading = failure(
    sandbox.commands.run('sleep 600', { background: true }).then((handle) => handle.wait()),
  )
  await until(async () => (await sandbox.commands.list()).length === 2)
  await sandbox.setTimeout(500)
  for (const error of [await running, await reading]) {
    expect(error).toBeInstanceOf(TimeoutError)
    expect(error.message).toContain('sandbox was killed or reached its end of life')
  }
  expect(await sandbox.isRunning()).toBe(false)
  expect(await failure(sandbox.commands.run('true'))).toBeInstanceOf(TimeoutError)
  expect(await failure(sandbox.files.read('/etc/hostname'))).toBeInstanceOf(TimeoutError)
})

test('kill ends commands that run', async () => {
  const sandbox = await store.create()
  const handle = await sandbox.commands.run('sleep 600', { background: true })
  const waiting = failure(handle.wait())
  await sandbox.kill()
  const error = await waiting
  expect(error).toBeInstanceOf(TimeoutError)
  expect(error.message).toContain('sandbox was killed or reached its end of life')
})

test('list: filters, order, pages', async () => {
  const group = `${Date.now()}`
  const made = []
  for (const n of [1, 2, 3])
    made.push(await store.create({ metadata: { group, n: `${n}`, odd: `${n % 2}` } }))
  const ids = made.map(({ sandboxId }) => sandboxId)
  const list = async (opts) => (await Sandbox.list(opts).nextItems()).map(({ sandboxId }) => sandboxId)

  expect(await list({ query: { metadata: { group } } })).toEqual([...ids].reverse())
  expect(await list({ query: { metadata: { group } }, order: 'asc' })).toEqual(ids)
  expect(await list({ query: { metadata: { group, odd: '1' } } })).toEqual([ids[2], ids[0]])
  expect(await list({ query: { metadata: { group }, state: ['paused'] } })).toEqual([])
  expect(await list({ query: { metadata: { group }, template: 'base' } })).toHaveLength(3)
  expect(await list({ query: { metadata: { group }, template: 'unknown' } })).toEqual([])
  const { startedAt } = await made[1].getInfo()
  expect(await list({ query: { metadata: { group }, startedAfter: startedAt } })).toEqual([ids[2], ids[1]])

  const pages = Sandbox.list({ query: { metadata: { group } }, limit: 2 })
  expect((await pages.nextItems()).map((s) => s.sandboxId)).toEqual([ids[2], ids[1]])
  expect(pages.hasNext).toBe(true)
  expect((await pages.nextItems()).map((s) => s.sandboxId)).toEqual([ids[0]])
  expect(pages.hasNext).toBe(false)
  expect((await failure(pages.nextItems())).message).toBe('No more items to fetch')
})

test('Symbol.asyncDispose kills, also a sandbox that is gone', async () => {
  const sandbox = await store.create()
  await sandbox[Symbol.asyncDispose]()
  expect(await sandbox.isRunning()).toBe(false)
  await expect(sandbox[Symbol.asyncDispose]()).resolves.toBeUndefined()
})

test('a subclass gets its own class', async () => {
  class Mine extends Sandbox {}
  const mine = await Mine.create()
  expect(mine).toBeInstanceOf(Mine)
  expect(await Mine.connect(mine.sandboxId)).toBeInstanceOf(Mine)
  await mine.kill()
})

test('an aborted create leaves no sandbox behind', async () => {
  const metadata = { aborted: `${Date.now()}` }
  const controller = new AbortController()
  const creating = failure(Sandbox.create({ metadata, signal: controller.signal }))
  controller.abort()
  expect((await creating).name).toBe('AbortError')
  expect(await Sandbox.list({ query: { metadata } }).nextItems()).toEqual([])
})

test('a reset module registry and another context see the same sandboxes', async () => {
  const sandbox = await store.create()
  jest.resetModules()
  const fresh = require('..')
  expect(fresh.Sandbox).not.toBe(Sandbox)
  const same = await fresh.Sandbox.connect(sandbox.sandboxId)
  expect((await same.commands.run('echo shared')).stdout).toBe('shared\n')
  expect(await same.kill()).toBe(true)
  expect(await sandbox.isRunning()).toBe(false)
})
