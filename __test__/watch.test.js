'use strict'
const { FileNotFoundError, FilesystemEventType, InvalidArgumentError, TimeoutError } = require('..')
const { ownStore, failure, until } = require('./support')

const store = ownStore()
let sandbox
let files

beforeAll(async () => {
  sandbox = await store.create()
  files = sandbox.files
})

/** Watches, and collects events and exits. */
async function watch(path, opts) {
  const seen = { events: [], exits: [] }
  seen.handle = await files.watchDir(path, (event) => void seen.events.push(event), {
    ...opts,
    onExit: (...args) => void seen.exits.push(args),
  })
  seen.has = (name, type) => seen.events.some((event) => event.name === name && event.type === type)
  return seen
}

test('tells of every kind of change by its name', async () => {
  await files.makeDir('w/sub')
  const seen = await watch('w')
  await files.write('w/a', 'x')
  await files.write('w/a', 'y')
  await sandbox.commands.run('chmod 600 w/a; mv w/a w/b; rm w/b; touch w/sub/unseen')
  await until(() => seen.has('b', 'remove'))
  for (const [name, type] of [
    ['a', FilesystemEventType.CREATE],
    ['a', FilesystemEventType.WRITE],
    ['a', FilesystemEventType.CHMOD],
    ['a', FilesystemEventType.RENAME],
    ['b', FilesystemEventType.CREATE],
  ]) {
    expect({ name, type, seen: seen.has(name, type) }).toEqual({ name, type, seen: true })
  }
  expect(seen.events.filter(({ name }) => name.includes('/'))).toEqual([])
  expect(seen.events.every(({ entry }) => entry === undefined)).toBe(true)
  await seen.handle.stop()
  await until(() => seen.exits.length > 0)
  expect(seen.exits).toEqual([[]])
})

test('recursive: what is below, also in directories that appear later', async () => {
  await files.makeDir('r/old')
  const seen = await watch('r', { recursive: true, includeEntry: true })
  await sandbox.commands.run('mkdir -p r/n/e/w && echo x > r/n/e/w/f; echo y > r/old/g; rm r/old/g')
  await until(() => seen.has('n/e/w/f', 'write') && seen.has('old/g', 'remove'))
  expect(seen.has('n', 'create') && seen.has('n/e', 'create') && seen.has('n/e/w', 'create')).toBe(true)
  const created = seen.events.find(({ name, type }) => name === 'n' && type === 'create')
  expect(created.entry).toMatchObject({ type: 'dir', path: '/home/user/r/n', owner: 'user' })
  expect(seen.events.find(({ type }) => type === 'remove').entry).toBeUndefined()
  await seen.handle.stop()
})

test('events wait for the callback, in order; none is lost', async () => {
  await files.makeDir('busy')
  const names = []
  let running = 0
  const handle = await files.watchDir('busy', async ({ name, type }) => {
    expect(++running).toBe(1)
    await null
    if (type === 'create') names.push(name)
    running--
  })
  await sandbox.commands.run('for i in $(seq 1000); do : > busy/$i; done')
  await until(() => names.length >= 1000)
  expect(names).toEqual(Array.from({ length: 1000 }, (_, i) => String(i + 1)))
  await handle.stop()
})

test('what cannot be watched is refused', async () => {
  await files.write('plain', 'x')
  expect(await failure(files.watchDir('missing', () => {}))).toBeInstanceOf(FileNotFoundError)
  expect(await failure(files.watchDir('plain', () => {}))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(files.watchDir('.', 'not a function'))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(files.watchDir('.', () => {}, { timeoutMs: -1 }))).toBeInstanceOf(InvalidArgumentError)
})

test('a watch ends with its time, its signal, its callback, its directory, its sandbox', async () => {
  await files.makeDir('end/gone')
  const timed = await watch('end', { timeoutMs: 300 })
  const controller = new AbortController()
  const aborted = await watch('end', { signal: controller.signal })
  const gone = await watch('end/gone')
  const exits = []
  await files.watchDir(
    'end',
    async () => {
      throw new Error('from the callback')
    },
    { onExit: (error) => void exits.push(error) },
  )
  const other = await store.create()
  const killed = []
  await other.files.watchDir('/tmp', () => {}, { onExit: (error) => void killed.push(error) })
  controller.abort(new Error('enough'))
  await files.write('end/x', 'x')
  await files.remove('end/gone')
  await other.kill()
  await until(() =>
    [timed.exits, aborted.exits, gone.exits, exits, killed].every((list) => list.length === 1),
  )
  expect(timed.exits[0][0]).toBeInstanceOf(TimeoutError)
  expect(aborted.exits[0][0].message).toBe('enough')
  expect(gone.exits[0]).toEqual([])
  expect(exits[0].message).toBe('from the callback')
  expect(killed[0]).toBeInstanceOf(TimeoutError)
})

test('three hundred watches at once', async () => {
  await files.makeDir('many')
  let count = 0
  const handles = await Promise.all(
    Array.from({ length: 300 }, () =>
      files.watchDir('many', ({ type }) => void (count += Number(type === 'create'))),
    ),
  )
  await files.write('many/one', 'x')
  await until(() => count >= 300)
  await Promise.all(handles.map((handle) => handle.stop()))
})
