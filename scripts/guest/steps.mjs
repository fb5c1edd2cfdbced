// One build at a time: progress lines, the log file, child processes, the lock, the
// temporary directory and the atomic publication of the result.

import { spawn, spawnSync } from 'node:child_process'
import { closeSync, existsSync, mkdirSync, openSync, readdirSync, readFileSync, renameSync, rmSync, statfsSync, statSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { ScriptError } from '../progress.mjs'
import { currentFile, guestCache } from './paths.mjs'

/** A failure whose message is meant for the user: shown without a stack. */
export class BuildError extends ScriptError {}

/** A program failed; what it said is in the log. */
class ProgramError extends BuildError {}

// Results of each kind that stay in the cache.
const KEEP = 3

const children = new Set()
let interrupted = false
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
  process.on(signal, () => {
    interrupted = true
    // The children fail, the build unwinds and removes its temporary directory.
    for (const child of children) kill(child, 'SIGTERM')
    if (children.size === 0) process.exit(130)
  })
}

/**
 * Runs one build under the lock of its kind. `body` leaves its files in `build.out` and
 * returns the directory's final name and, where there is one, the inputs it is current for.
 */
export async function withBuild(kind, { needsBytes, cached }, body) {
  mkdirSync(guestCache(), { recursive: true })
  const release = await lock(kind)
  try {
    // Another process may have built it while this one waited.
    const done = cached()
    if (done) return done
    removeLeftovers(kind)
    checkSpace(needsBytes)
    const build = new Build(kind)
    try {
      const result = await body(build)
      if (interrupted) throw new BuildError('Interrupted')
      return build.publish(result)
    } catch (error) {
      throw build.explain(error)
    } finally {
      build.close()
    }
  } finally {
    release()
  }
}

class Build {
  constructor(kind) {
    this.kind = kind
    this.tmp = join(guestCache(), `tmp-${kind}-${process.pid}`)
    this.out = join(this.tmp, 'out')
    mkdirSync(this.out, { recursive: true })
    this.logPath = join(guestCache(), `${kind}.log`)
    this.log = openSync(this.logPath, 'w')
    this.started = Date.now()
  }

  /** Runs one step and prints its line: name, seconds, and what `body` returns about it. */
  async step(name, body) {
    const began = Date.now()
    this.note = ''
    const live = process.stdout.isTTY
    const line = (end) => `  ${name.padEnd(34)} ${seconds(began).padStart(7)}  ${end}`
    const ticker = setInterval(() => {
      if (live) process.stdout.write(`\r\x1b[K${line(this.note)}`)
      else process.stdout.write(`${line(`${this.note} ...`)}\n`)
    }, live ? 1000 : 30000)
    writeSync(this.log, `\n=== ${name}\n`)
    try {
      const result = (await body()) ?? ''
      process.stdout.write(`${live ? '\r\x1b[K' : ''}${line(result)}\n`)
    } catch (error) {
      process.stdout.write(`${live ? '\r\x1b[K' : ''}${line('failed')}\n`)
      throw error
    } finally {
      clearInterval(ticker)
    }
  }

  /** Runs a program with its output in the log; returns standard output, or shows each line of both streams to `onLine`; `quiet` keeps standard output out of the log. */
  run(command, args, { onLine, quiet = false, ...options } = {}) {
    writeSync(this.log, `$ ${command} ${args.join(' ')}\n`)
    return new Promise((resolve, reject) => {
      if (interrupted) return reject(new BuildError('Interrupted'))
      // A group of its own, so that an interrupt reaches the compilers below make; and if
      // this process is killed, the kernel tells the child.
      const child = spawn('setpriv', ['--pdeathsig', 'TERM', '--', command, ...args], { stdio: ['ignore', 'pipe', 'pipe'], detached: true, ...options })
      children.add(child)
      let output = ''
      for (const stream of [child.stdout, child.stderr]) {
        let rest = ''
        stream.on('data', (data) => {
          if (!quiet || stream === child.stderr) writeSync(this.log, data)
          if (onLine) {
            const lines = (rest + data).split('\n')
            rest = lines.pop()
            lines.forEach(onLine)
          } else if (stream === child.stdout) {
            output += data
          }
        })
      }
      child.on('error', (error) => { children.delete(child); reject(new BuildError(`Cannot run setpriv (package util-linux): ${error.message}`)) })
      child.on('close', (code, signal) => {
        children.delete(child)
        if (interrupted) reject(new BuildError('Interrupted'))
        else if (code !== 0) reject(new ProgramError(`${command} failed (${signal ?? `exit code ${code}`})`))
        else resolve(output)
      })
    })
  }

  writeManifest(fields) {
    writeFileSync(join(this.out, 'manifest.json'), `${JSON.stringify(fields, null, 2)}\n`)
  }

  publish({ name, currentFor }) {
    const dir = join(guestCache(), name)
    // The same content may be there from an earlier build of the same name.
    if (existsSync(dir)) rmSync(this.out, { recursive: true })
    else renameSync(this.out, dir)
    if (currentFor) {
      const pointer = join(this.tmp, 'current')
      writeFileSync(pointer, `${name}\n`)
      renameSync(pointer, currentFile(this.kind, currentFor))
    }
    prune(this.kind, name)
    process.stdout.write(`  done in ${seconds(this.started)}: ${dir}\n`)
    return dir
  }

  explain(error) {
    if (!(error instanceof BuildError)) writeSync(this.log, `${error.stack}\n`)
    if (interrupted) return new BuildError(`Building the ${this.kind} was interrupted. Nothing was left behind.`)
    if (error instanceof BuildError && !(error instanceof ProgramError)) return error
    const tail = readFileSync(this.logPath, 'utf8').trimEnd().split('\n').slice(-25).map((line) => `  | ${line}`).join('\n')
    return new BuildError(`Building the ${this.kind} failed: ${error.message}\n${tail}\nFull log: ${this.logPath}`)
  }

