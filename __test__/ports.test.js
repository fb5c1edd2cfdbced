'use strict'
/** Servers in a sandbox, reached from this host. */
const http = require('node:http')
const net = require('node:net')
const { once } = require('node:events')
const { createHash, randomBytes } = require('node:crypto')
const { InvalidArgumentError, Sandbox, SandboxError, SandboxNotFoundError } = require('..')
const { ownStore, failure, program, until } = require('./support')

const store = ownStore()

/** Starts a program in a sandbox; it is killed with the sandbox. */
async function serve(sandbox, cmd) {
  const handle = await sandbox.commands.run(cmd, { background: true, timeoutMs: 0 })
  handle.wait().catch(() => {})
  return handle
}

function address(host) {
  const [, hostname, port] = /^(.*):(\d+)$/.exec(host)
  return { host: hostname, port: Number(port) }
}

/** An open connection. */
async function dial(host) {
  const socket = net.connect(address(host))
  await once(socket, 'connect')
  return socket
}

/** Resolves when a connection is over: with the error code if it was cut. */
function over(socket) {
  return new Promise((done) => {
    let code
    socket.on('error', (error) => (code = error.code))
    socket.on('close', () => done(code))
  })
}

/** Everything until the end. */
async function drain(socket) {
  const pieces = []
  for await (const piece of socket) pieces.push(piece)
  return Buffer.concat(pieces)
}

/** Waits until a server answers. */
const answering = (host) =>
  until(async () => (await fetch(`http://${host}/`).catch(() => undefined))?.ok, 120_000)

const python = (script) => `exec python3 -c '${script}'`

/** Echoes upper case, one connection at a time, until the other side has ended. */
const ECHO = python(`
import socket
s = socket.create_server(("127.0.0.1", 7000))
while True:
    c, _ = s.accept()
    while True:
        d = c.recv(65536)
        if not d: break
        c.sendall(d.upper())
    c.sendall(b"bye")
    c.close()
`)

test('HTTP, on every kind of address that a server may be bound to', async () => {
  const sandbox = await store.create()
  await sandbox.files.write('/home/user/www/index.html', 'hello from inside')
  const binds = ['127.0.0.1', '0.0.0.0', '::1', '::']
  await Promise.all(
    binds.map((bind, i) =>
      serve(sandbox, `exec python3 -m http.server ${8000 + i} --bind ${bind} --directory www`),
    ),
  )
  for (const i of binds.keys()) {
    const host = sandbox.getHost(8000 + i)
    expect(host).toMatch(/^127\.0\.0\.1:\d+$/)
    expect(sandbox.getHost(8000 + i)).toBe(host)
    await answering(host)
    expect(await (await fetch(`http://${host}/index.html`)).text()).toBe('hello from inside')
  }
  expect((await Sandbox.connect(sandbox.sandboxId)).getHost(8000)).toBe(sandbox.getHost(8000))
  expect(sandbox.getHost(8000, { bind: '127.0.0.2' })).toMatch(/^127\.0\.0\.2:\d+$/)
  expect(sandbox.getHost(8000, { bind: '::1' })).toMatch(/^\[::1\]:\d+$/)
  expect((await fetch(`http://${sandbox.getHost(8000, { bind: '::1' })}/`)).status).toBe(200)
  for (const port of [0, -1, 65_536, 1.5, '80'])
    expect(() => sandbox.getHost(port)).toThrow(InvalidArgumentError)
  expect(() => sandbox.getHost(80, { bind: 'localhost' })).toThrow(InvalidArgumentError)

  // Many requests over one connection, and many connections.
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 })
  const get = () =>
    new Promise((done, fail) => {
      const request = http.get(
        { ...address(sandbox.getHost(8000)), agent, path: '/index.html' },
        (response) => {
          response.resume().on('end', () => done(response.statusCode))
        },
      )
      request.on('error', fail)
    })
  for (let i = 0; i < 5; i++) expect(await get()).toBe(200)
  agent.destroy()
  const many = await Promise.all(
    Array.from({ length: 20 }, async () =>
      (await fetch(`http://${sandbox.getHost(8001)}/index.html`)).text(),
    ),
  )
  expect(new Set(many)).toEqual(new Set(['hello from inside']))
  await sandbox.kill()
})

