'use strict'
const {
  AuthenticationError,
  FileNotFoundError,
  FileType,
  InvalidArgumentError,
  NotEnoughSpaceError,
  NotFoundError,
} = require('..')
const { ownStore, failure, failures } = require('./support')

const store = ownStore()
let sandbox
let files

beforeAll(async () => {
  sandbox = await store.create()
  files = sandbox.files
})

test('text, bytes, blob and stream come back as they were written', async () => {
  const text = 'Grüße, 世界\n'
  const bytes = Uint8Array.from({ length: 300_000 }, (_, i) => (i * 7) & 255)
  const written = await files.write('a/b/text', text)
  expect(written).toEqual({ name: 'text', path: '/home/user/a/b/text', type: 'file', metadata: undefined })
  await files.write('buffer', bytes.buffer)
  await files.write('blob', new Blob([bytes.subarray(0, 1000), bytes.subarray(1000)]))
  await files.write(
    'stream',
    new ReadableStream({
      start(controller) {
        for (let at = 0; at < bytes.length; at += 50_000) controller.enqueue(bytes.subarray(at, at + 50_000))
        controller.close()
      },
    }),
  )
  expect(await files.read('/home/user/a/b/text')).toBe(text)
  for (const name of ['buffer', 'blob', 'stream']) {
    const got = await files.read(name, { format: 'bytes' })
    expect(got).toBeInstanceOf(Uint8Array)
    expect(Buffer.compare(got, bytes)).toBe(0)
  }
  const blob = await files.read('blob', { format: 'blob' })
  expect(Buffer.compare(Buffer.from(await blob.arrayBuffer()), bytes)).toBe(0)
  const pieces = []
  for await (const piece of await files.read('stream', { format: 'stream' })) pieces.push(piece)
  expect(Buffer.compare(Buffer.concat(pieces), bytes)).toBe(0)
})

test('an empty file is empty in every format', async () => {
  await files.write('empty', '')
  expect(await files.read('empty')).toBe('')
  expect(await files.read('empty', { format: 'bytes' })).toHaveLength(0)
  expect((await files.read('empty', { format: 'blob' })).size).toBe(0)
  const { done } = await (await files.read('empty', { format: 'stream' })).getReader().read()
  expect(done).toBe(true)
})

test('write replaces, keeps to the user, and takes many files', async () => {
  await files.write('twice', 'long content')
  await files.write('twice', 'short')
  expect(await files.read('twice')).toBe('short')
  expect(await files.getInfo('twice')).toMatchObject({ owner: 'user', group: 'user', mode: 0o644, size: 5 })
  await files.write('of-root', 'x', { user: 'root' })
  expect(await files.getInfo('/root/of-root')).toMatchObject({ owner: 'root' })
  const many = await files.writeFiles([
    { path: 'm/1', data: 'one' },
    { path: 'm/2', data: new Blob(['two']) },
  ])
  expect(many.map(({ path }) => path)).toEqual(['/home/user/m/1', '/home/user/m/2'])
  expect(await files.read('m/2')).toBe('two')
  expect(await files.write([])).toEqual([])
})

test('metadata is kept with the file and replaced on each write', async () => {
  const written = await files.write('meta', 'x', { metadata: { Author: 'me', kind: 'draft' } })
  expect(written.metadata).toEqual({ author: 'me', kind: 'draft' })
  expect((await files.getInfo('meta')).metadata).toEqual({ author: 'me', kind: 'draft' })
  await files.write('meta', 'y')
  expect((await files.getInfo('meta')).metadata).toBeUndefined()
  const bad = await failure(files.write('never', 'x', { metadata: { 'a b': 'c' } }))
  expect(bad).toBeInstanceOf(InvalidArgumentError)
  expect(await files.exists('never')).toBe(false)
})

test('list: order, depth, kinds', async () => {
  await files.write('tree/b/inner', 'x')
  await files.write('tree/a', 'x')
  await files.makeDir('tree/c')
  await sandbox.commands.run('ln -s ../a tree/c/link')
  const flat = await files.list('tree')
  expect(flat.map(({ name, type }) => [name, type])).toEqual([
    ['a', FileType.FILE],
    ['b', FileType.DIR],
    ['c', FileType.DIR],
  ])
  const deep = await files.list('tree', { depth: 2 })
  expect(deep.map(({ path }) => path.slice('/home/user/tree/'.length))).toEqual([
    'a',
    'b',
    'b/inner',
    'c',
    'c/link',
  ])
  expect(deep.at(-1)).toMatchObject({ type: 'file', symlinkTarget: '/home/user/tree/a' })
  expect(await failure(files.list('tree', { depth: 0 }))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(files.list('tree/a'))).toBeInstanceOf(InvalidArgumentError)
})

