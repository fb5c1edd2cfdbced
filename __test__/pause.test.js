'use strict'
/** Pause, resume, fork, and what a sandbox does by itself at its end. */
const { readdirSync } = require('node:fs')
const path = require('node:path')
const { InvalidArgumentError, Sandbox, SandboxError, SandboxNotFoundError, TimeoutError } = require('..')
const { ownStore, failure, program, until } = require('./support')

const store = ownStore()

const bootId = async (sandbox) =>
  (await sandbox.commands.run('cat /proc/sys/kernel/random/boot_id')).stdout.trim()
const listed = async (query) =>
  (await Sandbox.list({ query }).nextItems()).map(({ sandboxId, state }) => [sandboxId, state])

test('a paused sandbox keeps id, processes, files and environment', async () => {
  const group = `${Date.now()}-keep`
  const sandbox = await store.create({ metadata: { group }, envs: { KEPT: 'yes' }, timeoutMs: 600_000 })
  const id = sandbox.sandboxId
  const counter = await sandbox.commands.run(
    'n=0; while true; do n=$((n+1)); echo $n > /tmp/n; sleep 0.05; done',
    {
      background: true,
      timeoutMs: 0,
    },
  )
  const cut = failure(counter.wait())
  await sandbox.files.write('note.txt', 'before')
  await until(() => sandbox.files.exists('/tmp/n'))
  const { startedAt } = await sandbox.getInfo()
  const boot = await bootId(sandbox)
  const machine = await sandbox.files.read('/etc/machine-id')

  expect(await sandbox.pause()).toBe(true)
  expect(await cut).toBeInstanceOf(TimeoutError)
  expect(await sandbox.isRunning()).toBe(false)
  expect(await sandbox.pause()).toBe(false)
  expect(await Sandbox.betaPause(id)).toBe(false)
  const info = await sandbox.getInfo()
  expect(info).toMatchObject({ sandboxId: id, state: 'paused', startedAt, metadata: { group }, name: 'base' })
  expect(await listed({ metadata: { group } })).toEqual([[id, 'paused']])
  expect(await listed({ metadata: { group }, state: ['running'] })).toEqual([])
  // It is no snapshot that users see, and nothing can be made of it or asked of it.
  expect(await Sandbox.listSnapshots({ sandboxId: id }).nextItems()).toEqual([])
  expect(await Sandbox.deleteSnapshot(id)).toBe(false)
  expect((await failure(Sandbox.create(id))).message).toMatch(/^404: /)
  expect(await failure(sandbox.commands.run('true'))).toBeInstanceOf(TimeoutError)
  expect(await failure(sandbox.setTimeout(1000))).toBeInstanceOf(SandboxNotFoundError)
  expect(await failure(sandbox.createSnapshot())).toBeInstanceOf(SandboxNotFoundError)
  const conflict = await failure(sandbox.fork())
  expect(conflict).toBeInstanceOf(SandboxError)
  expect(conflict.message).toMatch(/^409: /)

  const frozen = Date.now()
  await until(() => Date.now() > frozen + 300)
  expect(await sandbox.connect()).toBe(sandbox)
  expect(await sandbox.isRunning()).toBe(true)
  expect(await listed({ metadata: { group } })).toEqual([[id, 'running']])
  expect((await sandbox.getInfo()).startedAt).toEqual(startedAt)
  // The same machine, not a copy that was told to be another one.
  expect(await bootId(sandbox)).toBe(boot)
  expect(await sandbox.files.read('/etc/machine-id')).toBe(machine)
  expect((await sandbox.commands.run('echo $KEPT; hostname')).stdout).toBe(`yes\n${id}\n`)
  expect(await sandbox.files.read('note.txt')).toBe('before')
  expect((await sandbox.commands.list()).map(({ pid }) => pid)).toContain(counter.pid)
  const n = Number(await sandbox.files.read('/tmp/n'))
  await until(async () => Number(await sandbox.files.read('/tmp/n')) > n)
  const clock = Number((await sandbox.commands.run('date +%s')).stdout)
  expect(Math.abs(clock - Date.now() / 1000)).toBeLessThan(30)
  expect(await sandbox.kill()).toBe(true)
})

test('changes survive many cycles, and each leaves no more behind than the last', async () => {
  const sandbox = await store.create()
  const expected = []
  for (let i = 0; i < 6; i++) {
    await sandbox.commands.run(`echo ${i} >> /tmp/log`)
    expected.push(i)
    await (i % 3 === 2 ? sandbox.pause({ keepMemory: false }) : sandbox.pause())
    await Sandbox.connect(sandbox.sandboxId)
    expect(await sandbox.files.read('/tmp/log')).toBe(expected.map((n) => `${n}\n`).join(''))
  }
  await sandbox.pause()
  expect(await sandbox.kill()).toBe(true)
  expect(await sandbox.kill()).toBe(false)
  expect(readdirSync(path.join(store.home, 'snapshots'))).not.toContain(sandbox.sandboxId)
  expect(readdirSync(path.join(store.home, 'tmp'))).toEqual([])
  expect(await failure(sandbox.connect())).toBeInstanceOf(SandboxNotFoundError)
  expect(await failure(sandbox.pause())).toBeInstanceOf(SandboxNotFoundError)
})

