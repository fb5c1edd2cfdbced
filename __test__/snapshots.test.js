'use strict'
const { Sandbox, SandboxError, SandboxNotFoundError, InvalidArgumentError } = require('..')
const { ownStore, failure, until } = require('./support')

const store = ownStore()

/** A counter that lives in the memory of one guest process only, and answers over two pipes. */
const COUNTER = `
import os
os.mkfifo('/tmp/in'); os.mkfifo('/tmp/out')
count = 0
while True:
    with open('/tmp/in') as f: count += int(f.read())
    with open('/tmp/out', 'w') as f: f.write(str(count))
`
const add = async (sandbox, n) => {
  const { stdout } = await sandbox.commands.run(`echo ${n} > /tmp/in; cat /tmp/out`)
  return Number(stdout)
}

test('memory of a running process survives into each copy and diverges there', async () => {
  const source = await store.create({ metadata: { job: '42' } })
  await source.files.write('/tmp/counter.py', COUNTER)
  const counter = await source.commands.run('exec python3 /tmp/counter.py', {
    background: true,
    timeoutMs: 0,
  })
  await until(() => source.files.exists('/tmp/out'))
  expect(await add(source, 40)).toBe(40)

  const id = source.sandboxId
  const snapshot = await source.createSnapshot()
  expect(snapshot).toEqual({
    snapshotId: expect.any(String),
    names: [],
    tag: 'default',
    createdAt: expect.any(Date),
    size: expect.any(Number),
    ownSize: expect.any(Number),
    parentId: (await source.getInfo()).templateId,
    sandboxId: id,
    metadata: { job: '42' },
  })
  expect(snapshot.ownSize).toBeLessThan(snapshot.size)
  // The source goes on: same id, same process, same memory, and its open command still has its handle.
  expect(source.sandboxId).toBe(id)
  expect(await source.isRunning()).toBe(true)
  expect(await add(source, 1)).toBe(41)

  const [a, b] = await Promise.all([1, 2].map(() => store.create(snapshot.snapshotId)))
  expect(new Set([id, a.sandboxId, b.sandboxId]).size).toBe(3)
  expect(await add(a, 2)).toBe(42)
  expect(await add(b, 60)).toBe(100)
  expect(await add(a, 1)).toBe(43)
  expect(await add(source, 1)).toBe(42)

  // The process keeps its id in each copy and can be reached there.
  const inCopy = await a.commands.connect(counter.pid)
  expect(await a.commands.kill(counter.pid)).toBe(true)
  expect((await failure(inCopy.wait())).error).toBe('signal: killed')
  expect(await add(b, 0)).toBe(100)

  expect((await a.getInfo()).templateId).toBe(snapshot.snapshotId)
  expect((await a.getInfo()).metadata).toEqual({})

  // Files are private to each copy as well.
  await a.files.write('/tmp/mine', 'a')
  expect(await b.files.exists('/tmp/mine')).toBe(false)
  expect(await source.files.exists('/tmp/mine')).toBe(false)

  // In use: refused, with the names of the users.
  const refused = await failure(Sandbox.deleteSnapshot(snapshot.snapshotId))
  expect(refused).toBeInstanceOf(SandboxError)
  expect(refused.message).toMatch(/^400: cannot delete template/)
  expect(refused.message).toContain(a.sandboxId)
  expect(refused.message).toContain(b.sandboxId)
  expect(refused.message.replace(snapshot.snapshotId, '')).not.toContain(id)

  // Killing the source leaves snapshot and copies alone.
  await source.kill()
  expect(await add(b, 1)).toBe(101)
  const late = await store.create(snapshot.snapshotId)
  expect(await add(late, 0)).toBe(40)

  await Promise.all([a, b, late].map((sandbox) => sandbox.kill()))
  expect(await Sandbox.deleteSnapshot(snapshot.snapshotId)).toBe(true)
  expect(await Sandbox.deleteSnapshot(snapshot.snapshotId)).toBe(false)
  const gone = await failure(Sandbox.create(snapshot.snapshotId))
  expect(gone).toBeInstanceOf(SandboxError)
  expect(gone.message).toMatch(/^404: /)
})

