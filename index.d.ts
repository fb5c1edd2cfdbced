/**
 * Amberbox: Linux sandboxes inside a Node.js process, with memory snapshots. The API is E2B's.
 *
 * @packageDocumentation
 */

/** Options of a single request. */
export interface RequestOpts {
  /**
   * Longest time the request may take, in milliseconds; `0` means no limit. Default: 60 000 for requests to a
   * running sandbox, no limit for creating sandboxes and snapshots.
   */
  requestTimeoutMs?: number
  /** Aborts the request; the promise then rejects with the signal's reason. */
  signal?: AbortSignal
}

/**
 * Options that E2B needs to reach its cloud. They are accepted, so that programs need no change, and have no meaning
 * here: everything happens in this process.
 */
export interface ConnectionOpts extends RequestOpts {
  apiKey?: string
  accessToken?: string
  validateApiKey?: boolean
  domain?: string
  apiUrl?: string
  sandboxUrl?: string
  debug?: boolean
  logger?: unknown
  headers?: Record<string, string>
  apiHeaders?: Record<string, string>
  proxy?: string
  retries?: number
}

/** Options of {@link Sandbox.create}. */
export interface SandboxOpts extends ConnectionOpts {
  /** Template, snapshot id or snapshot name to start from. Default `'base'`. */
  template?: string
  /** Free key-value pairs, found again in {@link Sandbox.getInfo} and usable as a filter of {@link Sandbox.list}. */
  metadata?: Record<string, string>
  /** Environment of every command in the sandbox. */
  envs?: Record<string, string>
  /** Life of the sandbox in milliseconds, after which it is killed. Default 300 000. */
  timeoutMs?: number
  /** Accepted and without meaning: a sandbox can only be reached from its own process. */
  secure?: boolean
}

/** Options of {@link Sandbox.connect}. */
export interface SandboxConnectOpts extends ConnectionOpts {
  /** The sandbox lives at least this long from now on; never shortens its life. Default 300 000. */
  timeoutMs?: number
}

/** Whether a sandbox is live or frozen. */
export type SandboxState = 'running' | 'paused'

/** What runs the guest: hardware virtualization, or the software CPU. */
export type Backend = 'kvm' | 'soft'

/** What is known about a sandbox. */
export interface SandboxInfo {
  /** Id of the sandbox. */
  sandboxId: string
  /** Id of the template or snapshot it was created from. */
  templateId: string
  /** Name of the template or snapshot, if it has one. */
  name?: string
  /** Metadata given when it was created. */
  metadata: Record<string, string>
  /** When it was created. */
  startedAt: Date
  /** When it will be killed. */
  endAt: Date
  state: SandboxState
  cpuCount: number
  /** Memory of the guest in MiB. */
  memoryMB: number
  /** Version of E2B's guest daemon whose behaviour the guest agent follows. */
  envdVersion: string
  lifecycle?: { onTimeout: 'kill' | 'pause'; autoResume: boolean }
  sandboxDomain?: string
  /** What runs the guest. Beyond E2B. */
  backend: Backend
  /** Why this backend was chosen. Beyond E2B. */
  backendReason: string
}

/** Filter of {@link Sandbox.list}; all conditions must hold. */
export interface SandboxQuery {
  /** Pairs that the sandbox's metadata must all contain. */
  metadata?: Record<string, string>
  /** Default: both. */
  state?: SandboxState[]
  /** Only sandboxes started at this time or later. */
  startedAfter?: Date
  /** Only sandboxes created from this template or snapshot, by id or name. */
  template?: string
}

/** Options of {@link Sandbox.list}. */
export interface SandboxListOpts extends ConnectionOpts {
  query?: SandboxQuery
  /** By start time. Default `'desc'`: newest first. */
  order?: 'asc' | 'desc'
  /** Items per page. Default 100. */
  limit?: number
  /** Where to go on, as an earlier paginator's `nextToken` said. */
  nextToken?: string
}

/** A snapshot. */
export interface SnapshotInfo {
  /** Pass it to {@link Sandbox.create} or {@link Sandbox.deleteSnapshot}. */
  snapshotId: string
  /** Names without tag; empty if none was given. */
  names: string[]
}

