/** Checked by tsc, never run: a program written for E2B must type-check against index.d.ts. */
import Default, {
  ALL_TRAFFIC,
  AuthenticationError,
  CommandExitError,
  CommandHandle,
  ConnectionConfig,
  E2B,
  FileNotFoundError,
  FileType,
  FilesystemEventType,
  Git,
  GitAuthError,
  GitUpstreamError,
  InvalidArgumentError,
  NotEnoughSpaceError,
  NotFoundError,
  RateLimitError,
  Sandbox,
  SandboxCrashedError,
  SandboxError,
  SandboxNotFoundError,
  TemplateError,
  Template,
  TimeoutError,
  Volume,
  WatchHandle,
  getSignature,
  waitForPort,
} from 'amberbox'
import type {
  CommandResult,
  CommandStartOpts,
  ConnectionOpts,
  EntryInfo,
  FilesystemEvent,
  FilesystemReadOpts,
  FilesystemWriteOpts,
  GitResetMode,
  GitRestoreOpts,
  GitStatus,
  ProcessInfo,
  SandboxInfo,
  SandboxMetrics,
  SandboxOpts,
  SnapshotInfo,
  WriteInfo,
} from 'amberbox'

type Equal<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false
declare function same<A, B>(proof: Equal<A, B>): void

class Mine extends Sandbox {
  extra = 1
}