test('getInfo, exists, makeDir, rename, remove', async () => {
  expect(await files.exists('d')).toBe(false)
  expect(await files.makeDir('d/e')).toBe(true)
  expect(await files.makeDir('d/e')).toBe(false)
  expect(await files.getInfo('d')).toMatchObject({ type: 'dir', permissions: 'drwxr-xr-x', owner: 'user' })
  await files.write('d/e/f', 'x')
  const info = await files.getInfo('d/e/f')
  expect(info).toMatchObject({ name: 'f', path: '/home/user/d/e/f', type: 'file', permissions: '-rw-r--r--' })
  expect(Math.abs(info.modifiedTime.getTime() - Date.now())).toBeLessThan(120_000)
  expect(await files.rename('d/e/f', 'other/place/g')).toMatchObject({ path: '/home/user/other/place/g' })
  expect(await files.exists('d/e/f')).toBe(false)
  await files.remove('d')
  expect(await files.exists('d')).toBe(false)
  await expect(files.remove('d')).resolves.toBeUndefined()
})

test('what is missing or wrong has a class of its own', async () => {
  for (const error of await failures([
    files.read('nope'),
    files.getInfo('nope'),
    files.rename('nope', 'x'),
    files.list('nope'),
  ])) {
    expect(error).toBeInstanceOf(FileNotFoundError)
    expect(error).toBeInstanceOf(NotFoundError)
    expect(error.message).toContain('nope')
  }
  expect(await failure(files.read('/etc'))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(files.read('a\0b'))).toBeInstanceOf(InvalidArgumentError)
  expect((await failure(files.write())).message).toBe('Path or files are required')
  expect((await failure(files.write('x', [{ path: 'y', data: '' }]))).message).toContain(
    'Cannot specify both',
  )
  expect(await failure(files.write('x', 42))).toBeInstanceOf(InvalidArgumentError)
  expect(await files.exists('x')).toBe(false)
})

test('a full disk: typed error, nothing half written, the sandbox goes on', async () => {
  await sandbox.commands.run('mkdir /tmp/small && mount -t tmpfs -o size=1m tmpfs /tmp/small', {
    user: 'root',
  })
  await files.write('/tmp/small/keep', 'kept', { user: 'root' })
  const error = await failure(files.write('/tmp/small/keep', Buffer.alloc(4 << 20, 1), { user: 'root' }))
  expect(error).toBeInstanceOf(NotEnoughSpaceError)
  expect(await files.read('/tmp/small/keep')).toBe('kept')
  expect((await files.list('/tmp/small')).map(({ name }) => name)).toEqual(['keep'])
})

test('aborting a stream that is being written leaves what was there', async () => {
  await files.write('stable', 'before')
  const controller = new AbortController()
  const endless = (async function* () {
    for (let i = 0; ; i++) {
      if (i === 5) controller.abort()
      yield Buffer.alloc(10_000)
    }
  })()
  const error = await failure(files.write('stable', endless, { signal: controller.signal }))
  expect(error.name).toBe('AbortError')
  expect(await files.read('stable')).toBe('before')
})