/** Options of {@link Sandbox.createSnapshot}. */
export interface CreateSnapshotOpts extends ConnectionOpts {
  /**
   * Name, or `name:tag`: letters, digits, `-` and `_`. A name that exists already moves to the new content and keeps
   * its snapshot id.
   */
  name?: string
}

/** Options of {@link Sandbox.listSnapshots}. */
export interface SnapshotListOpts extends ConnectionOpts {
  /** Only snapshots made from this sandbox. */
  sandboxId?: string
  /** Only the snapshot with this name, `name:tag` or id. */
  name?: string
  /** Items per page. Default 100. */
  limit?: number
  /** Where to go on, as an earlier paginator's `nextToken` said. */
  nextToken?: string
}

/** Pages of a listing. */
export interface Paginator<T> {
  /** `true` before the first page, and while there are more. */
  readonly hasNext: boolean
  /** Where the next page starts. */
  readonly nextToken: string | undefined
  /**
   * Next page.
   *
   * @throws Error when there are no more pages
   */
  nextItems(opts?: RequestOpts): Promise<T[]>
}

/** Pages of {@link Sandbox.list}. */
export declare class SandboxPaginator implements Paginator<SandboxInfo> {
  private constructor()
  get hasNext(): boolean
  get nextToken(): string | undefined
  nextItems(opts?: RequestOpts): Promise<SandboxInfo[]>
}

/** Pages of {@link Sandbox.listSnapshots}. */
export declare class SnapshotPaginator implements Paginator<SnapshotInfo> {
  private constructor()
  get hasNext(): boolean
  get nextToken(): string | undefined
  nextItems(opts?: RequestOpts): Promise<SnapshotInfo[]>
}

/**
 * A Linux machine inside this process.
 *
 * A sandbox does not keep Node alive, and ends with its process at the latest. All module registries, contexts and
 * worker threads of a process see the same sandboxes.
 *
 * @example
 * ```ts
 * const sandbox = await Sandbox.create()
 * const { stdout } = await sandbox.commands.run('uname -a')
 * await sandbox.kill()
 * ```
 */
export declare class Sandbox implements AsyncDisposable {
  /** Made by {@link Sandbox.create} and {@link Sandbox.connect}. */
  constructor(opts: { sandboxId: string })

  /** Template of {@link Sandbox.create} when none is given; a subclass may set its own. */
  protected static readonly defaultTemplate?: string

  readonly sandboxId: string
  readonly sandboxDomain: string
  /** Run and control commands. */
  readonly commands: Commands
  /** Read and write files. */
  readonly files: Filesystem
  /** Run terminals. */
  readonly pty: Pty

  /**
   * Starts a sandbox from the base template.
   *
   * @throws {@link SandboxError} `404: …` if the template does not exist
   * @throws {@link TemplateError} if the base template has not been built yet
   */
  static create<S extends typeof Sandbox>(this: S, opts?: SandboxOpts): Promise<InstanceType<S>>
  /**
   * Starts a sandbox from a template or snapshot. Processes in a snapshot go on running in each sandbox made from it.
   *
   * @param template template, snapshot id or snapshot name
   */
  static create<S extends typeof Sandbox>(
    this: S,
    template: string,
    opts?: SandboxOpts,
  ): Promise<InstanceType<S>>

  /**
   * Gives a handle to a sandbox of this process.
   *
   * @throws {@link SandboxNotFoundError} if there is none with this id
   */
  static connect<S extends typeof Sandbox>(
    this: S,
    sandboxId: string,
    opts?: SandboxConnectOpts,
  ): Promise<InstanceType<S>>

  /** Lists the sandboxes of this process, newest first. */
  static list(opts?: SandboxListOpts): SandboxPaginator

  /**
   * Ends a sandbox at once.
   *
   * @returns `false` if there is none with this id
   */
  static kill(sandboxId: string, opts?: ConnectionOpts): Promise<boolean>

  /** What is known about a sandbox. */
  static getInfo(sandboxId: string, opts?: ConnectionOpts): Promise<SandboxInfo>

  /** Sets the end of a sandbox's life to `timeoutMs` from now, earlier or later than it was. */
  static setTimeout(sandboxId: string, timeoutMs: number, opts?: ConnectionOpts): Promise<void>

  /**
   * Freezes a sandbox into a snapshot: file system, memory and running processes. The sandbox goes on running under the
   * same id.
   */
  static createSnapshot(sandboxId: string, opts?: CreateSnapshotOpts): Promise<SnapshotInfo>

