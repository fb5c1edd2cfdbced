// The ES module view of index.js: the same classes, so `instanceof` works across both module systems.
import amberbox from './index.js'

export const {
  Sandbox,
  CommandHandle,
  CommandResult,
  FileType,
  SandboxPaginator,
  SnapshotPaginator,
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
} = amberbox
export default Sandbox