test('plain TCP: both directions, each with an end of its own', async () => {
  const sandbox = await store.create()
  await serve(sandbox, ECHO)
  const host = sandbox.getHost(7000)
  await until(async () => {
    const socket = net.connect(address(host)).on('error', () => {})
    socket.end()
    return (await drain(socket).catch(() => '')).toString() === 'bye'
  })
  const socket = await dial(host)
  socket.write('first ')
  expect((await once(socket, 'data'))[0].toString()).toBe('FIRST ')
  socket.end('last')
  expect((await drain(socket)).toString()).toBe('LASTbye')

  // More than all buffers hold, so that each side has to wait for the other.
  const data = randomBytes(8 << 20)
  const bulk = net.connect({ ...address(host), allowHalfOpen: true })
  const received = drain(bulk)
  bulk.end(data.toString('hex'))
  const sum = (bytes) => createHash('sha256').update(bytes).digest('hex')
  expect(sum(await received)).toBe(sum(`${data.toString('hex').toUpperCase()}bye`))
  await sandbox.kill()
})

test('WebSocket', async () => {
  const sandbox = await store.create()
  await sandbox.files.write(
    '/home/user/ws.py',
    `
import base64, hashlib, socket
s = socket.create_server(('127.0.0.1', 9000))
while True:
    c, _ = s.accept()
    head = b''
    while b'\\r\\n\\r\\n' not in head:
        d = c.recv(4096)
        if not d: break
        head += d
    if b'\\r\\n\\r\\n' not in head: continue
    key = [l.split(b': ')[1] for l in head.split(b'\\r\\n') if l.lower().startswith(b'sec-websocket-key')][0]
    accept = base64.b64encode(hashlib.sha1(key + b'258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest())
    c.sendall(b'HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: ' + accept + b'\\r\\n\\r\\n')
    frame = c.recv(4096)
    n = frame[1] & 127
    mask, body = frame[2:6], frame[6:6 + n]
    text = bytes(b ^ mask[i % 4] for i, b in enumerate(body)).upper()
    c.sendall(bytes([0x81, len(text)]) + text)
    c.recv(4096)
    c.close()
`,
  )
  await serve(sandbox, 'exec python3 ws.py')
  const host = sandbox.getHost(9000)
  await until(
    async () => (await sandbox.commands.run("grep -c ':2328 ' /proc/net/tcp || true")).stdout !== '0\n',
  )
  const key = randomBytes(16).toString('base64')
  const request = http.get({
    ...address(host),
    headers: {
      Connection: 'Upgrade',
      Upgrade: 'websocket',
      'Sec-WebSocket-Key': key,
      'Sec-WebSocket-Version': 13,
    },
  })
  const [response, socket] = await once(request, 'upgrade')
  const accept = createHash('sha1').update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest('base64')
  expect(response.headers['sec-websocket-accept']).toBe(accept)
  const mask = randomBytes(4)
  const text = Buffer.from('over the wire')
  socket.write(
    Buffer.concat([Buffer.from([0x81, 0x80 | text.length]), mask, text.map((b, i) => b ^ mask[i % 4])]),
  )
  const [frame] = await once(socket, 'data')
  expect(frame.subarray(2).toString()).toBe('OVER THE WIRE')
  socket.destroy()
  await sandbox.kill()
})

test('a closed port resets, and listeners end with their sandbox', async () => {
  const sandbox = await store.create()
  const host = sandbox.getHost(3000)
  const refused = await failure(fetch(`http://${host}/`))
  expect(refused.cause.code).toMatch(/^(ECONNRESET|UND_ERR_SOCKET)$/)
  await serve(sandbox, ECHO)
  const echo = sandbox.getHost(7000)
  await until(
    async () => (await sandbox.commands.run("grep -c ':1B58 ' /proc/net/tcp || true")).stdout !== '0\n',
  )
  const socket = await dial(echo)
  socket.write('x')
  await once(socket, 'data')
  const cut = over(socket)
  await sandbox.kill()
  expect(await cut).toBe('ECONNRESET')
  await until(async () => (await over(net.connect(address(echo)).resume())) === 'ECONNREFUSED')
  expect(() => sandbox.getHost(7000)).toThrow(SandboxNotFoundError)
  expect(() => sandbox.getHost(7001)).toThrow(SandboxNotFoundError)
})

