'use strict'
/**
 * `sandbox.files`: E2B's file API. Content goes through pull streams in both directions, so that neither a read nor
 * a write of a stream holds the whole file in memory.
 */
const { native, invoke } = require('./native')
const { mergeOpts, REQUEST_TIMEOUT_MS } = require('./config')
const { InvalidArgumentError, TimeoutError, fromNative } = require('./errors')
const { WatchHandle } = require('./watch')

const FileType = Object.freeze({ FILE: 'file', DIR: 'dir', SYMLINK: 'symlink' })

const FORMATS = ['text', 'bytes', 'blob', 'stream']

/** Largest piece handed to the native layer at once. */
const CHUNK = 4 * 1024 * 1024

/** Up to this size a file is written by a single call. */
const SMALL = 1024 * 1024

/** Files written at the same time by one `writeFiles`: more would only queue in the guest. */
const PARALLEL = 8

/** E2B's default life of a watch. */
const WATCH_TIMEOUT_MS = 60_000

function entryInfo(raw) {
  return {
    name: raw.name,
    path: raw.path,
    // A link that leads nowhere has no target whose type it could have.
    type: raw.kind ?? (raw.symlinkTarget ? FileType.SYMLINK : undefined),
    metadata: raw.metadata ?? undefined,
    size: raw.size,
    mode: raw.mode,
    permissions: raw.permissions,
    owner: raw.owner,
    group: raw.group,
    modifiedTime:
      raw.modifiedMs === undefined || raw.modifiedMs === null ? undefined : new Date(raw.modifiedMs),
    symlinkTarget: raw.symlinkTarget ?? undefined,
  }
}

function writeInfo(raw) {
  return { name: raw.name, path: raw.path, type: raw.kind ?? undefined, metadata: raw.metadata ?? undefined }
}

function checkPath(path) {
  if (typeof path !== 'string') throw new InvalidArgumentError('The path must be a string')
  if (path.includes('\0')) throw new InvalidArgumentError('The path contains a NUL byte')
  return path
}

/** Options of a read: the format, and the range, whose end is inclusive. */
function checkRead(opts) {
  const { format = 'text', start = 0, end } = opts
  if (!FORMATS.includes(format)) {
    throw new InvalidArgumentError(`Unknown format ${JSON.stringify(format)}: use ${FORMATS.join(', ')}`)
  }
  const whole = (value) => Number.isSafeInteger(value) && value >= 0
  if (!whole(start) || (end !== undefined && (!whole(end) || end < start))) {
    throw new InvalidArgumentError('start and end must be whole numbers with 0 <= start <= end')
  }
  return { format, offset: start, length: end === undefined ? undefined : end - start + 1 }
}

/** HTTP header names and printable ASCII: what E2B can carry. Keys are lowercased. */
function checkMetadata(metadata) {
  if (metadata === undefined || metadata === null) return undefined
  const out = {}
  for (const [key, value] of Object.entries(metadata)) {
    if (!/^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/.test(key)) {
      throw new InvalidArgumentError(
        `Invalid metadata key ${JSON.stringify(key)}: use letters, digits and -_.`,
      )
    }
    if (typeof value !== 'string' || !/^[\x20-\x7e]*$/.test(value)) {
      throw new InvalidArgumentError(`Invalid metadata value for ${JSON.stringify(key)}: use printable ASCII`)
    }
    out[key.toLowerCase()] = value
  }
  return out
}

/** What is in memory already, as bytes; `undefined` for anything that has to be pulled. */
function bytesOf(data) {
  if (typeof data === 'string') return Buffer.from(data, 'utf8')
  if (ArrayBuffer.isView(data)) return Buffer.from(data.buffer, data.byteOffset, data.byteLength)
  // An ArrayBuffer of another realm (Jest has some) is no instance of this one's.
  if (data instanceof ArrayBuffer || Object.prototype.toString.call(data) === '[object ArrayBuffer]') {
    return Buffer.from(data)
  }
  return undefined
}

/** The pieces of a stream that has no iterator of its own. */
async function* readerPieces(stream) {
  const reader = stream.getReader()
  try {
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      yield value
    }
  } finally {
    await reader.cancel().catch(() => {})
  }
}

/** What to pull from, checked before anything is sent. */
function sourceOf(data) {
  const source = typeof data?.stream === 'function' ? data.stream() : data
  if (typeof source?.[Symbol.asyncIterator] === 'function') return source
  if (typeof source?.getReader === 'function') return readerPieces(source)
  throw new InvalidArgumentError(
    `Unsupported data of type ${data === null ? 'null' : typeof data}: use a string, ArrayBuffer, Uint8Array, Blob or stream`,
  )
}

