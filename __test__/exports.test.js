'use strict'
/** What a program written for E2B may import besides Sandbox. */
const { createHash } = require('node:crypto')
const amberbox = require('..')
const { ownStore, failure } = require('./support')

const store = ownStore()
const { E2B, Sandbox, SandboxError } = amberbox

/** The names that e2b 2.51 exports as values. */
const E2B_EXPORTS = `ALL_TRAFFIC ApiClient AuthenticationError BuildError CommandExitError ConnectionConfig E2B
  FileNotFoundError FileType FileUploadError FilesystemEventType Git GitAuthError GitUpstreamError InvalidArgumentError
  LogEntry LogEntryEnd LogEntryStart NotEnoughSpaceError NotFoundError RateLimitError ReadyCmd Sandbox SandboxError
  SandboxNotFoundError Secret SecretError SecretNotFoundError SecretPaginator ServiceBusyError Template TemplateBase
  TemplateError TimeoutError Volume VolumeError VolumeFileType VolumeNotFoundError VolumePathNotFoundError default
  defaultBuildLogger getSignature waitForFile waitForPort waitForProcess waitForTimeout waitForURL`

test('every value that e2b exports is exported, and the default is Sandbox', () => {
  expect(E2B_EXPORTS.split(/\s+/).filter((name) => amberbox[name] === undefined)).toEqual([])
  expect(amberbox.default).toBe(Sandbox)
})

test("an E2B client's options are the defaults of its calls", async () => {
  const opts = { apiKey: 'e2b_x', domain: 'example.com', requestTimeoutMs: 1 }
  const client = new E2B(opts)
  opts.requestTimeoutMs = 60_000
  expect(client.Sandbox.prototype).toBeInstanceOf(Sandbox)
  expect((await failure(client.Sandbox.create())).code).toBe('ERR_REQUEST_TIMEOUT')
  const sandbox = await client.Sandbox.create({ requestTimeoutMs: 60_000, domain: undefined })
  expect(sandbox).toBeInstanceOf(client.Sandbox)
  expect((await sandbox.commands.run('echo yes')).stdout).toBe('yes\n')
  expect(await client.withOptions({ requestTimeoutMs: 0 }).Sandbox.kill(sandbox.sandboxId)).toBe(true)
})

test("a sandbox's request timeout is that of its creation unless a call has its own", async () => {
  const { sandboxId } = await store.create()
  const hasty = new Sandbox({ sandboxId, requestTimeoutMs: 0.001 })
  const many = await Promise.allSettled(Array.from({ length: 50 }, () => hasty.commands.list()))
  expect(many.some(({ reason }) => reason?.code === 'ERR_REQUEST_TIMEOUT')).toBe(true)
  expect(await hasty.commands.list({ requestTimeoutMs: 30_000 })).toEqual([])
})

test("what belongs to E2B's cloud says so", async () => {
  for (const call of [
    amberbox.Volume.create('v'),
    amberbox.Secret.create('n', 'v'),
    amberbox.Template.build(),
    amberbox.Template.exists('x'),
  ]) {
    const error = await failure(call)
    expect(error).toBeInstanceOf(SandboxError)
    expect(error).toMatchObject({
      code: 'ERR_NOT_AVAILABLE',
      message: expect.stringContaining('not available'),
    })
  }
  expect(() => amberbox.Template()).toThrow(SandboxError)
  expect(() => new amberbox.ApiClient()).toThrow(SandboxError)
})

test('errors take the stack that they show, as those of E2B do', () => {
  const error = new amberbox.TimeoutError('too slow', '    at mine (file.ts:1:1)')
  expect(error.stack).toBe('TimeoutError: too slow\n    at mine (file.ts:1:1)')
  expect(error.cause).toBeInstanceOf(Error)
  expect(Object.keys(error)).not.toContain('cause')
  expect(new SandboxError('x', { cause: error }).cause).toBe(error)
  expect(new SandboxError('x').cause).toBeUndefined()
  expect(new amberbox.RateLimitError('x').statusCode).toBe(429)
})

test("signatures are E2B's", async () => {
  const sign = (text) => `v1_${createHash('sha256').update(text).digest('base64').replace(/=+$/, '')}`
  const base = { path: '/a b', operation: 'read', user: 'root', envdAccessToken: 'token' }
  expect(await amberbox.getSignature(base)).toEqual({
    signature: sign('/a b:read:root:token'),
    expiration: null,
  })
  const { signature, expiration } = await amberbox.getSignature({
    ...base,
    user: undefined,
    expirationInSeconds: 60,
  })
  expect(Math.abs(expiration - Date.now() / 1000 - 60)).toBeLessThan(30)
  expect(signature).toBe(sign(`/a b:read::token:${expiration}`))
  expect((await failure(amberbox.getSignature({ ...base, envdAccessToken: undefined }))).message).toMatch(
    /not set/,
  )
})

test('connection options: given, then the environment, then defaults', () => {
  const before = process.env.E2B_DOMAIN
  process.env.E2B_DOMAIN = 'from.env'
  try {
    expect(new amberbox.ConnectionConfig()).toMatchObject({
      domain: 'from.env',
      requestTimeoutMs: 60_000,
      debug: false,
    })
    expect(new amberbox.ConnectionConfig({ domain: 'given' }).apiUrl).toBe('https://api.given')
  } finally {
    if (before === undefined) delete process.env.E2B_DOMAIN
    else process.env.E2B_DOMAIN = before
  }
  expect(new amberbox.ConnectionConfig().getSignal(0)).toBeUndefined()
  const controller = new AbortController()
  controller.abort()
  expect(new amberbox.ConnectionConfig().getSignal(1000, controller.signal).aborted).toBe(true)
})