  close() {
    closeSync(this.log)
    removeTree(this.tmp)
  }
}

/** Keeps the newest results of a kind, and no pointer to one that is gone. Open files of a removed result stay readable. */
function prune(kind, name) {
  const entries = readdirSync(guestCache())
  const dirs = entries.filter((entry) => entry.startsWith(`${kind}-`) && entry !== name && existsSync(join(guestCache(), entry, 'manifest.json')))
    .sort((a, b) => statSync(join(guestCache(), b)).mtimeMs - statSync(join(guestCache(), a)).mtimeMs)
  for (const dir of dirs.slice(KEEP - 1)) rmSync(join(guestCache(), dir), { recursive: true, force: true })
  for (const pointer of entries.filter((entry) => entry.startsWith(`${kind}.`) && entry.endsWith('.current'))) {
    const path = join(guestCache(), pointer)
    if (!existsSync(join(guestCache(), readFileSync(path, 'utf8').trim()))) rmSync(path, { force: true })
  }
}

/** An advisory lock that dies with this process: flock(1) holds it for as long as our end of its pipe is open. */
function lock(kind) {
  const path = join(guestCache(), `${kind}.lock`)
  return new Promise((resolve, reject) => {
    const child = spawn('flock', ['--exclusive', path, 'sh', '-c', 'echo held; exec cat'], { stdio: ['pipe', 'pipe', 'inherit'], detached: true })
    const waiting = setTimeout(() => process.stdout.write(`  waiting for another build of the ${kind} ...\n`), 500)
    child.on('error', (error) => { clearTimeout(waiting); reject(new BuildError(`Cannot run flock (package util-linux): ${error.message}`)) })
    child.on('exit', () => { clearTimeout(waiting); reject(new BuildError(`Cannot lock ${path}`)) })
    child.stdout.once('data', () => {
      clearTimeout(waiting)
      resolve(() => child.stdin.end())
    })
  })
}

/** Temporary directories of builds that were killed; the lock is held, so none is in use. */
function removeLeftovers(kind) {
  for (const name of readdirSync(guestCache())) {
    if (name.startsWith(`tmp-${kind}-`)) removeTree(join(guestCache(), name))
  }
}

/** Removes a tree that may hold a root file system: never across a mount point. */
function removeTree(dir) {
  const mounts = readFileSync('/proc/self/mountinfo', 'utf8').split('\n').map((line) => line.split(' ')[4] ?? '')
  const mounted = mounts.filter((point) => point.startsWith(`${dir}/`))
  if (mounted.length > 0) {
    process.stderr.write(`  left in place because something is mounted in it: ${dir} (${mounted.join(', ')})\n`)
    return
  }
  rmSync(dir, { recursive: true, force: true })
}

function checkSpace(bytes) {
  const { bavail, bsize } = statfsSync(guestCache())
  if (bavail * bsize < bytes) {
    throw new BuildError(`Not enough disk space in ${guestCache()}: ${size(bavail * bsize)} free, ${size(bytes)} needed. `
      + 'Free some, or set AMBERBOX_CACHE to a directory elsewhere.')
  }
}

/** Makes sure that Debian packages are installed: as root installs them, else says how. */
export async function needPackages(build, packages) {
  if (spawnSync('apt-get', ['--version']).error) {
    throw new BuildError('The guest is built from Debian packages: this needs a Debian 12 host (or container) with apt-get')
  }
  const missing = packages.filter((name) => {
    const query = spawnSync('dpkg-query', ['-W', '-f', '${db:Status-Status}', name], { encoding: 'utf8' })
    return query.status !== 0 || query.stdout !== 'installed'
  })
  if (missing.length === 0) return 'present'
  const line = `apt-get install --no-install-recommends -y ${missing.join(' ')}`
  if (process.getuid() !== 0) throw new BuildError(`Debian packages are missing. Run: sudo ${line}`)
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
  build.note = missing.join(' ')
  const install = () => build.run('apt-get', line.split(' ').slice(1), { env })
  try {
    await install()
  } catch (error) {
    if (interrupted) throw error
    // Usually lists that are missing or out of date.
    await build.run('apt-get', ['update'], { env })
    await install()
  }
  return `installed ${missing.join(' ')}`
}

/** The version that apt would install; refreshes the lists once when it knows none. */
export async function candidate(build, name, { refresh = false } = {}) {
  const ask = async () => {
    const policy = await build.run('apt-cache', ['policy', name], { env: { ...process.env, LC_ALL: 'C' } })
    const version = /Candidate: (\S+)/.exec(policy)?.[1]
    return version === '(none)' ? undefined : version
  }
  const root = process.getuid() === 0
  if (refresh && root) await build.run('apt-get', ['update'])
  let version = await ask()
  if (!version && root && !refresh) {
    await build.run('apt-get', ['update'])
    version = await ask()
  }
  if (!version) {
    throw new BuildError(`apt knows no package ${name}. It is in Debian 12's security archive (bookworm-security main); `
      + (root ? 'add that to the apt sources.' : 'run: sudo apt-get update'))
  }
  return version
}

export function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`
}

/** Bytes of a file that take space on disk. */
export function allocated(path) {
  return statSync(path).blocks * 512
}

function seconds(since) {
  return `${((Date.now() - since) / 1000).toFixed(1)} s`
}

function kill(child, signal) {
  try {
    process.kill(-child.pid, signal)
  } catch {
    // it has ended
  }
}
