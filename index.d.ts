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
  logger?: Logger
  headers?: Record<string, string>
  apiHeaders?: Record<string, string>
  proxy?: string
  retries?: number
}

/** Connection options of a call that concerns one sandbox or snapshot. */
export type SandboxApiOpts = ConnectionOpts

/** The name of a user of the guest. */
export type Username = string

/** Options of {@link ConnectionConfig}. */
export type ConnectionConfigOpts = ConnectionOpts

/** A logger, as E2B takes one. Accepted and without meaning. */
export interface Logger {
  debug?: (...args: any[]) => void
  info?: (...args: any[]) => void
  warn?: (...args: any[]) => void
  error?: (...args: any[]) => void
}

/** Connection options with E2B's defaults and environment variables resolved. */
export declare class ConnectionConfig {
  constructor(opts?: ConnectionOpts)
  readonly debug: boolean
  readonly domain: string
  readonly apiUrl: string
  readonly sandboxUrl?: string
  readonly apiKey?: string
  readonly validateApiKey?: boolean
  readonly headers?: Record<string, string>
  readonly logger?: Logger
  readonly proxy?: string
  readonly requestTimeoutMs: number
  readonly retries: number
  /** A signal that is aborted by `signal` or after the request timeout, whichever comes first. */
  getSignal(requestTimeoutMs?: number, signal?: AbortSignal): AbortSignal | undefined
}

/** Options of {@link Sandbox.create}. */
export interface SandboxOpts extends ConnectionOpts {
  /** Template, snapshot id or snapshot name to start from. Default `'base'`. */
  template?: string
  /** Free key-value pairs, found again in {@link Sandbox.getInfo} and usable as a filter of {@link Sandbox.list}. */
  metadata?: Record<string, string>
  /** Environment of every command in the sandbox. */
  envs?: Record<string, string>
  /** Life of the sandbox in milliseconds, after which happens what `lifecycle` says. Default 300 000. */
  timeoutMs?: number
  /** What happens at the end of its life, and to requests while it is paused. Default: it is killed. */
  lifecycle?: SandboxLifecycle
  /**
   * Pauses the sandbox at the end of its life.
   *
   * @deprecated use `lifecycle: { onTimeout: 'pause' }`
   */
  autoPause?: boolean
  /** Rules of its network. */
  network?: SandboxNetworkOpts
  /** Shown in {@link Sandbox.getInfo}; a sandbox has no network beyond its own. */
  allowInternetAccess?: boolean
  /** Refused: the gateway belongs to E2B's cloud. */
  mcp?: Record<string, unknown>
  /** Refused: volumes belong to E2B's cloud. */
  volumeMounts?: Record<string, unknown>
  /** Refused: there is no cloud account to act for. */
  iam?: Record<string, unknown>
  /** Accepted and without meaning: a sandbox can only be reached from its own process. */
  secure?: boolean
}

/** What a pause keeps: memory and disk, or the disk alone. */
export type SnapshotMode = 'full' | 'filesystem'

/** What happens at the end of a sandbox's life. */
export type SandboxOnTimeout =
  | 'kill'
  | 'pause'
  | { action: 'kill' }
  | {
      action: 'pause'
      /** `false` keeps the disk alone. Default `true`. */
      keepMemory?: boolean
      /** The same as `keepMemory`, by name. */
      mode?: SnapshotMode
    }

/** What happens to a sandbox by itself. */
export interface SandboxLifecycle {
  /** At the end of its life. Default `'kill'`. */
  onTimeout?: SandboxOnTimeout
  /**
   * Whether a request to the sandbox while it is paused resumes it first, with the life it had. Only with
   * `onTimeout: 'pause'` that keeps memory. Default `false`.
   */
  autoResume?: boolean
}

/** Addresses (CIDR, IP, for `allowOut` also host names), or a function that gives them. */
export type SandboxNetworkSelector =
  string[] | ((context: { allTraffic: string; rules: Map<string, unknown> }) => string[])

/** Rules for the connections that a sandbox makes. A sandbox has no network beyond its own: they are kept and shown. */
export interface SandboxNetworkUpdate {
  /** What may be reached although `denyOut` denies it. */
  allowOut?: SandboxNetworkSelector
  /** What may not be reached. */
  denyOut?: SandboxNetworkSelector
  allowInternetAccess?: boolean
  /** Refused: it needs to look into TLS connections. */
  rules?: Record<string, unknown>
  /** Refused: there is no network that it could lead to. */
  egressProxy?: unknown
}

/** Network of a new sandbox. */
export interface SandboxNetworkOpts extends Omit<SandboxNetworkUpdate, 'allowInternetAccess'> {
  /**
   * Whether requests to the sandbox's ports need no token. Default `true`. With `false` only HTTP requests get through,
   * and only with the header `e2b-traffic-access-token`: {@link Sandbox.trafficAccessToken}.
   */
  allowPublicTraffic?: boolean
  /**
   * What servers in the sandbox see as the `Host` of HTTP requests to its ports; `${PORT}` stands for the port. Each request then
   * has a connection of its own, and only HTTP gets through.
   */
  maskRequestHost?: string
  /** Refused: bytes are forwarded as they are. */
  httpsPorts?: number[]
}

/** Rules of a sandbox's network, as they are kept. */
export interface SandboxNetworkInfo {
  allowOut?: string[]
  denyOut?: string[]
  allowPublicTraffic?: boolean
  maskRequestHost?: string
}

/** Options of {@link Sandbox.connect}. */
export interface SandboxConnectOpts extends ConnectionOpts {
  /** The sandbox lives at least this long from now on; never shortens its life. Default 300 000. */
  timeoutMs?: number
  /**
   * What a paused sandbox goes on from: its memory if it was kept (`'restore'`, the default), or its disk alone, from
   * which it boots (`'reboot'`).
   */
  onResume?: 'restore' | 'reboot'
}