test('strange paths: dots, long names, loops, special files, bytes that are no text, unknown users', async () => {
  await files.write('strange/../strange/./dots', 'x')
  expect((await files.getInfo('/home/user/strange/dots')).path).toBe('/home/user/strange/dots')
  expect((await files.write('../../../../tmp/up', 'x')).path).toBe('/tmp/up')
  for (const call of [
    files.write('n'.repeat(4096), 'x'),
    files.read(`${'d/'.repeat(2100)}f`),
    files.makeDir(`a\0b`),
    files.read('/etc/passwd/x'),
  ]) {
    expect(await failure(call)).toBeInstanceOf(InvalidArgumentError)
  }
  await sandbox.commands.run(
    'cd strange && ln -s loop2 loop1 && ln -s loop1 loop2 && ln -s nowhere broken && mkfifo pipe && printf x > "$(printf \'b\\377d\')"',
  )
  expect(await failure(files.read('strange/loop1'))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(files.read('strange/broken'))).toBeInstanceOf(FileNotFoundError)
  expect(await failure(files.read('strange/pipe'))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(files.write('strange/pipe', 'x'))).toBeInstanceOf(InvalidArgumentError)
  expect(await failure(files.read('/dev/zero'))).toBeInstanceOf(InvalidArgumentError)
  expect((await files.list('strange')).map(({ name, type }) => [name, type])).toEqual([
    ['broken', FileType.SYMLINK],
    ['b\ufffdd', FileType.FILE],
    ['dots', FileType.FILE],
    ['loop1', FileType.SYMLINK],
    ['loop2', FileType.SYMLINK],
  ])
  expect(await failure(files.write('x', 'x', { user: 'nobody-here' }))).toBeInstanceOf(AuthenticationError)
  expect(await files.exists('/proc/self/status')).toBe(true)
  expect(await files.read('/proc/version')).toMatch(/^Linux/)
})

test('ranges', async () => {
  await files.write('ranged', 'Hello, world!')
  expect(await files.read('ranged', { start: 7, end: 11 })).toBe('world')
  expect(await files.read('ranged', { start: 7 })).toBe('world!')
  expect(await files.read('ranged', { end: 4 })).toBe('Hello')
  for (const range of [{ start: -1 }, { start: 5, end: 2 }, { start: 0.5 }, { end: NaN }]) {
    expect(await failure(files.read('ranged', range))).toBeInstanceOf(InvalidArgumentError)
  }
})

test('large files: new ones and over old ones, whole and aborted', async () => {
  const data = Buffer.from(Uint8Array.from({ length: 9_000_001 }, (_, i) => (i * 31 + (i >> 12)) & 255))
  await files.write('large', data)
  expect(Buffer.compare(await files.read('large', { format: 'bytes' }), data)).toBe(0)
  const { stdout: inode } = await sandbox.commands.run('ln large linked; stat -c %i large')
  const other = data.subarray(1_234)
  await files.write('large', new Blob([other]))
  expect(Buffer.compare(await files.read('linked', { format: 'bytes' }), other)).toBe(0)
  expect((await sandbox.commands.run('stat -c %i large')).stdout).toBe(inode)
  const controller = new AbortController()
  const stream = (async function* () {
    for (let i = 0; i < 30; i++) {
      if (i === 20) controller.abort()
      yield data.subarray(i * 100_000, (i + 1) * 100_000)
    }
  })()
  expect((await failure(files.write('large', stream, { signal: controller.signal }))).name).toBe('AbortError')
  expect(Buffer.compare(await files.read('large', { format: 'bytes' }), other)).toBe(0)
  await sandbox.commands.run('mkdir /tmp/tight && mount -t tmpfs -o size=4m tmpfs /tmp/tight', {
    user: 'root',
  })
  for (const source of [
    data,
    (async function* () {
      yield data
    })(),
  ]) {
    const error = await failure(files.write('/tmp/tight/new', source, { user: 'root' }))
    expect(error).toBeInstanceOf(NotEnoughSpaceError)
  }
  expect(await files.list('/tmp/tight')).toEqual([])
})

test('many files at once, and the first failure of many', async () => {
  const many = Array.from({ length: 200 }, (_, i) => ({ path: `many/${i % 7}/${i}`, data: `content ${i}` }))
  const infos = await files.writeFiles(many)
  expect(infos.map(({ path }) => path)).toEqual(many.map(({ path }) => `/home/user/${path}`))
  const read = await Promise.all(many.map(({ path }) => files.read(path)))
  expect(read).toEqual(many.map(({ data }) => data))
  const bad = [
    { path: '/etc/passwd/x', data: 'x' },
    ...many.map((file) => ({ ...file, path: `never/${file.path}` })),
  ]
  expect(await failure(files.writeFiles(bad))).toBeInstanceOf(InvalidArgumentError)
  expect(
    await failure(
      files.writeFiles([
        { path: 'ok', data: 'x' },
        { path: 'bad', data: 42 },
      ]),
    ),
  ).toBeInstanceOf(InvalidArgumentError)
  expect(await files.exists('ok')).toBe(false)
})
