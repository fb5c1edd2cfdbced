'use strict'
/** Amberbox: local Linux sandboxes inside this process, with E2B's API. The types are in index.d.ts. */
const client = require('./lib/client')
const { Commands, Pty } = require('./lib/commands')
const { ConnectionConfig, getSignature } = require('./lib/config')
const errors = require('./lib/errors')
const { Filesystem, FileType } = require('./lib/files')
const { Git } = require('./lib/git')
const { CommandHandle, CommandResult, OutputChunk } = require('./lib/handle')
const { SandboxPaginator, SnapshotPaginator } = require('./lib/paginator')
const { Sandbox } = require('./lib/sandbox')
const { store } = require('./lib/store')
const { FilesystemEventType, WatchHandle } = require('./lib/watch')

module.exports = {
  __esModule: true,
  default: Sandbox,
  Sandbox,
  Commands,
  CommandHandle,
  CommandResult,
  OutputChunk,
  Pty,
  Filesystem,
  FileType,
  FilesystemEventType,
  WatchHandle,
  Git,
  SandboxPaginator,
  SnapshotPaginator,
  store,
  ConnectionConfig,
  getSignature,
  ALL_TRAFFIC: client.ALL_TRAFFIC,
  ApiClient: client.ApiClient,
  E2B: client.E2B,
  LogEntry: client.LogEntry,
  LogEntryEnd: client.LogEntryEnd,
  LogEntryStart: client.LogEntryStart,
  ReadyCmd: client.ReadyCmd,
  Secret: client.Secret,
  SecretPaginator: client.SecretPaginator,
  Template: client.Template,
  TemplateBase: client.TemplateBase,
  Volume: client.Volume,
  VolumeFileType: client.VolumeFileType,
  defaultBuildLogger: client.defaultBuildLogger,
  waitForFile: client.waitForFile,
  waitForPort: client.waitForPort,
  waitForProcess: client.waitForProcess,
  waitForTimeout: client.waitForTimeout,
  waitForURL: client.waitForURL,
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
  GitAuthError: errors.GitAuthError,
  GitUpstreamError: errors.GitUpstreamError,
  BuildError: errors.BuildError,
  FileUploadError: errors.FileUploadError,
  VolumeError: errors.VolumeError,
  VolumeNotFoundError: errors.VolumeNotFoundError,
  VolumePathNotFoundError: errors.VolumePathNotFoundError,
  SecretError: errors.SecretError,
  SecretNotFoundError: errors.SecretNotFoundError,
  ServiceBusyError: errors.ServiceBusyError,
  CommandExitError: errors.CommandExitError,
}