test('without memory it boots from its disk', async () => {
  const sandbox = await store.create({ envs: { KEPT: 'too' } })
  const boot = await bootId(sandbox)
  await sandbox.files.write('/home/user/file.txt', 'on disk')
  expect(await sandbox.pause({ mode: 'filesystem' })).toBe(true)
  await sandbox.connect()
  expect(await bootId(sandbox)).not.toBe(boot)
  expect(await sandbox.files.read('/home/user/file.txt')).toBe('on disk')
  const probe = 'echo $KEPT; hostname; id -un; python3 -c "print(6 * 7)"'
  expect((await sandbox.commands.run(probe)).stdout).toBe(`too\n${sandbox.sandboxId}\nuser\n42\n`)

  // The memory of a full pause can be thrown away afterwards.
  const second = await bootId(sandbox)
  await sandbox.files.write('/home/user/file.txt', 'changed')
  await sandbox.pause()
  await sandbox.connect({ onResume: 'reboot' })
  expect(await bootId(sandbox)).not.toBe(second)
  expect(await sandbox.files.read('/home/user/file.txt')).toBe('changed')
  await sandbox.kill()
})

test('a snapshot of the disk alone makes sandboxes that boot', async () => {
  const source = await store.create()
  const sleeper = await source.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  await source.files.write('/home/user/file.txt', 'on disk')
  const { snapshotId } = await source.createSnapshot({ mode: 'filesystem' })
  // The source runs on.
  expect((await source.commands.list()).map(({ pid }) => pid)).toEqual([sleeper.pid])
  const copy = await store.create(snapshotId)
  expect(await copy.files.read('/home/user/file.txt')).toBe('on disk')
  expect(await copy.commands.list()).toEqual([])
  expect(await copy.files.read('/etc/machine-id')).not.toBe(await source.files.read('/etc/machine-id'))
  expect(await bootId(copy)).not.toBe(await bootId(source))
  await copy.kill()
  expect(await Sandbox.deleteSnapshot(snapshotId)).toBe(true)
  await source.kill()
})

test('another process resumes, and of several only one', async () => {
  const sandbox = await store.create({ metadata: { moved: 'yes' } })
  const sleeper = await sandbox.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  sleeper.wait().catch(() => {})
  await sandbox.pause()
  const source = `
    const { Sandbox } = require('.')
    Sandbox.connect('${sandbox.sandboxId}').then(async (sandbox) => {
      const pids = (await sandbox.commands.list()).map(({ pid }) => pid)
      const { metadata } = await sandbox.getInfo()
      await sandbox.files.write('/home/user/from', 'elsewhere')
      await sandbox.pause()
      console.log(JSON.stringify({ pids, metadata }))
    }, (error) => console.log(error.name))`
  const results = await Promise.all([program(source), program(source)])
  expect(results.map(({ code, stderr }) => ({ code, stderr }))).toEqual(
    Array.from({ length: 2 }, () => ({ code: 0, stderr: '' })),
  )
  // They may also have been one after the other.
  const outputs = results.map(({ stdout }) => stdout.trim())
  const went = JSON.stringify({ pids: [sleeper.pid], metadata: { moved: 'yes' } })
  expect(outputs).toContain(went)
  for (const output of outputs) expect([went, 'SandboxNotFoundError']).toContain(output)
  await sandbox.connect()
  expect(await sandbox.files.read('/home/user/from')).toBe('elsewhere')
  expect((await sandbox.commands.list()).map(({ pid }) => pid)).toEqual([sleeper.pid])
  await sandbox.kill()
})

test('several connects at once resume once', async () => {
  const sandbox = await store.create()
  await sandbox.pause()
  const made = await Promise.all(Array.from({ length: 5 }, () => Sandbox.connect(sandbox.sandboxId)))
  expect(new Set(made.map(({ sandboxId }) => sandboxId))).toEqual(new Set([sandbox.sandboxId]))
  expect((await Promise.all(made.map((one) => one.isRunning()))).every(Boolean)).toBe(true)
  // Pauses and kills at once, too, in whatever order: each call has one of its documented ends.
  const changes = [sandbox.pause(), sandbox.connect().then(() => true), sandbox.pause()]
  const kills = await Promise.all([sandbox.kill(), sandbox.kill()])
  expect(kills.sort()).toEqual([false, true])
  for (const { value, reason } of await Promise.allSettled(changes)) {
    if (value === undefined) expect(reason).toBeInstanceOf(SandboxNotFoundError)
  }
  expect(await failure(sandbox.getInfo())).toBeInstanceOf(SandboxNotFoundError)
})