export async function program(): Promise<void> {
  const opts: SandboxOpts = { metadata: { job: '42' }, envs: { A: 'b' }, timeoutMs: 1000, apiKey: 'e2b_x' }
  await using sandbox = await Sandbox.create(opts)
  same<typeof sandbox, Sandbox>(true)
  same<typeof Default, typeof Sandbox>(true)
  await Sandbox.create('base', { signal: new AbortController().signal, requestTimeoutMs: 1 })
  const mine = await Mine.create()
  mine.extra.toFixed()
  const again = await Mine.connect(mine.sandboxId, { timeoutMs: 1 })
  again.extra.toFixed()

  const result = await sandbox.commands.run('true', { onStdout: (s) => console.log(s.length), cwd: '/' })
  same<typeof result, CommandResult>(true)
  const handle = await sandbox.commands.run('sleep 1', {
    background: true,
    stdin: true,
    onStderr: async () => {},
  })
  same<typeof handle, CommandHandle>(true)
  await handle.sendStdin('x')
  await handle.disconnect()
  const processes: ProcessInfo[] = await sandbox.commands.list()
  await sandbox.commands.connect(processes[0]!.pid, { onStdout() {} })
  same<Awaited<ReturnType<typeof sandbox.commands.kill>>, boolean>(true)

  const text = await sandbox.files.read('a')
  same<typeof text, string>(true)
  const bytes: Uint8Array = await sandbox.files.read('a', { format: 'bytes' })
  const blob: Blob = await sandbox.files.read('a', { format: 'blob' })
  const stream: ReadableStream<Uint8Array> = await sandbox.files.read('a', { format: 'stream' })
  const written: WriteInfo = await sandbox.files.write('a', bytes)
  const many: WriteInfo[] = await sandbox.files.write([{ path: 'b', data: blob }])
  await sandbox.files.writeFiles([{ path: 'c', data: stream, metadata: { k: 'v' } }])
  const entries: EntryInfo[] = await sandbox.files.list('/', { depth: 2, user: 'root' })
  entries.filter((e) => e.type === FileType.DIR).map((e) => e.modifiedTime?.getTime())
  void [written, many]

  const handled: WatchHandle = await sandbox.files.watchDir(
    '/tmp',
    async (event: FilesystemEvent) => {
      if (event.type === FilesystemEventType.WRITE) console.log(event.name, event.entry?.size)
    },
    { recursive: true, includeEntry: true, timeoutMs: 0, onExit: (err?: Error) => console.log(err?.message) },
  )
  await handled.stop()

  const mode: GitResetMode = 'hard'
  const restore: GitRestoreOpts = { paths: ['.'], staged: true }
  await sandbox.git.clone('https://example.com/a.git', { path: '/a', depth: 1, username: 'u', password: 'p' })
  await sandbox.git.reset('/a', { mode })
  await sandbox.git.restore('/a', restore)
  const status: GitStatus = await sandbox.git.status('/a')
  const { branches, currentBranch } = await sandbox.git.branches('/a')
  const url: string | undefined = await sandbox.git.remoteGet('/a', 'origin')
  void [status.fileStatus[0]?.status === 'untracked', branches.length, currentBranch?.length, url]
  same<typeof sandbox.git, Git>(true)

  for await (const chunk of handle) {
    const [stdout, stderr] = chunk
    console.log(chunk.type === 'stdout', chunk.stdout?.length, stdout, stderr, `${chunk}`)
  }
  await handle.sendSignal('SIGINT')
  await sandbox.commands.kill(1, { signal: 'SIGTERM' })
  await sandbox.commands.kill(1, { signal: new AbortController().signal, requestTimeoutMs: 5 })

  const wrapper = (cmd: string, opts?: CommandStartOpts) => sandbox.commands.run(cmd, opts)
  same<Awaited<ReturnType<typeof wrapper>>, CommandResult | CommandHandle>(true)
  const reading: FilesystemReadOpts = { gzip: true, user: 'root', streamIdleTimeoutMs: 1 }
  const writing: FilesystemWriteOpts = { gzip: true, useOctetStream: true, metadata: { a: 'b' } }
  await sandbox.files.write('a', await sandbox.files.read('b', reading), writing)

  const connection: ConnectionOpts = {
    apiKey: 'k',
    domain: 'e2b.dev',
    debug: false,
    headers: {},
    proxy: 'p',
    retries: 1,
  }
  const client = new E2B(connection)
  const fromClient = await client.Sandbox.create('base', { requestTimeoutMs: 30_000 })
  same<typeof fromClient, Sandbox>(true)
  const config = new ConnectionConfig({ ...connection, requestTimeoutMs: 1 })
  const signed = await getSignature({ path: '/a', operation: 'read', user: undefined, envdAccessToken: 't' })
  same<typeof signed, { signature: string; expiration: number | null }>(true)
  void [config.getSignal(), ALL_TRAFFIC.length, waitForPort(80).getCmd(), Template(), Volume.list()]

  const snapshot: SnapshotInfo = await sandbox.createSnapshot({ name: 'n' })
  await Sandbox.createSnapshot(sandbox.sandboxId)
  for (const p = Sandbox.listSnapshots({ sandboxId: sandbox.sandboxId, limit: 20 }); p.hasNext;) {
    same<Awaited<ReturnType<typeof p.nextItems>>, SnapshotInfo[]>(true)
    await p.nextItems()
  }
  const deleted: boolean = await Sandbox.deleteSnapshot(snapshot.snapshotId)
  const list = Sandbox.list({ query: { metadata: { job: '42' }, state: ['running'] }, limit: 5 })
  const infos: SandboxInfo[] = await list.nextItems()
  same<SandboxInfo['backend'], 'kvm' | 'soft' | 'none'>(true)
  void [deleted, infos]

  const paused: boolean = await sandbox.pause({ mode: 'filesystem' })
  await Sandbox.connect(sandbox.sandboxId, { onResume: 'reboot' })
  for (const copy of await mine.fork({ count: 2 })) {
    if (copy instanceof Error) throw copy
    copy.extra.toFixed()
  }
  const metrics: SandboxMetrics[] = await sandbox.getMetrics({ start: new Date() })
  await sandbox.updateNetwork({ denyOut: ({ allTraffic }) => [allTraffic] })
  await Sandbox.create({ lifecycle: { onTimeout: { action: 'pause', keepMemory: false } } })
  void [paused, metrics]

  const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData: (d) => void d.byteLength })
  await sandbox.pty.resize(pty.pid, { cols: 100, rows: 30 })

  // @ts-expect-error: the id must be a string
  await Sandbox.kill(1)
  // @ts-expect-error: instance listings are about this sandbox already
  sandbox.listSnapshots({ sandboxId: 'x' })
  // @ts-expect-error: not a format
  await sandbox.files.read('a', { format: 'hex' })
}

export function classify(error: unknown): string {
  if (error instanceof CommandExitError) return `${error.exitCode} ${error.stdout} ${error.stderr}`
  if (error instanceof SandboxCrashedError) return error.console
  if (error instanceof FileNotFoundError || error instanceof SandboxNotFoundError) {
    const parent: NotFoundError = error
    return parent.code
  }
  if (error instanceof GitAuthError) {
    const parent: AuthenticationError = error
    return parent.code
  }
  if (error instanceof AuthenticationError) return error.code
  for (const Class of [
    TimeoutError,
    InvalidArgumentError,
    NotEnoughSpaceError,
    TemplateError,
    RateLimitError,
    GitUpstreamError,
  ]) {
    const parent: SandboxError = new Class('x')
    void parent
  }
  return ''
}