/** Yields the pieces of anything that can be written. */
async function* piecesOf(data) {
  const bytes = bytesOf(data)
  if (bytes === undefined) {
    for await (const piece of data) {
      if (bytesOf(piece) === undefined) {
        throw new InvalidArgumentError(
          `Unsupported piece of type ${typeof piece}: use a string or Uint8Array`,
        )
      }
      yield* piecesOf(piece)
    }
    return
  }
  for (let at = 0; at < bytes.length; at += CHUNK) yield bytes.subarray(at, at + CHUNK)
}

/** Runs `work` on each item, some at a time; after a failure no further one is begun. */
async function inParallel(items, work) {
  const results = new Array(items.length)
  const failures = []
  let next = 0
  const worker = async () => {
    while (next < items.length && failures.length === 0) {
      const index = next++
      try {
        results[index] = await work(items[index])
      } catch (error) {
        failures.push(error)
      }
    }
  }
  await Promise.all(Array.from({ length: Math.min(PARALLEL, items.length) }, worker))
  if (failures.length > 0) throw failures[0]
  return results
}

class Filesystem {
  #id
  #bound

  constructor(sandboxId, bound) {
    this.#id = sandboxId
    this.#bound = bound
  }

  /** Calls the native layer with the options of a call over those of the sandbox. */
  #call(start, opts, undo) {
    return invoke(start, mergeOpts(this.#bound, opts), undefined, undo)
  }

  async read(path, opts = {}) {
    checkPath(path)
    const { format, ...range } = checkRead(opts)
    const spec = { path, user: opts.user, ...range }
    const { signal } = opts
    // The request timeout is for the start: how long a transfer takes depends on the file.
    const reader = await this.#call(
      (call) => native.openFile(this.#id, spec, call),
      opts,
      (late) => late.close(),
    )
    const next = async () => {
      try {
        signal?.throwIfAborted()
        return await reader.next()
      } catch (error) {
        reader.close()
        throw signal?.aborted ? signal.reason : fromNative(error)
      }
    }
    if (format === 'stream') return this.#stream(reader, next, opts)
    const onAbort = () => reader.close()
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      const pieces = []
      for (let piece = await next(); piece !== null; piece = await next()) pieces.push(piece)
      signal?.throwIfAborted()
      if (format === 'blob') return new Blob(pieces)
      const bytes = pieces.length === 1 ? pieces[0] : Buffer.concat(pieces)
      if (format === 'bytes') return new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength)
      return bytes.toString('utf8')
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /** A stream that pulls piece by piece, and fails when none comes for too long. */
  #stream(reader, next, { streamIdleTimeoutMs, requestTimeoutMs, signal }) {
    const idleMs =
      streamIdleTimeoutMs ?? requestTimeoutMs ?? this.#bound?.requestTimeoutMs ?? REQUEST_TIMEOUT_MS
    const onAbort = () => reader.close()
    signal?.addEventListener('abort', onAbort, { once: true })
    const over = () => signal?.removeEventListener('abort', onAbort)
    return new ReadableStream(
      {
        async pull(controller) {
          let idle = false
          const timer = idleMs > 0 && setTimeout(() => reader.close((idle = true)), idleMs)
          try {
            const piece = await next()
            if (piece !== null)
              return controller.enqueue(new Uint8Array(piece.buffer, piece.byteOffset, piece.length))
            over()
            // A reader that was closed says that it is at its end.
            if (signal?.aborted) throw signal.reason
            if (!idle) return controller.close()
          } catch (error) {
            over()
            if (!idle) throw error
          } finally {
            if (timer) clearTimeout(timer)
          }
          throw new TimeoutError(
            `No data arrived for ${idleMs} ms: pass a larger 'streamIdleTimeoutMs', or 0 for no limit`,
          )
        },
        cancel() {
          over()
          reader.close()
        },
      },
      { highWaterMark: 1 },
    )
  }

  async write(pathOrFiles, dataOrOpts, opts) {
    if (typeof pathOrFiles !== 'string' && !Array.isArray(pathOrFiles)) {
      throw new InvalidArgumentError('Path or files are required')
    }
    if (Array.isArray(pathOrFiles)) return this.writeFiles(pathOrFiles, dataOrOpts)
    if (Array.isArray(dataOrOpts)) {
      throw new InvalidArgumentError(
        'Cannot specify both path and array of files. You have to specify either path and data for a single file or an array for multiple files.',
      )
    }
    return this.#writeOne(this.#checkWrite({ path: pathOrFiles, data: dataOrOpts }, opts), opts)
  }