test('a snapshot leaves connections alone; a pause cuts them and keeps the address', async () => {
  const sandbox = await store.create({ lifecycle: { onTimeout: 'pause', autoResume: true } })
  await serve(sandbox, ECHO)
  await serve(sandbox, 'exec python3 -m http.server 8000')
  const host = sandbox.getHost(7000)
  const web = sandbox.getHost(8000)
  await answering(web)
  const socket = await dial(host)
  socket.write('one')
  expect((await once(socket, 'data'))[0].toString()).toBe('ONE')
  const { snapshotId } = await sandbox.createSnapshot()
  socket.write('two')
  expect((await once(socket, 'data'))[0].toString()).toBe('TWO')

  // The copy has the server, and ports of its own.
  const copy = await store.create(snapshotId)
  expect(copy.getHost(8000)).not.toBe(web)
  expect((await fetch(`http://${copy.getHost(8000)}/`)).status).toBe(200)
  await copy.kill()

  const cut = over(socket)
  await sandbox.pause()
  expect(await cut).toBe('ECONNRESET')
  expect(sandbox.getHost(8000)).toBe(web)
  expect(await sandbox.isRunning()).toBe(false)
  // The request resumes it.
  expect((await fetch(`http://${web}/`)).status).toBe(200)
  expect(await sandbox.isRunning()).toBe(true)
  await sandbox.kill()

  const asleep = await store.create()
  await serve(asleep, 'exec python3 -m http.server 8000')
  const quiet = asleep.getHost(8000)
  await answering(quiet)
  await asleep.pause()
  expect((await failure(fetch(`http://${quiet}/`))).cause).toBeDefined()
  expect(await asleep.isRunning()).toBe(false)
  await asleep.connect()
  expect((await fetch(`http://${quiet}/`)).status).toBe(200)
  await asleep.kill()
})

test('private ports want the token', async () => {
  const sandbox = await store.create({ network: { allowPublicTraffic: false } })
  await serve(sandbox, 'exec python3 -m http.server 8000')
  const url = `http://${sandbox.getHost(8000)}/`
  const get = (token) => fetch(url, { headers: token ? { 'e2b-traffic-access-token': token } : {} })
  await until(async () => (await get(sandbox.trafficAccessToken).catch(() => undefined))?.ok)
  expect((await get()).status).toBe(403)
  expect((await get('wrong')).status).toBe(403)
  expect(await (await get()).json()).toMatchObject({ code: 403, sandboxId: sandbox.sandboxId })
  const other = await store.create({ network: { allowPublicTraffic: false } })
  expect(other.trafficAccessToken).not.toBe(sandbox.trafficAccessToken)
  expect((await store.create()).trafficAccessToken).toBeUndefined()
  await Promise.all([sandbox.kill(), other.kill()])
})

test('servers see the Host they are meant to see', async () => {
  const network = { maskRequestHost: 'localhost:${PORT}' }
  const sandbox = await store.create({ network })
  await serve(
    sandbox,
    `exec python3 -c '
from http.server import *
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = self.headers["host"].encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
ThreadingHTTPServer(("127.0.0.1", 8000), Handler).serve_forever()'`,
  )
  const url = `http://${sandbox.getHost(8000)}/`
  const get = () =>
    fetch(url).then(
      (response) => response.text(),
      () => undefined,
    )
  expect(await until(get)).toBe('localhost:8000')
  expect(await get()).toBe('localhost:8000')
  expect((await sandbox.getInfo()).network).toEqual(network)
  await sandbox.updateNetwork({ denyOut: ['0.0.0.0/0'] })
  expect((await sandbox.getInfo()).network).toEqual({ ...network, denyOut: ['0.0.0.0/0'] })
  expect(await get()).toBe('localhost:8000')
  await sandbox.kill()
  for (const maskRequestHost of ['', 'a\r\nb: c', 7]) {
    expect(await failure(store.create({ network: { maskRequestHost } }))).toBeInstanceOf(InvalidArgumentError)
  }
})

test('forwarded ports do not keep Node alive', async () => {
  const { code, stdout, stderr } = await program(`
    const { Sandbox } = require('.')
    Sandbox.create().then(async (sandbox) => {
      await sandbox.commands.run('python3 -m http.server 8000', { background: true }).then((h) => h.disconnect())
      const host = sandbox.getHost(8000)
      for (;;) {
        const status = await fetch('http://' + host).then((r) => r.status, () => undefined)
        if (status) return console.log(status)
        await new Promise((done) => setTimeout(done, 25))
      }
    })`)
  expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: '200\n', stderr: '' })
})

test('what needs an HTTP server or the cloud says so', async () => {
  const sandbox = await store.create()
  for (const refused of [sandbox.getMcpToken()]) {
    expect(await failure(refused)).toBeInstanceOf(SandboxError)
  }
  expect(() => sandbox.getMcpUrl()).toThrow(SandboxError)
  await sandbox.kill()
})
