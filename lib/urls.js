'use strict'
/**
 * Signed URLs of files: a small HTTP server on the loopback interface, started with the first URL, which answers
 * `GET /files` and `POST /files` as E2B's guest daemon does. It belongs to this process, keeps it no longer alive, and
 * serves whoever has a URL: the signature is the permission.
 */
const { createHmac, randomBytes, timingSafeEqual } = require('node:crypto')
const { createServer } = require('node:http')
const { pipeline } = require('node:stream/promises')
const { Readable } = require('node:stream')
const { getSignature } = require('./config')
const errors = require('./errors')
const { Filesystem } = require('./files')

/** From which every sandbox's token is derived: URLs of another process, or another sandbox, are not valid here. */
const SECRET = randomBytes(32)

/** Longest body of a form, which is held in memory; a raw body is streamed and has no limit. */
const MAX_FORM = 256 * 1024 * 1024

/** HTTP status of an error, as E2B's daemon answers. */
const STATUS = [
  [errors.NotEnoughSpaceError, 507],
  [errors.InvalidArgumentError, 400],
  [errors.AuthenticationError, 401],
  [errors.FileNotFoundError, 404],
  [errors.SandboxNotFoundError, 502],
  [errors.TimeoutError, 502],
]

class Refusal extends Error {
  constructor(status, message) {
    super(message)
    this.status = status
  }
}

let starting

/** Port of the server, which is started on first use. */
function port() {
  starting ??= new Promise((resolve, reject) => {
    const server = createServer((request, response) => void serve(request, response))
    server.on('connection', (socket) => socket.unref())
    server.on('error', (error) => {
      starting = undefined
      reject(error)
    })
    server.listen(0, '127.0.0.1', () => resolve(server.address().port))
    server.unref()
  })
  return starting
}

const tokenOf = (sandboxId) => createHmac('sha256', SECRET).update(sandboxId).digest('hex')

/**
 * A URL for one file of a sandbox.
 *
 * @param {'read' | 'write'} operation
 * @param {{ user?: string, useSignatureExpiration?: number }} opts expiration in seconds from now
 */
async function fileUrl(sandboxId, operation, path, { user, useSignatureExpiration } = {}) {
  if (useSignatureExpiration !== undefined && !Number.isFinite(useSignatureExpiration)) {
    throw new errors.InvalidArgumentError('useSignatureExpiration must be a number of seconds')
  }
  const { signature, expiration } = await getSignature({
    path,
    operation,
    user,
    expirationInSeconds:
      useSignatureExpiration === undefined ? undefined : Math.floor(useSignatureExpiration),
    envdAccessToken: tokenOf(sandboxId),
  })
  const url = new URL(`http://127.0.0.1:${await port()}/files`)
  url.searchParams.set('sandbox', sandboxId)
  if (user !== undefined) url.searchParams.set('username', user)
  if (path !== '') url.searchParams.set('path', path)
  url.searchParams.set('signature', signature)
  if (expiration !== null) url.searchParams.set('signature_expiration', String(expiration))
  return url.toString()
}

/** What a request asks for; throws a refusal if its signature is not the one for that. */
async function authorized(query, operation) {
  const sandboxId = query.get('sandbox') ?? ''
  const [path, user] = [query.get('path') ?? '', query.get('username') ?? undefined]
  const given = query.get('signature')
  if (given === null) throw new Refusal(401, 'missing signature query parameter')
  const expiration = query.get('signature_expiration')
  const sign = (signed) => {
    const now = Math.floor(Date.now() / 1000)
    const expirationInSeconds = signed === null ? undefined : Number(signed) - now
    return getSignature({ path, operation, user, expirationInSeconds, envdAccessToken: tokenOf(sandboxId) })
  }
  if (expiration !== null && !/^\d{1,15}$/.test(expiration)) throw new Refusal(401, 'invalid signature')
  let { signature, expiration: signed } = await sign(expiration)
  // The second may have changed while the signature was made.
  if (expiration !== null && signed !== Number(expiration))
    ({ signature, expiration: signed } = await sign(expiration))
  const [expected, actual] = [Buffer.from(signature), Buffer.from(given)]
  if (expected.length !== actual.length || !timingSafeEqual(expected, actual))
    throw new Refusal(401, 'invalid signature')
  if (expiration !== null && Number(expiration) < Date.now() / 1000)
    throw new Refusal(401, 'signature is already expired')
  return { sandboxId, path, user, files: new Filesystem(sandboxId) }
}

async function download(query, response, head) {
  const { path, user, files } = await authorized(query, 'read')
  const stream = await files.read(path, { user, format: 'stream', streamIdleTimeoutMs: 0 })
  response.writeHead(200, { 'content-type': 'application/octet-stream' })
  if (head) {
    await stream.cancel()
    response.end()
  } else {
    await pipeline(Readable.fromWeb(stream), response)
  }
}

async function upload(query, request, response) {
  const { path, user, files } = await authorized(query, 'write')
  const type = request.headers['content-type'] ?? ''
  const written = []
  if (type.startsWith('multipart/form-data')) {
    if (Number(request.headers['content-length'] ?? 0) > MAX_FORM) {
      throw new Refusal(413, 'The form is too large: send the content as application/octet-stream')
    }
    const form = await new Response(Readable.toWeb(request), { headers: { 'content-type': type } }).formData()
    for (const part of form.getAll('file')) {
      written.push(await files.write(path || part.name, part, { user }))
    }
    if (written.length === 0) throw new Refusal(400, "The form has no part 'file'")
  } else {
    written.push(await files.write(path, request, { user }))
  }
  response.writeHead(200, { 'content-type': 'application/json' })
  response.end(
    JSON.stringify(written.map(({ name, path: at, type: kind }) => ({ name, path: at, type: kind }))),
  )
}

async function serve(request, response) {
  const url = new URL(request.url, 'http://127.0.0.1')
  response.setHeader('access-control-allow-origin', '*')
  try {
    if (url.pathname !== '/files') throw new Refusal(404, 'not found')
    if (request.method === 'GET' || request.method === 'HEAD') {
      await download(url.searchParams, response, request.method === 'HEAD')
    } else if (request.method === 'POST') {
      await upload(url.searchParams, request, response)
    } else {
      throw new Refusal(405, 'method not allowed')
    }
  } catch (error) {
    // Half a file must not look like a whole one.
    if (response.headersSent) return response.destroy()
    const status = error.status ?? STATUS.find(([Class]) => error instanceof Class)?.[1] ?? 500
    const gone = status === 502 ? { sandboxId: url.searchParams.get('sandbox') } : {}
    response.writeHead(status, { 'content-type': 'application/json', connection: 'close' })
    response.end(
      JSON.stringify({
        ...gone,
        code: status,
        message: status === 502 ? 'The sandbox was not found' : error.message,
      }),
    )
  }
}

module.exports = { fileUrl }
