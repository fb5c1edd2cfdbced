'use strict'
/** Command handles over event sources that a test controls: no sandbox is needed to show how output is carried. */
const { CommandExitError, CommandHandle, FilesystemEventType, SandboxError, WatchHandle } = require('..')
const { failure, until } = require('./support')

const bytes = (text) => new TextEncoder().encode(text)
const out = (data) => ({ kind: 'stdout', data: typeof data === 'string' ? bytes(data) : data })
const err = (data) => ({ kind: 'stderr', data: typeof data === 'string' ? bytes(data) : data })
const end = (exitCode = 0) => ({
  kind: 'end',
  exitCode,
  error: exitCode ? `exit status ${exitCode}` : undefined,
})
const euro = bytes('€')

async function* from(...events) {
  yield* events
}

/** A source that a test feeds. */
function fed() {
  const queue = []
  let wake
  let pulled = 0
  return {
    push(...events) {
      queue.push(...events)
      wake?.()
    },
    pulled: () => pulled,
    async *[Symbol.asyncIterator]() {
      for (;;) {
        while (queue.length > 0) {
          pulled += 1
          yield queue.shift()
        }
        await new Promise((resolve) => (wake = resolve))
      }
    },
  }
}

const handleOf = (events, { onStdout, onStderr, onPty, onStop = () => {} } = {}) =>
  new CommandHandle(7, onStop, async () => true, events, onStdout, onStderr, onPty)

test('characters that are split between events are put together; what is left over is replaced', async () => {
  const seen = []
  const handle = handleOf(
    from(
      out(Buffer.concat([bytes('a'), euro.subarray(0, 2)])),
      [out(euro.subarray(2)), err('e')],
      out(euro.subarray(0, 1)),
      end(),
    ),
    { onStdout: (text) => void seen.push(text) },
  )
  expect(await handle.wait()).toEqual({ exitCode: 0, error: undefined, stdout: 'a€\ufffd', stderr: 'e' })
  expect(seen).toEqual(['a', '€', '\ufffd'])
})

test('callbacks are awaited, one after the other; their errors come out of wait', async () => {
  let release
  const blocked = new Promise((resolve) => (release = resolve))
  const source = fed()
  const handle = handleOf(source, { onStdout: () => blocked })
  source.push(out('a'), out('b'), end())
  await until(() => source.pulled() === 1)
  let done = false
  const waiting = handle.wait().then(() => (done = true))
  await new Promise(setImmediate)
  expect({ done, pulled: source.pulled() }).toEqual({ done: false, pulled: 1 })
  release()
  await waiting
  const failing = handleOf(from(out('a'), end()), { onStdout: async () => Promise.reject(new Error('mine')) })
  expect((await failure(failing.wait())).message).toBe('mine')
})

test('a stream that breaks or ends early is no success', async () => {
  const seen = []
  const broken = handleOf(
    (async function* () {
      yield out(euro.subarray(0, 1))
      throw new Error('gone')
    })(),
    { onStdout: (text) => void seen.push(text) },
  )
  expect((await failure(broken.wait())).message).toBe('gone')
  expect(seen).toEqual(['\ufffd'])
  expect(await failure(handleOf(from(out('a'))).wait())).toBeInstanceOf(SandboxError)
  expect(await failure(handleOf(from(end(3))).wait())).toBeInstanceOf(CommandExitError)
})

test('disconnect: at once, from a callback too, and no callback is called after it', async () => {
  const source = fed()
  const seen = []
  let stops = 0
  const handle = handleOf(source, { onStdout: (text) => void seen.push(text), onStop: () => (stops += 1) })
  source.push(out('a'))
  await until(() => seen.length === 1)
  await handle.disconnect()
  expect(stops).toBe(1)
  source.push(out('b'), end())
  expect((await handle.wait()).stdout).toBe('ab')
  expect(seen).toEqual(['a'])

  const other = fed()
  let returned = false
  const inside = handleOf(other, {
    onStdout: async () => {
      await inside.disconnect()
      returned = true
    },
  })
  other.push(out('a'))
  await until(() => returned)

  const stuck = fed()
  const never = handleOf(stuck, { onStdout: () => new Promise(() => {}) })
  stuck.push(out('a'))
  await until(() => stuck.pulled() === 1)
  await never.disconnect()
})

