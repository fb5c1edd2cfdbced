'use strict'
/** Amberbox: local Linux sandboxes inside this process, with E2B's API. The types are in index.d.ts. */
const { Sandbox } = require('./lib/sandbox')
const { CommandHandle, CommandResult } = require('./lib/commands')
const { FileType } = require('./lib/files')
const { SandboxPaginator, SnapshotPaginator } = require('./lib/paginator')
const errors = require('./lib/errors')

module.exports = {
  __esModule: true,
  default: Sandbox,
  Sandbox,
  CommandHandle,
  CommandResult,
  FileType,
  SandboxPaginator,
  SnapshotPaginator,
  SandboxError: errors.SandboxError,
  TimeoutError: errors.TimeoutError,
  InvalidArgumentError: errors.InvalidArgumentError,
  NotEnoughSpaceError: errors.NotEnoughSpaceError,
  NotFoundError: errors.NotFoundError,
  FileNotFoundError: errors.FileNotFoundError,
  SandboxNotFoundError: errors.SandboxNotFoundError,
  TemplateError: errors.TemplateError,
  RateLimitError: errors.RateLimitError,
  SandboxCrashedError: errors.SandboxCrashedError,
  AuthenticationError: errors.AuthenticationError,
  CommandExitError: errors.CommandExitError,
}
