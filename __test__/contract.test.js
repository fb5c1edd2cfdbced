'use strict'
/** The seams between the layers: native exports, error codes, module formats, versions. */
const { readdirSync, readFileSync } = require('node:fs')
const path = require('node:path')
const amberbox = require('..')
const errors = require('../lib/errors')
const { native } = require('../lib/native')
const { ROOT, program } = require('./support')

test('every native function that the JavaScript layer names exists', () => {
  const sources = readdirSync(path.join(ROOT, 'lib')).map((file) =>
    readFileSync(path.join(ROOT, 'lib', file), 'utf8'),
  )
  const named = new Set(
    sources.flatMap((text) => [...text.matchAll(/\bnative\.(\w+)\(/g)].map((match) => match[1])),
  )
  expect(named.size).toBeGreaterThan(20)
  for (const name of named) expect({ name, type: typeof native[name] }).toEqual({ name, type: 'function' })
})

test('every native error code has a class, and every class a code', () => {
  expect(native.errorCodes().sort()).toEqual(Object.keys(errors.CLASS_OF_CODE).sort())
})

test('native errors become their class, with code and details', () => {
  const error = errors.fromNative(new Error('ERR_SANDBOX_CRASHED: text\nmore\u001e{"console":"last"}'))
  expect(error).toBeInstanceOf(amberbox.SandboxCrashedError)
  expect(error).toMatchObject({ code: 'ERR_SANDBOX_CRASHED', message: 'text\nmore', console: 'last' })
  const other = new Error('something else')
  expect(errors.fromNative(other)).toBe(other)
})

test('the error classes have their hierarchy and names', () => {
  const parent = (Class) => Object.getPrototypeOf(Class).name
  const classes = Object.entries(amberbox).filter(([name]) => name.endsWith('Error'))
  expect(Object.fromEntries(classes.map(([name, Class]) => [name, parent(Class)]))).toEqual({
    SandboxError: 'Error',
    TimeoutError: 'SandboxError',
    InvalidArgumentError: 'SandboxError',
    NotEnoughSpaceError: 'SandboxError',
    NotFoundError: 'SandboxError',
    FileNotFoundError: 'NotFoundError',
    SandboxNotFoundError: 'NotFoundError',
    TemplateError: 'SandboxError',
    RateLimitError: 'SandboxError',
    SandboxCrashedError: 'SandboxError',
    AuthenticationError: 'Error',
    GitAuthError: 'AuthenticationError',
    GitUpstreamError: 'SandboxError',
    BuildError: 'Error',
    FileUploadError: 'BuildError',
    VolumeError: 'Error',
    VolumeNotFoundError: 'VolumeError',
    VolumePathNotFoundError: 'VolumeError',
    SecretError: 'Error',
    SecretNotFoundError: 'SecretError',
    ServiceBusyError: 'Error',
    CommandExitError: 'SandboxError',
  })
  for (const [name, Class] of classes) {
    const result = { exitCode: 1, stdout: '', stderr: '' }
    expect(new Class(name === 'CommandExitError' ? result : 'x').name).toBe(name)
  }
})

test('index.d.ts declares what index.js exports', () => {
  const declared = readFileSync(path.join(ROOT, 'index.d.ts'), 'utf8')
  for (const name of Object.keys(amberbox).filter((name) => name !== '__esModule' && name !== 'default')) {
    expect(declared).toMatch(new RegExp(`export declare (class|const|enum|function) ${name}\\b`))
  }
})

test('versions of package and addon agree', () => {
  expect(native.version()).toBe(require('../package.json').version)
})

test('require and import give the same classes', async () => {
  const { code, stdout, stderr } = await program(
    `import('./index.mjs').then((esm) => {
       const cjs = require('./index.js')
       const names = Object.keys(cjs).filter((name) => name !== '__esModule')
       console.log(names.every((name) => esm[name] === cjs[name]), esm.default === cjs.Sandbox)
     })`,
  )
  expect({ code, stdout, stderr }).toEqual({ code: 0, stdout: 'true true\n', stderr: '' })
})
