'use strict'
const { mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync, cpSync } = require('node:fs')
const path = require('node:path')
const { InvalidArgumentError, Sandbox, SandboxCrashedError, SandboxError, TemplateError } = require('..')
const { SandboxNotFoundError, TimeoutError } = require('..')
const { ownStore, failure, failures, until } = require('./support')

const store = ownStore()

/** Every regular file below a directory. */
function filesOf(dir) {
  return readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => path.join(entry.parentPath, entry.name))
}

/** Runs `body` with another environment. */
async function withEnv(env, body) {
  const before = { ...process.env }
  Object.assign(process.env, env)
  try {
    return await body()
  } finally {
    for (const key of Object.keys(env)) delete process.env[key]
    Object.assign(process.env, before)
  }
}

test('an unknown template', async () => {
  for (const template of ['no-such-template', 'i0123456789', 'team/name:tag']) {
    const error = await failure(Sandbox.create(template))
    expect(error).toBeInstanceOf(SandboxError)
    expect(error.message).toBe(`404: template '${template}' not found`)
  }
})

test('wrong arguments are refused before anything happens', async () => {
  for (const error of await failures([
    Sandbox.create(''),
    Sandbox.create({ template: 7 }),
    Sandbox.create({ timeoutMs: -1 }),
    Sandbox.create({ timeoutMs: Number.NaN }),
    Sandbox.connect(''),
    Sandbox.kill(undefined),
    Sandbox.deleteSnapshot(''),
  ])) {
    expect(error).toBeInstanceOf(InvalidArgumentError)
  }
  expect(() => Sandbox.list({ limit: 0 })).toThrow(InvalidArgumentError)
  expect(await failure(Sandbox.listSnapshots({ nextToken: 'x' }).nextItems())).toBeInstanceOf(
    InvalidArgumentError,
  )
})

test('calls on a sandbox that never was', async () => {
  const sandbox = new Sandbox({ sandboxId: 'i0000000000000000000' })
  for (const error of await failures([
    sandbox.getInfo(),
    sandbox.commands.run('true'),
    sandbox.createSnapshot(),
  ])) {
    expect(error).toBeInstanceOf(SandboxNotFoundError)
  }
  expect(await sandbox.isRunning()).toBe(false)
  expect(await sandbox.kill()).toBe(false)
})

test('a base template that has not been built: says what to run', async () => {
  const env = {
    AMBERBOX_HOME: path.join(store.home, 'empty'),
    AMBERBOX_GUEST: path.join(store.home, 'no-guest'),
  }
  const error = await withEnv(env, () => failure(Sandbox.create()))
  expect(error).toBeInstanceOf(TemplateError)
  expect(error.code).toBe('ERR_TEMPLATE_MISSING')
  expect(error.message).toContain('npm run setup')
})

test('a store that cannot be written', async () => {
  const file = path.join(store.home, 'a-file')
  writeFileSync(file, '')
  const error = await withEnv({ AMBERBOX_HOME: path.join(file, 'store') }, () => failure(Sandbox.create()))
  expect(error).toBeInstanceOf(SandboxError)
  expect(error.code).toBe('ERR_STORE')
  expect(error.message).toContain(file)
})

test('a command that the guest has no memory for fails, the sandbox goes on', async () => {
  const sandbox = await store.create()
  const error = await failure(sandbox.commands.run('python3 -c "x = bytearray(2 << 30)"', { timeoutMs: 0 }))
  expect(error.exitCode).not.toBe(0)
  expect((await sandbox.commands.run('echo alive')).stdout).toBe('alive\n')
})

test('requestTimeoutMs', async () => {
  const sandbox = await store.create()
  // Ten thousand entries take longer than a millisecond on any machine.
  await sandbox.commands.run('mkdir many && cd many && seq 3000 | xargs touch')
  const error = await failure(sandbox.files.list('many', { requestTimeoutMs: 1 }))
  expect(error).toBeInstanceOf(TimeoutError)
  expect(error.message).toContain('requestTimeoutMs')
  expect(await sandbox.files.list('many')).toHaveLength(3000)
})

