'use strict'
/**
 * Error classes, with E2B's names and hierarchy, and the one place where the native layer's error codes become
 * classes. A native error travels as the message `ERR_X: text`, optionally followed by U+001E and a JSON object of
 * details (async native functions cannot set `code` themselves).
 */

/**
 * Sets what every error class has: `name`, `code`, and, when the second argument is a string, the stack that the
 * caller wants shown (E2B's constructors take one); where the error really arose is then its `cause`.
 */
function dress(error, name, code, options) {
  error.name = name
  error.code = code
  if (typeof options !== 'string') return
  const cause = new Error(error.message)
  if (error.cause instanceof Error) cause.stack = error.cause.stack
  else cause.stack = error.stack
  Object.defineProperty(error, 'cause', { value: cause, configurable: true, writable: true })
  Object.defineProperty(error, 'stack', {
    value: `${name}: ${error.message}\n${options}`,
    configurable: true,
    writable: true,
  })
}

/** The options of `Error` among the second arguments that the classes take. */
const native = (options) => (typeof options === 'string' ? undefined : options)

/** Base class of most errors. `code` is stable and meant for programs; `message` is meant for people. */
class SandboxError extends Error {
  constructor(message, options) {
    super(message, native(options))
    dress(this, 'SandboxError', 'ERR_SANDBOX', options)
  }
}

/** Makes a class whose instances differ from its parent's by name and code only. */
const define = (name, code, Parent) =>
  ({
    [name]: class extends Parent {
      constructor(message, options) {
        super(message, Parent === Error ? native(options) : options)
        dress(this, name, code, options)
      }
    },
  })[name]

const TimeoutError = define('TimeoutError', 'ERR_TIMEOUT', SandboxError)
const InvalidArgumentError = define('InvalidArgumentError', 'ERR_INVALID_ARGUMENT', SandboxError)
const NotEnoughSpaceError = define('NotEnoughSpaceError', 'ERR_NOT_ENOUGH_SPACE', SandboxError)
const NotFoundError = define('NotFoundError', 'ERR_NOT_FOUND', SandboxError)
const FileNotFoundError = define('FileNotFoundError', 'ERR_FILE_NOT_FOUND', NotFoundError)
const SandboxNotFoundError = define('SandboxNotFoundError', 'ERR_SANDBOX_NOT_FOUND', NotFoundError)
const TemplateError = define('TemplateError', 'ERR_TEMPLATE', SandboxError)
const GitUpstreamError = define('GitUpstreamError', 'ERR_GIT_UPSTREAM', SandboxError)

/** Too much at once. */
class RateLimitError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    dress(this, 'RateLimitError', 'ERR_RATE_LIMIT', options)
    this.statusCode = 429
  }
}

/** The machine stopped by itself: kernel panic, triple fault, reset, or a fault of the VMM. Not one of E2B's. */
class SandboxCrashedError extends SandboxError {
  constructor(message, options) {
    super(message, options)
    dress(this, 'SandboxCrashedError', 'ERR_SANDBOX_CRASHED', options)
    /** Last lines of the guest's serial console. @type {string} */
    this.console = options?.console ?? ''
  }
}

const AuthenticationError = define('AuthenticationError', 'ERR_AUTHENTICATION', Error)
const GitAuthError = define('GitAuthError', 'ERR_GIT_AUTH', AuthenticationError)
const BuildError = define('BuildError', 'ERR_BUILD', Error)
const FileUploadError = define('FileUploadError', 'ERR_FILE_UPLOAD', BuildError)
const VolumeError = define('VolumeError', 'ERR_VOLUME', Error)
const VolumeNotFoundError = define('VolumeNotFoundError', 'ERR_VOLUME_NOT_FOUND', VolumeError)
const VolumePathNotFoundError = define('VolumePathNotFoundError', 'ERR_VOLUME_PATH_NOT_FOUND', VolumeError)
const SecretError = define('SecretError', 'ERR_SECRET', Error)
const SecretNotFoundError = define('SecretNotFoundError', 'ERR_SECRET_NOT_FOUND', SecretError)

/** The service has no room now. E2B's cloud throws it; it is here for programs that look for it. */
class ServiceBusyError extends Error {
  constructor(message, options) {
    super(message, native(options))
    dress(this, 'ServiceBusyError', 'ERR_SERVICE_BUSY', options)
    this.statusCode = 503
  }
}

/** A command ended with an exit code other than 0. */
class CommandExitError extends SandboxError {
  constructor(result) {
    super(result.error ?? `exit status ${result.exitCode}`)
    dress(this, 'CommandExitError', 'ERR_COMMAND_EXIT')
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
  ERR_SANDBOX_PAUSED: TimeoutError,
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
  GitAuthError,
  GitUpstreamError,
  BuildError,
  FileUploadError,
  VolumeError,
  VolumeNotFoundError,
  VolumePathNotFoundError,
  SecretError,
  SecretNotFoundError,
  ServiceBusyError,
  CommandExitError,
}