test('a copy knows that it is one: host name, machine id, random numbers, environment, clock', async () => {
  const source = await store.create({ envs: { WHO: 'source' } })
  const { snapshotId } = await source.createSnapshot()
  const copies = await Promise.all(
    [1, 2].map((n) => store.create(snapshotId, { envs: { WHO: `copy ${n}` } })),
  )
  const probe = 'hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; echo "$WHO"; date +%s'
  const seen = await Promise.all(
    [source, ...copies].map(async (s) => (await s.commands.run(probe)).stdout.split('\n')),
  )
  expect(seen.map(([host]) => host)).toEqual([source, ...copies].map(({ sandboxId }) => sandboxId))
  expect(new Set(seen.map((lines) => lines[1])).size).toBe(3)
  expect(new Set(seen.map((lines) => lines[2])).size).toBe(3)
  expect(seen.map((lines) => lines[3])).toEqual(['source', 'copy 1', 'copy 2'])
  for (const lines of seen) expect(Math.abs(Number(lines[4]) - Date.now() / 1000)).toBeLessThan(30)
})

/** Writes a random number, the time and the host name to a file, over and over. */
const DRAW = `
import os, time
with open('/tmp/draws', 'wb', 0) as f:
    while True:
        f.write(b'%s %d %s\\n' % (os.urandom(12).hex().encode(), time.time_ns(), os.uname().nodename.encode()))
        time.sleep(0.002)
`

test('no process of a copy runs before it knows that it is one, and no two copies draw the same', async () => {
  const source = await store.create()
  await source.files.write('/tmp/draw.py', DRAW)
  await source.commands.run('exec python3 /tmp/draw.py', { background: true, timeoutMs: 0 })
  await until(() => source.files.exists('/tmp/draws'))
  const { snapshotId } = await source.createSnapshot()
  const copies = await Promise.all(Array.from({ length: 5 }, () => store.create(snapshotId)))
  const identity =
    'cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1; ' +
    `python3 -c 'import os, random, uuid; print(os.getrandom(16).hex(), random.random(), uuid.uuid4())'`
  const seen = await Promise.all(
    [source, ...copies].map(async (sandbox) =>
      (await sandbox.commands.run(identity)).stdout.trim().split(/\n/),
    ),
  )
  const values = seen.flatMap((lines) =>
    lines.flatMap((line, i) => (i === 3 ? line.split(' ') : [line.trim()])),
  )
  expect(values).toHaveLength(6 * 6)
  expect(new Set(values).size).toBe(values.length)

  const logs = await Promise.all(
    [source, ...copies].map(async (sandbox) => {
      const text = await sandbox.files.read('/tmp/draws')
      return new Map(
        text
          .split('\n')
          .slice(0, -1)
          .map((line) => [line.split(' ')[0], line]),
      )
    }),
  )
  const [original, ...others] = logs
  for (const [i, log] of others.entries()) {
    const lines = [...log.values()]
    const inherited = lines.filter((line) => original.has(line.split(' ')[0]))
    // A number that both have was drawn before the snapshot, by the one process that there was: all of its line is the same. The
    // snapshot may have come after the last number, and before the rest of its line.
    for (const line of inherited.slice(0, -1)) expect(line).toBe(original.get(line.split(' ')[0]))
    const own = lines.slice(inherited.length)
    expect(own.length).toBeGreaterThan(0)
    expect(new Set(own.map((line) => line.split(' ')[2]))).toEqual(new Set([copies[i].sandboxId]))
  }
  const all = others.flatMap((log) => [...log.keys()].filter((value) => !original.has(value)))
  expect(new Set(all).size).toBe(all.length)
  await Promise.all(copies.map((copy) => copy.kill()))
})

test('programs in /etc/amberbox/restore.d run in a copy before anybody gets it, with its own identity', async () => {
  const source = await store.create()
  const place = '/etc/amberbox/restore.d'
  await source.commands.run(
    `mkdir -p ${place} && cd ${place} &&
     printf '#!/bin/sh\\nid -un >> /tmp/restored; hostname >> /tmp/restored\\n' > 10-first &&
     printf '#!/bin/sh\\necho second >> /tmp/restored; exit 1\\n' > 20-second &&
     printf 'not a program' > 30-third && chmod +x 10-first 20-second`,
    { user: 'root' },
  )
  const { snapshotId } = await source.createSnapshot()
  expect(await source.files.exists('/tmp/restored')).toBe(false)
  const copy = await store.create(snapshotId)
  expect(await copy.files.read('/tmp/restored')).toBe(`root\n${copy.sandboxId}\nsecond\n`)
})

