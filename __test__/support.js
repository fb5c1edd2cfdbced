'use strict'
/** What the test files share: a store of their own, and sandboxes that are gone afterwards. */
const { mkdtempSync, rmSync } = require('node:fs')
const { spawn } = require('node:child_process')
const os = require('node:os')
const path = require('node:path')
const { Sandbox } = require('..')

const ROOT = path.resolve(__dirname, '..')

/** Gives the calling test file a store of its own. Adopting the base template is a few hard links. */
function ownStore() {
  const home = mkdtempSync(path.join(os.tmpdir(), 'amberbox-test-'))
  const before = process.env.AMBERBOX_HOME
  process.env.AMBERBOX_HOME = home
  const sandboxes = []
  afterAll(async () => {
    await Promise.all(sandboxes.map((sandbox) => sandbox.kill()))
    for (const pages = Sandbox.list(); pages.hasNext;) {
      for (const { sandboxId } of await pages.nextItems()) await Sandbox.kill(sandboxId)
    }
    if (before === undefined) delete process.env.AMBERBOX_HOME
    else process.env.AMBERBOX_HOME = before
    rmSync(home, { recursive: true, force: true })
  })
  return {
    home,
    /** A sandbox that is killed after the file's tests. */
    async create(...args) {
      const sandbox = await Sandbox.create(...args)
      sandboxes.push(sandbox)
      return sandbox
    },
  }
}

/** Runs a program of its own against the library; resolves with its output and how it ended. */
function program(source, { env = {}, args = [], onOutput } = {}) {
  const child = spawn(process.execPath, [...args, '-e', source], {
    cwd: ROOT,
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let stdout = ''
  let stderr = ''
  child.stdout.on('data', (data) => {
    stdout += data
    onOutput?.(stdout, child)
  })
  child.stderr.on('data', (data) => (stderr += data))
  return new Promise((done) =>
    child.on('close', (code, signal) => done({ code, signal, stdout, stderr, pid: child.pid })),
  )
}

/** The error that a promise rejects with. */
async function failure(promise) {
  let value
  try {
    value = await promise
  } catch (error) {
    return error
  }
  throw new Error(`Expected a rejection, got ${JSON.stringify(value)}`)
}

/**
 * What each of several promises is rejected with. All are listened to from the start: one that rejects while another is awaited
 * would count as unhandled.
 */
function failures(promises) {
  return Promise.all(promises.map(failure))
}

/** Waits until `check` gives something true. */
async function until(check, ms = 30_000) {
  const end = Date.now() + ms
  for (;;) {
    const value = await check()
    if (value) return value
    if (Date.now() > end) throw new Error(`Nothing after ${ms} ms: ${check}`)
    await new Promise((done) => setTimeout(done, 25))
  }
}

module.exports = { ROOT, ownStore, program, failure, failures, until }
