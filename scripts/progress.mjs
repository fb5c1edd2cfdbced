// Progress of the project's scripts: one line per step with its time and what it produced; child processes
// whose output is shown only when they fail. No dependencies: these scripts run in a clean clone.

import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')

/** A failure whose message is meant for the user: shown without a stack. */
export class ScriptError extends Error {}

/** Runs a script's main function; failures become a message and an exit code. */
export async function main(body) {
  try {
    await body()
  } catch (error) {
    process.stderr.write(`\n${error instanceof ScriptError ? error.message : error.stack}\n`)
    process.exitCode = 1
  }
}

export function seconds(since) {
  return `${((Date.now() - since) / 1000).toFixed(1)} s`
}

export function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`
}

export function heading(text) {
  process.stdout.write(`${text}\n`)
}

/**
 * Runs one step and prints its line: name, seconds, and what `body` returns about it. `body` gets a function that
 * sets the note shown meanwhile.
 */
export async function step(name, body) {
  const began = Date.now()
  const live = process.stdout.isTTY
  let note = ''
  const line = (end) => `  ${name.padEnd(34)} ${seconds(began).padStart(7)}  ${end}`
  const ticker = setInterval(
    () => process.stdout.write(live ? `\r\x1b[K${line(note)}` : `${line(`${note} ...`)}\n`),
    live ? 1000 : 30_000,
  )
  const clear = live ? '\r\x1b[K' : ''
  try {
    const result = await body((text) => {
      note = text
    })
    process.stdout.write(`${clear}${line(result ?? '')}\n`)
    return result
  } catch (error) {
    process.stdout.write(`${clear}${line('failed')}\n`)
    throw error
  } finally {
    clearInterval(ticker)
  }
}

/** Runs a program. `onLine` sees each line of both outputs; a failure carries the last of them. */
export function run(command, args, { onLine, inherit = false, ...options } = {}) {
  return new Promise((done, fail) => {
    const stdio = inherit ? 'inherit' : ['ignore', 'pipe', 'pipe']
    const child = spawn(command, args, { cwd: root, stdio, ...options })
    const tail = []
    let stdout = ''
    for (const stream of inherit ? [] : [child.stdout, child.stderr]) {
      let rest = ''
      stream.setEncoding('utf8')
      stream.on('data', (text) => {
        if (stream === child.stdout) stdout += text
        const lines = (rest + text).split('\n')
        rest = lines.pop()
        for (const line of lines) {
          onLine?.(line)
          if (stream === child.stderr || !line.startsWith('{')) tail.push(line)
          if (tail.length > 40) tail.shift()
        }
      })
    }
    child.on('error', (error) => fail(new ScriptError(`Cannot run ${command}: ${error.message}`)))
    child.on('close', (code, signal) => {
      if (code === 0) return done(stdout)
      const why = signal ?? `exit code ${code}`
      const shown = tail.map((line) => `  | ${line}`).join('\n')
      fail(new ScriptError(`${command} ${args.join(' ')} failed (${why})${shown && `\n${shown}`}`))
    })
  })
}

export function hasProgram(name) {
  return spawnSync(name, ['--version'], { stdio: 'ignore' }).error === undefined
}

/** Installs the npm packages of the lock file unless they are there already. */
export async function npmPackages(dir = root) {
  const lock = createHash('sha256')
    .update(readFileSync(join(dir, 'package-lock.json')))
    .digest('hex')
  const stamp = join(dir, 'node_modules', '.amberbox-lock')
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === lock) return
  await step('npm packages', async () => {
    await run('npm', ['ci', '--no-audit', '--no-fund'], { cwd: dir })
    writeFileSync(stamp, lock)
    return 'npm ci'
  })
}

/** A program of node_modules. */
export function tool(...parts) {
  return join(root, 'node_modules', ...parts)
}
