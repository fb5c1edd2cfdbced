'use strict'
/**
 * `sandbox.commands` and `sandbox.pty`: starting, finding and controlling processes. What runs is a `CommandHandle`.
 */
const { constants } = require('node:os')
const { native, invoke } = require('./native')
const { mergeOpts } = require('./config')
const { CommandHandle } = require('./handle')
const { InvalidArgumentError } = require('./errors')

/** E2B's default life of a command's stream. */
const COMMAND_TIMEOUT_MS = 60_000

/** The events of a native process, several at a time as they come. */
function eventsOf(process) {
  return {
    [Symbol.asyncIterator]: () => ({
      async next() {
        const value = await process.next()
        return { value, done: value === null }
      },
    }),
  }
}

/** Number of a signal: `SIGTERM`, `TERM` or 15. */
function signalNumber(signal) {
  if (Number.isInteger(signal) && signal > 0) return signal
  const name = typeof signal === 'string' ? signal.toUpperCase().replace(/^(?!SIG)/, 'SIG') : ''
  const number = constants.signals[name]
  if (number === undefined) throw new InvalidArgumentError(`Unknown signal ${JSON.stringify(signal)}`)
  return number
}

/** Checks a number of milliseconds; 0 is no limit. */
function checkTimeout(value) {
  if (value === undefined || value === null) return COMMAND_TIMEOUT_MS
  if (typeof value !== 'number' || Number.isNaN(value) || value < 0) {
    throw new InvalidArgumentError('timeoutMs must be a number of milliseconds that is not negative')
  }
  return value
}

function checkPid(pid) {
  if (!Number.isInteger(pid) || pid < 0 || pid > 0xffff_ffff) {
    throw new InvalidArgumentError(`Not a process id: ${JSON.stringify(pid) ?? typeof pid}`)
  }
  return pid
}

/** Checks and normalises the environment option. */
function envPairs(envs) {
  if (envs === undefined || envs === null) return {}
  for (const [key, value] of Object.entries(envs)) {
    if (key === '' || key.includes('=') || key.includes('\0') || String(value).includes('\0')) {
      throw new InvalidArgumentError(`Invalid environment variable ${JSON.stringify(key)}`)
    }
  }
  return Object.fromEntries(Object.entries(envs).map(([k, v]) => [k, String(v)]))
}

function bytesOf(data) {
  if (typeof data === 'string') return Buffer.from(data, 'utf8')
  if (data instanceof ArrayBuffer) return Buffer.from(data)
  if (ArrayBuffer.isView(data)) return Buffer.from(data.buffer, data.byteOffset, data.byteLength)
  throw new InvalidArgumentError('Input must be a string, an ArrayBuffer or a Uint8Array')
}

/** What commands and terminals share: they differ in how a process is started and what its output is. */
class Processes {
  /** @protected */
  _id
  #bound

  constructor(sandboxId, bound) {
    this._id = sandboxId
    this.#bound = bound
  }

