'use strict'
/**
 * Options of a sandbox that need more than a type check: what happens at its end, and its network. E2B's clients check
 * the same before they ask their cloud; what only the cloud can do is refused here, and the error says so.
 */
const { InvalidArgumentError, SandboxError } = require('./errors')

/** Something of E2B that a sandbox on this machine cannot have. */
function unavailable(what, why) {
  const error = new SandboxError(`${what} of E2B is not available in Amberbox: ${why}`)
  error.code = 'ERR_NOT_AVAILABLE'
  return error
}

const isObject = (value) => typeof value === 'object' && value !== null

/** Whether an option was really asked for: cloud options that are empty mean nothing. */
function isGiven(value) {
  if (value === undefined || value === null || value === false) return false
  return typeof value !== 'object' || Object.keys(value).length > 0
}

/** `keepMemory` and its newer spelling, `mode: 'full' | 'filesystem'`; memory is kept unless said otherwise. */
function keepsMemory({ keepMemory, mode } = {}) {
  if (mode !== undefined && mode !== 'full' && mode !== 'filesystem') {
    throw new InvalidArgumentError("mode must be 'full' or 'filesystem'")
  }
  if (keepMemory !== undefined && typeof keepMemory !== 'boolean') {
    throw new InvalidArgumentError('keepMemory must be a boolean')
  }
  if (mode !== undefined && keepMemory !== undefined && keepMemory !== (mode === 'full')) {
    throw new InvalidArgumentError(`keepMemory: ${keepMemory} contradicts mode: '${mode}'; leave one out`)
  }
  return mode === undefined ? (keepMemory ?? true) : mode === 'full'
}

/** What happens at the end of a sandbox's life, from `lifecycle` and the older `autoPause`. */
function lifecycleOf({ lifecycle, autoPause } = {}) {
  if (lifecycle !== undefined && lifecycle !== null && !isObject(lifecycle)) {
    throw new InvalidArgumentError('lifecycle must be an object')
  }
  const onTimeout = lifecycle?.onTimeout ?? (autoPause ? 'pause' : 'kill')
  const detailed = isObject(onTimeout)
  const action = detailed ? onTimeout.action : onTimeout
  if (action !== 'pause' && action !== 'kill') {
    throw new InvalidArgumentError("lifecycle.onTimeout must be 'pause' or 'kill'")
  }
  const pause = action === 'pause'
  const said = detailed && (onTimeout.keepMemory !== undefined || onTimeout.mode !== undefined)
  if (said && !pause) {
    throw new InvalidArgumentError("keepMemory can only be set when the onTimeout action is 'pause'")
  }
  const keepMemory = detailed ? keepsMemory(onTimeout) : true
  const autoResume = lifecycle?.autoResume ?? false
  if (typeof autoResume !== 'boolean') {
    throw new InvalidArgumentError('lifecycle.autoResume must be a boolean')
  }
  if (autoResume && !pause) {
    throw new InvalidArgumentError("autoResume can only be set when the onTimeout action is 'pause'")
  }
  if (autoResume && !keepMemory) {
    throw new InvalidArgumentError('autoResume needs the memory that keepMemory: false throws away')
  }
  return { pause, keepMemory, autoResume }
}

/** E2B's shape of what {@link lifecycleOf} made. */
function lifecycleInfo({ pause, keepMemory, autoResume }) {
  const onTimeout = pause ? 'pause' : 'kill'
  return keepMemory ? { onTimeout, autoResume } : { onTimeout, autoResume, keepMemory }
}

/** Everything outside, as a CIDR. */
const ALL_TRAFFIC = '0.0.0.0/0'

/** Addresses of a rule: given as such, or by a function of what can be referred to. */
function addresses(rule, name) {
  const list = typeof rule === 'function' ? rule({ allTraffic: ALL_TRAFFIC, rules: new Map() }) : rule
  if (list === undefined || list === null) return undefined
  if (!Array.isArray(list) || !list.every((address) => typeof address === 'string' && address !== '')) {
    throw new InvalidArgumentError(`network.${name} must be a list of addresses`)
  }
  return list
}

/** Refuses the parts of a network that need E2B's cloud. */
function refuseCloudNetwork(network) {
  if (isGiven(network.rules))
    throw unavailable('network.rules', 'it rewrites requests inside TLS connections')
  if (isGiven(network.egressProxy)) {
    throw unavailable('network.egressProxy', 'sandboxes have no network beyond their own')
  }
  if (isGiven(network.httpsPorts)) {
    throw unavailable('network.httpsPorts', 'getHost forwards bytes as they are, TLS included')
  }
}

/** The rules for connections that a sandbox makes. A sandbox has no network beyond its own, so they are kept and shown. */
function egressOf(network) {
  if (!isObject(network)) throw new InvalidArgumentError('network must be an object')
  refuseCloudNetwork(network)
  const rules = {
    allowOut: addresses(network.allowOut, 'allowOut'),
    denyOut: addresses(network.denyOut, 'denyOut'),
  }
  return Object.fromEntries(Object.entries(rules).filter(([, list]) => list !== undefined))
}

/** The network of a new sandbox: its rules, and whether its ports are private. */
function networkOf({ network, allowInternetAccess } = {}) {
  if (allowInternetAccess !== undefined && typeof allowInternetAccess !== 'boolean') {
    throw new InvalidArgumentError('allowInternetAccess must be a boolean')
  }
  if (network === undefined || network === null) {
    return { network: undefined, allowInternetAccess, privatePorts: false }
  }
  const rules = egressOf(network)
  if (isGiven(network.maskRequestHost)) {
    // It becomes a header line of each request.
    if (typeof network.maskRequestHost !== 'string' || !/^[\x21-\x7e]+$/.test(network.maskRequestHost)) {
      throw new InvalidArgumentError("network.maskRequestHost must be a host, such as 'localhost:${PORT}'")
    }
    rules.maskRequestHost = network.maskRequestHost
  }
  if (network.allowPublicTraffic !== undefined) {
    if (typeof network.allowPublicTraffic !== 'boolean') {
      throw new InvalidArgumentError('network.allowPublicTraffic must be a boolean')
    }
    rules.allowPublicTraffic = network.allowPublicTraffic
  }
  return {
    network: JSON.stringify(rules),
    allowInternetAccess,
    privatePorts: rules.allowPublicTraffic === false,
    maskRequestHost: rules.maskRequestHost,
  }
}

/** Refuses what belongs to E2B's cloud. */
function refuseCloudOptions(opts) {
  if (isGiven(opts.mcp)) {
    throw new SandboxError(
      'Failed to start MCP gateway: the gateway belongs to E2B and is not part of a local sandbox',
    )
  }
  if (isGiven(opts.iam)) throw unavailable('iam', 'there is no cloud account to act for')
  if (isGiven(opts.volumeMounts)) {
    throw unavailable(
      'volumeMounts',
      "volumes belong to E2B's cloud; keep data in a snapshot or pass it through files",
    )
  }
}

module.exports = {
  ALL_TRAFFIC,
  egressOf,
  keepsMemory,
  lifecycleInfo,
  lifecycleOf,
  networkOf,
  refuseCloudOptions,
  unavailable,
}
