'use strict'
/** The `Sandbox` class: E2B's static and instance methods over the native registry of this process. */
const { native, invoke, places } = require('./native')
const { Commands, Pty } = require('./commands')
const { ClientFactory, ConnectionConfig, mergeOpts } = require('./config')
const { Filesystem } = require('./files')
const { Git } = require('./git')
const { InvalidArgumentError, fromNative } = require('./errors')
const options = require('./options')
const { SandboxPaginator, SnapshotPaginator } = require('./paginator')
const { exportSnapshot, importSnapshot } = require('./store')
const { fileUrl } = require('./urls')

const DEFAULT_TEMPLATE = 'base'
const DEFAULT_SANDBOX_TIMEOUT_MS = 300_000
/** Work whose length depends on the sandbox's size has no default request timeout, only the one that is asked for. */
const NO_TIMEOUT = 0
const PAGE_LIMIT = 100

const NO_MCP = 'the MCP gateway is not part of a local sandbox'

/** Where the forwarded ports of sandboxes are. */
const SANDBOX_DOMAIN = '127.0.0.1'

function checkString(value, what) {
  if (typeof value !== 'string' || value === '')
    throw new InvalidArgumentError(`${what} must be a non-empty string`)
  return value
}

function checkTimeout(value) {
  if (typeof value !== 'number' || !Number.isFinite(value) || value < 0) {
    throw new InvalidArgumentError('timeoutMs must be a number of milliseconds that is not negative')
  }
  return value
}

/** A date as milliseconds since the epoch. */
function checkDate(date, what) {
  if (date === undefined || date === null) return undefined
  const ms = new Date(date).getTime()
  if (Number.isNaN(ms)) throw new InvalidArgumentError(`${what} must be a date`)
  return ms
}

function checkLimit(limit) {
  if (limit === undefined) return PAGE_LIMIT
  if (!Number.isInteger(limit) || limit < 1)
    throw new InvalidArgumentError('limit must be a whole number of at least 1')
  return limit
}

function snapshotInfo({ createdAtMs, parentId, sandboxId, metadata, ...raw }) {
  return {
    ...raw,
    createdAt: new Date(createdAtMs),
    parentId: parentId ?? undefined,
    sandboxId: sandboxId ?? undefined,
    metadata: JSON.parse(metadata || '{}'),
  }
}

function checkStates(states) {
  if (states === undefined || states === null) return ['running', 'paused']
  const list = Array.isArray(states) ? states : [states]
  if (!list.every((state) => state === 'running' || state === 'paused')) {
    throw new InvalidArgumentError("state must be a list of 'running' and 'paused'")
  }
  return list
}

function checkOrder(order = 'desc') {
  if (order !== 'asc' && order !== 'desc') throw new InvalidArgumentError("order must be 'asc' or 'desc'")
  return order
}

function stringMap(map, what) {
  if (map === undefined || map === null) return {}
  if (typeof map !== 'object') throw new InvalidArgumentError(`${what} must be an object of strings`)
  return Object.fromEntries(Object.entries(map).map(([key, value]) => [key, String(value)]))
}

function sandboxInfo(raw) {
  return {
    sandboxId: raw.sandboxId,
    templateId: raw.templateId,
    name: raw.name ?? undefined,
    metadata: raw.metadata,
    startedAt: new Date(raw.startedAtMs),
    endAt: new Date(raw.endAtMs),
    state: raw.state,
    cpuCount: raw.cpuCount,
    memoryMB: raw.memoryMb,
    envdVersion: raw.envdVersion,
    allowInternetAccess: raw.allowInternetAccess ?? undefined,
    network: raw.network ? JSON.parse(raw.network) : undefined,
    lifecycle: options.lifecycleInfo(raw.lifecycle),
    sandboxDomain: SANDBOX_DOMAIN,
    backend: raw.backend,
    backendReason: raw.backendReason,
  }
}

/** Version of E2B's guest daemon whose behaviour the guest agent follows; programs switch features by it. */
const ENVD_VERSION = '0.6.13'

/** What a handle has to know about its sandbox. */
function identity({ sandboxId, trafficAccessToken }) {
  return { sandboxId, trafficAccessToken: trafficAccessToken ?? undefined }
}