test('a kernel panic ends the sandbox with an error that carries the console', async () => {
  const sandbox = await store.create()
  const pending = failure(sandbox.commands.run('sleep 600', { timeoutMs: 0 }))
  await until(async () => (await sandbox.commands.list()).length === 1)
  const killer = failure(
    sandbox.commands.run(
      'echo 2 > /proc/sys/vm/panic_on_oom; exec python3 -c "x = [bytearray(1 << 26) for _ in range(64)]"',
      {
        user: 'root',
        timeoutMs: 0,
      },
    ),
  )
  for (const error of [await pending, await killer, await failure(sandbox.commands.run('true'))]) {
    expect(error).toBeInstanceOf(SandboxCrashedError)
    expect(error.message).toContain('has crashed')
    expect(error.console).toContain('Kernel panic')
  }
  expect(await failure(sandbox.getInfo())).toBeInstanceOf(SandboxCrashedError)
  expect(await sandbox.isRunning()).toBe(false)
  expect(await sandbox.kill()).toBe(false)
})

describe('damaged snapshots', () => {
  let pristine
  let name = 0

  beforeAll(async () => {
    const source = await store.create()
    await source.files.write('/tmp/marker', 'whole')
    await source.createSnapshot({ name: 'pristine' })
    await source.kill()
    pristine = path.join(store.home, 'pristine-copy')
    mkdirSync(pristine)
    for (const entry of readdirSync(store.home)) {
      if (!entry.startsWith('pristine-copy'))
        cpSync(path.join(store.home, entry), path.join(pristine, entry), { recursive: true })
    }
  })

  /** Opens a copy of the store in which `damage` has been done to each file in turn. */
  async function withDamage(damage, check) {
    const base = new Set(filesOf(path.join(pristine)).map((file) => path.relative(pristine, file)))
    for (const file of base) {
      if (statSync(path.join(pristine, file)).size === 0) continue
      const home = path.join(store.home, `damaged-${name++}`)
      cpSync(pristine, home, { recursive: true })
      damage(path.join(home, file))
      // The template is not adopted again: what is damaged stays damaged.
      await withEnv({ AMBERBOX_HOME: home }, () => check(file))
      rmSync(home, { recursive: true, force: true })
    }
  }

  /** Either everything works as if nothing had happened, or there is a typed error. Never anything else. */
  async function worksOrTells() {
    let sandbox
    try {
      sandbox = await Sandbox.create('pristine')
      expect(await sandbox.files.read('/tmp/marker')).toBe('whole')
      return 'works'
    } catch (error) {
      expect(error).toBeInstanceOf(SandboxError)
      expect(error.code).toMatch(
        /^ERR_(SNAPSHOT_CORRUPT|SNAPSHOT_VERSION|STORE|UNKNOWN_TEMPLATE|SANDBOX_CRASHED)$/,
      )
      expect(error.message.length).toBeGreaterThan(20)
      return error.code
    } finally {
      await sandbox?.kill()
    }
  }

  test('truncated files', async () => {
    const seen = []
    await withDamage(
      (file) => writeFileSync(file, readFileSync(file).subarray(0, Math.floor(statSync(file).size / 2))),
      async () => seen.push(await worksOrTells()),
    )
    expect(seen).toContain('ERR_SNAPSHOT_CORRUPT')
  })

  test('flipped bytes', async () => {
    const seen = []
    await withDamage(
      (file) => {
        const bytes = readFileSync(file)
        bytes[Math.floor(bytes.length / 3)] ^= 0x10
        writeFileSync(file, bytes)
      },
      async () => seen.push(await worksOrTells()),
    )
    expect(seen).toContain('ERR_SNAPSHOT_CORRUPT')
  })
})