  /** Calls the native layer with the options of a call over those of the sandbox. */
  _call(start, opts, undo) {
    return invoke(start, mergeOpts(this.#bound, opts), undefined, undo)
  }

  async _start(spec, callbacks, opts) {
    const start = (call) => native.startProcess(this._id, spec, call)
    return this.#handle(await this._call(start, opts, (late) => late.disconnect()), callbacks, opts)
  }

  async _connect(pid, callbacks, opts) {
    const timeoutMs = checkTimeout(opts?.timeoutMs)
    checkPid(pid)
    const connect = (call) => native.connectProcess(this._id, pid, timeoutMs, call)
    return this.#handle(await this._call(connect, opts, (late) => late.disconnect()), callbacks, opts)
  }

  #handle(process, { onStdout, onStderr, onPty }, opts) {
    const { pid } = process
    const handle = new CommandHandle(
      pid,
      () => process.disconnect(),
      (how) => this.kill(pid, typeof how === 'string' || typeof how === 'number' ? { signal: how } : how),
      eventsOf(process),
      onStdout,
      onStderr,
      onPty,
      (data, stdinOpts) => this.sendStdin(pid, data, stdinOpts),
      (stdinOpts) => this.closeStdin(pid, stdinOpts),
    )
    const signal = opts?.signal
    if (signal) {
      const onAbort = () => handle._fail(signal.reason)
      signal.addEventListener('abort', onAbort, { once: true })
      const settled = () => signal.removeEventListener('abort', onAbort)
      handle.wait().then(settled, settled)
      if (signal.aborted) onAbort()
    }
    return handle
  }

  /** Kills; `opts.signal` may be a signal of the guest (`SIGTERM`, 15) instead of an AbortSignal. */
  async kill(pid, opts) {
    const { signal } = opts ?? {}
    if (typeof signal === 'string' || typeof signal === 'number') {
      return this.sendSignal(pid, signal, { ...opts, signal: undefined })
    }
    return this.sendSignal(pid, constants.signals.SIGKILL, opts)
  }

  async sendSignal(pid, signal, opts) {
    const number = signalNumber(signal)
    checkPid(pid)
    return this._call((call) => native.signalProcess(this._id, pid, number, call), opts)
  }

  async sendStdin(pid, data, opts) {
    const bytes = bytesOf(data)
    checkPid(pid)
    return this._call((call) => native.sendStdin(this._id, pid, bytes, call), opts)
  }
}

/** `sandbox.commands` */
class Commands extends Processes {
  async run(cmd, opts = {}) {
    if (typeof cmd !== 'string') throw new InvalidArgumentError('The command must be a string')
    const spec = {
      cmd: '/bin/bash',
      args: ['-l', '-c', cmd],
      cwd: opts.cwd,
      user: opts.user,
      envs: envPairs(opts.envs),
      stdin: opts.stdin ?? false,
      timeoutMs: checkTimeout(opts.timeoutMs),
    }
    const { onStdout, onStderr, signal } = opts
    const handle = await this._start(spec, { onStdout, onStderr }, opts)
    if (opts.background) return handle
    try {
      return await handle.wait()
    } catch (error) {
      // Nobody holds a handle to the process of a foreground run whose caller gave up: do not leave it behind.
      if (signal?.aborted) await handle.kill().catch(() => {})
      throw error
    }
  }

  async list(opts) {
    return this._call((call) => native.listProcesses(this._id, call), opts)
  }

  async connect(pid, opts = {}) {
    const { onStdout, onStderr } = opts
    return this._connect(pid, { onStdout, onStderr }, opts)
  }

  async closeStdin(pid, opts) {
    checkPid(pid)
    return this._call((call) => native.closeStdin(this._id, pid, call), opts)
  }
}

/** A terminal's size. */
function checkSize({ cols, rows } = {}) {
  for (const value of [cols, rows]) {
    if (!Number.isInteger(value) || value < 0 || value > 0xffff) {
      throw new InvalidArgumentError('cols and rows must be whole numbers')
    }
  }
  return { cols, rows }
}

/** `sandbox.pty` */
class Pty extends Processes {
  async create(opts) {
    const spec = {
      cmd: '/bin/bash',
      args: ['-i', '-l'],
      cwd: opts?.cwd,
      user: opts?.user,
      envs: { TERM: 'xterm-256color', LANG: 'C.UTF-8', LC_ALL: 'C.UTF-8', ...envPairs(opts?.envs) },
      stdin: true,
      pty: checkSize(opts),
      timeoutMs: checkTimeout(opts?.timeoutMs),
    }
    return this._start(spec, { onPty: opts.onData ?? (() => {}) }, opts)
  }

  async connect(pid, opts = {}) {
    return this._connect(pid, { onPty: opts.onData ?? (() => {}) }, opts)
  }

  async sendInput(pid, data, opts) {
    return this.sendStdin(pid, data, opts)
  }

  async closeStdin() {
    throw new InvalidArgumentError('A terminal has no stdin to close: send "\\x04" instead')
  }

  async resize(pid, size, opts) {
    const { cols, rows } = checkSize(size)
    checkPid(pid)
    return this._call((call) => native.resizePty(this._id, pid, cols, rows, call), opts)
  }
}

module.exports = { Commands, Pty }