  /** Lists snapshots, newest first. */
  static listSnapshots(opts?: SnapshotListOpts): SnapshotPaginator

  /**
   * Deletes a snapshot.
   *
   * @returns `false` if it does not exist
   * @throws {@link SandboxError} `400: …` while running sandboxes were created from it; the message names them
   */
  static deleteSnapshot(snapshotId: string, opts?: ConnectionOpts): Promise<boolean>

  /** Like {@link Sandbox.connect}, for this sandbox. */
  connect(opts?: SandboxConnectOpts): Promise<this>
  /** Whether the sandbox is live. */
  isRunning(opts?: RequestOpts): Promise<boolean>
  /** Sets the end of the sandbox's life to `timeoutMs` from now. */
  setTimeout(timeoutMs: number, opts?: RequestOpts): Promise<void>
  /** Ends the sandbox. `false` if it has already ended. */
  kill(opts?: RequestOpts): Promise<boolean>
  /** What is known about the sandbox. */
  getInfo(opts?: RequestOpts): Promise<SandboxInfo>
  /** Freezes the sandbox into a snapshot; it goes on running. */
  createSnapshot(opts?: CreateSnapshotOpts): Promise<SnapshotInfo>
  /** Lists the snapshots made from this sandbox. */
  listSnapshots(opts?: Omit<SnapshotListOpts, 'sandboxId'>): SnapshotPaginator
  /** Ends the sandbox, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>
}

export default Sandbox

/** Result of a command. */
export declare class CommandResult {
  exitCode: number
  /** `exit status N` or `signal: NAME`, if the exit code is not 0. */
  error?: string
  stdout: string
  stderr: string
}

/** Options of {@link CommandHandle} creation that both kinds of run share. */
export interface CommandStartOpts extends RequestOpts {
  /** Return a handle at once instead of waiting for the end. */
  background?: boolean
  /** Working directory; relative ones and `~` are under the user's home. Default: the home. */
  cwd?: string
  /** User that runs the command. Default `user`. */
  user?: string
  /** Environment of this command, over the sandbox's. */
  envs?: Record<string, string>
  /** Called with each piece of output as it arrives. The next one waits for the returned promise. */
  onStdout?: (data: string) => void | Promise<void>
  /** Called with each piece of error output as it arrives. */
  onStderr?: (data: string) => void | Promise<void>
  /** Keep standard input open for {@link Commands.sendStdin}. Default `false`: it is `/dev/null`. */
  stdin?: boolean
  /** Longest time the command may run, in milliseconds, after which it is killed; `0` = no limit. Default 60 000. */
  timeoutMs?: number
}

/** Options of {@link Commands.connect}. */
export interface CommandConnectOpts extends RequestOpts {
  onStdout?: (data: string) => void | Promise<void>
  onStderr?: (data: string) => void | Promise<void>
  /** Longest time the handle stays connected; the command goes on. `0` = no limit. Default 60 000. */
  timeoutMs?: number
}

/** A process that was started through the API and still runs. */
export interface ProcessInfo {
  pid: number
  tag?: string
  cmd: string
  args: string[]
  envs: Record<string, string>
  cwd?: string
}

/** Commands in a sandbox. */
export declare class Commands {
  private constructor()
  /**
   * Runs a command in a login shell and waits for its end.
   *
   * @throws {@link CommandExitError} if the exit code is not 0
   * @throws {@link TimeoutError} if it ran longer than `timeoutMs`, or if the sandbox ended
   */
  run(cmd: string, opts?: CommandStartOpts & { background?: false }): Promise<CommandResult>
  /** Starts a command and returns at once. */
  run(cmd: string, opts: CommandStartOpts & { background: true }): Promise<CommandHandle>
  run(cmd: string, opts?: CommandStartOpts): Promise<CommandHandle | CommandResult>
  /** Processes started through the API that still run, terminals included. */
  list(opts?: RequestOpts): Promise<ProcessInfo[]>
  /** Kills a process with SIGKILL. `false` if there is none with this id. */
  kill(pid: number, opts?: RequestOpts): Promise<boolean>
  /**
   * Attaches to a running command. Output from before is not repeated.
   *
   * @throws {@link NotFoundError} if there is none with this id
   */
  connect(pid: number, opts?: CommandConnectOpts): Promise<CommandHandle>
  /** Writes to the standard input of a command that was started with `stdin: true`. */
  sendStdin(pid: number, data: string | Uint8Array, opts?: RequestOpts): Promise<void>
  /** Closes the standard input of a command. */
  closeStdin(pid: number, opts?: RequestOpts): Promise<void>
}

/** A command or terminal that runs. */
export declare class CommandHandle {
  private constructor()
  /** Process id in the guest. */
  get pid(): number
  /** Output so far. */
  get stdout(): string
  /** Error output so far. */
  get stderr(): string
  /** Exit code, once it has ended; -1 if a signal ended it. */
  get exitCode(): number | undefined
  /** `exit status N` or `signal: NAME`, once it has ended with an exit code other than 0. */
  get error(): string | undefined
  /**
   * Waits for the end.
   *
   * @throws {@link CommandExitError} if the exit code is not 0
   * @throws {@link TimeoutError} if it ran longer than its `timeoutMs`, or if the sandbox ended
   */
  wait(): Promise<CommandResult>
  /** Stops listening. The command goes on; no callback is called any more. */
  disconnect(): Promise<void>
  /** Kills the command with SIGKILL. `false` if it has ended. */
  kill(): Promise<boolean>
  /** Writes to its standard input. */
  sendStdin(data: string | Uint8Array, opts?: RequestOpts): Promise<void>
  /** Closes its standard input. */
  closeStdin(opts?: RequestOpts): Promise<void>
}

/** Options of {@link Pty.create}. */
export interface PtyCreateOpts extends RequestOpts {
  cols: number
  rows: number
  /** Called with each piece of output. */
  onData: (data: Uint8Array) => void | Promise<void>
  cwd?: string
  user?: string
  envs?: Record<string, string>
  /** Longest time the terminal may live, in milliseconds; `0` = no limit. Default 60 000. */
  timeoutMs?: number
}

/** Options of {@link Pty.connect}. */
export interface PtyConnectOpts extends RequestOpts {
  onData?: (data: Uint8Array) => void | Promise<void>
  timeoutMs?: number
}

/** Terminals in a sandbox. */
export declare class Pty {
  private constructor()
  /** Starts an interactive login shell on a new terminal. */
  create(opts: PtyCreateOpts): Promise<CommandHandle>
  /** Attaches to a terminal. */
  connect(pid: number, opts?: PtyConnectOpts): Promise<CommandHandle>
  /** Types into a terminal. */
  sendInput(pid: number, data: Uint8Array, opts?: RequestOpts): Promise<void>
  /** Changes the size of a terminal. */
  resize(pid: number, size: { cols: number; rows: number }, opts?: RequestOpts): Promise<void>
  /** Kills a terminal. `false` if there is none with this id. */
  kill(pid: number, opts?: RequestOpts): Promise<boolean>
}

/** Type of a directory entry. */
export declare const FileType: {
  readonly FILE: 'file'
  readonly DIR: 'dir'
}
export type FileType = (typeof FileType)[keyof typeof FileType]

/** What is known about a file that was written. */
export interface WriteInfo {
  /** Last component of the path. */
  name: string
  /** Absolute path. */
  path: string
  type?: FileType
  /** Metadata kept with the file as extended attributes. */
  metadata?: Record<string, string>
}

/** What is known about a directory entry. */
export interface EntryInfo extends WriteInfo {
  /** Size in bytes. */
  size: number
  /** Permission bits, such as `0o644`. */
  mode: number
  /** Such as `-rw-r--r--`. */
  permissions: string
  owner: string
  group: string
  modifiedTime?: Date
  /** Where a symbolic link leads: absolute and resolved. */
  symlinkTarget?: string
}

/** What can be written to a file. */
export type WriteData =
  string | ArrayBuffer | Uint8Array | Blob | ReadableStream | AsyncIterable<Uint8Array | string>

/** One of several files to write. */
export interface WriteEntry {
  path: string
  data: WriteData
  metadata?: Record<string, string>
}

/** Options of every file operation. */
export interface FilesystemRequestOpts extends RequestOpts {
  /** User whose home relative paths start from and who owns what is created. Default `user`. */
  user?: string
}

/** Options of {@link Filesystem.read}. */
export interface ReadOpts extends FilesystemRequestOpts {
  /** Accepted and without meaning. */
  gzip?: boolean
  /** Accepted and without meaning. */
  streamIdleTimeoutMs?: number
}

/** Options of {@link Filesystem.write}. */
export interface WriteOpts extends FilesystemRequestOpts {
  /** Accepted and without meaning. */
  gzip?: boolean
  /** Accepted and without meaning. */
  useOctetStream?: boolean
  /** Kept with the file as extended attributes `user.e2b.KEY`; replaces what the file had. */
  metadata?: Record<string, string>
}

/** Files in a sandbox. */
export declare class Filesystem {
  private constructor()
  /**
   * Reads a file.
   *
   * @throws {@link FileNotFoundError} if it does not exist
   * @throws {@link InvalidArgumentError} if it is a directory
   */
  read(path: string, opts?: ReadOpts & { format?: 'text' }): Promise<string>
  read(path: string, opts: ReadOpts & { format: 'bytes' }): Promise<Uint8Array>
  read(path: string, opts: ReadOpts & { format: 'blob' }): Promise<Blob>
  /** Reads a file piece by piece, without holding it in memory. */
  read(path: string, opts: ReadOpts & { format: 'stream' }): Promise<ReadableStream<Uint8Array>>
  /**
   * Writes a file; missing directories are created. A file that exists is replaced as a whole, or, if anything fails,
   * not at all.
   *
   * @throws {@link NotEnoughSpaceError} if the disk is full
   */
  write(path: string, data: WriteData, opts?: WriteOpts): Promise<WriteInfo>
  /** Writes several files, one after the other. */
  write(files: WriteEntry[], opts?: WriteOpts): Promise<WriteInfo[]>
  /** Writes several files, one after the other. */
  writeFiles(files: WriteEntry[], opts?: WriteOpts): Promise<WriteInfo[]>
  /** Lists a directory in the order of names, each directory before its content. `depth` 1 is the directory itself. */
  list(path: string, opts?: FilesystemRequestOpts & { depth?: number }): Promise<EntryInfo[]>
  /** Whether a path exists. */
  exists(path: string, opts?: FilesystemRequestOpts): Promise<boolean>
  /** What is known about a path. */
  getInfo(path: string, opts?: FilesystemRequestOpts): Promise<EntryInfo>
  /** Creates a directory and its parents. `false` if it exists. */
  makeDir(path: string, opts?: FilesystemRequestOpts): Promise<boolean>
  /** Renames a file or directory; missing directories of the new path are created. */
  rename(oldPath: string, newPath: string, opts?: FilesystemRequestOpts): Promise<EntryInfo>
  /** Removes a file, or a directory with all in it. A path that does not exist is no error. */
  remove(path: string, opts?: FilesystemRequestOpts): Promise<void>
}

/** Base class of most errors. */
export declare class SandboxError extends Error {
  constructor(message?: string, options?: ErrorOptions)
  /** Stable code for programs, such as `ERR_SNAPSHOT_IN_USE`. */
  code: string
}

/** Something took too long, or the sandbox ended meanwhile. */
export declare class TimeoutError extends SandboxError {}
/** An argument is wrong. */
export declare class InvalidArgumentError extends SandboxError {}
/** The guest's disk is full. */
export declare class NotEnoughSpaceError extends SandboxError {}
/** Something does not exist. */
export declare class NotFoundError extends SandboxError {}
/** A file does not exist. */
export declare class FileNotFoundError extends NotFoundError {}
/** A sandbox does not exist, or has ended. */
export declare class SandboxNotFoundError extends NotFoundError {}
/** The base template is missing or cannot be used. */
export declare class TemplateError extends SandboxError {}
/** Too much at once. */
export declare class RateLimitError extends SandboxError {}
/** The machine stopped by itself: a panic of its kernel, a triple fault, or a fault of its monitor. Beyond E2B. */
export declare class SandboxCrashedError extends SandboxError {
  /** Last lines of the guest's console. */
  console: string
}
/** The user does not exist. */
export declare class AuthenticationError extends Error {
  constructor(message?: string, options?: ErrorOptions)
  code: string
}
/** A command ended with an exit code other than 0. */
export declare class CommandExitError extends SandboxError implements CommandResult {
  exitCode: number
  error?: string
  stdout: string
  stderr: string
}