test('at its end a sandbox is paused, and a request resumes it', async () => {
  const sandbox = await store.create({
    timeoutMs: 600_000,
    lifecycle: { onTimeout: 'pause', autoResume: true },
  })
  expect((await sandbox.getInfo()).lifecycle).toEqual({ onTimeout: 'pause', autoResume: true })
  const boot = await bootId(sandbox)
  await sandbox.setTimeout(10)
  await until(async () => (await sandbox.getInfo()).state === 'paused')
  expect(await sandbox.isRunning()).toBe(false)
  await sandbox.commands.run('true').catch(() => {})
  // The life that it was given last was too short for more than one request.
  await sandbox.connect()
  expect(await bootId(sandbox)).toBe(boot)

  await sandbox.pause()
  expect(await sandbox.isRunning()).toBe(false)
  expect(await sandbox.files.exists('/etc/hostname')).toBe(true)
  expect(await sandbox.isRunning()).toBe(true)
  // What keeps no memory cannot go on where it was: it waits for connect.
  await sandbox.pause({ keepMemory: false })
  expect(await failure(sandbox.files.exists('/etc/hostname'))).toBeInstanceOf(TimeoutError)
  await sandbox.kill()

  const disk = await store.create({
    timeoutMs: 600_000,
    lifecycle: { onTimeout: { action: 'pause', keepMemory: false } },
  })
  const first = await bootId(disk)
  await disk.setTimeout(10)
  await until(async () => (await disk.getInfo()).state === 'paused')
  await disk.connect()
  expect(await bootId(disk)).not.toBe(first)
  await disk.kill()

  const killed = await store.create({ lifecycle: { onTimeout: { action: 'kill' } } })
  expect((await killed.getInfo()).lifecycle).toEqual({ onTimeout: 'kill', autoResume: false })
  await killed.setTimeout(10)
  await until(async () => !(await killed.isRunning()))
  expect(await failure(killed.connect())).toBeInstanceOf(SandboxNotFoundError)
})

test('wrong options are refused before anything is done', async () => {
  const metadata = { refused: `${Date.now()}` }
  for (const opts of [
    { lifecycle: { onTimeout: 'kill', autoResume: true } },
    { lifecycle: { autoResume: true } },
    { lifecycle: { onTimeout: { action: 'kill', keepMemory: true } } },
    { lifecycle: { onTimeout: { action: 'pause', keepMemory: false }, autoResume: true } },
    { lifecycle: { onTimeout: 'sleep' } },
    { network: { allowOut: 'everything' } },
    { network: { allowPublicTraffic: 'no' } },
  ]) {
    expect(await failure(Sandbox.create({ metadata, ...opts }))).toBeInstanceOf(InvalidArgumentError)
  }
  const cloud = [
    { mcp: { browserbase: {} } },
    { iam: { role: 'x' } },
    { volumeMounts: { '/data': 'volume' } },
    { network: { rules: { 'example.com': [] } } },
    { network: { egressProxy: 'socks5://x' } },
  ]
  for (const opts of cloud) {
    const error = await failure(Sandbox.create({ metadata, ...opts }))
    expect(error).toBeInstanceOf(SandboxError)
    expect(error).not.toBeInstanceOf(InvalidArgumentError)
  }
  expect((await failure(Sandbox.create({ mcp: { x: {} } }))).message).toMatch(
    /^Failed to start MCP gateway: /,
  )
  expect(await listed({ metadata })).toEqual([])
  expect(await failure(Sandbox.pause('i0', { mode: 'half' }))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(Sandbox.connect('i0', { onResume: 'wait' }))).toBeInstanceOf(InvalidArgumentError)
  expect(() => Sandbox.list({ query: { state: ['dead'] } })).toThrow(InvalidArgumentError)
  for (const call of ['pause', 'connect', 'getInfo', 'fork', 'getMetrics']) {
    expect(await failure(Sandbox[call]('iunknown'))).toBeInstanceOf(SandboxNotFoundError)
  }
})