/** Options of {@link Sandbox.pause}. */
export interface SandboxPauseOpts extends ConnectionOpts {
  /** `'filesystem'` keeps the disk alone: the sandbox boots when it is resumed. Default `'full'`. */
  mode?: SnapshotMode
  /**
   * `false` is `mode: 'filesystem'`.
   *
   * @deprecated use `mode`
   */
  keepMemory?: boolean
}

/** Options of {@link Sandbox.fork}. */
export interface SandboxForkOpts extends ConnectionOpts {
  /** How many copies, 1 to 100. Default 1. */
  count?: number
  /** Life of each copy in milliseconds. Default 300 000. */
  timeoutMs?: number
}

/** What {@link Sandbox.clone} gives. */
export interface SandboxClones<S> {
  sandboxes: S[]
  /** How many there are. */
  count: number
}

/** Options of {@link Sandbox.getMetrics}. */
export interface SandboxMetricsOpts extends ConnectionOpts {
  /** Only samples from then on, to the second. */
  start?: Date
  /** Only samples until then, to the second. */
  end?: Date
}

/** Resource use of a sandbox at one moment. */
export interface SandboxMetrics {
  timestamp: Date
  /** Use of its processors since the sample before; 100 is one processor. */
  cpuUsedPct: number
  cpuCount: number
  /** Memory in use without caches, in bytes. */
  memUsed: number
  /** Memory, in bytes. */
  memTotal: number
  /** Page cache, in bytes. */
  memCache: number
  /** Used part of the disk, in bytes. */
  diskUsed: number
  /** Size of the disk, in bytes. */
  diskTotal: number
}

/** Whether a sandbox is live or frozen. */
export type SandboxState = 'running' | 'paused'

/** What runs the guest: hardware virtualization, the software CPU, or nothing while it is paused. */
export type Backend = 'kvm' | 'soft' | 'none'

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
  /** When its life will end; for a paused sandbox, when it was paused. */
  endAt: Date
  state: SandboxState
  cpuCount: number
  /** Memory of the guest in MiB. */
  memoryMB: number
  /** Version of E2B's guest daemon whose behaviour the guest agent follows. */
  envdVersion: string
  /** What happens to it by itself; `keepMemory` is there if it is `false`. */
  lifecycle?: { onTimeout: 'kill' | 'pause'; autoResume: boolean; keepMemory?: boolean }
  network?: SandboxNetworkInfo
  allowInternetAccess?: boolean
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
  /** Its tag, `default` unless one was given. */
  tag: string
  /** When it was published. */
  createdAt: Date
  /** Bytes on disk of everything that it needs, shared with other snapshots or not. */
  size: number
  /** Bytes on disk that it added to the store. */
  ownSize: number
  /** The snapshot or template that its sandbox was created from. */
  parentId?: string
  /** The sandbox it was taken from. */
  sandboxId?: string
  /** That sandbox's metadata. */
  metadata: Record<string, string>
}

/** Options of {@link Sandbox.deleteSnapshot}. */
export interface DeleteSnapshotOpts extends ConnectionOpts {
  /** Delete it although sandboxes that were created from it are running: they run on. Default `false`. */
  force?: boolean
}

/** Options of {@link Sandbox.exportSnapshot}. */
export interface ExportSnapshotOpts extends RequestOpts {
  /** Layers to leave out because the reader has them: what `store.layers()` says there. */
  without?: string[]
}

/** What {@link Sandbox.exportSnapshot} wrote. */
export interface ExportedSnapshot {
  snapshotId: string
  /** Bytes written. */
  bytes: number
  /** Layers written. */
  layers: number
  /** Layers left out. */
  leftOut: number
}

/** What {@link Store.verify} found. */
export interface StoreReport {
  snapshots: number
  layers: number
  frames: number
  /** Damage; `snapshots` are those that it affects, as `id:tag`. */
  problems: { snapshots: string[]; message: string }[]
}

/** What {@link Store.gc} removed. */
export interface StoreCollected {
  layers: number
  bytes: number
  /** Manifests that cannot be read. While there are any, nothing is removed. */
  unreadable: number
}

/** What {@link Store.du} measured, in bytes. */
export interface StoreUsage {
  layerBytes: number
  manifestBytes: number
  /** Layers that no snapshot needs: what {@link Store.gc} frees. */
  unreferencedBytes: number
  /** Per snapshot, what deleting it would free. */
  snapshots: { snapshotId: string; tag: string; bytes: number }[]
}

/** The store of snapshots on disk (`AMBERBOX_HOME`), which any number of processes share. */
export interface Store {
  /** Reads and checks everything. Damage does not throw: it is in the report. */
  verify(opts?: RequestOpts): Promise<StoreReport>
  /** Removes what no snapshot needs, and what killed processes left behind. */
  gc(opts?: RequestOpts): Promise<StoreCollected>
  /** How much disk the store and each snapshot use. */
  du(opts?: RequestOpts): Promise<StoreUsage>
  /** The ids of the layers that it has. */
  layers(opts?: RequestOpts): Promise<string[]>
}

/** The store of this process. */
export declare const store: Store

/** Options of {@link Sandbox.createSnapshot}. */
export interface CreateSnapshotOpts extends ConnectionOpts {
  /**
   * Name, or `name:tag`: letters, digits, `-` and `_`. A name that exists already moves to the new content and keeps
   * its snapshot id.
   */
  name?: string
  /** `'filesystem'` keeps the disk alone: sandboxes made from it boot. Default `'full'`. */
  mode?: SnapshotMode
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

/** Options of {@link Sandbox.uploadUrl} and {@link Sandbox.downloadUrl}. */
export interface SandboxUrlOpts {
  /** User whose home relative paths start from and who owns what is created. Default `user`. */
  user?: Username
  /** Seconds for which the URL is valid. Default: as long as the process runs. */
  useSignatureExpiration?: number
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
  constructor(opts: ConnectionOpts & { sandboxId: string; trafficAccessToken?: string })

