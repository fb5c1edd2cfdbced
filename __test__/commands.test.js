'use strict'
const {
  AuthenticationError,
  CommandExitError,
  CommandHandle,
  InvalidArgumentError,
  NotFoundError,
} = require('..')
const { SandboxError, TimeoutError } = require('..')
const { ownStore, failure, until } = require('./support')

const store = ownStore()
let sandbox

beforeAll(async () => {
  sandbox = await store.create({ envs: { FROM_SANDBOX: 'sandbox', BOTH: 'sandbox' } })
})

describe('run', () => {
  test('gives output, error output and exit code', async () => {
    const result = await sandbox.commands.run('echo out; echo err >&2')
    expect(result).toEqual({ exitCode: 0, error: undefined, stdout: 'out\n', stderr: 'err\n' })
  })

  test('an exit code other than 0 is an error that carries the output', async () => {
    const error = await failure(sandbox.commands.run('echo out; echo err >&2; exit 3'))
    expect(error).toBeInstanceOf(CommandExitError)
    expect(error).toBeInstanceOf(SandboxError)
    expect(error).toMatchObject({
      name: 'CommandExitError',
      exitCode: 3,
      error: 'exit status 3',
      message: 'exit status 3',
      stdout: 'out\n',
      stderr: 'err\n',
    })
  })

  test('is a login shell of the default user in their home', async () => {
    const { stdout } = await sandbox.commands.run(
      'shopt -q login_shell && echo login; id -un; pwd; echo $HOME $USER',
    )
    expect(stdout.split('\n').slice(0, 4)).toEqual(['login', 'user', '/home/user', '/home/user user'])
  })

  test('environment: the command over the sandbox, and no leak to the next command', async () => {
    const show = 'echo "$FROM_SANDBOX,$BOTH,$ONCE"'
    const first = await sandbox.commands.run(show, { envs: { BOTH: 'command', ONCE: '1' } })
    expect(first.stdout).toBe('sandbox,command,1\n')
    expect((await sandbox.commands.run(show)).stdout).toBe('sandbox,sandbox,\n')
  })

  test('user and cwd', async () => {
    const root = await sandbox.commands.run('id -u; pwd', { user: 'root' })
    expect(root.stdout).toBe('0\n/root\n')
    await sandbox.files.makeDir('work/deep')
    const relative = await sandbox.commands.run('pwd', { cwd: 'work/deep' })
    expect(relative.stdout).toBe('/home/user/work/deep\n')
    expect((await sandbox.commands.run('pwd', { cwd: '/usr' })).stdout).toBe('/usr\n')
    expect((await sandbox.commands.run('sudo id -u')).stdout).toBe('0\n')
  })

  test('a missing cwd and an unknown user are told apart', async () => {
    const cwd = await failure(sandbox.commands.run('true', { cwd: '/not/there' }))
    expect(cwd).toBeInstanceOf(InvalidArgumentError)
    expect(cwd.message).toContain("cwd '/not/there' does not exist")
    const user = await failure(sandbox.commands.run('true', { user: 'nobody-here' }))
    expect(user).toBeInstanceOf(AuthenticationError)
    expect(user).not.toBeInstanceOf(SandboxError)
    expect(user.message).toContain("invalid username: 'nobody-here'")
  })

  test('output arrives in pieces, in order, and callbacks are awaited', async () => {
    const seen = []
    let running = 0
    const result = await sandbox.commands.run('for i in 1 2 3; do echo $i; sleep 0.2; done', {
      async onStdout(data) {
        expect(++running).toBe(1)
        await new Promise((done) => setTimeout(done, 10))
        seen.push(data)
        running--
      },
    })
    expect(seen.join('')).toBe('1\n2\n3\n')
    expect(seen.length).toBeGreaterThan(1)
    expect(result.stdout).toBe('1\n2\n3\n')
  })

  test('characters split between pieces are put together, invalid bytes replaced', async () => {
    const split = `printf '\\xe2\\x82'; sleep 0.3; printf '\\xac'; sleep 0.3; printf '\\xff.'`
    const pieces = []
    const { stdout } = await sandbox.commands.run(split, { onStdout: (data) => void pieces.push(data) })
    expect(stdout).toBe('€\ufffd.')
    expect(pieces.join('')).toBe(stdout)
    expect(pieces[0]).toBe('€')
  })

  test('a large output is complete', async () => {
    const { stdout } = await sandbox.commands.run('head -c 3000000 /dev/zero | tr "\\0" x')
    expect(stdout.length).toBe(3_000_000)
    expect(/^x*$/.test(stdout)).toBe(true)
  })

  test('standard input is empty unless asked for', async () => {
    expect((await sandbox.commands.run('cat; echo end')).stdout).toBe('end\n')
  })

  test('timeoutMs kills the command', async () => {
    const error = await failure(
      sandbox.commands.run('echo $$ > /tmp/timed; exec sleep 600', { timeoutMs: 1500 }),
    )
    expect(error).toBeInstanceOf(TimeoutError)
    expect(error.message).toContain('timeoutMs')
    const pid = (await sandbox.files.read('/tmp/timed')).trim()
    await until(async () => !(await sandbox.files.exists(`/proc/${pid}`)))
  })

  test('signal rejects with its reason and disturbs no other run', async () => {
    const controller = new AbortController()
    const other = sandbox.commands.run('sleep 1; echo fine')
    const aborted = failure(sandbox.commands.run('sleep 600', { signal: controller.signal }))
    setTimeout(() => controller.abort(), 300)
    expect((await aborted).name).toBe('AbortError')
    expect((await other).stdout).toBe('fine\n')
    const already = await failure(
      sandbox.commands.run('true', { signal: AbortSignal.abort(new Error('before')) }),
    )
    expect(already.message).toBe('before')
    const left = (await sandbox.commands.list()).filter(({ args }) => args.includes('sleep 600'))
    expect(left).toEqual([])
  })
})

