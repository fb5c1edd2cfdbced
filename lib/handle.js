'use strict'
/**
 * A command or terminal that runs: its output, its end, and what can be done to it.
 *
 * Output is pulled: the next piece is asked for when the callback for the last one has returned and every reader of
 * `for await` has kept up, so a slow program slows the guest's process down instead of filling the heap.
 */
const { CommandExitError, SandboxError, fromNative } = require('./errors')

/** Characters of a stream that a handle remembers when somebody else gets them all: a callback, or `for await`. */
const REMEMBERED = 64 * 1024 * 1024
/** The longest string that JavaScript has; what a handle remembers when nobody else gets the output. */
const LONGEST = 2 ** 29 - 64
/** Output that a handle keeps for readers which come late. */
const KEPT = 16 * 1024 * 1024
/** The same for terminals, which may live for days. */
const KEPT_PTY = 1024 * 1024
/** How far a reader of `for await` may fall behind before the process has to wait for it. */
const WINDOW = 1024 * 1024
/** What a piece costs beyond its content. */
const OVERHEAD = 64

/** Result of a finished command. */
class CommandResult {
  constructor({ exitCode, error, stdout, stderr }) {
    this.exitCode = exitCode
    this.error = error
    this.stdout = stdout
    this.stderr = stderr
  }
}

/** A piece of output, as `for await` gives it. */
class OutputChunk {
  constructor(type, data) {
    /** `stdout`, `stderr` or `pty` */
    this.type = type
    /** A string; for terminals a Uint8Array */
    this.data = data
  }

  get stdout() {
    return this.type === 'stdout' ? this.data : undefined
  }

  get stderr() {
    return this.type === 'stderr' ? this.data : undefined
  }

  get pty() {
    return this.type === 'pty' ? this.data : undefined
  }

  toString() {
    return typeof this.data === 'string' ? this.data : Buffer.from(this.data).toString('utf8')
  }

  /** As E2B's Python handles give it: standard output, standard error, terminal. */
  *[Symbol.iterator]() {
    yield* [this.stdout, this.stderr, this.pty]
  }
}

/** A queue of pieces from which the oldest are dropped. */
class Pieces {
  #items = []
  #head = 0
  size = 0

  get length() {
    return this.#items.length - this.#head
  }

  at(index) {
    return this.#items[this.#head + index]
  }

  push(item, size) {
    this.#items.push(item)
    this.size += size + OVERHEAD
  }

  shift(sizeOf) {
    this.size -= sizeOf(this.#items[this.#head]) + OVERHEAD
    this.#items[this.#head++] = undefined
    // Moving what is left is worth it only now and then.
    if (this.#head > 1024 && this.#head * 2 > this.#items.length) {
      this.#items = this.#items.slice(this.#head)
      this.#head = 0
    }
  }

  rest() {
    return this.#head === 0 ? this.#items : this.#items.slice(this.#head)
  }
}

const lengthOf = (text) => text.length

/** The text of one stream so far, or the newest part of it. */
class Memory {
  #pieces = new Pieces()
  #length = 0
  #joined = ''

  push(text, bounded) {
    if (!bounded && this.#length + text.length > LONGEST) {
      throw new SandboxError(
        'The output is longer than a string can be: take it piece by piece, with onStdout, onStderr or `for await`',
      )
    }
    this.#joined = undefined
    this.#length += text.length
    this.#pieces.push(text, text.length)
    while (bounded && this.#pieces.size > REMEMBERED && this.#pieces.length > 1) {
      this.#length -= this.#pieces.at(0).length
      this.#pieces.shift(lengthOf)
    }
  }

  toString() {
    this.#joined ??= this.#pieces.rest().join('')
    return this.#joined
  }
}

const sizeOfChunk = (chunk) => chunk.data.length

/** What readers have not taken yet; positions count from the first piece of the handle. */
class Backlog {
  #chunks = new Pieces()
  #first = 0
  #kept
  #readers = new Set()
  #arrived = []
  #taken
  #closed = false
  /** Whether somebody reads, or has read. */
  used = false