  /** Template of {@link Sandbox.create} when none is given; a subclass may set its own. */
  protected static readonly defaultTemplate?: string

  readonly sandboxId: string
  readonly sandboxDomain: string
  /** What HTTP requests to its ports must show, if they are private. */
  readonly trafficAccessToken?: string
  /** Run and control commands. */
  readonly commands: Commands
  /** Read and write files. */
  readonly files: Filesystem
  /** Run terminals. */
  readonly pty: Pty
  /** Use the guest's git. */
  readonly git: Git
  /** The options that this sandbox was created or connected with. */
  protected readonly connectionConfig: ConnectionConfig

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
   * Gives a handle to a sandbox of this process, or resumes a paused one, whichever process paused it: processes go on
   * where they were.
   *
   * @throws {@link SandboxNotFoundError} if there is none with this id
   */
  static connect<S extends typeof Sandbox>(
    this: S,
    sandboxId: string,
    opts?: SandboxConnectOpts,
  ): Promise<InstanceType<S>>

  /** Lists the sandboxes of this process and the paused ones of the store, newest first. */
  static list(opts?: SandboxListOpts): SandboxPaginator

  /**
   * Ends a sandbox at once. A paused one is deleted.
   *
   * @returns `false` if there is none with this id
   */
  static kill(sandboxId: string, opts?: ConnectionOpts): Promise<boolean>

  /** What is known about a sandbox. */
  static getInfo(sandboxId: string, opts?: ConnectionOpts): Promise<SandboxInfo>
  /** @deprecated use {@link Sandbox.getInfo} */
  static getFullInfo(sandboxId: string, opts?: ConnectionOpts): Promise<SandboxInfo>

  /**
   * Resource use of a sandbox: one sample every five seconds while it does something, an hour of them, and the present one.
   *
   * @throws {@link SandboxNotFoundError} if there is none with this id
   */
  static getMetrics(sandboxId: string, opts?: SandboxMetricsOpts): Promise<SandboxMetrics[]>

  /**
   * Pauses a sandbox: its memory leaves this process, its id, metadata and environment stay. {@link Sandbox.connect}
   * resumes it, in this process or another one that has the same store. Connections to it end; its processes go on
   * when it is resumed. Calls on a paused sandbox fail with a {@link TimeoutError}, unless `autoResume` resumes it.
   *
   * @returns `false` if it is paused already
   * @throws {@link SandboxNotFoundError} if there is none with this id
   */
  static pause(sandboxId: string, opts?: SandboxPauseOpts): Promise<boolean>
  /** @deprecated use {@link Sandbox.pause} */
  static betaPause(sandboxId: string, opts?: SandboxPauseOpts): Promise<boolean>

  /**
   * Copies a running sandbox: one snapshot in memory and on disk, and `count` sandboxes from it. The copies keep its
   * metadata and environment, and have ids, tokens and lives of their own.
   *
   * @returns one entry per copy: the sandbox, or why it could not be made
   * @throws {@link InvalidArgumentError} if `count` is not 1 to 100
   * @throws {@link SandboxNotFoundError} if there is none with this id
   * @throws {@link SandboxError} `409: …` if it is paused
   */
  static fork<S extends typeof Sandbox>(
    this: S,
    sandboxId: string,
    opts?: SandboxForkOpts,
  ): Promise<Array<InstanceType<S> | Error>>

  /** Novita's name for {@link Sandbox.fork}: gives the sandboxes only; with `strict` all of them, or the error. */
  static clone<S extends typeof Sandbox>(
    this: S,
    sandboxId: string,
    opts?: SandboxForkOpts & { strict?: boolean },
  ): Promise<SandboxClones<InstanceType<S>>>
  /** Novita's name for {@link Sandbox.updateNetwork}. */
  static setNetwork(sandboxId: string, network: SandboxNetworkUpdate, opts?: ConnectionOpts): Promise<void>
  /** @deprecated use {@link Sandbox.create} */
  static betaCreate<S extends typeof Sandbox>(this: S, opts?: SandboxOpts): Promise<InstanceType<S>>
  /** @deprecated use {@link Sandbox.create} */
  static betaCreate<S extends typeof Sandbox>(
    this: S,
    template: string,
    opts?: SandboxOpts,
  ): Promise<InstanceType<S>>

  /** Replaces the rules for the connections that a sandbox makes; what is left out is cleared. */
  static updateNetwork(sandboxId: string, network: SandboxNetworkUpdate, opts?: ConnectionOpts): Promise<void>

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
   * @throws {@link SandboxError} `400: …` while running sandboxes were created from it, unless `force` is set; the message
   *   names them
   */
  static deleteSnapshot(snapshotId: string, opts?: DeleteSnapshotOpts): Promise<boolean>

  /**
   * Writes a snapshot, by id or name, as one file or to a stream (which is ended).
   *
   * @throws {@link SandboxError} if there is no such snapshot, or the file exists
   */
  static exportSnapshot(
    snapshotId: string,
    destination: string | NodeJS.WritableStream,
    opts?: ExportSnapshotOpts,
  ): Promise<ExportedSnapshot>

  /**
   * Takes over a snapshot that {@link Sandbox.exportSnapshot} wrote, here or on another machine. All of it is verified
   * before it is visible. It keeps its id if that is free here, and its names.
   *
   * @throws {@link SandboxError} if it is damaged, of a newer version, or leaves out a layer that is not here
   */
  static importSnapshot(
    source: string | NodeJS.ReadableStream | AsyncIterable<Uint8Array>,
    opts?: RequestOpts,
  ): Promise<{ snapshotId: string; names: string[] }>

