'use strict'
/**
 * `sandbox.files`: E2B's file API. Content goes through pull streams in both directions, so that neither a read nor
 * a write of a stream holds the whole file in memory.
 */
const { native, invoke } = require('./native')
const { InvalidArgumentError, fromNative } = require('./errors')

const FileType = Object.freeze({ FILE: 'file', DIR: 'dir' })

/** Largest piece handed to the native layer at once. */
const CHUNK = 256 * 1024

function entryInfo(raw) {
  return {
    name: raw.name,
    path: raw.path,
    type: raw.kind ?? undefined,
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

/** Yields the pieces of anything that can be written. */
async function* piecesOf(data) {
  if (typeof data === 'string') data = Buffer.from(data, 'utf8')
  else if (data instanceof ArrayBuffer) data = Buffer.from(data)
  if (ArrayBuffer.isView(data)) {
    const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength)
    for (let at = 0; at < bytes.length; at += CHUNK) yield bytes.subarray(at, at + CHUNK)
    return
  }
  const source = typeof data?.stream === 'function' ? data.stream() : data
  if (typeof source?.[Symbol.asyncIterator] !== 'function') {
    throw new InvalidArgumentError(
      `Unsupported data of type ${data === null ? 'null' : typeof data}: use a string, ArrayBuffer, Uint8Array, Blob or stream`,
    )
  }
  for await (const piece of source) yield* piecesOf(piece)
}

class Filesystem {
  #id

  constructor(sandboxId) {
    this.#id = sandboxId
  }

  async read(path, opts = {}) {
    checkPath(path)
    const format = opts.format ?? 'text'
    if (!['text', 'bytes', 'blob', 'stream'].includes(format)) {
      throw new InvalidArgumentError(
        `Unknown format ${JSON.stringify(format)}: use text, bytes, blob or stream`,
      )
    }
    // A transfer has no default timeout: its duration depends on the file, not on the sandbox being alive.
    const reader = await invoke(
      (call) => native.openFile(this.#id, path, opts.user, call),
      opts,
      undefined,
      (r) => r.close(),
    )
    const { signal } = opts
    const next = async () => {
      try {
        signal?.throwIfAborted()
        return await reader.next()
      } catch (error) {
        reader.close()
        throw signal?.aborted ? signal.reason : fromNative(error)
      }
    }
    if (format === 'stream') {
      return new ReadableStream(
        {
          async pull(controller) {
            const piece = await next()
            if (piece === null) controller.close()
            else controller.enqueue(new Uint8Array(piece))
          },
          cancel() {
            reader.close()
          },
        },
        { highWaterMark: 1 },
      )
    }
    const onAbort = () => reader.close()
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      const pieces = []
      for (let piece = await next(); piece !== null; piece = await next()) pieces.push(piece)
      signal?.throwIfAborted()
      if (format === 'blob') return new Blob(pieces)
      const bytes = Buffer.concat(pieces)
      if (format === 'bytes') return new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength)
      return bytes.toString('utf8')
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  async write(pathOrFiles, dataOrOpts, opts) {
    if (typeof pathOrFiles !== 'string' && !Array.isArray(pathOrFiles)) {
      throw new InvalidArgumentError('Path or files are required')
    }
    if (typeof pathOrFiles === 'string') {
      if (Array.isArray(dataOrOpts)) {
        throw new InvalidArgumentError('Cannot specify both path and array of files. Specify one of them.')
      }
      return this.#writeOne(pathOrFiles, dataOrOpts, opts?.metadata, opts)
    }
    return this.writeFiles(pathOrFiles, dataOrOpts)
  }

  async writeFiles(files, opts) {
    // Everything is checked before anything is written.
    const checked = files.map((file) => ({
      path: checkPath(file.path),
      data: file.data,
      metadata: checkMetadata(file.metadata ?? opts?.metadata),
    }))
    const infos = []
    for (const { path, data, metadata } of checked)
      infos.push(await this.#writeOne(path, data, metadata, opts))
    return infos
  }

  async #writeOne(path, data, metadata, opts = {}) {
    checkPath(path)
    const spec = { path, user: opts.user, metadata: checkMetadata(metadata) }
    const pieces = piecesOf(data)
    const first = await pieces.next()
    const writer = await invoke(
      (call) => native.createFile(this.#id, spec, call),
      opts,
      undefined,
      (w) => w.abort(),
    )
    const onAbort = () => writer.abort()
    opts.signal?.addEventListener('abort', onAbort, { once: true })
    try {
      for (let piece = first; !piece.done; piece = await pieces.next()) {
        opts.signal?.throwIfAborted()
        if (piece.value.length > 0) await writer.write(piece.value)
      }
      opts.signal?.throwIfAborted()
      return writeInfo(await writer.finish())
    } catch (error) {
      writer.abort()
      await pieces.return?.()
      if (opts.signal?.aborted) throw opts.signal.reason
      throw fromNative(error)
    } finally {
      opts.signal?.removeEventListener('abort', onAbort)
    }
  }

  async list(path, opts = {}) {
    checkPath(path)
    const depth = opts.depth ?? 1
    if (!(depth >= 1)) throw new InvalidArgumentError('depth should be at least one')
    const entries = await invoke((call) => native.listDir(this.#id, path, depth, opts.user, call), opts)
    return entries.map(entryInfo)
  }

  async exists(path, opts = {}) {
    checkPath(path)
    return invoke((call) => native.exists(this.#id, path, opts.user, call), opts)
  }

  async getInfo(path, opts = {}) {
    checkPath(path)
    return entryInfo(await invoke((call) => native.stat(this.#id, path, opts.user, call), opts))
  }

  async makeDir(path, opts = {}) {
    checkPath(path)
    return invoke((call) => native.makeDir(this.#id, path, opts.user, call), opts)
  }

  async rename(oldPath, newPath, opts = {}) {
    checkPath(oldPath)
    checkPath(newPath)
    return entryInfo(await invoke((call) => native.rename(this.#id, oldPath, newPath, opts.user, call), opts))
  }

  async remove(path, opts = {}) {
    checkPath(path)
    await invoke((call) => native.remove(this.#id, path, opts.user, call), opts)
  }
}

module.exports = { Filesystem, FileType }