test('for await: everything in order, from the start, for each reader', async () => {
  const source = fed()
  const handle = handleOf(source)
  source.push(out('1'), err('2'))
  await until(() => source.pulled() === 2)
  const read = async () => {
    const chunks = []
    for await (const chunk of handle) chunks.push([chunk.type, `${chunk}`, ...chunk])
    return chunks
  }
  const readers = [read(), read()]
  source.push(out('3'), end(1))
  const expected = [
    ['stdout', '1', '1', undefined, undefined],
    ['stderr', '2', undefined, '2', undefined],
    ['stdout', '3', '3', undefined, undefined],
  ]
  expect(await Promise.all(readers)).toEqual([expected, expected])
  expect(await failure(handle.wait())).toBeInstanceOf(CommandExitError)
  expect(await read()).toEqual(expected)
})

test('for await: a reader that falls behind holds the source back, one that leaves does not', async () => {
  const source = fed()
  const handle = handleOf(source)
  const piece = 'x'.repeat(256 * 1024)
  const reader = handle[Symbol.asyncIterator]()
  source.push(...Array.from({ length: 40 }, () => out(piece)), end())
  await reader.next()
  await new Promise((done) => setTimeout(done, 50))
  expect(source.pulled()).toBeLessThan(10)
  await reader.return()
  expect((await handle.wait()).stdout.length).toBe(40 * piece.length)
})

test('with a reader or a callback, a handle remembers a bounded part of the output', async () => {
  const piece = 'x'.repeat(1024 * 1024)
  let length = 0
  const many = (async function* () {
    for (let i = 0; i < 200; i++) yield out(piece)
    yield out('last')
    yield end()
  })()
  const handle = handleOf(many, { onStdout: (text) => void (length += text.length) })
  const { stdout } = await handle.wait()
  expect(length).toBe(200 * piece.length + 4)
  expect(stdout.length).toBeLessThan(70 * piece.length)
  expect(stdout.endsWith('xlast')).toBe(true)
})

test("events in the shape of E2B's wire protocol are understood", async () => {
  const wire = (event) => ({ event: { event } })
  const data = (name, value) => wire({ case: 'data', value: { output: { case: name, value } } })
  const pty = []
  const handle = handleOf(
    from(
      data('stdout', bytes('o')),
      data('pty', bytes('p')),
      wire({ case: 'keepalive', value: {} }),
      wire({ case: 'end', value: { exitCode: 0 } }),
    ),
    { onPty: (piece) => void pty.push(...piece) },
  )
  expect((await handle.wait()).stdout).toBe('o')
  expect(pty).toEqual([...bytes('p')])
})

describe('watches', () => {
  const written = (name) => ({ event: { case: 'filesystem', value: { name, type: 2 } } })
  const watched = async (events, onEvent) => {
    let stops = 0
    const args = await new Promise((done) => {
      const handle = new WatchHandle(
        () => void (stops += 1),
        events,
        (event) => onEvent?.(event, handle),
        (...exit) => void done(exit),
      )
    })
    await until(() => stops > 0)
    return args
  }

  test('events in order, then the exit without arguments', async () => {
    const seen = []
    const events = from(
      written('a'),
      { event: { case: 'keepalive', value: {} } },
      { name: 'b', type: 'chmod' },
    )
    expect(await watched(events, (event) => void seen.push([event.name, event.type]))).toEqual([])
    expect(seen).toEqual([
      ['a', FilesystemEventType.WRITE],
      ['b', FilesystemEventType.CHMOD],
    ])
  })

  test('the exit waits for the callback and gets its error, and that of the events', async () => {
    const mine = new Error('mine')
    expect(await watched(from(written('a')), async () => Promise.reject(mine))).toEqual([mine])
    const broken = (async function* () {
      throw mine
    })()
    expect(await watched(broken)).toEqual([mine])
  })

  test('what fails after a stop is no error; an exit callback that throws harms nobody', async () => {
    const torn = (async function* () {
      yield written('a')
      throw new Error('aborted')
    })()
    expect(await watched(torn, (_event, handle) => handle.stop())).toEqual([])
    let stopped = false
    new WatchHandle(
      () => void (stopped = true),
      from(),
      undefined,
      () => {
        throw new Error('onExit failed')
      },
    )
    await until(() => stopped)
  })
})
