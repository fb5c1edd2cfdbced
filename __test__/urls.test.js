'use strict'
const { InvalidArgumentError } = require('..')
const { ownStore, failure, program } = require('./support')

const store = ownStore()
let sandbox

beforeAll(async () => {
  sandbox = await store.create()
  await sandbox.files.write('hello.txt', 'hello world')
})

/** Status and body of an answer. */
async function ask(url, init) {
  const response = await fetch(url, init)
  const text = await response.text()
  return {
    status: response.status,
    body: text.startsWith('[') || text.startsWith('{') ? JSON.parse(text) : text,
  }
}

/** The URL with one of its parameters changed. */
function changed(url, name, value) {
  const other = new URL(url)
  if (value === undefined) other.searchParams.delete(name)
  else other.searchParams.set(name, value)
  return other
}

const expired = { status: 401, body: { code: 401, message: 'signature is already expired' } }

test('a download, valid for a time or without end, for a user', async () => {
  for (const opts of [undefined, {}, { useSignatureExpiration: 10_000 }]) {
    expect(await ask(await sandbox.downloadUrl('hello.txt', opts))).toEqual({
      status: 200,
      body: 'hello world',
    })
  }
  expect(await ask(await sandbox.downloadUrl('hello.txt', { useSignatureExpiration: -10 }))).toEqual(expired)
  await sandbox.files.write('hello.txt', 'of root', { user: 'root' })
  expect(await ask(await sandbox.downloadUrl('hello.txt', { user: 'root' }))).toEqual({
    status: 200,
    body: 'of root',
  })
  expect(await ask(await sandbox.downloadUrl('missing'))).toMatchObject({ status: 404, body: { code: 404 } })
  expect(await ask(await sandbox.downloadUrl('/etc'))).toMatchObject({ status: 400 })
})

test('an upload, as a form or raw', async () => {
  const form = () => {
    const data = new FormData()
    data.append('file', 'file content')
    return { method: 'POST', body: data }
  }
  const written = (path) => ({ status: 200, body: [{ name: path.split('/').at(-1), path, type: 'file' }] })
  const url = await sandbox.uploadUrl('up.txt', { useSignatureExpiration: 10_000 })
  expect(await ask(url, form())).toEqual(written('/home/user/up.txt'))
  expect(await sandbox.files.read('up.txt')).toBe('file content')
  expect(await ask(await sandbox.uploadUrl('up.txt', { user: 'root' }), form())).toEqual(
    written('/root/up.txt'),
  )
  const many = new FormData()
  many.append('file', new Blob(['one']), 'named/one.txt')
  many.append('file', new Blob(['two']), 'two.txt')
  const both = await ask(await sandbox.uploadUrl(), { method: 'POST', body: many })
  expect(both.body.map(({ path }) => path)).toEqual(['/home/user/named/one.txt', '/home/user/two.txt'])
  const body = Buffer.alloc(5_000_000, 'raw ')
  expect(await ask(await sandbox.uploadUrl('/tmp/raw'), { method: 'POST', body })).toEqual(
    written('/tmp/raw'),
  )
  expect(Buffer.compare(await sandbox.files.read('/tmp/raw', { format: 'bytes' }), body)).toBe(0)
  expect(await ask(await sandbox.uploadUrl('up.txt', { useSignatureExpiration: -100 }), form())).toEqual(
    expired,
  )
})

test('a URL is for what it says and nothing else', async () => {
  const url = await sandbox.downloadUrl('hello.txt', { useSignatureExpiration: 1000 })
  const other = await store.create()
  for (const [name, value] of [
    ['path', 'other.txt'],
    ['username', 'root'],
    ['signature', undefined],
    ['signature', 'v1_AAAA'],
    ['signature_expiration', '99999999999'],
    ['signature_expiration', 'soon'],
    ['signature_expiration', undefined],
    ['sandbox', other.sandboxId],
  ]) {
    expect({ name, value, status: (await ask(changed(url, name, value))).status }).toEqual({
      name,
      value,
      status: 401,
    })
  }
  expect((await ask(url, { method: 'POST', body: 'x' })).status).toBe(401)
  expect((await ask(url, { method: 'PUT', body: 'x' })).status).toBe(405)
  expect((await ask(new URL('/etc/passwd', url))).status).toBe(404)
  const wrong = sandbox.downloadUrl('x', { useSignatureExpiration: 'soon' })
  expect(await failure(wrong)).toBeInstanceOf(InvalidArgumentError)
  const late = await other.downloadUrl('x')
  await other.kill()
  expect(await ask(late)).toEqual({
    status: 502,
    body: { sandboxId: other.sandboxId, code: 502, message: 'The sandbox was not found' },
  })
})

test('the server keeps no process alive', async () => {
  const { code, stdout, stderr } = await program(
    `const { Sandbox } = require('./index.js')
     Sandbox.create().then(async (sandbox) => {
       await sandbox.files.write('f', 'x')
       console.log(await (await fetch(await sandbox.downloadUrl('f'))).text())
     })`,
    { env: { AMBERBOX_HOME: store.home } },
  )
  expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: 'x\n', stderr: '' })
})
