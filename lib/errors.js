'use strict'
/**
 * Error classes, with E2B's names and hierarchy, and the one place where the native layer's error codes become
 * classes. A native error travels as the message `ERR_X: text`, optionally followed by U+001E and a JSON object of
 * details (async native functions cannot set `code` themselves).
 */

/** Base class of most errors. `code` is stable and meant for programs; `message` is meant for people. */
class SandboxError extends Error {
  constructor(message, options) {
    super(message, options)
    this.name = 'SandboxError'
    /** @type {string} */
    this.code = 'ERR_SANDBOX'
  }
}

class TimeoutError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    this.name = 'TimeoutError'
    this.code = 'ERR_TIMEOUT'
  }
}

class InvalidArgumentError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    this.name = 'InvalidArgumentError'
    this.code = 'ERR_INVALID_ARGUMENT'
  }
}

class NotEnoughSpaceError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    this.name = 'NotEnoughSpaceError'
    this.code = 'ERR_NOT_ENOUGH_SPACE'
  }
}

class NotFoundError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    this.name = 'NotFoundError'
    this.code = 'ERR_NOT_FOUND'
  }
}

class FileNotFoundError extends NotFoundError {
  constructor(message, options) {
    super(message, options)
    this.name = 'FileNotFoundError'
    this.code = 'ERR_FILE_NOT_FOUND'
  }
}

class SandboxNotFoundError extends NotFoundError {
  constructor(message, options) {
    super(message, options)
    this.name = 'SandboxNotFoundError'
    this.code = 'ERR_SANDBOX_NOT_FOUND'
  }
}

class TemplateError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    this.name = 'TemplateError'
    this.code = 'ERR_TEMPLATE'
  }
}

class RateLimitError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    this.name = 'RateLimitError'
    this.code = 'ERR_RATE_LIMIT'
  }
}

/** The machine stopped by itself: kernel panic, triple fault, reset, or a fault of the VMM. Not one of E2B's. */
class SandboxCrashedError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    this.name = 'SandboxCrashedError'
    this.code = 'ERR_SANDBOX_CRASHED'
    /** Last lines of the guest's serial console. @type {string} */
    this.console = options?.console ?? ''
  }
}

class AuthenticationError extends Error {
  constructor(message, options) {
    super(message, options)
    this.name = 'AuthenticationError'
    this.code = 'ERR_AUTHENTICATION'
  }
}

/** A command ended with an exit code other than 0. */
class CommandExitError extends SandboxError {
  constructor(result) {
    super(result.error ?? `exit status ${result.exitCode}`)
    this.name = 'CommandExitError'
    this.code = 'ERR_COMMAND_EXIT'
    Object.defineProperty(this, 'result', { value: result, enumerable: false })
    this.exitCode = result.exitCode
    this.error = result.error
    this.stdout = result.stdout
    this.stderr = result.stderr
  }
}

/** Native error code → class. `SandboxError` covers every code that needs no class of its own. */
const CLASS_OF_CODE = {
  ERR_INVALID_ARGUMENT: InvalidArgumentError,
  ERR_AUTHENTICATION: AuthenticationError,
  ERR_NOT_FOUND: NotFoundError,
  ERR_FILE_NOT_FOUND: FileNotFoundError,
  ERR_SANDBOX_NOT_FOUND: SandboxNotFoundError,
  ERR_TIMEOUT: TimeoutError,
  ERR_REQUEST_TIMEOUT: TimeoutError,
  ERR_SANDBOX_KILLED: TimeoutError,
  ERR_SANDBOX_CRASHED: SandboxCrashedError,
  ERR_NOT_ENOUGH_SPACE: NotEnoughSpaceError,
  ERR_TEMPLATE_MISSING: TemplateError,
  ERR_RATE_LIMIT: RateLimitError,
  ERR_UNKNOWN_TEMPLATE: SandboxError,
  ERR_CONFLICT: SandboxError,
  ERR_SNAPSHOT_IN_USE: SandboxError,
  ERR_SNAPSHOT_CORRUPT: SandboxError,
  ERR_SNAPSHOT_VERSION: SandboxError,
  ERR_STORE: SandboxError,
  ERR_STORE_FULL: SandboxError,
  ERR_AGENT: SandboxError,
  ERR_MACHINE: SandboxError,
  ERR_CANCELLED: SandboxError,
  ERR_INTERNAL: SandboxError,
}

const NATIVE_MESSAGE = /^(ERR_[A-Z_]+): ([^\u001e]*)(?:\u001e(\{.*\}))?$/s

/** Turns what the native layer threw into one of the classes above; anything else passes unchanged. */
function fromNative(error) {
  if (!(error instanceof Error) && typeof error?.message !== 'string') return error
  if (error instanceof SandboxError || error instanceof AuthenticationError) return error
  const match = NATIVE_MESSAGE.exec(error.message)
  if (!match) return error
  const [, code, text, json] = match
  const details = json ? JSON.parse(json) : {}
  const Class = CLASS_OF_CODE[code] ?? SandboxError
  // The native error says the same, and no more: it is not kept as the cause.
  const mapped = new Class(text, details)
  mapped.code = code
  return mapped
}

module.exports = {
  CLASS_OF_CODE,
  fromNative,
  SandboxError,
  TimeoutError,
  InvalidArgumentError,
  NotEnoughSpaceError,
  NotFoundError,
  FileNotFoundError,
  SandboxNotFoundError,
  TemplateError,
  RateLimitError,
  SandboxCrashedError,
  AuthenticationError,
  CommandExitError,
}