test('a snapshot of a copy of a snapshot', async () => {
  let sandbox = await store.create()
  for (const generation of [1, 2, 3]) {
    await sandbox.commands.run(`echo ${generation} >> /tmp/generations`)
    const { snapshotId } = await Sandbox.createSnapshot(sandbox.sandboxId)
    sandbox = await store.create(snapshotId)
  }
  expect(await sandbox.files.read('/tmp/generations')).toBe('1\n2\n3\n')
})

test('listing: newest first, by source, by name, in pages', async () => {
  const [one, two] = [await store.create(), await store.create()]
  const made = []
  for (let i = 0; i < 3; i++) made.unshift((await one.createSnapshot()).snapshotId)
  const other = await two.createSnapshot({ name: 'Listed-Name' })
  expect(other.names).toEqual(['listed-name'])

  const ids = []
  const pages = one.listSnapshots({ limit: 2 })
  expect(pages.hasNext).toBe(true)
  ids.push((await pages.nextItems()).map((s) => s.snapshotId))
  expect(pages.hasNext).toBe(true)
  expect(pages.nextToken).toEqual(expect.any(String))
  const resumed = Sandbox.listSnapshots({ sandboxId: one.sandboxId, limit: 2, nextToken: pages.nextToken })
  ids.push((await pages.nextItems()).map((s) => s.snapshotId))
  expect(ids).toEqual([made.slice(0, 2), made.slice(2)])
  expect(pages.hasNext).toBe(false)
  expect(pages.nextToken).toBeUndefined()
  expect((await failure(pages.nextItems())).message).toBe('No more items to fetch')
  expect((await resumed.nextItems()).map((s) => s.snapshotId)).toEqual(made.slice(2))

  const all = await Sandbox.listSnapshots().nextItems()
  expect(all[0]).toEqual(other)
  expect(all.map((s) => s.snapshotId)).toEqual(expect.arrayContaining(made))
  expect(await Sandbox.listSnapshots({ name: 'listed-name' }).nextItems()).toEqual([other])
  expect(await Sandbox.listSnapshots({ name: 'unknown' }).nextItems()).toEqual([])
  expect(await Sandbox.listSnapshots({ sandboxId: 'iunknown' }).nextItems()).toEqual([])
})

test('a name: usable as template, moves to the newest content under the same id', async () => {
  const sandbox = await store.create()
  await sandbox.files.write('/tmp/version', '1')
  const first = await sandbox.createSnapshot({ name: 'versioned' })
  await sandbox.files.write('/tmp/version', '2')
  const second = await sandbox.createSnapshot({ name: 'versioned' })
  expect([second.snapshotId, second.names]).toEqual([first.snapshotId, first.names])
  expect(second.createdAt.getTime()).toBeGreaterThan(first.createdAt.getTime())
  const copy = await store.create('versioned')
  expect(await copy.files.read('/tmp/version')).toBe('2')
  expect((await copy.getInfo()).name).toBe('versioned')
  expect(await failure(sandbox.createSnapshot({ name: 'not a name' }))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(sandbox.createSnapshot({ name: 'base' }))).toBeInstanceOf(InvalidArgumentError)
  await copy.kill()
  expect(await Sandbox.deleteSnapshot('versioned')).toBe(true)
})

test('several snapshots at once take turns; a kill waits for the one that is being made', async () => {
  const sandbox = await store.create()
  const taken = await Promise.all([1, 2, 3].map(() => sandbox.createSnapshot()))
  expect(new Set(taken.map((snapshot) => snapshot.snapshotId)).size).toBe(3)
  // Which of them comes first is nobody's promise, but each is whole or fails.
  const last = Promise.allSettled([sandbox.createSnapshot(), sandbox.createSnapshot()])
  expect(await sandbox.kill()).toBe(true)
  for (const { value, reason } of await last) {
    if (value === undefined) {
      expect(reason).toBeInstanceOf(SandboxError)
    } else {
      const copy = await store.create(value.snapshotId)
      expect((await copy.commands.run('echo whole')).stdout).toBe('whole\n')
    }
  }
  expect(await failure(sandbox.createSnapshot())).toBeInstanceOf(SandboxNotFoundError)
})