  /** Like {@link Sandbox.connect}, for this sandbox. */
  connect(opts?: SandboxConnectOpts): Promise<this>
  /** Whether the sandbox runs: `false` when it is paused or has ended. */
  isRunning(opts?: RequestOpts): Promise<boolean>
  /** Sets the end of the sandbox's life to `timeoutMs` from now. */
  setTimeout(timeoutMs: number, opts?: RequestOpts): Promise<void>
  /** Ends the sandbox. `false` if it has already ended. */
  kill(opts?: RequestOpts): Promise<boolean>
  /** What is known about the sandbox. */
  getInfo(opts?: RequestOpts): Promise<SandboxInfo>
  /**
   * The address on this host, such as `127.0.0.1:40123`, at which a server on `port` in the sandbox can be reached: any
   * protocol over TCP, and servers bound to the sandbox's loopback as well as to all its addresses. It stays the same
   * over a pause, and is closed when the sandbox ends. A port on which nobody listens resets connections.
   *
   * @param opts `bind`: IP address of the interface of this host at which to listen. Default `127.0.0.1`: only programs on
   * this host reach it. With `0.0.0.0` everybody who reaches this host does.
   * @throws {@link SandboxNotFoundError} if the sandbox has ended
   */
  getHost(port: number, opts?: { bind?: string }): string
  /**
   * A URL to which one file can be uploaded by POST: as a form with a part `file`, or as the raw body, which is streamed. It is
   * answered by this process, on 127.0.0.1, while it runs; whoever has the URL may use it. The answer is
   * `[{ name, path, type }]`.
   *
   * @param path where the file goes; without it, the name of the form's part says so
   */
  uploadUrl(path?: string, opts?: SandboxUrlOpts): Promise<string>
  /** A URL from which a file can be downloaded by GET; for the rest see {@link Sandbox.uploadUrl}. */
  downloadUrl(path: string, opts?: SandboxUrlOpts): Promise<string>
  /** The MCP gateway belongs to E2B's cloud: throws a {@link SandboxError}. */
  getMcpUrl(): string
  /** The MCP gateway belongs to E2B's cloud: rejects with a {@link SandboxError}. */
  getMcpToken(): Promise<string | undefined>
  /** Like {@link Sandbox.getMetrics}, for this sandbox. */
  getMetrics(opts?: SandboxMetricsOpts): Promise<SandboxMetrics[]>
  /** Like {@link Sandbox.pause}, for this sandbox. */
  pause(opts?: SandboxPauseOpts): Promise<boolean>
  /** @deprecated use {@link Sandbox.pause} */
  betaPause(opts?: SandboxPauseOpts): Promise<boolean>
  /** Like {@link Sandbox.fork}, for this sandbox. */
  fork(opts?: SandboxForkOpts): Promise<Array<this | Error>>
  /** Like {@link Sandbox.clone}, for this sandbox. */
  clone(opts?: SandboxForkOpts & { strict?: boolean }): Promise<SandboxClones<this>>
  /** Like {@link Sandbox.setNetwork}, for this sandbox. */
  setNetwork(network: SandboxNetworkUpdate, opts?: RequestOpts): Promise<void>
  /** Like {@link Sandbox.updateNetwork}, for this sandbox. */
  updateNetwork(network: SandboxNetworkUpdate, opts?: RequestOpts): Promise<void>
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

/** A piece of standard output. */
export type Stdout = string
/** A piece of error output. */
export type Stderr = string
/** A piece of a terminal's output. */
export type PtyOutput = Uint8Array

/** Name or number of a signal, such as `'SIGTERM'` or `15`. */
export type ProcessSignal = NodeJS.Signals | number

/** Options of a request about commands. */
export type CommandRequestOpts = RequestOpts

/** Options of {@link Commands.run}. */
export interface CommandStartOpts extends CommandRequestOpts {
  /** Return a handle at once instead of waiting for the end. */
  background?: boolean
  /** Working directory; relative ones and `~` are under the user's home. Default: the home. */
  cwd?: string
  /** User that runs the command. Default `user`. */
  user?: Username
  /** Environment of this command, over the sandbox's. */
  envs?: Record<string, string>
  /** Called with each piece of output as it arrives. The next one waits for the returned promise. */
  onStdout?: (data: Stdout) => void | Promise<void>
  /** Called with each piece of error output as it arrives. */
  onStderr?: (data: Stderr) => void | Promise<void>
  /** Keep standard input open for {@link Commands.sendStdin}. Default `false`: it is `/dev/null`. */
  stdin?: boolean
  /** Longest time the command may run, in milliseconds, after which it is killed; `0` = no limit. Default 60 000. */
  timeoutMs?: number
}

/** Options of {@link Commands.connect}. */
export interface CommandConnectOpts extends CommandRequestOpts {
  /** Called with each piece of output from now on. */
  onStdout?: (data: Stdout) => void | Promise<void>
  /** Called with each piece of error output from now on. */
  onStderr?: (data: Stderr) => void | Promise<void>
  /** Longest time the handle stays connected; the command goes on. `0` = no limit. Default 60 000. */
  timeoutMs?: number
}

/** Options of {@link Commands.kill}. */
export interface CommandKillOpts {
  requestTimeoutMs?: number
  /** Aborts the request; or, beyond E2B, the signal to send instead of SIGKILL. */
  signal?: AbortSignal | ProcessSignal
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
   * @throws {@link InvalidArgumentError} if `cwd` does not exist
   * @throws {@link AuthenticationError} if `user` does not exist
   */
  run(cmd: string, opts?: CommandStartOpts & { background?: false }): Promise<CommandResult>
  /** Starts a command and returns at once. */
  run(cmd: string, opts: CommandStartOpts & { background: true }): Promise<CommandHandle>
  run(cmd: string, opts?: CommandStartOpts & { background?: boolean }): Promise<CommandHandle | CommandResult>
  /** Processes started through the API that still run, terminals included. */
  list(opts?: CommandRequestOpts): Promise<ProcessInfo[]>
  /** Kills a process and its group with SIGKILL. `false` if there is none with this id. */
  kill(pid: number, opts?: CommandKillOpts): Promise<boolean>
  /** Sends a signal to a process and its group. `false` if there is none with this id. Beyond E2B. */
  sendSignal(pid: number, signal: ProcessSignal, opts?: CommandRequestOpts): Promise<boolean>
  /**
   * Attaches to a running command. Output from before is not repeated. A command that ended less than half a minute ago still gives
   * its exit code.
   *
   * @throws {@link NotFoundError} if there is none with this id
   */
  connect(pid: number, opts?: CommandConnectOpts): Promise<CommandHandle>
  /** Writes to the standard input of a command that was started with `stdin: true`. */
  sendStdin(pid: number, data: string | Uint8Array, opts?: CommandRequestOpts): Promise<void>
  /** Closes the standard input of a command. */
  closeStdin(pid: number, opts?: CommandRequestOpts): Promise<void>
}

/**
 * A piece of output, as `for await (const chunk of handle)` gives it. Its string is the text; destructured it is
 * `[stdout, stderr, pty]`, of which one is set. Beyond E2B.
 */
export declare class OutputChunk implements Iterable<string | Uint8Array | undefined> {
  private constructor()
  readonly type: 'stdout' | 'stderr' | 'pty'
  /** Text; bytes if it comes from a terminal. */
  readonly data: string | Uint8Array
  get stdout(): string | undefined
  get stderr(): string | undefined
  get pty(): Uint8Array | undefined
  toString(): string
  [Symbol.iterator](): Iterator<string | Uint8Array | undefined>
}

/**
 * A command or terminal that runs.
 *
 * @example
 * ```ts
 * const handle = await sandbox.commands.run('make', { background: true })
 * for await (const { stdout, stderr } of handle) process.stdout.write(stdout ?? stderr ?? '')
 * ```
 */
export declare class CommandHandle implements AsyncIterable<OutputChunk> {
  private constructor()
  /** Process id in the guest. */
  readonly pid: number
  /** Output so far; with a callback or a reader only the last 64 Mi characters of it. */
  get stdout(): string
  /** Error output so far; with a callback or a reader only the last 64 Mi characters of it. */
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
  /** Kills the command, with SIGKILL unless another signal is given. `false` if it has ended. */
  kill(signal?: ProcessSignal): Promise<boolean>
  /** Sends a signal. `false` if it has ended. Beyond E2B. */
  sendSignal(signal: ProcessSignal): Promise<boolean>
  /** Writes to its standard input. */
  sendStdin(data: string | Uint8Array, opts?: CommandRequestOpts): Promise<void>
  /** Closes its standard input. */
  closeStdin(opts?: CommandRequestOpts): Promise<void>
  /**
   * All output in order, from the start as far as it is remembered (16 MiB). The command waits for a reader that falls behind. Ends with the
   * command, whatever its exit code. Beyond E2B.
   */
  [Symbol.asyncIterator](): AsyncIterator<OutputChunk>
}

/** Options of {@link Pty.create}. */
export interface PtyCreateOpts extends RequestOpts {
  cols: number
  rows: number
  /** Called with each piece of output. */
  onData: (data: PtyOutput) => void | Promise<void>
  /** Longest time the terminal may live, in milliseconds; `0` = no limit. Default 60 000. */
  timeoutMs?: number
  /** User that runs the shell. Default `user`. */
  user?: Username
  envs?: Record<string, string>
  cwd?: string
}

/** Options of {@link Pty.connect}. */
export interface PtyConnectOpts extends RequestOpts {
  /** Called with each piece of output from now on. */
  onData?: (data: PtyOutput) => void | Promise<void>
  /** Longest time the handle stays connected; the terminal goes on. `0` = no limit. Default 60 000. */
  timeoutMs?: number
}

/** Terminals in a sandbox. */
export declare class Pty {
  private constructor()
  /** Starts an interactive login shell on a new terminal. */
  create(opts: PtyCreateOpts): Promise<CommandHandle>
  /**
   * Attaches to a terminal: the same shell goes on.
   *
   * @throws {@link NotFoundError} if there is none with this id
   */
  connect(pid: number, opts?: PtyConnectOpts): Promise<CommandHandle>
  /** Types into a terminal. */
  sendInput(pid: number, data: Uint8Array, opts?: RequestOpts): Promise<void>
  /** Changes the size of a terminal. */
  resize(pid: number, size: { cols: number; rows: number }, opts?: RequestOpts): Promise<void>
  /** Kills a terminal. `false` if there is none with this id. */
  kill(pid: number, opts?: CommandKillOpts): Promise<boolean>
}

/** Type of a directory entry; a symbolic link has that of its target, and is `symlink` if it leads nowhere. */
export declare enum FileType {
  FILE = 'file',
  DIR = 'dir',
  SYMLINK = 'symlink',
}

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
export type WriteEntry = {
  path: string
  data: WriteData
  /** In place of the metadata of the options. Beyond E2B. */
  metadata?: Record<string, string>
}

/** Options of every file operation. */
export interface FilesystemRequestOpts extends RequestOpts {
  /** User whose home relative paths start from and who owns what is created. Default `user`. */
  user?: Username
}

/** Options of {@link Filesystem.read}. */
export interface FilesystemReadOpts extends FilesystemRequestOpts {
  /** Accepted and without meaning: nothing is sent over a network. */
  gzip?: boolean
  /** Longest time to wait for the next piece of a stream, in milliseconds; `0` = no limit. Default: the request timeout. */
  streamIdleTimeoutMs?: number
  /** First byte to read. Default 0. */
  start?: number
  /** Last byte to read. Default: to the end. */
  end?: number
}

/** Options of {@link Filesystem.write}. */
export interface FilesystemWriteOpts extends FilesystemRequestOpts {
  /** Accepted and without meaning. */
  gzip?: boolean
  /** Accepted and without meaning. */
  useOctetStream?: boolean
  /** Kept with the file as extended attributes `user.e2b.KEY`; replaces what the file had. */
  metadata?: Record<string, string>
}

/** Options of {@link Filesystem.list}. */
export interface FilesystemListOpts extends FilesystemRequestOpts {
  /** Levels to descend. Default 1: the directory itself. */
  depth?: number
}

/** Kind of a change in a watched directory. */
export declare enum FilesystemEventType {
  /** Permissions, owner, times or extended attributes changed. */
  CHMOD = 'chmod',
  /** Something is new under this name. */
  CREATE = 'create',
  /** Something was removed. */
  REMOVE = 'remove',
  /** Something has another name now. */
  RENAME = 'rename',
  /** The content of a file changed. */
  WRITE = 'write',
}

/** A change in a watched directory. */
export interface FilesystemEvent {
  /** Path relative to the watched directory. */
  name: string
  type: FilesystemEventType
  /** The entry, with `includeEntry` and if it is still there. */
  entry?: EntryInfo
}

/** Options of {@link Filesystem.watchDir}. */
export interface WatchOpts extends FilesystemRequestOpts {
  /** Longest time to watch, in milliseconds; `0` = no limit. Default 60 000. */
  timeoutMs?: number
  /** Called once when the watch is over, with the error if one ended it. */
  onExit?: (err?: Error) => void | Promise<void>
  /** Watch what is below, too, also directories that appear later. */
  recursive?: boolean
  /** Events come with what is known about the entry. */
  includeEntry?: boolean
  /** Allow directories on network file systems, whose changes may not all be seen. */
  allowNetworkMounts?: boolean
}

/** A watched directory. */
export declare class WatchHandle {
  private constructor()
  /** Stops watching. */
  stop(): Promise<void>
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
  read(path: string, opts?: FilesystemReadOpts & { format?: 'text' }): Promise<string>
  read(path: string, opts: FilesystemReadOpts & { format: 'bytes' }): Promise<Uint8Array>
  read(path: string, opts: FilesystemReadOpts & { format: 'blob' }): Promise<Blob>
  /** Reads a file piece by piece, without holding it in memory. */
  read(path: string, opts: FilesystemReadOpts & { format: 'stream' }): Promise<ReadableStream<Uint8Array>>
  /**
   * Writes a file; missing directories are created. A file that exists is replaced as a whole, or, if anything fails,
   * not at all.
   *
   * @throws {@link NotEnoughSpaceError} if the disk is full
   */
  write(path: string, data: WriteData, opts?: FilesystemWriteOpts): Promise<WriteInfo>
  /** Writes several files. After a failure no further one is begun. */
  write(files: WriteEntry[], opts?: FilesystemWriteOpts): Promise<WriteInfo[]>
  /** Writes several files. After a failure no further one is begun. */
  writeFiles(files: WriteEntry[], opts?: FilesystemWriteOpts): Promise<WriteInfo[]>
  /** Lists a directory in the order of names, each directory before its content. `depth` 1 is the directory itself. */
  list(path: string, opts?: FilesystemListOpts): Promise<EntryInfo[]>
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
  /**
   * Watches a directory. Everything that happens after this resolves is told, in order; the next event waits for the
   * promise that the callback returns.
   *
   * @throws {@link FileNotFoundError} if it does not exist
   * @throws {@link InvalidArgumentError} if it is not a directory
   */
  watchDir(
    path: string,
    onEvent: (event: FilesystemEvent) => void | Promise<void>,
    opts?: WatchOpts,
  ): Promise<WatchHandle>
}

/** Options of every git method: those of the commands that it runs. */
export interface GitRequestOpts extends Partial<
  Pick<CommandStartOpts, 'envs' | 'user' | 'cwd' | 'timeoutMs' | 'requestTimeoutMs' | 'signal'>
> {}

/** Options of {@link Git.clone}. */
export interface GitCloneOpts extends GitRequestOpts {
  /** Directory to clone into. */
  path?: string
  /** Branch to check out, the only one that is fetched. */
  branch?: string
  /** Number of commits to fetch. */
  depth?: number
  username?: string
  /** Password or token. */
  password?: string
  /** Leave the credentials in the clone's configuration. Default `false`. */
  dangerouslyStoreCredentials?: boolean
}

/** Options of {@link Git.init}. */
export interface GitInitOpts extends GitRequestOpts {
  bare?: boolean
  initialBranch?: string
}

/** Options of {@link Git.remoteAdd}. */
export interface GitRemoteAddOpts extends GitRequestOpts {
  /** Fetch afterwards. */
  fetch?: boolean
  /** Change the URL of a remote that exists. */
  overwrite?: boolean
}

/** Options of {@link Git.commit}. */
export interface GitCommitOpts extends GitRequestOpts {
  authorName?: string
  authorEmail?: string
  allowEmpty?: boolean
}

/** Options of {@link Git.add}. */
export interface GitAddOpts extends GitRequestOpts {
  files?: string[]
  /** Without `files`, stage all changes instead of those below the repository's path. Default `true`. */
  all?: boolean
}

export type GitResetMode = 'soft' | 'mixed' | 'hard' | 'merge' | 'keep'

/** Options of {@link Git.reset}. */
export interface GitResetOpts extends GitRequestOpts {
  mode?: GitResetMode
  /** Commit, branch or ref. Default `HEAD`. */
  target?: string
  paths?: string[]
}

/** Options of {@link Git.restore}. */
export interface GitRestoreOpts extends GitRequestOpts {
  paths: string[]
  /** Restore the index. */
  staged?: boolean
  /** Restore the working tree; the default, unless `staged` is set. */
  worktree?: boolean
  /** Commit, branch or ref to restore from. */
  source?: string
}

/** Options of {@link Git.deleteBranch}. */
export interface GitDeleteBranchOpts extends GitRequestOpts {
  force?: boolean
}

/** Options of {@link Git.push}. */
export interface GitPushOpts extends GitRequestOpts {
  remote?: string
  branch?: string
  /** Remember the remote branch as upstream. Default `true`. */
  setUpstream?: boolean
  username?: string
  /** Password or token. */
  password?: string
}

/** Options of {@link Git.pull}. */
export interface GitPullOpts extends GitRequestOpts {
  remote?: string
  branch?: string
  username?: string
  /** Password or token. */
  password?: string
}

export type GitConfigScope = 'global' | 'local' | 'system'

/** Options of {@link Git.setConfig} and {@link Git.getConfig}. */
export interface GitConfigOpts extends GitRequestOpts {
  /** Default `global`. */
  scope?: GitConfigScope
  /** Repository, for scope `local`. */
  path?: string
}

/** Options of {@link Git.dangerouslyAuthenticate}. */
export interface GitDangerouslyAuthenticateOpts extends GitRequestOpts {
  username: string
  /** Password or token. */
  password: string
  /** Default `github.com`. */
  host?: string
  /** Default `https`. */
  protocol?: string
}

export type GitStatusLabel =
  | 'conflict'
  | 'renamed'
  | 'copied'
  | 'deleted'
  | 'added'
  | 'modified'
  | 'typechange'
  | 'untracked'
  | 'unknown'

/** A file in {@link GitStatus}. */
export interface GitFileStatus {
  name: string
  status: GitStatusLabel
  /** Letter of the index in git's short format. */
  indexStatus: string
  /** Letter of the working tree in git's short format. */
  workingTreeStatus: string
  staged: boolean
  renamedFrom?: string
}

/** Result of {@link Git.status}. */
export interface GitStatus {
  currentBranch?: string
  upstream?: string
  ahead: number
  behind: number
  detached: boolean
  fileStatus: GitFileStatus[]
  isClean: boolean
  hasChanges: boolean
  hasStaged: boolean
  hasUntracked: boolean
  hasConflicts: boolean
  totalCount: number
  stagedCount: number
  unstagedCount: number
  untrackedCount: number
  conflictCount: number
}

/** Result of {@link Git.branches}. */
export interface GitBranches {
  branches: string[]
  currentBranch?: string
}

/**
 * The guest's git. A failed command is a {@link CommandExitError}, unless it is about credentials
 * ({@link GitAuthError}) or a missing upstream branch ({@link GitUpstreamError}).
 */
export declare class Git {
  constructor(commands: Pick<Commands, 'run'>)
  /** Clones a repository. */
  clone(url: string, opts?: GitCloneOpts): Promise<CommandResult>
  /** Makes a repository. */
  init(path: string, opts?: GitInitOpts): Promise<CommandResult>
  /** Adds a remote. */
  remoteAdd(path: string, name: string, url: string, opts?: GitRemoteAddOpts): Promise<CommandResult>
  /** URL of a remote; `undefined` if there is none of this name. */
  remoteGet(path: string, name: string, opts?: GitRequestOpts): Promise<string | undefined>
  /** State of the working tree and its branch. */
  status(path: string, opts?: GitRequestOpts): Promise<GitStatus>
  /** Local branches. */
  branches(path: string, opts?: GitRequestOpts): Promise<GitBranches>
  /** Makes a branch and checks it out. */
  createBranch(path: string, branch: string, opts?: GitRequestOpts): Promise<CommandResult>
  /** Checks a branch out. */
  checkoutBranch(path: string, branch: string, opts?: GitRequestOpts): Promise<CommandResult>
  /** Deletes a branch. */
  deleteBranch(path: string, branch: string, opts?: GitDeleteBranchOpts): Promise<CommandResult>
  /** Stages changes. */
  add(path: string, opts?: GitAddOpts): Promise<CommandResult>
  /** Commits what is staged. */
  commit(path: string, message: string, opts?: GitCommitOpts): Promise<CommandResult>
  /** Resets HEAD or paths. */
  reset(path: string, opts?: GitResetOpts): Promise<CommandResult>
  /** Restores files of the working tree or the index. */
  restore(path: string, opts: GitRestoreOpts): Promise<CommandResult>
  /** Pushes commits. */
  push(path: string, opts?: GitPushOpts): Promise<CommandResult>
  /** Pulls commits. */
  pull(path: string, opts?: GitPullOpts): Promise<CommandResult>
  /** Sets a configuration value. */
  setConfig(key: string, value: string, opts?: GitConfigOpts): Promise<CommandResult>
  /** A configuration value; `undefined` if it is not set. */
  getConfig(key: string, opts?: GitConfigOpts): Promise<string | undefined>
  /** Stores credentials for a host in the guest, readable for everybody who may read its files. */
  dangerouslyAuthenticate(opts: GitDangerouslyAuthenticateOpts): Promise<CommandResult>
  /** Sets `user.name` and `user.email`. */
  configureUser(name: string, email: string, opts?: GitConfigOpts): Promise<CommandResult>
}

/**
 * Signature of a file's URL, by E2B's scheme.
 *
 * @returns the signature, and the end of its validity in seconds since the epoch
 */
export declare function getSignature(opts: {
  path: string
  operation: 'read' | 'write'
  user: string | undefined
  expirationInSeconds?: number
  envdAccessToken?: string
}): Promise<{ signature: string; expiration: number | null }>

/** Every address, in network rules. */
export declare const ALL_TRAFFIC = '0.0.0.0/0'

/** Options of {@link E2B}. */
export type E2BClientOpts = Omit<ConnectionOpts, 'signal'>

/** A client whose options are the defaults of every call made through its classes. */
export declare class E2B {
  constructor(opts?: E2BClientOpts)
  readonly Sandbox: typeof Sandbox
  readonly Template: typeof Template
  readonly Volume: typeof Volume
  readonly Secret: typeof Secret
  /** A client with these options over this one's. */
  withOptions(opts?: E2BClientOpts): E2B
}

/** Base class of most errors. The second argument is that of `Error`, or, as in E2B, a stack to show. */
export declare class SandboxError extends Error {
  constructor(message?: string, options?: ErrorOptions | string)
  /** Stable code for programs, such as `ERR_SNAPSHOT_IN_USE`. */
  code: string
  /** HTTP status, on errors for which E2B has one. */
  statusCode?: number
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
/** A branch has no upstream branch to push to or pull from. */
export declare class GitUpstreamError extends SandboxError {}
/** The machine stopped by itself: a panic of its kernel, a triple fault, or a fault of its monitor. Beyond E2B. */
export declare class SandboxCrashedError extends SandboxError {
  /** Last lines of the guest's console. */
  console: string
}
/** The user does not exist. */
export declare class AuthenticationError extends Error {
  constructor(message?: string, options?: ErrorOptions | string)
  code: string
}
/** A git server wants other credentials. */
export declare class GitAuthError extends AuthenticationError {}
/** A command ended with an exit code other than 0. */
export declare class CommandExitError extends SandboxError implements CommandResult {
  constructor(result: CommandResult)
  exitCode: number
  error?: string
  stdout: string
  stderr: string
}

// What belongs to E2B's cloud, or is not here yet. It exists so that programs which import it load; using it fails with a
// SandboxError that says why.

/** A template could not be built. Never thrown here. */
export declare class BuildError extends Error {
  constructor(message?: string, options?: ErrorOptions | string)
  code: string
}
/** A file of a template could not be uploaded. Never thrown here. */
export declare class FileUploadError extends BuildError {}
/** A volume failed. Never thrown here. */
export declare class VolumeError extends Error {
  constructor(message?: string, options?: ErrorOptions | string)
  code: string
}
/** A volume does not exist. Never thrown here. */
export declare class VolumeNotFoundError extends VolumeError {}
/** A path of a volume does not exist. Never thrown here. */
export declare class VolumePathNotFoundError extends VolumeError {}
/** A secret failed. Never thrown here. */
export declare class SecretError extends Error {
  constructor(message?: string, options?: ErrorOptions | string)
  code: string
}
/** A secret does not exist. Never thrown here. */
export declare class SecretNotFoundError extends SecretError {}
/** The service has no room now. Never thrown here. */
export declare class ServiceBusyError extends Error {
  constructor(message?: string, options?: ErrorOptions | string)
  code: string
  readonly statusCode: 503
}

/** Templates are not built here yet: set a sandbox up and call {@link Sandbox.createSnapshot}. */
export declare class TemplateBase {
  static build(...args: any[]): Promise<any>
  static buildInBackground(...args: any[]): Promise<any>
  static getBuildStatus(...args: any[]): Promise<any>
  static exists(...args: any[]): Promise<boolean>
  static aliasExists(...args: any[]): Promise<boolean>
  static assignTags(...args: any[]): Promise<any>
  static removeTags(...args: any[]): Promise<void>
  static getTags(...args: any[]): Promise<any[]>
  static toJSON(...args: any[]): Promise<string>
  static toDockerfile(...args: any[]): string
}
/** E2B's template builder; see {@link TemplateBase}. */
export declare const Template: typeof TemplateBase & ((opts?: any) => any)
export type TemplateClass = TemplateBase
export type TemplateBuilder = any

/** Volumes belong to E2B's cloud: keep data in a snapshot, or pass it through {@link Sandbox.files}. */
export declare class Volume {
  constructor(...args: any[])
  static create(name: string, opts?: ConnectionOpts): Promise<any>
  static connect(volumeId: string, opts?: ConnectionOpts): Promise<any>
  static list(opts?: ConnectionOpts): Promise<any[]>
  static getInfo(volumeId: string, opts?: ConnectionOpts): Promise<any>
  static destroy(volumeId: string, opts?: ConnectionOpts): Promise<boolean>
}
/** Type of an entry in a volume. */
export declare enum VolumeFileType {
  UNKNOWN = 'unknown',
  FILE = 'file',
  DIRECTORY = 'directory',
  SYMLINK = 'symlink',
}

/** Secrets belong to E2B's cloud: pass them as `envs`. */
export declare class Secret {
  constructor(...args: any[])
  static create(name: string, value: string, opts?: ConnectionOpts): Promise<any>
  static getInfo(name: string, opts?: ConnectionOpts): Promise<any>
  static exists(name: string, opts?: ConnectionOpts): Promise<boolean>
  static update(name: string, ...args: any[]): Promise<any>
  static destroy(name: string, opts?: ConnectionOpts): Promise<boolean>
  static list(opts?: ConnectionOpts): SecretPaginator
}
/** Pages of {@link Secret.list}. */
export declare class SecretPaginator {
  constructor(...args: any[])
}

/** E2B's HTTP client; there is no server here. */
export declare class ApiClient {
  constructor(...args: any[])
}

/** A command whose success means that a template is ready. */
export declare class ReadyCmd {
  constructor(cmd: string)
  getCmd(): string
}
/** Ready when something listens on a port. */
export declare function waitForPort(port: number): ReadyCmd
/** Ready when a URL answers with a status. */
export declare function waitForURL(url: string, statusCode?: number): ReadyCmd
/** Ready when a process runs. */
export declare function waitForProcess(processName: string): ReadyCmd
/** Ready when a file exists. */
export declare function waitForFile(filename: string): ReadyCmd
/** Ready after some milliseconds, at least a second. */
export declare function waitForTimeout(timeout: number): ReadyCmd

/** Level of a {@link LogEntry}. */
export type LogEntryLevel = 'debug' | 'info' | 'warn' | 'error'
/** A line of a template's build log. */
export declare class LogEntry {
  constructor(timestamp: Date, level: LogEntryLevel, message: string)
  readonly timestamp: Date
  readonly level: LogEntryLevel
  readonly message: string
  toString(): string
}
/** First line of a log. */
export declare class LogEntryStart extends LogEntry {
  constructor(timestamp: Date, message: string)
}
/** Last line of a log. */
export declare class LogEntryEnd extends LogEntry {
  constructor(timestamp: Date, message: string)
}
/** A logger for template builds; it prints nothing here. */
export declare function defaultBuildLogger(options?: {
  minLevel?: LogEntryLevel
}): (logEntry: LogEntry) => void
