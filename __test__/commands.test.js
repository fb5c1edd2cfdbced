'use strict'
const {
  AuthenticationError,
  CommandExitError,
  CommandHandle,
  InvalidArgumentError,
  NotFoundError,
} = require('..')
const { SandboxError, TimeoutError } = require('..')
const { ownStore, failure, failures, until } = require('./support')

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
    for (const error of await failures([
      sandbox.commands.connect(999_999),
      sandbox.commands.sendStdin(999_999, 'x'),
      sandbox.commands.closeStdin(999_999),
    ])) {
      expect(error).toBeInstanceOf(NotFoundError)
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

describe('beyond E2B', () => {
  test('signals other than KILL', async () => {
    const command =
      "trap 'echo usr; exit 5' USR1; trap 'echo term; exit 6' TERM; echo ready; while :; do sleep 0.1; done"
    const start = async () => {
      const handle = await sandbox.commands.run(command, { background: true })
      await until(() => handle.stdout.includes('ready'))
      return handle
    }
    const [one, two, three] = await Promise.all([start(), start(), start()])
    expect(await one.sendSignal('SIGUSR1')).toBe(true)
    expect(await two.kill('TERM')).toBe(true)
    expect(await sandbox.commands.kill(three.pid, { signal: 15 })).toBe(true)
    expect(await failure(one.wait())).toMatchObject({ exitCode: 5, stdout: 'ready\nusr\n' })
    expect(await failure(two.wait())).toMatchObject({ exitCode: 6 })
    expect(await failure(three.wait())).toMatchObject({ exitCode: 6 })
    expect(await failure(sandbox.commands.sendSignal(one.pid, 'SIGNOT'))).toBeInstanceOf(InvalidArgumentError)
    expect(await sandbox.commands.sendSignal(999999, 'SIGTERM')).toBe(false)
  })

  test('for await gives the output as it comes', async () => {
    const handle = await sandbox.commands.run('echo a; sleep 0.2; echo b >&2; sleep 0.2; echo c', {
      background: true,
    })
    const seen = []
    for await (const { type, data } of handle) seen.push([type, data])
    expect(seen).toEqual([
      ['stdout', 'a\n'],
      ['stderr', 'b\n'],
      ['stdout', 'c\n'],
    ])
  })
})

test('the exit code is kept for those who connect a little later', async () => {
  const handle = await sandbox.commands.run('sleep 0.2; exit 9', { background: true })
  expect(await failure(handle.wait())).toMatchObject({ exitCode: 9 })
  const late = await sandbox.commands.connect(handle.pid)
  expect(await failure(late.wait())).toMatchObject({ exitCode: 9 })
})

test('a slow reader holds the command back, and gets every byte', async () => {
  let length = 0
  let late = false
  const running = sandbox.commands.run('head -c 40000000 /dev/zero | tr "\\0" x; date +%s%N > /tmp/written', {
    async onStdout(text) {
      length += text.length
      if (!late) {
        late = true
        // Long enough to write it all, if nobody had to wait.
        await new Promise((done) => setTimeout(done, 1500))
        expect(await sandbox.files.exists('/tmp/written')).toBe(false)
      }
    },
    timeoutMs: 0,
  })
  const { stdout } = await running
  expect({ length, stdout: stdout.length }).toEqual({ length: 40_000_000, stdout: 40_000_000 })
})

test('ten terminals at once, each with its own shell', async () => {
  const terminals = await Promise.all(
    Array.from({ length: 10 }, async (_, i) => {
      const seen = { text: '' }
      seen.handle = await sandbox.pty.create({
        cols: 80,
        rows: 24,
        envs: { WHO: `number-${i}` },
        onData: (data) => void (seen.text += Buffer.from(data)),
      })
      return seen
    }),
  )
  await Promise.all(
    terminals.map(({ handle }) => sandbox.pty.sendInput(handle.pid, Buffer.from('echo "<$WHO>"; exit\n'))),
  )
  const codes = await Promise.all(terminals.map(({ handle }) => handle.wait()))
  expect(codes.map(({ exitCode }) => exitCode)).toEqual(Array(10).fill(0))
  terminals.forEach(({ text }, i) => expect(text).toContain(`<number-${i}>`))
})

test('a terminal goes on without a listener and is found again', async () => {
  let first = ''
  const terminal = await sandbox.pty.create({
    cols: 80,
    rows: 24,
    onData: (data) => void (first += Buffer.from(data)),
  })
  await sandbox.pty.sendInput(terminal.pid, Buffer.from('mark=kept; echo "one-$mark"\n'))
  await until(() => first.includes('one-kept'))
  await terminal.disconnect()
  let second = ''
  const again = await sandbox.pty.connect(terminal.pid, {
    onData: (data) => void (second += Buffer.from(data)),
  })
  await sandbox.pty.sendInput(terminal.pid, Buffer.from('echo "two-$mark"; exit 3\n'))
  expect(await failure(again.wait())).toMatchObject({ exitCode: 3 })
  expect(second).toContain('two-kept')
})

test("E2B's variables tell a program where it runs", async () => {
  const { stdout } = await sandbox.commands.run(
    'echo $E2B_SANDBOX $E2B_SANDBOX_ID; cat /run/e2b/.E2B_SANDBOX; echo; cat /run/e2b/.E2B_SANDBOX_ID',
  )
  expect(stdout).toBe(`true ${sandbox.sandboxId}\ntrue\n${sandbox.sandboxId}`)
})

test('five hundred processes come and go; none is left', async () => {
  const before = (await sandbox.commands.run('ls -d /proc/[0-9]* | wc -l')).stdout
  const results = await Promise.all(
    Array.from({ length: 100 }, (_, i) =>
      sandbox.commands.run(`for i in 1 2 3 4; do (exit $i) & done; wait; echo ${i}`, { timeoutMs: 0 }),
    ),
  )
  expect(results.map(({ stdout }) => stdout)).toEqual(Array.from({ length: 100 }, (_, i) => `${i}\n`))
  const zombies = await sandbox.commands.run('cat /proc/[0-9]*/stat 2>/dev/null | awk \'$3 == "Z"\' | wc -l')
  expect(zombies.stdout).toBe('0\n')
  await until(async () => (await sandbox.commands.run('ls -d /proc/[0-9]* | wc -l')).stdout === before)
  expect(await sandbox.commands.list()).toEqual([])
})
