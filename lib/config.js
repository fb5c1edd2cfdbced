'use strict'
/**
 * E2B's connection options. Only `requestTimeoutMs` and `signal` mean something here, because there is no connection:
 * the rest is accepted, kept and shown, so that programs which pass or read it need no change.
 */
const { createHash } = require('node:crypto')

/** E2B's default for a request that is not a command or a transfer. */
const REQUEST_TIMEOUT_MS = 60_000

const env = (name) => process.env[name] || undefined

/** The options of a program and of its environment, resolved as E2B resolves them. */
class ConnectionConfig {
  constructor(opts = {}) {
    this.apiKey = opts.apiKey || env('E2B_API_KEY')
    this.validateApiKey = opts.validateApiKey
    this.debug = opts.debug ?? env('E2B_DEBUG')?.toLowerCase() === 'true'
    this.domain = opts.domain || env('E2B_DOMAIN') || 'e2b.app'
    this.requestTimeoutMs = opts.requestTimeoutMs ?? REQUEST_TIMEOUT_MS
    this.retries = opts.retries ?? 3
    this.logger = opts.logger
    this.headers = { ...opts.headers, ...opts.apiHeaders }
    this.proxy = opts.proxy
    this.apiUrl =
      opts.apiUrl ||
      env('E2B_API_URL') ||
      (this.debug ? 'http://localhost:3000' : `https://api.${this.domain}`)
    this.sandboxUrl = opts.sandboxUrl || env('E2B_SANDBOX_URL')
  }

  /** A signal that is aborted by `signal` or after the request timeout, whichever comes first. */
  getSignal(requestTimeoutMs = this.requestTimeoutMs, signal = undefined) {
    const signals = signal ? [signal] : []
    if (requestTimeoutMs) signals.push(AbortSignal.timeout(requestTimeoutMs))
    return signals.length > 1 ? AbortSignal.any(signals) : signals[0]
  }
}

/** Options of a call over those that are bound to its class or sandbox; `undefined` overrides nothing. */
function mergeOpts(bound, opts) {
  if (!bound) return opts
  const given = Object.entries(opts ?? {}).filter(([, value]) => value !== undefined)
  return { ...bound, ...Object.fromEntries(given) }
}

/** A class whose calls may have options bound to them, as those of an `E2B` client have. */
class ClientFactory {
  /** @protected @type {object | undefined} */
  static boundOpts = undefined

  /** @protected */
  static resolveOpts(opts) {
    return mergeOpts(this.boundOpts, opts)
  }
}

/**
 * Signature of a file's URL: E2B's scheme, so that URLs made by other tools for the same token are the same.
 *
 * @returns {Promise<{ signature: string, expiration: number | null }>} expiration in seconds since the epoch
 */
async function getSignature({ path, operation, user, expirationInSeconds, envdAccessToken }) {
  if (!envdAccessToken) throw new Error('Access token is not set and signature cannot be generated!')
  const expiration =
    expirationInSeconds === undefined || expirationInSeconds === null
      ? null
      : Math.floor(Date.now() / 1000) + expirationInSeconds
  const parts = [path, operation, user ?? '', envdAccessToken, ...(expiration === null ? [] : [expiration])]
  const digest = createHash('sha256').update(parts.join(':')).digest('base64')
  return { signature: `v1_${digest.replace(/=+$/, '')}`, expiration }
}

module.exports = { ClientFactory, ConnectionConfig, REQUEST_TIMEOUT_MS, getSignature, mergeOpts }
