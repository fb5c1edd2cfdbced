'use strict'
/**
 * Commands and terminals. Native processes are pull streams: `next()` gives one event at a time, so a slow reader
 * slows the guest down instead of filling the heap.
 */
const { native, invoke } = require('./native')
const { CommandExitError, InvalidArgumentError, SandboxError, fromNative } = require('./errors')

/** E2B's default life of a command's stream. */
const COMMAND_TIMEOUT_MS = 60_000

/** Decodes UTF-8 that may be split anywhere; invalid bytes become U+FFFD. */
function decoder() {
  return new TextDecoder('utf-8', { ignoreBOM: true })
}

/** Result of a finished command. */
class CommandResult {
  constructor({ exitCode, error, stdout, stderr }) {
    this.exitCode = exitCode
    this.error = error
    this.stdout = stdout
    this.stderr = stderr
  }
}

/** A running (or finished) command. */
class CommandHandle {
  #process
  #commands
  #onStdout
  #onStderr
  #onPty
  #stdout = ''
  #stderr = ''
  #result
  #failure
  #disconnected = false
  #done

  constructor(process, commands, { onStdout, onStderr, onPty, signal } = {}) {
    this.#process = process
    this.#commands = commands
    this.#onStdout = onStdout
    this.#onStderr = onStderr
    this.#onPty = onPty
    const onAbort = () => this.#end(signal.reason)
    signal?.addEventListener('abort', onAbort, { once: true })
    if (signal?.aborted) onAbort()
    this.#done = this.#pump().finally(() => signal?.removeEventListener('abort', onAbort))
  }

  /** Process id in the guest. */
  get pid() {
    return this.#process.pid
  }

  /** Output so far. */
  get stdout() {
    return this.#stdout
  }

  /** Error output so far. */
  get stderr() {
    return this.#stderr
  }

  get exitCode() {
    return this.#result?.exitCode
  }

  get error() {
    return this.#result?.error
  }

  async wait() {
    await this.#done
    if (this.#failure) throw this.#failure
    if (this.#result === undefined) {
      throw new SandboxError(
        'The handle was disconnected before the command ended; use commands.connect(pid)',
      )
    }
    if (this.#result.exitCode !== 0) throw new CommandExitError(this.#result)
    return this.#result
  }

  async disconnect() {
    this.#end()
  }

  async kill() {
    return this.#commands.kill(this.pid)
  }

  async sendStdin(data, opts) {
    return this.#commands.sendStdin(this.pid, data, opts)
  }

  async closeStdin(opts) {
    return this.#commands.closeStdin(this.pid, opts)
  }

  #end(failure) {
    if (this.#disconnected) return
    this.#disconnected = true
    if (this.#result === undefined) this.#failure ??= failure
    this.#process.disconnect()
  }

  /** Reads events until the end; callbacks are awaited in order, which is the back-pressure. */
  async #pump() {
    const out = decoder()
    const err = decoder()
    const emit = async (kind, text) => {
      if (text === '' || this.#disconnected) return
      if (kind === 'stdout') {
        this.#stdout += text
        await this.#onStdout?.(text)
      } else {
        this.#stderr += text
        await this.#onStderr?.(text)
      }
    }
    try {
      while (!this.#disconnected) {
        const event = await this.#process.next()
        if (event === null || this.#disconnected) return
        if (event.kind === 'end') {
          await emit('stdout', out.decode())
          await emit('stderr', err.decode())
          this.#result = new CommandResult({
            exitCode: event.exitCode,
            error: event.error ?? undefined,
            stdout: this.#stdout,
            stderr: this.#stderr,
          })
          return
        }
        if (event.kind === 'pty') await this.#onPty?.(new Uint8Array(event.data))
        else if (event.kind === 'stdout') await emit('stdout', out.decode(event.data, { stream: true }))
        else if (event.kind === 'stderr') await emit('stderr', err.decode(event.data, { stream: true }))
      }
    } catch (error) {
      this.#failure ??= fromNative(error)
      this.#process.disconnect()
    }
  }
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

/** What commands and terminals share: they differ in how a process is started. */
class Processes {
  /** @protected */
  _id

  constructor(sandboxId) {
    this._id = sandboxId
  }

  async _start(spec, callbacks, opts) {
    const process = await invoke(
      (call) => native.startProcess(this._id, spec, call),
      opts,
      undefined,
      (late) => late.disconnect(),
    )
    return new CommandHandle(process, this, callbacks)
  }

  async _connect(pid, callbacks, opts) {
    const timeoutMs = opts?.timeoutMs ?? COMMAND_TIMEOUT_MS
    const process = await invoke((call) => native.connectProcess(this._id, pid, timeoutMs, call), opts)
    return new CommandHandle(process, this, callbacks)
  }

  async kill(pid, opts) {
    return invoke((call) => native.signalProcess(this._id, pid, 9, call), opts)
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
      timeoutMs: opts.timeoutMs ?? COMMAND_TIMEOUT_MS,
    }
    const { onStdout, onStderr, signal } = opts
    const handle = await this._start(spec, { onStdout, onStderr, signal }, opts)
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
    return invoke((call) => native.listProcesses(this._id, call), opts)
  }

  async connect(pid, opts = {}) {
    const { onStdout, onStderr, signal } = opts
    return this._connect(pid, { onStdout, onStderr, signal }, opts)
  }

  async sendStdin(pid, data, opts) {
    const bytes = bytesOf(data)
    return invoke((call) => native.sendStdin(this._id, pid, bytes, call), opts)
  }

  async closeStdin(pid, opts) {
    return invoke((call) => native.closeStdin(this._id, pid, call), opts)
  }
}

/** `sandbox.pty` */
class Pty extends Processes {
  async create(opts) {
    const spec = {
      cmd: '/bin/bash',
      args: ['-i', '-l'],
      cwd: opts.cwd,
      user: opts.user,
      envs: { TERM: 'xterm-256color', LANG: 'C.UTF-8', LC_ALL: 'C.UTF-8', ...envPairs(opts.envs) },
      stdin: true,
      pty: { cols: opts.cols, rows: opts.rows },
      timeoutMs: opts.timeoutMs ?? COMMAND_TIMEOUT_MS,
    }
    return this._start(spec, { onPty: opts.onData, signal: opts.signal }, opts)
  }

  async connect(pid, opts = {}) {
    return this._connect(pid, { onPty: opts.onData, signal: opts.signal }, opts)
  }

  async sendInput(pid, data, opts) {
    const bytes = bytesOf(data)
    return invoke((call) => native.sendStdin(this._id, pid, bytes, call), opts)
  }

  /** What {@link CommandHandle.sendStdin} calls. */
  async sendStdin(pid, data, opts) {
    return this.sendInput(pid, data, opts)
  }

  async closeStdin() {
    throw new InvalidArgumentError('A terminal has no stdin to close: send "\\x04" instead')
  }

  async resize(pid, { cols, rows }, opts) {
    return invoke((call) => native.resizePty(this._id, pid, cols, rows, call), opts)
  }
}

module.exports = { Commands, Pty, CommandHandle, CommandResult }