test('network rules are kept, shown and replaced', async () => {
  const sandbox = await store.create({
    network: { denyOut: ({ allTraffic }) => [allTraffic], allowOut: ['1.1.1.1'], allowPublicTraffic: false },
    allowInternetAccess: true,
  })
  expect(sandbox.trafficAccessToken).toEqual(expect.any(String))
  const { network, allowInternetAccess } = await sandbox.getInfo()
  expect(network).toEqual({ denyOut: ['0.0.0.0/0'], allowOut: ['1.1.1.1'], allowPublicTraffic: false })
  expect(allowInternetAccess).toBe(true)
  await sandbox.updateNetwork({ denyOut: ['8.8.8.8'] })
  await sandbox.pause()
  const again = await Sandbox.connect(sandbox.sandboxId)
  expect(again.trafficAccessToken).toBe(sandbox.trafficAccessToken)
  expect((await again.getInfo()).network).toEqual({ denyOut: ['8.8.8.8'], allowPublicTraffic: false })
  await sandbox.kill()
})

test('fork: copies of a running sandbox, each its own, in the calling class', async () => {
  class Mine extends Sandbox {}
  const source = await Mine.create({ metadata: { of: 'fork' }, envs: { WHO: 'all' } })
  await source.files.write('/home/user/state.txt', 'before')
  const sleeper = await source.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
  const copies = await source.fork({ count: 3, timeoutMs: 60_000 })
  expect(copies).toHaveLength(3)
  for (const copy of copies) {
    expect(copy).toBeInstanceOf(Mine)
    expect(await copy.files.read('/home/user/state.txt')).toBe('before')
    expect((await copy.commands.list()).map(({ pid }) => pid)).toEqual([sleeper.pid])
    expect((await copy.getInfo()).metadata).toEqual({ of: 'fork' })
    expect((await copy.commands.run('echo $WHO; hostname')).stdout).toBe(`all\n${copy.sandboxId}\n`)
  }
  expect(new Set([source, ...copies].map(({ sandboxId }) => sandboxId)).size).toBe(4)
  expect(await source.isRunning()).toBe(true)
  await copies[0].files.write('/home/user/state.txt', 'after')
  expect(await source.files.read('/home/user/state.txt')).toBe('before')
  expect(await copies[1].files.read('/home/user/state.txt')).toBe('before')
  // Copies outlive their source, and can be paused, resumed and copied themselves.
  await source.kill()
  await copies[1].pause()
  await copies[1].connect()
  const [grandchild] = await Mine.fork(copies[1].sandboxId)
  expect(await grandchild.files.read('/home/user/state.txt')).toBe('before')
  expect(await Sandbox.listSnapshots().nextItems()).toEqual([])
  const { sandboxes, count } = await grandchild.clone({ count: 2, strict: true })
  expect([sandboxes.length, count]).toEqual([2, 2])
  expect(sandboxes[0]).toBeInstanceOf(Mine)
  await Promise.all(sandboxes.map((copy) => copy.kill()))
  await Promise.all([...copies, grandchild].map((copy) => copy.kill()))
  expect(readdirSync(path.join(store.home, 'tmp'))).toEqual([])

  for (const count of [0, -1, 1.5, 101]) {
    expect(await failure(Sandbox.fork(copies[0].sandboxId, { count }))).toBeInstanceOf(InvalidArgumentError)
  }
  expect(await failure(source.fork())).toBeInstanceOf(SandboxNotFoundError)
})

test('metrics: the present, a history, and nothing from before', async () => {
  const start = new Date()
  const sandbox = await store.create()
  const [now] = await sandbox.getMetrics()
  expect(now.timestamp).toBeInstanceOf(Date)
  expect(now.cpuCount).toBe(1)
  for (const name of ['cpuUsedPct', 'memUsed', 'memTotal', 'memCache', 'diskUsed', 'diskTotal']) {
    expect(now[name]).toBeGreaterThanOrEqual(0)
  }
  expect(now.memTotal).toBeGreaterThan(now.memUsed)
  expect(now.diskTotal).toBeGreaterThan(now.diskUsed)
  // A guest that works is sampled without being asked for.
  await sandbox.commands.run('timeout 12 sh -c "while :; do :; done"; true')
  const history = await Sandbox.getMetrics(sandbox.sandboxId, { start, end: new Date() })
  expect(history.length).toBeGreaterThanOrEqual(2)
  expect(Math.max(...history.map(({ cpuUsedPct }) => cpuUsedPct))).toBeGreaterThan(10)
  const times = history.map(({ timestamp }) => timestamp.getTime())
  expect(times).toEqual([...times].sort((a, b) => a - b))
  const hour = 3_600_000
  const before = { start: new Date(start.getTime() - hour), end: new Date(start.getTime() - hour / 2) }
  expect(await sandbox.getMetrics(before)).toEqual([])
  expect(await failure(sandbox.getMetrics({ start: 'never' }))).toBeInstanceOf(InvalidArgumentError)
  await sandbox.kill()
  expect(await failure(sandbox.getMetrics())).toBeInstanceOf(SandboxNotFoundError)
})