  constructor(kept) {
    this.#kept = kept
  }

  push(chunk) {
    this.#chunks.push(chunk, chunk.data.length)
    const unread = this.#slowest()
    while (this.#chunks.size > this.#kept && this.#chunks.length > 1 && this.#first < unread) {
      this.#chunks.shift(sizeOfChunk)
      this.#first += 1
    }
    for (const reader of this.#readers) reader.unread += sizeOfChunk(chunk) + OVERHEAD
    for (const resolve of this.#arrived.splice(0)) resolve()
  }

  /** Position of the slowest reader. */
  #slowest() {
    let slowest = Infinity
    for (const { position } of this.#readers) slowest = Math.min(slowest, position)
    return slowest
  }

  /** Waits until every reader is within the window. */
  async room() {
    while (!this.#closed && [...this.#readers].some(({ unread }) => unread > WINDOW)) {
      await new Promise((resolve) => (this.#taken = resolve))
    }
  }

  #release() {
    this.#taken?.()
    this.#taken = undefined
  }

  /** Nothing more comes. */
  close() {
    this.#closed = true
    this.#release()
    for (const resolve of this.#arrived.splice(0)) resolve()
  }

  async *read() {
    const reader = { position: this.#first, unread: this.#chunks.size }
    this.used = true
    this.#readers.add(reader)
    try {
      for (;;) {
        const index = reader.position - this.#first
        if (index < this.#chunks.length) {
          const chunk = this.#chunks.at(index)
          reader.position += 1
          reader.unread -= sizeOfChunk(chunk) + OVERHEAD
          this.#release()
          yield chunk
        } else if (this.#closed) {
          return
        } else {
          await new Promise((resolve) => this.#arrived.push(resolve))
        }
      }
    } finally {
      this.#readers.delete(reader)
      this.#release()
    }
  }
}

/** An event of the native layer, or one in the shape of E2B's wire protocol. */
function normalize(event) {
  const wire = event?.event?.event
  if (wire === undefined) return event
  if (wire.case === 'data') return { kind: wire.value.output.case, data: wire.value.output.value }
  return wire.case === 'end' ? { kind: 'end', ...wire.value } : {}
}

/** A running (or finished) command or terminal. */
class CommandHandle {
  #disconnectSource
  #killProcess
  #source
  #callbacks
  #send
  #close
  #decoders = {
    stdout: new TextDecoder('utf-8', { ignoreBOM: true }),
    stderr: new TextDecoder('utf-8', { ignoreBOM: true }),
  }
  #memory = { stdout: new Memory(), stderr: new Memory() }
  #backlog
  #result
  #failure
  #disconnected = false
  #release
  #done

  /**
   * Made by `commands` and `pty`; the order of the arguments is E2B's.
   *
   * @param {number} pid
   * @param {() => void} disconnect stops the events
   * @param {(signal?: unknown) => Promise<boolean>} kill
   * @param {AsyncIterable<object | object[]>} events output, then the end; arrays are several at once
   */
  constructor(pid, disconnect, kill, events, onStdout, onStderr, onPty, sendStdin, closeStdin) {
    /** Process id in the guest. */
    this.pid = pid
    this.#disconnectSource = disconnect
    this.#killProcess = kill
    this.#source = events[Symbol.asyncIterator]()
    this.#callbacks = { stdout: onStdout, stderr: onStderr, pty: onPty }
    this.#send = sendStdin
    this.#close = closeStdin
    this.#backlog = new Backlog(onPty ? KEPT_PTY : KEPT)
    this.#done = this.#pump()
  }

  /** Output so far. */
  get stdout() {
    return this.#memory.stdout.toString()
  }

  /** Error output so far. */
  get stderr() {
    return this.#memory.stderr.toString()
  }

  get exitCode() {
    return this.#result?.exitCode
  }

  get error() {
    return this.#result?.error
  }

  async wait() {
    await this.#done
    if (this.#failure) throw this.#failure.error
    if (this.#result === undefined) {
      throw new SandboxError(
        this.#disconnected
          ? 'The handle was disconnected before the command ended; use commands.connect(pid)'
          : 'Process exited without a result',
      )
    }
    if (this.#result.exitCode !== 0) throw new CommandExitError(this.#result)
    return this.#result
  }

  async disconnect() {
    this.#stop()
  }

  async kill(signal) {
    return this.#killProcess(signal)
  }

  async sendSignal(signal) {
    return this.#killProcess(signal)
  }

  async sendStdin(data, opts) {
    if (!this.#send) throw new SandboxError('Sending stdin is not supported for this command handle.')
    await this.#send(data, opts)
  }

  async closeStdin(opts) {
    if (!this.#close) throw new SandboxError('Closing stdin is not supported for this command handle.')
    await this.#close(opts)
  }

  /** All output, from the start; the process waits for a reader that falls behind. */
  async *[Symbol.asyncIterator]() {
    yield* this.#backlog.read()
    if (this.#failure) throw this.#failure.error
  }

  /** Ends the handle for another reason than the command's end. @private */
  _fail(error) {
    if (this.#result === undefined) this.#failure ??= { error }
    this.#stop()
  }

  #stop() {
    if (this.#disconnected) return
    this.#disconnected = true
    // A callback that is still at it is left alone; whoever waits for room does not wait any more.
    this.#release?.()
    this.#backlog.close()
    this.#disconnectSource()
  }

  /** Calls a callback and waits for it, or for `disconnect`. */
  async #call(callback, data) {
    const returned = callback(data)
    if (typeof returned?.then !== 'function') return
    await new Promise((resolve, reject) => {
      this.#release = resolve
      returned.then(resolve, reject)
    })
    this.#release = undefined
  }

  async #emit(type, data) {
    if (data.length === 0) return
    const callback = this.#callbacks[type]
    if (type !== 'pty') this.#memory[type].push(data, callback !== undefined || this.#backlog.used)
    // What arrives after `disconnect` is in the result, if there is one, and told to nobody.
    if (this.#disconnected) return
    this.#backlog.push(new OutputChunk(type, data))
    if (callback) await this.#call(callback, data)
    if (!this.#disconnected) await this.#backlog.room()
  }

  /** What the decoders still hold of a character that was cut. */
  async #flush() {
    await this.#emit('stdout', this.#decoders.stdout.decode())
    await this.#emit('stderr', this.#decoders.stderr.decode())
  }

  async #handle({ kind, data, exitCode, error }) {
    if (kind === 'stdout' || kind === 'stderr') {
      await this.#emit(kind, this.#decoders[kind].decode(data, { stream: true }))
    } else if (kind === 'pty') {
      await this.#emit(kind, data instanceof Buffer ? new Uint8Array(data) : data)
    } else if (kind === 'end') {
      await this.#flush()
      const { stdout, stderr } = this
      this.#result = new CommandResult({ exitCode, error: error || undefined, stdout, stderr })
    }
  }

  async #pump() {
    try {
      while (this.#result === undefined) {
        const { value, done } = await this.#source.next()
        if (done) break
        for (const event of Array.isArray(value) ? value : [value]) await this.#handle(normalize(event))
      }
    } catch (error) {
      this.#failure ??= { error: fromNative(error) }
    }
    try {
      await this.#flush()
    } catch (error) {
      this.#failure ??= { error }
    }
    this.#backlog.close()
    this.#disconnectSource()
    // Not awaited: a generator that never returns must not hold `wait` back.
    Promise.resolve(this.#source.return?.()).catch(() => {})
  }
}

module.exports = { CommandHandle, CommandResult, OutputChunk }
