'use strict'
/**
 * Finds and loads the addon, and wraps each call to it: error mapping, request timeout, AbortSignal.
 */
const { existsSync, readFileSync } = require('node:fs')
const os = require('node:os')
const path = require('node:path')
const { REQUEST_TIMEOUT_MS } = require('./config')
const { fromNative } = require('./errors')

const ROOT = path.resolve(__dirname, '..')

/** Whether this process runs on musl: then its dynamic loader is musl's. (A diagnostic report would tell, in many milliseconds.) */
function isMusl() {
  try {
    return readFileSync('/proc/self/maps', 'latin1').includes('/ld-musl-')
  } catch {
    return false
  }
}

/** `linux-x64-gnu` and the like: the part that names a platform in file and package names. */
const PLATFORM = (() => {
  const libc = process.platform === 'linux' ? (isMusl() ? '-musl' : '-gnu') : ''
  return `${process.platform}-${process.arch}${libc}`
})()

function loadNative() {
  const local = path.join(ROOT, `amberbox.${PLATFORM}.node`)
  if (existsSync(local)) {
    try {
      return require(local)
    } catch (cause) {
      throw new Error(
        `Cannot load ${local}: ${cause.message}. It was probably built for another system: run \`npm run setup\` again.`,
        { cause },
      )
    }
  }
  const packageName = `@amberbox/${PLATFORM}`
  try {
    return require(packageName)
  } catch (cause) {
    if (cause?.code !== 'MODULE_NOT_FOUND') {
      throw new Error(`Cannot load ${packageName}: ${cause.message}. Reinstall it.`, { cause })
    }
    throw new Error(
      `Amberbox has no native addon for ${PLATFORM}: neither ${local} nor the package ${packageName} exists. ` +
        'In a clone run `npm run setup`; as a dependency, reinstall without `--omit=optional`.',
      { cause },
    )
  }
}

const native = loadNative()

/** Directory of the store: snapshots and templates. Shared by every process that names the same one. */
function home() {
  if (process.env.AMBERBOX_HOME) return path.resolve(process.env.AMBERBOX_HOME)
  const data = process.env.XDG_DATA_HOME || path.join(os.homedir(), '.local', 'share')
  return path.join(data, 'amberbox')
}

/** Directories in which the base template may lie, best first. */
function guestDirs() {
  if (process.env.AMBERBOX_GUEST) return [path.resolve(process.env.AMBERBOX_GUEST)]
  const dirs = []
  try {
    dirs.push(path.join(path.dirname(require.resolve(`@amberbox/${PLATFORM}/package.json`)), 'guest'))
  } catch {
    // The platform package is optional in a clone.
  }
  dirs.push(path.join(ROOT, '.cache', 'guest'))
  return dirs
}

/** Where this process keeps and finds things: every native call that touches the store gets it. */
function places() {
  return { home: home(), guest: guestDirs() }
}

/**
 * Calls the native layer. `start` receives `{ token, timeoutMs }`, which every native async function takes last.
 * @template T
 * @param {(call: { token: number, timeoutMs: number }) => Promise<T>} start
 * @param {{ requestTimeoutMs?: number, signal?: AbortSignal } | undefined} opts
 * @param {number} [defaultTimeoutMs] 0 = none
 * @param {(result: T) => unknown} [undo] what to do with a result that arrives after the signal was aborted
 * @returns {Promise<T>}
 */
async function invoke(start, opts, defaultTimeoutMs = REQUEST_TIMEOUT_MS, undo = undefined) {
  const timeoutMs = opts?.requestTimeoutMs ?? defaultTimeoutMs
  const signal = opts?.signal
  signal?.throwIfAborted()
  const token = signal ? native.newToken() : 0
  const onAbort = () => native.cancel(token)
  signal?.addEventListener('abort', onAbort, { once: true })
  try {
    const result = await start({ token, timeoutMs })
    if (signal?.aborted && undo) {
      await undo(result)
      throw signal.reason
    }
    return result
  } catch (error) {
    if (signal?.aborted) throw signal.reason
    throw fromNative(error)
  } finally {
    signal?.removeEventListener('abort', onAbort)
    if (signal) native.endToken(token)
  }
}

module.exports = { native, invoke, places, PLATFORM, REQUEST_TIMEOUT_MS }