  async writeFiles(files, opts) {
    if (!Array.isArray(files)) throw new InvalidArgumentError('Path or files are required')
    // Everything is checked before anything is written.
    const checked = files.map((file) => this.#checkWrite(file, opts))
    return inParallel(checked, (file) => this.#writeOne(file, opts))
  }

  #checkWrite(file, opts) {
    const path = checkPath(file?.path)
    const metadata = checkMetadata(file.metadata ?? opts?.metadata)
    const bytes = bytesOf(file.data)
    const spec = { path, user: opts?.user, metadata, length: bytes?.length ?? blobSize(file.data) }
    return { spec, bytes, source: bytes ?? sourceOf(file.data) }
  }

  async #writeOne({ spec, bytes, source }, opts = {}) {
    if (bytes !== undefined && bytes.length <= SMALL) {
      return writeInfo(await this.#call((call) => native.writeFile(this.#id, spec, bytes, call), opts))
    }
    const pieces = piecesOf(source)
    const writer = await this.#call(
      (call) => native.createFile(this.#id, spec, call),
      opts,
      (late) => late.abort(),
    )
    const { signal } = opts
    const onAbort = () => writer.abort()
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      for await (const piece of pieces) {
        signal?.throwIfAborted()
        if (piece.length > 0) await writer.write(piece)
      }
      signal?.throwIfAborted()
      return writeInfo(await writer.finish())
    } catch (error) {
      writer.abort()
      if (signal?.aborted) throw signal.reason
      throw fromNative(error)
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  async list(path, opts = {}) {
    checkPath(path)
    const depth = opts.depth ?? 1
    if (!(depth >= 1)) throw new InvalidArgumentError('depth should be at least one')
    const list = (call) => native.listDir(this.#id, path, Math.min(depth, 0xffff_ffff), opts.user, call)
    const entries = (await this.#call(list, opts)).map(entryInfo)
    // As in E2B: devices, sockets and pipes are neither files nor directories and are not listed.
    return entries.filter(({ type }) => type !== undefined)
  }

  async exists(path, opts = {}) {
    checkPath(path)
    return this.#call((call) => native.exists(this.#id, path, opts.user, call), opts)
  }

  async getInfo(path, opts = {}) {
    checkPath(path)
    return entryInfo(await this.#call((call) => native.stat(this.#id, path, opts.user, call), opts))
  }

  async makeDir(path, opts = {}) {
    checkPath(path)
    return this.#call((call) => native.makeDir(this.#id, path, opts.user, call), opts)
  }

  async rename(oldPath, newPath, opts = {}) {
    checkPath(oldPath)
    checkPath(newPath)
    const rename = (call) => native.rename(this.#id, oldPath, newPath, opts.user, call)
    return entryInfo(await this.#call(rename, opts))
  }

  async remove(path, opts = {}) {
    checkPath(path)
    await this.#call((call) => native.remove(this.#id, path, opts.user, call), opts)
  }

  async watchDir(path, onEvent, opts = {}) {
    checkPath(path)
    const timeoutMs = opts.timeoutMs ?? WATCH_TIMEOUT_MS
    if (typeof timeoutMs !== 'number' || !(timeoutMs >= 0)) {
      throw new InvalidArgumentError('timeoutMs must be a number of milliseconds that is not negative')
    }
    for (const callback of [onEvent, opts.onExit]) {
      if (callback !== undefined && callback !== null && typeof callback !== 'function') {
        throw new InvalidArgumentError('onEvent and onExit must be functions')
      }
    }
    const spec = {
      path,
      user: opts.user,
      recursive: opts.recursive ?? false,
      includeEntry: opts.includeEntry ?? false,
      allowNetworkMounts: opts.allowNetworkMounts ?? false,
      timeoutMs,
    }
    const { signal } = opts
    const watcher = await this.#call(
      (call) => native.watchDir(this.#id, spec, call),
      opts,
      (late) => late.stop(),
    )
    const onAbort = () => watcher.stop()
    signal?.addEventListener('abort', onAbort, { once: true })
    const stop = () => {
      signal?.removeEventListener('abort', onAbort)
      watcher.stop()
    }
    return new WatchHandle(stop, changesOf(watcher, signal), onEvent, opts.onExit)
  }
}

/** Size of what knows it. */
function blobSize(data) {
  return typeof data?.stream === 'function' && typeof data.size === 'number' ? data.size : undefined
}

/** The events of a native watch. */
async function* changesOf(watcher, signal) {
  try {
    for (let batch = await watcher.next(); batch !== null; batch = await watcher.next()) {
      for (const { name, kind, entry } of batch) {
        yield { name, type: kind, entry: entry ? entryInfo(entry) : undefined }
      }
    }
  } catch (error) {
    throw fromNative(error)
  }
  if (signal?.aborted) throw signal.reason
}

module.exports = { Filesystem, FileType }