/** Finds a sandbox that runs, or resumes a paused one; gives what is known about it. */
async function connect(sandboxId, opts) {
  const timeoutMs = checkTimeout(opts.timeoutMs ?? DEFAULT_SANDBOX_TIMEOUT_MS)
  const onResume = opts.onResume ?? 'restore'
  if (onResume !== 'restore' && onResume !== 'reboot') {
    throw new InvalidArgumentError("onResume must be 'restore' or 'reboot'")
  }
  return invoke(
    (call) => native.connectSandbox(places(), sandboxId, timeoutMs, onResume === 'reboot', call),
    opts,
    NO_TIMEOUT,
  )
}

class Sandbox extends ClientFactory {
  /** Request timeout that every call on this sandbox takes unless it has its own. */
  #bound

  /** @param {{ sandboxId: string, trafficAccessToken?: string }} opts what `create` and `connect` pass; not meant to be called by programs */
  constructor(opts) {
    super()
    this.sandboxId = checkString(opts?.sandboxId, 'sandboxId')
    this.sandboxDomain = SANDBOX_DOMAIN
    this.trafficAccessToken = opts.trafficAccessToken
    const { requestTimeoutMs } = opts
    this.#bound = requestTimeoutMs === undefined ? undefined : { requestTimeoutMs }
    /** @protected */
    this.connectionConfig = new ConnectionConfig(opts)
    /** @private */
    this.envdApi = { version: ENVD_VERSION }
    this.commands = new Commands(this.sandboxId, this.#bound)
    this.files = new Filesystem(this.sandboxId, this.#bound)
    this.pty = new Pty(this.sandboxId, this.#bound)
    this.git = new Git(this.commands)
  }

  /** @protected Options of a call over those of this sandbox. */
  resolveOpts(opts) {
    return mergeOpts(this.#bound, opts)
  }

  static async create(templateOrOpts, maybeOpts) {
    const opts = this.resolveOpts(typeof templateOrOpts === 'string' ? maybeOpts : templateOrOpts) ?? {}
    const template =
      typeof templateOrOpts === 'string'
        ? templateOrOpts
        : (opts.template ?? this.defaultTemplate ?? DEFAULT_TEMPLATE)
    options.refuseCloudOptions(opts)
    const request = {
      places: places(),
      template: checkString(template, 'template'),
      metadata: stringMap(opts.metadata, 'metadata'),
      envs: stringMap(opts.envs, 'envs'),
      timeoutMs: checkTimeout(opts.timeoutMs ?? DEFAULT_SANDBOX_TIMEOUT_MS),
      lifecycle: options.lifecycleOf(opts),
      ...options.networkOf(opts),
    }
    const info = await invoke(
      (call) => native.createSandbox(request, call),
      opts,
      NO_TIMEOUT,
      (late) => native.killSandbox(request.places, late.sandboxId, { token: 0, timeoutMs: 0 }),
    )
    return new this({ ...opts, ...identity(info) })
  }

  static async connect(sandboxId, connectOpts) {
    const opts = this.resolveOpts(connectOpts) ?? {}
    checkString(sandboxId, 'sandboxId')
    return new this({ ...opts, ...identity(await connect(sandboxId, opts)) })
  }

  static list(listOpts) {
    const opts = this.resolveOpts(listOpts) ?? {}
    const query = opts.query ?? {}
    const request = {
      ...places(),
      metadata: stringMap(query.metadata, 'metadata'),
      states: checkStates(query.state),
      startedAfterMs: checkDate(query.startedAfter, 'startedAfter'),
      template: query.template,
      order: checkOrder(opts.order),
      limit: checkLimit(opts.limit),
    }
    return new SandboxPaginator(async (nextToken, pageOpts) => {
      const page = await invoke((call) => native.listSandboxes({ ...request, nextToken }, call), {
        ...opts,
        ...pageOpts,
      })
      return { items: page.items.map(sandboxInfo), nextToken: page.nextToken }
    }, opts.nextToken)
  }

  static async kill(sandboxId, opts) {
    checkString(sandboxId, 'sandboxId')
    return invoke((call) => native.killSandbox(places(), sandboxId, call), this.resolveOpts(opts))
  }

  static async getInfo(sandboxId, opts) {
    checkString(sandboxId, 'sandboxId')
    const info = await invoke((call) => native.sandboxInfo(places(), sandboxId, call), this.resolveOpts(opts))
    return sandboxInfo(info)
  }

  static async getFullInfo(sandboxId, opts) {
    return this.getInfo(sandboxId, opts)
  }

  static async getMetrics(sandboxId, metricsOpts) {
    const opts = this.resolveOpts(metricsOpts) ?? {}
    checkString(sandboxId, 'sandboxId')
    const [start, end] = [checkDate(opts.start, 'start'), checkDate(opts.end, 'end')]
    const samples = await invoke((call) => native.sandboxMetrics(sandboxId, start, end, call), opts)
    return samples.map(({ atMs, ...numbers }) => ({ timestamp: new Date(atMs), ...numbers }))
  }

  static async setTimeout(sandboxId, timeoutMs, opts) {
    checkString(sandboxId, 'sandboxId')
    checkTimeout(timeoutMs)
    await invoke((call) => native.setSandboxTimeout(sandboxId, timeoutMs, call), this.resolveOpts(opts))
  }

  static async createSnapshot(sandboxId, snapshotOpts) {
    const opts = this.resolveOpts(snapshotOpts) ?? {}
    checkString(sandboxId, 'sandboxId')
    const diskAlone = !options.keepsMemory({ mode: opts.mode })
    const raw = await invoke(
      (call) => native.createSnapshot(sandboxId, opts.name, diskAlone, call),
      opts,
      NO_TIMEOUT,
    )
    return snapshotInfo(raw)
  }

  static async pause(sandboxId, pauseOpts) {
    const opts = this.resolveOpts(pauseOpts) ?? {}
    checkString(sandboxId, 'sandboxId')
    const keepMemory = options.keepsMemory(opts)
    return invoke((call) => native.pauseSandbox(places(), sandboxId, keepMemory, call), opts, NO_TIMEOUT)
  }

  static async betaPause(sandboxId, opts) {
    return this.pause(sandboxId, opts)
  }

  static async fork(sandboxId, forkOpts) {
    const opts = this.resolveOpts(forkOpts) ?? {}
    checkString(sandboxId, 'sandboxId')
    const count = opts.count ?? 1
    if (!Number.isInteger(count) || count < 1) {
      throw new InvalidArgumentError('count must be a whole number of at least 1')
    }
    const timeoutMs = checkTimeout(opts.timeoutMs ?? DEFAULT_SANDBOX_TIMEOUT_MS)
    const at = places()
    const copies = await invoke(
      (call) => native.forkSandbox(at, sandboxId, count, timeoutMs, call),
      opts,
      NO_TIMEOUT,
      (late) =>
        Promise.all(
          late
            .filter(({ sandbox }) => sandbox)
            .map(({ sandbox }) => native.killSandbox(at, sandbox.sandboxId, { token: 0, timeoutMs: 0 })),
        ),
    )
    return copies.map(({ sandbox, error }) =>
      sandbox ? new this({ ...opts, ...identity(sandbox) }) : fromNative(new Error(error)),
    )
  }

  /** Novita's `fork`: only sandboxes; with `strict`, all of them or an error. */
  static async clone(sandboxId, opts = {}) {
    const copies = await this.fork(sandboxId, opts)
    const sandboxes = copies.filter((copy) => !(copy instanceof Error))
    const failed = copies.find((copy) => copy instanceof Error)
    if (failed && (opts.strict || sandboxes.length === 0)) {
      await Promise.all(sandboxes.map((sandbox) => sandbox.kill()))
      throw failed
    }
    return { sandboxes, count: sandboxes.length }
  }

  static async betaCreate(templateOrOpts, maybeOpts) {
    return this.create(templateOrOpts, maybeOpts)
  }

  static async setNetwork(sandboxId, network, opts) {
    await this.updateNetwork(sandboxId, network, opts)
  }

  static async updateNetwork(sandboxId, network, updateOpts) {
    const opts = this.resolveOpts(updateOpts)
    checkString(sandboxId, 'sandboxId')
    const egress = options.egressOf(network)
    // What concerns the sandbox's own ports is not part of an update, and stays.
    const { network: before } = await this.getInfo(sandboxId, opts)
    const { allowPublicTraffic, maskRequestHost } = before ?? {}
    const rules = JSON.stringify({ ...egress, allowPublicTraffic, maskRequestHost })
    await invoke((call) => native.updateNetwork(sandboxId, rules, network.allowInternetAccess, call), opts)
  }

  static listSnapshots(listOpts) {
    const opts = this.resolveOpts(listOpts) ?? {}
    const request = { ...places(), sandboxId: opts.sandboxId, name: opts.name, limit: checkLimit(opts.limit) }
    return new SnapshotPaginator(async (nextToken, pageOpts) => {
      const page = await invoke((call) => native.listSnapshots({ ...request, nextToken }, call), {
        ...opts,
        ...pageOpts,
      })
      return {
        items: page.items.map(snapshotInfo),
        nextToken: page.nextToken,
      }
    }, opts.nextToken)
  }

  static async deleteSnapshot(snapshotId, deleteOpts) {
    const opts = this.resolveOpts(deleteOpts)
    checkString(snapshotId, 'snapshotId')
    const force = opts?.force ?? false
    return invoke((call) => native.deleteSnapshot(places(), snapshotId, force, call), opts)
  }

  static async exportSnapshot(snapshotId, destination, opts) {
    return exportSnapshot(snapshotId, destination, this.resolveOpts(opts))
  }

  static async importSnapshot(source, opts) {
    return importSnapshot(source, this.resolveOpts(opts))
  }

  async connect(connectOpts) {
    const opts = this.resolveOpts(connectOpts) ?? {}
    const { trafficAccessToken } = identity(await connect(this.sandboxId, opts))
    this.trafficAccessToken = trafficAccessToken
    return this
  }

  async isRunning(opts) {
    return invoke((call) => native.isRunning(this.sandboxId, call), this.resolveOpts(opts))
  }

  async setTimeout(timeoutMs, opts) {
    await Sandbox.setTimeout(this.sandboxId, timeoutMs, this.resolveOpts(opts))
  }

  async kill(opts) {
    return Sandbox.kill(this.sandboxId, this.resolveOpts(opts))
  }

  async getInfo(opts) {
    return Sandbox.getInfo(this.sandboxId, this.resolveOpts(opts))
  }

  async getMetrics(opts) {
    return Sandbox.getMetrics(this.sandboxId, this.resolveOpts(opts))
  }

  getHost(port, { bind = SANDBOX_DOMAIN } = {}) {
    if (!Number.isInteger(port) || port < 1 || port > 65_535) {
      throw new InvalidArgumentError('port must be a whole number from 1 to 65535')
    }
    checkString(bind, 'bind')
    try {
      return native.forwardPort(this.sandboxId, port, bind)
    } catch (error) {
      throw fromNative(error)
    }
  }

  async uploadUrl(path, opts) {
    if (path !== undefined) checkString(path, 'path')
    return fileUrl(this.sandboxId, 'write', path ?? '', opts)
  }

  async downloadUrl(path, opts) {
    checkString(path, 'path')
    return fileUrl(this.sandboxId, 'read', path, opts)
  }

  getMcpUrl() {
    throw options.unavailable('getMcpUrl', NO_MCP)
  }

  async getMcpToken() {
    throw options.unavailable('getMcpToken', NO_MCP)
  }

  async pause(opts) {
    return Sandbox.pause(this.sandboxId, this.resolveOpts(opts))
  }

  async betaPause(opts) {
    return this.pause(opts)
  }

  async fork(opts) {
    return this.constructor.fork(this.sandboxId, this.resolveOpts(opts))
  }

  async clone(opts) {
    return this.constructor.clone(this.sandboxId, this.resolveOpts(opts))
  }

  async setNetwork(network, opts) {
    await this.updateNetwork(network, opts)
  }

  async updateNetwork(network, opts) {
    await Sandbox.updateNetwork(this.sandboxId, network, this.resolveOpts(opts))
  }

  async createSnapshot(opts) {
    return Sandbox.createSnapshot(this.sandboxId, this.resolveOpts(opts))
  }

  listSnapshots(opts = {}) {
    return Sandbox.listSnapshots({ ...this.resolveOpts(opts), sandboxId: this.sandboxId })
  }
}

// Node 20 has the symbol only under a name of its own; `await using` arrives with Node 24.
const asyncDispose = Symbol.asyncDispose ?? Symbol.for('Symbol.asyncDispose')
Object.defineProperty(Sandbox.prototype, asyncDispose, {
  configurable: true,
  writable: true,
  value: async function dispose() {
    await this.kill()
  },
})

module.exports = { Sandbox, DEFAULT_SANDBOX_TIMEOUT_MS }