describe('background', () => {
  test('handle: pid, output so far, wait', async () => {
    const handle = await sandbox.commands.run('echo one; sleep 0.5; echo two', { background: true })
    expect(handle).toBeInstanceOf(CommandHandle)
    expect(handle.pid).toBeGreaterThan(1)
    expect(handle.exitCode).toBeUndefined()
    await until(() => handle.stdout.includes('one'))
    const result = await handle.wait()
    expect(result.stdout).toBe('one\ntwo\n')
    expect(handle.exitCode).toBe(0)
  })

  test('list shows what runs, kill ends it', async () => {
    const handle = await sandbox.commands.run('sleep 601', {
      background: true,
      envs: { MARK: 'x' },
      cwd: '/tmp',
    })
    const entry = (await sandbox.commands.list()).find(({ pid }) => pid === handle.pid)
    expect(entry).toMatchObject({
      cmd: '/bin/bash',
      args: ['-l', '-c', 'sleep 601'],
      cwd: '/tmp',
      envs: expect.objectContaining({ MARK: 'x' }),
    })
    expect(await handle.kill()).toBe(true)
    const error = await failure(handle.wait())
    expect(error).toBeInstanceOf(CommandExitError)
    expect(error).toMatchObject({ exitCode: -1, error: 'signal: killed' })
    expect(await sandbox.commands.kill(handle.pid)).toBe(false)
    expect((await sandbox.commands.list()).some(({ pid }) => pid === handle.pid)).toBe(false)
  })

  test('disconnect stops callbacks, the command goes on, connect listens again', async () => {
    const seen = []
    const handle = await sandbox.commands.run('for i in $(seq 40); do echo $i; sleep 0.1; done', {
      background: true,
      onStdout: (data) => void seen.push(data),
    })
    await until(() => seen.length > 0)
    await handle.disconnect()
    const count = seen.length
    const lines = []
    const again = await sandbox.commands.connect(handle.pid, { onStdout: (data) => void lines.push(data) })
    expect(again.pid).toBe(handle.pid)
    expect((await again.wait()).exitCode).toBe(0)
    expect(lines.join('')).toMatch(/40\n$/)
    expect(lines.join('')).not.toMatch(/^1\n/)
    expect(seen.length).toBe(count)
    expect((await failure(handle.wait())).message).toContain('disconnected')
  })

  test('stdin: send, close', async () => {
    const handle = await sandbox.commands.run('cat', { background: true, stdin: true })
    await handle.sendStdin('hello ')
    await sandbox.commands.sendStdin(handle.pid, Buffer.from('wörld'))
    await handle.closeStdin()
    expect((await handle.wait()).stdout).toBe('hello wörld')
  })

  test('unknown processes', async () => {
    expect(await sandbox.commands.kill(999_999)).toBe(false)
    for (const call of [
      sandbox.commands.connect(999_999),
      sandbox.commands.sendStdin(999_999, 'x'),
      sandbox.commands.closeStdin(999_999),
    ]) {
      expect(await failure(call)).toBeInstanceOf(NotFoundError)
    }
  })
})

describe('pty', () => {
  test('a terminal has its size, takes input, and ends', async () => {
    let screen = ''
    const decoder = new TextDecoder()
    const terminal = await sandbox.pty.create({
      cols: 80,
      rows: 24,
      onData: (data) => void (screen += decoder.decode(data, { stream: true })),
    })
    await sandbox.pty.sendInput(terminal.pid, Buffer.from('echo cols=$(tput cols)\n'))
    await until(() => screen.includes('cols=80'))
    await sandbox.pty.resize(terminal.pid, { cols: 100, rows: 24 })
    await sandbox.pty.sendInput(terminal.pid, Buffer.from('echo cols=$(tput cols) $TERM\n'))
    await until(() => screen.includes('cols=100 xterm-256color'))
    await sandbox.pty.sendInput(terminal.pid, Buffer.from('exit\n'))
    expect((await terminal.wait()).exitCode).toBe(0)
    expect(await sandbox.pty.kill(terminal.pid)).toBe(false)
  })
})
